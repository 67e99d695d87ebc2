//! Refcounts: found, compared with the uses, adjusted in place (spec, Host cluster management).

use gipfel_base::Result;
use gipfel_node::CheckReport;

use super::Check;
use super::image::PIECE;
use super::used::ONE;

/// Bits of a refcount table entry that must be zero.
const RESERVED: u64 = 0x1ff;

impl Check {
    /// Reads the refcount table and claims the clusters of table and blocks. It comes last of
    /// all metadata: where two things overlap, this is the one that can be written anew.
    pub(super) async fn mark_refcounts(&mut self) -> Result<()> {
        let g = self.image.bounds.g;
        let start = self.image.header.reftable_offset;
        let len = u64::from(self.image.header.reftable_clusters) << g.cluster_bits;
        if let Some(why) = self.try_claim(start, len)? {
            self.damage(|| format!("the refcount table at {start:#x} ({len} bytes): {why}"));
            return Ok(());
        }
        self.reftable_claimed = true;
        for first in (0..len).step_by(PIECE as usize) {
            let entries = (len - first).min(PIECE) / 8;
            let read = self.image.table(start + first, entries).await;
            let what = || format!("the refcount table at {start:#x}");
            let Some(piece) = self.readable(read, what) else { return Ok(()) };
            let piece = piece.unwrap_or_else(|| vec![0; entries as usize]);
            self.used.charge(entries * 8)?;
            for (i, entry) in piece.into_iter().enumerate() {
                let block = self.mark_block(first / 8 + i as u64, entry)?;
                self.blocks.push(block);
            }
        }
        Ok(())
    }

    /// Claims a block; the result is where it lies, 0 where it is none.
    fn mark_block(&mut self, index: u64, entry: u64) -> Result<u64> {
        let offset = entry & !RESERVED;
        if offset != entry {
            self.damage(|| {
                format!("entry {index} of the refcount table ({entry:#x}): reserved bits are set")
            });
        }
        if offset == 0 {
            return Ok(0);
        }
        if let Some(why) = self.try_claim(offset, self.image.bounds.g.cluster_size())? {
            self.damage(|| format!("refcount block {index} at {offset:#x}: {why}"));
            return Ok(0);
        }
        Ok(offset)
    }

    /// Notes a damage of the refcount structures. Whether they can be written anew is known later.
    fn damage(&mut self, text: impl FnOnce() -> String) {
        self.needs.rebuild = true;
        self.damages += 1;
        if self.damage_texts.len() < CheckReport::MAX_FINDINGS {
            self.damage_texts.push(text());
        }
    }

    /// Number of clusters whose refcounts matter: all in the file, and used ones at its end.
    fn compared(&self) -> u64 {
        self.image.clusters().max(self.used.end())
    }

    /// Number of clusters whose refcounts the listed blocks can hold.
    fn reach(&self) -> u64 {
        self.blocks.len() as u64 * self.image.bounds.g.block_entries()
    }

    /// The blocks that matter: each one's index, where it lies, its first cluster and the one
    /// behind its last.
    fn each_block(&self) -> impl Iterator<Item = (usize, u64, u64, u64)> + use<> {
        let (entries, end) = (self.image.bounds.g.block_entries(), self.compared());
        let blocks = self.blocks.clone();
        blocks.into_iter().enumerate().map_while(move |(i, at)| {
            let first = i as u64 * entries;
            (first < end).then(|| (i, at, first, (first + entries).min(end)))
        })
    }

    /// Looks for used clusters whose refcounts have no place: the structures must be written anew.
    pub(super) fn find_missing_blocks(&mut self) {
        let mut missing = self.used.next(self.reach(), u64::MAX).is_some();
        for (_, at, first, end) in self.each_block() {
            missing |= at == 0 && self.used.next(first, end).is_some();
        }
        self.needs.rebuild |= missing;
    }

    /// Holds the stored refcounts against the uses.
    pub(super) async fn compare_refcounts(&mut self) -> Result<()> {
        let can = self.plan.raise && self.plan.lower;
        self.report.more_findings += self.damages - self.damage_texts.len() as u64;
        for text in std::mem::take(&mut self.damage_texts) {
            let more = if can { " (mended)" } else { "" };
            self.report.finding(format!("{text}{more}"));
        }
        if can {
            self.report.corruptions_fixed += self.damages;
        } else {
            self.report.corruptions += self.damages;
        }
        let g = self.image.bounds.g;
        for (i, at, first, end) in self.each_block() {
            let size = g.cluster_size();
            let read = match at {
                0 => Ok(None),
                _ => self.image.block(at, size).await,
            };
            let what = || format!("refcount block {i} at {at:#x}");
            match self.readable(read, what) {
                None => {}
                Some(None) => self.compare_unstored(first, end)?,
                Some(Some(block)) => {
                    for c in first..end {
                        self.compare_refcount(c, g.refcount(&block, c - first))?;
                    }
                }
            }
        }
        self.compare_unstored(self.reach(), u64::MAX)?;
        self.report.image_end = Some(self.end << g.cluster_bits);
        Ok(())
    }

    /// Compares clusters whose stored refcounts are all 0.
    fn compare_unstored(&mut self, first: u64, end: u64) -> Result<()> {
        let mut from = first;
        while let Some((c, _)) = self.used.next(from, end) {
            self.compare_refcount(c, 0)?;
            from = c + 1;
        }
        Ok(())
    }

    fn compare_refcount(&mut self, cluster: u64, stored: u64) -> Result<()> {
        let used = self.used.count(cluster);
        if stored == 0 && used == 0 {
            return Ok(());
        }
        self.end = self.end.max(cluster + 1);
        let text = || format!("cluster {cluster}: the refcount is {stored}, but there are {used}");
        let mut refcount = stored;
        if stored > used {
            self.needs.lower = true;
            if self.plan.lower {
                refcount = used;
                self.report.leaks_fixed += 1;
                self.report.finding(format!("{} uses (mended)", text()));
            } else {
                self.report.leaks += 1;
                self.report.finding(format!("{} uses: space is lost", text()));
            }
        } else if stored < used {
            self.needs.raise = true;
            let most = self.image.bounds.g.max_refcount();
            let can = self.plan.raise && used <= most;
            if can {
                refcount = used;
            }
            let hint = if used > most { ", which is more than a refcount can say" } else { "" };
            self.fault(can, format!("{} uses{hint}", text()));
        }
        if used > 0 && refcount == 1 {
            self.used.set(cluster, ONE)?;
        }
        Ok(())
    }

    /// Changes the stored refcounts in place, to `pick(stored, uses)`.
    pub(super) async fn adjust_refcounts(&mut self, pick: fn(u64, u64) -> u64) -> Result<()> {
        let g = self.image.bounds.g;
        for (_, at, first, end) in self.each_block() {
            if at == 0 {
                continue;
            }
            let size = g.cluster_size();
            let Ok(block) = self.image.block(at, size).await else { continue };
            if block.is_none() && self.used.next(first, end).is_none() {
                continue;
            }
            let old = block.unwrap_or_else(|| vec![0; size as usize]);
            let mut new = old.clone();
            for c in first..end {
                let stored = g.refcount(&old, c - first);
                let refcount = pick(stored, self.used.count(c));
                if refcount <= g.max_refcount() {
                    g.set_refcount(&mut new, c - first, refcount);
                }
            }
            if new != old {
                self.image.write(at, &new).await?;
            }
        }
        Ok(())
    }
}

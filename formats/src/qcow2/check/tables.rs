//! L1 and L2 tables: listed, counted, compared, mended (spec, Cluster mapping).
//!
//! An L2 table that several L1 entries share is read once, and its references count as often.

use gipfel_base::Result;

use super::Check;
use super::image::PIECE;
use super::judge::{self, Judged};
use super::used::{HARD, ONE, TABLE};
use crate::qcow2::entry::{COMPRESSED, COPIED, Entry};

/// An L1 table in the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct L1 {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How many entries it has.
    pub entries: u64,
    /// Whether it is the one that the guest sees; the others are snapshots'.
    pub active: bool,
}

impl L1 {
    /// The pieces in which it is read: offset in bytes, first entry, number of entries.
    fn pieces(self) -> impl Iterator<Item = (u64, u64, u64)> {
        const ENTRIES: u64 = PIECE / 8;
        let firsts = (0..self.entries).step_by(ENTRIES as usize);
        firsts.map(move |i| (self.offset + i * 8, i, (self.entries - i).min(ENTRIES)))
    }

    fn name(self) -> &'static str {
        if self.active { "the L1 table" } else { "the L1 table of a snapshot" }
    }
}

/// An L2 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    /// Its cluster.
    pub cluster: u64,
    /// How many L1 entries refer to it.
    pub refs: u64,
    /// The number of the first one that does.
    pub index: u64,
}

/// The numbers that describe the active tables.
#[derive(Default)]
struct Layout {
    allocated: u64,
    fragmented: u64,
    compressed: u64,
    /// The cluster that would follow without a gap, in the table at hand.
    follows: Option<u64>,
}

impl Layout {
    fn add(&mut self, entry: u64, first: u64) {
        self.allocated += 1;
        if entry & COMPRESSED != 0 {
            // Compressed clusters are reckoned as fragmented, as the reference does.
            self.compressed += 1;
            self.fragmented += 1;
            return;
        }
        if self.follows.is_some_and(|f| f != first) {
            self.fragmented += 1;
        }
        self.follows = Some(first + 1);
    }
}

impl Check {
    fn judge_l1(&self, entry: u64) -> Judged {
        judge::l1_entry(entry, self.image.bounds, |c| self.used.has(c, HARD))
    }

    /// Judges entry `i` of a table.
    fn judge_l2(&self, t: Table, i: usize, entry: Entry) -> Judged {
        let b = self.image.bounds;
        let guest = (t.index * b.g.l2_entries() + i as u64) << b.g.cluster_bits;
        judge::l2_entry(entry, b, guest, |c| self.used.has(c, HARD))
    }

    /// Where a table begins, in bytes.
    fn table_offset(&self, t: Table) -> u64 {
        t.cluster << self.image.bounds.g.cluster_bits
    }

    /// Reads an L2 table; nothing where it has no entry.
    async fn l2_table(&self, t: Table) -> Result<Option<Vec<Entry>>> {
        let g = self.image.bounds.g;
        let words = self.image.table(self.table_offset(t), g.cluster_words()).await?;
        Ok(words.map(|w| Entry::list(g, &w).collect()))
    }

    /// Reads all L1 tables and lists the L2 tables that they lead to.
    pub(super) async fn list_tables(&mut self) -> Result<()> {
        for l1 in self.l1.clone() {
            for (at, first, n) in l1.pieces() {
                let read = self.image.table(at, n).await;
                let Some(piece) = self.readable(read, || format!("{} at {at:#x}", l1.name()))
                else {
                    continue;
                };
                for (i, entry) in piece.into_iter().flatten().enumerate() {
                    self.list_table(l1, first + i as u64, entry)?;
                }
            }
            if l1.active {
                self.active_tables = self.tables.len();
            }
        }
        // Only L1 entries are counted so far.
        for t in &mut self.tables {
            t.refs = self.used.count(t.cluster);
        }
        Ok(())
    }

    fn list_table(&mut self, l1: L1, index: u64, entry: u64) -> Result<()> {
        let j = self.judge_l1(entry);
        if let Some(fault) = j.fault {
            let (name, at) = (l1.name(), l1.offset);
            self.blind |= j.hides && !self.plan.entries;
            self.needs.mend = true;
            let text = format!("{name} at {at:#x}, entry {index} ({entry:#x}): {fault}");
            self.fault(self.plan.entries, text);
        }
        let Some((cluster, _)) = j.uses else { return Ok(()) };
        self.used.add(cluster, 1)?;
        if !self.used.has(cluster, TABLE) {
            self.used.charge(size_of::<Table>() as u64)?;
            self.used.set(cluster, TABLE)?;
            self.tables.push(Table { cluster, refs: 0, index });
        }
        Ok(())
    }

    /// Reads all L2 tables and counts the clusters that they use.
    pub(super) async fn count_clusters(&mut self) -> Result<()> {
        let mut layout = Layout::default();
        let mut faulty = Vec::new();
        for n in 0..self.tables.len() {
            let t = self.tables[n];
            let at = self.table_offset(t);
            let read = self.l2_table(t).await;
            let Some(Some(table)) = self.readable(read, || format!("the L2 table at {at:#x}"))
            else {
                continue;
            };
            layout.follows = None;
            let before = self.report.corruptions_fixed;
            for (i, &entry) in table.iter().enumerate().filter(|(_, e)| **e != Entry::default()) {
                let j = self.judge_l2(t, i, entry);
                if let Some(fault) = j.fault {
                    self.blind |= j.hides && !self.plan.entries;
                    self.needs.mend = true;
                    let text = format!("L2 table at {at:#x}, entry {i} ({entry}): {fault}");
                    self.fault(self.plan.entries, text);
                }
                let Some((first, clusters)) = j.uses else { continue };
                for c in first..first + clusters {
                    if !self.image.bounds.g.data_file {
                        self.used.add(c, t.refs)?;
                    }
                }
                if n < self.active_tables {
                    layout.add(j.entry.word, first);
                }
            }
            let fixed = self.report.corruptions_fixed - before;
            if fixed > 0 {
                self.used.charge(16)?;
                faulty.push((n, fixed));
            }
        }
        for (n, fixed) in faulty {
            self.leave_if_shared(self.tables[n], fixed);
        }
        self.report.allocated_clusters = Some(layout.allocated);
        self.report.fragmented_clusters = Some(layout.fragmented);
        self.report.compressed_clusters = Some(layout.compressed);
        Ok(())
    }

    /// Whether a table's cluster is used for guest data too. Which of both it is cannot be told,
    /// so no entry in it is taken for a damaged one and overwritten.
    fn is_shared(&self, t: Table) -> bool {
        self.used.count(t.cluster) != t.refs
    }

    /// Takes back that the `faults` of a table are mended, if it is shared.
    fn leave_if_shared(&mut self, t: Table, faults: u64) {
        if !self.is_shared(t) {
            return;
        }
        self.report.corruptions_fixed -= faults;
        self.report.corruptions += faults;
        self.blind = true;
        let at = self.table_offset(t);
        self.report.finding(format!(
            "L2 table at {at:#x}: the cluster is also guest data, so bad entries in it are left"
        ));
    }

    /// Holds the flag "refcount is one" of all active entries against the refcounts.
    pub(super) async fn compare_flags(&mut self) -> Result<()> {
        for l1 in self.l1.clone().into_iter().filter(|l1| l1.active) {
            for (at, first, n) in l1.pieces() {
                let Ok(Some(piece)) = self.image.table(at, n).await else { continue };
                for (i, &entry) in piece.iter().enumerate().filter(|(_, e)| **e != 0) {
                    let j = self.judge_l1(entry);
                    let place = || format!("{}, entry {}", l1.name(), first + i as u64);
                    self.compare_flag(j, false, place);
                }
            }
        }
        for n in 0..self.active_tables {
            let t = self.tables[n];
            let Ok(Some(table)) = self.l2_table(t).await else { continue };
            let at = self.table_offset(t);
            for (i, &entry) in table.iter().enumerate().filter(|(_, e)| **e != Entry::default()) {
                let j = self.judge_l2(t, i, entry);
                let external = self.image.bounds.g.data_file;
                self.compare_flag(j, external, || format!("L2 table at {at:#x}, entry {i}"));
            }
        }
        Ok(())
    }

    fn compare_flag(&mut self, j: Judged, external: bool, place: impl FnOnce() -> String) {
        if j.fault.is_some() && !self.plan.entries {
            return;
        }
        let right = self.with_flag(j, external, true);
        if right == j.entry {
            return;
        }
        let set = right.word & COPIED != 0;
        if set {
            self.needs.set_flags = true;
        } else {
            self.needs.mend = true;
        }
        let (entry, not) = (j.entry, if set { "" } else { "not " });
        let text = format!("{} ({entry}): the refcount is {not}one, unlike its flag", place());
        self.fault(self.plan.flags, text);
    }

    /// The entry with its flag cleared where the refcount is not one and, if `set`, set where it
    /// is one. In an `external` data file it always is.
    fn with_flag(&self, j: Judged, external: bool, set: bool) -> Entry {
        let word = j.entry.word;
        let word = match j.uses {
            Some((cluster, _)) if word & COMPRESSED == 0 => {
                match (external || self.used.has(cluster, ONE), set) {
                    (false, _) => word & !COPIED,
                    (true, true) => word | COPIED,
                    (true, false) => word,
                }
            }
            _ => word,
        };
        Entry { word, ..j.entry }
    }

    /// Writes the tables as they should be; without `set`, no entry gets its flag.
    pub(super) async fn mend_entries(&mut self, set: bool) -> Result<()> {
        for &l1 in &self.l1 {
            for (at, _, n) in l1.pieces() {
                let Ok(Some(old)) = self.image.table(at, n).await else { continue };
                let mend = |&e: &u64| {
                    let entry = Entry { word: e, bitmap: 0 };
                    self.mended(entry, self.judge_l1(e), l1.active.then_some(false), set, false)
                        .word
                };
                let new: Vec<u64> = old.iter().map(mend).collect();
                self.image.write_changed(at, &old, &new).await?;
            }
        }
        for (n, &t) in self.tables.iter().enumerate() {
            let Ok(Some(old)) = self.l2_table(t).await else { continue };
            let (active, shared) = (n < self.active_tables, self.is_shared(t));
            let active = active.then_some(self.image.bounds.g.data_file);
            let mend = |(i, e): (usize, &Entry)| {
                self.mended(*e, self.judge_l2(t, i, *e), active, set, shared)
            };
            let new: Vec<Entry> = old.iter().enumerate().map(mend).collect();
            let words = |list: &[Entry]| Entry::words(self.image.bounds.g, list);
            let (old, new) = (words(&old), words(&new));
            self.image.write_changed(self.table_offset(t), &old, &new).await?;
        }
        Ok(())
    }

    /// An entry as a repair leaves it. `active`: its flag matters, and whether it is external
    /// (see [`Check::with_flag`]).
    fn mended(
        &self,
        entry: Entry,
        j: Judged,
        active: Option<bool>,
        set: bool,
        shared: bool,
    ) -> Entry {
        if entry == Entry::default() || j.fault.is_some() && (shared || !self.plan.entries) {
            entry
        } else if let (Some(external), true) = (active, self.plan.flags) {
            self.with_flag(j, external, set)
        } else {
            j.entry
        }
    }
}

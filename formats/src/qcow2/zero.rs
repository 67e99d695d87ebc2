//! Zeros and discard: changes of entries, with data only where a cluster is touched in part.

use gipfel_base::sync::sync::atomic::Ordering;
use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_node::ZeroFlags;

use super::Qcow2;
use super::entry::{Cluster, Entry, Parts};
use super::lookup::What;

impl Qcow2 {
    /// What of `range` is whole units of `unit` bytes, a power of two; a unit that the end of the
    /// disk cuts short counts as whole.
    fn inner(&self, range: ByteRange, unit: u64) -> ByteRange {
        let start = range.start().next_multiple_of(unit);
        let at_end = range.end() == self.size.load(Ordering::Acquire);
        let end = if at_end { range.end() } else { range.end() & !(unit - 1) };
        ByteRange::between(start.min(range.end()), end.max(start.min(range.end())))
    }

    /// Makes `range` read as zeros.
    pub(super) async fn zero_range(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if self.version < 3 {
            // Version 2 has no zero flag (spec, L2 table entry).
            return Err(Error::unsupported("version 2 of the format has no zero clusters"));
        }
        let inner = self.inner(range, self.g.subcluster_size());
        let (head, tail) = if inner.is_empty() {
            (range, range.take(0))
        } else {
            let head = ByteRange::between(range.start(), inner.start());
            (head, ByteRange::between(inner.end(), range.end()))
        };
        for edge in [head, tail] {
            if flags.no_fallback && !edge.is_empty() && !self.reads_as_zeros(edge).await? {
                return Err(written_in_part());
            }
        }
        for edge in [head, tail] {
            if !edge.is_empty() && !self.reads_as_zeros(edge).await? {
                self.write_clusters(edge.start(), Buf::zeroed(edge.len() as usize)).await?;
            }
        }
        let unmap = flags.unmap && self.unmaps();
        if self.is_raw() {
            // Whoever reads the data file alone finds zeros too.
            self.zero_data(range, ZeroFlags { unmap, ..flags }).await?;
        }
        let whole = self.inner(inner, self.g.cluster_size());
        let (first, last) = if whole.is_empty() {
            // Up to two clusters, each in part.
            let end = self.g.cluster_start(inner.start()) + self.g.cluster_size();
            (inner.take(end - inner.start()), inner.skip(end - inner.start()))
        } else {
            let first = ByteRange::between(inner.start(), whole.start());
            (first, ByteRange::between(whole.end(), inner.end()))
        };
        for part in [first, last] {
            if !part.is_empty() {
                self.zero_subclusters(part, unmap, flags.no_fallback).await?;
            }
        }
        self.each_piece(whole, unmap, |old| match old {
            Cluster::Zero { host: None } => None,
            Cluster::Zero { host: Some((_, true)) } if !unmap => None,
            old => {
                let own = old.host().filter(|h| h.1 && !unmap);
                Some(Entry::of(self.g, own, Parts::ZERO))
            }
        })
        .await
    }

    /// Makes what lies in the data file read as zeros.
    async fn zero_data(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        self.data().write_zeroes(range, flags).await?;
        self.flushing.wrote();
        Ok(())
    }

    /// Makes some subclusters of one cluster read as zeros.
    async fn zero_subclusters(&self, range: ByteRange, unmap: bool, native: bool) -> Result<()> {
        let span = self.whole(range);
        if self.l1.get(span.start() / self.g.l1_reach()).is_none()
            && self.backing_end_is_before(span.start())
        {
            return Ok(());
        }
        let _held = self.guests.lock(span).await;
        self.own_table(span.start()).await?;
        self.check_entries(range).await?;
        if let Cluster::Compressed { .. } = self.cluster(span.start()).await? {
            if native {
                return Err(written_in_part());
            }
            return self.write_held(range, Buf::zeroed(range.len() as usize)).await;
        }
        let mask = self.touched(span.start(), range);
        let zero = |_, old: Cluster| {
            let parts = old.parts().with_zero(mask);
            let host = old.host().filter(|h| parts.data != 0 || h.1 && !unmap);
            Some(Entry::of(self.g, host, parts))
        };
        self.change_entries(span, unmap, zero).await
    }

    /// Lets go of the whole clusters in `range`.
    pub(super) async fn discard_range(&self, range: ByteRange) -> Result<()> {
        if !self.unmaps() {
            return Ok(());
        }
        let has_backing = self.backing_size().await > 0;
        if self.version < 3 && has_backing {
            // What is discarded must not show what the backing image has.
            return Ok(());
        }
        let empty = if self.version >= 3 { Parts::ZERO } else { Parts::NONE };
        let empty = Entry::of(self.g, None, empty);
        let inner = self.inner(range, self.g.cluster_size());
        if self.is_raw() && !inner.is_empty() {
            self.zero_data(inner, ZeroFlags { unmap: true, ..ZeroFlags::default() }).await?;
        }
        self.each_piece(inner, true, |old| match old {
            Cluster::Unallocated | Cluster::Zero { host: None } => None,
            _ => Some(empty),
        })
        .await
    }

    /// Whether a part of one or two clusters is known to read as zeros, without a look at data.
    pub(super) async fn reads_as_zeros(&self, range: ByteRange) -> Result<bool> {
        let mut left = range;
        while !left.is_empty() {
            let run = self.lookup(left, true);
            match run.what {
                What::Zero => {}
                What::Unallocated if left.start() >= self.backing_size().await => {}
                What::Uncached => {
                    self.load_l2(left.start()).await?;
                    continue;
                }
                _ => return Ok(false),
            }
            left = left.skip(run.len);
        }
        Ok(true)
    }

    /// Changes the entries of whole clusters, slice by slice.
    pub(super) async fn each_piece(
        &self,
        range: ByteRange,
        discard: bool,
        change: impl Fn(Cluster) -> Option<Entry>,
    ) -> Result<()> {
        let mut left = range;
        while !left.is_empty() {
            let n = self.change_piece(left, discard, &change).await?;
            left = left.skip(n);
            self.limit_pending().await?;
        }
        Ok(())
    }

    /// One piece of that; gives how many bytes it covered.
    async fn change_piece(
        &self,
        range: ByteRange,
        discard: bool,
        change: &impl Fn(Cluster) -> Option<Entry>,
    ) -> Result<u64> {
        let reach = self.g.l1_reach();
        let to_table_end = reach - range.start() % reach;
        if self.l1.get(range.start() / reach).is_none()
            && change(Cluster::Unallocated)
                .is_none_or(|_| self.backing_end_is_before(range.start()))
        {
            return Ok(to_table_end.min(range.len()));
        }
        let slice = self.slice_reach();
        let piece = range.take(slice - range.start() % slice);
        let span = self.whole(piece);
        let _held = self.guests.lock(span).await;
        self.own_table(range.start()).await?;
        self.check_entries(piece).await?;
        self.change_entries(span, discard, |_, old| change(old)).await?;
        Ok(piece.len())
    }

    /// Fails where an entry of `range`, which lies in one slice, contradicts the image.
    async fn check_entries(&self, range: ByteRange) -> Result<()> {
        let mut left = range;
        while !left.is_empty() && self.is_suspect(self.slice_of(left.start()).0) {
            let run = self.lookup(left, true);
            match run.what {
                What::Uncached => {
                    self.load_l2(left.start()).await?;
                    continue;
                }
                What::Bad { entry } => return Err(self.bad_entry(left.start(), entry)),
                _ => left = left.skip(run.len),
            }
        }
        Ok(())
    }

    /// Whether the backing image has nothing from `offset` on; false while that is not known.
    fn backing_end_is_before(&self, offset: u64) -> bool {
        let size = self.backing().try_enter().map(|n| n.as_ref().map_or(0, |n| n.size()));
        size.is_some_and(|s| s <= offset)
    }
}

fn written_in_part() -> Error {
    Error::unsupported("part of a cluster would have to be written")
}

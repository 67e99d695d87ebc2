//! Which host clusters are in use: the refcount table, the search for free clusters, and those
//! that are to be given back. Pure state; reading and writing is in [`super::alloc`].
//!
//! Refcounts live in cached slices ([`TableCache`]). Slices are exchanged only under the lock of
//! this state, so within one call nothing that was found goes away.
//!
//! A cluster that an L2 entry lets go of must not be given to another while its removal could
//! still be undone by a crash, nor while a request that looked it up before is in flight. It waits
//! in `pending` until a flush has made the removal durable and two epochs have passed.

use std::collections::{BTreeSet, HashSet, VecDeque};

use gipfel_base::sync::sync::atomic::{AtomicU64, Ordering};
use gipfel_base::{Error, Result};

use super::cache::TableCache;
use super::geometry::{Geometry, MAX_REFTABLE_BYTES};

/// Host clusters in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// The first one's number.
    pub(super) first: u64,
    /// How many.
    pub(super) count: u64,
    /// Whether nothing was ever written there: it reads as zeros.
    pub(super) fresh: bool,
}

/// Clusters that lost a reference.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) first: u64,
    pub(super) count: u64,
    /// Whether the space is to be given back to the file system.
    pub(super) discard: bool,
    /// The epoch in which the reference went.
    epoch: u64,
    /// Number of the change after which a flush covers the removal.
    change: u64,
}

/// What the search for free clusters needs next.
#[derive(Debug)]
pub(super) enum Step {
    /// Found, and marked as used.
    Got(Extent),
    /// This slice of refcounts must be read.
    Load(u64),
    /// This refcount block must be made.
    Block(u64),
}

/// Where there is room for compressed data.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Packed {
    /// At this host byte; the references are counted.
    At(u64),
    /// This slice of refcounts must be read first.
    Load(u64),
    /// Nowhere: it begins a cluster.
    Full,
}

/// The state.
pub(super) struct Refcounts {
    g: Geometry,
    /// Refcounts in a slice.
    per_slice: u64,
    /// Host offset of each refcount block in bytes, 0 where there is none.
    pub(super) table: Vec<u64>,
    /// Entries of it that are to be written.
    pub(super) table_dirty: BTreeSet<usize>,
    /// Below this cluster none is free.
    hint: u64,
    /// From this cluster on nothing was ever written.
    fresh: u64,
    /// Clusters that hold metadata.
    pub(super) meta: HashSet<u64>,
    /// Where the compressed data that were written last end, in bytes: within a cluster that
    /// still holds some.
    packed: Option<u64>,
    pending: VecDeque<Pending>,
}

/// Word and shift of refcount `index` in a slice of big-endian words.
fn place(g: Geometry, index: u64) -> (usize, u32) {
    let bits = 1u64 << g.refcount_order;
    let bit = index * bits;
    let in_word = bit % 64;
    // Entries of a byte and more are big-endian; smaller ones begin at a byte's low bits.
    let shift = if bits >= 8 { 64 - bits - in_word } else { 56 - in_word / 8 * 8 + in_word % 8 };
    ((bit / 64) as usize, shift as u32)
}

fn get(g: Geometry, words: &[AtomicU64], index: u64) -> u64 {
    let (word, shift) = place(g, index);
    words[word].load(Ordering::Acquire) >> shift & g.max_refcount()
}

fn set(g: Geometry, words: &[AtomicU64], index: u64, value: u64) {
    let (word, shift) = place(g, index);
    let w = words[word].load(Ordering::Acquire) & !(g.max_refcount() << shift);
    words[word].store(w | value << shift, Ordering::Release);
}

impl Refcounts {
    /// `end` is the length of the file in clusters.
    pub(super) fn new(g: Geometry, per_slice: u64, table: Vec<u64>, end: u64) -> Refcounts {
        Refcounts {
            g,
            per_slice,
            table,
            table_dirty: BTreeSet::new(),
            hint: 0,
            fresh: end,
            meta: HashSet::new(),
            packed: None,
            pending: VecDeque::new(),
        }
    }

    /// Host offset of the slice, if its block exists.
    pub(super) fn slice_host(&self, slice: u64) -> Option<u64> {
        let first = slice * self.per_slice;
        let per_block = self.g.block_entries();
        let block = *self.table.get((first / per_block) as usize)?;
        let bytes = ((first % per_block) << self.g.refcount_order) / 8;
        (block != 0).then_some(block + bytes)
    }

    /// Looks for free clusters and marks them as used: one to `n`, the lowest first, or if `exact`
    /// all in one piece, where nothing was ever written.
    pub(super) fn allocate(&mut self, pages: &TableCache, n: u64, exact: bool) -> Result<Step> {
        // What must lie in one piece goes to the end: a search of everything may need more slices
        // at once than the cache holds, and would begin again with each that it reads.
        let (mut first, mut found) = (if exact { self.fresh } else { self.hint }, 0);
        while found < n {
            let at = first + found;
            let enough = found > 0 && !exact;
            let block = at / self.g.block_entries();
            if self.table.get(block as usize).is_none_or(|b| *b == 0) {
                if enough {
                    break;
                }
                return self.check_block(block).map(|()| Step::Block(block));
            }
            let slice = at / self.per_slice;
            match pages.inspect(slice, |words| self.run(words, at, n - found)) {
                Some((0, free)) => found += free,
                _ if enough => break,
                None => return Ok(Step::Load(slice)),
                Some((used, free)) => {
                    if found == 0 {
                        self.raise_hint(at, at + used);
                    }
                    (first, found) = (at + used, free);
                }
            }
        }
        if !exact && first < self.fresh {
            found = found.min(self.fresh - first);
        }
        let e = Extent { first, count: found, fresh: first >= self.fresh };
        self.take(pages, e)?;
        Ok(Step::Got(e))
    }

    /// In the slice of `at`, from there on: how many clusters are used before free ones come or
    /// the slice ends, and how many of those free ones follow (at most `most`).
    fn run(&self, words: &[AtomicU64], at: u64, most: u64) -> (u64, u64) {
        let from = at % self.per_slice;
        let is_free = |i: &u64| get(self.g, words, *i) == 0;
        let start = (from..self.per_slice).find(is_free).unwrap_or(self.per_slice);
        let free = (start..self.per_slice).take_while(is_free).take(most as usize).count();
        (start - from, free as u64)
    }

    /// Takes `len` bytes, fewer than a cluster's, behind the compressed data that were written
    /// last: in the same cluster, and, if they do not fit there, in the next one, if that is free.
    pub(super) fn pack(&mut self, pages: &TableCache, len: u64) -> Packed {
        let Some(at) = self.packed.take() else { return Packed::Full };
        let (first, last) = (at >> self.g.cluster_bits, (at + len - 1) >> self.g.cluster_bits);
        // (At the end of a slice that cluster is not filled up.)
        if first / self.per_slice != last / self.per_slice {
            return Packed::Full;
        }
        let Some(references) = self.refcount(pages, first) else {
            self.packed = Some(at);
            return Packed::Load(first / self.per_slice);
        };
        let next_is_free = || self.refcount(pages, last) == Some(0) && !self.meta.contains(&last);
        if references == self.g.max_refcount() || last != first && !next_is_free() {
            return Packed::Full;
        }
        pages
            .update(first / self.per_slice, |w| {
                set(self.g, w, first % self.per_slice, references + 1);
                if last != first {
                    set(self.g, w, last % self.per_slice, 1);
                }
            })
            .expect("slices stay while the state is locked");
        self.raise_hint(last, last + 1);
        self.fresh = self.fresh.max(last + 1);
        self.pack_behind(at + len);
        Packed::At(at)
    }

    /// Lets the next compressed data begin at host byte `end`, where others end.
    pub(super) fn pack_behind(&mut self, end: u64) {
        self.packed = (self.g.in_cluster(end) != 0).then_some(end);
    }

    fn raise_hint(&mut self, from: u64, to: u64) {
        if self.hint == from {
            self.hint = to;
        }
    }

    fn check_block(&self, block: u64) -> Result<()> {
        if block >= MAX_REFTABLE_BYTES / 8 {
            return Err(Error::new(
                gipfel_base::ErrorKind::NoSpace,
                "the image cannot grow further: its refcount table has its largest size",
            ));
        }
        Ok(())
    }

    fn take(&mut self, pages: &TableCache, e: Extent) -> Result<()> {
        if let Some(c) = (e.first..e.first + e.count).find(|c| self.meta.contains(c)) {
            return Err(Error::corrupt(format!(
                "cluster at {:#x} holds metadata, but its refcount is 0: \
                 run 'gipfel img check -r all' before writing",
                c << self.g.cluster_bits
            )));
        }
        for c in e.first..e.first + e.count {
            pages
                .update(c / self.per_slice, |w| set(self.g, w, c % self.per_slice, 1))
                .expect("slices stay while the state is locked");
        }
        self.raise_hint(e.first, e.first + e.count);
        self.fresh = self.fresh.max(e.first + e.count);
        Ok(())
    }

    /// Puts a new block for the clusters from `block` on into the table; it lies in the first of
    /// them. `self_reference` is its first slice, to be filled as returned.
    pub(super) fn add_block(&mut self, block: u64) -> impl Iterator<Item = u64> + use<> {
        let first = block * self.g.block_entries();
        if self.table.len() <= block as usize {
            self.table.resize(block as usize + 1, 0);
        }
        self.table[block as usize] = first << self.g.cluster_bits;
        self.table_dirty.insert(block as usize);
        self.meta.insert(first);
        self.fresh = self.fresh.max(first + 1);
        let (word, shift) = place(self.g, 0);
        debug_assert_eq!(word, 0, "the first refcount is in the first word");
        std::iter::once(1 << shift).chain(std::iter::repeat(0))
    }

    /// Where `n` clusters in one piece find room with all the blocks that count them: the first of
    /// those blocks, and how many they are. From there on nothing was ever written.
    pub(super) fn long_run(&self, n: u64) -> Result<(u64, u64)> {
        let per_block = self.g.block_entries();
        let known = self.table.iter().rposition(|b| *b != 0).map_or(0, |i| i as u64 + 1);
        let first = self.fresh.div_ceil(per_block).max(known);
        // Each block counts one block and `per_block - 1` others.
        let blocks = n.div_ceil(per_block - 1);
        self.check_block(first + blocks - 1)?;
        Ok((first, blocks))
    }

    /// Puts the blocks of such a run into the table: they lie in the first clusters that they
    /// count, the run behind them, and on disk they say so.
    pub(super) fn add_long_run(&mut self, first: u64, blocks: u64, n: u64) {
        let start = first * self.g.block_entries();
        self.table.resize((first + blocks) as usize, 0);
        for b in 0..blocks {
            self.table[(first + b) as usize] = (start + b) << self.g.cluster_bits;
            self.table_dirty.insert((first + b) as usize);
            self.meta.insert(start + b);
        }
        self.fresh = self.fresh.max(start + blocks + n);
    }

    /// Takes one reference from each of `count` clusters of one slice, or all of them if `all`.
    /// `None` where the slice must be read first; else the clusters that are free now.
    pub(super) fn release(
        &mut self,
        pages: &TableCache,
        first: u64,
        count: u64,
        all: bool,
    ) -> Option<Result<Vec<u64>>> {
        debug_assert_eq!(first / self.per_slice, (first + count - 1) / self.per_slice);
        let freed = pages.update(first / self.per_slice, |w| {
            let mut freed = Vec::new();
            for c in first..first + count {
                match get(self.g, w, c % self.per_slice) {
                    0 => {
                        return Err(Error::corrupt(format!(
                            "the refcount of cluster {:#x} is 0 although it was in use",
                            c << self.g.cluster_bits
                        )));
                    }
                    r if all || r == 1 => {
                        set(self.g, w, c % self.per_slice, 0);
                        freed.push(c);
                    }
                    r => set(self.g, w, c % self.per_slice, r - 1),
                }
            }
            Ok(freed)
        })?;
        if let Ok(f) = &freed {
            for c in f {
                self.hint = self.hint.min(*c);
                self.meta.remove(c);
            }
            // What is free is not added to.
            self.packed = self.packed.filter(|at| !f.contains(&(at >> self.g.cluster_bits)));
        }
        Some(freed)
    }

    /// The refcount of a cluster, if its slice is here.
    pub(super) fn refcount(&self, pages: &TableCache, cluster: u64) -> Option<u64> {
        let words = cluster / self.per_slice;
        pages.inspect(words, |w| get(self.g, w, cluster % self.per_slice))
    }

    /// How many clusters from `first` on lie in one slice, at most `count`.
    pub(super) fn within_slice(&self, first: u64, count: u64) -> u64 {
        count.min(self.per_slice - first % self.per_slice)
    }

    /// The first cluster that was never taken.
    pub(super) fn end(&self) -> u64 {
        self.fresh
    }

    /// Notes clusters whose reference went in this epoch with this change.
    pub(super) fn defer(&mut self, e: Pending) {
        match self.pending.back_mut() {
            Some(p)
                if p.first + p.count == e.first
                    && (p.discard, p.epoch, p.change) == (e.discard, e.epoch, e.change) =>
            {
                p.count += e.count;
            }
            _ => self.pending.push_back(e),
        }
    }

    /// Number of entries that wait.
    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// The oldest that waits, if its removal is durable (changes up to `durable` are) and nobody
    /// can still be using it in `epoch`.
    pub(super) fn next_ready(&mut self, durable: u64, epoch: u64) -> Option<Pending> {
        let p = self.pending.front()?;
        (p.change <= durable && p.epoch + 2 <= epoch).then(|| self.pending.pop_front())?
    }
}

impl Pending {
    pub(super) fn new(first: u64, count: u64, discard: bool, epoch: u64, change: u64) -> Pending {
        Pending { first, count, discard, epoch, change }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::cache::Reserve;

    #[test]
    fn places_agree_with_the_bytes_of_a_block() {
        for order in 0..=6 {
            let g = Geometry::new(9, order);
            let words: Vec<AtomicU64> = (0..64).map(|_| AtomicU64::new(0)).collect();
            for i in 0..g.block_entries() {
                set(g, &words, i, i.wrapping_mul(0x51_7c_c1) & g.max_refcount());
            }
            let bytes: Vec<u8> =
                words.iter().flat_map(|w| w.load(Ordering::Acquire).to_be_bytes()).collect();
            for i in 0..g.block_entries() {
                assert_eq!(get(g, &words, i), g.refcount(&bytes, i), "order {order}, {i}");
            }
        }
    }

    #[test]
    fn the_lowest_free_clusters_are_found() {
        let g = Geometry::new(9, 4);
        let pages = TableCache::new(64, 1 << 20);
        let mut r = Refcounts::new(g, 256, vec![512], 3);
        let fill = |id: u64, words: &mut dyn Iterator<Item = u64>| match pages.reserve(id) {
            Reserve::Place(p) => p.fill(words, false, false),
            _ => panic!("there is room"),
        };
        assert!(matches!(r.allocate(&pages, 1, false).unwrap(), Step::Load(0)));
        // Clusters 0, 1, 2 and 4 are used.
        let mut w = [1 << 48 | 1 << 32 | 1 << 16, 1 << 48].into_iter().chain([0; 62]);
        fill(0, &mut w);
        let got = |r: &mut Refcounts, n, exact| match r.allocate(&pages, n, exact).unwrap() {
            Step::Got(e) => (e.first, e.count, e.fresh),
            s => panic!("{s:?}"),
        };
        assert_eq!(got(&mut r, 9, false), (3, 1, true));
        assert_eq!(got(&mut r, 4, true), (5, 4, true));
        assert_eq!(r.release(&pages, 6, 1, false).unwrap().unwrap(), [6]);
        assert_eq!(got(&mut r, 2, true), (9, 2, true));
        assert_eq!(got(&mut r, 2, false), (6, 1, false));
        assert_eq!(got(&mut r, 1000, false), (11, 245, true));
        assert!(matches!(r.allocate(&pages, 1, false).unwrap(), Step::Block(1)));
        let mut words = r.add_block(1);
        fill(1, &mut words);
        assert_eq!(got(&mut r, 2, false), (257, 2, true));
        assert!(r.release(&pages, 300, 1, false).unwrap().is_err());
    }

    #[test]
    fn compressed_data_share_clusters_as_far_as_refcounts_go() {
        // Refcounts of two bits; clusters 0 to 3 are used.
        let g = Geometry::new(9, 1);
        let pages = TableCache::new(64, 1 << 20);
        let mut r = Refcounts::new(g, 2048, vec![512], 4);
        let Reserve::Place(p) = pages.reserve(0) else { panic!("there is room") };
        p.fill([0x55 << 56].into_iter().chain([0; 63]), false, false);
        let begin = |r: &mut Refcounts, len| {
            let Step::Got(e) = r.allocate(&pages, 1, false).unwrap() else { panic!("no cluster") };
            r.pack_behind((e.first << 9) + len);
            e.first
        };
        assert_eq!(r.pack(&pages, 100), Packed::Full);
        assert_eq!(begin(&mut r, 100), 4);
        assert_eq!(r.pack(&pages, 300), Packed::At(4 * 512 + 100));
        // Into the next cluster, which is free; and on in that one.
        assert_eq!(r.pack(&pages, 200), Packed::At(4 * 512 + 400));
        assert_eq!((r.refcount(&pages, 4), r.refcount(&pages, 5)), (Some(3), Some(1)));
        assert_eq!(r.pack(&pages, 10), Packed::At(5 * 512 + 88));
        assert_eq!(r.pack(&pages, 10), Packed::At(5 * 512 + 98));
        assert_eq!(r.pack(&pages, 10), Packed::Full, "its refcount is the largest that there is");
        // The next cluster is not free.
        assert_eq!(begin(&mut r, 500), 6);
        assert!(matches!(r.allocate(&pages, 1, false).unwrap(), Step::Got(_)));
        assert_eq!(r.pack(&pages, 100), Packed::Full);
        // The cluster itself has become free.
        assert_eq!(begin(&mut r, 10), 8);
        assert_eq!(r.release(&pages, 8, 1, false).unwrap().unwrap(), [8]);
        assert_eq!(r.pack(&pages, 10), Packed::Full);
    }
}

//! Taking host clusters and giving them back.

use gipfel_base::sync::sync::atomic::Ordering;
use gipfel_base::{ByteRange, Result};
use gipfel_io::Buf;
use gipfel_node::{DebugEvent, WriteFlags};

use super::Qcow2;
use super::cache::Reserve;
use super::entry::Cluster;
use super::refcounts::{Extent, Pending, Step};

/// Entries of clusters to be given back after which a flush is made, so that the list stays short.
const MAX_PENDING: usize = 4096;

impl Qcow2 {
    pub(super) fn refcounts_per_slice(&self) -> u64 {
        (self.refcount_slices.words() as u64 * 64) >> self.g.refcount_order
    }

    /// Takes `n` clusters in one piece if `exact`, else one to `n`. Their refcount is one from
    /// here on, and no entry refers to them yet.
    pub(super) async fn allocate(&self, n: u64, exact: bool) -> Result<Extent> {
        self.event(DebugEvent::ClusterAlloc).await;
        if exact && n >= self.g.block_entries() {
            return self.allocate_long(n).await;
        }
        loop {
            let step = self.refcounts().allocate(&self.refcount_slices, n, exact);
            match step.map_err(|e| e.context(format!("qcow2 node '{}'", self.name)))? {
                Step::Got(e) => {
                    self.flushing.changed();
                    return Ok(e);
                }
                Step::Load(slice) => self.load_refcounts(slice).await?,
                Step::Block(block) => self.make_block(block).await?,
            }
        }
    }

    /// Makes the refcount block `block`. All of its clusters are free, and it takes the first.
    async fn make_block(&self, block: u64) -> Result<()> {
        let slices = self.g.block_entries() / self.refcounts_per_slice();
        let _alone = self.refcount_loads.lock(ByteRange::new(block * slices, slices)).await;
        if self.refcounts().table.get(block as usize).is_some_and(|b| *b != 0) {
            return Ok(());
        }
        let host = (block * self.g.block_entries()) << self.g.cluster_bits;
        let zeros = Buf::zeroed(self.g.cluster_size() as usize);
        self.event(DebugEvent::RefblockAlloc).await;
        self.event(DebugEvent::RefblockAllocWrite).await;
        self.file().write(host, zeros, WriteFlags::default()).await?;
        loop {
            let mut r = self.refcounts();
            if let Reserve::Place(p) = self.refcount_slices.reserve(block * slices) {
                // Its first slice, with the reference to itself, is there before anyone finds it.
                p.fill(r.add_block(block), false, true);
                self.flushing.changed();
                return Ok(());
            }
            drop(r);
            self.write_refcounts().await?;
        }
    }

    /// Takes `n` clusters in one piece that is longer than the reach of a refcount block between
    /// itself and the next one: its blocks lie together before it, at the end of the file.
    async fn allocate_long(&self, n: u64) -> Result<Extent> {
        let _alone = self.refcount_loads.lock(ByteRange::new(0, u64::MAX)).await;
        let (first, blocks) = {
            let r = self.refcounts();
            r.long_run(n).map_err(|e| e.context(format!("qcow2 node '{}'", self.name)))?
        };
        let (per_block, bits) = (self.g.block_entries(), self.g.cluster_bits);
        let start = first * per_block;
        self.event(DebugEvent::RefblockAlloc).await;
        for b in 0..blocks {
            let mut block = vec![0; self.g.cluster_size() as usize];
            let used = (blocks + n - b * per_block).min(per_block);
            (0..used).for_each(|i| self.g.set_refcount(&mut block, i, 1));
            self.event(DebugEvent::RefblockAllocWrite).await;
            let at = (start + b) << bits;
            self.file().write(at, Buf::from_slice(&block), WriteFlags::default()).await?;
        }
        self.flushing.wrote();
        self.refcounts().add_long_run(first, blocks, n);
        self.flushing.changed();
        Ok(Extent { first: start + blocks, count: n, fresh: true })
    }

    /// Gives back clusters to which no entry has ever referred.
    pub(super) async fn unallocate(&self, e: Extent) -> Result<()> {
        self.release(e.first, e.count, true).await.map(drop)
    }

    /// Takes a reference from each of `count` clusters (all, if `all`); gives those now free.
    pub(super) async fn release(&self, first: u64, count: u64, all: bool) -> Result<Vec<u64>> {
        self.event(DebugEvent::ClusterFree).await;
        let (mut at, end) = (first, first + count);
        let mut freed = Vec::new();
        while at < end {
            let (n, step) = {
                let mut r = self.refcounts();
                let n = r.within_slice(at, end - at);
                (n, r.release(&self.refcount_slices, at, n, all))
            };
            match step {
                Some(f) => {
                    freed.extend(f?);
                    at += n;
                }
                None => self.load_refcounts(at / self.refcounts_per_slice()).await?,
            }
        }
        self.flushing.changed();
        Ok(freed)
    }

    /// Notes that an entry let go of its host clusters. They can be used again after a flush. What
    /// lies in a data file only goes back to the file system, if it does; the caller holds the
    /// guest clusters.
    pub(super) async fn let_go(&self, old: Cluster, discard: bool) {
        let (host, len) = match old {
            Cluster::Compressed { host, len } => (host, len),
            other => match other.host() {
                Some((host, _)) => (host, self.g.cluster_size()),
                None => return,
            },
        };
        if !self.g.data_file {
            self.let_go_bytes(host, len, discard);
        } else if discard && self.flags.pass_discard.load(Ordering::Relaxed) {
            self.discard_data(ByteRange::new(host, len)).await;
        }
    }

    /// The same for the clusters that `len` bytes at `host` touch.
    pub(super) fn let_go_bytes(&self, host: u64, len: u64, discard: bool) {
        let first = host >> self.g.cluster_bits;
        let last = (host + len - 1) >> self.g.cluster_bits;
        let change = self.flushing.changed();
        let epoch = self.epoch.current();
        let p = Pending::new(first, last - first + 1, discard, epoch, change);
        self.refcounts().defer(p);
    }

    /// Flushes where very many clusters wait to be given back.
    pub(super) async fn limit_pending(&self) -> Result<()> {
        if self.refcounts().pending() > MAX_PENDING { self.flush_all().await } else { Ok(()) }
    }

    /// Gives back clusters whose removal is durable and that nobody can be using.
    pub(super) async fn give_back(&self, durable: u64) -> Result<()> {
        // Two steps forward suffice where nobody is inside.
        for _ in 0..2 {
            let _one_at_a_time = self.refcounts();
            self.epoch.advance();
        }
        loop {
            let next = self.refcounts().next_ready(durable, self.epoch.current());
            let Some(p) = next else { return Ok(()) };
            if p.discard && self.flags.pass_discard.load(Ordering::Relaxed) {
                self.punch(&p).await;
            }
            self.release(p.first, p.count, false).await?;
        }
    }

    /// Gives the space of clusters that are about to be free back to the file system.
    async fn punch(&self, p: &Pending) {
        let bits = self.g.cluster_bits;
        // Other references keep what they refer to. (Punching is advice: failing is no harm.)
        if self.are_last_references(p).await.unwrap_or(false)
            && let Some(r) = ByteRange::checked(p.first << bits, p.count << bits)
        {
            self.discard_data(r).await;
        }
    }

    /// Gives the space of a part of the file where data lie back to the file system, if it can.
    pub(super) async fn discard_data(&self, range: ByteRange) {
        if let Ok(size) = self.data().size().await
            && let Some(r) = range.intersect(ByteRange::new(0, size))
        {
            let _ = self.data().discard(r).await;
        }
    }

    async fn are_last_references(&self, p: &Pending) -> Result<bool> {
        for c in p.first..p.first + p.count {
            if self.refcount_of(c).await? != 1 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) async fn refcount_of(&self, cluster: u64) -> Result<u64> {
        loop {
            let found = self.refcounts().refcount(&self.refcount_slices, cluster);
            match found {
                Some(r) => return Ok(r),
                None => self.load_refcounts(cluster / self.refcounts_per_slice()).await?,
            }
        }
    }
}

//! Sizes that change: a larger disk, a smaller one, space made ready in advance, an image emptied.
//!
//! What is new reads as zeros, also after a crash in the middle: it is made so before the header
//! tells of it. What goes is let go of before the header says that the disk is shorter, so that a
//! disk which grows again does not show it.

use gipfel_base::sync::sync::atomic::Ordering;
use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_node::{DebugEvent, Preallocation, WriteFlags, ZeroFlags};

use super::Qcow2;
use super::entry::{Cluster, Entry};
use super::flush::bytes;
use super::lookup::What;

/// Where the disk's size stands in the header; L1 table's size and offset follow 12 bytes later.
const SIZE_FIELD: u64 = 24;
const L1_FIELDS: u64 = 36;
/// Zeros are written in pieces of this size, in bytes.
const PIECE: u64 = 1 << 20;

impl Qcow2 {
    /// Makes the disk `size` bytes long. What is new reads as zeros.
    pub(super) async fn resize_to(&self, size: u64) -> Result<()> {
        let old = self.size.load(Ordering::Acquire);
        if !size.is_multiple_of(512) {
            return Err(Error::invalid(format!("size {size} is not a multiple of 512")));
        }
        self.g.check_size(size)?;
        if self.header().snapshots > 0 && self.version < 3 {
            return Err(Error::unsupported(
                "an image of version 2 with internal snapshots keeps its size",
            ));
        }
        match size < old {
            true => self.shrink_to(size).await,
            false => self.grow_to(old, size).await,
        }
    }

    async fn grow_to(&self, old: u64, size: u64) -> Result<()> {
        let entries = self.g.l1_entries(size);
        if entries > self.l1.len() as u64 {
            self.move_l1(entries).await?;
        }
        // What others left behind the end, and what the backing image has there, must not show.
        self.clear_tail(old).await?;
        let covered = self.backing_size().await.min(size);
        if covered > old {
            // All of the last cluster is new.
            let end = covered.next_multiple_of(self.g.cluster_size());
            let range = ByteRange::between(old, end);
            if self.version >= 3 {
                self.zero_range(range, ZeroFlags::default()).await?;
            } else {
                self.write_zeros(range).await?;
            }
        }
        self.flush_all().await?;
        if self.g.data_file {
            // Whatever lay behind the end of the disk must not show.
            self.resize_data(old).await?;
            self.resize_data(size).await?;
        }
        self.put_size(size).await
    }

    async fn resize_data(&self, size: u64) -> Result<()> {
        match self.data().node().await {
            Some(n) if n.size() != size => n.driver().resize(size).await,
            _ => Ok(()),
        }
    }

    async fn shrink_to(&self, size: u64) -> Result<()> {
        self.clear_tail(size).await?;
        self.cut(size.next_multiple_of(self.g.cluster_size())).await?;
        self.put_size(size).await?;
        if self.g.data_file {
            self.data_end.fetch_min(size, Ordering::AcqRel);
            self.resize_data(size).await?;
        }
        self.trim_file().await
    }

    /// Lets the backing image decide every byte of the disk.
    pub(super) async fn empty(&self) -> Result<()> {
        if self.is_raw() {
            let all = ByteRange::new(0, self.size.load(Ordering::Acquire));
            let unmap = ZeroFlags { unmap: true, ..ZeroFlags::default() };
            return self.zero_range(all, unmap).await;
        }
        self.cut(0).await?;
        self.trim_file().await
    }

    async fn put_size(&self, size: u64) -> Result<()> {
        let field = Buf::from_slice(&size.to_be_bytes());
        self.file().write(SIZE_FIELD, field, WriteFlags::default()).await?;
        self.file().flush().await?;
        self.header().size = size;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Zeros what the cluster around the byte `end` stores from there on.
    async fn clear_tail(&self, end: u64) -> Result<()> {
        let mut tail = ByteRange::between(end, end.next_multiple_of(self.g.cluster_size()));
        while !tail.is_empty() {
            let run = self.lookup(tail, true);
            match run.what {
                What::Uncached => {
                    self.load_l2(end).await?;
                    continue;
                }
                What::Data { .. } | What::Compressed { .. } => {
                    self.write_zeros(tail.take(run.len)).await?;
                }
                What::Bad { entry } => return Err(self.bad_entry(end, entry)),
                What::Zero | What::Unallocated | What::Suspect => {}
            }
            tail = tail.skip(run.len);
        }
        Ok(())
    }

    /// Lets go of everything that the image holds of the disk from the cluster at `from` on,
    /// tables included.
    async fn cut(&self, from: u64) -> Result<()> {
        let end = self.size.load(Ordering::Acquire).next_multiple_of(self.g.cluster_size());
        if from < end {
            let gone = |old| (old != Cluster::Unallocated).then_some(Entry::default());
            // In a data file nothing goes before its entry has gone for good.
            let range = ByteRange::between(from, end);
            self.each_piece(range, !self.g.data_file, gone).await?;
            self.flush_all().await?;
            if self.g.data_file && self.flags.pass_discard.load(Ordering::Relaxed) {
                self.discard_data(range).await;
            }
        }
        self.flush_all().await?;
        self.drop_tables(from.div_ceil(self.g.l1_reach())).await;
        self.flush_all().await?;
        // What that flush let go of.
        self.flush_all().await
    }

    /// Lets go of the L2 tables from L1 entry `first` on, whose entries are empty and written.
    async fn drop_tables(&self, first: u64) {
        let _tables = self.tables.lock(ByteRange::new(0, u64::MAX)).await;
        let _loads = self.l2_loads.lock(ByteRange::new(0, u64::MAX)).await;
        self.l2.clear();
        for index in first..self.l1.len() as u64 {
            if let Some(table) = self.l1.get(index) {
                self.l1.clear(index);
                self.let_go_bytes(table.host, self.g.cluster_size(), false);
            }
        }
    }

    /// Cuts off the end of the file in which no cluster is in use.
    async fn trim_file(&self) -> Result<()> {
        let mut end = self.refcounts().end();
        while end > 0 && !self.is_in_use(end - 1).await? {
            end -= 1;
        }
        let end = end << self.g.cluster_bits;
        match self.file().node().await {
            Some(n) if n.size() > end => {
                if !self.g.data_file {
                    self.data_end.fetch_min(end, Ordering::AcqRel);
                }
                n.driver().resize(end).await
            }
            _ => Ok(()),
        }
    }

    async fn is_in_use(&self, cluster: u64) -> Result<bool> {
        if self.refcounts().slice_host(cluster / self.refcounts_per_slice()).is_none() {
            return Ok(false);
        }
        Ok(self.refcount_of(cluster).await? > 0)
    }

    /// Gives every guest cluster of `range`, which reads as zeros, its host cluster.
    pub(super) async fn preallocate(&self, range: ByteRange, how: Preallocation) -> Result<()> {
        let start = range.start().next_multiple_of(self.g.cluster_size()).min(range.end());
        // The cluster in which the range begins may hold what comes before.
        self.write_zeros(ByteRange::between(range.start(), start)).await?;
        let mut left = ByteRange::between(start, range.end());
        while !left.is_empty() {
            let (n, host) = self.preallocate_some(left).await?;
            match how {
                Preallocation::Metadata => {}
                Preallocation::Falloc => {
                    self.data().write_zeroes(host, ZeroFlags::default()).await?;
                }
                Preallocation::Full => self.zero_hosts(host).await?,
            }
            left = left.skip(n);
        }
        // The file reaches to the end of the last cluster, as entries say.
        self.reach_end().await
    }

    /// Writes zeros to host clusters.
    async fn zero_hosts(&self, host: ByteRange) -> Result<()> {
        let mut left = host;
        while !left.is_empty() {
            let part = left.take(PIECE);
            let zeros = Buf::zeroed(part.len() as usize);
            self.data().write(part.start(), zeros, WriteFlags::default()).await?;
            left = left.skip(PIECE);
        }
        Ok(())
    }

    /// Writes zeros to a part of the disk.
    pub(super) async fn write_zeros(&self, range: ByteRange) -> Result<()> {
        let mut left = range;
        while !left.is_empty() {
            let part = left.take(PIECE);
            self.write_clusters(part.start(), Buf::zeroed(part.len() as usize)).await?;
            left = left.skip(PIECE);
        }
        Ok(())
    }

    /// Puts the L1 table into a place for `entries` entries.
    async fn move_l1(&self, entries: u64) -> Result<()> {
        self.event(DebugEvent::L1GrowAllocTable).await;
        let place = self.allocate(self.g.clusters(entries * 8), true).await?;
        // No entry changes while it is copied.
        let _alone = self.tables.lock(ByteRange::new(0, u64::MAX)).await;
        self.flush_all().await?;
        let table = self.l1.snapshot();
        let host = place.first << self.g.cluster_bits;
        let put = async {
            let buf = Buf::zeroed((place.count << self.g.cluster_bits) as usize);
            buf.copy_from_buf(0, &bytes(&table));
            self.event(DebugEvent::L1GrowWriteTable).await;
            self.file().write(host, buf, WriteFlags::default()).await?;
            self.file().flush().await?;
            let mut fields = (entries as u32).to_be_bytes().to_vec();
            fields.extend(host.to_be_bytes());
            self.event(DebugEvent::L1GrowActivateTable).await;
            self.file().write(L1_FIELDS, Buf::from_slice(&fields), WriteFlags::default()).await?;
            self.file().flush().await
        };
        if let Err(e) = put.await {
            self.unallocate(place).await?;
            return Err(e);
        }
        let (old, len) = {
            let mut h = self.header();
            let old = (h.l1_offset, u64::from(h.l1_size) * 8);
            (h.l1_offset, h.l1_size) = (host, entries as u32);
            old
        };
        self.refcounts().meta.extend(place.first..place.first + place.count);
        self.l1.grow(entries as usize);
        if len > 0 {
            self.let_go_bytes(old, len, false);
        }
        Ok(())
    }
}

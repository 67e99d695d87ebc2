//! Writing changed tables, in an order that keeps the image right at any moment
//! (ARCHITECTURE.md, invariant 9):
//!
//! 1. L2 and L1 entries to be written are copied; what they rely on was put in place before them.
//! 2. Refcounts are written. A flush of the file makes them durable, and with them the data and
//!    the new tables that the copied entries refer to.
//! 3. The refcount table, where blocks were added; another flush.
//! 4. The copied entries, and a last flush, which is also the client's.
//! 5. Clusters that no entry refers to any more are given back.
//!
//! A crash in between leaves clusters that are counted but not referred to: leaks.

use async_lock::Mutex;
use gipfel_base::Result;
use gipfel_base::sync::sync::atomic::{AtomicU64, Ordering};
use gipfel_io::Buf;
use gipfel_node::{DebugEvent, WriteFlags};

use super::Qcow2;
use super::cache::Dirty;
use super::l1::SECTOR;
use super::refcounts::Extent;

/// L2 slices that are copied and written at once.
const BATCH: usize = 2048;
/// Longest write of adjacent slices, in bytes.
const LONGEST: usize = 1 << 20;
/// Where the refcount table's offset and size stand in the header.
const REFTABLE_FIELDS: u64 = 48;

/// Who flushes, and what has been flushed.
#[derive(Default)]
pub(super) struct Flushing {
    /// Number of changes of tables so far.
    changes: AtomicU64,
    /// Changes up to this number are durable.
    clean: AtomicU64,
    /// Number of flushes asked for.
    asked: AtomicU64,
    /// Number of writes of data and refcounts that entries may rely on.
    writes: AtomicU64,
    /// One at a time.
    turn: Mutex<Turn>,
    /// One writer of refcounts at a time.
    refcounts: Mutex<()>,
}

/// What the last flushes came to.
#[derive(Default)]
struct Turn {
    /// The number of the last asked-for flush that has been carried out.
    done: u64,
    /// Writes up to this number are durable.
    writes: u64,
}

impl Flushing {
    /// Counts a change of a table.
    pub(super) fn changed(&self) -> u64 {
        self.changes.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Something was written that entries will rely on.
    pub(super) fn wrote(&self) {
        self.writes.fetch_add(1, Ordering::SeqCst);
    }
}

/// The bytes of big-endian words.
pub(super) fn bytes(words: &[u64]) -> Buf {
    let b: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
    Buf::from_slice(&b)
}

impl Qcow2 {
    /// Makes everything durable that was completed before the call.
    pub(super) async fn flush_all(&self) -> Result<()> {
        self.event(DebugEvent::FlushToOs).await;
        let f = &self.flushing;
        if f.changes.load(Ordering::SeqCst) == f.clean.load(Ordering::SeqCst)
            && self.refcounts().pending() == 0
        {
            self.event(DebugEvent::FlushToDisk).await;
            return self.sync().await;
        }
        let ticket = f.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut turn = f.turn.lock().await;
        if turn.done >= ticket {
            // A flush that began after this call has covered it.
            return Ok(());
        }
        let covered = f.asked.load(Ordering::SeqCst);
        self.write_back(&mut turn).await?;
        turn.done = covered;
        Ok(())
    }

    /// Makes all that was written durable, data first.
    async fn sync(&self) -> Result<()> {
        // Of an image that is only looked at, the data file may be missing.
        if self.g.data_file && self.data().node().await.is_some() {
            self.data().flush().await?;
        }
        self.file().flush().await
    }

    async fn write_back(&self, turn: &mut Turn) -> Result<()> {
        let upto = self.flushing.changes.load(Ordering::SeqCst);
        loop {
            let slices = self.l2.take_dirty(BATCH);
            let last = slices.slices().len() < BATCH;
            let sectors = last.then(|| self.l1.take_dirty());
            let list = sectors.as_ref().map_or(&[][..], |s| &s.list);
            self.write_entries(slices.slices(), list, turn).await?;
            slices.written();
            if let Some(s) = sectors {
                s.written();
                break;
            }
        }
        let writes = self.flushing.writes.load(Ordering::SeqCst);
        self.event(DebugEvent::FlushToDisk).await;
        self.sync().await?;
        turn.writes = writes;
        self.flushing.clean.fetch_max(upto, Ordering::SeqCst);
        self.give_back(upto).await?;
        // What was given back is only written: losing it would leave leaks.
        self.write_refcounts().await
    }

    /// Steps 2 to 4 for these copies.
    async fn write_entries(
        &self,
        slices: &[Dirty],
        sectors: &[(usize, Vec<u64>)],
        turn: &mut Turn,
    ) -> Result<()> {
        // Before the refcounts: a block that comes later is not in the table before its slice.
        let blocks: Vec<(usize, u64)> = {
            let r = self.refcounts();
            r.table_dirty.iter().map(|i| (*i, r.table[*i])).collect()
        };
        self.write_refcounts().await?;
        let relies = !slices.is_empty() || !sectors.is_empty();
        let new_blocks = !blocks.is_empty();
        let writes = self.flushing.writes.load(Ordering::SeqCst);
        if (relies || new_blocks) && writes != turn.writes {
            self.sync().await?;
            turn.writes = writes;
        }
        self.write_refcount_table(blocks).await?;
        let host = |id: u64| {
            let guest = id * self.slice_reach();
            self.l2_slice_host(guest).ok().flatten()
        };
        self.write_slices(slices, host, DebugEvent::L2Update).await?;
        let table = self.header().l1_offset;
        for (sector, entries) in sectors {
            let at = table + (sector * SECTOR * 8) as u64;
            self.event(DebugEvent::L1Update).await;
            self.file().write(at, bytes(entries), WriteFlags::default()).await?;
        }
        Ok(())
    }

    /// Writes slices, adjacent ones together; before each write, `event` happens.
    async fn write_slices(
        &self,
        slices: &[Dirty],
        host: impl Fn(u64) -> Option<u64>,
        event: DebugEvent,
    ) -> Result<()> {
        let mut list: Vec<(u64, &[u64])> = Vec::with_capacity(slices.len());
        for s in slices {
            let at = host(s.id).ok_or_else(|| self.corrupt("a changed table has no place"))?;
            list.push((at, &s.words));
        }
        list.sort_unstable_by_key(|s| s.0);
        let mut rest = &list[..];
        while let Some((start, first)) = rest.first() {
            let size = first.len() * 8;
            let together = rest
                .iter()
                .enumerate()
                .take(LONGEST / size)
                .take_while(|(i, s)| s.0 == start + (i * size) as u64)
                .count();
            let words: Vec<u64> = rest[..together].iter().flat_map(|s| s.1).copied().collect();
            self.event(event).await;
            self.file().write(*start, bytes(&words), WriteFlags::default()).await?;
            rest = &rest[together..];
        }
        Ok(())
    }

    /// Writes changed refcounts. That is right at any time: references that are new are counted
    /// early, those that went were gone for good before they were counted out.
    pub(super) async fn write_refcounts(&self) -> Result<()> {
        let _turn = self.flushing.refcounts.lock().await;
        let batch = self.refcount_slices.take_dirty(usize::MAX);
        if batch.slices().is_empty() {
            return Ok(());
        }
        self.flushing.wrote();
        let host = |id| self.refcounts().slice_host(id);
        self.write_slices(batch.slices(), host, DebugEvent::RefblockUpdate).await?;
        batch.written();
        self.flushing.wrote();
        Ok(())
    }

    /// Writes new entries of the refcount table, whose blocks are durable.
    async fn write_refcount_table(&self, entries: Vec<(usize, u64)>) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let room = {
            let h = self.header();
            (u64::from(h.reftable_clusters) << self.g.cluster_bits) / 8
        };
        if self.refcounts().table.len() as u64 > room {
            return self.move_refcount_table().await;
        }
        let offset = self.header().reftable_offset;
        for (i, host) in &entries {
            let at = offset + *i as u64 * 8;
            self.event(DebugEvent::RefblockAllocHookup).await;
            self.event(DebugEvent::ReftableUpdate).await;
            self.file().write(at, bytes(&[*host]), WriteFlags::default()).await?;
        }
        self.file().flush().await?;
        self.table_written(entries.into_iter());
        Ok(())
    }

    fn table_written(&self, entries: impl Iterator<Item = (usize, u64)>) {
        let mut r = self.refcounts();
        for (i, host) in entries {
            if r.table[i] == host {
                r.table_dirty.remove(&i);
            }
        }
    }

    /// Puts the refcount table, which has become too long for its place, into a larger one.
    async fn move_refcount_table(&self) -> Result<()> {
        self.event(DebugEvent::ReftableGrow).await;
        let mut place = Extent { first: 0, count: 0, fresh: false };
        loop {
            // The new place may need blocks of its own, and the table room for them.
            let len = self.refcounts().table.len() as u64;
            if place.count * self.g.cluster_words() >= len {
                break;
            }
            if place.count > 0 {
                self.unallocate(place).await?;
            }
            place = self.allocate(self.g.clusters((len + len / 2) * 8), true).await?;
        }
        let bits = self.g.cluster_bits;
        let table = {
            let mut r = self.refcounts();
            r.meta.extend(place.first..place.first + place.count);
            r.table.clone()
        };
        self.event(DebugEvent::RefblockAllocWriteBlocks).await;
        self.write_refcounts().await?;
        self.event(DebugEvent::RefblockAllocWriteTable).await;
        let buf = Buf::zeroed((place.count << bits) as usize);
        buf.copy_from_buf(0, &bytes(&table));
        self.file().write(place.first << bits, buf, WriteFlags::default()).await?;
        self.file().flush().await?;
        let mut fields = (place.first << bits).to_be_bytes().to_vec();
        fields.extend((place.count as u32).to_be_bytes());
        let fields = Buf::from_slice(&fields);
        self.event(DebugEvent::RefblockAllocSwitchTable).await;
        self.file().write(REFTABLE_FIELDS, fields, WriteFlags::default()).await?;
        self.file().flush().await?;
        self.table_written(table.into_iter().enumerate());
        let (old, clusters) = {
            let mut h = self.header();
            let old = (h.reftable_offset, u64::from(h.reftable_clusters));
            h.reftable_offset = place.first << bits;
            h.reftable_clusters = place.count as u32;
            old
        };
        self.let_go_bytes(old, clusters << bits, false);
        Ok(())
    }

    /// Writes everything back, before the node goes.
    pub(super) async fn close_image(&self) -> Result<()> {
        self.flush_all().await?;
        // What the flush itself let go of.
        self.flush_all().await
    }
}

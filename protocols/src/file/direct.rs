//! Reads and writes that the runner cannot hand to the file as they are: past the end of the
//! file, and not aligned as direct I/O demands.
//!
//! An unaligned write reads the blocks at its ends and writes them back whole. Two that meet in
//! one block, or one that meets a plain write there, must not undo each other. Plain aligned
//! writes go without any lock for as long as nobody writes unaligned; the first one who does
//! waits until those in flight are done, and from then on all writes lock their range.

use std::sync::atomic::{AtomicBool, Ordering};

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::{Buf, Entered, Gate};
use gipfel_node::Driver as _;

use super::FileDriver;

/// What direct I/O demands, and whether writes must lock their ranges.
pub(super) struct Direct {
    align: u64,
    /// Inside are plain writes in flight.
    plain: Gate<()>,
    /// Unaligned writes have been seen: all writes lock.
    locking: AtomicBool,
}

impl Direct {
    /// `align` is the alignment of offsets in bytes, 1 without direct I/O.
    pub(super) fn new(align: u32) -> Direct {
        Direct {
            align: u64::from(align.next_power_of_two()),
            plain: Gate::new(()),
            locking: AtomicBool::new(false),
        }
    }

    pub(super) fn align(&self) -> u32 {
        self.align as u32
    }

    pub(super) fn is_on(&self) -> bool {
        self.align > 1
    }

    pub(super) fn suits(&self, range: ByteRange) -> bool {
        range.is_aligned(self.align)
    }

    /// Lets a plain write pass without a lock, if it may.
    pub(super) fn pin(&self, range: ByteRange) -> Option<Entered<'_, ()>> {
        if !self.suits(range) {
            return None;
        }
        let pin = self.plain.try_enter()?;
        (!self.locking.load(Ordering::Acquire)).then_some(pin)
    }

    /// From here on all writes lock their range; those without a lock are done.
    pub(super) async fn start_locking(&self) {
        if !self.locking.load(Ordering::Acquire) {
            let drained = self.plain.close().await;
            self.locking.store(true, Ordering::Release);
            drop(drained);
        }
    }

    /// The whole blocks around `range`.
    pub(super) fn around(&self, range: ByteRange) -> Result<ByteRange> {
        range.widen(self.align).ok_or_else(|| Error::invalid("a request ends past 2^64 bytes"))
    }
}

impl FileDriver {
    pub(super) async fn read_around(&self, offset: u64, buf: Buf) -> Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        if self.direct.suits(range) {
            return self.file().read_at(offset, buf).await;
        }
        let wide = self.direct.around(range)?;
        let bounce = Buf::new(wide.len() as usize);
        self.file().read_at(wide.start(), bounce.clone()).await?;
        let from = (offset - wide.start()) as usize;
        buf.copy_from_buf(0, &bounce.slice(from..from + buf.len()));
        Ok(())
    }

    pub(super) async fn write_held(&self, offset: u64, buf: Buf) -> Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        let wide = self.direct.around(range)?;
        if self.direct.is_on() && wide != range {
            self.direct.start_locking().await;
        }
        let odd_end = wide.end() > self.size() && wide.end() != range.end();
        // An odd end of the file is put right after the write: nobody may grow it meanwhile.
        let end = if odd_end { u64::MAX } else { wide.end() };
        let _held = self.ranges.lock(ByteRange::between(wide.start(), end)).await;
        if wide == range {
            self.file().write_at(offset, buf).await?;
        } else {
            let blocks = self.merge(wide, range, &buf).await?;
            let put = self.file().write_at(wide.start(), blocks).await;
            let len = self.size().max(range.end());
            if odd_end && wide.end() > len {
                self.file().set_len(len).await?;
            }
            put?;
        }
        self.grown_to(range.end());
        Ok(())
    }

    /// The blocks of `wide` as they will be once `buf` stands at `range` in them.
    async fn merge(&self, wide: ByteRange, range: ByteRange, buf: &Buf) -> Result<Buf> {
        let align = u64::from(self.direct.align());
        let blocks = Buf::new(wide.len() as usize);
        let last = wide.end() - align;
        let head = range.start() != wide.start();
        let tail = range.end() != wide.end();
        if head {
            let n = align as usize;
            self.file().read_at(wide.start(), blocks.slice(0..n)).await?;
        }
        if tail && !(head && last == wide.start()) {
            let at = (last - wide.start()) as usize;
            self.file().read_at(last, blocks.slice(at..blocks.len())).await?;
        }
        blocks.copy_from_buf((range.start() - wide.start()) as usize, buf);
        Ok(blocks)
    }
}

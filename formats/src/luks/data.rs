//! The way of data: encrypted into a buffer of its own on its way down, decrypted in place on its
//! way up.
//!
//! The cipher knows whole sectors only. A write of parts of one reads it, changes it and writes
//! it back, and holds its sectors meanwhile against all other writes, which hold theirs. Reads
//! hold nothing: a read that may have met such a change, and so half of it, is done once more
//! under the lock.

use std::sync::atomic::{AtomicU64, Ordering};

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::{Buf, yield_now};
use gipfel_node::WriteFlags;

use super::Luks;
use super::header::SECTOR;

/// A longer request goes piece by piece, in bytes.
const PIECE: u64 = 1 << 20;
/// Bytes that go through the cipher at once: they stay in the processor's nearest cache.
const CHUNK: usize = 4096;

/// Bytes of data in an image of `below` bytes: whole sectors from `payload` on.
pub(super) fn payload_size(payload: u64, below: u64) -> Result<u64> {
    let room = below.checked_sub(payload).ok_or_else(|| {
        Error::corrupt(format!(
            "the data begin at {payload:#x}, past the end of the image at {below:#x}"
        ))
    })?;
    Ok(room - room % SECTOR)
}

/// Counts writes of parts of sectors.
#[derive(Default)]
pub(super) struct Partial {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// One such write under way.
struct Changing<'a>(&'a Partial);

impl Partial {
    fn begin(&self) -> Changing<'_> {
        self.begun.fetch_add(1, Ordering::SeqCst);
        Changing(self)
    }

    /// How many there were, unless one is under way.
    fn quiet(&self) -> Option<u64> {
        let ended = self.ended.load(Ordering::SeqCst);
        let begun = self.begun.load(Ordering::SeqCst);
        (begun == ended).then_some(begun)
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// What the cipher does.
#[derive(Clone, Copy)]
enum Way {
    Encrypt,
    Decrypt,
}

/// The first part of a request that is worked on at once.
fn piece(left: ByteRange) -> ByteRange {
    left.take(PIECE - left.start() % PIECE)
}

/// The whole sectors around `range`.
fn whole(range: ByteRange) -> Result<ByteRange> {
    range.widen(SECTOR).ok_or_else(|| Error::invalid("a request ends past 2^64 bytes"))
}

impl Luks {
    pub(super) async fn read_data(&self, offset: u64, mut buf: Buf) -> Result<()> {
        let mut left = ByteRange::new(offset, buf.len() as u64);
        loop {
            let now = piece(left);
            let rest = buf.split_off(now.len() as usize);
            self.read_piece(now, &buf).await?;
            (left, buf) = (left.skip(now.len()), rest);
            if left.is_empty() {
                return Ok(());
            }
            yield_now().await;
        }
    }

    async fn read_piece(&self, range: ByteRange, buf: &Buf) -> Result<()> {
        let around = whole(range)?;
        let before = self.partial.quiet();
        if before.is_some() {
            self.read_sectors(around, range, buf).await?;
            if self.partial.quiet() == before {
                return Ok(());
            }
        }
        let _held = self.writes.lock(around).await;
        self.read_sectors(around, range, buf).await
    }

    /// Reads the whole sectors `around`, and gives the part `range` of it.
    async fn read_sectors(&self, around: ByteRange, range: ByteRange, buf: &Buf) -> Result<()> {
        let direct = around == range;
        let all = if direct { buf.clone() } else { Buf::new(around.len() as usize) };
        self.file().read(self.payload + around.start(), all.clone()).await?;
        self.transform(Way::Decrypt, around.start(), &all, &all);
        if !direct {
            let at = (range.start() - around.start()) as usize;
            buf.copy_from_buf(0, &all.slice(at..at + range.len() as usize));
        }
        Ok(())
    }

    pub(super) async fn write_data(
        &self,
        offset: u64,
        mut buf: Buf,
        flags: WriteFlags,
    ) -> Result<()> {
        let mut left = ByteRange::new(offset, buf.len() as u64);
        loop {
            let now = piece(left);
            let rest = buf.split_off(now.len() as usize);
            self.write_piece(now, &buf, flags).await?;
            (left, buf) = (left.skip(now.len()), rest);
            if left.is_empty() {
                return Ok(());
            }
            yield_now().await;
        }
    }

    async fn write_piece(&self, range: ByteRange, buf: &Buf, flags: WriteFlags) -> Result<()> {
        let around = whole(range)?;
        let _held = self.writes.lock(around).await;
        let sealed = Buf::new(around.len() as usize);
        let at = self.payload + around.start();
        if around == range {
            self.transform(Way::Encrypt, around.start(), buf, &sealed);
            return self.file().write(at, sealed, flags).await;
        }
        for sector in partial_sectors(range) {
            let from = (sector.start() - around.start()) as usize;
            let old = sealed.slice(from..from + SECTOR as usize);
            self.read_sectors(sector, sector, &old).await?;
        }
        sealed.copy_from_buf((range.start() - around.start()) as usize, buf);
        self.transform(Way::Encrypt, around.start(), &sealed, &sealed);
        let _changing = self.partial.begin();
        self.file().write(at, sealed, flags).await
    }

    /// Takes whole sectors, the first at `offset` of the disk, from `from` through the cipher to
    /// `to`, which may be the same.
    fn transform(&self, way: Way, offset: u64, from: &Buf, to: &Buf) {
        let mut chunk = [0; CHUNK];
        for at in (0..from.len()).step_by(CHUNK) {
            let n = CHUNK.min(from.len() - at);
            let sector = (offset + at as u64) / SECTOR;
            from.copy_to(at, &mut chunk[..n]);
            match way {
                Way::Encrypt => self.cipher.encrypt(sector, &mut chunk[..n]),
                Way::Decrypt => self.cipher.decrypt(sector, &mut chunk[..n]),
            }
            to.copy_from(at, &chunk[..n]);
        }
    }

    /// Lets go of the whole sectors in `range`.
    pub(super) async fn discard_data(&self, range: ByteRange) -> Result<()> {
        let Some(inner) = range.narrow(SECTOR).filter(|r| !r.is_empty()) else { return Ok(()) };
        let _held = self.writes.lock(inner).await;
        let below = ByteRange::new(self.payload + inner.start(), inner.len());
        self.file().discard(below).await
    }
}

/// The sectors that `range` covers in part: at its start, at its end, or one at both.
fn partial_sectors(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    let (start, end) = (range.start(), range.end());
    let first = start - start % SECTOR;
    let last = end - end % SECTOR;
    let head = (start != first).then_some(first);
    let tail = (end != last && (last != first || head.is_none())).then_some(last);
    head.into_iter().chain(tail).map(|at| ByteRange::new(at, SECTOR))
}

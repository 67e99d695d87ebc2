//! Where each part of the kept moment lies: one bit for each granule, a second one where granules
//! were let go of.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use gipfel_base::{ByteRange, Error, ErrorKind, Result};

/// Where the bytes of the moment are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In the filtered node, not yet overwritten.
    Source,
    /// In the target, copied.
    Target,
    /// Nowhere: nobody wanted them any more.
    Dropped,
}

type Bits = Box<[AtomicU64]>;

/// The granules of a disk.
pub(super) struct Granules {
    /// Bytes of the disk.
    size: u64,
    /// Bytes of one granule, a power of two.
    granule: u64,
    /// Those that need no copy (any more).
    done: Bits,
    /// Those of them that are nowhere.
    dropped: OnceLock<Bits>,
}

/// No bits at all; an error where the memory for them is not to be had.
fn bits(count: u64) -> Result<Bits> {
    let words = count.div_ceil(64) as usize;
    let mut v: Vec<AtomicU64> = Vec::new();
    v.try_reserve_exact(words).map_err(|_| {
        let text = format!("there is no memory for the marks of {count} granules");
        Error::new(ErrorKind::Limit, format!("{text}: choose a larger 'min-cluster-size'"))
    })?;
    v.resize_with(words, AtomicU64::default);
    Ok(v.into())
}

fn is_set(bits: &Bits, i: u64) -> bool {
    bits[(i / 64) as usize].load(Ordering::SeqCst) & 1 << (i % 64) != 0
}

/// How many bits from `from` up to `end` are as the first one (at least that one).
fn run(bits: &Bits, from: u64, end: u64) -> u64 {
    let flip = if is_set(bits, from) { u64::MAX } else { 0 };
    let mut at = from;
    while at < end {
        let word = bits[(at / 64) as usize].load(Ordering::SeqCst) ^ flip;
        let rest = word >> (at % 64);
        if rest != 0 {
            at += u64::from(rest.trailing_zeros());
            break;
        }
        at = (at / 64 + 1) * 64;
    }
    // The first bit may have changed meanwhile: then the next look tells.
    at.clamp(from + 1, end) - from
}

impl Granules {
    pub(super) fn new(size: u64, granule: u64) -> Result<Granules> {
        let done = bits(size.div_ceil(granule))?;
        Ok(Granules { size, granule, done, dropped: OnceLock::new() })
    }

    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The whole granules that `range` touches (the last one may end before its end).
    pub(super) fn around(&self, range: ByteRange) -> ByteRange {
        let start = range.start() / self.granule * self.granule;
        let end = range.end().div_ceil(self.granule).saturating_mul(self.granule);
        ByteRange::between(start, end.min(self.size).max(start))
    }

    /// The granules that lie wholly within `range`.
    fn within(&self, range: ByteRange) -> std::ops::Range<u64> {
        let last = if range.end() == self.size {
            range.end().div_ceil(self.granule)
        } else {
            range.end() / self.granule
        };
        range.start().div_ceil(self.granule)..last
    }

    /// Where the first bytes of `range` (not empty, within the disk) lie, and how many of them.
    pub(super) fn place(&self, range: ByteRange) -> (Place, u64) {
        let first = range.start() / self.granule;
        let end = range.end().div_ceil(self.granule);
        let done = is_set(&self.done, first);
        let mut end = first + run(&self.done, first, end);
        let mut place = if done { Place::Target } else { Place::Source };
        if let (true, Some(dropped)) = (done, self.dropped.get()) {
            if is_set(dropped, first) {
                place = Place::Dropped;
            }
            end = first + run(dropped, first, end);
        }
        (place, (end * self.granule).min(range.end()) - range.start())
    }

    /// The granules within `range` are copied, or need not be.
    pub(super) fn set_done(&self, range: ByteRange) {
        for i in self.within(range) {
            self.done[(i / 64) as usize].fetch_or(1 << (i % 64), Ordering::SeqCst);
        }
    }

    /// The granules within `range` are not wanted any more; gives their bytes.
    pub(super) fn set_dropped(&self, range: ByteRange) -> Result<ByteRange> {
        let whole = self.within(range);
        if whole.is_empty() {
            return Ok(range.take(0));
        }
        if self.dropped.get().is_none() {
            // Whoever comes second finds the first one's.
            let _ = self.dropped.set(bits(self.size.div_ceil(self.granule))?);
        }
        for i in whole.clone() {
            let (word, bit) = ((i / 64) as usize, 1 << (i % 64));
            if let Some(d) = self.dropped.get() {
                d[word].fetch_or(bit, Ordering::SeqCst);
            }
            self.done[word].fetch_or(bit, Ordering::SeqCst);
        }
        let end = (whole.end * self.granule).min(self.size);
        Ok(ByteRange::between(whole.start * self.granule, end))
    }
}

//! Ranges of bytes: an offset and a length that cannot overflow.

use std::fmt;

/// `len` bytes that start at `start`; `start + len` never overflows `u64`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// The range of `len` bytes at `start`, or `None` where its end would pass `u64::MAX`.
    pub fn checked(start: u64, len: u64) -> Option<Self> {
        start.checked_add(len).map(|_| Self { start, len })
    }

    /// The range of `len` bytes at `start`. Panics where its end would pass `u64::MAX`: for
    /// values that were checked before.
    pub fn new(start: u64, len: u64) -> Self {
        Self::checked(start, len).expect("range end fits in 64 bits")
    }

    /// The range from `start` up to and without `end`.
    pub fn between(start: u64, end: u64) -> Self {
        assert!(start <= end, "range start {start} after end {end}");
        Self { start, len: end - start }
    }

    /// First byte.
    pub fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub fn end(self) -> u64 {
        self.start + self.len
    }

    /// Length in bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether it holds no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether every byte of `other` lies in it.
    pub fn contains(self, other: ByteRange) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Whether the two share a byte.
    pub fn overlaps(self, other: ByteRange) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// The bytes that both hold, if any.
    pub fn intersect(self, other: ByteRange) -> Option<ByteRange> {
        let s = self.start.max(other.start);
        let e = self.end().min(other.end());
        (s < e).then(|| Self::between(s, e))
    }

    /// The first at most `n` bytes of it.
    pub fn take(self, n: u64) -> ByteRange {
        Self { start: self.start, len: self.len.min(n) }
    }

    /// What is left of it after the first `n` bytes (empty where it has no more).
    pub fn skip(self, n: u64) -> ByteRange {
        let n = n.min(self.len);
        Self { start: self.start + n, len: self.len - n }
    }

    /// The smallest range of whole blocks of `align` bytes (a power of two) that holds it.
    pub fn widen(self, align: u64) -> Option<ByteRange> {
        let s = self.start & !(align - 1);
        let e = self.end().checked_add(align - 1)? & !(align - 1);
        Some(Self::between(s, e))
    }

    /// The largest range of whole blocks of `align` bytes within it, if there is one.
    pub fn narrow(self, align: u64) -> Option<ByteRange> {
        let s = self.start.checked_add(align - 1)? & !(align - 1);
        let e = self.end() & !(align - 1);
        (s < e).then(|| Self::between(s, e))
    }

    /// Whether start and length are multiples of `align` (a power of two).
    pub fn is_aligned(self, align: u64) -> bool {
        (self.start | self.len) & (align - 1) == 0
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widen_and_narrow() {
        let r = ByteRange::new(100, 1000);
        assert_eq!(r.widen(512), Some(ByteRange::between(0, 1536)));
        assert_eq!(r.narrow(512), Some(ByteRange::between(512, 1024)));
        assert_eq!(ByteRange::new(100, 300).narrow(512), None);
        assert_eq!(ByteRange::new(u64::MAX - 1, 1).widen(512), None);
        assert_eq!(ByteRange::checked(u64::MAX, 1), None);
    }
}

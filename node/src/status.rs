//! What is known of a range without reading it: data, zeros, where it lies.

/// The state of the first `len` bytes of a range, as one node sees it (not its backing chain).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// For how many bytes this holds (at least one, at most what was asked).
    pub len: u64,
    /// Whether this node decides what is read there; else its backing child does.
    pub allocated: bool,
    /// Whether space is taken for it on storage.
    pub data: bool,
    /// Whether it is known to read as zeros.
    pub zero: bool,
    /// Whether it is stored compressed.
    pub compressed: bool,
    /// Where it lies in the node's image or data file, in bytes, if in one piece.
    pub at: Option<u64>,
}

impl Status {
    /// `len` bytes of plain data at `at`.
    pub fn data(len: u64, at: Option<u64>) -> Status {
        Status { len, allocated: true, data: true, zero: false, compressed: false, at }
    }

    /// `len` bytes that read as zeros and take no space.
    pub fn hole(len: u64) -> Status {
        Status { len, allocated: true, data: false, zero: true, compressed: false, at: None }
    }

    /// `len` bytes that the backing child decides.
    pub fn unallocated(len: u64) -> Status {
        Status { allocated: false, zero: false, ..Self::hole(len) }
    }
}

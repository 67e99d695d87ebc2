//! What an NBD export needs of a disk: byte-granular asynchronous requests from any I/O thread.
//!
//! The server checks ranges and read-only before it calls; lengths of reads and writes end at
//! [`super::proto::consts::MAX_PAYLOAD`], those of the other requests at 4 GiB.

use gipfel_base::{ByteRange, Result};
use gipfel_io::Buf;

/// A run of bytes with the same status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, never 0.
    pub len: u64,
    /// Storage is allocated for it: writes there need no new space.
    pub allocated: bool,
    /// It is known to read as zeroes.
    pub zero: bool,
}

/// How bytes are to become zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Durable before the request ends.
    pub fua: bool,
    /// The storage may be given back.
    pub may_unmap: bool,
    /// Fail with [`gipfel_base::ErrorKind::Unsupported`] rather than write zero bytes.
    pub fast: bool,
}

/// A disk that an export shows. Futures run on the I/O thread of the connection.
pub trait Disk: Send + Sync + 'static {
    /// Size in bytes, now.
    fn size(&self) -> u64;

    /// Whether it has a medium, now.
    fn has_medium(&self) -> bool {
        true
    }

    /// Smallest unit that requests must be multiples of, in bytes; 1 where any byte will do.
    fn min_block(&self) -> u32 {
        1
    }

    /// Unit of efficient requests in bytes.
    fn preferred_block(&self) -> u32 {
        4096
    }

    /// Fills `buf` from `offset`.
    fn read(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<()>>;

    /// Writes `buf` at `offset`; with `fua` durable before the end.
    fn write(&self, offset: u64, buf: Buf, fua: bool) -> impl Future<Output = Result<()>>;

    /// Makes `range` read as zeroes.
    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> impl Future<Output = Result<()>>;

    /// Lets go of the contents of `range`, as far as the disk likes.
    fn discard(&self, range: ByteRange, fua: bool) -> impl Future<Output = Result<()>>;

    /// Makes all finished writes durable.
    fn flush(&self) -> impl Future<Output = Result<()>>;

    /// Says that `range` will be read soon. What comes of it is the disk's business.
    fn prefetch(&self, range: ByteRange) -> impl Future<Output = Result<()>>;

    /// The status of the bytes from the start of `range`, for at most its length.
    fn block_status(&self, range: ByteRange) -> impl Future<Output = Result<Extent>>;
}

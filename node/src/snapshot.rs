//! What a driver shows of a moment that is past, beside its present data.

use gipfel_base::ByteRange;
use gipfel_io::Buf;

use crate::driver::IoFuture;
use crate::status::Status;

/// The disk as it was at one moment, kept by a driver whose own data go on changing
/// (copy-before-write). Offsets and lengths lie within [`SnapshotSource::size`].
pub trait SnapshotSource: Send + Sync {
    /// Size at that moment, in bytes.
    fn size(&self) -> u64;

    /// Reads what was there at that moment. Fails once that is lost, and where it was let go of.
    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a>;

    /// What a reader finds in the first bytes of `range`, backing chains included.
    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status>;

    /// Nobody reads `range` any more: it need not be kept.
    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a>;
}

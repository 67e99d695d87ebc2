//! A graph backend as the disk of an NBD export.

use gipfel_base::{ByteRange, Result};
use gipfel_graph::Backend;
use gipfel_io::Buf;
use gipfel_node::ZeroFlags;

use crate::nbd::{Disk, Extent, ZeroFlags as NbdZeroFlags};

/// Bytes that prefetching reads at once.
const PREFETCH: u64 = 1 << 20;

impl Disk for Backend {
    fn size(&self) -> u64 {
        Backend::size(self)
    }

    fn has_medium(&self) -> bool {
        Backend::has_medium(self)
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<()> {
        Backend::read(self, offset, buf).await
    }

    async fn write(&self, offset: u64, buf: Buf, fua: bool) -> Result<()> {
        Backend::write(self, offset, buf, fua).await
    }

    async fn write_zeroes(&self, range: ByteRange, flags: NbdZeroFlags) -> Result<()> {
        let NbdZeroFlags { fua, may_unmap, fast } = flags;
        let flags = ZeroFlags { fua, unmap: may_unmap, no_fallback: fast, unchanged: false };
        Backend::write_zeroes(self, range, flags).await
    }

    async fn discard(&self, range: ByteRange, fua: bool) -> Result<()> {
        Backend::discard(self, range).await?;
        if fua { Backend::flush(self).await } else { Ok(()) }
    }

    async fn flush(&self) -> Result<()> {
        Backend::flush(self).await
    }

    async fn prefetch(&self, range: ByteRange) -> Result<()> {
        // Reading fills the host's cache, and a copy-on-read filter's image.
        let mut left = range;
        while !left.is_empty() {
            let part = left.take(PREFETCH);
            Backend::read(self, part.start(), Buf::new(part.len() as usize)).await?;
            left = left.skip(PREFETCH);
        }
        Ok(())
    }

    async fn block_status(&self, range: ByteRange) -> Result<Extent> {
        let (s, _) = self.status(range).await?;
        Ok(Extent { len: s.len, allocated: s.data, zero: s.zero })
    }
}

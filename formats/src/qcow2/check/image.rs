//! The image file as the check reads and writes it.

use std::sync::Arc;

use gipfel_base::{ByteRange, Result};
use gipfel_io::Buf;
use gipfel_node::{Child, WriteFlags};

use super::judge::Bounds;
use crate::qcow2::header::{self, Header};

/// Tables are read in pieces of this many bytes.
pub(super) const PIECE: u64 = 1 << 20;

/// An image whose header is valid.
pub(super) struct Image {
    file: Arc<Child>,
    /// The header.
    pub header: Header,
    /// What entries are held against.
    pub bounds: Bounds,
}

impl Image {
    /// Reads the header. Fails where it is not valid or asks for what is not offered.
    pub(super) async fn open(file: Arc<Child>) -> Result<Image> {
        let len = file.size().await?;
        let first = Buf::new(len.min(header::V2_LENGTH as u64) as usize);
        file.read(0, first.clone()).await?;
        let cluster = header::cluster_size(&first.to_vec())?;
        let first = Buf::new(len.min(cluster) as usize);
        file.read(0, first.clone()).await?;
        let header = Header::parse(&first.to_vec())?;
        header.check_offered()?;
        let bounds = Bounds { g: header.geometry, version: header.version, len };
        Ok(Image { file, header, bounds })
    }

    /// Number of clusters in the file.
    pub(super) fn clusters(&self) -> u64 {
        self.bounds.g.clusters(self.bounds.len)
    }

    /// Reads `len` bytes at `offset`; past the end of the file they are zeros.
    pub(super) async fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let inside = self.bounds.len.saturating_sub(offset).min(len);
        let mut bytes = Vec::new();
        if inside > 0 {
            let buf = Buf::new(inside as usize);
            self.file.read(offset, buf.clone()).await?;
            bytes = buf.to_vec();
        }
        bytes.resize(len as usize, 0);
        Ok(bytes)
    }

    /// Whether the range is known to be nothing but zeros, so that it need not be read.
    pub(super) async fn is_hole(&self, offset: u64, len: u64) -> Result<bool> {
        let inside = self.bounds.len.saturating_sub(offset).min(len);
        if inside == 0 {
            return Ok(true);
        }
        let s = self.file.status(ByteRange::new(offset, inside)).await?;
        Ok(s.allocated && s.zero && s.len >= inside)
    }

    /// Reads a table of entries of eight bytes; nothing where it is all zeros.
    pub(super) async fn table(&self, offset: u64, entries: u64) -> Result<Option<Vec<u64>>> {
        if self.is_hole(offset, entries * 8).await? {
            return Ok(None);
        }
        let bytes = self.read(offset, entries * 8).await?;
        let entry = |c: &[u8]| u64::from_be_bytes(c.try_into().expect("eight bytes"));
        Ok(Some(bytes.chunks_exact(8).map(entry).collect()))
    }

    /// Reads a refcount block of `len` bytes; nothing where it is all zeros.
    pub(super) async fn block(&self, offset: u64, len: u64) -> Result<Option<Vec<u8>>> {
        if self.is_hole(offset, len).await? {
            return Ok(None);
        }
        Ok(Some(self.read(offset, len).await?))
    }

    /// Writes `bytes` at `offset`.
    pub(super) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write(offset, Buf::from_slice(bytes), WriteFlags::default()).await
    }

    /// Writes those entries of a table that differ from `old`.
    pub(super) async fn write_changed(&self, offset: u64, old: &[u64], new: &[u64]) -> Result<()> {
        let differ = |i: &usize| old[*i] != new[*i];
        let Some(first) = (0..new.len()).find(differ) else { return Ok(()) };
        let last = (0..new.len()).rfind(differ).unwrap_or(first);
        let bytes: Vec<u8> = new[first..=last].iter().flat_map(|e| e.to_be_bytes()).collect();
        self.write(offset + first as u64 * 8, &bytes).await
    }

    /// Makes all that was written durable.
    pub(super) async fn flush(&self) -> Result<()> {
        self.file.flush().await
    }
}

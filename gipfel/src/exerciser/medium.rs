//! The disk of the open image, as requests see it: it ends at a whole sector, also where its file
//! does not, and requests of any length are cut for the graph.

use std::rc::Rc;
use std::sync::Arc;

use async_lock::Mutex;
use gipfel_base::limits::MAX_REQUEST;
use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_graph::Backend;
use gipfel_io::Buf;
use gipfel_node::ZeroFlags;

use crate::img::whole_sectors;

/// EIO: what a request past the end fails with.
const EIO: i32 = 5;

/// The disk.
#[derive(Clone)]
pub struct Medium {
    /// The way to it.
    pub backend: Arc<Backend>,
    growing: Rc<Mutex<()>>,
}

impl Medium {
    /// The medium of `backend`.
    pub fn new(backend: Arc<Backend>) -> Medium {
        Medium { backend, growing: Rc::default() }
    }

    /// Its size in bytes, in whole sectors.
    pub fn size(&self) -> u64 {
        whole_sectors(self.backend.size())
    }

    fn check(&self, offset: u64, len: u64) -> Result<ByteRange> {
        let size = self.size();
        let range = ByteRange::checked(offset, len).filter(|r| r.end() <= size);
        range.ok_or_else(|| {
            let text = format!("{len} bytes at {offset:#x} reach past the end at {size:#x}");
            Error::new(ErrorKind::Os(EIO), text)
        })
    }

    /// Reads all of `buf`; what the file is too short for reads as zeros.
    pub async fn read(&self, offset: u64, mut buf: Buf) -> Result<()> {
        self.check(offset, buf.len() as u64)?;
        let stored = self.backend.size().saturating_sub(offset).min(buf.len() as u64);
        buf.split_off(stored as usize).fill(0);
        for (at, part) in parts(offset, buf) {
            self.backend.read(at, part).await?;
        }
        Ok(())
    }

    /// Writes all of `buf`.
    pub async fn write(&self, offset: u64, buf: Buf, fua: bool) -> Result<()> {
        let range = self.check(offset, buf.len() as u64)?;
        self.reach(range).await?;
        for (at, part) in parts(offset, buf) {
            self.backend.write(at, part, fua).await?;
        }
        Ok(())
    }

    /// Makes a range read as zeros.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let range = self.check(offset, len)?;
        self.reach(range).await?;
        self.backend.write_zeroes(range, flags).await
    }

    /// Lets go of a range.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let range = self.check(offset, len)?;
        match range.intersect(ByteRange::new(0, self.backend.size())) {
            Some(stored) if !stored.is_empty() => self.backend.discard(stored).await,
            _ => Ok(()),
        }
    }

    /// Makes the disk long enough for a write into a last sector that its file does not fill.
    async fn reach(&self, range: ByteRange) -> Result<()> {
        if range.end() <= self.backend.size() {
            return Ok(());
        }
        let _one_at_a_time = self.growing.lock().await;
        if range.end() <= self.backend.size() {
            return Ok(());
        }
        self.backend.resize(range.end()).await
    }
}

/// The parts of `buf` that enter the graph one by one, each with its place.
fn parts(offset: u64, buf: Buf) -> impl Iterator<Item = (u64, Buf)> {
    let (mut at, mut left) = (offset, buf);
    std::iter::from_fn(move || {
        if left.is_empty() {
            return None;
        }
        let rest = left.split_off(left.len().min(MAX_REQUEST as usize));
        let part = std::mem::replace(&mut left, rest);
        let start = at;
        at += part.len() as u64;
        Some((start, part))
    })
}

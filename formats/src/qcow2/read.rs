//! Reads that are not only mapped: uncached entries, compressed clusters, bad entries.

use gipfel_base::sync::sync::atomic::Ordering;
use gipfel_base::{ByteRange, Result};
use gipfel_io::Buf;
use gipfel_node::{Child, DebugEvent};

use super::Qcow2;
use super::header::Compression;
use super::lookup::What;

impl Qcow2 {
    /// Reads all of `buf` from guest offset `offset`.
    pub(super) async fn read_clusters(&self, offset: u64, buf: Buf) -> Result<()> {
        let mut left = ByteRange::new(offset, buf.len() as u64);
        let mut buf = buf;
        while !left.is_empty() {
            let _pin = self.epoch.pin();
            let run = self.lookup(left, true);
            if run.what == What::Uncached {
                self.load_l2(left.start()).await?;
                continue;
            }
            let rest = buf.split_off(run.len as usize);
            match run.what {
                What::Data { host, .. } => {
                    self.event(DebugEvent::ReadAio).await;
                    self.read_data(host, buf).await?;
                }
                What::Zero => buf.fill(0),
                What::Unallocated => self.read_backing(left.start(), buf).await?,
                What::Compressed { host, len } => {
                    let cluster = self.decompress(host, len).await?;
                    let from = self.g.in_cluster(left.start()) as usize;
                    buf.copy_from_buf(0, &cluster.slice(from..from + buf.len()));
                }
                What::Bad { entry } => return Err(self.bad_entry(left.start(), entry)),
                What::Uncached | What::Suspect => unreachable!("looked at closely, and loaded"),
            }
            (left, buf) = (left.skip(run.len), rest);
        }
        Ok(())
    }

    pub(super) fn bad_entry(&self, guest: u64, entry: u64) -> gipfel_base::Error {
        self.corrupt(format!(
            "the L2 entry {entry:#x} of the disk's bytes at {:#x} points to no data: it is \
             unaligned, past the end of the file, or points at metadata",
            self.g.cluster_start(guest)
        ))
    }

    /// Reads from the image file: zeros past its end.
    pub(super) async fn read_file(&self, host: u64, buf: Buf) -> Result<()> {
        read_child(self.file(), host, buf).await.map(drop)
    }

    /// Reads from where data lie: zeros past the end.
    async fn read_data(&self, host: u64, buf: Buf) -> Result<()> {
        let end = read_child(self.data(), host, buf).await?;
        self.data_end.store(end, Ordering::Release);
        Ok(())
    }

    /// Reads from the backing image: zeros past its end or without one.
    async fn read_backing(&self, offset: u64, buf: Buf) -> Result<()> {
        let end = self.backing_size().await;
        let n = end.saturating_sub(offset).min(buf.len() as u64) as usize;
        buf.slice(n..buf.len()).fill(0);
        if n == 0 {
            return Ok(());
        }
        self.event(DebugEvent::ReadBackingAio).await;
        self.backing().read(offset, buf.slice(0..n)).await
    }

    /// The backing image's size in bytes, 0 without one.
    pub(super) async fn backing_size(&self) -> u64 {
        self.backing().enter().await.as_ref().map_or(0, |n| n.size())
    }

    /// The cluster whose stream begins at `host` and ends within `len` bytes.
    async fn decompress(&self, host: u64, len: u64) -> Result<Buf> {
        let stream = Buf::new(len as usize);
        self.event(DebugEvent::ReadCompressed).await;
        self.read_file(host, stream.clone()).await?;
        let mut cluster = vec![0; self.g.cluster_size() as usize];
        let bytes = stream.to_vec();
        let done = match self.header().compression {
            Compression::Zlib => inflate(&bytes, &mut cluster),
            Compression::Zstd => unzstd(&bytes, &mut cluster),
        };
        match done {
            true => Ok(Buf::from_slice(&cluster)),
            false => Err(self.corrupt(format!(
                "the compressed cluster at {host:#x} cannot be unpacked to {} bytes",
                cluster.len()
            ))),
        }
    }
}

/// Reads from a child: zeros past its end. Gives where that is.
async fn read_child(child: &Child, at: u64, buf: Buf) -> Result<u64> {
    let end = child.size().await?;
    let n = end.saturating_sub(at).min(buf.len() as u64) as usize;
    buf.slice(n..buf.len()).fill(0);
    if n > 0 {
        child.read(at, buf.slice(0..n)).await?;
    }
    Ok(end)
}

/// Unpacks a raw deflate stream that fills `to`; what follows it is padding.
fn inflate(from: &[u8], to: &mut [u8]) -> bool {
    libdeflater::Decompressor::new().deflate_decompress(from, to).is_ok_and(|n| n == to.len())
}

/// Unpacks a zstd frame that fills `to`; what follows it is padding.
fn unzstd(from: &[u8], to: &mut [u8]) -> bool {
    let Ok(frame) = zstd::zstd_safe::find_frame_compressed_size(from) else { return false };
    let Ok(mut d) = zstd::bulk::Decompressor::new() else { return false };
    d.decompress_to_buffer(&from[..frame], to).is_ok_and(|n| n == to.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_and_short_streams_are_refused() {
        let mut to = [0; 4096];
        for seed in 0..2000u64 {
            let mut rng = gipfel_io::sim::Rng::new(seed);
            let bytes: Vec<u8> = (0..rng.below(600)).map(|_| rng.next_u64() as u8).collect();
            assert!(!inflate(&bytes, &mut to) && !unzstd(&bytes, &mut to), "seed {seed}");
        }
    }
}

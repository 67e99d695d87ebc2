//! Compressed writes (qcow2 spec, Compressed Clusters Descriptor).
//!
//! Each guest cluster is a stream of its own. Streams lie one behind the other, whatever cluster
//! of the file that brings them to, so several share one; each counts a reference to every
//! cluster that it touches. Space that a stream lets go of is free again with its whole cluster.
//! A cluster that does not shrink is stored as it is.
//!
//! The order is that of all writes (see [`super::flush`]): the references are counted before the
//! stream is written, and the entry changes after it.

use gipfel_base::sync::sync::atomic::Ordering;
use gipfel_base::{ByteRange, Result};
use gipfel_io::Buf;
use gipfel_node::{DebugEvent, WriteFlags};
use zlib_rs::{Deflate, DeflateConfig, DeflateFlush, Status};

use super::Qcow2;
use super::entry::{Entry, compressed_entry};
use super::header::Compression;
use super::lookup::What;
use super::refcounts::{Extent, Packed};

/// Streams refer back 4 KiB at most, in bits (raw deflate): readers keep no more.
const WINDOW_BITS: i32 = 12;

impl Qcow2 {
    /// Writes all of `buf` at guest offset `offset`, compressed. A cluster that is written in part
    /// is compressed anew, unless it has plain data in a place of its own: those are overwritten
    /// there, since others may be doing the same without asking.
    pub(super) async fn write_compressed(&self, offset: u64, buf: Buf) -> Result<()> {
        let mut left = ByteRange::new(offset, buf.len() as u64);
        let mut buf = buf;
        while !left.is_empty() {
            let cluster = self.whole(left.take(1));
            let part = left.take(cluster.end() - left.start());
            let rest = buf.split_off(part.len() as usize);
            let _held = self.guests.lock(cluster).await;
            self.compress_held(cluster, part, buf).await?;
            (left, buf) = (left.skip(part.len()), rest);
        }
        self.limit_pending().await
    }

    /// Writes `part` of one cluster; the caller holds it.
    async fn compress_held(&self, cluster: ByteRange, part: ByteRange, buf: Buf) -> Result<()> {
        let end = cluster.end().min(self.size.load(Ordering::Acquire));
        let in_part = part.start() > cluster.start() || part.end() < end;
        self.own_table(cluster.start()).await?;
        if self.is_plain(cluster.start()).await? && in_part {
            return self.write_held(part, buf).await;
        }
        let all = Buf::zeroed(cluster.len() as usize);
        if in_part {
            self.read_around(cluster, all.clone()).await?;
        }
        all.copy_from_buf((part.start() - cluster.start()) as usize, &buf);
        let (bytes, kind) = (all.to_vec(), self.header().compression);
        // Milliseconds of work: not on the thread that serves everybody.
        let stream = gipfel_io::compute(move || Ok(compress(kind, &bytes))).await?;
        match stream {
            Some(s) if self.put_stream(cluster, &s).await? => Ok(()),
            _ => self.write_held(part, buf).await,
        }
    }

    /// Whether the cluster at a guest offset has data, if only in parts, that may be overwritten in
    /// place.
    async fn is_plain(&self, guest: u64) -> Result<bool> {
        loop {
            match self.lookup(ByteRange::new(guest, 1), true).what {
                What::Bad { entry } => return Err(self.bad_entry(guest, entry)),
                What::Uncached => self.own_table(guest).await?,
                _ => {
                    let c = self.cluster(guest).await?;
                    return Ok(c.parts().data != 0 && c.host().is_some_and(|(_, copied)| copied));
                }
            }
        }
    }

    /// Puts a stream in the place of `cluster`; false where no entry can say where it would lie.
    async fn put_stream(&self, cluster: ByteRange, stream: &[u8]) -> Result<bool> {
        let len = stream.len() as u64;
        let host = self.room_for(len).await?;
        let touched = self.clusters_at(host, len);
        let Some(entry) = compressed_entry(host, len, self.g) else {
            self.release(touched.first, touched.count, false).await?;
            return Ok(false);
        };
        self.event(DebugEvent::WriteCompressed).await;
        let written = self.file().write(host, Buf::from_slice(stream), WriteFlags::default());
        if let Err(e) = written.await {
            // No entry has ever referred to it.
            self.release(touched.first, touched.count, false).await?;
            return Err(e);
        }
        self.flushing.wrote();
        let entry = Entry { word: entry, bitmap: 0 };
        self.change_entries(cluster, false, |_, _| Some(entry)).await?;
        Ok(true)
    }

    /// The host clusters of `len` bytes at `host`.
    fn clusters_at(&self, host: u64, len: u64) -> Extent {
        let first = host >> self.g.cluster_bits;
        let last = (host + len - 1) >> self.g.cluster_bits;
        Extent { first, count: last - first + 1, fresh: false }
    }

    /// Takes `len` bytes, fewer than a cluster's, where compressed data may lie.
    async fn room_for(&self, len: u64) -> Result<u64> {
        self.event(DebugEvent::ClusterAllocBytes).await;
        // One at a time: else each of several would begin a cluster of its own.
        let _turn = self.packing.lock().await;
        loop {
            let found = self.refcounts().pack(&self.refcount_slices, len);
            match found {
                Packed::At(host) => {
                    self.flushing.changed();
                    return Ok(host);
                }
                Packed::Load(slice) => self.load_refcounts(slice).await?,
                Packed::Full => break,
            }
        }
        let new = self.allocate(1, false).await?;
        let host = new.first << self.g.cluster_bits;
        self.refcounts().pack_behind(host + len);
        Ok(host)
    }
}

/// The stream of a cluster's bytes, if it is shorter than they are.
fn compress(kind: Compression, bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; bytes.len() - 1];
    let len = match kind {
        Compression::Zlib => deflate(bytes, &mut out),
        Compression::Zstd => zstd::bulk::compress_to_buffer(bytes, &mut out, 0).ok(),
    }?;
    out.truncate(len);
    Some(out)
}

/// Compresses to a raw deflate stream; gives its length, if there was room for it.
fn deflate(bytes: &[u8], out: &mut [u8]) -> Option<usize> {
    let config = DeflateConfig { window_bits: -WINDOW_BITS, mem_level: 9, ..Default::default() };
    let mut d = Deflate::new_with_config(config);
    let end = d.compress(bytes, out, DeflateFlush::Finish).ok()?;
    (end == Status::StreamEnd).then_some(d.total_out() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gipfel_io::sim::Rng;

    #[test]
    fn what_does_not_shrink_has_no_stream() {
        let mut rng = Rng::new(1);
        let noise: Vec<u8> = (0..65536).map(|_| rng.next_u64() as u8).collect();
        for kind in [Compression::Zlib, Compression::Zstd] {
            assert!(compress(kind, &noise).is_none(), "{kind:?}");
            let text: Vec<u8> = noise.iter().map(|b| b & 7).collect();
            let len = compress(kind, &text).map(|s| s.len()).unwrap();
            assert!((24_000..36_000).contains(&len), "{kind:?}: {len}");
            assert!(compress(kind, &[0; 512]).is_some_and(|s| s.len() < 30), "{kind:?}");
        }
    }

    /// The reference unpacks with a window of 4 KiB.
    #[test]
    fn deflate_streams_refer_back_4_kib_at_most() {
        let mut rng = Rng::new(2);
        let noise: Vec<u8> = (0..5000).map(|_| rng.next_u64() as u8).collect();
        let far = [&noise[..], &noise].concat();
        let near = [&noise[..3000], &noise[..3000]].concat();
        let zlib = |bytes: &[u8]| compress(Compression::Zlib, bytes).map(|s| s.len());
        assert_eq!(zlib(&far), None, "a repetition 5000 bytes away was found");
        assert!(zlib(&near).is_some_and(|n| n < 3200), "{:?}", zlib(&near));
    }
}

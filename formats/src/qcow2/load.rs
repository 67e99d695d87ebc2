//! Reading slices of tables into the caches: each slice by one task at a time.

use gipfel_base::{ByteRange, Result};
use gipfel_io::Buf;
use gipfel_node::DebugEvent;

use super::Qcow2;
use super::cache::Reserve;
use super::entry::{Cluster, Entry};

/// The big-endian words in a buffer.
pub(super) fn words(buf: &Buf) -> Vec<u64> {
    let bytes = buf.to_vec();
    let word = |b: &[u8]| u64::from_be_bytes(b.try_into().expect("chunks of eight bytes"));
    bytes.chunks_exact(8).map(word).collect()
}

impl Qcow2 {
    /// Where the L2 slice of a guest offset lies in the file: `None` without a table. Fails for
    /// an entry of the L1 table that cannot be.
    pub(super) fn l2_slice_host(&self, guest: u64) -> Result<Option<u64>> {
        let index = guest / self.g.l1_reach();
        let Some(table) = self.l1.get(index) else { return Ok(None) };
        if self.g.in_cluster(table.host) != 0 {
            return Err(self.corrupt(format!(
                "L1 entry {index}: L2 table at {:#x} is not aligned to {}",
                table.host,
                self.g.cluster_size()
            )));
        }
        let bytes = self.l2.words() as u64 * 8;
        let in_table = guest % self.g.l1_reach() / self.slice_reach() * bytes;
        Ok(Some(table.host + in_table))
    }

    /// Brings the L2 slice of a guest offset into the cache, if it has a table.
    pub(super) async fn load_l2(&self, guest: u64) -> Result<()> {
        let (id, _) = self.slice_of(guest);
        let _alone = self.l2_loads.lock(ByteRange::new(id, 1)).await;
        loop {
            let Some(host) = self.l2_slice_host(guest)? else { return Ok(()) };
            if self.l2.get(id).is_some() {
                return Ok(());
            }
            let end = self.file().size().await?;
            if host >= end {
                return Err(self.corrupt(format!(
                    "the L2 table of the disk's bytes at {guest:#x} lies at {host:#x}, \
                     past the end of the file at {end:#x}"
                )));
            }
            let place = match self.l2.reserve(id) {
                Reserve::Present => return Ok(()),
                Reserve::Place(p) => p,
                Reserve::Full => {
                    self.flush_all().await?;
                    continue;
                }
            };
            let buf = Buf::new(self.l2.words() * 8);
            self.event(DebugEvent::L2Load).await;
            self.read_file(host, buf.clone()).await?;
            let entries = words(&buf);
            let suspect = {
                let r = self.refcounts();
                let good = |e| {
                    let c = Cluster::decode(e, self.g, self.version);
                    self.check_cluster(c, end, &r.meta)
                };
                !Entry::list(self.g, &entries).all(good)
            };
            place.fill(entries.into_iter(), suspect, false);
            return Ok(());
        }
    }

    /// Brings a slice of refcounts into the cache. Its block exists.
    pub(super) async fn load_refcounts(&self, id: u64) -> Result<()> {
        let _alone = self.refcount_loads.lock(ByteRange::new(id, 1)).await;
        let host = self.refcounts().slice_host(id).ok_or_else(|| {
            self.corrupt(format!("there is no refcount block for slice {id} of refcounts"))
        })?;
        let end = self.file().size().await?;
        if host >= end {
            return Err(self.corrupt(format!(
                "a refcount block lies at {host:#x}, past the end of the file at {end:#x}"
            )));
        }
        if self.refcount_slices.get(id).is_some() {
            return Ok(());
        }
        let buf = Buf::new(self.refcount_slices.words() * 8);
        self.event(DebugEvent::RefblockLoad).await;
        self.read_file(host, buf.clone()).await?;
        loop {
            // Places are given away only while nobody searches for clusters.
            let state = self.refcounts();
            if let Reserve::Place(p) = self.refcount_slices.reserve(id) {
                p.fill(words(&buf).into_iter(), false, false);
                return Ok(());
            }
            drop(state);
            self.write_refcounts().await?;
        }
    }
}

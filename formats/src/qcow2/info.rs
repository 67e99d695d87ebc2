//! What the image tells about itself and its ranges; options and sizes that change.

use std::sync::Arc;

use gipfel_base::sync::sync::atomic::Ordering;
use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_node::{DebugEvent, DriverInfo, Reopen, Status, WriteFlags, ZeroFlags};
use serde_json::{Value, json};

use super::flush::bytes;
use super::header::{CORRUPT, DIRTY, LAZY_REFCOUNTS};
use super::lookup::What;
use super::options::Options;
use super::{Flags, Qcow2};

/// Where the disk's size stands in the header; L1 table's size and offset follow 12 bytes later.
const SIZE_FIELD: u64 = 24;
const L1_FIELDS: u64 = 36;

impl Qcow2 {
    /// What is known of the first bytes of `range`.
    pub(super) async fn range_status(&self, range: ByteRange) -> Result<Status> {
        loop {
            let run = self.lookup(range, true);
            let zero = Status::hole(run.len);
            return Ok(match run.what {
                What::Uncached | What::Suspect => {
                    self.load_l2(range.start()).await?;
                    continue;
                }
                What::Data { host, .. } => Status::data(run.len, Some(host)),
                What::Zero => zero,
                What::Unallocated => Status::unallocated(run.len),
                What::Compressed { .. } => {
                    Status { compressed: true, ..Status::data(run.len, None) }
                }
                What::Bad { entry } => return Err(self.bad_entry(range.start(), entry)),
            });
        }
    }

    /// Facts for queries (ImageInfoSpecificQCow2 of the QMP reference).
    pub(super) fn facts(&self) -> DriverInfo {
        let h = self.header();
        let mut data = json!({
            "compat": if h.version >= 3 { "1.1" } else { "0.10" },
            "compression-type": h.compression.name(),
        });
        // In the order of the reference, whose text for people follows it.
        if h.version >= 3 {
            data["lazy-refcounts"] = json!(h.compatible & LAZY_REFCOUNTS != 0);
        }
        data["refcount-bits"] = json!(1u32 << h.geometry.refcount_order);
        if h.version >= 3 {
            data["corrupt"] = json!(h.incompatible & CORRUPT != 0);
            data["extended-l2"] = json!(false);
        }
        DriverInfo {
            filename: None,
            allocated: None,
            cluster_size: Some(self.g.cluster_size() as u32),
            backing: h.backing.clone().map(|b| (b, h.backing_format.clone())),
            dirty: Some(h.incompatible & DIRTY != 0),
            encrypted: false,
            specific: Some(json!({ "type": "qcow2", "data": data })),
        }
    }

    pub(super) fn prepare_reopen(&self, mut options: Value) -> Result<Box<dyn Reopen>> {
        struct Prepared {
            flags: Arc<Flags>,
            unmap: bool,
            pass: bool,
        }
        impl Reopen for Prepared {
            fn commit(self: Box<Self>) {
                self.flags.unmap.store(self.unmap, Ordering::Relaxed);
                self.flags.pass_discard.store(self.pass, Ordering::Relaxed);
            }
        }
        let discard = options.as_object_mut().and_then(|o| o.remove("discard"));
        let unmap = discard.is_some_and(|d| d == "unmap");
        let new = Options::parse(options)?;
        if !new.differs_in_discard_only(&self.options) {
            return Err(Error::unsupported(
                "of the options of format 'qcow2' only 'discard' and 'pass-discard-request' can \
                 be changed while the node is open",
            ));
        }
        let pass = new.pass_discard_request.unwrap_or(unmap);
        Ok(Box::new(Prepared { flags: self.flags.clone(), unmap, pass }))
    }

    /// Makes the disk `size` bytes long. What is new reads as zeros.
    pub(super) async fn grow_to(&self, size: u64) -> Result<()> {
        let old = self.size.load(Ordering::Acquire);
        if size < old {
            return Err(Error::unsupported(
                "making a qcow2 image smaller is not offered by this version of gipfel",
            ));
        }
        if !size.is_multiple_of(512) {
            return Err(Error::invalid(format!("size {size} is not a multiple of 512")));
        }
        self.g.check_size(size)?;
        if self.header().snapshots > 0 && self.version < 3 {
            return Err(Error::unsupported(
                "an image of version 2 with internal snapshots keeps its size",
            ));
        }
        let entries = self.g.l1_entries(size);
        if entries > self.l1.len() as u64 {
            self.move_l1(entries).await?;
        }
        let field = Buf::from_slice(&size.to_be_bytes());
        self.file().write(SIZE_FIELD, field, WriteFlags::default()).await?;
        self.file().flush().await?;
        self.header().size = size;
        self.size.store(size, Ordering::Release);
        // The backing image must not show through where the disk did not reach before.
        let covered = self.backing_size().await.min(size);
        if covered > old {
            let range = ByteRange::between(old, covered);
            if self.version >= 3 {
                self.zero_range(range, ZeroFlags::default()).await?;
            } else {
                self.write_zeros(range).await?;
            }
        }
        Ok(())
    }

    async fn write_zeros(&self, range: ByteRange) -> Result<()> {
        const PIECE: u64 = 1 << 20;
        let mut left = range;
        while !left.is_empty() {
            let part = left.take(PIECE);
            self.write_clusters(part.start(), Buf::zeroed(part.len() as usize)).await?;
            left = left.skip(PIECE);
        }
        Ok(())
    }

    /// Puts the L1 table into a place for `entries` entries.
    async fn move_l1(&self, entries: u64) -> Result<()> {
        self.event(DebugEvent::L1GrowAllocTable).await;
        let place = self.allocate(self.g.clusters(entries * 8), true).await?;
        // No entry changes while it is copied.
        let _alone = self.tables.lock(ByteRange::new(0, u64::MAX)).await;
        self.flush_all().await?;
        let table = self.l1.snapshot();
        let host = place.first << self.g.cluster_bits;
        let put = async {
            let buf = Buf::zeroed((place.count << self.g.cluster_bits) as usize);
            buf.copy_from_buf(0, &bytes(&table));
            self.event(DebugEvent::L1GrowWriteTable).await;
            self.file().write(host, buf, WriteFlags::default()).await?;
            self.file().flush().await?;
            let mut fields = (entries as u32).to_be_bytes().to_vec();
            fields.extend(host.to_be_bytes());
            self.event(DebugEvent::L1GrowActivateTable).await;
            self.file().write(L1_FIELDS, Buf::from_slice(&fields), WriteFlags::default()).await?;
            self.file().flush().await
        };
        if let Err(e) = put.await {
            self.unallocate(place).await?;
            return Err(e);
        }
        let (old, len) = {
            let mut h = self.header();
            let old = (h.l1_offset, u64::from(h.l1_size) * 8);
            (h.l1_offset, h.l1_size) = (host, entries as u32);
            old
        };
        self.refcounts().meta.extend(place.first..place.first + place.count);
        self.l1.grow(entries as usize);
        if len > 0 {
            self.let_go_bytes(old, len, false);
        }
        Ok(())
    }
}

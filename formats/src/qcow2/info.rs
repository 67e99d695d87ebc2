//! What the image tells about itself and its ranges; options that change.

use std::sync::Arc;

use gipfel_base::sync::sync::atomic::Ordering;
use gipfel_base::{ByteRange, Error, Result};
use gipfel_node::{DriverInfo, Reopen, Status};
use serde_json::{Value, json};

use super::header::{CORRUPT, DIRTY, LAZY_REFCOUNTS, RAW_DATA_FILE};
use super::lookup::What;
use super::options::Options;
use super::{Flags, Qcow2};

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
        if h.geometry.data_file {
            if let Some(name) = &h.data_file {
                data["data-file"] = json!(name);
            }
            data["data-file-raw"] = json!(h.autoclear & RAW_DATA_FILE != 0);
        }
        if h.version >= 3 {
            data["corrupt"] = json!(h.incompatible & CORRUPT != 0);
            data["extended-l2"] = json!(h.geometry.extended_l2);
        }
        DriverInfo {
            filename: None,
            allocated: None,
            cluster_size: Some(self.g.cluster_size() as u32),
            // It lies where the L1 entries past those of the disk point.
            vm_state: Some(self.g.l1_entries(h.size) * self.g.l1_reach()),
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
}

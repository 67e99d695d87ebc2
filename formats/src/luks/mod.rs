//! Format `luks`: a disk encrypted as the LUKS1 on-disk format 1.2.3 has it, over any child
//! (BlockdevOptionsLUKS of the QMP reference).
//!
//! [`header`] and [`unlock`] find the key, [`cipher`] is what is done to sectors, [`data`] is the
//! way of requests. The image's layout never changes while it is open, so that there is no
//! metadata to write: a flush is the child's. The header may stand in a child of its own
//! (detached). Version 2 of the format, and making and changing key slots, are not offered.

mod cipher;
mod data;
mod hash;
mod header;
mod open;
#[cfg(test)]
mod tests;
mod unlock;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::{Buf, RangeLock};
use gipfel_node::perm::child_perms;
use gipfel_node::{
    Binding, Child, ChildSpec, Driver, DriverDef, DriverInfo, IoFuture, Kind, Limits, OpenArgs,
    Opened, Perm, Perms, Reopen, Role, Secrets, Status, WriteFlags,
};
use serde_json::{Value, json};

use cipher::Sectors;
use data::Partial;
use header::{Header, SECTOR, STRIPES};
use open::Options;

/// The format `luks`. A process that has secrets opens it through [`open`].
pub static LUKS: DriverDef = DriverDef {
    name: "luks",
    kind: Kind::Format,
    children: &[
        ChildSpec { name: "file", role: Role::Image, binding: Binding::Position, required: true },
        ChildSpec {
            name: "header",
            role: Role::Image,
            binding: Binding::Position,
            required: false,
        },
    ],
    open: |_| {
        Box::pin(async {
            Err(Error::unsupported("driver 'luks' needs secrets: there are none here"))
        })
    },
    create: None,
    probe: Some(probe),
    check: None,
};

/// The place of [`LUKS`]'s child `header`.
const HEADER: usize = 1;

/// Opens a node with the passphrase that its option `key-secret` names among `secrets`.
///
/// # Errors
/// No such secret, a header that contradicts the specification or names what is not offered, and
/// a passphrase that opens no key slot.
pub fn open(args: OpenArgs, secrets: Arc<Secrets>) -> IoFuture<'static, Opened> {
    Box::pin(async move { open::open(args, &secrets).await })
}

fn probe(first: &[u8]) -> u8 {
    if first.starts_with(&header::MAGIC) && first.get(6..8) == Some(&[0, 1]) { 100 } else { 0 }
}

/// What of a header is told to those who ask (QCryptoBlockInfoLUKS of the QMP reference).
fn told(h: &Header, detached: bool) -> Value {
    let slot = |s: &header::Slot| {
        if s.active {
            json!({
                "active": true,
                "iters": s.iterations,
                "key-offset": s.material,
                "stripes": STRIPES,
            })
        } else {
            json!({ "active": false, "key-offset": s.material })
        }
    };
    let names = h.spec.names();
    // In the order of the reference, whose text for people follows it.
    let mut told = json!({ "ivgen-alg": names.iv });
    if let Some(hash) = names.iv_hash {
        told["ivgen-hash-alg"] = json!(hash);
    }
    told["detached-header"] = json!(detached);
    told["hash-alg"] = json!(h.hash.name());
    told["cipher-alg"] = json!(names.cipher);
    told["uuid"] = json!(h.uuid);
    told["cipher-mode"] = json!(names.mode);
    told["slots"] = h.slots.iter().map(slot).collect();
    told["payload-offset"] = json!(h.payload);
    told["master-key-iters"] = json!(h.digest_iterations);
    told
}

/// An open image.
struct Luks {
    /// `file`, `header`.
    children: [Arc<Child>; 2],
    options: Options,
    /// What of the header is told.
    told: Value,
    cipher: Box<dyn Sectors>,
    /// Where the data begin in `file`, in bytes.
    payload: u64,
    /// Size when it was last seen, for the moments in which the child is being changed.
    seen: AtomicU64,
    /// Discards are handed down.
    unmap: Arc<AtomicBool>,
    /// Sectors that are being written.
    writes: RangeLock,
    /// Writes of parts of sectors.
    partial: Partial,
}

impl Luks {
    fn file(&self) -> &Child {
        &self.children[0]
    }

    /// What the driver of `file` says, while the edge is not being changed.
    fn below<T>(&self, f: impl FnOnce(&dyn Driver) -> T) -> Option<T> {
        let entered = self.file().try_enter()?;
        entered.as_ref().map(|n| f(n.driver()))
    }

    async fn set_size(&self, size: u64) -> Result<()> {
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!("size {size} is not a multiple of {SECTOR}")));
        }
        let below = size.checked_add(self.payload).ok_or_else(|| {
            Error::invalid(format!("size {size} is too large: the image would pass 2^64 bytes"))
        })?;
        let node = self.file().node().await.ok_or_else(|| {
            Error::new(ErrorKind::NoMedium, format!("'{}' is empty", self.file().label()))
        })?;
        node.driver().resize(below).await
    }

    fn prepare_reopen(&self, mut options: Value) -> Result<Box<dyn Reopen>> {
        struct Prepared(Arc<AtomicBool>, bool);
        impl Reopen for Prepared {
            fn commit(self: Box<Self>) {
                self.0.store(self.1, Ordering::Relaxed);
            }
        }
        let discard = options.as_object_mut().and_then(|o| o.remove("discard"));
        if Options::parse(options)? != self.options {
            return Err(Error::unsupported(
                "of the options of format 'luks' only 'discard' can be changed while the node is \
                 open",
            ));
        }
        Ok(Box::new(Prepared(self.unmap.clone(), discard.is_some_and(|d| d == "unmap"))))
    }
}

impl Driver for Luks {
    fn size(&self) -> u64 {
        let now = self.below(|d| data::payload_size(self.payload, d.size()).unwrap_or(0));
        match now {
            Some(size) => {
                self.seen.store(size, Ordering::Relaxed);
                size
            }
            None => self.seen.load(Ordering::Relaxed),
        }
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(self.read_data(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(self.write_data(offset, buf, WriteFlags { fua: false, ..flags }))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            if self.unmap.load(Ordering::Relaxed) { self.discard_data(range).await } else { Ok(()) }
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.file().flush())
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        // What zeros below decrypt to is not zero, and no byte here is a byte there.
        Box::pin(async move { Ok(Status::data(range.len(), None)) })
    }

    fn limits(&self) -> Limits {
        let below = self.below(|d| d.limits().preferred).unwrap_or(4096);
        Limits { align: SECTOR as u32, preferred: below.max(SECTOR as u32) }
    }

    fn child_perms(&self, index: usize, role: Role, above: Perms, writable: bool) -> Perms {
        // The header is only read here.
        let used = Perms { used: above.used & Perm::CONSISTENT_READ, ..above };
        child_perms(role, if index == HEADER { used } else { above }, writable)
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        Box::pin(self.set_size(size))
    }

    fn reopen<'a>(&'a self, options: Value, _: bool) -> IoFuture<'a, Box<dyn Reopen>> {
        Box::pin(async move { self.prepare_reopen(options) })
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        let specific = Some(json!({ "type": "luks", "data": self.told }));
        Box::pin(async move {
            Ok(DriverInfo {
                encrypted: true,
                dirty: Some(false),
                specific,
                ..DriverInfo::default()
            })
        })
    }
}

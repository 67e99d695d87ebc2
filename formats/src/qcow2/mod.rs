//! Format `qcow2`, versions 2 and 3 (qcow2 spec; BlockdevOptionsQcow2 of the QMP reference).
//!
//! Requests for clusters that are there are only mapped ([`lookup`]): no lock, no wait, whatever
//! thread they come from. What needs work goes through [`read`], [`write`], [`compress`] and
//! [`zero`]. Tables are changed in memory and written by [`flush`] in the order that keeps the
//! image right at any moment: refcounts and data, then the refcount table, then the entries that
//! rely on them.
//!
//! Who may change what:
//! - an L2 entry: whoever holds its guest cluster in `guests`;
//! - an L1 entry: whoever holds its index in `tables`;
//! - refcounts: under the lock of `refcounts`, for an instant.

mod alloc;
mod amend;
pub mod cache;
pub mod check;
mod compress;
mod create;
pub mod entry;
mod flush;
pub mod geometry;
pub mod header;
mod info;
mod l1;
mod load;
mod lookup;
mod open;
mod options;
mod read;
mod refcounts;
mod resize;
#[cfg(test)]
mod tests;
mod write;
mod zero;

use std::sync::Arc;

use gipfel_base::sync::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use gipfel_base::sync::sync::{Mutex, MutexGuard, PoisonError};
use gipfel_base::{ByteRange, Error};
use gipfel_io::{Buf, Epoch, RangeLock};
use gipfel_node::{
    Ability, Access, BackingName, Binding, Child, ChildSpec, DebugEvent, Driver, DriverDef,
    DriverInfo, ImageFormat, IoFuture, Kind, Limits, Mapping, Perms, Preallocation, Reopen, Role,
    Status, WriteFlags, ZeroFlags,
};
use serde_json::Value;

pub use create::measure;

use cache::TableCache;
use geometry::Geometry;
use header::Header;
use l1::L1;
use options::Options;
use refcounts::Refcounts;

/// The format `qcow2`.
pub static QCOW2: DriverDef = DriverDef {
    name: "qcow2",
    kind: Kind::Format,
    children: &[
        ChildSpec { name: "file", role: Role::Image, binding: Binding::Position, required: true },
        ChildSpec {
            name: "backing",
            role: Role::Backing,
            binding: Binding::Content,
            required: false,
        },
        ChildSpec {
            name: "data-file",
            role: Role::Data,
            binding: Binding::Position,
            required: false,
        },
    ],
    open: |args| Box::pin(open::open(args)),
    create: Some(|args| Box::pin(create::create(args))),
    probe: Some(probe),
    check: Some(|args| Box::pin(check::check(args))),
};

fn probe(first: &[u8]) -> u8 {
    if first.starts_with(&header::MAGIC) && first.get(4..8).is_some_and(|v| v < &[0, 0, 0, 4]) {
        100
    } else {
        0
    }
}

/// What can change with a reopen.
struct Flags {
    /// Discards give space back.
    unmap: AtomicBool,
    /// They are also handed down.
    pass_discard: AtomicBool,
}

/// An open image.
struct Qcow2 {
    name: String,
    /// `file`, `backing`, `data-file`.
    children: [Arc<Child>; 3],
    g: Geometry,
    version: u32,
    size: AtomicU64,
    /// The file that data lie in reaches at least this far, in bytes. Entries may refer to more:
    /// that reads as zeros.
    data_end: AtomicU64,
    options: Options,
    /// As it is on disk.
    header: Mutex<Header>,
    flags: Arc<Flags>,
    /// Why the image must not be written, if it must not.
    damage: Mutex<Option<String>>,
    /// What is done once before the first write has been done.
    activated: AtomicBool,
    /// Held while that is done.
    activation: async_lock::Mutex<()>,
    l1: L1,
    l2: TableCache,
    refcounts: Mutex<Refcounts>,
    /// Slices of refcounts; places in it are reserved under the lock of `refcounts` only.
    refcount_slices: TableCache,
    /// Requests in flight to host clusters that they looked up.
    epoch: Epoch,
    /// Guest bytes whose L2 entries are being changed.
    guests: RangeLock,
    /// L1 entries that are being changed.
    tables: RangeLock,
    /// L2 slices that are being read.
    l2_loads: RangeLock,
    /// Refcount slices that are being read or made.
    refcount_loads: RangeLock,
    /// Held while room for compressed data is taken.
    packing: async_lock::Mutex<()>,
    flushing: flush::Flushing,
    /// Somebody below listened to the last event.
    watched: AtomicBool,
}

impl Qcow2 {
    fn file(&self) -> &Child {
        &self.children[0]
    }

    /// Tells the file that this happens: see [`gipfel_node::debug`].
    async fn event(&self, event: DebugEvent) {
        let heard = self.file().event(event).await;
        self.watched.store(heard, Ordering::Relaxed);
    }

    fn backing(&self) -> &Child {
        &self.children[1]
    }

    /// Where data lie.
    fn data(&self) -> &Child {
        &self.children[if self.g.data_file { 2 } else { 0 }]
    }

    /// Whether the data file is to be a raw image by itself (spec, Raw external data bit).
    fn is_raw(&self) -> bool {
        self.g.data_file && self.header().autoclear & header::RAW_DATA_FILE != 0
    }

    fn refcounts(&self) -> MutexGuard<'_, Refcounts> {
        self.refcounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn header(&self) -> MutexGuard<'_, Header> {
        self.header.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unmaps(&self) -> bool {
        self.flags.unmap.load(Ordering::Relaxed)
    }

    /// Entries in one L2 slice.
    fn slice_entries(&self) -> usize {
        self.l2.words() / self.g.entry_words()
    }

    /// Bytes of the disk that one L2 slice stands for.
    fn slice_reach(&self) -> u64 {
        (self.slice_entries() as u64) << self.g.cluster_bits
    }

    fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        Error::corrupt(format!("{what}; run 'gipfel img check -r all' on the image"))
            .context(format!("qcow2 node '{}'", self.name))
    }
}

impl Driver for Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn map(&self, access: Access, range: ByteRange) -> Mapping<'_> {
        match access {
            Access::Read => self.map_read(range),
            Access::Write => self.map_write(range),
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(self.read_clusters(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        match flags.compressed {
            true => Box::pin(self.write_compressed(offset, buf)),
            false => Box::pin(self.write_clusters(offset, buf)),
        }
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(self.zero_range(range, flags))
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        Box::pin(self.discard_range(range))
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.flush_all())
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(self.range_status(range))
    }

    fn reads_zero_when_new(&self) -> bool {
        // With a backing image the range of a larger disk would show it.
        self.backing().try_enter().is_some_and(|b| b.is_none())
    }

    fn zero_ability(&self) -> Ability {
        if self.version >= 3 { Ability::Native } else { Ability::Emulated }
    }

    fn compresses(&self) -> Option<u32> {
        // Spec, External Data File Name: there are no compressed clusters with one.
        (!self.g.data_file).then(|| self.g.cluster_size() as u32)
    }

    fn limits(&self) -> Limits {
        Limits { align: 1, preferred: self.g.cluster_size() as u32 }
    }

    fn set_perms<'a>(&'a self, perms: Perms) -> IoFuture<'a> {
        Box::pin(async move { if perms.writes() { self.activate().await } else { Ok(()) } })
    }

    fn image_format(&self) -> Option<&dyn ImageFormat> {
        Some(self)
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        Box::pin(self.resize_to(size))
    }

    fn reopen<'a>(&'a self, options: Value, _: bool) -> IoFuture<'a, Box<dyn Reopen>> {
        Box::pin(async move { self.prepare_reopen(options) })
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        Box::pin(async move { Ok(self.facts()) })
    }

    fn close<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.close_image())
    }
}

impl ImageFormat for Qcow2 {
    fn set_backing<'a>(&'a self, backing: Option<BackingName>) -> IoFuture<'a> {
        Box::pin(self.change_backing(backing))
    }

    fn make_empty<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.empty())
    }

    fn preallocate<'a>(&'a self, range: ByteRange, how: Preallocation) -> IoFuture<'a> {
        Box::pin(Qcow2::preallocate(self, range, how))
    }

    fn amend<'a>(&'a self, options: Value, progress: &'a dyn Fn(u64, u64)) -> IoFuture<'a> {
        Box::pin(self.change_options(options, progress))
    }
}

//! What all filters have in common: a filter says what it changes, everything else is its child's.

use std::sync::Arc;

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_node::perm::child_perms;
use gipfel_node::{
    Ability, Access, Binding, Child, ChildSpec, DebugEvent, Debugger, Driver, DriverInfo, IoFuture,
    Limits, Mapping, Perms, Reopen, Role, SnapshotSource, Status, WriteFlags, ZeroFlags,
};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The one child of most filters.
pub(crate) const FILE: &[ChildSpec] =
    &[ChildSpec { name: "file", role: Role::Filtered, binding: Binding::Position, required: true }];

/// The options of `driver`, as it declares them.
pub(crate) fn parse<T: DeserializeOwned>(driver: &str, options: Value) -> Result<T> {
    serde_json::from_value(options)
        .map_err(|e| Error::invalid(format!("options of driver '{driver}': {e}")))
}

/// Fails where `options` has any: `driver` takes none of its own.
pub(crate) fn no_options(driver: &str, options: &Value) -> Result<()> {
    match options.as_object().and_then(|o| o.keys().next()) {
        None => Ok(()),
        Some(k) => Err(Error::invalid(format!("driver '{driver}' has no option '{k}'"))),
    }
}

/// The bytes that a request for `buf` at `offset` is about.
pub(crate) fn span(offset: u64, buf: &Buf) -> Result<ByteRange> {
    ByteRange::checked(offset, buf.len() as u64)
        .ok_or_else(|| Error::invalid("a request ends past 2^64 bytes"))
}

/// What a filter stands on.
pub(crate) struct Below {
    /// The filtered child first.
    children: Vec<Arc<Child>>,
}

impl Below {
    fn new(children: Vec<Arc<Child>>) -> Below {
        Below { children }
    }

    /// The edge to the filtered child.
    pub(crate) fn child(&self) -> &Child {
        &self.children[0]
    }

    /// The edge to the other child of a filter that has two.
    pub(crate) fn other(&self) -> &Child {
        &self.children[1]
    }

    /// Flushes the filtered child.
    pub(crate) async fn flush(&self) -> Result<()> {
        self.child().event(DebugEvent::FlushToOs).await;
        self.child().event(DebugEvent::FlushToDisk).await;
        self.child().flush().await
    }

    /// Changes the size of the node below `child`, in bytes.
    pub(crate) async fn resize(&self, child: &Child, size: u64) -> Result<()> {
        let node = child.node().await.ok_or_else(|| {
            Error::new(ErrorKind::NoMedium, format!("'{}' is empty", child.label()))
        })?;
        node.driver().resize(size).await
    }

    /// The mapping of a range that the filter has nothing to do with.
    pub(crate) fn straight(&self, range: ByteRange) -> Mapping<'_> {
        Mapping::Child { child: self.child(), offset: range.start(), len: range.len(), pin: None }
    }

    /// What the child's driver says, while the edge is not being changed.
    pub(crate) fn ask<T>(&self, f: impl FnOnce(&dyn Driver) -> T) -> Option<T> {
        let entered = self.child().try_enter()?;
        entered.as_ref().map(|n| f(n.driver()))
    }

    /// Visible size in bytes; 0 without a child.
    pub(crate) fn size(&self) -> u64 {
        self.child().size_now()
    }
}

/// What a filter changes. Requests come as the runner hands them to a driver.
pub(crate) trait Filter: Send + Sync + 'static {
    /// As [`Driver::map`].
    fn map<'a>(&'a self, below: &'a Below, access: Access, range: ByteRange) -> Mapping<'a> {
        let _ = access;
        below.straight(range)
    }

    /// As [`Driver::read`].
    fn read<'a>(&'a self, below: &'a Below, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(below.child().read(offset, buf))
    }

    /// As [`Driver::write`]; the runner sees to FUA.
    fn write<'a>(
        &'a self,
        below: &'a Below,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        Box::pin(below.child().write(offset, buf, flags))
    }

    /// As [`Driver::write_zeroes`].
    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(below.child().write_zeroes(range, flags))
    }

    /// As [`Driver::discard`].
    fn discard<'a>(&'a self, below: &'a Below, range: ByteRange) -> IoFuture<'a> {
        Box::pin(below.child().discard(range))
    }

    /// As [`Driver::flush`].
    fn flush<'a>(&'a self, below: &'a Below) -> IoFuture<'a> {
        Box::pin(below.flush())
    }

    /// As [`Driver::status`].
    fn status<'a>(&'a self, below: &'a Below, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(below.child().status(range))
    }

    /// As [`Driver::size`].
    fn size(&self, below: &Below) -> u64 {
        below.size()
    }

    /// As [`Driver::limits`], with what the child prefers.
    fn limits(&self, below: Limits) -> Limits {
        below
    }

    /// As [`Driver::resize`].
    fn resize<'a>(&'a self, below: &'a Below, size: u64) -> IoFuture<'a> {
        Box::pin(below.resize(below.child(), size))
    }

    /// As [`Driver::child_perms`], for the filtered child.
    fn child_perms(&self, above: Perms, writable: bool) -> Perms {
        let _ = writable;
        above
    }

    /// As [`Driver::child_perms`], for the other child of a filter that has two.
    fn other_perms(&self, role: Role, above: Perms, writable: bool) -> Perms {
        child_perms(role, above, writable)
    }

    /// As [`Driver::set_perms`].
    fn set_perms<'a>(&'a self, below: &'a Below, perms: Perms) -> IoFuture<'a> {
        let _ = (below, perms);
        Box::pin(async { Ok(()) })
    }

    /// As [`Driver::debugger`].
    fn debugger(&self) -> Option<&dyn Debugger> {
        None
    }

    /// As [`Driver::expedite`].
    fn expedite(&self, on: bool) {
        let _ = on;
    }

    /// As [`Driver::snapshot_source`].
    fn snapshot_source(&self) -> Option<&dyn SnapshotSource> {
        None
    }

    /// Fails where options of a reopen are not those in force; without options of its own a filter
    /// has nothing to compare.
    fn same_options(&self, options: Value) -> Result<()> {
        let _ = options;
        Ok(())
    }

    /// As [`Driver::reopen`], without the common options.
    fn reopen(&self, options: Value) -> Result<Box<dyn Reopen>> {
        self.same_options(options)?;
        Ok(Box::new(Same))
    }

    /// As [`Driver::close`]: the node goes, no request follows.
    fn close<'a>(&'a self, below: &'a Below) -> IoFuture<'a> {
        // Most filters hold nothing back in memory.
        let _ = below;
        Box::pin(async { Ok(()) })
    }
}

/// A filter as a driver.
pub(crate) struct Filtered<F> {
    below: Below,
    filter: F,
}

impl<F: Filter> Filtered<F> {
    /// An implicit filter over `child`, which may be empty.
    pub(crate) fn implicit(child: Arc<Child>, filter: F) -> Box<dyn Driver> {
        Box::new(Filtered { below: Below::new(vec![child]), filter })
    }

    /// A filter over the children that it was opened with, the filtered one first.
    pub(crate) async fn open(children: Vec<Arc<Child>>, filter: F) -> Result<Box<dyn Driver>> {
        let filtered = children.first().ok_or_else(|| Error::invalid("a filter has a child"))?;
        filtered.size().await?;
        Ok(Box::new(Filtered { below: Below::new(children), filter }))
    }
}

/// A reopen that changes nothing.
struct Same;

impl Reopen for Same {
    fn commit(self: Box<Self>) {}
}

impl<F: Filter> Driver for Filtered<F> {
    fn size(&self) -> u64 {
        self.filter.size(&self.below)
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.below.children
    }

    fn map(&self, access: Access, range: ByteRange) -> Mapping<'_> {
        self.filter.map(&self.below, access, range)
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        self.filter.read(&self.below, offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        self.filter.write(&self.below, offset, buf, WriteFlags { fua: false, ..flags })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        self.filter.write_zeroes(&self.below, range, ZeroFlags { fua: false, ..flags })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        self.filter.discard(&self.below, range)
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        self.filter.flush(&self.below)
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        self.filter.status(&self.below, range)
    }

    fn grows(&self) -> bool {
        self.below.ask(|d| d.grows()).unwrap_or(false)
    }

    fn reads_zero_when_new(&self) -> bool {
        self.below.ask(|d| d.reads_zero_when_new()).unwrap_or(false)
    }

    fn zero_ability(&self) -> Ability {
        self.below.ask(|d| d.zero_ability()).unwrap_or(Ability::Emulated)
    }

    fn compresses(&self) -> Option<u32> {
        self.below.ask(|d| d.compresses()).flatten()
    }

    fn limits(&self) -> Limits {
        let below = self.below.ask(|d| d.limits());
        self.filter.limits(below.unwrap_or(Limits { align: 1, preferred: 4096 }))
    }

    fn child_perms(&self, index: usize, role: Role, above: Perms, writable: bool) -> Perms {
        match index {
            0 => self.filter.child_perms(above, writable),
            _ => self.filter.other_perms(role, above, writable),
        }
    }

    fn set_perms<'a>(&'a self, perms: Perms) -> IoFuture<'a> {
        self.filter.set_perms(&self.below, perms)
    }

    fn debugger(&self) -> Option<&dyn Debugger> {
        self.filter.debugger()
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        self.filter.resize(&self.below, size)
    }

    fn reopen<'a>(&'a self, mut options: Value, _: bool) -> IoFuture<'a, Box<dyn Reopen>> {
        Box::pin(async move {
            if let Some(o) = options.as_object_mut() {
                // The common option: what discards do is decided below.
                o.remove("discard");
            }
            self.filter.reopen(options)
        })
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        Box::pin(async move {
            let Some(node) = self.below.child().node().await else {
                return Ok(DriverInfo::default());
            };
            let below = node.driver().info().await?;
            // The rest is said of the image, which is the child's.
            Ok(DriverInfo {
                filename: below.filename,
                allocated: below.allocated,
                cluster_size: below.cluster_size,
                ..DriverInfo::default()
            })
        })
    }

    fn expedite(&self, on: bool) {
        self.filter.expedite(on);
    }

    fn snapshot_source(&self) -> Option<&dyn SnapshotSource> {
        self.filter.snapshot_source()
    }

    fn close<'a>(&'a self) -> IoFuture<'a> {
        self.filter.close(&self.below)
    }
}

//! Driver snapshot-access: a node that shows the moment kept by the copy-before-write below it.
//!
//! It is read-only but for discards, by which a reader lets go of what it has read: whole granules
//! of a discard are neither kept nor copied any more, and reading them fails.
//!
//! The moment does not change whatever happens to the disk, so that others may write to the filter
//! while it is read here.
//!
//! Source: BlockdevOptions, driver `snapshot-access`, of the QMP reference.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_node::{
    Binding, Child, ChildSpec, Discard, Driver, DriverDef, IoFuture, Kind, Node, OpenArgs, Opened,
    Perm, Perms, Role, SnapshotSource, Status, WriteFlags,
};

use crate::filter::no_options;

/// The driver snapshot-access. It is no filter: its data are not those of its child.
pub static SNAPSHOT_ACCESS: DriverDef = DriverDef {
    name: "snapshot-access",
    kind: Kind::Format,
    children: &[ChildSpec {
        name: "file",
        role: Role::Data,
        binding: Binding::Content,
        required: true,
    }],
    open: |args| Box::pin(open(args)),
    create: None,
    probe: None,
    check: None,
};

async fn open(args: OpenArgs) -> Result<Opened> {
    let [file] = <[Arc<Child>; 1]>::try_from(args.children)
        .map_err(|_| Error::invalid("snapshot-access has the child 'file'"))?;
    no_options(SNAPSHOT_ACCESS.name, &args.options)?;
    let size = {
        let entered = file.enter().await;
        source(&file, entered.as_ref())?.size()
    };
    let unmap = args.common.discard == Discard::Unmap;
    let driver = Box::new(SnapshotAccess { children: [file], size, unmap });
    Ok(Opened { driver, implicit: Vec::new() })
}

struct SnapshotAccess {
    children: [Arc<Child>; 1],
    size: u64,
    /// Whether discards are heeded (the common option `discard`).
    unmap: bool,
}

impl SnapshotAccess {
    fn edge(&self) -> &Child {
        &self.children[0]
    }

    /// The moment that `node`, where the edge leads, keeps; it must reach up to `end`.
    fn source<'a>(&self, node: Option<&'a Arc<Node>>, end: u64) -> Result<&'a dyn SnapshotSource> {
        let source = source(self.edge(), node)?;
        if source.size() < end {
            return Err(Error::invalid(format!(
                "the snapshot that '{}' leads to now ends at {:#x}",
                self.edge().label(),
                source.size()
            )));
        }
        Ok(source)
    }
}

/// The moment that the node at the end of `edge` keeps.
fn source<'a>(edge: &Child, node: Option<&'a Arc<Node>>) -> Result<&'a dyn SnapshotSource> {
    let node = node.ok_or_else(|| {
        let text = format!("'{}' has no node (no medium)", edge.label());
        Error::new(ErrorKind::NoMedium, text)
    })?;
    node.driver().snapshot_source().ok_or_else(|| {
        Error::invalid(format!(
            "'{}' leads to node '{}' (driver '{}'), which keeps no snapshot: it must lead to a \
             copy-before-write node",
            edge.label(),
            node.name(),
            node.def().name
        ))
    })
}

impl Driver for SnapshotAccess {
    fn size(&self) -> u64 {
        self.size
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            let entered = self.edge().enter().await;
            let end = offset + buf.len() as u64;
            self.source(entered.as_ref(), end)?.read(offset, buf).await
        })
    }

    fn write<'a>(&'a self, _: u64, _: Buf, _: WriteFlags) -> IoFuture<'a> {
        Box::pin(async {
            Err(Error::unsupported("a snapshot cannot be written to, only read and discarded"))
        })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            if !self.unmap {
                return Ok(());
            }
            let entered = self.edge().enter().await;
            self.source(entered.as_ref(), range.end())?.discard(range).await
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move {
            let entered = self.edge().enter().await;
            self.source(entered.as_ref(), range.end())?.status(range).await
        })
    }

    fn child_perms(&self, _: usize, _: Role, above: Perms, _: bool) -> Perms {
        if above.used.is_empty() {
            return Perms::IDLE;
        }
        // What others do to the disk does not show here, and nothing here shows on the disk.
        Perms { used: Perm::CONSISTENT_READ, shared: Perm::ALL }
    }
}

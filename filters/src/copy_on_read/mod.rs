//! Filter copy-on-read: what is read from a backing file is kept in the image above it.
//!
//! Reads of what the child holds itself go straight through. The rest is read in whole clusters
//! and written back below with the flag *unchanged*. The guest must never see its own write undone
//! by such a copy, so that
//!
//! - a copy holds its range, from before it reads until it has written, against every write,
//!   zeroing and discard that passes this filter, which hold theirs;
//! - nobody may write to the child past this filter while it may copy: its edge shares no write
//!   permission;
//! - a copy reads and writes one and the same node: it stays inside the edge in between, so that
//!   no other medium gets there.
//!
//! It rests, and costs nothing, while it has no permission to write unchanged data below: over a
//! medium that is read-only. A copy that fails is given up; the read is what counts.
//!
//! The option `bottom` names the lowest layer that is copied from (BlockdevOptionsCor of the QMP
//! reference). If a change of the graph takes it out of the chain, nothing is copied any more.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::{Buf, RangeLock};
use gipfel_node::{
    Access, Child, DebugEvent, Driver, DriverDef, IoFuture, Kind, Mapping, Node, OpenArgs, Opened,
    Perm, Perms, Role, WriteFlags, ZeroFlags,
};
use serde::Deserialize;
use serde_json::Value;

use crate::filter::{Below, FILE, Filter, Filtered, parse, span};

/// The filter copy-on-read.
pub static COPY_ON_READ: DriverDef = DriverDef {
    name: "copy-on-read",
    kind: Kind::Filter,
    children: FILE,
    open: |args| Box::pin(open(args)),
    create: None,
    probe: None,
    check: None,
};

/// Bytes that are copied at once: a longer read goes piece by piece.
const PIECE: u64 = 1 << 20;
/// Largest cluster that a copy is widened to, in bytes.
const MAX_CLUSTER: u64 = 2 << 20;

/// The implicit filter over `child`.
pub fn make(child: Arc<Child>) -> Box<dyn Driver> {
    Filtered::implicit(child, CopyOnRead::default())
}

#[derive(Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    bottom: Option<String>,
}

async fn open(args: OpenArgs) -> Result<Opened> {
    let options: Options = parse(COPY_ON_READ.name, args.options)?;
    if let (Some(bottom), Some(file)) = (&options.bottom, args.children.first())
        && depth_of(file, bottom).await.is_none()
    {
        return Err(Error::invalid(format!(
            "bottom: '{bottom}' is no image in the backing chain of '{}' (filters do not count)",
            file.label()
        )));
    }
    let filter = CopyOnRead { options, ..CopyOnRead::default() };
    let driver = Filtered::open(args.children, filter).await?;
    Ok(Opened { driver, implicit: Vec::new() })
}

/// How many images stand above the image `name` in the chain below `edge`, if it is in there.
async fn depth_of(edge: &Child, name: &str) -> Option<u32> {
    let child = |node: &Node, role| {
        let i = node.def().children.iter().position(|c| c.role == role)?;
        node.driver().children().get(i).cloned()
    };
    let mut at = edge.node().await?;
    let mut depth = 0;
    loop {
        let below = match child(&at, Role::Filtered) {
            Some(below) => below,
            None if at.name() == name => return Some(depth),
            None => {
                depth += 1;
                child(&at, Role::Backing)?
            }
        };
        at = below.node().await?;
    }
}

#[derive(Default)]
struct CopyOnRead {
    options: Options,
    /// Ranges that are being copied or written.
    held: RangeLock,
}

impl CopyOnRead {
    /// Reads the part of a request that lies in `piece`, and keeps what comes from below.
    async fn read_piece(
        &self,
        below: &Below,
        piece: ByteRange,
        offset: u64,
        buf: &Buf,
    ) -> Result<()> {
        let _held = self.held.lock(piece).await;
        let entered = below.child().enter().await;
        let Some(node) = entered.as_ref() else {
            return Err(no_medium(below));
        };
        // Reads and writes cross an edge of their own: entering the filter's edge once more would
        // wait for its drain, which waits for this piece.
        let edge = Child::new(below.child().label(), Some(node.clone()));
        let wanted = span(offset, buf)?;
        let deepest = match &self.options.bottom {
            // Nothing comes from above the topmost image.
            Some(bottom) => depth_of(&edge, bottom).await.unwrap_or(0),
            None => u32::MAX,
        };
        let mut left = piece;
        while !left.is_empty() {
            let (part, from_below) = match edge.status_through(left).await {
                Ok((s, depth)) => (left.take(s.len), (1..=deepest).contains(&depth) && s.allocated),
                // Not to know is no reason not to read.
                Err(_) => (left, false),
            };
            left = left.skip(part.len());
            if from_below && below.child().granted().contains(Perm::WRITE_UNCHANGED) {
                keep(&edge, part, wanted, buf).await?;
            } else if let Some(r) = part.intersect(wanted) {
                edge.read(r.start(), window(buf, wanted, r)).await?;
            }
        }
        Ok(())
    }
}

fn no_medium(below: &Below) -> Error {
    let text = format!("'{}' has no node (no medium)", below.child().label());
    Error::new(gipfel_base::ErrorKind::NoMedium, text)
}

/// The window of the request's buffer in which `part` lies.
fn window(buf: &Buf, wanted: ByteRange, part: ByteRange) -> Buf {
    let at = (part.start() - wanted.start()) as usize;
    buf.slice(at..at + part.len() as usize)
}

/// Reads `part`, gives the request what it wants of it, and writes it to the node that was read.
async fn keep(edge: &Child, part: ByteRange, wanted: ByteRange, buf: &Buf) -> Result<()> {
    let copy = Buf::new(part.len() as usize);
    let asked = part.intersect(wanted);
    if let Err(e) = edge.read(part.start(), copy.clone()).await {
        // What fails may lie beside what the request asks for.
        return match asked {
            Some(r) if r != part => edge.read(r.start(), window(buf, wanted, r)).await,
            Some(_) => Err(e),
            None => Ok(()),
        };
    }
    if let Some(r) = asked {
        let at = (r.start() - part.start()) as usize;
        window(buf, wanted, r).copy_from_buf(0, &copy.slice(at..at + r.len() as usize));
    }
    edge.event(DebugEvent::CorWrite).await;
    // Nothing is lost if this fails: it is read from below again next time.
    let _ = if copy.is_zero() {
        let flags = ZeroFlags { unchanged: true, ..ZeroFlags::default() };
        edge.write_zeroes(part, flags).await
    } else {
        let flags = WriteFlags { unchanged: true, ..WriteFlags::default() };
        edge.write(part.start(), copy, flags).await
    };
    Ok(())
}

/// For how many of the first bytes of `range` a node is known, without waiting, to hold the bytes
/// itself; 0 if it must be asked.
fn own_bytes(node: &Node, range: ByteRange) -> u64 {
    let role = |i: usize| node.def().children[i].role;
    let children = node.driver().children();
    // A filter holds what its child holds. It is not asked for a mapping: a copy-on-read would ask
    // all that lies below it, and of several, each would do so twice.
    if let Some(i) = (0..children.len()).find(|i| role(*i) == Role::Filtered) {
        let entered = children[i].try_enter();
        return entered.as_ref().and_then(|e| e.as_ref()).map_or(0, |n| own_bytes(n, range));
    }
    if range.end() > node.size() {
        return 0;
    }
    match node.driver().map(Access::Read, range) {
        Mapping::File { len, .. } | Mapping::Zero { len } => len,
        Mapping::Work { .. } => 0,
        Mapping::Child { child, len, .. } => {
            match children.iter().position(|c| std::ptr::eq(&**c, child)).map(role) {
                Some(Role::Image | Role::Data) => len,
                _ => 0,
            }
        }
    }
}

impl Filter for CopyOnRead {
    fn map<'a>(&'a self, below: &'a Below, access: Access, range: ByteRange) -> Mapping<'a> {
        let work = Mapping::Work { len: range.len() };
        if access == Access::Write {
            return work;
        }
        if !below.child().granted().contains(Perm::WRITE_UNCHANGED) {
            return below.straight(range);
        }
        let entered = below.child().try_enter();
        match entered.as_ref().and_then(|e| e.as_ref()).map_or(0, |n| own_bytes(n, range)) {
            0 => work,
            len => below.straight(range.take(len)),
        }
    }

    fn read<'a>(&'a self, below: &'a Below, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            let wanted = span(offset, &buf)?;
            let cluster = cluster_size(below).await;
            // In whole clusters: a partial one would be filled up from below when it is written.
            let around = wanted.widen(cluster).unwrap_or(wanted);
            let end = around.end().min(below.size()).max(wanted.end());
            let mut left = ByteRange::between(around.start(), end);
            while !left.is_empty() {
                let piece = left.take(PIECE.max(cluster));
                self.read_piece(below, piece, offset, &buf).await?;
                left = left.skip(piece.len());
            }
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        below: &'a Below,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            let _held = self.held.lock(span(offset, &buf)?).await;
            below.child().write(offset, buf, flags).await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            let _held = self.held.lock(range).await;
            below.child().write_zeroes(range, flags).await
        })
    }

    fn discard<'a>(&'a self, below: &'a Below, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            let _held = self.held.lock(range).await;
            below.child().discard(range).await
        })
    }

    fn child_perms(&self, above: Perms, writable: bool) -> Perms {
        // Without a reader above there is nothing to copy for.
        if !writable || !above.used.contains(Perm::CONSISTENT_READ) {
            return above;
        }
        Perms { used: above.used | Perm::WRITE_UNCHANGED, shared: above.shared & !Perm::WRITE }
    }

    fn same_options(&self, options: Value) -> Result<()> {
        if parse::<Options>(COPY_ON_READ.name, options)? == self.options {
            return Ok(());
        }
        Err(Error::unsupported(
            "option 'bottom' of driver 'copy-on-read' cannot be changed while the node is open",
        ))
    }
}

/// The unit in which the child allocates, in bytes: a power of two.
async fn cluster_size(below: &Below) -> u64 {
    let Some(node) = below.child().node().await else { return 1 };
    let told = node.driver().info().await.ok().and_then(|i| i.cluster_size);
    let size = told.unwrap_or_else(|| node.driver().limits().preferred);
    u64::from(size).clamp(1, MAX_CLUSTER).next_power_of_two()
}

//! The runner: the one way down for reads and writes.
//!
//! Each level asks the driver where the bytes lie and follows. The first levels are written out
//! as functions of their own, so that the future of a plain request has a fixed size and nothing
//! is allocated; deeper graphs and split requests continue in a boxed future.
//!
//! A function gets the node whose mapping led to it: a debugger below hears of that (see
//! [`crate::debug`]).

use std::sync::Arc;

use gipfel_base::limits::MAX_CHAIN_DEPTH;
use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;

use crate::child::Child;
use crate::debug::{self, DebugEvent};
use crate::driver::{Access, IoFuture, Mapping, WriteFlags, ZeroFlags};
use crate::node::Node;
use crate::perm::Role;
use crate::status::Status;

/// Pieces of one split request that are in flight at once.
const PIECES: usize = 16;
/// Zeros are written in buffers of this size where nothing better is there, in bytes.
const ZERO_BUFFER: u64 = 1 << 20;

macro_rules! level {
    ($read:ident -> $next_read:ident, $write:ident -> $next_write:ident) => {
        async fn $read(child: &Child, offset: u64, buf: Buf, above: Option<&Node>) -> Result<()> {
            let entered = child.enter().await;
            let node = child.need(&entered)?;
            let range = node.check(offset, buf.len() as u64, false)?;
            if range.is_empty() {
                return Ok(());
            }
            match node.driver().map(Access::Read, range) {
                m if m.len() < range.len() => {
                    drop(m);
                    split_read(node, range, buf).await
                }
                Mapping::File { file, offset, pin, .. } => {
                    let r = file.read_at(offset, buf).await.map_err(|e| in_node(node, e));
                    drop(pin);
                    r
                }
                Mapping::Child { child, offset, pin, .. } => {
                    let r = $next_read(child, offset, buf, Some(node)).await;
                    drop(pin);
                    r
                }
                Mapping::Zero { .. } => {
                    buf.fill(0);
                    Ok(())
                }
                Mapping::Work { .. } => {
                    if let Some(held) = debug::mapped(above, child, node, DebugEvent::ReadAio) {
                        held.await;
                    }
                    node.driver().read(offset, buf).await
                }
            }
        }

        async fn $write(
            child: &Child,
            offset: u64,
            buf: Buf,
            flags: WriteFlags,
            above: Option<&Node>,
        ) -> Result<()> {
            let entered = child.enter().await;
            let node = child.need(&entered)?;
            let range = node.check(offset, buf.len() as u64, true)?;
            if range.is_empty() {
                return Ok(());
            }
            match map_write(node, range, flags)? {
                m if m.len() < range.len() => {
                    drop(m);
                    split_write(node, range, buf, flags).await
                }
                Mapping::File { file, offset, pin, .. } => {
                    let r = file.write_at(offset, buf).await.map_err(|e| in_node(node, e));
                    drop(pin);
                    r
                }
                Mapping::Child { child, offset, pin, .. } => {
                    let r = $next_write(child, offset, buf, flags, Some(node)).await;
                    drop(pin);
                    r
                }
                Mapping::Zero { .. } | Mapping::Work { .. } => {
                    if let Some(held) = debug::mapped(above, child, node, DebugEvent::WriteAio) {
                        held.await;
                    }
                    node.driver().write(offset, buf, flags).await
                }
            }
        }
    };
}

level!(read_0 -> read_1, write_0 -> write_1);
level!(read_1 -> read_2, write_1 -> write_2);
level!(read_2 -> read_3, write_2 -> write_3);
level!(read_3 -> read_boxed, write_3 -> write_boxed);

fn read_boxed<'a>(
    child: &'a Child,
    offset: u64,
    buf: Buf,
    above: Option<&'a Node>,
) -> IoFuture<'a> {
    Box::pin(read_0(child, offset, buf, above))
}

fn write_boxed<'a>(
    child: &'a Child,
    offset: u64,
    buf: Buf,
    flags: WriteFlags,
    above: Option<&'a Node>,
) -> IoFuture<'a> {
    Box::pin(write_0(child, offset, buf, flags, above))
}

/// Where a write goes. One that is to be stored compressed is work wherever it goes.
fn map_write(node: &Node, range: ByteRange, flags: WriteFlags) -> Result<Mapping<'_>> {
    if !flags.compressed {
        return Ok(node.driver().map(Access::Write, range));
    }
    if node.driver().compresses().is_none() {
        return Err(Error::unsupported(format!(
            "node '{}' (driver '{}') cannot store data compressed",
            node.name(),
            node.def().name
        )));
    }
    Ok(Mapping::Work { len: range.len() })
}

fn in_node(node: &Node, e: Error) -> Error {
    e.context(format!("node '{}'", node.name()))
}

pub(crate) async fn read(child: &Child, offset: u64, buf: Buf) -> Result<()> {
    read_0(child, offset, buf, None).await
}

pub(crate) async fn write(child: &Child, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
    write_0(child, offset, buf, flags, None).await?;
    if flags.fua { child.flush().await } else { Ok(()) }
}

/// One piece of a split request, on its way.
fn read_piece<'a>(node: &'a Node, m: Mapping<'a>, at: u64, buf: Buf) -> IoFuture<'a> {
    Box::pin(async move {
        match m {
            Mapping::File { file, offset, pin, .. } => {
                let r = file.read_at(offset, buf).await.map_err(|e| in_node(node, e));
                drop(pin);
                r
            }
            Mapping::Child { child, offset, pin, .. } => {
                let r = read_0(child, offset, buf, Some(node)).await;
                drop(pin);
                r
            }
            Mapping::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            Mapping::Work { .. } => node.driver().read(at, buf).await,
        }
    })
}

fn write_piece<'a>(
    node: &'a Node,
    m: Mapping<'a>,
    at: u64,
    buf: Buf,
    flags: WriteFlags,
) -> IoFuture<'a> {
    Box::pin(async move {
        match m {
            Mapping::File { file, offset, pin, .. } => {
                let r = file.write_at(offset, buf).await.map_err(|e| in_node(node, e));
                drop(pin);
                r
            }
            Mapping::Child { child, offset, pin, .. } => {
                let r = write_0(child, offset, buf, flags, Some(node)).await;
                drop(pin);
                r
            }
            Mapping::Zero { .. } | Mapping::Work { .. } => {
                node.driver().write(at, buf, flags).await
            }
        }
    })
}

fn split_read<'a>(node: &'a Node, range: ByteRange, buf: Buf) -> IoFuture<'a> {
    Box::pin(async move {
        let mut pieces = Pieces::default();
        let (mut left, mut buf) = (range, buf);
        while !left.is_empty() {
            let m = node.driver().map(Access::Read, left);
            let n = m.len().min(left.len());
            let rest = buf.split_off(n as usize);
            pieces.add(read_piece(node, m, left.start(), buf)).await?;
            (left, buf) = (left.skip(n), rest);
        }
        pieces.finish().await
    })
}

fn split_write<'a>(node: &'a Node, range: ByteRange, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
    Box::pin(async move {
        let mut pieces = Pieces::default();
        let (mut left, mut buf) = (range, buf);
        while !left.is_empty() {
            let m = map_write(node, left, flags)?;
            let n = m.len().min(left.len());
            let rest = buf.split_off(n as usize);
            pieces.add(write_piece(node, m, left.start(), buf, flags)).await?;
            (left, buf) = (left.skip(n), rest);
        }
        pieces.finish().await
    })
}

/// The pieces of a split request, at most [`PIECES`] in flight. All settle before the first error
/// is reported, so that nothing of a failed request is under way when its owner hears of it.
#[derive(Default)]
struct Pieces<'a> {
    open: Vec<IoFuture<'a>>,
    failed: Option<Error>,
}

impl<'a> Pieces<'a> {
    async fn add(&mut self, piece: IoFuture<'a>) -> Result<()> {
        self.open.push(piece);
        self.settle(PIECES - 1).await;
        match self.failed {
            Some(_) => self.settle(0).await,
            None => return Ok(()),
        }
        self.failed.take().map_or(Ok(()), Err)
    }

    async fn finish(&mut self) -> Result<()> {
        self.settle(0).await;
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Polls all open pieces once, and on until at most `most` are open.
    async fn settle(&mut self, most: usize) {
        std::future::poll_fn(|cx| {
            let failed = &mut self.failed;
            self.open.retain_mut(|p| match p.as_mut().poll(cx) {
                std::task::Poll::Pending => true,
                std::task::Poll::Ready(Ok(())) => false,
                std::task::Poll::Ready(Err(e)) => {
                    failed.get_or_insert(e);
                    false
                }
            });
            if self.open.len() <= most {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
    }
}

pub(crate) async fn write_zeroes(child: &Child, range: ByteRange, flags: ZeroFlags) -> Result<()> {
    let entered = child.enter().await;
    let node = child.need(&entered)?;
    let range = node.check(range.start(), range.len(), true)?;
    if range.is_empty() {
        return Ok(());
    }
    let done = node.driver().write_zeroes(range, flags).await;
    match done {
        Err(e) if e.kind() == ErrorKind::Unsupported && !flags.no_fallback => {
            drop(entered);
            let write = WriteFlags { unchanged: flags.unchanged, ..WriteFlags::default() };
            let zeros = Buf::zeroed(range.len().min(ZERO_BUFFER) as usize);
            let mut left = range;
            while !left.is_empty() {
                let part = left.take(ZERO_BUFFER);
                let b = zeros.slice(0..part.len() as usize);
                write_boxed(child, part.start(), b, write, None).await?;
                left = left.skip(ZERO_BUFFER);
            }
        }
        r => r?,
    }
    if flags.fua { child.flush().await } else { Ok(()) }
}

/// The edge through which a node shows what it does not hold itself.
fn backing(node: &Node) -> Option<&Arc<Child>> {
    let i = node.def().children.iter().position(|c| c.role == Role::Backing)?;
    node.driver().children().get(i)
}

/// The edge to the child whose data a filter shows.
pub(crate) fn filtered(node: &Node) -> Option<&Arc<Child>> {
    let i = node.def().children.iter().position(|c| c.role == Role::Filtered)?;
    node.driver().children().get(i)
}

pub(crate) async fn status_through(child: &Child, range: ByteRange) -> Result<(Status, u32)> {
    status_at(child, range, 0).await
}

fn status_at<'a>(child: &'a Child, range: ByteRange, depth: u32) -> IoFuture<'a, (Status, u32)> {
    Box::pin(async move {
        if depth as usize > MAX_CHAIN_DEPTH {
            return Err(Error::new(ErrorKind::Limit, "the backing chain is too long"));
        }
        let entered = child.enter().await;
        let node = child.need(&entered)?;
        let Some(inside) =
            range.intersect(ByteRange::new(0, node.size())).filter(|r| r.start() == range.start())
        else {
            // An overlay larger than its backing node reads zeros there.
            return Ok((Status { allocated: false, ..Status::hole(range.len()) }, depth));
        };
        if let Some(f) = filtered(node) {
            // A filter shows its child's data: it is no layer of its own.
            if let Some(d) = node.driver().debugger() {
                d.status(inside.start(), inside.len())?;
            }
            return status_at(f, inside, depth).await;
        }
        let s = node.driver().status(inside).await?;
        if s.allocated {
            return Ok((s, depth));
        }
        let rest = inside.take(s.len);
        match backing(node) {
            Some(b) if b.enter().await.is_some() => status_at(b, rest, depth + 1).await,
            _ => Ok((Status { zero: true, ..s }, depth)),
        }
    })
}

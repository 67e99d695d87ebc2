//! An edge: the named link from a parent to a node, and the one place where requests cross it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::{Buf, Drained, Entered, Gate};

use crate::driver::{WriteFlags, ZeroFlags};
use crate::node::Node;
use crate::perm::Perm;
use crate::runner;
use crate::status::Status;

/// A named edge `PARENT.CHILD` to at most one node. Requests that cross it are counted; the node
/// changes only while none is in flight (see [`Child::drain`]).
pub struct Child {
    label: String,
    target: Gate<Option<Arc<Node>>>,
    granted: AtomicU8,
    drains: AtomicU32,
    /// Size of the node below when the last drain began, in bytes.
    size_before: AtomicU64,
}

/// Lets the requests in and below a node go on without being held back, while it lives.
pub(crate) struct Expedited(Vec<Arc<Node>>);

impl Expedited {
    pub(crate) fn new(top: Arc<Node>) -> Expedited {
        let found = Node::all_below(top);
        found.iter().for_each(|n| n.driver().expedite(true));
        Expedited(found)
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        self.0.iter().for_each(|n| n.driver().expedite(false));
    }
}

impl Child {
    /// An edge called `label` (such as `disk.file`) to `node`.
    pub fn new(label: impl Into<String>, node: Option<Arc<Node>>) -> Arc<Child> {
        let granted = AtomicU8::new(Perm::NONE.mask());
        Arc::new(Child {
            label: label.into(),
            target: Gate::new(node),
            granted,
            drains: AtomicU32::new(0),
            size_before: AtomicU64::new(0),
        })
    }

    /// The edge's name.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The node below, once no change is under way.
    pub async fn node(&self) -> Option<Arc<Node>> {
        self.target.enter().await.clone()
    }

    /// Goes through the edge. Waits while it is drained.
    pub async fn enter(&self) -> Entered<'_, Option<Arc<Node>>> {
        match self.target.try_enter() {
            Some(e) => e,
            None => self.target.enter().await,
        }
    }

    /// Goes through the edge unless it is drained.
    pub fn try_enter(&self) -> Option<Entered<'_, Option<Arc<Node>>>> {
        self.target.try_enter()
    }

    /// Stops new requests at the edge and waits until those below it have settled. The result is
    /// the drained edge: it alone can re-point it, and dropping it lets requests go on.
    pub async fn drain(&self) -> Drained<'_, Option<Arc<Node>>> {
        self.drains.fetch_add(1, Ordering::Relaxed);
        let node = self.node().await;
        self.size_before.store(node.as_ref().map_or(0, |n| n.size()), Ordering::SeqCst);
        // Nobody waits for requests that wait for the clock only.
        let _held_back = node.map(Expedited::new);
        self.target.close().await
    }

    /// How often it was drained: what changes of the graph cost those who use it.
    pub fn drains(&self) -> u32 {
        self.drains.load(Ordering::Relaxed)
    }

    /// What the edge may do below.
    pub fn granted(&self) -> Perm {
        Perm::from_mask(self.granted.load(Ordering::Acquire))
    }

    /// Says what the edge may do below; for the graph, once a transaction has seen to it. Requests
    /// are not checked against it: it is for drivers that write of their own accord.
    pub fn grant(&self, used: Perm) {
        self.granted.store(used.mask(), Ordering::Release);
    }

    pub(crate) fn need<'a>(&self, e: &'a Entered<'_, Option<Arc<Node>>>) -> Result<&'a Arc<Node>> {
        e.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::NoMedium, format!("'{}' has no node (no medium)", self.label))
        })
    }

    /// Visible size of the node below, in bytes.
    pub async fn size(&self) -> Result<u64> {
        let e = self.enter().await;
        Ok(self.need(&e)?.size())
    }

    /// Visible size of the node below in bytes, 0 without one, answered without waiting: while the
    /// edge is drained, what it was before.
    pub fn size_now(&self) -> u64 {
        match self.target.try_enter() {
            Some(e) => e.as_ref().map_or(0, |n| n.size()),
            None => self.size_before.load(Ordering::SeqCst),
        }
    }

    /// Whether there are data below, and not only filters over nothing. Answered without waiting:
    /// while an edge on the way is drained, whether there were bytes before.
    pub fn has_data(&self) -> bool {
        let Some(entered) = self.try_enter() else { return self.size_now() > 0 };
        let Some(node) = entered.as_ref() else { return false };
        runner::filtered(node).is_none_or(|c| c.has_data())
    }

    /// Reads all of `buf` from `offset` (bytes).
    pub async fn read(&self, offset: u64, buf: Buf) -> Result<()> {
        runner::read(self, offset, buf).await
    }

    /// Writes all of `buf` at `offset` (bytes).
    pub async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        runner::write(self, offset, buf, flags).await
    }

    /// Makes `range` read as zeros.
    pub async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        runner::write_zeroes(self, range, flags).await
    }

    /// Lets go of the contents of `range`.
    pub async fn discard(&self, range: ByteRange) -> Result<()> {
        let e = self.enter().await;
        let node = self.need(&e)?;
        let range = node.check(range.start(), range.len(), false)?;
        node.driver().discard(range).await
    }

    /// Makes all completed writes durable.
    ///
    /// A flush does not hold the edge: what it covers was written below before it came, so it
    /// may end on the node where it began while the edge moves on. Nobody's pause is an fsync.
    pub async fn flush(&self) -> Result<()> {
        let node = {
            let e = self.enter().await;
            self.need(&e)?.clone()
        };
        node.driver().flush().await?;
        node.settle_owed().await
    }

    /// What the node below knows of the first bytes of `range`, its backing chain left aside.
    /// Past the node's end: a hole.
    pub async fn status(&self, range: ByteRange) -> Result<Status> {
        let e = self.enter().await;
        let node = self.need(&e)?;
        match range.intersect(ByteRange::new(0, node.size())) {
            Some(r) if r.start() == range.start() => node.driver().status(r).await,
            _ => Ok(Status::hole(range.len())),
        }
    }

    /// What a reader of the node below finds in the first bytes of `range`, backing chain
    /// included, and how many overlays above the deciding node were passed.
    pub async fn status_through(&self, range: ByteRange) -> Result<(Status, u32)> {
        runner::status_through(self, range).await
    }
}

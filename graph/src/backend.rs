//! The backend: the one door through which one client reaches the graph.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_node::{Ability, Child, Limits, Status, WriteFlags, ZeroFlags};

use crate::faults::{Faults, Operation, Verdict};

/// What a backend holds on to when its node is overlaid or replaced (mutators.md, rule 3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Follow {
    /// The disk: it moves to what takes the node's place.
    #[default]
    Disk,
    /// The node: it keeps showing these very bytes.
    Node,
}

/// Requests and bytes since the backend was made.
#[derive(Default)]
pub struct Accounting {
    /// Reads, writes (with zeroes and discards), flushes.
    pub requests: [AtomicU64; 3],
    /// Bytes read, bytes written.
    pub bytes: [AtomicU64; 2],
}

/// One client's door to the graph. Requests may come from any I/O thread.
pub struct Backend {
    name: String,
    root: Arc<Child>,
    writable: AtomicBool,
    write_through: AtomicBool,
    /// The client sees no medium, though there may be one: its tray is open.
    hidden: AtomicBool,
    accounting: Accounting,
    faults: Faults,
}

impl Backend {
    pub(crate) fn new(name: String, root: Arc<Child>, faults: Faults) -> Arc<Backend> {
        Arc::new(Backend {
            name,
            root,
            writable: AtomicBool::new(false),
            write_through: AtomicBool::new(false),
            hidden: AtomicBool::new(false),
            accounting: Accounting::default(),
            faults,
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its edge into the graph.
    pub(crate) fn root(&self) -> &Arc<Child> {
        &self.root
    }

    /// Whether its client may write.
    pub fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed)
    }

    pub(crate) fn set_writable(&self, on: bool) {
        self.writable.store(on, Ordering::Relaxed);
    }

    /// Hides the medium from the client, or shows it.
    pub(crate) fn hide(&self, on: bool) {
        self.hidden.store(on, Ordering::SeqCst);
    }

    /// What becomes of requests that fail.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Whether every write is made durable before it completes.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// Lets every write be made durable before it completes, or not.
    pub fn set_write_through(&self, on: bool) {
        self.write_through.store(on, Ordering::Relaxed);
    }

    /// What was done through it.
    pub fn accounting(&self) -> &Accounting {
        &self.accounting
    }

    /// Size of the medium in bytes, 0 where the client sees none; while the medium is being
    /// changed, what it was before.
    pub fn size(&self) -> u64 {
        if self.hidden.load(Ordering::Relaxed) { 0 } else { self.root.size_now() }
    }

    /// Whether its client sees a medium, answered without waiting: while that is being changed,
    /// whether it saw one before.
    pub fn has_medium(&self) -> bool {
        !self.hidden.load(Ordering::Relaxed) && self.root.has_data()
    }

    /// What requests the medium prefers.
    pub async fn limits(&self) -> Result<Limits> {
        let e = self.root.enter().await;
        let n = e.as_ref().ok_or_else(|| self.no_medium())?;
        Ok(n.driver().limits())
    }

    /// The unit in which the medium stores compressed what is written so, in bytes, if it can.
    pub async fn compresses(&self) -> Result<Option<u32>> {
        let e = self.root.enter().await;
        let n = e.as_ref().ok_or_else(|| self.no_medium())?;
        Ok(n.driver().compresses())
    }

    /// How the medium writes zeros.
    pub async fn zero_ability(&self) -> Result<Ability> {
        let e = self.root.enter().await;
        let n = e.as_ref().ok_or_else(|| self.no_medium())?;
        Ok(n.driver().zero_ability())
    }

    fn no_medium(&self) -> Error {
        Error::new(ErrorKind::NoMedium, format!("backend '{}' has no medium", self.name))
    }

    fn check_medium(&self) -> Result<()> {
        if self.hidden.load(Ordering::Relaxed) { Err(self.no_medium()) } else { Ok(()) }
    }

    fn check_writable(&self) -> Result<()> {
        self.check_medium()?;
        if self.is_writable() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::ReadOnly, format!("backend '{}' is read-only", self.name)))
    }

    fn count(&self, kind: usize, bytes: u64) {
        self.accounting.requests[kind].fetch_add(1, Ordering::Relaxed);
        if let Some(b) = self.accounting.bytes.get(kind) {
            b.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Does `request` until it succeeds or the policy for failed requests settles it.
    async fn settle<F: Future<Output = Result<()>>>(
        &self,
        operation: Operation,
        request: impl Fn() -> F,
    ) -> Result<()> {
        loop {
            let Err(e) = request().await else { return Ok(()) };
            match self.faults.judge(&self.name, operation, &e).await {
                Verdict::Report => return Err(e),
                Verdict::Ignore => return Ok(()),
                Verdict::Again => {}
            }
        }
    }

    /// Reads all of `buf` from `offset` (bytes).
    pub async fn read(&self, offset: u64, buf: Buf) -> Result<()> {
        self.check_medium()?;
        self.count(0, buf.len() as u64);
        if !self.faults.settles(Operation::Read) {
            return self.root.read(offset, buf).await;
        }
        self.settle(Operation::Read, || self.root.read(offset, buf.clone())).await
    }

    /// Writes all of `buf` at `offset` (bytes). The medium does not grow.
    pub async fn write(&self, offset: u64, buf: Buf, fua: bool) -> Result<()> {
        self.write_as(offset, buf, WriteFlags { fua, ..WriteFlags::default() }).await
    }

    /// Writes all of `buf` at `offset` (bytes), to be stored compressed. `Unsupported` where the
    /// medium cannot: see [`Backend::compresses`].
    pub async fn write_compressed(&self, offset: u64, buf: Buf) -> Result<()> {
        self.write_as(offset, buf, WriteFlags { compressed: true, ..WriteFlags::default() }).await
    }

    async fn write_as(&self, offset: u64, buf: Buf, mut flags: WriteFlags) -> Result<()> {
        self.check_writable()?;
        self.check_end(offset, buf.len() as u64)?;
        self.count(1, buf.len() as u64);
        flags.fua |= self.write_through.load(Ordering::Relaxed);
        if !self.faults.settles(Operation::Write) {
            return self.root.write(offset, buf, flags).await;
        }
        self.settle(Operation::Write, || self.root.write(offset, buf.clone(), flags)).await
    }

    /// Makes `range` read as zeros.
    pub async fn write_zeroes(&self, range: ByteRange, mut flags: ZeroFlags) -> Result<()> {
        self.check_writable()?;
        self.check_end(range.start(), range.len())?;
        self.count(1, range.len());
        flags.fua |= self.write_through.load(Ordering::Relaxed);
        // That it would be slow is an answer, no failure.
        if flags.no_fallback || !self.faults.settles(Operation::Write) {
            return self.root.write_zeroes(range, flags).await;
        }
        self.settle(Operation::Write, || self.root.write_zeroes(range, flags)).await
    }

    /// Lets go of the contents of `range`.
    pub async fn discard(&self, range: ByteRange) -> Result<()> {
        self.check_writable()?;
        self.count(1, 0);
        self.settle(Operation::Write, || self.root.discard(range)).await
    }

    /// Makes all completed writes durable.
    pub async fn flush(&self) -> Result<()> {
        self.check_medium()?;
        self.count(2, 0);
        self.settle(Operation::Write, || self.root.flush()).await
    }

    /// Makes the medium `size` bytes long. For a client that holds the permission to resize.
    pub async fn resize(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        let node = self.root.node().await.ok_or_else(|| self.no_medium())?;
        node.driver().resize(size).await
    }

    /// What a reader finds in the first bytes of `range`, backing chain included, and how many
    /// overlays were passed.
    pub async fn status(&self, range: ByteRange) -> Result<(Status, u32)> {
        self.check_medium()?;
        self.root.status_through(range).await
    }

    fn check_end(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.size();
        match ByteRange::checked(offset, len) {
            Some(r) if r.end() <= size => Ok(()),
            _ => Err(Error::invalid(format!(
                "backend '{}': {len} bytes at {offset:#x} reach past the end at {size:#x}",
                self.name
            ))),
        }
    }
}

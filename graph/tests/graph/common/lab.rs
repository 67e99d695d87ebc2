//! Drivers that live in memory, for tests of the graph: a protocol, an overlay format, a filter.
//! Every request takes a random time of the simulated clock. The [`Lab`] sees what reaches
//! storage, and lets calls fail.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use gipfel_base::{ByteRange, Error, Result};
use gipfel_filters::{copy_on_read, detect_zeroes, throttle};
use gipfel_graph::{ImplicitFilters, Registry};
use gipfel_io::time::sleep;
use gipfel_io::{Buf, File, OpenOptions};
use gipfel_node::{
    Access, Binding, Child, ChildSpec, CreateArgs, Driver, DriverDef, DriverInfo, IoFuture, Kind,
    Mapping, OpenArgs, Opened, Perm, Perms, Role, Status, WriteFlags, ZeroFlags,
};

/// Bytes of one block: what the overlay format allocates, and what a tag is written to.
pub const BLOCK: u64 = 512;
/// Bytes of a node unless it says otherwise.
pub const SIZE: u64 = 64 * BLOCK;

/// A length of time that depends on the bytes at hand: enough to mix the order of requests.
pub async fn pause(salt: u64) {
    sleep(Duration::from_nanos(1 + salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 10_000)).await;
}

/// A call that can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Opening a node.
    Open,
    /// A flush.
    Flush,
    /// Taking what permissions mean outside the process.
    SetPerms,
}

/// What all in-memory drivers of one graph have in common.
#[derive(Default)]
pub struct Lab {
    memories: Mutex<BTreeMap<String, Weak<State>>>,
    arrived: Mutex<HashSet<(usize, u64)>>,
    wrong: Mutex<Vec<String>>,
    fault: Mutex<Option<(Call, u64)>>,
    numbers: AtomicU64,
    /// Whether what was last written to a place came as a write of zeros.
    zeroed: Mutex<BTreeMap<u64, bool>>,
}

impl Lab {
    /// Lets the `nth` (from 0) such call from now on fail, or none.
    pub fn arm(&self, fault: Option<(Call, u64)>) {
        *self.fault.lock().unwrap() = fault;
    }

    /// Whether a fault still waits for its call.
    pub fn is_armed(&self) -> bool {
        self.fault.lock().unwrap().is_some()
    }

    fn call(&self, call: Call) -> Result<()> {
        let mut fault = self.fault.lock().unwrap();
        match &mut *fault {
            Some((c, 0)) if *c == call => {
                *fault = None;
                Err(Error::os(5, format!("injected into {call:?}")))
            }
            Some((c, n)) if *c == call => {
                *n -= 1;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// What must never happen and did: a write that reached one storage twice, one without
    /// permission.
    pub fn wrong(&self) -> Vec<String> {
        self.wrong.lock().unwrap().clone()
    }

    /// Whether what was last written at `offset`, to any storage, came as a write of zeros.
    pub fn zeroed(&self, offset: u64) -> Option<bool> {
        self.zeroed.lock().unwrap().get(&offset).copied()
    }

    fn states(&self) -> Vec<(String, Arc<State>)> {
        let list = self.memories.lock().unwrap();
        list.iter().filter_map(|(n, s)| Some((n.clone(), s.upgrade()?))).collect()
    }

    /// The names of the memories that are still open.
    pub fn open(&self) -> Vec<String> {
        self.states().into_iter().map(|s| s.0).collect()
    }

    /// The permissions that the memory `node` holds outside the process.
    pub fn held(&self, node: &str) -> Option<Perms> {
        self.states().into_iter().find(|s| s.0 == node).map(|s| s.1.inner.lock().unwrap().perms)
    }

    /// Which of `tags` reached storage and were not flushed there.
    pub fn volatile(&self, tags: &BTreeSet<u64>) -> Vec<u64> {
        let mut found = Vec::new();
        for (_, s) in self.states() {
            found.extend(s.inner.lock().unwrap().volatile.intersection(tags));
        }
        found
    }
}

struct Inner {
    bytes: Vec<u8>,
    /// What was written since the last flush, and the flushes under way that will cover it.
    volatile: BTreeSet<u64>,
    perms: Perms,
}

struct State {
    number: usize,
    inner: Mutex<Inner>,
}

struct Memory {
    name: String,
    lab: Arc<Lab>,
    state: Arc<State>,
    filename: Option<String>,
    fail_flush: AtomicBool,
    /// How long a write takes besides.
    slow: Duration,
    /// What it says it has to flush; writing back takes long for that.
    unflushed: AtomicU64,
}

impl Memory {
    fn arrive(&self, what: &str, tags: impl Iterator<Item = u64>, flags: WriteFlags) {
        let mut inner = self.state.inner.lock().unwrap();
        if !inner.perms.writes() {
            let text = format!("{what} on '{}' without a permission to write", self.name);
            self.lab.wrong.lock().unwrap().push(text);
        }
        if flags.unchanged {
            return;
        }
        for t in tags.filter(|t| *t != 0) {
            inner.volatile.insert(t);
            if !self.lab.arrived.lock().unwrap().insert((self.state.number, t)) {
                let text = format!("write {t:#x} reached '{}' twice", self.name);
                self.lab.wrong.lock().unwrap().push(text);
            }
        }
    }
}

impl Driver for Memory {
    fn size(&self) -> u64 {
        self.state.inner.lock().unwrap().bytes.len() as u64
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            pause(offset).await;
            let s = self.state.inner.lock().unwrap();
            buf.copy_from(0, &s.bytes[offset as usize..offset as usize + buf.len()]);
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            pause(offset ^ 77).await;
            if !self.slow.is_zero() {
                sleep(self.slow).await;
            }
            let bytes = buf.to_vec();
            let tags = bytes.chunks_exact(BLOCK as usize).map(tag_of);
            self.arrive("a write", tags, flags);
            if !flags.unchanged {
                self.lab.zeroed.lock().unwrap().insert(offset, false);
            }
            let mut s = self.state.inner.lock().unwrap();
            s.bytes[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            pause(range.start() ^ 99).await;
            let (fua, unchanged) = (flags.fua, flags.unchanged);
            let flags = WriteFlags { fua, unchanged, ..WriteFlags::default() };
            self.arrive("a write of zeros", std::iter::empty(), flags);
            if !flags.unchanged {
                self.lab.zeroed.lock().unwrap().insert(range.start(), true);
            }
            let mut s = self.state.inner.lock().unwrap();
            s.bytes[range.start() as usize..range.end() as usize].fill(0);
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            let covered = self.state.inner.lock().unwrap().volatile.clone();
            pause(3).await;
            if self.fail_flush.load(Relaxed) {
                return Err(Error::os(5, "flush"));
            }
            self.lab.call(Call::Flush)?;
            self.state.inner.lock().unwrap().volatile.retain(|t| !covered.contains(t));
            Ok(())
        })
    }

    fn unflushed(&self) -> u64 {
        self.unflushed.load(Relaxed)
    }

    fn write_back<'a>(
        &'a self,
        enough: &'a dyn Fn() -> bool,
    ) -> Pin<Box<dyn Future<Output = ()> + 'a>> {
        Box::pin(async move {
            while self.unflushed() > 0 && !enough() {
                pause(5).await;
                self.unflushed.fetch_sub(self.unflushed().min(1 << 18), Relaxed);
            }
        })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { Ok(Status::data(range.len(), Some(range.start()))) })
    }

    fn set_perms<'a>(&'a self, perms: Perms) -> IoFuture<'a> {
        Box::pin(async move {
            let old = self.state.inner.lock().unwrap().perms;
            if old.join(perms) != old {
                pause(7).await;
                self.lab.call(Call::SetPerms)?;
            }
            self.state.inner.lock().unwrap().perms = perms;
            Ok(())
        })
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        Box::pin(async move {
            let mut s = self.state.inner.lock().unwrap();
            if !s.perms.used.contains(Perm::RESIZE) {
                let text = format!("'{}' is resized without a permission", self.name);
                self.lab.wrong.lock().unwrap().push(text);
            }
            s.bytes.resize(size as usize, 0);
            Ok(())
        })
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        let info = DriverInfo { filename: self.filename.clone(), ..DriverInfo::default() };
        Box::pin(async move { Ok(info) })
    }

    fn close<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }
}

/// The tag of a block: its first eight bytes.
pub fn tag_of(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[..8].try_into().unwrap())
}

async fn open_memory(lab: Arc<Lab>, a: OpenArgs) -> Result<Opened> {
    pause(11).await;
    lab.call(Call::Open)?;
    let filename = a.options["filename"].as_str().map(str::to_owned);
    if let Some(f) = &filename {
        File::open(Path::new(f), OpenOptions::default()).await?;
    }
    let size = a.options["size"].as_u64().unwrap_or(SIZE);
    let inner =
        Inner { bytes: vec![0; size as usize], volatile: BTreeSet::new(), perms: Perms::IDLE };
    let number = lab.numbers.fetch_add(1, Relaxed) as usize;
    let state = Arc::new(State { number, inner: Mutex::new(inner) });
    lab.memories.lock().unwrap().insert(a.node_name.clone(), Arc::downgrade(&state));
    let driver = Box::new(Memory {
        name: a.node_name,
        lab,
        state,
        filename,
        slow: Duration::from_millis(a.options["slow"].as_u64().unwrap_or(0)),
        fail_flush: AtomicBool::new(a.options["fail-flush"].as_bool().unwrap_or(false)),
        unflushed: AtomicU64::new(a.options["unflushed"].as_u64().unwrap_or(0)),
    });
    Ok(Opened { driver, implicit: Vec::new() })
}

async fn create_memory(a: CreateArgs) -> Result<()> {
    let path = a.options["filename"].as_str().unwrap_or_default();
    let new = OpenOptions { write: true, create_new: true, ..OpenOptions::default() };
    File::open(Path::new(path), new).await.map(drop)
}

static MEMORY: DriverDef = DriverDef {
    name: "mem",
    kind: Kind::Protocol,
    children: &[],
    open: |_| Box::pin(async { Err(Error::unsupported("opened through the lab only")) }),
    create: Some(|a| Box::pin(create_memory(a))),
    probe: None,
    check: None,
};

/// Blocks in its `file` child over a backing child; which blocks are its own it only remembers.
struct Overlay {
    children: Vec<Arc<Child>>,
    size: AtomicU64,
    own: Mutex<BTreeSet<u64>>,
}

impl Overlay {
    fn is_own(&self, at: u64) -> bool {
        self.own.lock().unwrap().contains(&(at / BLOCK))
    }

    fn take(&self, range: ByteRange) {
        let blocks = range.start() / BLOCK..range.end().div_ceil(BLOCK);
        self.own.lock().unwrap().extend(blocks);
    }
}

impl Driver for Overlay {
    fn size(&self) -> u64 {
        self.size.load(Relaxed)
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        Box::pin(async move {
            resize_below(&self.children[0], size).await?;
            self.size.store(size, Relaxed);
            Ok(())
        })
    }

    fn map(&self, access: Access, range: ByteRange) -> Mapping<'_> {
        let len = (BLOCK - range.start() % BLOCK).min(range.len());
        match access {
            Access::Read if self.is_own(range.start()) => {
                Mapping::Child { child: &self.children[0], offset: range.start(), len, pin: None }
            }
            Access::Read => Mapping::Work { len },
            Access::Write => Mapping::Work { len: range.len() },
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            // Entered once: which node is below does not change between the question and the read.
            let below = self.children[1].enter().await;
            match below.as_ref() {
                Some(n) if offset < n.size() => {
                    Child::new("below", Some(n.clone())).read(offset, buf).await
                }
                _ => {
                    buf.fill(0);
                    Ok(())
                }
            }
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            pause(offset ^ 5).await;
            let range = ByteRange::new(offset, buf.len() as u64);
            self.children[0].write(offset, buf, flags).await?;
            self.take(range);
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            self.children[0].write_zeroes(range, flags).await?;
            self.take(range);
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move { self.children[0].flush().await })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move {
            let len = (BLOCK - range.start() % BLOCK).min(range.len());
            let own = self.is_own(range.start());
            Ok(if own { Status::data(len, None) } else { Status::unallocated(len) })
        })
    }
}

async fn open_overlay(a: OpenArgs) -> Result<Opened> {
    let size = AtomicU64::new(a.children[0].size().await?);
    let driver = Box::new(Overlay { children: a.children, size, own: Mutex::default() });
    Ok(Opened { driver, implicit: Vec::new() })
}

static OVERLAY: DriverDef = DriverDef {
    name: "overlay",
    kind: Kind::Format,
    children: &[
        ChildSpec { name: "file", role: Role::Image, binding: Binding::Position, required: true },
        ChildSpec {
            name: "backing",
            role: Role::Backing,
            binding: Binding::Content,
            required: false,
        },
    ],
    open: |a| Box::pin(open_overlay(a)),
    create: Some(|_| Box::pin(async { Ok(()) })),
    probe: None,
    check: None,
};

async fn resize_below(child: &Child, size: u64) -> Result<()> {
    child.node().await.expect("it stands on something").driver().resize(size).await
}

/// Passes everything on.
struct Pass(Vec<Arc<Child>>);

impl Driver for Pass {
    fn size(&self) -> u64 {
        self.0[0].size_now()
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        Box::pin(resize_below(&self.0[0], size))
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.0
    }

    fn map(&self, _: Access, range: ByteRange) -> Mapping<'_> {
        Mapping::Child { child: &self.0[0], offset: range.start(), len: range.len(), pin: None }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move { self.0[0].read(offset, buf).await })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move { self.0[0].write(offset, buf, flags).await })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move { self.0[0].write_zeroes(range, flags).await })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move { self.0[0].flush().await })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { self.0[0].status(range).await })
    }

    fn close<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }
}

async fn open_pass(a: OpenArgs) -> Result<Opened> {
    Ok(Opened { driver: Box::new(Pass(a.children)), implicit: Vec::new() })
}

static PASS: DriverDef = DriverDef {
    name: "pass",
    kind: Kind::Filter,
    children: &[ChildSpec {
        name: "file",
        role: Role::Filtered,
        binding: Binding::Position,
        required: true,
    }],
    open: |a| Box::pin(open_pass(a)),
    create: None,
    probe: None,
    check: None,
};

/// The drivers of `lab`, with the real implicit filters. Throttle groups are made as they are
/// named and hold nothing back, but for the group "tight", which lets 100 requests a second pass;
/// there is no group "none".
pub fn registry(lab: &Arc<Lab>) -> Registry {
    let implicit = ImplicitFilters {
        detect_zeroes: (&detect_zeroes::DETECT_ZEROES, detect_zeroes::make),
        copy_on_read: (&copy_on_read::COPY_ON_READ, |c, ()| copy_on_read::make(c)),
    };
    let groups = throttle::Groups::new();
    let lab = lab.clone();
    Registry::new(&[&MEMORY, &OVERLAY, &PASS, &super::fan::FAN], implicit, "mem", "overlay")
        .with_opener("mem", Box::new(move |a| Box::pin(open_memory(lab.clone(), a))))
        .with_throttle(
            &throttle::THROTTLE,
            Box::new(move |child, group, owner| match group {
                "none" => Err(Error::invalid("there is no group 'none'")),
                _ => {
                    let made = groups.make(child, group, owner)?;
                    if group == "tight" {
                        let mut limits = throttle::Limits::default();
                        limits.set("iops-total", 100)?;
                        groups.get(group)?.set_limits(limits)?;
                    }
                    Ok(made)
                }
            }),
        )
}

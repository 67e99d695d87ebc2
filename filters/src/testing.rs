//! Drivers in memory for the tests of the filters: an overlay of blocks on a backing node, and
//! plain bytes. Every request takes a random time of the simulated clock.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_io::sim::Rng;
use gipfel_io::time::sleep;
use gipfel_node::{
    Binding, Child, ChildSpec, Driver, DriverDef, DriverInfo, IoFuture, Kind, Node, OpenArgs,
    Opened, Role, Status, WriteFlags, ZeroFlags,
};

/// What the overlay allocates in, in bytes.
pub const BLOCK: u64 = 512;
/// What it says to allocate in.
pub const CLUSTER: u64 = 4 * BLOCK;

/// What reached a node.
#[derive(Default)]
pub struct Seen {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub unchanged: AtomicU64,
    pub zeroes: AtomicU64,
    pub discards: AtomicU64,
    pub last_zero: Mutex<Option<ZeroFlags>>,
    pub fail_writes: AtomicBool,
    pub no_zeroes: AtomicBool,
}

impl Seen {
    pub fn count(&self, of: impl Fn(&Seen) -> &AtomicU64) -> u64 {
        of(self).load(Ordering::SeqCst)
    }
}

fn add(n: &AtomicU64) {
    n.fetch_add(1, Ordering::SeqCst);
}

/// Blocks over a backing child; without one, blocks that were never written are zero.
pub struct Overlay {
    children: Vec<Arc<Child>>,
    size: u64,
    blocks: Mutex<BTreeMap<u64, Vec<u8>>>,
    rng: Mutex<Rng>,
    slowest: u64,
    pub seen: Arc<Seen>,
}

static OVERLAY: DriverDef = unopened(
    "overlay",
    Kind::Format,
    &[ChildSpec {
        name: "backing",
        role: Role::Backing,
        binding: Binding::Content,
        required: false,
    }],
);

/// A driver that cannot be opened by name.
pub const fn unopened(name: &'static str, kind: Kind, children: &'static [ChildSpec]) -> DriverDef {
    DriverDef { name, kind, children, open: refuse, create: None, probe: None, check: None }
}

fn refuse(_: OpenArgs) -> IoFuture<'static, Opened> {
    Box::pin(async { Err(Error::unsupported("for tests")) })
}

/// A node of `size` bytes over `backing`; most requests take up to `slowest` nanoseconds.
pub fn overlay(
    name: &str,
    size: u64,
    backing: Option<Arc<Node>>,
    slowest: u64,
) -> (Arc<Node>, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let driver = Overlay {
        children: vec![Child::new(format!("{name}.backing"), backing)],
        size,
        blocks: Mutex::default(),
        rng: Mutex::new(Rng::new(size ^ slowest)),
        slowest,
        seen: seen.clone(),
    };
    (Node::new(name.to_owned(), &OVERLAY, Box::new(driver)), seen)
}

/// A filter of definition `def` over `below`; the edge from the outside and the filter's own.
pub fn stack(
    def: &'static DriverDef,
    below: Option<Arc<Node>>,
    make: impl FnOnce(Arc<Child>) -> Box<dyn Driver>,
) -> (Arc<Child>, Arc<Child>) {
    let edge = Child::new("filter.file", below);
    let node = Node::new("filter".into(), def, make(edge.clone()));
    (Child::new("client.root", Some(node)), edge)
}

impl Overlay {
    async fn pause(&self) {
        if self.slowest > 0 {
            // Some are stragglers, which many others overtake.
            let nanos = {
                let mut rng = self.rng.lock().unwrap();
                rng.below(self.slowest) * if rng.one_in(8) { 16 } else { 1 }
            };
            sleep(Duration::from_nanos(nanos)).await;
        }
    }

    async fn block(&self, at: u64) -> Result<Vec<u8>> {
        let own = self.blocks.lock().unwrap().get(&at).cloned();
        if let Some(b) = own {
            return Ok(b);
        }
        let buf = Buf::zeroed(BLOCK as usize);
        if self.children[0].node().await.is_some() {
            self.children[0].read(at, buf.clone()).await?;
        }
        Ok(buf.to_vec())
    }
}

impl Driver for Overlay {
    fn size(&self) -> u64 {
        self.size
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            add(&self.seen.reads);
            self.pause().await;
            let all = ByteRange::new(offset, buf.len() as u64);
            let wide = all.widen(BLOCK).unwrap();
            for at in (wide.start()..wide.end()).step_by(BLOCK as usize) {
                let b = self.block(at).await?;
                let r = ByteRange::new(at, BLOCK).intersect(all).unwrap();
                let from = (r.start() - at) as usize;
                buf.copy_from((r.start() - offset) as usize, &b[from..from + r.len() as usize]);
            }
            self.pause().await;
            Ok(())
        })
    }

    /// Whole blocks only.
    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            add(if flags.unchanged { &self.seen.unchanged } else { &self.seen.writes });
            self.pause().await;
            if self.seen.fail_writes.load(Ordering::SeqCst) {
                return Err(Error::os(5, "write"));
            }
            assert!(offset.is_multiple_of(BLOCK));
            for (i, b) in buf.to_vec().chunks(BLOCK as usize).enumerate() {
                self.blocks.lock().unwrap().insert(offset + i as u64 * BLOCK, b.to_vec());
            }
            self.pause().await;
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            add(&self.seen.zeroes);
            *self.seen.last_zero.lock().unwrap() = Some(flags);
            if self.seen.no_zeroes.load(Ordering::SeqCst) {
                return Err(Error::unsupported("no zeros here"));
            }
            self.pause().await;
            for at in (range.start()..range.end()).step_by(BLOCK as usize) {
                self.blocks.lock().unwrap().insert(at, vec![0; BLOCK as usize]);
            }
            Ok(())
        })
    }

    fn discard<'a>(&'a self, _: ByteRange) -> IoFuture<'a> {
        add(&self.seen.discards);
        Box::pin(async { Ok(()) })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move {
            self.pause().await;
            let len = (BLOCK - range.start() % BLOCK).min(range.len());
            let at = range.start() / BLOCK * BLOCK;
            let own = self.blocks.lock().unwrap().contains_key(&at);
            Ok(if own { Status::data(len, None) } else { Status::unallocated(len) })
        })
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        let cluster_size = Some(CLUSTER as u32);
        Box::pin(async move { Ok(DriverInfo { cluster_size, ..DriverInfo::default() }) })
    }
}

/// Plain bytes that grow as they are written.
#[derive(Default)]
pub struct Bytes(Mutex<Vec<u8>>);

impl Driver for Bytes {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn grows(&self) -> bool {
        true
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        let at = offset as usize;
        buf.copy_from(0, &self.0.lock().unwrap()[at..at + buf.len()]);
        Box::pin(async { Ok(()) })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, _: WriteFlags) -> IoFuture<'a> {
        let mut all = self.0.lock().unwrap();
        let (at, end) = (offset as usize, offset as usize + buf.len());
        let len = all.len().max(end);
        all.resize(len, 0);
        buf.copy_to(0, &mut all[at..end]);
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, _: ZeroFlags) -> IoFuture<'a> {
        let zeros = Buf::zeroed(range.len() as usize);
        self.write(range.start(), zeros, WriteFlags::default())
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        self.0.lock().unwrap().resize(size as usize, 0);
        Box::pin(async { Ok(()) })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { Ok(Status::data(range.len(), None)) })
    }
}

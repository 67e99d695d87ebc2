//! Drivers that live in memory, for tests of the graph: a protocol, an overlay format, a filter.
//! Every request takes a random time of the simulated clock.

#[allow(dead_code, reason = "each test file uses its own part")]
pub mod fan;
#[allow(dead_code, reason = "each test file uses its own part")]
pub mod steps;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gipfel_base::{ByteRange, Error, Result};
use gipfel_graph::{Graph, ImplicitFilters, Registry};
use gipfel_io::Buf;
use gipfel_io::time::sleep;
use gipfel_node::{
    Access, Binding, Child, ChildSpec, Driver, DriverDef, IoFuture, Kind, Mapping, OpenArgs,
    Opened, Role, Status, WriteFlags,
};
use serde_json::{Map, Value, json};

/// Bytes of one block of the overlay format.
pub const BLOCK: u64 = 512;

/// A length of time that depends on the bytes at hand: enough to mix the order of requests.
async fn pause(salt: u64) {
    sleep(Duration::from_nanos(1 + salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) % 10_000)).await;
}

struct Memory {
    bytes: Mutex<Vec<u8>>,
    fail_flush: AtomicBool,
    /// What it says it has to flush; then writing back only ends when it is told to.
    unflushed: u64,
}

impl Driver for Memory {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            pause(offset).await;
            let b = self.bytes.lock().unwrap();
            buf.copy_from(0, &b[offset as usize..offset as usize + buf.len()]);
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, _: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            pause(offset ^ 77).await;
            let mut b = self.bytes.lock().unwrap();
            buf.copy_to(0, &mut b[offset as usize..offset as usize + buf.len()]);
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            pause(3).await;
            if self.fail_flush.load(Ordering::Relaxed) {
                return Err(Error::os(5, "flush"));
            }
            Ok(())
        })
    }

    fn unflushed(&self) -> u64 {
        self.unflushed
    }

    fn write_back<'a>(
        &'a self,
        enough: &'a dyn Fn() -> bool,
    ) -> Pin<Box<dyn Future<Output = ()> + 'a>> {
        Box::pin(async move {
            while self.unflushed > 0 && !enough() {
                pause(5).await;
            }
        })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { Ok(Status::data(range.len(), Some(range.start()))) })
    }
}

fn open_memory(a: OpenArgs) -> IoFuture<'static, Opened> {
    Box::pin(async move {
        let size = a.options["size"].as_u64().unwrap_or(64 * BLOCK);
        let fail = a.options["fail-flush"].as_bool().unwrap_or(false);
        let bytes = Mutex::new(vec![0; size as usize]);
        let unflushed = a.options["unflushed"].as_u64().unwrap_or(0);
        let driver = Box::new(Memory { bytes, fail_flush: AtomicBool::new(fail), unflushed });
        Ok(Opened { driver, implicit: Vec::new() })
    })
}

static MEMORY: DriverDef = DriverDef {
    name: "mem",
    kind: Kind::Protocol,
    children: &[],
    open: open_memory,
    create: None,
    probe: None,
    check: None,
};

/// Blocks of its own over a backing child; the `file` child holds nothing but gives the size.
struct Overlay {
    children: Vec<Arc<Child>>,
    size: u64,
    blocks: Mutex<BTreeMap<u64, Vec<u8>>>,
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
            let mut at = 0;
            while at < buf.len() as u64 {
                let part = buf.slice(at as usize..(at + BLOCK) as usize);
                let own = self.blocks.lock().unwrap().get(&(offset + at)).cloned();
                match own {
                    Some(b) => part.copy_from(0, &b),
                    None if self.children[1].node().await.is_some() => {
                        self.children[1].read(offset + at, part).await?;
                    }
                    None => part.fill(0),
                }
                at += BLOCK;
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, _: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            pause(offset ^ 5).await;
            let mut blocks = self.blocks.lock().unwrap();
            for (i, b) in buf.to_vec().chunks(BLOCK as usize).enumerate() {
                blocks.insert(offset + i as u64 * BLOCK, b.to_vec());
            }
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move { self.children[0].flush().await })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { Ok(Status::unallocated(range.len())) })
    }
}

fn open_overlay(a: OpenArgs) -> IoFuture<'static, Opened> {
    Box::pin(async move {
        let size = a.children[0].size().await?;
        let driver = Box::new(Overlay { children: a.children, size, blocks: Mutex::default() });
        Ok(Opened { driver, implicit: Vec::new() })
    })
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
    open: open_overlay,
    create: None,
    probe: None,
    check: None,
};

/// Passes everything on.
struct Pass(Vec<Arc<Child>>, u64);

impl Driver for Pass {
    fn size(&self) -> u64 {
        self.1
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

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move { self.0[0].flush().await })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { self.0[0].status(range).await })
    }
}

fn open_pass(a: OpenArgs) -> IoFuture<'static, Opened> {
    Box::pin(async move {
        let size = a.children[0].size().await?;
        Ok(Opened { driver: Box::new(Pass(a.children, size)), implicit: Vec::new() })
    })
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
    open: open_pass,
    create: None,
    probe: None,
    check: None,
};

fn make_pass(child: Arc<Child>) -> Box<dyn Driver> {
    Box::new(Pass(vec![child], u64::MAX >> 1))
}

/// A graph over these drivers.
pub fn graph() -> Rc<Graph> {
    let implicit = ImplicitFilters {
        detect_zeroes: (&PASS, |c, _| make_pass(c)),
        copy_on_read: (&PASS, |c, ()| make_pass(c)),
    };
    let registry =
        Registry::new(&[&MEMORY, &OVERLAY, &PASS, &fan::FAN], implicit, "mem", "overlay");
    Graph::new(registry.with_throttle(&PASS, Box::new(make_throttle)))
}

/// A throttle that holds nothing back. There is no group "none".
fn make_throttle(child: Arc<Child>, group: &str, _: &str) -> Result<Box<dyn Driver>> {
    if group == "none" {
        return Err(Error::invalid("there is no group 'none'"));
    }
    Ok(make_pass(child))
}

/// A JSON object as options.
pub fn map(v: Value) -> Map<String, Value> {
    match v {
        Value::Object(m) => m,
        _ => panic!("options are an object"),
    }
}

/// Adds an overlay node without a backing node.
pub async fn add_overlay(g: &Rc<Graph>, name: &str) -> Result<()> {
    let file = json!({ "driver": "mem" });
    let o = json!({ "driver": "overlay", "node-name": name, "file": file, "backing": null });
    g.blockdev_add(map(o)).await
}

/// The graph as sorted lines `PARENT.CHILD -> NODE`, implicit nodes included.
pub async fn picture(g: &Rc<Graph>) -> Vec<String> {
    let m = g.model().await;
    let mut lines: Vec<_> = m
        .edges()
        .filter_map(|(_, e)| Some(format!("{} -> {}", e.label, m.node(e.target?).name)))
        .collect();
    lines.extend(m.nodes().map(|(_, n)| format!("node {}", n.name)));
    lines.extend(m.backends().map(|(_, b)| format!("backend {}", b.name)));
    lines.sort();
    lines
}

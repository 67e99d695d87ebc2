//! Format `raw`: its window, what it passes down, creation, refusals. Over a file in memory.

use std::sync::{Arc, Mutex, MutexGuard};

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_io::sim::World;
use gipfel_node::{
    Ability, Child, Common, CreateArgs, Driver, DriverDef, DriverInfo, IoFuture, Kind, Node,
    OpenArgs, Perm, Perms, Role, Status, WriteFlags, ZeroFlags,
};
use gipfel_testkit::{DiskModel, Rng};
use serde_json::{Value, json};

use super::RAW;

/// Bytes that can grow, in blocks of which it knows whether they hold data.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// What was asked of it beside reads and writes.
    asked: Mutex<Vec<String>>,
}

impl Memory {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    fn note(&self, what: String) {
        self.asked.lock().unwrap().push(what);
    }

    fn put(&self, at: u64, data: &[u8]) {
        let (mut b, end) = (self.bytes(), at as usize + data.len());
        if b.len() < end {
            b.resize(end, 0);
        }
        b[at as usize..end].copy_from_slice(data);
    }
}

struct Shared(Arc<Memory>);

fn done<'a>(r: Result<()>) -> IoFuture<'a> {
    Box::pin(async { r })
}

impl Driver for Shared {
    fn size(&self) -> u64 {
        self.0.bytes().len() as u64
    }

    fn read<'a>(&'a self, at: u64, buf: Buf) -> IoFuture<'a> {
        buf.copy_from(0, &self.0.bytes()[at as usize..at as usize + buf.len()]);
        done(Ok(()))
    }

    fn write<'a>(&'a self, at: u64, buf: Buf, _: WriteFlags) -> IoFuture<'a> {
        self.0.put(at, &buf.to_vec());
        done(Ok(()))
    }

    fn write_zeroes<'a>(&'a self, r: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        self.0.note(format!("zero {r:?} unmap={}", flags.unmap));
        self.0.put(r.start(), &vec![0; r.len() as usize]);
        done(Ok(()))
    }

    fn discard<'a>(&'a self, r: ByteRange) -> IoFuture<'a> {
        self.0.note(format!("discard {r:?}"));
        done(Ok(()))
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        self.0.note("flush".into());
        done(Ok(()))
    }

    fn status<'a>(&'a self, r: ByteRange) -> IoFuture<'a, Status> {
        let zero = self.0.bytes()[r.start() as usize] == 0;
        let len = r.len().min(4096);
        let s = if zero { Status::hole(len) } else { Status::data(len, Some(r.start())) };
        Box::pin(async move { Ok(s) })
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        self.0.bytes().resize(size as usize, 0);
        done(Ok(()))
    }

    fn grows(&self) -> bool {
        true
    }

    fn reads_zero_when_new(&self) -> bool {
        true
    }

    fn zero_ability(&self) -> Ability {
        Ability::Native
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        let allocated = Some(self.size());
        let filename = Some("m.img".into());
        Box::pin(async move { Ok(DriverInfo { filename, allocated, ..DriverInfo::default() }) })
    }
}

static MEMORY: DriverDef = DriverDef {
    name: "memory",
    kind: Kind::Protocol,
    children: &[],
    open: |_| Box::pin(async { Err(Error::unsupported("made by the test itself")) }),
    create: None,
    probe: None,
    check: None,
};

/// A raw node over `bytes`, under an edge.
struct Image {
    memory: Arc<Memory>,
    node: Arc<Node>,
    edge: Arc<Child>,
}

fn memory(bytes: Vec<u8>) -> (Arc<Memory>, Arc<Child>) {
    let m = Arc::new(Memory { bytes: Mutex::new(bytes), ..Memory::default() });
    let below = Node::new("m".into(), &MEMORY, Box::new(Shared(m.clone())));
    (m, Child::new("r.file", Some(below)))
}

async fn open(bytes: Vec<u8>, options: Value) -> Result<Image> {
    let (memory, file) = memory(bytes);
    let common = Common::default();
    let args = OpenArgs { node_name: "r".into(), options, common, children: vec![file] };
    let opened = (RAW.open)(args).await?;
    let node = Node::new("r".into(), &RAW, opened.driver);
    let edge = Child::new("test.disk", Some(node.clone()));
    Ok(Image { memory, node, edge })
}

#[test]
fn a_window_shows_its_part_and_touches_nothing_else() {
    let mut rng = Rng::from_env();
    World::new(1).run(async {
        for (offset, size) in [(0, 10_000), (512, 5120), (777, 1024), (9999, 0)] {
            let outside = rng.bytes(10_000);
            let mut file = DiskModel::of(&outside);
            let i =
                open(outside, json!({ "offset": offset, "size": size / 512 * 512 })).await.unwrap();
            let size = i.node.size();
            for _ in 0..if size > 0 { 300 } else { 0 } {
                let at = rng.below(size);
                let len = rng.between(1, size - at);
                match rng.below(4) {
                    0 => {
                        let data = rng.bytes(len as usize);
                        let b = Buf::from_slice(&data);
                        i.edge.write(at, b, WriteFlags::default()).await.unwrap();
                        file.write(offset + at, &data);
                    }
                    1 => {
                        let r = ByteRange::new(at, len);
                        i.edge.write_zeroes(r, ZeroFlags::default()).await.unwrap();
                        file.zero(offset + at, len);
                    }
                    _ => {
                        let b = Buf::new(len as usize);
                        i.edge.read(at, b.clone()).await.unwrap();
                        file.expect(offset + at, &b.to_vec());
                    }
                }
            }
            assert!(*i.memory.bytes() == file.to_vec(), "offset {offset}");
            let past = Buf::new(1);
            let e = i.edge.read(size, past.clone()).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput);
            let e = i.edge.write(size, past.clone(), WriteFlags::default()).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "a given size does not grow");
            let e = i.edge.write(u64::MAX, past, WriteFlags::default()).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput);
        }
    });
}

#[test]
fn without_a_size_it_follows_its_file() {
    World::new(2).run(async {
        let i = open(vec![1; 1000], json!({ "offset": 600 })).await.unwrap();
        let driver = i.node.driver();
        assert_eq!(
            (i.node.size(), driver.grows(), driver.reads_zero_when_new()),
            (400, true, true)
        );
        i.edge.write(500, Buf::from_slice(&[2; 10]), WriteFlags::default()).await.unwrap();
        assert_eq!((i.node.size(), i.memory.bytes().len()), (510, 1110));
        driver.resize(300).await.unwrap();
        assert_eq!((i.node.size(), i.memory.bytes().len()), (300, 900));
        let e = driver.resize(u64::MAX).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput);
        // The file below became shorter than the offset: nothing is left, and nothing breaks.
        i.memory.bytes().truncate(10);
        assert_eq!(i.node.size(), 0);
        let fixed = open(vec![1; 1024], json!({ "size": 512 })).await.unwrap();
        assert_eq!(fixed.node.driver().resize(1).await.unwrap_err().kind(), ErrorKind::Unsupported);
        assert!(!fixed.node.driver().grows() && !fixed.node.driver().reads_zero_when_new());
    });
}

#[test]
fn the_size_is_known_while_the_file_is_being_exchanged() {
    World::new(3).run(async {
        let i = open(vec![1; 1000], json!({})).await.unwrap();
        assert_eq!(i.node.size(), 1000);
        let drained = i.node.driver().children()[0].drain().await;
        assert_eq!(i.node.size(), 1000);
        drop(drained);
    });
}

#[test]
fn what_it_does_not_do_itself_goes_down_shifted() {
    World::new(4).run(async {
        let i = open(vec![1; 9000], json!({ "offset": 500 })).await.unwrap();
        let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
        i.edge.write_zeroes(ByteRange::new(100, 10), flags).await.unwrap();
        i.edge.discard(ByteRange::new(200, 20)).await.unwrap();
        i.edge.flush().await.unwrap();
        let asked = i.memory.asked.lock().unwrap().clone();
        let (zero, discard) = (ByteRange::new(600, 10), ByteRange::new(700, 20));
        let want = [format!("zero {zero:?} unmap=true"), format!("discard {discard:?}")];
        assert_eq!(asked[..2], want);
        assert_eq!(asked[2..], ["flush"]);
        let s = i.edge.status(ByteRange::new(0, 8500)).await.unwrap();
        let plain = (s.len, s.allocated, s.data, s.zero, s.at);
        assert_eq!(plain, (4096, true, true, false, Some(500)));
        let s = i.edge.status(ByteRange::new(100, 10)).await.unwrap();
        assert_eq!((s.len, s.allocated, s.data, s.zero), (10, true, false, true));
        assert_eq!(i.node.driver().zero_ability(), Ability::Native);
        // It asks of its file what is asked of it, no more.
        let above = Perms { used: Perm::WRITE, shared: Perm::CONSISTENT_READ };
        assert_eq!(i.node.driver().child_perms(0, Role::Data, above, true), above);
    });
}

#[test]
fn windows_that_do_not_fit_are_refused() {
    World::new(5).run(async {
        for (options, says) in [
            (json!({ "offset": 1025 }), "past the end"),
            (json!({ "offset": 512, "size": 1024 }), "together pass the end"),
            (json!({ "size": 100 }), "multiple of 512"),
            (json!({ "offset": u64::MAX, "size": 512 }), "past the end"),
            (json!({ "offset": -1 }), "invalid value"),
            (json!({ "ofset": 1 }), "unknown field"),
        ] {
            let e = open(vec![0; 1024], options.clone()).await.err().unwrap();
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{options}");
            assert!(e.to_string().contains(says), "{options}: {e}");
        }
        let i = open(vec![0; 1024], json!({ "offset": 1024 })).await.unwrap();
        assert_eq!(i.node.size(), 0);
    });
}

#[test]
fn only_the_whole_file_goes_by_its_name() {
    World::new(8).run(async {
        for (options, name) in [
            (json!({}), Some("m.img")),
            (json!({ "offset": 512 }), None),
            (json!({ "size": 512 }), None),
        ] {
            let i = open(vec![0; 4096], options).await.unwrap();
            let info = i.node.driver().info().await.unwrap();
            assert_eq!((info.filename.as_deref(), info.allocated), (name, Some(4096)));
        }
    });
}

#[test]
fn options_stay_as_they_were() {
    World::new(6).run(async {
        let i = open(vec![0; 4096], json!({ "offset": 512 })).await.unwrap();
        let reopen = async |o| i.node.driver().reopen(o, true).await.map(|r| r.commit());
        reopen(json!({ "offset": 512, "discard": "unmap" })).await.unwrap();
        let e = reopen(json!({ "offset": 0 })).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        assert_eq!(reopen(json!({ "what": 0 })).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    });
}

#[test]
fn creating_gives_the_file_its_size_and_clears_it() {
    World::new(7).run(async {
        for how in ["off", "falloc", "full"] {
            for size in [0u64, 1000, (2 << 20) + 1] {
                let (m, file) = memory(vec![9; 3 << 20]);
                let options = json!({ "size": size, "preallocation": how });
                let children = vec![("file".to_owned(), file)];
                (RAW.create.unwrap())(CreateArgs { options, children }).await.unwrap();
                assert!(*m.bytes() == vec![0; size as usize], "{how} {size}");
                assert_eq!(m.asked.lock().unwrap().last().unwrap(), "flush");
            }
        }
        let refused = async |options: Value, children| {
            (RAW.create.unwrap())(CreateArgs { options, children }).await.unwrap_err()
        };
        let e = refused(json!({ "size": 1 }), Vec::new()).await;
        assert!(e.to_string().contains("'file' is missing"), "{e}");
        let empty = vec![("file".to_owned(), Child::new("f", None))];
        assert_eq!(refused(json!({ "size": 1 }), empty).await.kind(), ErrorKind::NoMedium);
        let e = refused(json!({ "size": 1, "preallocation": "metadata" }), Vec::new()).await;
        assert!(e.to_string().contains("metadata"), "{e}");
    });
}

#[test]
fn any_bytes_may_be_raw_but_nobody_insists() {
    assert_eq!((RAW.probe.unwrap())(b"anything"), 1);
}

//! One qcow2 image used from several threads at once, under the model checker: whatever the
//! interleaving, no write is lost, no cluster is shared, and the image is clean in the end.
//!
//! Run with `RUSTFLAGS="--cfg shuttle" cargo test -p gipfel-formats --test shuttle`.
#![allow(missing_docs)]
#![cfg(shuttle)]

use gipfel_base::{ByteRange, Error};
use gipfel_formats::QCOW2;
use gipfel_formats::qcow2::cache::{Reserve, TableCache};
use gipfel_io::Buf;
use gipfel_node::{
    CheckArgs, Child, Common, CreateArgs, Discard, Driver, DriverDef, Fix, IoFuture, Kind, Node,
    OpenArgs, Opened, Perm, Perms, Status, WriteFlags, ZeroFlags,
};
use serde_json::{Value, json};
use shuttle::future::block_on;
use shuttle::sync::{Arc, Condvar, Mutex};
use shuttle::thread;

const RUNS: usize = 4000;
const CLUSTER: usize = 512;

fn explore(f: impl Fn() + Send + Sync + 'static + Clone) {
    shuttle::check_random(f.clone(), RUNS);
    shuttle::check_pct(f, RUNS, 3);
}

static MEMORY: DriverDef = DriverDef {
    name: "memory",
    kind: Kind::Protocol,
    children: &[],
    open: |_: OpenArgs| Box::pin(async { Err::<Opened, _>(Error::unsupported("tests only")) }),
    create: None,
    probe: None,
    check: None,
};

/// A file in memory; each access is a moment at which threads may change.
#[derive(Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    hold: Mutex<Hold>,
    changed: Condvar,
}

/// Whether a read of a data cluster is held up on its way.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Hold {
    #[default]
    Off,
    /// The next one will be.
    Armed,
    /// One is.
    Held,
}

impl Memory {
    fn set(&self, hold: Hold) {
        *self.hold.lock().unwrap() = hold;
        self.changed.notify_all();
    }

    fn wait_until(&self, hold: Hold) {
        let mut now = self.hold.lock().unwrap();
        while *now != hold {
            now = self.changed.wait(now).unwrap();
        }
    }
}

impl Driver for Memory {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            if buf.len() == CLUSTER && *self.hold.lock().unwrap() == Hold::Armed {
                self.set(Hold::Held);
                self.wait_until(Hold::Off);
            }
            let b = self.bytes.lock().unwrap();
            buf.copy_from(0, &b[offset as usize..offset as usize + buf.len()]);
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, _: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let mut b = self.bytes.lock().unwrap();
            let end = offset as usize + buf.len();
            if b.len() < end {
                b.resize(end, 0);
            }
            buf.copy_to(0, &mut b[offset as usize..end]);
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { Ok(Status::data(range.len(), None)) })
    }

    fn grows(&self) -> bool {
        true
    }

    fn reads_zero_when_new(&self) -> bool {
        true
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        Box::pin(async move {
            self.bytes.lock().unwrap().resize(size as usize, 0);
            Ok(())
        })
    }
}

/// The same file as a driver.
struct Shared(Arc<Memory>);

impl Driver for Shared {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        self.0.read(offset, buf)
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        self.0.write(offset, buf, flags)
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        self.0.flush()
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        self.0.status(range)
    }

    fn grows(&self) -> bool {
        true
    }

    fn reads_zero_when_new(&self) -> bool {
        true
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        self.0.resize(size)
    }
}

fn file() -> std::sync::Arc<Child> {
    file_of(&Arc::new(Memory::default()))
}

fn file_of(memory: &Arc<Memory>) -> std::sync::Arc<Child> {
    let node = Node::new("f".into(), &MEMORY, Box::new(Shared(memory.clone())));
    Child::new("disk.file", Some(node))
}

async fn image(file: &std::sync::Arc<Child>, options: Value) -> std::sync::Arc<Child> {
    let create = json!({ "size": 64 << 10, "cluster-size": 512, "refcount-bits": 64 });
    let args = CreateArgs { options: create, children: vec![("file".into(), file.clone())] };
    (QCOW2.create.unwrap())(args).await.unwrap();
    let args = OpenArgs {
        node_name: "disk".into(),
        options,
        common: Common { discard: Discard::Unmap, ..Common::default() },
        children: vec![
            file.clone(),
            Child::new("disk.backing", None),
            Child::new("disk.data-file", None),
        ],
    };
    let driver = (QCOW2.open)(args).await.unwrap().driver;
    let used = Perm::CONSISTENT_READ | Perm::WRITE;
    driver.set_perms(Perms { used, shared: Perm::ALL }).await.unwrap();
    Child::new("disk.root", Some(Node::new("disk".into(), &QCOW2, driver)))
}

async fn is_clean(file: &std::sync::Arc<Child>, disk: &Child) {
    disk.node().await.unwrap().driver().close().await.unwrap();
    let args = CheckArgs { file: file.clone(), fix: Fix::Nothing };
    let r = (QCOW2.check.unwrap())(args).await.unwrap();
    assert_eq!((r.corruptions, r.leaks, r.check_errors), (0, 0, 0), "{:#?}", r.findings);
}

async fn write(disk: &Child, at: u64, byte: u8, len: usize) {
    let b = Buf::new(len);
    b.fill(byte);
    disk.write(at, b, WriteFlags::default()).await.unwrap();
}

async fn holds(disk: &Child, at: u64, byte: u8, len: usize) {
    let b = Buf::new(len);
    disk.read(at, b.clone()).await.unwrap();
    let bytes = b.to_vec();
    assert!(bytes.iter().all(|x| *x == byte), "at {at:#x}: {byte} expected, {bytes:x?}");
}

/// The smallest caches: slices come and go all the time.
fn tiny() -> Value {
    json!({ "l2-cache-size": 1024, "refcount-cache-size": 1024 })
}

#[test]
fn neighbours_in_one_cluster_are_not_lost() {
    explore(|| {
        let file = file();
        let disk = block_on(image(&file, json!({})));
        let writers: Vec<_> = (0..3u8)
            .map(|n| {
                let disk = disk.clone();
                thread::spawn(move || {
                    block_on(async {
                        let at = u64::from(n) * 128;
                        write(&disk, at, n + 1, 128).await;
                        holds(&disk, at, n + 1, 128).await;
                    });
                })
            })
            .collect();
        writers.into_iter().for_each(|w| w.join().unwrap());
        block_on(async {
            for n in 0..3 {
                holds(&disk, u64::from(n) * 128, n + 1, 128).await;
            }
            holds(&disk, 384, 0, 128).await;
            is_clean(&file, &disk).await;
        });
    });
}

#[test]
fn clusters_come_and_go_while_tables_are_exchanged() {
    explore(|| {
        let file = file();
        let disk = block_on(image(&file, tiny()));
        // Each in slices of its own, of which only two are cached at a time.
        let writers: Vec<_> = (0..3u8)
            .map(|n| {
                let disk = disk.clone();
                thread::spawn(move || {
                    block_on(async {
                        let at = u64::from(n) * (16 << 10);
                        write(&disk, at, n + 1, 1024).await;
                        disk.discard(ByteRange::new(at, 512)).await.unwrap();
                        holds(&disk, at, 0, 512).await;
                        holds(&disk, at + 512, n + 1, 512).await;
                        if n == 0 {
                            disk.flush().await.unwrap();
                        }
                        write(&disk, at + 100, n + 10, 200).await;
                        holds(&disk, at + 100, n + 10, 200).await;
                    });
                })
            })
            .collect();
        writers.into_iter().for_each(|w| w.join().unwrap());
        block_on(async {
            for n in 0..3u8 {
                let at = u64::from(n) * (16 << 10);
                holds(&disk, at, 0, 100).await;
                holds(&disk, at + 100, n + 10, 200).await;
                holds(&disk, at + 512, n + 1, 512).await;
            }
            is_clean(&file, &disk).await;
        });
    });
}

#[test]
fn a_cluster_is_not_reused_under_a_request() {
    explore(|| {
        let file = file();
        let disk = block_on(image(&file, json!({})));
        block_on(write(&disk, 0, 1, 512));
        let reader = {
            let disk = disk.clone();
            thread::spawn(move || {
                block_on(async {
                    let b = Buf::new(512);
                    disk.read(0, b.clone()).await.unwrap();
                    // Before or after the discard, but never what is written elsewhere.
                    let first = b.to_vec()[0];
                    assert!(first < 2 && b.to_vec().iter().all(|x| *x == first), "{first}");
                });
            })
        };
        let writer = {
            let disk = disk.clone();
            thread::spawn(move || {
                block_on(async {
                    disk.discard(ByteRange::new(0, 512)).await.unwrap();
                    disk.flush().await.unwrap();
                    write(&disk, 4096, 9, 512).await;
                    let zero = ZeroFlags::default();
                    disk.write_zeroes(ByteRange::new(4096, 512), zero).await.unwrap();
                });
            })
        };
        reader.join().unwrap();
        writer.join().unwrap();
        block_on(async {
            holds(&disk, 0, 0, 512).await;
            holds(&disk, 4096, 0, 512).await;
            is_clean(&file, &disk).await;
        });
    });
}

#[test]
fn a_read_that_is_held_up_finds_its_cluster_as_it_was() {
    let held = || {
        let memory = Arc::new(Memory::default());
        let file = file_of(&memory);
        let disk = block_on(image(&file, json!({})));
        block_on(write(&disk, 0, 1, CLUSTER));
        memory.set(Hold::Armed);
        let reader = {
            let disk = disk.clone();
            thread::spawn(move || block_on(holds(&disk, 0, 1, CLUSTER)))
        };
        memory.wait_until(Hold::Held);
        block_on(async {
            disk.discard(ByteRange::new(0, 512)).await.unwrap();
            for n in 0..3 {
                disk.flush().await.unwrap();
                write(&disk, 4096 + n * 512, 9, CLUSTER).await;
            }
        });
        memory.set(Hold::Off);
        reader.join().unwrap();
        block_on(is_clean(&file, &disk));
    };
    shuttle::check_random(held, 500);
}

#[test]
fn a_slice_that_is_exchanged_is_noticed() {
    explore(|| {
        let cache = Arc::new(TableCache::new(1, 16));
        let put = |cache: &TableCache, id: u64| {
            if let Reserve::Place(p) = cache.reserve(id) {
                p.fill(std::iter::once(id * 10), false, false);
            }
        };
        put(&cache, 7);
        let reader = {
            let cache = cache.clone();
            thread::spawn(move || {
                for id in [7, 8, 7] {
                    let word = cache.get(id).and_then(|f| f.word(0));
                    assert!(word.is_none_or(|w| w == id * 10), "{word:?} in slice {id}");
                }
            })
        };
        for id in [8, 9, 7, 10, 8] {
            put(&cache, id);
        }
        reader.join().unwrap();
    });
}

#[test]
fn a_pair_of_words_is_seen_as_it_was_put() {
    use shuttle::sync::atomic::Ordering::Release;
    explore(|| {
        let cache = Arc::new(TableCache::new(2, 32));
        if let Reserve::Place(p) = cache.reserve(1) {
            p.fill(std::iter::repeat(0), false, false);
        }
        let reader = {
            let cache = cache.clone();
            thread::spawn(move || {
                for _ in 0..3 {
                    let pair = cache.get(1).and_then(|f| f.pair(0));
                    assert!(pair.is_none_or(|(a, b)| a == b), "{pair:?}");
                }
            })
        };
        for n in [1, 2, 1, 0] {
            cache.update(1, |w| {
                w[1].store(n, Release);
                w[0].store(n, Release);
            });
        }
        reader.join().unwrap();
    });
}

#[test]
fn flushes_meet_writes() {
    explore(|| {
        let file = file();
        let disk = block_on(image(&file, tiny()));
        let tasks: Vec<_> = (0..3u8)
            .map(|n| {
                let disk = disk.clone();
                thread::spawn(move || {
                    block_on(async {
                        if n == 2 {
                            disk.flush().await.unwrap();
                            disk.flush().await.unwrap();
                        } else {
                            write(&disk, u64::from(n) * 512, n + 1, 512).await;
                            disk.flush().await.unwrap();
                            write(&disk, (40 << 10) + u64::from(n) * 512, n + 1, 512).await;
                        }
                    });
                })
            })
            .collect();
        tasks.into_iter().for_each(|w| w.join().unwrap());
        block_on(async {
            for n in 0..2u8 {
                holds(&disk, u64::from(n) * 512, n + 1, 512).await;
                holds(&disk, (40 << 10) + u64::from(n) * 512, n + 1, 512).await;
            }
            is_clean(&file, &disk).await;
        });
    });
}

//! Driver `file` against a model, in the simulation and on real files; its errors; its locks
//! against the reference tools.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::{ByteRange, ErrorKind, Result};
use gipfel_io::sim::{Fault, IoKind, Rng, World};
use gipfel_io::{Buf, Runtime, spawn_local};
use gipfel_node::{
    Child, Common, CreateArgs, Discard, Node, OpenArgs, Perm, Perms, WriteFlags, ZeroFlags,
};
use gipfel_testkit::{Scratch, tools};
use serde_json::{Value, json};

use super::FILE;

const EIO: i32 = 5;

/// An open file under an edge, as a parent has it.
struct Disk {
    node: Arc<Node>,
    edge: Arc<Child>,
}

async fn open_with(options: Value, common: Common) -> Result<Disk> {
    let args = OpenArgs { node_name: "f".into(), options, common, children: Vec::new() };
    let opened = (FILE.open)(args).await?;
    let node = Node::new("f".into(), &FILE, opened.driver);
    let edge = Child::new("test.file", Some(node.clone()));
    Ok(Disk { node, edge })
}

async fn open(path: &str, common: Common) -> Disk {
    open_with(json!({ "filename": path }), common).await.unwrap()
}

impl Disk {
    async fn perms(&self, used: Perm, shared: Perm) -> Result<()> {
        self.node.driver().set_perms(Perms { used, shared }).await
    }

    async fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.edge.write(at, Buf::from_slice(bytes), WriteFlags::default()).await
    }

    async fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let b = Buf::new(len);
        b.fill(0xee);
        self.edge.read(at, b.clone()).await.unwrap();
        b.to_vec()
    }

    /// The outcome of a reopen, committed.
    async fn reopen(&self, options: Value, read_only: bool) -> Result<()> {
        self.node.driver().reopen(options, read_only).await?.commit();
        Ok(())
    }
}

const UNMAP: Common = Common {
    read_only: false,
    auto_read_only: false,
    discard: Discard::Unmap,
    direct: false,
    no_flush: false,
    force_share: false,
};

/// Random bytes that are never zero, so that lost data show.
fn bytes(rng: &mut Rng, len: u64) -> Vec<u8> {
    (0..len).map(|_| 1 + rng.below(255) as u8).collect()
}

/// Random work by one task on its own parts of the disk: those whose number modulo `of` is
/// `mine`, parts of `part` bytes. Returns what it thinks the disk holds there.
async fn work(d: Rc<Disk>, mut rng: Rng, (mine, of, part): (u64, u64, u64), size: u64) -> Vec<u8> {
    let mut model = vec![0u8; size as usize];
    for _ in 0..60 {
        let slot = rng.below(size / part / of) * of + mine;
        let from = rng.below(part);
        let (at, len) = (slot * part + from, 1 + rng.below(part - from));
        let span = at as usize..(at + len) as usize;
        let range = ByteRange::new(at, len);
        match rng.below(8) {
            0..=3 => {
                let data = bytes(&mut rng, len);
                d.write(at, &data).await.unwrap();
                model[span].copy_from_slice(&data);
            }
            4 => {
                let flags = ZeroFlags { unmap: rng.one_in(2), ..ZeroFlags::default() };
                d.edge.write_zeroes(range, flags).await.unwrap();
                model[span].fill(0);
            }
            5 if at + len <= d.node.size() => {
                d.edge.discard(range).await.unwrap();
                let got = d.read(at, len as usize).await;
                let ok = got.iter().zip(&model[span.clone()]).all(|(g, m)| *g == 0 || g == m);
                assert!(ok, "after a discard: old bytes or zeros");
                model[span].copy_from_slice(&got);
            }
            6 => d.edge.flush().await.unwrap(),
            _ => {
                let known = d.node.size().saturating_sub(at).min(len);
                if known > 0 {
                    let got = d.read(at, known as usize).await;
                    assert!(got == model[at as usize..(at + known) as usize], "at {at}+{known}");
                }
            }
        }
        let status = d.edge.status(range).await.unwrap();
        assert!(status.len >= 1 && status.len <= len, "{status:?} for {len}");
        if status.zero {
            let end = (at + status.len).min(d.node.size());
            let here = &model[at.min(end) as usize..end as usize];
            assert!(here.iter().all(|b| *b == 0), "said to be zeros: {status:?} at {at}");
        }
    }
    model
}

/// Several tasks whose parts lie in between each other, then all of it compared.
async fn agree_with_the_model(path: &str, common: Common, seed: u64) {
    const SIZE: u64 = 24 * 700;
    let d = Rc::new(open(path, common).await);
    let started_with = d.node.size();
    let tasks: Vec<_> = (0..4)
        .map(|n| spawn_local(work(d.clone(), Rng::new(seed * 4 + n), (n, 4, 700), SIZE)))
        .collect();
    let mut whole = vec![0u8; SIZE as usize];
    for (n, t) in tasks.into_iter().enumerate() {
        let model = t.await;
        for slot in (n as u64..SIZE / 700).step_by(4) {
            let span = (slot * 700) as usize..((slot + 1) * 700) as usize;
            whole[span.clone()].copy_from_slice(&model[span]);
        }
    }
    let size = d.node.size();
    assert!(size >= started_with && size <= SIZE);
    assert!(d.read(0, size as usize).await == whole[..size as usize], "seed {seed}");
    assert!(whole[size as usize..].iter().all(|b| *b == 0), "nothing is past the end");
    // The length on disk is what the node says, whatever direct I/O rounded to.
    let again = open(path, Common { read_only: true, ..Common::default() }).await;
    assert_eq!(again.node.size(), size, "seed {seed}");
    assert!(again.read(0, size as usize).await == whole[..size as usize]);
    d.node.driver().close().await.unwrap();
}

#[test]
fn simulated_files_agree_with_the_model() {
    for seed in 0..40 {
        for (direct, align) in [(false, 1), (true, 512), (true, 4096)] {
            let w = World::new(seed);
            w.set_direct_align(align);
            w.put_file("disk", vec![0; if seed % 2 == 0 { 0 } else { 5000 }]);
            let common = Common { direct, ..UNMAP };
            w.run(agree_with_the_model("disk", common, seed));
        }
    }
}

#[test]
fn real_files_agree_with_the_model() {
    let s = Scratch::new("file");
    let seed = gipfel_testkit::Rng::from_env().seed() >> 8;
    let rt = Runtime::new(0).unwrap();
    rt.block_on(async {
        for n in 0..6 {
            for direct in [false, true] {
                let path = s.file("disk", &vec![0; if n % 2 == 0 { 0 } else { 9000 }]);
                let common = Common { direct, ..UNMAP };
                match open_with(json!({ "filename": path }), common).await {
                    Err(e) if direct && e.kind() == ErrorKind::Unsupported => continue,
                    d => drop(d.unwrap()),
                }
                agree_with_the_model(&path, common, seed.wrapping_add(n) >> 3).await;
            }
        }
    })
    .unwrap();
}

/// Two unaligned writers in one block, many times: neither undoes the other, nor what a plain
/// aligned writer beside them does.
#[test]
fn unaligned_direct_writes_in_one_block_keep_each_other() {
    for seed in 0..60 {
        let w = World::new(seed);
        w.set_direct_align(4096);
        w.put_file("disk", vec![0; 16384]);
        w.run(async {
            let d = Rc::new(open("disk", Common { direct: true, ..UNMAP }).await);
            let writer = |d: Rc<Disk>, at: u64, len: usize, byte: u8| async move {
                for _ in 0..5 {
                    d.write(at, &vec![byte; len]).await.unwrap();
                }
            };
            let tasks = [(100, 50, 1), (150, 100, 2), (4000, 5000, 3), (12288, 4096, 4)]
                .map(|(at, len, byte)| spawn_local(writer(d.clone(), at, len, byte)));
            for t in tasks {
                t.await;
            }
            let got = d.read(0, 16384).await;
            for (range, byte) in
                [(100..150, 1), (150..250, 2), (4000..9000, 3), (12288..16384, 4), (250..4000, 0)]
            {
                assert!(got[range.clone()].iter().all(|b| *b == byte), "{range:?} seed {seed}");
            }
        });
    }
}

/// The first unaligned write of a node's life meets an aligned one that goes without a lock.
#[test]
fn the_first_unaligned_direct_write_spares_aligned_ones_in_flight() {
    for seed in 0..60 {
        let w = World::new(seed);
        w.set_direct_align(4096);
        w.put_file("disk", vec![0; 8192]);
        w.run(async {
            let d = Rc::new(open("disk", Common { direct: true, ..UNMAP }).await);
            let tasks = [(0, 8192, 4), (100, 50, 1)].map(|(at, len, byte)| {
                let d = d.clone();
                spawn_local(async move { d.write(at, &vec![byte; len]).await.unwrap() })
            });
            for t in tasks {
                t.await;
            }
            let got = d.read(0, 8192).await;
            let around = got[..100].iter().chain(&got[150..]);
            assert!(around.into_iter().all(|b| *b == 4), "seed {seed}");
        });
    }
}

#[test]
fn resizing_keeps_what_stays_and_clears_what_comes() {
    let check = |direct| async move {
        let d = open("disk", Common { direct, ..UNMAP }).await;
        let driver = d.node.driver();
        d.write(0, &[7; 10_000]).await.unwrap();
        driver.resize(3333).await.unwrap();
        assert_eq!(d.node.size(), 3333);
        assert_eq!(d.edge.read(3000, Buf::new(500)).await.unwrap_err().kind(), EINVAL_KIND);
        driver.resize(8000).await.unwrap();
        let got = d.read(0, 8000).await;
        assert!(got[..3333].iter().all(|b| *b == 7) && got[3333..].iter().all(|b| *b == 0));
        let e = driver.resize(1 << 63).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
        let reader = open("disk", Common { read_only: true, ..Common::default() }).await;
        let e = reader.node.driver().resize(1).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ReadOnly, "{e}");
    };
    const EINVAL_KIND: ErrorKind = ErrorKind::InvalidInput;
    for (direct, align) in [(false, 1), (true, 512)] {
        let w = World::new(3);
        w.set_direct_align(align);
        w.put_file("disk", Vec::new());
        w.run(check(direct));
    }
}

#[test]
fn a_flush_that_failed_is_never_followed_by_one_that_succeeds() {
    for seed in 0..20 {
        for direct in [false, true] {
            let w = World::new(seed);
            w.put_file("disk", vec![0; 4096]);
            w.run(async {
                let d = Rc::new(open("disk", Common { direct, ..UNMAP }).await);
                d.write(0, &[1; 512]).await.unwrap();
                let f = Fault { nth: 0, kind: Some(IoKind::Sync), errno: EIO, sticky: false };
                w.set_fault(Some(f));
                // Several at once: whoever comes out after the failure has heard of it.
                let tasks: Vec<_> = (0..4)
                    .map(|_| {
                        let d = d.clone();
                        spawn_local(async move { d.edge.flush().await })
                    })
                    .collect();
                let mut outcomes = Vec::new();
                for t in tasks {
                    outcomes.push(t.await);
                }
                let later = d.edge.flush().await;
                if direct {
                    assert!(later.is_ok(), "nothing was lost: the device may be tried again");
                    return;
                }
                assert!(outcomes.iter().all(Result::is_err), "{outcomes:?}");
                let e = later.unwrap_err();
                assert!(e.to_string().contains("earlier flush"), "{e}");
            });
        }
    }
}

#[test]
fn flushes_that_wait_share_the_next_one() {
    let w = World::new(5);
    w.put_file("disk", vec![0; 4096]);
    w.run(async {
        let d = Rc::new(open("disk", UNMAP).await);
        let none = Fault { nth: u64::MAX, kind: Some(IoKind::Sync), errno: EIO, sticky: false };
        w.set_fault(Some(none));
        let tasks: Vec<_> = (0..50)
            .map(|n| {
                let d = d.clone();
                spawn_local(async move {
                    d.write(n * 8, &[9; 8]).await.unwrap();
                    d.edge.flush().await.unwrap();
                })
            })
            .collect();
        for t in tasks {
            t.await;
        }
        assert!(w.io_count() < 50, "{} flushes", w.io_count());
        let left = w.after_power_loss(gipfel_io::sim::Keep::Nothing, 1).file("disk").unwrap();
        assert!(left[..400].iter().all(|b| *b == 9), "every one of them was served");
    });
}

#[test]
fn a_node_made_read_only_still_flushes_what_it_wrote() {
    let w = World::new(6);
    w.put_file("disk", vec![0; 4096]);
    w.run(async {
        let d = open("disk", UNMAP).await;
        d.write(0, &[5; 4096]).await.unwrap();
        d.reopen(json!({ "filename": "disk" }), true).await.unwrap();
        assert_eq!(d.write(0, &[6]).await.unwrap_err().kind(), ErrorKind::ReadOnly);
        let zero = d.edge.write_zeroes(ByteRange::new(0, 8), ZeroFlags::default()).await;
        assert_eq!(zero.unwrap_err().kind(), ErrorKind::ReadOnly);
        d.edge.flush().await.unwrap();
        let left = w.after_power_loss(gipfel_io::sim::Keep::Nothing, 1).file("disk").unwrap();
        assert_eq!(left, vec![5; 4096]);
        d.reopen(json!({ "filename": "disk", "discard": "unmap" }), false).await.unwrap();
        d.write(0, &[6]).await.unwrap();
        let e = d.reopen(json!({ "filename": "other" }), true).await.unwrap_err();
        assert!(e.to_string().contains("'filename'"), "{e}");
    });
}

#[test]
fn no_flush_means_none() {
    let w = World::new(7);
    w.put_file("disk", vec![0; 512]);
    w.run(async {
        let d = open("disk", Common { no_flush: true, ..UNMAP }).await;
        d.write(0, &[1; 512]).await.unwrap();
        d.edge.flush().await.unwrap();
        let left = w.after_power_loss(gipfel_io::sim::Keep::Nothing, 1).file("disk").unwrap();
        assert_eq!(left, vec![0; 512]);
    });
}

#[test]
fn auto_read_only_writes_once_somebody_may() {
    let s = Scratch::new("auto");
    let path = s.file("disk", &[1; 4096]);
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            let auto = Common { auto_read_only: true, ..UNMAP };
            let d = open(&path, auto).await;
            let e = d.write(0, &[2; 512]).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::ReadOnly);
            assert!(e.to_string().contains("nobody asked for writing"), "{e}");
            d.perms(Perm::CONSISTENT_READ | Perm::WRITE, Perm::ALL).await.unwrap();
            d.write(0, &[2; 512]).await.unwrap();
            d.edge.flush().await.unwrap();
            assert_eq!(d.read(0, 1024).await, [[2; 512], [1; 512]].concat());
            // Where another file has taken the name meanwhile, writing there would be wrong.
            let d = open(&path, auto).await;
            std::fs::rename(&path, s.path("old")).unwrap();
            std::fs::write(&path, [3; 4096]).unwrap();
            let e = d.perms(Perm::WRITE, Perm::ALL).await.unwrap_err();
            assert!(e.to_string().contains("another file"), "{e}");
        })
        .unwrap();
}

#[test]
fn what_cannot_be_opened_is_refused_with_its_reason() {
    let s = Scratch::new("refuse");
    let fifo = s.arg("fifo");
    tools::run("mkfifo", &[&fifo]);
    let missing = s.arg("missing");
    let folder = s.dir().to_str().unwrap().to_owned();
    let socket = s.arg("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            let reader = Common { read_only: true, ..Common::default() };
            for (path, says) in [
                (&*missing, "No such file"),
                (&*folder, "directory"),
                ("/dev/null", "character device"),
                (&*fifo, "neither a regular file"),
                (&*socket, "No such device or address"),
                ("", "empty"),
                ("nul\0inside", "zero byte"),
                ("/dev/fdset/3", "not offered"),
            ] {
                for common in [Common::default(), reader] {
                    let opened = open_with(json!({ "filename": path }), common).await;
                    let e = opened.err().unwrap_or_else(|| panic!("{path:?} was opened"));
                    let text = e.to_string().to_lowercase();
                    assert!(text.contains(&says.to_lowercase()), "{path:?}: {e}");
                }
            }
            let disk = s.file("disk", &[0; 512]);
            for (options, says) in [
                (json!({ "filename": disk, "no-such": 1 }), "no-such"),
                (json!({ "filename": disk, "aio": "native" }), "cache.direct=on"),
                (json!({ "filename": disk, "pr-manager": "p" }), "not offered"),
                (json!({ "filename": disk, "locking": "maybe" }), "maybe"),
            ] {
                let e = open_with(options, Common::default()).await.err().unwrap();
                assert!(e.to_string().contains(says), "{e}");
            }
        })
        .unwrap();
}

#[test]
fn creating_makes_a_file_of_that_size_and_spares_one_in_use() {
    let s = Scratch::new("create");
    let create = |options: Value| async move {
        (FILE.create.unwrap())(CreateArgs { options, children: Vec::new() }).await
    };
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            for (n, how) in ["off", "falloc", "full"].into_iter().enumerate() {
                for size in [0u64, 1000, 3 << 20] {
                    let path = s.arg(&format!("new-{n}-{size}"));
                    create(json!({ "filename": path, "size": size, "preallocation": how }))
                        .await
                        .unwrap();
                    let d = open(&path, Common::default()).await;
                    assert_eq!(d.node.size(), size);
                    let taken = d.node.driver().info().await.unwrap().allocated.unwrap();
                    assert!(if how == "off" { taken == 0 } else { taken >= size }, "{taken}");
                    assert!(d.read(0, size as usize).await.iter().all(|b| *b == 0));
                }
            }
            let used = s.file("used", &[4; 1000]);
            let d = open(&used, Common::default()).await;
            d.perms(Perm::CONSISTENT_READ | Perm::RESIZE, Perm::CONSISTENT_READ).await.unwrap();
            let e = create(json!({ "filename": used, "size": 5 })).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InUse, "{e}");
            assert_eq!(std::fs::read(&used).unwrap(), [4; 1000]);
            drop(d);
            create(json!({ "filename": used, "size": 5 })).await.unwrap();
            assert_eq!(std::fs::read(&used).unwrap(), [0; 5]);
            let e = create(json!({ "filename": used, "size": 1u64 << 63 })).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
            let into = s.arg("no/such/folder/disk");
            let e = create(json!({ "filename": into, "size": 5 })).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::NotFound, "{e}");
            // What could not be finished is not left behind.
            let big = s.arg("big");
            let wish = json!({ "filename": big, "size": 1u64 << 62, "preallocation": "falloc" });
            assert!(create(wish).await.is_err());
            assert!(!Path::new(&big).exists());
        })
        .unwrap();
}

#[test]
fn limits_tell_what_direct_io_demands() {
    let w = World::new(1);
    w.set_direct_align(4096);
    w.put_file("disk", vec![0; 4096]);
    w.run(async {
        let buffered = open("disk", UNMAP).await.node.driver().limits();
        let direct = open("disk", Common { direct: true, ..UNMAP }).await.node.driver().limits();
        assert_eq!((buffered.align, direct.align), (1, 4096));
    });
}

mod locks;

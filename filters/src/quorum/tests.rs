//! A quorum of disks in memory that fail and rot.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::sim::{Rng, World};
use gipfel_io::time::sleep;
use gipfel_io::{Buf, spawn_local};
use gipfel_node::{
    Ability, Child, Common, Discard, Driver, DriverDef, IoFuture, Kind, Node, OpenArgs, Perm,
    Perms, Report, Reports, Role, Status, WriteFlags, ZeroFlags,
};
use serde_json::{Value, json};

use super::{MAX_CHILDREN, QUORUM, open_reporting};

const SIZE: usize = 64 << 10;

/// What a disk holds, and with which errno it answers (0: it works).
#[derive(Default)]
struct State {
    bytes: Mutex<Vec<u8>>,
    fail_reads: AtomicI32,
    fail_writes: AtomicI32,
    fail_flushes: AtomicI32,
    discards: AtomicU64,
    rng: Mutex<Option<Rng>>,
}

impl State {
    async fn step(&self, errno: &AtomicI32) -> Result<()> {
        let pause = self.rng.lock().unwrap().as_mut().map_or(0, |r| r.below(3000));
        sleep(Duration::from_nanos(pause)).await;
        match errno.load(Ordering::SeqCst) {
            0 => Ok(()),
            n => Err(Error::os(n, "disk")),
        }
    }

    fn flip(&self, at: usize) {
        self.bytes.lock().unwrap()[at] ^= 0x55;
    }

    fn all(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

struct Disk(Arc<State>);

impl Driver for Disk {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            self.0.step(&self.0.fail_reads).await?;
            let at = offset as usize;
            buf.copy_from(0, &self.0.bytes.lock().unwrap()[at..at + buf.len()]);
            Ok(())
        })
    }

    /// In two halves, so that a read can see half a write.
    fn write<'a>(&'a self, offset: u64, buf: Buf, _: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            for half in [0..buf.len() / 2, buf.len() / 2..buf.len()] {
                self.0.step(&self.0.fail_writes).await?;
                let at = offset as usize + half.start;
                let part = buf.slice(half).to_vec();
                self.0.bytes.lock().unwrap()[at..at + part.len()].copy_from_slice(&part);
            }
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, _: ZeroFlags) -> IoFuture<'a> {
        let zeros = Buf::zeroed(range.len() as usize);
        self.write(range.start(), zeros, WriteFlags::default())
    }

    fn zero_ability(&self) -> Ability {
        Ability::Native
    }

    fn discard<'a>(&'a self, _: ByteRange) -> IoFuture<'a> {
        self.0.discards.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move { self.0.step(&self.0.fail_flushes).await })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move {
            self.0.step(&self.0.fail_reads).await?;
            let bytes = self.0.bytes.lock().unwrap();
            let here = &bytes[range.start() as usize..range.end() as usize];
            let zero = here[0] == 0;
            let len = here.iter().position(|b| (*b == 0) != zero).unwrap_or(here.len()) as u64;
            Ok(if zero { Status::hole(len) } else { Status::data(len, Some(range.start())) })
        })
    }
}

static DISK: DriverDef = DriverDef {
    name: "disk",
    kind: Kind::Protocol,
    children: &[],
    open: |_| Box::pin(async { Err(Error::unsupported("for tests")) }),
    create: None,
    probe: None,
    check: None,
};

struct Setup {
    disks: Vec<Arc<State>>,
    reports: Arc<Reports>,
    root: Arc<Child>,
}

fn disks(count: usize, rng: Option<&mut Rng>) -> Vec<Arc<State>> {
    let mut rng = rng;
    let make = |_| {
        let s = State { bytes: Mutex::new(vec![0; SIZE]), ..State::default() };
        *s.rng.lock().unwrap() = rng.as_mut().map(|r| Rng::new(r.next_u64()));
        Arc::new(s)
    };
    (0..count).map(make).collect()
}

async fn open(disks: &[Arc<State>], options: Value, common: Common) -> Result<Setup> {
    let children = disks.iter().enumerate().map(|(i, s)| {
        let node = Node::new(format!("d{i}"), &DISK, Box::new(Disk(s.clone())));
        let edge = Child::new(format!("q.children.{i}"), Some(node));
        edge.grant(Perm::WRITE | Perm::CONSISTENT_READ);
        edge
    });
    let reports = Arc::<Reports>::default();
    let args = OpenArgs { node_name: "q".into(), options, common, children: children.collect() };
    let driver = open_reporting(args, reports.clone()).await?.driver;
    let node = Node::new("q".into(), &QUORUM, driver);
    let root = Child::new("client.root", Some(node));
    Ok(Setup { disks: disks.to_vec(), reports, root })
}

async fn three(options: Value) -> Setup {
    let mut o = json!({ "vote-threshold": 2 });
    o.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    open(&disks(3, None), o, Common::default()).await.unwrap()
}

impl Setup {
    async fn read(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        let buf = Buf::new(len);
        self.root.read(at, buf.clone()).await?;
        Ok(buf.to_vec())
    }

    async fn write(&self, at: u64, byte: u8, len: usize) -> Result<()> {
        self.root.write(at, Buf::from_slice(&vec![byte; len]), WriteFlags::default()).await
    }

    /// The reports so far, each as `event`, `type`, node or reference, and whether with an error.
    fn said(&self) -> Vec<String> {
        let line = |r: Report| {
            let text = |k: &str| r.data[k].as_str().unwrap_or("-").to_owned();
            let (first, count) = (&r.data["sector-num"], &r.data["sectors-count"]);
            match r.event {
                "QUORUM_FAILURE" => format!("failure {} {first}+{count}", text("reference")),
                _ => format!(
                    "bad {} {} {first}+{count} {}",
                    text("type"),
                    text("node-name"),
                    if r.data["error"].is_string() { "error" } else { "differs" }
                ),
            }
        };
        std::iter::from_fn(|| self.reports.take()).map(line).collect()
    }
}

fn sim<F: Future>(f: impl FnOnce() -> F) -> F::Output {
    World::new(1).run(async { f().await })
}

#[test]
fn options_that_make_no_sense_are_refused() {
    sim(|| async {
        let with = |count: usize, o: Value| async move {
            open(&disks(count, None), o, Common::default()).await.err().map(|e| e.to_string())
        };
        let t = |n: i64| json!({ "vote-threshold": n });
        for (count, o, says) in [
            (3, t(0), "vote-threshold 0 must lie between 1 and the number of children, 3"),
            (3, t(-1), "vote-threshold -1"),
            (3, t(4), "vote-threshold 4"),
            (0, t(1), "at least one child"),
            (MAX_CHILDREN + 1, t(1), "at most 64"),
            (3, json!({}), "vote-threshold"),
            (3, json!({ "vote-threshold": 2, "blkverify": true }), "exactly two"),
            (2, json!({ "vote-threshold": 1, "blkverify": true }), "vote-threshold 2"),
            (
                2,
                json!({ "vote-threshold": 2, "blkverify": true, "rewrite-corrupted": true }),
                "set only one of them",
            ),
            (3, json!({ "vote-threshold": 2, "nonsense": 1 }), "nonsense"),
        ] {
            let e = with(count, o).await.expect(says);
            assert!(e.contains(says), "'{e}' does not say '{says}'");
        }
        assert_eq!(with(1, t(1)).await, None);
        assert_eq!(with(2, json!({ "vote-threshold": 2, "blkverify": true })).await, None);
        let fifo = json!({ "vote-threshold": 2, "blkverify": true, "read-pattern": "fifo" });
        assert_eq!(with(3, fifo).await, None, "as the reference: it has no meaning there");
    });
}

#[test]
fn the_most_votes_win() {
    sim(|| async {
        let q = three(json!({})).await;
        q.write(0, 7, 4096).await.unwrap();
        assert_eq!(q.read(0, 4096).await.unwrap(), [7; 4096]);
        assert!(q.said().is_empty());
        for rotten in 0..3 {
            q.disks[rotten].flip(1000);
            assert_eq!(q.read(512, 1024).await.unwrap(), [7; 1024], "disk {rotten} is outvoted");
            assert_eq!(q.said(), [format!("bad read d{rotten} 1+2 differs")]);
            assert_eq!(q.disks[rotten].all()[1000], 7 ^ 0x55, "it stays as it is");
            q.disks[rotten].flip(1000);
        }
        q.disks[0].flip(0);
        q.disks[1].flip(1);
        let e = q.read(0, 512).await.unwrap_err();
        assert_eq!((e.kind(), e.errno()), (ErrorKind::Corrupt, 5));
        assert!(e.to_string().contains("only 1 agree at 0x0, and vote-threshold is 2"), "{e}");
        assert_eq!(q.said(), ["failure q 0+1"]);
        assert_eq!(q.read(512, 512).await.unwrap(), [7; 512], "elsewhere all is well");
    });
}

#[test]
fn a_rotten_child_is_healed() {
    sim(|| async {
        let q = three(json!({ "rewrite-corrupted": true })).await;
        q.write(0, 3, 8192).await.unwrap();
        for rotten in 0..3 {
            q.disks[rotten].flip(700);
            assert_eq!(q.read(0, 4096).await.unwrap(), [3; 4096]);
            assert_eq!(q.said(), [format!("bad read d{rotten} 0+8 differs")]);
            assert_eq!(q.disks[rotten].all()[..8192], [3; 8192]);
        }
        q.disks[2].flip(0);
        q.disks[2].fail_writes.store(5, Ordering::SeqCst);
        assert_eq!(
            q.read(0, 512).await.unwrap(),
            [3; 512],
            "healing it is not the reader's affair"
        );
        assert_eq!(q.said(), ["bad read d2 0+1 differs"]);
    });
}

#[test]
fn errors_are_no_votes() {
    sim(|| async {
        let q = three(json!({})).await;
        q.write(0, 1, 512).await.unwrap();
        q.disks[0].fail_reads.store(5, Ordering::SeqCst);
        assert_eq!(q.read(0, 512).await.unwrap(), [1; 512]);
        assert_eq!(q.said(), ["bad read d0 0+1 error"]);
        q.disks[1].flip(0);
        let e = q.read(0, 512).await.unwrap_err();
        assert!(e.to_string().contains("2 children that could be read only 1 agree"), "{e}");
        q.said();
        q.disks[1].fail_reads.store(28, Ordering::SeqCst);
        q.disks[2].fail_reads.store(28, Ordering::SeqCst);
        let e = q.read(0, 512).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoSpace, "most have this one: {e}");
        let bad = |n| format!("bad read d{n} 0+1 error");
        assert_eq!(q.said(), [bad(0), bad(1), bad(2), "failure q 0+1".into()]);
    });
}

#[test]
fn writes_and_flushes_need_as_many_as_votes() {
    sim(|| async {
        let q = three(json!({})).await;
        q.disks[1].fail_writes.store(5, Ordering::SeqCst);
        q.write(512, 1, 1024).await.unwrap();
        assert_eq!(q.said(), ["bad write d1 1+2 error"]);
        q.root.write_zeroes(ByteRange::new(512, 512), ZeroFlags::default()).await.unwrap();
        assert_eq!(q.said(), ["bad write d1 1+1 error"]);
        q.disks[0].fail_writes.store(28, Ordering::SeqCst);
        q.disks[1].fail_writes.store(28, Ordering::SeqCst);
        assert_eq!(q.write(0, 1, 512).await.unwrap_err().kind(), ErrorKind::NoSpace);
        assert_eq!(q.said().last().unwrap(), "failure q 0+1");
        q.disks[2].fail_flushes.store(5, Ordering::SeqCst);
        q.root.flush().await.unwrap();
        assert_eq!(q.said(), ["bad flush d2 0+0 error"]);
        q.disks[1].fail_flushes.store(5, Ordering::SeqCst);
        assert_eq!(q.root.flush().await.unwrap_err().errno(), 5);
        assert_eq!(q.said(), ["bad flush d1 0+0 error", "bad flush d2 0+0 error"]);
    });
}

#[test]
fn fifo_asks_one_after_the_other() {
    sim(|| async {
        let q = three(json!({ "read-pattern": "fifo" })).await;
        q.write(0, 9, 512).await.unwrap();
        q.disks[1].flip(0);
        assert_eq!(q.read(0, 512).await.unwrap(), [9; 512]);
        assert!(q.said().is_empty(), "nobody else is asked");
        q.disks[0].fail_reads.store(5, Ordering::SeqCst);
        assert_eq!(q.read(0, 512).await.unwrap()[0], 9 ^ 0x55, "the second one decides alone");
        assert_eq!(q.said(), ["bad read d0 0+1 error"]);
        q.disks[1].fail_reads.store(5, Ordering::SeqCst);
        q.disks[2].fail_reads.store(28, Ordering::SeqCst);
        assert_eq!(q.read(0, 512).await.unwrap_err().errno(), 5);
        assert_eq!(q.said().last().unwrap(), "failure q 0+1");
    });
}

#[test]
fn blkverify_says_where_the_two_differ() {
    sim(|| async {
        let o = json!({ "vote-threshold": 2, "blkverify": true });
        let q = open(&disks(2, None), o, Common::default()).await.unwrap();
        q.write(0, 1, 4096).await.unwrap();
        q.disks[1].flip(2050);
        let e = q.read(1024, 2048).await.unwrap_err();
        let says = "'q.children.0' and 'q.children.1' differ at byte 0x802";
        assert!(e.to_string().contains(says), "{e}");
        assert_eq!(q.said(), ["failure q 2+4"]);
    });
}

#[test]
fn zeros_reach_all_and_discards_leave_no_difference() {
    sim(|| async {
        let o = json!({ "vote-threshold": 2 });
        let unmap = Common { discard: Discard::Unmap, ..Common::default() };
        for (common, byte) in [(Common::default(), 5), (unmap, 0)] {
            let q = open(&disks(3, None), o.clone(), common).await.unwrap();
            q.write(0, 5, 4096).await.unwrap();
            q.root.discard(ByteRange::new(0, 2048)).await.unwrap();
            assert_eq!(q.read(0, 2048).await.unwrap(), [byte; 2048]);
            assert_eq!(q.disks[1].discards.load(Ordering::SeqCst), 0);
            assert!(q.said().is_empty());
        }
        let q = three(json!({})).await;
        q.write(0, 5, 4096).await.unwrap();
        q.root.write_zeroes(ByteRange::new(1024, 1024), ZeroFlags::default()).await.unwrap();
        let s = |at| q.root.status(ByteRange::new(at, 3000));
        assert_eq!(s(1024).await.unwrap(), Status::hole(1024));
        assert_eq!(s(0).await.unwrap(), Status::data(1024, None));
        q.disks[2].flip(1500);
        assert_eq!(s(1024).await.unwrap().len, 476, "up to where the first one knows otherwise");
        assert!(!s(1500).await.unwrap().zero, "one child that contradicts is enough");
        q.disks[2].fail_reads.store(5, Ordering::SeqCst);
        assert!(!s(1024).await.unwrap().zero, "and so is one that cannot be asked");
    });
}

#[test]
fn permissions_are_what_the_parents_use() {
    sim(|| async {
        let above = Perms { used: Perm::CONSISTENT_READ, shared: Perm::ALL };
        let writer = Perms { used: Perm::CONSISTENT_READ | Perm::WRITE, ..above };
        for (heals, expected) in [(false, Perm::CONSISTENT_READ), (true, writer.used)] {
            let q = three(json!({ "rewrite-corrupted": heals })).await;
            let node = q.root.node().await.unwrap();
            let used = |p, writable| node.driver().child_perms(0, Role::Copy, p, writable).used;
            assert_eq!(used(above, true), expected);
            assert_eq!(used(above, false), Perm::CONSISTENT_READ);
            assert_eq!(used(writer, true), writer.used);
            assert_eq!(used(Perms::IDLE, true), Perm::NONE);
        }
    });
}

/// Whoever drains the set waits for all requests inside; later ones use the set that comes then.
#[test]
fn requests_hold_the_set_that_they_began_with() {
    for seed in 0..30 {
        World::new(seed).run(async {
            let disks = disks(3, Some(&mut Rng::new(seed)));
            let o = json!({ "vote-threshold": 2 });
            let q = Arc::new(open(&disks, o, Common::default()).await.unwrap());
            let ended = Arc::new(AtomicU64::new(0));
            let tasks: Vec<_> = (0..4)
                .map(|kind| {
                    let (q, ended, range) = (q.clone(), ended.clone(), ByteRange::new(0, 4096));
                    spawn_local(async move {
                        match kind {
                            0 => q.write(0, 1, 4096).await.unwrap(),
                            1 => drop(q.read(0, 4096).await.unwrap()),
                            2 => drop(q.root.status(range).await.unwrap()),
                            _ => q.root.write_zeroes(range, ZeroFlags::default()).await.unwrap(),
                        }
                        ended.fetch_add(1, Ordering::SeqCst);
                    })
                })
                .collect();
            sleep(Duration::from_nanos(1)).await;
            let node = q.root.node().await.unwrap();
            let mut drained = node.driver().copies().unwrap().drain().await;
            let inside = disks[2].all();
            let left = drained.get()[..2].to_vec();
            drained.replace(left.into());
            drop(drained);
            q.write(0, 7, 4096).await.unwrap();
            for t in tasks {
                t.await;
            }
            assert_eq!(ended.load(Ordering::SeqCst), 4);
            assert!(disks[2].all() == inside, "seed {seed}: written after it had gone");
            assert_eq!(disks[0].all()[..4096], [7; 4096]);
        });
    }
}

/// Writers that overlap, readers among them, and (with `rots`) one child that goes bad: no read
/// fails or is wrong, no child but the bad one is blamed, and in the end all hold the same.
fn history(seed: u64, rots: bool) {
    World::new(seed).run(async {
        let mut rng = Rng::new(seed);
        let disks = disks(3, Some(&mut rng));
        let o = json!({ "vote-threshold": 2, "rewrite-corrupted": rots });
        let q = Arc::new(open(&disks, o, Common::default()).await.unwrap());
        let rotten = rng.below(3) as usize;
        let tasks: Vec<_> = (0..6)
            .map(|w| {
                let (q, mut rng) = (q.clone(), Rng::new(seed * 97 + w));
                spawn_local(async move {
                    for _ in 0..25 {
                        let at = rng.below(6) * 256;
                        let len = 512 * (1 + rng.below(3) as usize);
                        match rng.below(3) {
                            0 => q.write(at, 1 + w as u8, len).await.unwrap(),
                            1 if rots => q.disks[rotten].flip(at as usize),
                            _ => {
                                let seen = q.read(at, len).await.expect("reads go on");
                                assert!(seen.iter().all(|b| *b <= 6), "rotten bytes were read");
                            }
                        }
                    }
                })
            })
            .collect();
        for t in tasks {
            t.await;
        }
        q.read(0, 8192).await.unwrap();
        for line in q.said() {
            assert!(rots && line.starts_with(&format!("bad read d{rotten} ")), "{line}");
        }
        let all: Vec<_> = disks.iter().map(|d| d.all()).collect();
        assert!(all[0] == all[1] && all[1] == all[2], "the children differ");
    });
}

#[test]
fn under_load_nobody_is_blamed_wrongly() {
    for seed in 0..150 {
        let run = std::panic::catch_unwind(|| history(seed, seed % 2 == 0));
        assert!(run.is_ok(), "history with seed {seed} failed");
    }
}

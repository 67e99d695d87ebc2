//! Copy-before-write in the simulated world: under writers the moment stays, byte for byte; each
//! granule is copied once; failures and late copies cost what the options say.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use gipfel_base::{ByteRange, ErrorKind, Result};
use gipfel_io::sim::{Rng, World};
use gipfel_io::{Buf, spawn_local, time};
use gipfel_node::{
    Access, Child, Mapping, Node, OpenArgs, Perm, Perms, Role, SnapshotSource, WriteFlags,
    ZeroFlags,
};
use serde_json::{Value, json};

use super::granules::{Granules, Place};
use super::{COPY_BEFORE_WRITE, MIN_GRANULE};
use crate::testing::{BLOCK, Seen, overlay};

/// Bytes of the disk: some granules, the last of them cut short.
const SIZE: u64 = 10 * MIN_GRANULE + 7 * BLOCK;
const BLOCKS: u64 = SIZE / BLOCK;
const SECOND: u64 = 1_000_000_000;

/// A disk under the filter, with its clients' edge.
struct Disk {
    root: Arc<Child>,
    filter: Arc<Node>,
    disk: Arc<Seen>,
    target: Arc<Seen>,
}

impl Disk {
    fn moment(&self) -> &dyn SnapshotSource {
        self.filter.driver().snapshot_source().unwrap()
    }

    async fn old(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let buf = Buf::new(len as usize);
        self.moment().read(at, buf.clone()).await?;
        Ok(buf.to_vec())
    }

    async fn write(&self, at: u64, byte: u8) -> Result<()> {
        let bytes = Buf::from_slice(&[byte; BLOCK as usize]);
        self.root.write(at, bytes, WriteFlags::default()).await
    }

    /// Copies that reached the target.
    fn copies(&self) -> u64 {
        self.target.count(|s| &s.writes) + self.target.count(|s| &s.zeroes)
    }
}

/// The byte of a block before any write; some granules are zero.
fn first(block: u64) -> u8 {
    if (block * BLOCK / MIN_GRANULE).is_multiple_of(3) { 0 } else { 1 + (block % 100) as u8 }
}

fn args(children: Vec<Arc<Child>>, options: Value) -> OpenArgs {
    OpenArgs { node_name: "cbw".into(), options, common: Default::default(), children }
}

/// The filter over a filled disk; requests take up to `slowest` nanoseconds, the target's up to
/// the second number.
async fn disk([slowest, late]: [u64; 2], options: Value) -> Disk {
    let (below, disk) = overlay("disk", SIZE, None, slowest);
    let fill = Child::new("fill", Some(below.clone()));
    for b in 0..BLOCKS {
        let bytes = Buf::from_slice(&[first(b); BLOCK as usize]);
        fill.write(b * BLOCK, bytes, WriteFlags::default()).await.unwrap();
    }
    let (beside, target) = overlay("target", SIZE, None, late);
    let children =
        vec![Child::new("cbw.file", Some(below)), Child::new("cbw.target", Some(beside))];
    let opened = (COPY_BEFORE_WRITE.open)(args(children, options)).await.unwrap();
    let filter = Node::new("cbw".into(), &COPY_BEFORE_WRITE, opened.driver);
    let root = Child::new("client.root", Some(filter.clone()));
    Disk { root, filter, disk, target }
}

async fn write_randomly(d: &Disk, rng: &mut Rng, model: &RefCell<Vec<u8>>, mine: [u64; 2]) {
    // Writers have blocks of their own, so that the model knows the outcome.
    let block = mine[0] + rng.below(BLOCKS / mine[1]) * mine[1];
    let n = if mine[1] == 1 { 1 + rng.below(300) } else { 1 };
    let range = ByteRange::between(block, (block + n).min(BLOCKS));
    let bytes = ByteRange::new(range.start() * BLOCK, range.len() * BLOCK);
    let byte = match rng.below(4) {
        0 => {
            d.root.write_zeroes(bytes, ZeroFlags::default()).await.unwrap();
            0
        }
        1 => {
            d.root.discard(bytes).await.unwrap();
            return;
        }
        _ => {
            let byte = rng.below(256) as u8;
            let buf = Buf::from_slice(&vec![byte; bytes.len() as usize]);
            d.root.write(bytes.start(), buf, WriteFlags::default()).await.unwrap();
            byte
        }
    };
    model.borrow_mut()[range.start() as usize..range.end() as usize].fill(byte);
}

#[test]
fn the_moment_stays_under_writers() {
    for seed in 0..20 {
        World::new(seed).run(async move {
            let d = Rc::new(disk([5_000, 5_000], json!({})).await);
            let model = Rc::new(RefCell::new((0..BLOCKS).map(first).collect::<Vec<u8>>()));
            let ended = Rc::new(Cell::new(false));
            let writers = [1, 5][seed as usize % 2];
            let mut tasks: Vec<_> = (0..writers)
                .map(|w| {
                    let (d, model) = (d.clone(), model.clone());
                    spawn_local(async move {
                        let mut rng = Rng::new(seed * 100 + w);
                        for _ in 0..40 {
                            write_randomly(&d, &mut rng, &model, [w, writers]).await;
                        }
                    })
                })
                .collect();
            let readers: Vec<_> = (0..2)
                .map(|r| {
                    let (d, ended) = (d.clone(), ended.clone());
                    spawn_local(async move {
                        let mut rng = Rng::new(seed * 100 + 50 + r);
                        while !ended.get() {
                            let start = rng.below(BLOCKS);
                            let n = (1 + rng.below(200)).min(BLOCKS - start);
                            let seen = d.old(start * BLOCK, n * BLOCK).await.unwrap();
                            for (i, b) in seen.chunks(BLOCK as usize).enumerate() {
                                let block = start + i as u64;
                                let wanted = [first(block); BLOCK as usize];
                                assert_eq!(b, wanted, "seed {seed}: block {block}");
                            }
                        }
                    })
                })
                .collect();
            for t in tasks.drain(..) {
                t.await;
            }
            ended.set(true);
            for r in readers {
                r.await;
            }
            let granules = SIZE.div_ceil(MIN_GRANULE);
            assert!(d.copies() <= granules, "seed {seed}: {} copies", d.copies());
            let now = Buf::new(SIZE as usize);
            d.root.read(0, now.clone()).await.unwrap();
            let firsts: Vec<u8> = now.to_vec().chunks(BLOCK as usize).map(|b| b[0]).collect();
            assert_eq!(firsts, *model.borrow(), "seed {seed}: the disk itself");
        });
    }
}

/// A read of the moment that succeeds is right, also while the moment is being lost.
#[test]
fn a_moment_that_is_lost_shows_nothing_wrong() {
    let mut failed = 0;
    for seed in 0..40 {
        failed += World::new(seed).run(async move {
            let options = json!({ "on-cbw-error": "break-snapshot" });
            let d = Rc::new(disk([5_000, 1_000], options).await);
            let readers: Vec<_> = (0..8)
                .map(|r| {
                    let d = d.clone();
                    spawn_local(async move {
                        let mut rng = Rng::new(seed * 100 + r);
                        let mut failed = 0;
                        for _ in 0..20 {
                            let at = rng.below(10) * MIN_GRANULE;
                            let Ok(bytes) = d.old(at, MIN_GRANULE).await else {
                                failed += 1;
                                continue;
                            };
                            for (i, b) in bytes.chunks(BLOCK as usize).enumerate() {
                                let block = at / BLOCK + i as u64;
                                assert_eq!(b[0], first(block), "seed {seed}: {block}");
                            }
                        }
                        failed
                    })
                })
                .collect();
            let mut rng = Rng::new(seed + 1_000_000);
            for i in 0..200 {
                if i == 10 {
                    d.target.fail_writes.store(true, Ordering::SeqCst);
                }
                d.write(rng.below(BLOCKS) * BLOCK, 255).await.unwrap();
            }
            let mut failed = 0;
            for r in readers {
                failed += r.await;
            }
            failed
        });
    }
    assert!(failed > 0, "some came too late");
}

#[test]
fn one_copy_for_each_granule_and_none_for_what_changes_nothing() {
    World::new(1).run(async {
        let d = Rc::new(disk([1_000, 1_000], json!({})).await);
        let bytes = || Buf::from_slice(&[7; BLOCK as usize]);
        let unchanged = WriteFlags { unchanged: true, ..WriteFlags::default() };
        d.root.write(0, bytes(), unchanged).await.unwrap();
        let zeros = ZeroFlags { unchanged: true, ..ZeroFlags::default() };
        d.root.write_zeroes(ByteRange::new(0, BLOCK), zeros).await.unwrap();
        assert_eq!(d.copies(), 0);
        // Several writers at once, one granule: one copy, and all of them wait for it.
        let tasks: Vec<_> = (0..8)
            .map(|i| {
                let d = d.clone();
                spawn_local(async move {
                    d.write(MIN_GRANULE + i * BLOCK, 9).await.unwrap();
                    assert_eq!(d.copies(), 1);
                })
            })
            .collect();
        for t in tasks {
            t.await;
        }
        // A granule of zeros is kept as zeros; the last one is cut short.
        d.root.discard(ByteRange::new(9 * MIN_GRANULE + BLOCK, BLOCK)).await.unwrap();
        assert_eq!(d.target.count(|s| &s.zeroes), 1);
        d.write(SIZE - BLOCK, 1).await.unwrap();
        assert_eq!(d.copies(), 3);
        assert_eq!(d.old(SIZE - BLOCK, BLOCK).await.unwrap()[0], first(BLOCKS - 1));
        // What changes many granules copies those that are not.
        d.root.write_zeroes(ByteRange::new(0, SIZE), ZeroFlags::default()).await.unwrap();
        let all = d.old(0, SIZE).await.unwrap();
        let firsts: Vec<u8> = all.chunks(BLOCK as usize).map(|b| b[0]).collect();
        let mut wanted: Vec<u8> = (0..BLOCKS).map(first).collect();
        // It was said to change nothing; so what is there now is as good.
        wanted[0] = 0;
        assert_eq!(firsts, wanted);
    });
}

#[test]
fn a_failed_copy_costs_the_write_or_the_snapshot() {
    for policy in ["break-guest-write", "break-snapshot"] {
        World::new(2).run(async move {
            let d = disk([0, 0], json!({ "on-cbw-error": policy })).await;
            d.write(MIN_GRANULE, 9).await.unwrap();
            d.target.fail_writes.store(true, Ordering::SeqCst);
            let done = d.write(4 * MIN_GRANULE, 9).await;
            d.target.fail_writes.store(false, Ordering::SeqCst);
            let now = Buf::new(BLOCK as usize);
            d.root.read(4 * MIN_GRANULE, now.clone()).await.unwrap();
            if policy == "break-guest-write" {
                let e = done.unwrap_err();
                assert!(e.to_string().contains("'cbw.target' before it is written"), "{e}");
                assert_eq!(now.to_vec()[0], first(4 * MIN_GRANULE / BLOCK));
                d.write(4 * MIN_GRANULE, 9).await.unwrap();
                let old = d.old(4 * MIN_GRANULE, BLOCK).await.unwrap();
                assert_eq!(old[0], first(4 * MIN_GRANULE / BLOCK));
            } else {
                done.unwrap();
                assert_eq!(now.to_vec()[0], 9);
                // Nothing of it is shown any more, be it copied or not.
                for granule in [1, 4, 7] {
                    let e = d.old(granule * MIN_GRANULE, BLOCK).await.unwrap_err();
                    assert!(e.to_string().contains("the snapshot is lost"), "{e}");
                    assert_eq!(e.errno(), 5);
                }
                let r = ByteRange::new(0, BLOCK);
                d.moment().status(r).await.expect_err("nor is its status known");
                let before = d.copies();
                d.write(7 * MIN_GRANULE, 9).await.unwrap();
                assert_eq!(d.copies(), before, "a lost snapshot costs nothing more");
            }
        });
    }
}

#[test]
fn a_late_copy_costs_the_same() {
    for policy in ["break-guest-write", "break-snapshot"] {
        World::new(4).run(async move {
            let options = json!({ "on-cbw-error": policy, "cbw-timeout": 2 });
            let d = disk([0, 100 * SECOND], options).await;
            let start = time::Instant::now();
            let done = d.write(4 * MIN_GRANULE, 9).await;
            let waited = time::Instant::now().since(start);
            assert_eq!(waited.as_secs(), 2, "{policy}: {waited:?}");
            if policy == "break-snapshot" {
                done.unwrap();
                d.old(0, BLOCK).await.expect_err("the snapshot is lost");
            } else {
                let e = done.unwrap_err();
                assert!(e.to_string().contains("not copied within 2 s"), "{e}");
                assert_eq!(e.errno(), 110);
                d.write(4 * MIN_GRANULE, 9).await.expect_err("the copy is still under way");
                time::sleep(Duration::from_secs(4000)).await;
                assert_eq!(d.copies(), 1, "the late copy serves those who come later");
                d.write(4 * MIN_GRANULE, 9).await.unwrap();
                let old = d.old(4 * MIN_GRANULE, BLOCK).await.unwrap();
                assert_eq!(old[0], first(4 * MIN_GRANULE / BLOCK));
            }
            // The node is not closed before a copy that nobody waits for has ended.
            let _ = d.write(7 * MIN_GRANULE, 9).await;
            d.filter.driver().close().await.unwrap();
            let m = d.filter.driver().map(Access::Write, ByteRange::new(7 * MIN_GRANULE, BLOCK));
            assert!(matches!(m, Mapping::Child { .. }), "it has been copied meanwhile");
        });
    }
}

#[test]
fn what_nobody_wants_any_more_is_not_kept() {
    World::new(5).run(async {
        let d = disk([1_000, 1_000], json!({})).await;
        d.write(MIN_GRANULE, 9).await.unwrap();
        // Granules 1 and 2 whole, 3 in part.
        let r = ByteRange::new(MIN_GRANULE - BLOCK, 3 * MIN_GRANULE);
        d.moment().discard(r).await.unwrap();
        assert_eq!(d.target.count(|s| &s.discards), 1, "the target's space is given back");
        let copies = d.copies();
        for granule in [1, 2] {
            d.write(granule * MIN_GRANULE, 8).await.unwrap();
            let e = d.old(granule * MIN_GRANULE, BLOCK).await.unwrap_err();
            assert!(e.to_string().contains("was discarded"), "{e}");
            let s = d.moment().status(ByteRange::new(granule * MIN_GRANULE, BLOCK)).await.unwrap();
            assert!(!s.data && !s.zero, "what cannot be read is neither data nor zeros: {s:?}");
        }
        assert_eq!(d.copies(), copies);
        let across = d.old(0, 2 * MIN_GRANULE).await;
        across.expect_err("a read that touches it fails");
        for granule in [0, 3] {
            d.write(granule * MIN_GRANULE, 8).await.unwrap();
            let old = d.old(granule * MIN_GRANULE, MIN_GRANULE).await.unwrap();
            assert_eq!(old[0], first(granule * MIN_GRANULE / BLOCK));
        }
        assert_eq!(d.copies(), copies + 2);
        // The last granule is whole although it is short.
        d.moment().discard(ByteRange::new(10 * MIN_GRANULE, 7 * BLOCK)).await.unwrap();
        d.old(SIZE - BLOCK, BLOCK).await.expect_err("it was discarded");
    });
}

#[test]
fn status_is_that_of_the_moment() {
    World::new(6).run(async {
        let d = disk([0, 0], json!({})).await;
        d.root.write_zeroes(ByteRange::new(0, SIZE), ZeroFlags::default()).await.unwrap();
        d.disk.no_zeroes.store(true, Ordering::SeqCst);
        let (mut at, mut found) = (0, Vec::new());
        while at < SIZE {
            let s = d.moment().status(ByteRange::new(at, SIZE - at)).await.unwrap();
            assert!(s.allocated && s.len >= 1, "{s:?}");
            found.push(s);
            at += s.len;
        }
        assert_eq!(at, SIZE);
    });
}

#[test]
fn permissions() {
    World::new(7).run(async {
        let d = disk([0, 0], json!({})).await;
        let perms = |i, above| d.filter.driver().child_perms(i, Role::Filtered, above, true);
        for i in [0, 1] {
            assert_eq!(perms(i, Perms::IDLE), Perms::IDLE, "it can be put in under writers");
        }
        let guest = Perms { used: Perm::WRITE, shared: Perm::ALL };
        assert!(perms(0, guest).used.contains(Perm::WRITE | Perm::CONSISTENT_READ));
        assert!(!perms(0, guest).shared.contains(Perm::WRITE), "nobody writes past it");
        assert!(perms(1, guest).used.contains(Perm::WRITE));
        let reader = Perms { used: Perm::CONSISTENT_READ, shared: Perm::ALL };
        assert!(!perms(0, reader).shared.contains(Perm::WRITE));
    });
}

#[test]
fn options_that_make_no_sense_are_refused() {
    World::new(8).run(async {
        for (options, room, kind, says) in [
            (json!({ "min-cluster-size": 3 }), SIZE, ErrorKind::InvalidInput, "power of two"),
            (json!({ "min-cluster-size": 1u64 << 40 }), SIZE, ErrorKind::InvalidInput, "1 GiB"),
            (json!({ "on-cbw-error": "x" }), SIZE, ErrorKind::InvalidInput, "on-cbw-error"),
            (json!({ "other": 1 }), SIZE, ErrorKind::InvalidInput, "other"),
            (
                json!({ "bitmap": { "node": "n", "name": "b" } }),
                SIZE,
                ErrorKind::Unsupported,
                "needs dirty bitmaps",
            ),
            (json!({}), SIZE - BLOCK, ErrorKind::InvalidInput, "less than the"),
            (json!({}), 0, ErrorKind::InvalidInput, "are the same node"),
        ] {
            let (below, _) = overlay("disk", SIZE, None, 0);
            let beside = if room == 0 { below.clone() } else { overlay("t", room, None, 0).0 };
            let children =
                vec![Child::new("cbw.file", Some(below)), Child::new("cbw.target", Some(beside))];
            let e = (COPY_BEFORE_WRITE.open)(args(children, options)).await.err().expect(says);
            assert!(e.kind() == kind && e.to_string().contains(says), "{e} does not say {says}");
        }
    });
}

#[test]
fn a_larger_granule_is_copied_as_one() {
    World::new(9).run(async {
        let d = disk([0, 0], json!({ "min-cluster-size": 4 * MIN_GRANULE })).await;
        d.write(5 * MIN_GRANULE, 9).await.unwrap();
        d.write(6 * MIN_GRANULE, 9).await.unwrap();
        assert_eq!(d.copies(), 1);
        let old = d.old(4 * MIN_GRANULE, 4 * MIN_GRANULE).await.unwrap();
        let firsts: Vec<u8> = old.chunks(BLOCK as usize).map(|b| b[0]).collect();
        let blocks = 4 * MIN_GRANULE / BLOCK..8 * MIN_GRANULE / BLOCK;
        assert_eq!(firsts, blocks.map(first).collect::<Vec<_>>());
    });
}

#[test]
fn places_are_those_of_a_model() {
    for seed in 0..50 {
        let mut rng = Rng::new(seed);
        let granule = 1 << rng.below(4);
        let size = 1 + rng.below(1000);
        let g = Granules::new(size, granule).unwrap();
        let mut model = vec![Place::Source; size as usize];
        for _ in 0..100 {
            let start = rng.below(size);
            let r = ByteRange::new(start, 1 + rng.below(size - start));
            match rng.below(8) {
                0 => {
                    let whole = g.around(r);
                    assert!(whole.contains(r), "seed {seed}");
                    g.set_done(whole);
                    for m in &mut model[whole.start() as usize..whole.end() as usize] {
                        *m = if *m == Place::Dropped { *m } else { Place::Target };
                    }
                }
                1 => {
                    let whole = g.set_dropped(r).unwrap();
                    assert!(r.contains(whole), "seed {seed}");
                    model[whole.start() as usize..whole.end() as usize].fill(Place::Dropped);
                }
                _ => {
                    let (place, len) = g.place(r);
                    assert!((1..=r.len()).contains(&len), "seed {seed}");
                    let same = &model[start as usize..(start + len) as usize];
                    assert!(same.iter().all(|m| *m == place), "seed {seed}: {r:?} {place:?} {len}");
                }
            }
        }
    }
}

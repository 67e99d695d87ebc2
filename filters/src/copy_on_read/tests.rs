//! Copy-on-read over an overlay in memory, in the simulated world: what is copied, and that a
//! guest's write always wins.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use gipfel_base::ByteRange;
use gipfel_io::sim::{Rng, World};
use gipfel_io::{Buf, spawn_local};
use gipfel_node::perm::Perms;
use gipfel_node::{Child, Perm, Role, WriteFlags, ZeroFlags};

use super::{COPY_ON_READ, make};
use crate::testing::{BLOCK, CLUSTER, Seen, overlay, stack};

const BLOCKS: u64 = 64;

/// A copy-on-read filter on an overlay on a base whose byte at block `i` is `i + 100`.
async fn chain(slowest: u64) -> (Arc<Child>, Arc<Child>, Arc<Seen>, Arc<Seen>) {
    let (base, below) = overlay("base", BLOCKS * BLOCK, None, slowest);
    let to_base = Child::new("test", Some(base.clone()));
    for i in 0..BLOCKS {
        let bytes = Buf::from_slice(&[i as u8 + 100; BLOCK as usize]);
        to_base.write(i * BLOCK, bytes, WriteFlags::default()).await.unwrap();
    }
    let (top, seen) = overlay("top", BLOCKS * BLOCK, Some(base), slowest);
    let (root, edge) = stack(&COPY_ON_READ, Some(top), make);
    edge.grant(Perm::CONSISTENT_READ | Perm::WRITE | Perm::WRITE_UNCHANGED);
    (root, edge, seen, below)
}

async fn read(root: &Child, at: u64, len: u64) -> Vec<u8> {
    let buf = Buf::new(len as usize);
    root.read(at, buf.clone()).await.unwrap();
    buf.to_vec()
}

#[test]
fn what_comes_from_below_is_kept_in_whole_clusters() {
    World::new(1).run(async {
        let (root, edge, top, below) = chain(0).await;
        assert_eq!(read(&root, CLUSTER + 10, 5).await, [104; 5]);
        assert_eq!(top.count(|s| &s.writes), 0, "a copy says that it changes nothing");
        for i in 0..12 {
            let s = edge.status(ByteRange::new(i * BLOCK, BLOCK)).await.unwrap();
            assert_eq!(s.allocated, (4..8).contains(&i), "block {i}");
        }
        let before = below.count(|s| &s.reads);
        assert_eq!(read(&root, CLUSTER, CLUSTER).await[..3], [104; 3]);
        assert_eq!(below.count(|s| &s.reads), before, "read from above the second time");
        // Blocks that are there are not copied over.
        root.write(2 * CLUSTER + BLOCK, Buf::from_slice(&[9; BLOCK as usize]), <_>::default())
            .await
            .unwrap();
        let all = read(&root, 2 * CLUSTER, CLUSTER).await;
        let firsts: Vec<u8> = all.chunks(BLOCK as usize).map(|b| b[0]).collect();
        assert_eq!(firsts, [108, 9, 110, 111]);
    });
}

#[test]
fn a_write_that_completes_during_a_copy_wins() {
    for seed in 0..150 {
        let world = World::new(seed);
        world.run(async move {
            let (root, edge, top, _) = chain(3000).await;
            let model: Rc<RefCell<Vec<u8>>> =
                Rc::new(RefCell::new((0..BLOCKS).map(|i| i as u8 + 100).collect()));
            let writing = Rc::new(Cell::new(4));
            let mut tasks = Vec::new();
            for w in 0..4u64 {
                let (root, model, writing) = (root.clone(), model.clone(), writing.clone());
                let mut rng = Rng::new(seed << 8 | w);
                tasks.push(spawn_local(async move {
                    // Each block has one writer, so that the model knows the order.
                    for n in 0..20u64 {
                        let block = rng.below(BLOCKS / 4) * 4 + w;
                        let at = block * BLOCK;
                        let byte = match n % 5 {
                            4 => 0,
                            _ => 1 + rng.below(99) as u8,
                        };
                        if byte == 0 {
                            let r = ByteRange::new(at, BLOCK);
                            root.write_zeroes(r, ZeroFlags::default()).await.unwrap();
                        } else {
                            let b = Buf::from_slice(&[byte; BLOCK as usize]);
                            root.write(at, b, WriteFlags::default()).await.unwrap();
                        }
                        model.borrow_mut()[block as usize] = byte;
                        assert_eq!(read(&root, at, BLOCK).await, [byte; BLOCK as usize]);
                    }
                    writing.set(writing.get() - 1);
                }));
            }
            for r in 0..3u64 {
                let (root, writing) = (root.clone(), writing.clone());
                let mut rng = Rng::new(seed << 8 | r | 0x80);
                tasks.push(spawn_local(async move {
                    while writing.get() > 0 {
                        let at = rng.below(BLOCKS * BLOCK - 1);
                        let len = 1 + rng.below((BLOCKS * BLOCK - at).min(3 * CLUSTER));
                        read(&root, at, len).await;
                    }
                }));
            }
            // The edge below comes and goes meanwhile, as in a change of the graph.
            let node = edge.node().await;
            while writing.get() > 0 {
                let mut drained = edge.drain().await;
                drained.replace(node.clone());
                drop(drained);
                gipfel_io::time::sleep(std::time::Duration::from_micros(20)).await;
            }
            for t in tasks {
                t.await;
            }
            let all = read(&root, 0, BLOCKS * BLOCK).await;
            let firsts: Vec<u8> = all.chunks(BLOCK as usize).map(|b| b[0]).collect();
            assert_eq!(firsts, *model.borrow(), "seed {seed}");
            assert!(top.count(|s| &s.unchanged) > 0, "seed {seed}: nothing was copied");
        });
    }
}

#[test]
fn it_rests_without_permission_and_failing_copies_do_not_matter() {
    World::new(3).run(async {
        let (root, edge, top, _) = chain(0).await;
        edge.grant(Perm::CONSISTENT_READ);
        assert_eq!(read(&root, 0, CLUSTER).await[0], 100);
        assert_eq!(top.count(|s| &s.unchanged), 0);
        edge.grant(Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED);
        top.fail_writes.store(true, Ordering::SeqCst);
        assert_eq!(read(&root, 0, CLUSTER).await[0], 100);
        assert_eq!(top.count(|s| &s.unchanged), 4, "a copy of each of its blocks was tried");
        let s = edge.status(ByteRange::new(0, BLOCK)).await.unwrap();
        assert!(!s.allocated);
        let w = root.write(0, Buf::zeroed(BLOCK as usize), WriteFlags::default()).await;
        assert!(w.is_err(), "a guest's own write is another matter");
    });
}

#[test]
fn what_no_layer_holds_is_not_copied() {
    World::new(4).run(async {
        let (base, _) = overlay("base", BLOCKS * BLOCK / 2, None, 0);
        let (top, seen) = overlay("top", BLOCKS * BLOCK, Some(base), 0);
        let (root, edge) = stack(&COPY_ON_READ, Some(top), make);
        edge.grant(Perm::WRITE_UNCHANGED);
        read(&root, 0, 8 * BLOCK).await;
        assert_eq!((seen.count(|s| &s.unchanged), seen.count(|s| &s.zeroes)), (0, 0));
    });
}

#[test]
fn permissions() {
    let (root, _) = stack(&COPY_ON_READ, None, make);
    World::new(5).run(async {
        let node = root.node().await.unwrap();
        let guest = Perms { used: Perm::CONSISTENT_READ | Perm::WRITE, shared: Perm::ALL };
        let perms = |above, writable| node.driver().child_perms(0, Role::Filtered, above, writable);
        let p = perms(guest, true);
        assert!(p.used.contains(Perm::WRITE_UNCHANGED) && !p.shared.contains(Perm::WRITE));
        assert_eq!(perms(guest, false), guest, "it rests over what is read-only");
        assert_eq!(perms(Perms::IDLE, true), Perms::IDLE);
    });
}

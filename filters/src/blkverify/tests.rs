//! Two nodes in memory that are alike, until they are not.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use gipfel_base::{ByteRange, Result};
use gipfel_io::sim::{Rng, World};
use gipfel_io::{Buf, spawn_local};
use gipfel_node::{Child, Common, Node, OpenArgs, WriteFlags, ZeroFlags};
use serde_json::json;

use super::BLKVERIFY;
use crate::testing::{BLOCK, Seen, overlay};

const SIZE: u64 = 64 * BLOCK;

struct Pair {
    root: Arc<Child>,
    /// Edges past the filter.
    raw: Arc<Child>,
    test: Arc<Child>,
    raw_seen: Arc<Seen>,
    test_seen: Arc<Seen>,
}

async fn pair(raw_size: u64, test_size: u64) -> Result<Pair> {
    let (raw, raw_seen) = overlay("raw", raw_size, None, 300);
    let (test, test_seen) = overlay("test", test_size, None, 100);
    let args = OpenArgs {
        node_name: "v".into(),
        options: json!({}),
        common: Common::default(),
        children: vec![
            Child::new("v.raw", Some(raw.clone())),
            Child::new("v.test", Some(test.clone())),
        ],
    };
    let node = Node::new("v".into(), &BLKVERIFY, (BLKVERIFY.open)(args).await?.driver);
    let edge = |n| Child::new("past", Some(n));
    Ok(Pair { root: edge(node), raw: edge(raw), test: edge(test), raw_seen, test_seen })
}

fn bytes(byte: u8, blocks: u64) -> Buf {
    Buf::from_slice(&vec![byte; (blocks * BLOCK) as usize])
}

#[test]
fn both_get_what_is_written_and_agree() {
    for seed in 0..20 {
        World::new(seed).run(async move {
            let p = pair(SIZE, SIZE).await.unwrap();
            let mut tasks = Vec::new();
            for w in 0..4 {
                let root = p.root.clone();
                let mut rng = Rng::new(seed << 8 | w);
                tasks.push(spawn_local(async move {
                    for _ in 0..30 {
                        let at = rng.below(SIZE / BLOCK);
                        let n = 1 + rng.below((SIZE / BLOCK - at).min(8));
                        let range = ByteRange::new(at * BLOCK, n * BLOCK);
                        match rng.below(4) {
                            0 => root.write_zeroes(range, ZeroFlags::default()).await.unwrap(),
                            1 => root.discard(range).await.unwrap(),
                            2 => root
                                .write(
                                    range.start(),
                                    bytes(rng.below(256) as u8, n),
                                    <_>::default(),
                                )
                                .await
                                .unwrap(),
                            _ => {
                                let buf = Buf::new(range.len() as usize);
                                root.read(range.start(), buf).await.unwrap();
                            }
                        }
                    }
                }));
            }
            for t in tasks {
                t.await;
            }
            p.root.flush().await.unwrap();
            let (a, b) = (Buf::new(SIZE as usize), Buf::new(SIZE as usize));
            p.raw.read(0, a.clone()).await.unwrap();
            p.test.read(0, b.clone()).await.unwrap();
            assert_eq!(a.to_vec(), b.to_vec(), "seed {seed}");
        });
    }
}

#[test]
fn a_difference_is_an_error_that_says_where() {
    World::new(1).run(async {
        let p = pair(SIZE, SIZE).await.unwrap();
        p.root.write(0, bytes(7, 8), WriteFlags::default()).await.unwrap();
        let odd = bytes(7, 1);
        odd.copy_from(3, &[9]);
        p.test.write(2 * BLOCK, odd, WriteFlags::default()).await.unwrap();
        let e = p.root.read(0, Buf::new(4096)).await.unwrap_err();
        assert_eq!(e.errno(), 5);
        let text = "contents differ at 0x403: 'raw' has 0x07, 'test' has 0x09";
        assert!(e.to_string().contains(text), "{e}");
        p.root.read(0, Buf::new(1024)).await.unwrap();
    });
}

#[test]
fn so_is_a_failure_on_one_side_only() {
    World::new(2).run(async {
        let p = pair(SIZE, SIZE).await.unwrap();
        p.test_seen.fail_writes.store(true, Ordering::SeqCst);
        let write = || p.root.write(0, bytes(1, 1), WriteFlags::default());
        let e = write().await.unwrap_err().to_string();
        assert!(e.contains("a write of 512 bytes at 0x0 failed on 'test' only"), "{e}");
        p.raw_seen.fail_writes.store(true, Ordering::SeqCst);
        let e = write().await.unwrap_err().to_string();
        assert!(!e.contains("only"), "{e}");
        p.test_seen.fail_writes.store(false, Ordering::SeqCst);
        let e = write().await.unwrap_err().to_string();
        assert!(e.contains("failed on 'raw' only"), "{e}");
    });
}

#[test]
fn sizes_must_agree() {
    World::new(3).run(async {
        let e = pair(SIZE, SIZE / 2).await.err().unwrap().to_string();
        assert!(e.contains("'test' has 16384 bytes and 'raw' 32768"), "{e}");
    });
}

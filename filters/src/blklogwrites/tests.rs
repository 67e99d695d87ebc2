//! The log, replayed onto an empty image, gives the image back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use gipfel_base::{ByteRange, Result};
use gipfel_io::sim::{Rng, World};
use gipfel_io::{Buf, spawn_local};
use gipfel_node::{Child, Common, Kind, Node, OpenArgs, Perm, Perms, Role, WriteFlags, ZeroFlags};
use serde_json::{Value, json};

use super::BLKLOGWRITES;
use crate::testing::{BLOCK, Bytes, Seen, overlay, unopened};

const SIZE: u64 = 64 * BLOCK;
static LOG: gipfel_node::DriverDef = unopened("bytes", Kind::Protocol, &[]);

struct Logged {
    root: Arc<Child>,
    node: Arc<Node>,
    /// Edges past the filter.
    disk: Arc<Child>,
    log: Arc<Child>,
    seen: Arc<Seen>,
}

fn log_file() -> Arc<Node> {
    Node::new("log".into(), &LOG, Box::new(Bytes::default()))
}

async fn logged(options: Value, log: Arc<Node>) -> Result<Logged> {
    let (disk, seen) = overlay("disk", SIZE, None, 300);
    let edge = |name: &str, n: &Arc<Node>| Child::new(name, Some(n.clone()));
    let children = vec![edge("l.file", &disk), edge("l.log", &log)];
    children[1].grant(Perm::WRITE);
    let (node_name, common) = ("l".to_owned(), Common::default());
    let args = OpenArgs { node_name, options, common, children };
    let node = Node::new("l".into(), &BLKLOGWRITES, (BLKLOGWRITES.open)(args).await?.driver);
    let (root, disk, log) = (edge("root", &node), edge("past", &disk), edge("past", &log));
    Ok(Logged { root, node, disk, log, seen })
}

async fn bytes_of(child: &Child) -> Vec<u8> {
    let buf = Buf::new(child.size().await.unwrap() as usize);
    child.read(0, buf.clone()).await.unwrap();
    buf.to_vec()
}

/// What a replay of `log` makes of an empty image, up to its last flush or `entries`; and the
/// flags of the entries. Written from the format's description, not with the driver's code.
fn replay(log: &[u8]) -> (Vec<u8>, Vec<u64>) {
    let word = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().unwrap());
    assert_eq!((&log[0..8], word(8)), (&b"rhswfsj\0"[..], 1));
    let sector = u32::from_le_bytes(log[24..28].try_into().unwrap()) as usize;
    let mut image = vec![0; SIZE as usize];
    let mut kinds = Vec::new();
    let mut at = sector;
    for _ in 0..word(16) {
        let (first, n, flags) = (word(at) as usize * sector, word(at + 8), word(at + 16));
        at += sector;
        kinds.push(flags);
        if flags == 0 {
            let len = n as usize * sector;
            image[first..first + len].copy_from_slice(&log[at..at + len]);
            at += len;
        } else if flags == 1 {
            assert_eq!((first, n), (0, 0));
        }
    }
    (image, kinds)
}

async fn random_writes(l: &Logged, seed: u64, unit: u64) {
    let mut tasks = Vec::new();
    for w in 0..4 {
        let root = l.root.clone();
        let mut rng = Rng::new(seed << 8 | w);
        tasks.push(spawn_local(async move {
            for _ in 0..30 {
                let at = rng.below(SIZE / unit);
                let n = 1 + rng.below((SIZE / unit - at).min(8));
                let range = ByteRange::new(at * unit, n * unit);
                let byte = rng.below(256) as u8;
                let buf = Buf::from_slice(&vec![byte; range.len() as usize]);
                let flags = WriteFlags { fua: byte < 30, ..WriteFlags::default() };
                match rng.below(8) {
                    0 | 1 => root.write_zeroes(range, ZeroFlags::default()).await.unwrap(),
                    2 => root.discard(range).await.unwrap(),
                    3 => root.flush().await.unwrap(),
                    _ => root.write(range.start(), buf, flags).await.unwrap(),
                }
            }
        }));
    }
    for t in tasks {
        t.await;
    }
}

#[test]
fn a_replay_gives_the_image_back() {
    for seed in 0..40u64 {
        World::new(seed).run(async move {
            let sector = BLOCK << (seed % 3);
            let options = json!({
                "log-sector-size": sector, "log-super-update-interval": 1 + seed % 9,
            });
            let l = logged(options, log_file()).await.unwrap();
            random_writes(&l, seed, BLOCK).await;
            l.node.driver().close().await.unwrap();
            let (image, kinds) = replay(&bytes_of(&l.log).await);
            assert_eq!(image, bytes_of(&l.disk).await, "seed {seed}");
            for flags in [0, 1] {
                assert!(kinds.contains(&flags), "seed {seed}: no entry with flags {flags}");
            }
        });
    }
}

#[test]
fn a_log_is_continued() {
    World::new(1).run(async {
        let log = log_file();
        let size = json!({ "log-sector-size": 1024 });
        let first = logged(size, log.clone()).await.unwrap();
        first.root.write(0, Buf::from_slice(&[7; 1024]), WriteFlags::default()).await.unwrap();
        first.root.discard(ByteRange::new(0, 4096)).await.unwrap();
        first.root.flush().await.unwrap();
        let append = || json!({ "log-append": true });
        let second = logged(append(), log.clone()).await.unwrap();
        second.root.write(2048, Buf::from_slice(&[8; 512]), WriteFlags::default()).await.unwrap();
        second.node.driver().close().await.unwrap();
        let (image, kinds) = replay(&bytes_of(&second.log).await);
        assert_eq!(kinds, [0, 4, 1, 0]);
        assert_eq!((image[0], image[2048], image[2560]), (7, 8, 0));
        // Without it the log begins anew, with the first change.
        let third = logged(json!({}), log.clone()).await.unwrap();
        third.root.write(0, Buf::from_slice(&[9; 512]), WriteFlags::default()).await.unwrap();
        let (_, kinds) = replay(&bytes_of(&third.log).await);
        assert!(kinds.is_empty(), "the head says no entry of the old log");
        third.node.driver().close().await.unwrap();
        assert_eq!(replay(&bytes_of(&third.log).await).1, [0]);
    });
}

#[test]
fn after_a_write_that_is_not_logged_none_is_made() {
    World::new(2).run(async {
        let (log, log_seen) = overlay("log", 8 * BLOCK, None, 0);
        let l = logged(json!({}), log).await.unwrap();
        let write = || l.root.write(0, Buf::from_slice(&[1; 512]), WriteFlags::default());
        write().await.unwrap();
        log_seen.fail_writes.store(true, Ordering::SeqCst);
        let e = write().await.unwrap_err().to_string();
        assert!(e.starts_with("node 'l': the log: "), "{e}");
        log_seen.fail_writes.store(false, Ordering::SeqCst);
        let before = l.seen.count(|s| &s.writes);
        let e = write().await.unwrap_err().to_string();
        assert!(e.contains("an earlier change could not be logged"), "{e}");
        assert_eq!(l.seen.count(|s| &s.writes), before);
    });
}

#[test]
fn bad_logs_and_options_are_refused() {
    World::new(3).run(async {
        for (options, wrong) in [
            (json!({ "log-sector-size": 1000 }), "log-sector-size 1000 is not a power of two"),
            (json!({ "log-sector-size": 16 }), "log-sector-size 16 "),
            (json!({ "log-sector-size": 16 << 20 }), "log-sector-size 16777216 "),
            (json!({ "log-super-update-interval": 0 }), "log-super-update-interval is 0"),
            (json!({ "log-append": true, "log-sector-size": 512 }), "log-append goes on"),
            (json!({ "foo": 1 }), "options of driver 'blklogwrites'"),
        ] {
            let e = logged(options.clone(), log_file()).await.err().unwrap().to_string();
            assert!(e.starts_with(wrong), "{options}: {e}");
        }
        let head = |entries: u64, sector: u32| {
            let mut h = b"rhswfsj\0\x01\0\0\0\0\0\0\0".to_vec();
            h.extend(entries.to_le_bytes());
            h.extend(sector.to_le_bytes());
            h.resize(1024, 0);
            h
        };
        let mut long = head(2, 512);
        long[520..528].fill(0xff);
        for (bytes, wrong) in [
            (vec![1; 10], "child 'log': 10 bytes are no log"),
            (vec![1; 512], "child 'log': there is no log of writes"),
            (head(0, 77), "child 'log': the log's head: log-sector-size 77"),
            (head(9, 512), "child 'log': entry 1 of 9 at 0x400 passes the end of the log at 0x400"),
            (long, "child 'log': entry 0 of 2 at 0x200 passes"),
        ] {
            let log = log_file();
            let edge = Child::new("x", Some(log.clone()));
            edge.write(0, Buf::from_slice(&bytes), WriteFlags::default()).await.unwrap();
            let e = logged(json!({ "log-append": true }), log).await.err().expect(wrong);
            assert!(e.to_string().starts_with(wrong), "{e}");
        }
    });
}

#[test]
fn the_log_is_this_nodes_alone() {
    World::new(4).run(async {
        let l = logged(json!({}), log_file()).await.unwrap();
        let perms = |above| l.node.driver().child_perms(1, Role::Data, above, true);
        let writer = Perms { used: Perm::WRITE, shared: Perm::ALL };
        let p = perms(writer);
        assert!(p.used.contains(Perm::WRITE | Perm::RESIZE) && !p.shared.contains(Perm::WRITE));
        assert!(!perms(Perms::IDLE).used.contains(Perm::WRITE), "nothing is logged of a reader");
    });
}

//! Rules, limits and breakpoints over a node in memory, in the simulated world.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gipfel_base::{ByteRange, ErrorKind, Result};
use gipfel_io::sim::{Rng, World};
use gipfel_io::time::sleep;
use gipfel_io::{Buf, spawn_local};
use gipfel_node::{
    Access, Child, Common, DebugEvent, IoFuture, Kind, Mapping, Node, OpenArgs, Perm, Perms, Role,
    WriteFlags, ZeroFlags,
};
use serde_json::{Value, json};

use super::BLKDEBUG;
use crate::filter::{Below, FILE, Filter, Filtered};
use crate::testing::{BLOCK, overlay, unopened};

/// What reached the node below: kind, offset, length.
type Requests = Arc<Mutex<Vec<(char, u64, u64)>>>;

struct Recorder(Requests);

impl Recorder {
    fn add(&self, kind: char, offset: u64, len: u64) {
        self.0.lock().unwrap().push((kind, offset, len));
    }
}

impl Filter for Recorder {
    fn map<'a>(&'a self, _: &'a Below, _: Access, range: ByteRange) -> Mapping<'a> {
        Mapping::Work { len: range.len() }
    }

    fn read<'a>(&'a self, below: &'a Below, offset: u64, buf: Buf) -> IoFuture<'a> {
        self.add('r', offset, buf.len() as u64);
        Box::pin(below.child().read(offset, buf))
    }

    fn write<'a>(
        &'a self,
        below: &'a Below,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        self.add('w', offset, buf.len() as u64);
        Box::pin(below.child().write(offset, buf, flags))
    }

    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        self.add('z', range.start(), range.len());
        Box::pin(below.child().write_zeroes(range, flags))
    }

    fn discard<'a>(&'a self, below: &'a Below, range: ByteRange) -> IoFuture<'a> {
        self.add('d', range.start(), range.len());
        Box::pin(below.child().discard(range))
    }

    fn same_options(&self, _: Value) -> Result<()> {
        Ok(())
    }
}

static RECORDER: gipfel_node::DriverDef = unopened("recorder", Kind::Filter, FILE);

const SIZE: u64 = 128 * BLOCK;

/// A blkdebug node over a recorded node of [`SIZE`] bytes.
async fn over(options: Value) -> Result<(Arc<Child>, Arc<Node>, Requests)> {
    let requests = Requests::default();
    let (disk, _) = overlay("disk", SIZE, None, 100);
    let edge = Child::new("recorder.file", Some(disk));
    let recorder = Filtered::implicit(edge, Recorder(requests.clone()));
    let recorder = Node::new("recorder".into(), &RECORDER, recorder);
    let args = OpenArgs {
        node_name: "debug".into(),
        options,
        common: Common::default(),
        children: vec![Child::new("debug.image", Some(recorder))],
    };
    let opened = (BLKDEBUG.open)(args).await?;
    let node = Node::new("debug".into(), &BLKDEBUG, opened.driver);
    Ok((Child::new("client.root", Some(node.clone())), node, requests))
}

async fn write(root: &Child, at: u64, len: u64) -> Result<(), i32> {
    let buf = Buf::zeroed(len as usize);
    root.write(at, buf, WriteFlags::default()).await.map_err(|e| e.errno())
}

async fn read(root: &Child, at: u64, len: u64) -> Result<(), i32> {
    root.read(at, Buf::new(len as usize)).await.map_err(|e| e.errno())
}

async fn refused(options: Value) -> String {
    over(options).await.err().expect("it is refused").to_string()
}

#[test]
fn requests_fail_by_the_first_active_rule_that_means_them() {
    World::new(1).run(async {
        let (root, ..) = over(json!({ "inject-error": [
            { "event": "none", "sector": 8, "errno": 28, "iotype": "write" },
            { "event": "none", "sector": 8, "errno": 12, "once": true },
            { "event": "none", "iotype": "flush", "errno": 13, "immediately": true },
        ]}))
        .await
        .unwrap();
        assert_eq!(write(&root, 4096, 512).await, Err(28));
        assert_eq!(write(&root, 3584, 1024).await, Err(28));
        assert_eq!(write(&root, 0, 4096).await, Ok(()), "it ends before that sector");
        assert_eq!(write(&root, 4608, 512).await, Ok(()));
        assert_eq!(read(&root, 4097, 8).await, Ok(()), "not the sector's first byte");
        assert_eq!(read(&root, 4096, 8).await, Err(12));
        assert_eq!(read(&root, 4096, 8).await, Ok(()), "that rule is spent");
        let e = root.flush().await.unwrap_err();
        assert_eq!(e.errno(), 13, "the number of the rule, not of its kind: {e}");
    });
}

#[test]
fn events_make_rules_active_and_change_the_state() {
    World::new(2).run(async {
        // The second write fails, and what comes after it.
        let (root, ..) = over(json!({
            "set-state": [{ "event": "pwritev", "state": 1, "new_state": 2 }],
            "inject-error": [{ "event": "pwritev", "state": 2, "errno": 28 }],
        }))
        .await
        .unwrap();
        assert_eq!(write(&root, 0, 512).await, Ok(()));
        assert_eq!(read(&root, 0, 512).await, Ok(()));
        assert_eq!(write(&root, 0, 512).await, Err(28));
        assert_eq!(read(&root, 0, 512).await, Err(28), "active until another rule is");
        // Rules of another event take their place.
        let (root, node, _) = over(json!({ "inject-error": [
            { "event": "none", "errno": 28 },
            { "event": "read_aio", "errno": 2, "once": true },
            { "event": "l2_load", "state": 7 },
        ]}))
        .await
        .unwrap();
        let debugger = node.driver().debugger().unwrap();
        assert_eq!(read(&root, 0, 512).await, Err(28));
        assert!(debugger.event(DebugEvent::L2Load).is_none());
        assert_eq!(read(&root, 0, 512).await, Err(28), "no rule for it in this state");
        assert!(debugger.event(DebugEvent::ReadAio).is_none());
        assert_eq!(read(&root, 0, 512).await, Err(2));
        assert_eq!(read(&root, 0, 512).await, Ok(()));
    });
}

#[test]
fn zeros_discards_and_queries_have_rules_of_their_own() {
    World::new(3).run(async {
        let all = ByteRange::new(0, 4096);
        let rules = |kind: &str, errno: i32| {
            over(json!({ "inject-error":
                [{ "event": "none", "iotype": kind, "errno": errno }] }))
        };
        let (root, _, requests) = rules("write-zeroes", 95).await.unwrap();
        root.write_zeroes(all, ZeroFlags::default()).await.unwrap();
        assert!(requests.lock().unwrap().iter().all(|r| r.0 == 'w'), "written as data instead");
        let no_fallback = ZeroFlags { no_fallback: true, ..ZeroFlags::default() };
        let e = root.write_zeroes(all, no_fallback).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        let (root, ..) = rules("discard", 5).await.unwrap();
        assert!(root.discard(all).await.is_err() && root.flush().await.is_ok());
        let (root, ..) = rules("block-status", 5).await.unwrap();
        assert!(root.status(all).await.is_err() && read(&root, 0, 512).await.is_ok());
        assert!(root.status_through(all).await.is_err());
        let (root, ..) = over(json!({ "inject-error": [{ "event": "none" }] })).await.unwrap();
        assert!(root.status(all).await.is_ok(), "only where a rule names them");
        assert!(root.status_through(all).await.is_ok());
    });
}

#[test]
fn whatever_is_asked_the_child_gets_what_the_limits_allow() {
    for seed in 0..60 {
        let world = World::new(seed);
        world.run(async move {
            let mut rng = Rng::new(seed);
            let align = BLOCK << rng.below(3);
            let max = align << rng.below(3);
            let (opt, most) = (align << rng.below(2), (align * 2) << rng.below(2));
            let (root, node, requests) = over(json!({
                "align": align, "max-transfer": max, "opt-write-zero": opt,
                "max-write-zero": most, "opt-discard": opt, "max-discard": most,
            }))
            .await
            .unwrap();
            assert_eq!(u64::from(node.driver().limits().align), align);
            let model = Rc::new(std::cell::RefCell::new(vec![0u8; SIZE as usize]));
            let mut tasks = Vec::new();
            for w in 0..4u64 {
                // Each writer has a part of its own, not aligned: blocks are shared.
                let part =
                    ByteRange::between(w * (SIZE / 4 + 7), ((w + 1) * (SIZE / 4 + 7)).min(SIZE));
                let (root, model) = (root.clone(), model.clone());
                let mut rng = Rng::new(seed << 8 | w);
                tasks.push(spawn_local(async move {
                    for _ in 0..25 {
                        let at = part.start() + rng.below(part.len());
                        let len = 1 + rng.below((part.end() - at).min(6000));
                        let (from, to) = (at as usize, (at + len) as usize);
                        let byte = rng.below(255) as u8 + 1;
                        let r = ByteRange::new(at, len);
                        match rng.below(4) {
                            0 => {
                                root.write_zeroes(r, ZeroFlags::default()).await.unwrap();
                                model.borrow_mut()[from..to].fill(0);
                            }
                            1 => root.discard(r).await.unwrap(),
                            2 => {
                                let buf = Buf::new(len as usize);
                                root.read(at, buf.clone()).await.unwrap();
                                assert_eq!(buf.to_vec(), model.borrow()[from..to], "seed {seed}");
                            }
                            _ => {
                                let buf = Buf::from_slice(&vec![byte; len as usize]);
                                root.write(at, buf, WriteFlags::default()).await.unwrap();
                                model.borrow_mut()[from..to].fill(byte);
                            }
                        }
                    }
                }));
            }
            for t in tasks {
                t.await;
            }
            let all = Buf::new(SIZE as usize);
            root.read(0, all.clone()).await.unwrap();
            assert_eq!(all.to_vec(), *model.borrow(), "seed {seed}");
            for (kind, at, len) in requests.lock().unwrap().iter() {
                let (unit, longest) = match kind {
                    'r' | 'w' => (align, max),
                    _ => (opt, most.max(opt)),
                };
                let ok = at % unit == 0 && len % unit == 0 && *len <= longest;
                assert!(ok, "seed {seed}: {kind} {at} {len}, unit {unit}, at most {longest}");
            }
        });
    }
}

#[test]
fn the_events_of_an_unaligned_write() {
    World::new(4).run(async {
        let (root, node, _) = over(json!({ "align": 4096 })).await.unwrap();
        let debugger = node.driver().debugger().unwrap();
        let events = [
            DebugEvent::PwritevRmwHead,
            DebugEvent::PwritevRmwAfterHead,
            DebugEvent::PwritevRmwTail,
            DebugEvent::PwritevRmwAfterTail,
            DebugEvent::Pwritev,
            DebugEvent::PwritevDone,
        ];
        for e in events {
            debugger.set_break(e, e.name());
        }
        let task = spawn_local({
            let root = root.clone();
            async move { write(&root, 100, 8000).await }
        });
        for e in events {
            debugger.wait_break(e.name()).await;
            debugger.resume(e.name()).unwrap();
        }
        assert_eq!(task.await, Ok(()));
    });
}

#[test]
fn a_request_at_a_breakpoint_waits_until_it_may_go_on() {
    World::new(5).run(async {
        let (root, node, requests) = over(json!({})).await.unwrap();
        let debugger = node.driver().debugger().unwrap();
        debugger.set_break(DebugEvent::Pwritev, "a");
        debugger.set_break(DebugEvent::Pwritev, "b");
        let ended = Rc::new(Cell::new(false));
        let task = spawn_local({
            let (root, ended) = (root.clone(), ended.clone());
            async move {
                write(&root, 0, 512).await.unwrap();
                ended.set(true);
            }
        });
        debugger.wait_break("a").await;
        // Breakpoints are used up: others pass.
        write(&root, 512, 512).await.unwrap();
        assert_eq!(*requests.lock().unwrap(), [('w', 512, 512)]);
        debugger.resume("a").unwrap();
        sleep(Duration::from_millis(1)).await;
        assert!(!ended.get(), "it waits at the other one as well");
        assert_eq!(debugger.resume("a").unwrap_err().kind(), ErrorKind::NotFound);
        debugger.remove_break("b").unwrap();
        task.await;
        assert!(ended.get());
        assert!(debugger.remove_break("b").is_err() && debugger.resume("x").is_err());
        // Removed before anybody comes.
        debugger.set_break(DebugEvent::Pwritev, "c");
        debugger.remove_break("c").unwrap();
        write(&root, 0, 512).await.unwrap();
        // A request that is given up waits no longer.
        debugger.set_break(DebugEvent::Pwritev, "d");
        let gone = gipfel_io::time::timeout(Duration::from_millis(1), write(&root, 0, 512)).await;
        assert!(gone.is_none() && debugger.resume("d").is_err());
    });
}

#[test]
fn rules_come_from_a_file_too() {
    let world = World::new(6);
    let text = "[inject-error]\nevent = \"none\"\nerrno = \"28\"\niotype = \"read\"\n";
    world.put_file("rules.conf", text.as_bytes().to_vec());
    world.put_file("bad.conf", b"[inject-error]\nfoo\n".to_vec());
    world.put_file("binary.conf", vec![0xff; 100]);
    world.put_file("large.conf", vec![b'\n'; (1 << 20) + 1]);
    world.run(async {
        let rules = json!([{ "event": "none" }]);
        let (root, ..) =
            over(json!({ "config": "rules.conf", "inject-error": rules })).await.unwrap();
        assert_eq!((read(&root, 0, 9).await, write(&root, 0, 512).await), (Err(28), Err(5)));
        let bad = refused(json!({ "config": "bad.conf" })).await;
        assert!(bad.starts_with("bad.conf:2: "), "{bad}");
        for name in ["binary.conf", "large.conf", "none.conf"] {
            let e = refused(json!({ "config": name })).await;
            assert!(e.starts_with(&format!("file of rules '{name}': ")), "{e}");
        }
    });
}

#[test]
fn options_that_make_no_sense_are_refused() {
    World::new(7).run(async {
        for (options, wrong) in [
            (json!({ "align": 3 }), "align 3 is not a power of two"),
            (json!({ "align": 1u64 << 32 }), "align 4294967296"),
            (json!({ "align": 4096, "max-transfer": 512 }), "max-transfer 512 is not a multiple"),
            (json!({ "align": 512, "opt-write-zero": 100 }), "opt-write-zero 100"),
            (json!({ "opt-write-zero": 4096, "max-write-zero": 6144 }), "max-write-zero 6144"),
            (json!({ "opt-discard": 4096, "max-discard": 1024 }), "max-discard 1024"),
            (json!({ "max-transfer": -1 }), "options of driver 'blkdebug'"),
            (json!({ "inject-error": [{ "event": "x" }] }), "there is no event 'x'"),
            (json!({ "inject-error": [{ "event": "none", "errno": 0 }] }), "errno 0"),
            (json!({ "set-state": [{ "event": "none" }] }), "options of driver 'blkdebug'"),
            (json!({ "take-child-perms": ["graph"] }), "there is no permission 'graph'"),
            (json!({ "foo": 1 }), "options of driver 'blkdebug'"),
        ] {
            let e = refused(options.clone()).await;
            assert!(e.starts_with(wrong), "{options}: {e}");
        }
        let (_, node, _) = over(json!({ "align": 512 })).await.unwrap();
        assert!(node.driver().reopen(json!({ "align": 512 }), false).await.is_ok());
        assert!(node.driver().reopen(json!({}), false).await.is_err());
    });
}

#[test]
fn permissions_are_taken_and_withheld_as_asked() {
    World::new(8).run(async {
        let options = json!({
            "take-child-perms": ["resize"], "unshare-child-perms": ["write", "write-unchanged"],
        });
        let (_, node, _) = over(options).await.unwrap();
        let p = node.driver().child_perms(0, Role::Filtered, Perms::IDLE, true);
        assert_eq!(p, Perms { used: Perm::RESIZE, shared: Perm::CONSISTENT_READ | Perm::RESIZE });
    });
}

#[test]
fn every_event_is_found_by_its_name() {
    for e in DebugEvent::ALL {
        assert_eq!(DebugEvent::from_name(e.name()), Some(*e));
    }
    assert_eq!(DebugEvent::from_name(""), None);
}

//! x-blockdev-change: children that come and go under writers (mutators.md, section 3).

use std::rc::Rc;

use crate::common::fan::{clear_log, log, numbered};
use crate::common::steps::{sim, writer};
use crate::common::{BLOCK, add_overlay, map, picture};
use gipfel_base::{ErrorKind, Result};
use gipfel_graph::{Backend, BackendOptions, ChildChange, Graph, ReplaceEdges};
use gipfel_io::sim::Rng;
use gipfel_io::time::{sleep, timeout};
use gipfel_io::{Buf, spawn_local};
use serde_json::{Value, json};

const SIZE: u64 = 64 * BLOCK;

async fn add_mem(g: &Rc<Graph>, name: &str, size: u64) {
    let o = json!({ "driver": "mem", "node-name": name, "size": size });
    g.blockdev_add(map(o)).await.unwrap();
}

/// `q` over `m0`, `m1`, `m2`; it needs two children at least.
async fn add_q(g: &Rc<Graph>) {
    for n in ["m0", "m1", "m2"] {
        add_mem(g, n, SIZE).await;
    }
    let q = json!({
        "driver": "fan", "node-name": "q", "children": ["m0", "m1", "m2"], "least": 2
    });
    g.blockdev_add(map(q)).await.unwrap();
}

async fn add(g: &Rc<Graph>, node: &str) -> Result<()> {
    g.blockdev_change("q", &ChildChange::Add(node.into())).await
}

async fn remove(g: &Rc<Graph>, child: &str) -> Result<()> {
    g.blockdev_change("q", &ChildChange::Remove(child.into())).await
}

/// What a node holds.
async fn bytes_of(g: &Rc<Graph>, node: &str) -> Vec<u8> {
    let (id, b) = g.attach(node, "export 'look'", BackendOptions::default()).await.unwrap();
    let buf = Buf::new(SIZE as usize);
    b.read(0, buf.clone()).await.unwrap();
    g.detach(id).await.unwrap();
    buf.to_vec()
}

async fn write_slot(b: &Backend, slot: u64, byte: u8) {
    b.write(slot * BLOCK, Buf::from_slice(&[byte; BLOCK as usize]), false).await.unwrap();
}

#[test]
fn children_come_and_go_by_number() {
    sim(1, async |g| {
        add_q(&g).await;
        add_mem(&g, "m3", SIZE).await;
        add_overlay(&g, "m4").await.unwrap();
        let before = picture(&g).await;
        add(&g, "m3").await.unwrap();
        assert!(picture(&g).await.contains(&"q.children.3 -> m3".into()));
        remove(&g, "children.1").await.unwrap();
        add(&g, "m4").await.unwrap();
        let p = picture(&g).await;
        assert!(p.contains(&"q.children.4 -> m4".into()), "a number in between stays free: {p:?}");
        assert!(!p.iter().any(|l| l.starts_with("q.children.1 ")), "{p:?}");
        assert!(p.contains(&"node m1".into()), "the node stays: the user added it");
        let nodes = g.query_nodes(false).await.unwrap();
        let q = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "q").unwrap();
        let file = q["file"].as_str().unwrap().strip_prefix("json:").unwrap();
        let file: Value = serde_json::from_str(file).unwrap();
        let mem = json!({ "driver": "mem", "size": SIZE });
        let inner = json!({ "driver": "mem" });
        let overlay = json!({ "driver": "overlay", "file": inner, "backing": null });
        assert_eq!(file["children"], json!([mem, mem, mem, overlay]));
        remove(&g, "children.3").await.unwrap();
        remove(&g, "children.4").await.unwrap();
        add(&g, "m1").await.unwrap();
        let p = picture(&g).await;
        assert!(p.contains(&"q.children.4 -> m1".into()), "only the last is given again: {p:?}");
        assert_eq!(p.len(), before.len());
    });
}

#[test]
fn what_only_the_edge_held_goes_with_it() {
    sim(2, async |g| {
        add_mem(&g, "m0", SIZE).await;
        add_mem(&g, "m1", SIZE).await;
        let inline = json!({ "driver": "mem", "node-name": "inner", "detect-zeroes": "on" });
        let q = json!({
            "driver": "fan", "node-name": "q", "children": ["m0", inline, "m1"]
        });
        g.blockdev_add(map(q)).await.unwrap();
        assert!(picture(&g).await.contains(&"node inner".into()));
        remove(&g, "children.1").await.unwrap();
        let p = picture(&g).await;
        assert!(!p.iter().any(|l| l.contains("inner") || l.contains("#detect")), "{p:?}");
    });
}

#[test]
fn node_side_filters_stay_with_the_child() {
    sim(3, async |g| {
        add_q(&g).await;
        let o = json!({ "driver": "mem", "node-name": "m3", "detect-zeroes": "on" });
        g.blockdev_add(map(o)).await.unwrap();
        let before = picture(&g).await;
        let filter = before.iter().find_map(|l| l.strip_prefix("node #")).unwrap().to_owned();
        add(&g, "m3").await.unwrap();
        assert!(picture(&g).await.contains(&format!("q.children.3 -> #{filter}")), "on top");
        remove(&g, "children.3").await.unwrap();
        assert_eq!(picture(&g).await, before);
        // The node and its filter can be used again, also after a parent went that held them.
        add(&g, "m3").await.unwrap();
        g.blockdev_del("q").await.unwrap();
        assert_eq!(bytes_of(&g, "m3").await.len() as u64, SIZE);
        g.blockdev_del("m3").await.unwrap();
    });
}

#[test]
fn every_refusal_changes_nothing() {
    sim(4, async |g| {
        add_q(&g).await;
        let (_, b) = g.attach("q", "export 'e'", writer()).await.unwrap();
        write_slot(&b, 0, 7).await;
        add_mem(&g, "small", SIZE - BLOCK).await;
        add_mem(&g, "used", SIZE).await;
        add_mem(&g, "m3", SIZE).await;
        g.attach("used", "export 'w'", writer()).await.unwrap();
        let ro = json!({ "driver": "mem", "node-name": "ro", "read-only": true, "size": SIZE });
        g.blockdev_add(map(ro)).await.unwrap();
        let over = json!({ "driver": "pass", "node-name": "over", "file": "q" });
        g.blockdev_add(map(over)).await.unwrap();
        let dz = json!({ "driver": "mem", "node-name": "dz", "detect-zeroes": "on", "size": SIZE });
        g.blockdev_add(map(dz)).await.unwrap();
        let before = picture(&g).await;
        let hidden = before.iter().find_map(|l| l.strip_prefix("node #")).map(|n| format!("#{n}"));
        let grown = |n: &str| ChildChange::Add(n.into());
        let gone = |n: &str| ChildChange::Remove(n.into());
        use ErrorKind::{InUse, InvalidInput, NotFound, ReadOnly, Unsupported};
        let cases = [
            ("m0", grown("m3"), Unsupported, "node 'm0' (mem) has a fixed set of children"),
            ("over", gone("file"), Unsupported, "node 'over' (pass) has a fixed set of children"),
            ("q", grown("small"), InvalidInput, "node 'small' (32256 bytes) is smaller than node"),
            ("q", grown("over"), InvalidInput, "that would be a cycle"),
            ("q", grown("q"), InvalidInput, "that would be a cycle"),
            ("q", grown("used"), InUse, "'used.root' (export 'w')"),
            ("q", grown("ro"), ReadOnly, "node 'ro' is read-only"),
            ("q", grown("m1"), InUse, "node 'm1' is the child 'children.1' of 'q' already"),
            ("q", grown("nobody"), NotFound, "there is no node 'nobody'"),
            ("nobody", grown("m3"), NotFound, "no backend and no node 'nobody'"),
            ("q", gone("children.7"), NotFound, "no child 'children.7'; its children: children.0"),
            ("m0", gone("file"), NotFound, "node 'm0' has no child 'file'; its children: none"),
            ("q", grown(&hidden.unwrap()), InvalidInput, "implicit filter of node 'dz'"),
        ];
        for (parent, change, kind, says) in cases {
            let e = g.blockdev_change(parent, &change).await.expect_err(says);
            assert_eq!(e.kind(), kind, "{e}");
            if says.contains("used.root") {
                assert!(e.to_string().contains("conflict on node 'used'"), "{e}");
                assert!(e.to_string().contains("'q.children.3'"), "{e}");
            } else {
                assert!(e.to_string().contains(says), "'{e}' does not say '{says}'");
            }
            assert_eq!(picture(&g).await, before, "a refused change changes nothing: {says}");
        }
        remove(&g, "children.0").await.unwrap();
        let before = picture(&g).await;
        let e = remove(&g, "children.2").await.unwrap_err();
        assert!(e.to_string().contains("node 'q': 1 children are too few"), "{e}");
        assert_eq!(picture(&g).await, before);
        write_slot(&b, 1, 8).await;
        let kept = bytes_of(&g, "m1").await;
        assert_eq!((kept[0], kept[BLOCK as usize]), (7, 8), "the client goes on");
    });
}

#[test]
fn a_filter_goes_over_one_child_and_a_reopen_lists_the_same_children() {
    sim(5, async |g| {
        add_q(&g).await;
        let f = json!({ "driver": "pass", "node-name": "f", "file": "m1" });
        g.blockdev_add(map(f)).await.unwrap();
        let edge = ReplaceEdges::Named("q.children.1".into());
        g.blockdev_replace(&edge, "f").await.unwrap();
        assert!(picture(&g).await.contains(&"q.children.1 -> f".into()));
        g.blockdev_replace(&edge, "m1").await.unwrap();
        let reopen = |children: Value| {
            let o = json!({
                "driver": "fan", "node-name": "q", "children": children, "least": 2
            });
            g.blockdev_reopen(vec![map(o)])
        };
        reopen(json!(["m0", "m1", "m2"])).await.unwrap();
        for other in [json!(["m0", "m1"]), json!(["m0", "m1", "f"]), json!("m0"), Value::Null] {
            let e = reopen(other).await.unwrap_err();
            assert!(e.to_string().contains("x-blockdev-change"), "{e}");
        }
    });
}

#[test]
fn a_change_waits_for_no_medium_and_a_failed_flush_of_a_dropped_child_harms_nobody() {
    sim(6, async |g| {
        add_q(&g).await;
        let o = json!({ "driver": "mem", "node-name": "bad", "size": SIZE, "fail-flush": true });
        g.blockdev_add(map(o)).await.unwrap();
        let (_, b) = g.attach("q", "export 'e'", writer()).await.unwrap();
        add(&g, "bad").await.unwrap();
        write_slot(&b, 0, 1).await;
        b.flush().await.unwrap_err();
        remove(&g, "children.3").await.unwrap();
        b.flush().await.unwrap();
    });
}

/// Which sets of numbers there were, and how many writes had ended when the change to each began
/// and when it was done.
struct History(Vec<([usize; 2], Vec<usize>)>);

impl History {
    /// Every write used a set that was in force while it ran: from the beginning of the change to
    /// it until the next change is done.
    fn check(&self) {
        for (n, set) in log().iter().enumerate() {
            let until = self.0.iter().skip(1).map(|s| s.0[1]).chain([usize::MAX]);
            let mut times = self.0.iter().zip(until);
            let fits =
                times.any(|((from, s), until)| from[0] <= n && n < until && *set == numbered(s));
            assert!(fits, "write {n} used {set:?} out of its time");
        }
    }
}

/// Random changes of the children under writers.
fn history(seed: u64) {
    const WRITERS: u64 = 4;
    const SLOTS: u64 = 16;
    sim(seed, async |g| {
        clear_log();
        add_q(&g).await;
        let (id, b) = g.attach("q", "export 'e'", writer()).await.unwrap();
        let tasks: Vec<_> = (0..WRITERS)
            .map(|w| {
                let (b, mut rng) = (b.clone(), Rng::new(seed * 31 + w));
                spawn_local(async move {
                    for round in 0..80u64 {
                        let slot = w * SLOTS + rng.below(SLOTS);
                        match rng.below(8) {
                            0 => b.flush().await.unwrap(),
                            _ => write_slot(&b, slot, 1 + (round % 250) as u8).await,
                        }
                    }
                })
            })
            .collect();
        let mut rng = Rng::new(seed ^ 0xface);
        let mut set: Vec<(usize, String)> = (0..3).map(|n| (n, format!("m{n}"))).collect();
        let mut next = 3;
        let mut sets = History(vec![([0, 0], vec![0, 1, 2])]);
        let mut left: Vec<(String, Vec<u8>)> = Vec::new();
        for i in 3..15 {
            sleep(std::time::Duration::from_nanos(rng.below(20_000))).await;
            let mut began = log().len();
            if set.len() < 3 || rng.one_in(2) {
                let node = format!("m{i}");
                add_mem(&g, &node, SIZE).await;
                began = log().len();
                add(&g, &node).await.unwrap();
                set.push((next, node));
                next += 1;
            } else {
                let (n, node) = set.remove(rng.below(set.len() as u64) as usize);
                remove(&g, &format!("children.{n}")).await.unwrap();
                next -= usize::from(n + 1 == next);
                left.push((node.clone(), bytes_of(&g, &node).await));
            }
            sets.0.push(([began, log().len()], set.iter().map(|(n, _)| *n).collect()));
        }
        for t in tasks {
            t.await;
        }
        let mut model = vec![0; SIZE as usize];
        for slot in 0..WRITERS * SLOTS {
            write_slot(&b, slot, slot as u8).await;
            let at = (slot * BLOCK) as usize;
            model[at..at + BLOCK as usize].fill(slot as u8);
        }
        sets.check();
        for (_, node) in &set {
            assert!(bytes_of(&g, node).await == model, "child {node} misses a write");
        }
        for (node, bytes) in &left {
            assert!(bytes_of(&g, node).await == *bytes, "{node} was written after it had gone");
        }
        g.detach(id).await.unwrap();
        g.close_all().await.unwrap();
        assert!(picture(&g).await.is_empty(), "nothing is left at the end");
    });
}

#[test]
fn every_write_sees_the_old_set_or_the_new() {
    for seed in 0..200 {
        let run = std::panic::catch_unwind(|| history(seed));
        assert!(run.is_ok(), "history with seed {seed} failed");
    }
}

/// Two quorums, one below the other: the sets are drained from the top down, and a change of the
/// lower one while the upper one writes ends.
#[test]
fn sets_below_sets_change_too() {
    sim(8, async |g| {
        add_q(&g).await;
        let top = json!({ "driver": "fan", "node-name": "top", "children": ["q"] });
        g.blockdev_add(map(top)).await.unwrap();
        let (_, b) = g.attach("top", "export 'e'", writer()).await.unwrap();
        let writes = spawn_local(async move {
            for slot in 0..64 {
                write_slot(&b, slot, 9).await;
            }
        });
        let changes = async {
            for n in 3..20 {
                add_mem(&g, &format!("m{n}"), SIZE).await;
                add(&g, &format!("m{n}")).await.unwrap();
                let change = ChildChange::Add(format!("m{n}"));
                g.blockdev_change("top", &change).await.unwrap_err();
                remove(&g, &format!("children.{}", n - 1)).await.unwrap();
            }
        };
        timeout(std::time::Duration::from_secs(10), changes).await.expect("no change hangs");
        writes.await;
    });
}

/// A child that goes is waited for by whoever takes it out, and by no request.
#[test]
fn a_slow_child_that_goes_holds_nobody_up() {
    sim(9, async |g| {
        add_q(&g).await;
        let slow = json!({ "driver": "mem", "node-name": "slow", "size": SIZE, "slow": 50 });
        g.blockdev_add(map(slow)).await.unwrap();
        add(&g, "slow").await.unwrap();
        let (_, b) = g.attach("q", "export 'e'", writer()).await.unwrap();
        let first = b.clone();
        let first = spawn_local(async move { write_slot(&first, 0, 1).await });
        sleep(std::time::Duration::from_millis(1)).await;
        let (graph, held) = (g.clone(), b.clone());
        let change = spawn_local(async move {
            remove(&graph, "children.3").await.unwrap();
            held
        });
        sleep(std::time::Duration::from_millis(1)).await;
        timeout(std::time::Duration::from_millis(5), write_slot(&b, 1, 2))
            .await
            .expect("a write waits for the child that goes");
        assert!(!first.is_finished() && !change.is_finished());
        first.await;
        change.await;
        assert_eq!(bytes_of(&g, "slow").await[0], 1, "what was in flight reached it");
        assert_eq!(bytes_of(&g, "slow").await[BLOCK as usize], 0);
    });
}

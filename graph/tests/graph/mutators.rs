//! The rules of mutators.md for the mutators there are so far, in the simulated world.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::steps::{read_byte, reader, refused, sim, write_byte, writer};
use crate::common::{BLOCK, add_overlay, map, picture};
use gipfel_base::ErrorKind;
use gipfel_graph::{BackendOptions, Follow, Graph, ReplaceEdges, ZeroDetection};
use gipfel_io::sim::Rng;
use gipfel_io::{Buf, spawn_local};
use serde_json::{Value, json};

async fn pass_over(g: &Rc<Graph>, name: &str, file: &str) {
    let o = json!({ "driver": "pass", "node-name": name, "file": file });
    g.blockdev_add(map(o)).await.unwrap();
}

#[test]
fn snapshot_moves_the_disk_and_leaves_the_content() {
    sim(1, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let (_, disk) = g.attach("n", "export 'd'", writer()).await.unwrap();
        let keep = BackendOptions { follow: Follow::Node, ..reader() };
        let (_, still) = g.attach("n", "export 's'", keep).await.unwrap();
        write_byte(&disk, 0, 1).await;
        add_overlay(&g, "o").await.unwrap();
        g.blockdev_snapshot("n", "o").await.unwrap();
        write_byte(&disk, 0, 2).await;
        assert_eq!(read_byte(&disk, 0).await, 2);
        assert_eq!(read_byte(&still, 0).await, 1, "a client that follows the node sees it frozen");
        assert!(picture(&g).await.contains(&"o.backing -> n".to_owned()));
    });
}

#[test]
fn snapshot_cuts_between_client_side_and_node_side_filters() {
    sim(2, async |g| {
        let file = json!({ "driver": "mem" });
        g.blockdev_add(map(json!({
            "driver": "overlay", "node-name": "n", "file": file, "detect-zeroes": "on"
        })))
        .await
        .unwrap();
        let stack = BackendOptions {
            name: Some("vm0".into()),
            copy_on_read: true,
            detect_zeroes: ZeroDetection::On,
            ..writer()
        };
        let (_, vm) = g.attach("n", "export 'e'", stack).await.unwrap();
        write_byte(&vm, 0, 1).await;
        add_overlay(&g, "o").await.unwrap();
        g.blockdev_snapshot("vm0", "o").await.unwrap();
        let m = g.model().await;
        let backend = m.backends().next().unwrap().1;
        let below: Vec<_> = backend.stack.iter().map(|n| m.node(*n).name.clone()).collect();
        assert!(below[0].starts_with("#copy-on-read") && below[1].starts_with("#detect-zeroes"));
        let o = m.below_stack(backend).unwrap();
        assert_eq!(m.node(o).name, "o", "client-side filters stay with the backend");
        let backing = m.edge(m.node(o).children[1]).target.unwrap();
        let side = &m.node(backing).name;
        assert!(side.starts_with("#detect-zeroes"), "node-side filters stay with n, not {side}");
        assert_eq!(m.node(m.under_side(backing)).name, "n");
    });
}

#[test]
fn snapshot_under_an_overlay_moves_its_backing_edge() {
    sim(3, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let file = json!({ "driver": "mem" });
        let a = json!({ "driver": "overlay", "node-name": "a", "file": file, "backing": "n" });
        g.blockdev_add(map(a)).await.unwrap();
        add_overlay(&g, "o").await.unwrap();
        g.blockdev_snapshot("n", "o").await.unwrap();
        let p = picture(&g).await;
        assert!(p.contains(&"a.backing -> o".into()) && p.contains(&"o.backing -> n".into()));
    });
}

#[test]
fn snapshot_refusals() {
    sim(4, async |g| {
        for n in ["n", "o", "used", "below"] {
            add_overlay(&g, n).await.unwrap();
        }
        let file = json!({ "driver": "mem" });
        for (name, extra) in [("based", json!("below")), ("over", json!("n"))] {
            let o = json!({
                "driver": "overlay", "node-name": name, "file": file, "backing": extra
            });
            g.blockdev_add(map(o)).await.unwrap();
        }
        let small = json!({ "driver": "mem", "size": BLOCK });
        g.blockdev_add(map(json!({
            "driver": "overlay", "node-name": "small", "file": small, "backing": null
        })))
        .await
        .unwrap();
        pass_over(&g, "p", "below").await;
        g.attach("used", "export 'u'", reader()).await.unwrap();
        let p = picture(&g).await;
        use ErrorKind::{InUse, InvalidInput, NotFound};
        for (node, overlay, kind, says) in [
            ("n", "n", InvalidInput, "is the node to be overlaid"),
            ("n", "used", InUse, "is in use by export 'u'"),
            ("n", "based", InUse, "has a backing node already: 'below'"),
            ("n", "over", InUse, "has a backing node already: 'n'"),
            ("n", "small", InvalidInput, "is smaller"),
            ("n", "p", InvalidInput, "cannot have a backing node"),
            ("n", "nobody", NotFound, "there is no node 'nobody'"),
            ("nobody", "o", NotFound, "no backend and no node 'nobody'"),
        ] {
            refused(&g, &p, g.blockdev_snapshot(node, overlay).await, kind, says).await;
        }
        let follow = BackendOptions { follow: Follow::Node, ..writer() };
        g.attach("small", "export 'w'", follow).await.unwrap();
        let p = picture(&g).await;
        let r = g.blockdev_snapshot("small", "o").await;
        refused(&g, &p, r, InUse, "export 'w' writes to node 'small' and follows the node").await;
    });
}

#[test]
fn a_failed_flush_refuses_the_snapshot() {
    sim(5, async |g| {
        let file = json!({ "driver": "mem", "fail-flush": true });
        let n = json!({ "driver": "overlay", "node-name": "n", "file": file, "backing": null });
        g.blockdev_add(map(n)).await.unwrap();
        let (_, b) = g.attach("n", "export 'e'", writer()).await.unwrap();
        add_overlay(&g, "o").await.unwrap();
        let p = picture(&g).await;
        let r = g.blockdev_snapshot("n", "o").await;
        refused(&g, &p, r, ErrorKind::Os(5), "flushing node 'n'").await;
        write_byte(&b, 0, 9).await;
        assert_eq!(read_byte(&b, 0).await, 9, "the client goes on as before");
    });
}

/// Decision 0007: with much to flush a snapshot waits for no flush; the next one does, and it ends
/// the leisurely writing back that came first.
#[test]
fn a_large_flush_comes_after_the_snapshot() {
    for fails in [false, true] {
        sim(5, async move |g| {
            let file = json!({ "driver": "mem", "unflushed": 1 << 30, "fail-flush": fails });
            let n = json!({ "driver": "overlay", "node-name": "n", "file": file, "backing": null });
            g.blockdev_add(map(n)).await.unwrap();
            let (_, b) = g.attach("n", "export 'e'", writer()).await.unwrap();
            add_overlay(&g, "o").await.unwrap();
            write_byte(&b, 0, 9).await;
            g.blockdev_snapshot("n", "o").await.unwrap();
            write_byte(&b, BLOCK, 8).await;
            let r = b.flush().await;
            match fails {
                false => r.unwrap(),
                true => {
                    let says = r.unwrap_err().to_string();
                    assert!(says.contains("node 'n' after it lost its writers"), "{says}");
                    b.flush().await.expect_err("what was lost stays lost");
                }
            }
            assert_eq!((read_byte(&b, 0).await, read_byte(&b, BLOCK).await), (9, 8));
        });
    }
}

#[test]
fn permissions_conflict_by_name() {
    sim(6, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let file = json!({ "driver": "mem" });
        let o = json!({ "driver": "overlay", "node-name": "o", "file": file, "backing": "n" });
        g.blockdev_add(map(o)).await.unwrap();
        g.attach("o", "export 'o'", writer()).await.unwrap();
        let p = picture(&g).await;
        let r = g.attach("n", "export 'n'", writer()).await;
        for says in ["node 'n'", "'write'", "export 'n'", "'o.backing'"] {
            let r = r.as_ref().map(drop).map_err(Clone::clone);
            refused(&g, &p, r, ErrorKind::InUse, says).await;
        }
        g.attach("n", "export 'r'", reader()).await.unwrap();
        let ro = json!({ "driver": "mem", "node-name": "ro", "read-only": true });
        g.blockdev_add(map(ro)).await.unwrap();
        let p = picture(&g).await;
        let r = g.attach("ro", "export 'w'", writer()).await;
        refused(&g, &p, r, ErrorKind::ReadOnly, "node 'ro' is read-only").await;
    });
}

#[test]
fn add_and_del() {
    sim(7, async |g| {
        let empty = picture(&g).await;
        add_overlay(&g, "n").await.unwrap();
        let p = picture(&g).await;
        let twice = add_overlay(&g, "n").await;
        refused(&g, &p, twice, ErrorKind::Exists, "a node 'n' already").await;
        for (o, says) in [
            (json!({ "driver": "mem" }), "'node-name' is missing"),
            (json!({ "node-name": "x" }), "'driver' is missing"),
            (json!({ "driver": "nope", "node-name": "x" }), "there is no driver 'nope'"),
            (json!({ "driver": "mem", "node-name": "9x" }), "'9x' cannot be a node-name"),
            (json!({ "driver": "mem", "node-name": "x".repeat(32) }), "at most 31"),
            (json!({ "driver": "overlay", "node-name": "x" }), "child 'file' is missing"),
            (json!({ "driver": "pass", "node-name": "x", "file": "y" }), "there is no node 'y'"),
            (
                json!({ "driver": "pass", "node-name": "x", "file": {
                    "driver": "mem", "node-name": "x" } }),
                "'x' is given twice",
            ),
        ] {
            let e = g.blockdev_add(map(o)).await.unwrap_err().to_string();
            assert!(e.contains(says), "'{e}' does not say '{says}'");
            assert_eq!(picture(&g).await, p);
        }
        let (id, _) = g.attach("n", "export 'e'", writer()).await.unwrap();
        let p = picture(&g).await;
        let r = g.blockdev_del("n").await;
        refused(&g, &p, r, ErrorKind::InUse, "in use by export 'e'").await;
        g.detach(id).await.unwrap();
        pass_over(&g, "f", "n").await;
        let r = g.blockdev_del("n").await.unwrap_err();
        assert!(r.to_string().contains("node 'f'"), "{r}");
        g.blockdev_del("f").await.unwrap();
        g.blockdev_del("n").await.unwrap();
        assert_eq!(picture(&g).await, empty, "inline children go with their parent");
    });
}

#[test]
fn a_chain_that_is_too_deep_is_refused() {
    sim(8, async |g| {
        add_overlay(&g, "n0").await.unwrap();
        let mut last = Ok(());
        for i in 1..=300 {
            let (name, below) = (format!("n{i}"), format!("n{}", i - 1));
            last = g
                .blockdev_add(map(json!({ "driver": "pass", "node-name": name, "file": below })))
                .await;
            if last.is_err() {
                break;
            }
        }
        let e = last.unwrap_err();
        assert!(e.kind() == ErrorKind::Limit && e.to_string().contains("at most 256"), "{e}");
    });
}

#[test]
fn implicit_filters_cannot_be_named() {
    sim(9, async |g| {
        let n = json!({ "driver": "mem", "node-name": "n", "detect-zeroes": "on" });
        g.blockdev_add(map(n)).await.unwrap();
        let name = {
            let m = g.model().await;
            m.nodes().find(|(_, n)| n.implicit.is_some()).unwrap().1.name.clone()
        };
        let p = picture(&g).await;
        let r = g.blockdev_del(&name).await;
        refused(&g, &p, r, ErrorKind::InvalidInput, "filter of node 'n': name 'n' instead").await;
        g.blockdev_del("n").await.unwrap();
        assert!(picture(&g).await.is_empty());
    });
}

#[test]
fn reopen_sets_all_nodes_or_none() {
    sim(10, async |g| {
        add_overlay(&g, "a").await.unwrap();
        add_overlay(&g, "b").await.unwrap();
        let p0 = picture(&g).await;
        let with = |name: &str, zeroes: &str, backing: Value| {
            let file = json!({ "driver": "mem" });
            map(json!({
                "driver": "overlay", "node-name": name, "file": file, "backing": backing,
                "detect-zeroes": zeroes,
            }))
        };
        let r = g
            .blockdev_reopen(vec![with("a", "on", json!("b")), with("b", "off", json!("a"))])
            .await;
        refused(&g, &p0, r, ErrorKind::InvalidInput, "cycle").await;
        g.blockdev_reopen(vec![with("a", "on", json!("b")), with("b", "off", Value::Null)])
            .await
            .unwrap();
        let p = picture(&g).await;
        assert!(p.contains(&"a.backing -> b".into()));
        assert!(p.iter().any(|l| l.starts_with("node #detect-zeroes")), "{p:?}");
        let missing = map(json!({ "driver": "overlay", "node-name": "a",
            "file": { "driver": "mem" } }));
        let r = g.blockdev_reopen(vec![missing]).await;
        refused(&g, &p, r, ErrorKind::InvalidInput, "option 'backing' is missing").await;
        g.blockdev_reopen(vec![with("a", "off", Value::Null)]).await.unwrap();
        assert_eq!(picture(&g).await, p0, "everything is as at first");
    });
}

#[test]
fn replace_puts_a_filter_under_one_client_only() {
    sim(11, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let named = |n: &str| BackendOptions { name: Some(n.into()), ..writer() };
        let (_, a) = g.attach("n", "export 'a'", named("a")).await.unwrap();
        let (_, b) = g.attach("n", "export 'b'", named("b")).await.unwrap();
        pass_over(&g, "f", "n").await;
        let edge = ReplaceEdges::Named("a.root".into());
        g.blockdev_replace(&edge, "f").await.unwrap();
        let p = picture(&g).await;
        assert!(p.contains(&"a.root -> f".into()) && p.contains(&"b.root -> n".into()));
        write_byte(&a, 0, 7).await;
        assert_eq!(read_byte(&b, 0).await, 7);
        g.blockdev_replace(&edge, "n").await.unwrap();
        let r = g.blockdev_replace(&ReplaceEdges::OnlyOf("n".into()), "f").await.unwrap_err();
        assert!(r.to_string().contains("a.root, b.root"), "{r}");
        g.blockdev_replace(&ReplaceEdges::AllOf("n".into()), "f").await.unwrap();
        let p = picture(&g).await;
        assert!(p.contains(&"b.root -> f".into()) && p.contains(&"f.file -> n".into()));
        add_overlay(&g, "other").await.unwrap();
        let p = picture(&g).await;
        let r = g.blockdev_replace(&edge, "other").await;
        refused(&g, &p, r, ErrorKind::InvalidInput, "a change of medium").await;
    });
}

#[test]
fn backends_have_one_client_and_pre_made_ones_stay() {
    sim(12, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let vm0 = BackendOptions { name: Some("vm0".into()), ..writer() };
        g.backend_add(vm0.clone(), Some("n")).await.unwrap();
        let (id, b) = g.attach("vm0", "export 'e'", writer()).await.unwrap();
        let p = picture(&g).await;
        let r = g.attach("vm0", "export 'f'", writer()).await;
        refused(&g, &p, r, ErrorKind::InUse, "has a client already: export 'e'").await;
        let r = g.backend_del("vm0").await;
        refused(&g, &p, r, ErrorKind::InUse, "in use by export 'e'").await;
        write_byte(&b, 0, 3).await;
        g.detach(id).await.unwrap();
        assert_eq!(picture(&g).await, p, "it stays without its client");
        let r = g.backend_add(BackendOptions { name: Some("n".into()), ..reader() }, None).await;
        refused(&g, &p, r, ErrorKind::Exists, "a node 'n' already").await;
        let empty = BackendOptions { name: Some("cd".into()), ..reader() };
        g.backend_add(empty, None).await.unwrap();
        let (_, cd) = g.attach("cd", "export 'cd'", reader()).await.unwrap();
        let e = cd.read(0, Buf::new(512)).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NoMedium, "a clear answer, not a hang: {e}");
    });
}

/// Rule 7: only the graph at the end counts, never one in between.
#[test]
fn reopen_turns_a_chain_around() {
    sim(13, async |g| {
        add_overlay(&g, "y").await.unwrap();
        let with = |name: &str, backing: Value| {
            let file = json!({ "driver": "mem" });
            map(json!({ "driver": "overlay", "node-name": name, "file": file, "backing": backing }))
        };
        g.blockdev_add(with("x", json!("y"))).await.unwrap();
        g.blockdev_reopen(vec![with("y", json!("x")), with("x", Value::Null)]).await.unwrap();
        let p = picture(&g).await;
        assert!(p.contains(&"y.backing -> x".into()) && !p.contains(&"x.backing -> y".into()));
    });
}

#[test]
fn what_the_user_did_not_add_goes_with_its_last_parent() {
    sim(14, async |g| {
        g.blockdev_add(map(json!({ "driver": "mem", "node-name": "m" }))).await.unwrap();
        let p = picture(&g).await;
        add_overlay(&g, "x").await.unwrap();
        let o = json!({ "driver": "overlay", "node-name": "x", "file": "m", "backing": null });
        g.blockdev_reopen(vec![map(o)]).await.unwrap();
        g.blockdev_del("x").await.unwrap();
        assert_eq!(picture(&g).await, p, "the file that x was opened with is gone");
    });
}

#[test]
fn node_side_filters_stay_when_an_explicit_filter_goes() {
    sim(15, async |g| {
        let n = json!({ "driver": "mem", "node-name": "n", "detect-zeroes": "on" });
        g.blockdev_add(map(n)).await.unwrap();
        let p = picture(&g).await;
        pass_over(&g, "f", "n").await;
        g.blockdev_del("f").await.unwrap();
        assert_eq!(picture(&g).await, p, "the filter is a property of n");
        let (id, b) = g.attach("n", "export 'e'", writer()).await.unwrap();
        write_byte(&b, 0, 1).await;
        g.detach(id).await.unwrap();
        assert_eq!(picture(&g).await, p);
    });
}

#[test]
fn a_client_that_goes_has_no_request_under_way() {
    for seed in 0..20 {
        for made_first in [false, true] {
            sim(seed, async |g| {
                add_overlay(&g, "n").await.unwrap();
                let own = BackendOptions { name: Some("b0".into()), ..writer() };
                if made_first {
                    g.backend_add(own, Some("n")).await.unwrap();
                }
                let name = if made_first { "b0" } else { "n" };
                let (id, b) = g.attach(name, "export 'e'", writer()).await.unwrap();
                let ended = Rc::new(Cell::new(false));
                let (late, e) = (b.clone(), ended.clone());
                let writing = spawn_local(async move {
                    write_byte(&late, 0, 1).await;
                    e.set(true);
                });
                gipfel_io::yield_now().await;
                let began = b.accounting().requests[1].load(Ordering::Relaxed) == 1;
                g.detach(id).await.unwrap();
                assert!(ended.get() || !began, "seed {seed}: a write is still under way");
                if made_first || began {
                    writing.await;
                }
                if !made_first {
                    let e = b.read(0, Buf::new(512)).await.unwrap_err();
                    assert_eq!(e.kind(), ErrorKind::NoMedium, "a clear answer: {e}");
                }
            });
        }
    }
}

#[test]
fn parents_are_named_by_names_that_users_have() {
    sim(17, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let stack = BackendOptions { copy_on_read: true, ..writer() };
        g.attach("n", "export 'e'", stack).await.unwrap();
        let p = picture(&g).await;
        let r = g.blockdev_del("n").await;
        refused(&g, &p, r, ErrorKind::InUse, "node 'n' is in use by export 'e'").await;
    });
}

/// A request that comes while an edge is drained for the first time finds the size as it was.
#[test]
fn sizes_are_known_while_edges_are_drained() {
    for seed in 0..200 {
        sim(seed, async |g| {
            add_overlay(&g, "n").await.unwrap();
            let with = BackendOptions { detect_zeroes: ZeroDetection::On, ..writer() };
            let (_, busy) = g.attach("n", "export 'a'", writer()).await.unwrap();
            let (_, fresh) = g.attach("n", "export 'b'", with).await.unwrap();
            add_overlay(&g, "o").await.unwrap();
            // Something to wait for, so that the edges stay drained for a while.
            let first = spawn_local(async move { write_byte(&busy, 0, 1).await });
            let change = spawn_local(async move { g.blockdev_snapshot("n", "o").await });
            let late = spawn_local(async move {
                gipfel_io::time::sleep(Duration::from_nanos(seed * 100)).await;
                write_byte(&fresh, BLOCK, 2).await;
            });
            first.await;
            late.await;
            change.await.unwrap();
        });
    }
}

/// The refusal names the client also where it stands on filters of its own.
#[test]
fn a_follower_with_filters_that_writes_refuses_a_snapshot() {
    sim(19, async |g| {
        add_overlay(&g, "n").await.unwrap();
        add_overlay(&g, "o").await.unwrap();
        let follow =
            BackendOptions { follow: Follow::Node, detect_zeroes: ZeroDetection::On, ..writer() };
        g.attach("n", "export 'w'", follow).await.unwrap();
        let p = picture(&g).await;
        let r = g.blockdev_snapshot("n", "o").await;
        refused(&g, &p, r, ErrorKind::InUse, "export 'w' writes to node 'n' and follows").await;
    });
}

/// Snapshots, filters in and out, while writers write: nobody loses a byte.
fn history(seed: u64) {
    sim(seed, async |g| {
        const WRITERS: u64 = 4;
        const SLOTS: u64 = 16;
        add_overlay(&g, "n0").await.unwrap();
        let vm = BackendOptions { name: Some("vm".into()), ..writer() };
        let (id, backend) = g.attach("n0", "export 'e'", vm).await.unwrap();
        let tasks: Vec<_> = (0..WRITERS)
            .map(|w| {
                let (b, mut rng) = (backend.clone(), Rng::new(seed * 31 + w));
                spawn_local(async move {
                    // Each writer owns its slots, so it knows what must be there.
                    let mut model = [0u8; SLOTS as usize];
                    for round in 0..60u64 {
                        let slot = rng.below(SLOTS);
                        let at = (w * SLOTS + slot) * BLOCK;
                        match rng.below(8) {
                            0 => b.flush().await.unwrap(),
                            1..=4 => {
                                let byte = 1 + (round % 250) as u8;
                                write_byte(&b, at, byte).await;
                                model[slot as usize] = byte;
                            }
                            _ => assert_eq!(read_byte(&b, at).await, model[slot as usize]),
                        }
                    }
                    for (slot, byte) in model.iter().enumerate() {
                        let at = (w * SLOTS + slot as u64) * BLOCK;
                        assert_eq!(read_byte(&b, at).await, *byte);
                    }
                })
            })
            .collect();
        let mut rng = Rng::new(seed ^ 0xface);
        let mut top = "n0".to_owned();
        for i in 1..=20 {
            if rng.one_in(2) {
                let over = format!("n{i}");
                add_overlay(&g, &over).await.unwrap();
                g.blockdev_snapshot(&top, &over).await.unwrap();
                top = over;
            } else {
                pass_over(&g, "f", &top).await;
                let edge = ReplaceEdges::Named("vm.root".into());
                g.blockdev_replace(&edge, "f").await.unwrap();
                g.blockdev_replace(&edge, &top).await.unwrap();
                g.blockdev_del("f").await.unwrap();
            }
        }
        for t in tasks {
            t.await;
        }
        g.detach(id).await.unwrap();
        g.close_all().await.unwrap();
        assert!(picture(&g).await.is_empty(), "nothing is left at the end");
    });
}

#[test]
fn writers_lose_nothing_while_the_graph_changes() {
    for seed in 0..200 {
        let run = std::panic::catch_unwind(|| history(seed));
        assert!(run.is_ok(), "history with seed {seed} failed");
    }
}

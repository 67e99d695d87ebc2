//! Job filters go in and out as mutators.md says, proven with a small backup and a small mirror:
//! whole next graphs, who may do what, and the data of all clients under writers.

use std::rc::Rc;

use crate::common::jobs::{cbw, mirror, run};
use crate::common::steps::{read_byte, reader, refused, sim, write_byte, writer};
use crate::common::{BLOCK, add_overlay, map, picture};
use gipfel_base::{ErrorKind, Result};
use gipfel_graph::{Backend, BackendOptions, Follow, Graph, ReplaceEdges};
use gipfel_io::sim::Rng;
use gipfel_io::{Task, spawn_local};
use serde_json::json;

/// The edges of the graph but for those into inline nodes, with our own names unnumbered.
async fn shape(g: &Rc<Graph>) -> Vec<String> {
    let unnumber = |name: &str| match name.strip_prefix('#') {
        Some(n) => format!("#{}", n.chars().filter(|c| !c.is_ascii_digit()).collect::<String>()),
        None => name.to_owned(),
    };
    let m = g.model().await;
    let mut lines: Vec<String> = m
        .edges()
        .filter_map(|(_, e)| Some((e, &m.node(e.target?).name)))
        .filter(|(_, node)| !node.starts_with("#block"))
        .map(|(e, node)| format!("{} -> {}", unnumber(&e.label), unnumber(node)))
        .collect();
    lines.sort();
    lines
}

async fn expect(g: &Rc<Graph>, edges: &[&str]) {
    let mut edges: Vec<&str> = edges.to_vec();
    edges.sort_unstable();
    assert_eq!(shape(g).await, edges);
}

fn named(name: &str) -> BackendOptions {
    BackendOptions { name: Some(name.into()), ..writer() }
}

/// Node `n` under backend `vm`, and an empty node `t`.
async fn disk(g: &Rc<Graph>) -> std::sync::Arc<Backend> {
    for n in ["n", "t"] {
        add_overlay(g, n).await.unwrap();
    }
    let (_, vm) = g.attach("n", "export 'vm'", named("vm")).await.unwrap();
    for b in 0..64 {
        write_byte(&vm, b * BLOCK, 100 + b as u8).await;
    }
    vm
}

async fn bytes(b: &Backend) -> Vec<u8> {
    let mut all = Vec::new();
    for i in 0..64 {
        all.push(read_byte(b, i * BLOCK).await);
    }
    all
}

fn pattern() -> Vec<u8> {
    (0..64).map(|b| 100 + b).collect()
}

/// A client that writes and checks what it reads, in blocks of its own.
fn writing(vm: &std::sync::Arc<Backend>, seed: u64) -> Task<Vec<u8>> {
    let vm = vm.clone();
    spawn_local(async move {
        let mut rng = Rng::new(seed);
        let mut model = pattern();
        for round in 0..300u64 {
            let block = rng.below(64);
            if rng.one_in(3) {
                assert_eq!(read_byte(&vm, block * BLOCK).await, model[block as usize]);
            } else {
                let byte = round as u8;
                write_byte(&vm, block * BLOCK, byte).await;
                model[block as usize] = byte;
            }
        }
        model
    })
}

#[test]
fn backup_start_and_end() {
    sim(1, async |g| {
        let vm = disk(&g).await;
        let before = picture(&g).await;
        let (spec, copy) = cbw("backup0", "t");
        let filter = g.insert_job_filter("vm", spec).await.unwrap();
        expect(
            &g,
            &["vm.root -> #cbw", "#backend.root -> #cbw", "#cbw.file -> n", "#cbw.target -> t"],
        )
        .await;
        let client = writing(&vm, 1);
        // Who comes later comes on top: no write slips past the backup.
        let (late, _) = g.attach("n", "export 'late'", named("late")).await.unwrap();
        assert!(shape(&g).await.contains(&"late.root -> #cbw".to_owned()));
        run(&copy).await;
        assert_eq!(read_byte(filter.source(), 0).await, read_byte(&vm, 0).await);
        g.detach(late).await.unwrap();
        g.remove_job_filter(&filter).await.unwrap();
        assert_eq!(picture(&g).await, before, "all is as at the start");
        let model = client.await;
        assert_eq!(bytes(&vm).await, model);
        let (_, t) = g.attach("t", "test", reader()).await.unwrap();
        assert_eq!(bytes(&t).await, pattern(), "the moment of the start");
    });
}

#[test]
fn a_snapshot_leaves_a_backup_where_it_is() {
    for seed in 0..20 {
        sim(seed, async |g| {
            let vm = disk(&g).await;
            let (spec, copy) = cbw("backup0", "t");
            let filter = g.insert_job_filter("n", spec).await.unwrap();
            let client = writing(&vm, seed);
            add_overlay(&g, "o").await.unwrap();
            let keep = BackendOptions { follow: Follow::Node, ..reader() };
            let (_, still) = g.attach("n", "export 'still'", keep).await.unwrap();
            g.blockdev_snapshot("vm", "o").await.unwrap();
            expect(
                &g,
                &[
                    "vm.root -> o",
                    "o.backing -> #cbw",
                    "#backend.root -> #cbw",
                    "#backend.root -> #cbw",
                    "#cbw.file -> n",
                    "#cbw.target -> t",
                ],
            )
            .await;
            let frozen = bytes(&still).await;
            run(&copy).await;
            let model = client.await;
            g.remove_job_filter(&filter).await.unwrap();
            expect(&g, &["vm.root -> o", "o.backing -> n", "#backend.root -> n"]).await;
            assert_eq!(bytes(&vm).await, model);
            assert_eq!(bytes(&still).await, frozen);
            let (_, t) = g.attach("t", "test", reader()).await.unwrap();
            assert_eq!(bytes(&t).await, pattern(), "the moment of the start");
        });
    }
}

#[test]
fn mirror_start_complete_and_cancel() {
    for completes in [true, false] {
        sim(3, async |g| {
            let vm = disk(&g).await;
            let keep = BackendOptions { follow: Follow::Node, ..reader() };
            let (_, still) = g.attach("n", "export 'still'", keep).await.unwrap();
            let (spec, copy) = mirror("m0", "t");
            let filter = g.insert_job_filter("vm", spec).await.unwrap();
            let client = writing(&vm, 3);
            expect(
                &g,
                &[
                    "vm.root -> #mirror",
                    "#backend.root -> #mirror",
                    "#backend.root -> #mirror",
                    "#mirror.file -> n",
                    "#mirror.target -> t",
                ],
            )
            .await;
            run(&copy).await;
            if completes {
                g.complete_job_filter(&filter, "t").await.unwrap();
                expect(&g, &["vm.root -> t", "#backend.root -> n"]).await;
            } else {
                g.remove_job_filter(&filter).await.unwrap();
                expect(&g, &["vm.root -> n", "#backend.root -> n"]).await;
            }
            let frozen = bytes(&still).await;
            let model = client.await;
            assert_eq!(bytes(&vm).await, model);
            assert_eq!(bytes(&still).await == frozen, completes);
        });
    }
}

#[test]
fn a_snapshot_takes_the_mirror_up() {
    for seed in 0..20 {
        sim(seed, async |g| {
            let vm = disk(&g).await;
            let keep = BackendOptions { follow: Follow::Node, ..reader() };
            let (spec, copy) = mirror("m0", "t");
            let filter = g.insert_job_filter("n", spec).await.unwrap();
            let (_, still) = g.attach("n", "export 'still'", keep).await.unwrap();
            let client = writing(&vm, seed);
            add_overlay(&g, "o").await.unwrap();
            g.blockdev_snapshot("n", "o").await.unwrap();
            expect(
                &g,
                &[
                    "vm.root -> #mirror",
                    "#backend.root -> #mirror",
                    "#mirror.file -> o",
                    "#mirror.target -> t",
                    "o.backing -> n",
                    "#backend.root -> n",
                ],
            )
            .await;
            let frozen = bytes(&still).await;
            run(&copy).await;
            g.complete_job_filter(&filter, "t").await.unwrap();
            expect(&g, &["vm.root -> t", "o.backing -> n", "#backend.root -> n"]).await;
            let model = client.await;
            assert_eq!(bytes(&vm).await, model, "seed {seed}");
            assert_eq!(bytes(&still).await, frozen, "seed {seed}");
        });
    }
}

/// A mirror under a newer backup: each goes its way at a snapshot.
#[test]
fn two_filters_on_one_node() {
    for newest in ["backup", "mirror"] {
        sim(5, async |g| {
            let vm = disk(&g).await;
            add_overlay(&g, "t2").await.unwrap();
            let (c, copy) = cbw("backup0", "t2");
            let (m, mirrored) = mirror("m0", "t");
            let (first, second) = if newest == "backup" { (m, c) } else { (c, m) };
            let first = g.insert_job_filter("n", first).await.unwrap();
            let second = g.insert_job_filter("n", second).await.unwrap();
            let (top, below) =
                if newest == "backup" { ("#cbw", "#mirror") } else { ("#mirror", "#cbw") };
            let edges = [
                format!("vm.root -> {top}"),
                format!("#backend.root -> {top}"),
                format!("#backend.root -> {below}"),
                format!("{top}.file -> {below}"),
                format!("{below}.file -> n"),
                "#mirror.target -> t".into(),
                "#cbw.target -> t2".into(),
            ];
            expect(&g, &edges.each_ref().map(|e| e.as_str())).await;
            add_overlay(&g, "o").await.unwrap();
            g.blockdev_snapshot("n", "o").await.unwrap();
            let client = writing(&vm, 5);
            expect(
                &g,
                &[
                    "vm.root -> #mirror",
                    "#backend.root -> #mirror",
                    "#mirror.file -> o",
                    "#mirror.target -> t",
                    "o.backing -> #cbw",
                    "#backend.root -> #cbw",
                    "#cbw.file -> n",
                    "#cbw.target -> t2",
                ],
            )
            .await;
            run(&mirrored).await;
            run(&copy).await;
            let (m, c) = if newest == "backup" { (first, second) } else { (second, first) };
            g.complete_job_filter(&m, "t").await.unwrap();
            g.remove_job_filter(&c).await.unwrap();
            expect(&g, &["vm.root -> t", "o.backing -> n"]).await;
            let model = client.await;
            assert_eq!(bytes(&vm).await, model);
            let (_, t2) = g.attach("t2", "test", reader()).await.unwrap();
            assert_eq!(bytes(&t2).await, pattern());
        });
    }
}

#[test]
fn a_job_goes_on_without_its_medium() {
    sim(6, async |g| {
        for n in ["n", "t"] {
            add_overlay(&g, n).await.unwrap();
        }
        let options = BackendOptions { removable: true, ..named("cd") };
        let id = g.backend_add(options, Some("n")).await.unwrap();
        let (_, cd) = g.attach("cd", "export 'cd'", writer()).await.unwrap();
        write_byte(&cd, 0, 7).await;
        let (spec, copy) = cbw("backup0", "t");
        let filter = g.insert_job_filter("cd", spec).await.unwrap();
        write_byte(&cd, 0, 8).await;
        g.open_tray(id, false).await.unwrap();
        g.remove_medium(id).await.unwrap();
        expect(&g, &["#backend.root -> #cbw", "#cbw.file -> n", "#cbw.target -> t"]).await;
        let p = picture(&g).await;
        let r = g.blockdev_del("n").await;
        refused(&g, &p, r, ErrorKind::InUse, "in use by job 'backup0'").await;
        run(&copy).await;
        g.insert_medium(id, "n").await.unwrap();
        assert!(shape(&g).await.contains(&"cd.root -> #cbw".to_owned()));
        g.remove_medium(id).await.unwrap();
        g.remove_job_filter(&filter).await.unwrap();
        expect(&g, &[]).await;
        let (_, t) = g.attach("t", "test", reader()).await.unwrap();
        assert_eq!(read_byte(&t, 0).await, 7);
    });
}

#[test]
fn explicit_filters_and_detect_zeroes_come_and_go_beside_a_job() {
    sim(7, async |g| {
        let vm = disk(&g).await;
        let (spec, copy) = cbw("backup0", "t");
        let filter = g.insert_job_filter("n", spec).await.unwrap();
        let client = writing(&vm, 7);
        let pass = json!({ "driver": "pass", "node-name": "f", "file": "n" });
        g.blockdev_add(map(pass)).await.unwrap();
        g.blockdev_replace(&ReplaceEdges::OnlyOf("n".into()), "f").await.unwrap();
        let file = json!({ "driver": "mem" });
        let zeroes = |v: &str| {
            vec![map(json!({
                "driver": "overlay", "node-name": "n", "file": file, "backing": null,
                "detect-zeroes": v,
            }))]
        };
        let without = shape(&g).await;
        g.blockdev_reopen(zeroes("on")).await.unwrap();
        expect(
            &g,
            &[
                "vm.root -> f",
                "f.file -> #cbw",
                "#backend.root -> #cbw",
                "#cbw.file -> #detect-zeroes",
                "#cbw.target -> t",
                "#detect-zeroes.file -> n",
            ],
        )
        .await;
        run(&copy).await;
        g.blockdev_reopen(zeroes("off")).await.unwrap();
        assert_eq!(shape(&g).await, without);
        g.blockdev_reopen(zeroes("on")).await.unwrap();
        g.remove_job_filter(&filter).await.unwrap();
        g.blockdev_replace(&ReplaceEdges::OnlyOf("f".into()), "n").await.unwrap();
        g.blockdev_del("f").await.unwrap();
        expect(&g, &["vm.root -> #detect-zeroes", "#detect-zeroes.file -> n"]).await;
        let model = client.await;
        assert_eq!(bytes(&vm).await, model);
        let (_, t) = g.attach("t", "test", reader()).await.unwrap();
        assert_eq!(bytes(&t).await, pattern());
    });
}

#[test]
fn refusals() {
    sim(8, async |g| {
        let _vm = disk(&g).await;
        let small = json!({ "driver": "mem", "size": BLOCK, "node-name": "small" });
        g.blockdev_add(map(small)).await.unwrap();
        let over = json!({ "driver": "pass", "node-name": "a", "file": "n" });
        g.blockdev_add(map(over)).await.unwrap();
        add_overlay(&g, "used").await.unwrap();
        let alone = BackendOptions { alone: true, ..writer() };
        g.attach("used", "export 'used'", alone).await.unwrap();
        let p = picture(&g).await;
        use ErrorKind::{InUse, InvalidInput, NotFound};
        for (target, kind, says) in [
            ("n", InUse, "target 'n' stands on node 'n'"),
            ("a", InUse, "target 'a' stands on node 'n'"),
            ("small", InvalidInput, "target 'small' is smaller"),
            ("nobody", NotFound, "there is no node 'nobody'"),
            ("used", InUse, "conflict on node 'used'"),
        ] {
            let r = g.insert_job_filter("n", cbw("backup0", target).0).await;
            refused(&g, &p, r, kind, says).await;
        }
        let filter = g.insert_job_filter("n", mirror("m0", "t").0).await.unwrap();
        let mut shown = cbw("b1", "t").0;
        shown.name = Some("t".into());
        let p = picture(&g).await;
        let r = g.insert_job_filter("n", shown).await;
        refused(&g, &p, r, ErrorKind::Exists, "there is a node 't' already").await;
        // Names of ours: whose it is, and what to name instead.
        let name = p.iter().find_map(|l| l.strip_prefix("node #mirror")).unwrap();
        let name = format!("#mirror{name}");
        add_overlay(&g, "o").await.unwrap();
        let p = picture(&g).await;
        let says = "implicit filter of job 'm0' on node 'n': name 'n' instead";
        let snapshot: Result<()> = g.blockdev_snapshot(&name, "o").await;
        refused(&g, &p, snapshot, InvalidInput, says).await;
        refused(&g, &p, g.blockdev_del(&name).await, InvalidInput, says).await;
        let r = g.block_resize("vm", 128 * BLOCK, false).await;
        refused(&g, &p, r, InUse, "is being copied by job 'm0'").await;
        // The job's own edge stays where it is.
        let source = p.iter().find(|l| l.starts_with("#backend") && l.contains("#mirror"));
        let source = source.unwrap().split(" -> ").next().unwrap().to_owned();
        let r = g.blockdev_replace(&ReplaceEdges::Named(source), "a").await;
        refused(&g, &p, r, InUse, "is in use by job 'm0'").await;
        // What cannot complete leaves all as it is: here the target's other client.
        let only_reads = BackendOptions { alone: true, ..reader() };
        g.attach("o", "export 'alone'", only_reads).await.unwrap();
        let p = picture(&g).await;
        let r = g.complete_job_filter(&filter, "o").await;
        refused(&g, &p, r, InUse, "conflict on node 'o'").await;
        let r = g.complete_job_filter(&filter, "small").await;
        refused(&g, &p, r, InvalidInput, "less than the").await;
        g.complete_job_filter(&filter, "t").await.unwrap();
    });
}

#[test]
fn a_filter_that_the_user_named_shows() {
    sim(9, async |g| {
        let _vm = disk(&g).await;
        let mut spec = cbw("backup0", "t").0;
        spec.name = Some("shown".into());
        let names = async |g: &Rc<Graph>| {
            let nodes = g.query_nodes(true).await.unwrap();
            let list = nodes.as_array().unwrap().clone();
            list.iter().any(|n| n["node-name"] == "shown")
        };
        let filter = g.insert_job_filter("n", spec).await.unwrap();
        assert!(names(&g).await);
        let p = picture(&g).await;
        let r = g.blockdev_del("shown").await;
        refused(&g, &p, r, ErrorKind::InvalidInput, "job 'backup0' on node 'n'").await;
        g.remove_job_filter(&filter).await.unwrap();
        assert!(!names(&g).await);
    });
}

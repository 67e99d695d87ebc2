//! Every mutator x every filter present or absent x an explicit filter above, below or none x one
//! client or two, each while clients work. What comes out is compared with the oracle in
//! `common/oracle.rs` and `common/mutate.rs`.

use std::collections::BTreeMap;

use crate::common::mutate::*;
use crate::common::notation::{Door, Sketch};
use crate::common::stage::{Outcome, Stage};
use crate::common::{BLOCK, caught};
use gipfel_graph::{ChildChange, ReplaceEdges};
use gipfel_io::sim::World;

/// Where an explicit filter stands: not at all, over the node, under it.
const EXPLICIT: [&str; 3] = ["", "above", "below"];
/// The second client: none, one of the disk, one of the node.
const SECOND: [&str; 3] = ["", "disk", "node"];

/// One arrangement of filters and clients around the node `n`.
#[derive(Clone, Copy, Debug)]
struct Setting {
    client_side: [bool; 3],
    node_side: bool,
    explicit: &'static str,
    second: &'static str,
}

impl Setting {
    fn all() -> impl Iterator<Item = Setting> {
        let filters = (0..16u8).map(|bits| [0, 1, 2, 3].map(|b| bits >> b & 1 == 1));
        filters.flat_map(|[a, b, c, node_side]| {
            EXPLICIT.into_iter().flat_map(move |explicit| {
                SECOND.into_iter().map(move |second| Setting {
                    client_side: [a, b, c],
                    node_side,
                    explicit,
                    second,
                })
            })
        })
    }

    /// `b0 (thr cor dz) > f > [dz] n > file` and what it is without this or that. `node` is an
    /// overlay or has copies.
    fn text(&self, node: &str) -> String {
        let names = ["thr", "cor", "dz"].into_iter().zip(self.client_side);
        let stack: Vec<_> = names.filter(|f| f.1).map(|f| f.0).collect();
        let stack =
            if stack.is_empty() { String::new() } else { format!(" ({})", stack.join(" ")) };
        let side = if self.node_side { "[dz] " } else { "" };
        let mut text = match (self.explicit, node) {
            ("above", "n") => format!("b0:cd{stack} > f > {side}n > file"),
            ("below", "n") => format!("b0:cd{stack} > {side}n\nn.file > f > file"),
            (_, "n") => format!("b0:cd{stack} > {side}n > file"),
            ("above", q) => format!("b0:cd{stack} > f > {side}{q} > m0"),
            ("below", q) => format!("b0:cd{stack} > {side}{q} > f > m0"),
            (_, q) => format!("b0:cd{stack} > {side}{q} > m0"),
        };
        if node != "n" {
            text += &format!("\n{node}.children.1 > [dz] m1");
        }
        // Beside copy-on-read nobody else may write.
        let ro = if self.client_side[1] { ":ro" } else { "" };
        match self.second {
            "disk" => text += &format!("\nb1{ro} > {node}"),
            "node" => text += &format!("\nb1:ro:node > {node}"),
            _ => {}
        }
        text
    }
}

/// A mutator as the matrix runs it: in which settings, with what beside them, and what it is.
struct Row {
    name: &'static str,
    /// Lines that come to the setting.
    beside: fn(&Setting) -> String,
    /// Changes, one after the other.
    steps: fn(&Setting) -> Vec<Box<dyn Mutator>>,
}

fn one(m: impl Mutator + 'static) -> Vec<Box<dyn Mutator>> {
    vec![Box::new(m)]
}

fn snapshot(disk: &str, overlay: &str) -> Snapshot {
    Snapshot { disk: disk.into(), overlay: overlay.into(), sync: None }
}

fn replace(edge: &str, with: &str) -> Replace {
    Replace { edges: ReplaceEdges::Named(edge.into()), with: with.into() }
}

fn reopen(node: &str, zeroes: bool, children: &[(&str, Option<&str>)]) -> ReopenOne {
    let children = children.iter().map(|(c, t)| ((*c).to_owned(), t.map(str::to_owned)));
    ReopenOne { node: node.into(), zeroes, children: children.collect() }
}

fn add(name: &str, on: Option<&str>) -> Add {
    let on = on.map(str::to_owned);
    Add { name: name.into(), on, zeroes: false, read_only: false }
}

fn tray(what: Tray) -> Box<dyn Mutator> {
    Box::new(Media { door: "b0".into(), what })
}

fn child(change: ChildChange) -> Box<dyn Mutator> {
    Box::new(ChangeChild { parent: "q".into(), change })
}

fn grow(node: &str) -> Box<dyn Mutator> {
    child(ChildChange::Add(node.into()))
}

fn drop_child(name: &str) -> Box<dyn Mutator> {
    child(ChildChange::Remove(name.into()))
}

fn job(id: &str, mirror: bool, disk: &str, target: &str, replaces: Option<&str>) -> JobStart {
    let [id, disk, target] = [id, disk, target].map(str::to_owned);
    JobStart { id, mirror, disk, target, replaces: replaces.map(str::to_owned) }
}

fn starts(id: &str, mirror: bool, disk: &str, target: &str) -> Box<dyn Mutator> {
    Box::new(job(id, mirror, disk, target, None))
}

fn ends(id: &str) -> Box<dyn Mutator> {
    Box::new(JobEnd(id.into()))
}

fn completes(id: &str, target: &str, replaces: Option<&str>) -> Box<dyn Mutator> {
    let [id, target] = [id, target].map(str::to_owned);
    Box::new(JobComplete { id, target, replaces: replaces.map(str::to_owned) })
}

fn resize(disk: &str, blocks: u64, shrink: bool) -> Box<dyn Mutator> {
    Box::new(Resize { disk: disk.into(), size: blocks * BLOCK, shrink })
}

/// What the client of `b0` stands on.
fn under_b0(s: &Setting) -> &'static str {
    if s.explicit == "above" { "f" } else { "n" }
}

fn nothing(_: &Setting) -> String {
    String::new()
}

const ROWS: &[Row] = &[
    Row {
        name: "blockdev-snapshot of the node",
        beside: |_| "o > file".into(),
        steps: |_| one(snapshot("n", "o")),
    },
    Row {
        name: "blockdev-snapshot of the backend, to an overlay with a filter of its own",
        beside: |_| "[dz] o > file".into(),
        steps: |_| one(snapshot("b0", "o")),
    },
    Row {
        name: "blockdev-snapshot of the explicit filter",
        beside: |_| "o > file".into(),
        steps: |_| one(snapshot("f", "o")),
    },
    Row {
        name: "three in a row",
        beside: |_| "o > file; p > file; r > file".into(),
        steps: |_| {
            vec![
                Box::new(snapshot("n", "o")),
                Box::new(snapshot("b0", "p")),
                Box::new(snapshot("p", "r")),
            ]
        },
    },
    Row {
        name: "blockdev-snapshot below an overlay, where only backing edges stand",
        beside: |_| "b2 > a > [dz] k > file; l > k; o > file".into(),
        steps: |_| one(snapshot("k", "o")),
    },
    Row {
        name: "blockdev-snapshot-sync",
        beside: nothing,
        steps: |_| {
            let sync = Some("o.img".to_owned());
            vec![
                Box::new(Snapshot { sync: sync.clone(), ..snapshot("n", "o") }),
                Box::new(Snapshot { sync: Some("p.img".into()), ..snapshot("b0", "p") }),
            ]
        },
    },
    Row {
        name: "blockdev-replace, a filter under one client",
        beside: |_| "g > n".into(),
        steps: |_| one(replace("b0.root", "g")),
    },
    Row {
        name: "blockdev-replace, in and out again",
        beside: |s| format!("g > {}", under_b0(s)),
        steps: |s| {
            vec![Box::new(replace("b0.root", "g")), Box::new(replace("b0.root", under_b0(s)))]
        },
    },
    Row { name: "blockdev-replace, out", beside: nothing, steps: |_| one(replace("b0.root", "n")) },
    Row {
        name: "blockdev-replace of all",
        beside: |_| "g > n".into(),
        steps: |_| {
            let edges = ReplaceEdges::AllOf("n".into());
            one(Replace { edges, with: "g".into() })
        },
    },
    Row {
        name: "blockdev-replace of the only one",
        beside: |_| "g > n".into(),
        steps: |_| {
            let edges = ReplaceEdges::OnlyOf("n".into());
            one(Replace { edges, with: "g".into() })
        },
    },
    Row {
        name: "blockdev-replace below a format",
        beside: |_| "b2 > a; a.file > m; g > m".into(),
        steps: |_| one(replace("a.file", "g")),
    },
    Row {
        name: "blockdev-reopen, node option detect-zeroes",
        beside: nothing,
        steps: |s| {
            vec![
                Box::new(Reopen(vec![reopen("n", !s.node_side, &[])])),
                Box::new(Reopen(vec![reopen("n", s.node_side, &[])])),
            ]
        },
    },
    Row {
        name: "blockdev-reopen of several nodes",
        beside: |_| "b2 > a; a.file > m; g > m; x > file; y > file".into(),
        steps: |s| {
            one(Reopen(vec![
                reopen("n", !s.node_side, &[]),
                reopen("a", true, &[("file", Some("g"))]),
                reopen("x", false, &[("backing", Some("y"))]),
            ]))
        },
    },
    Row {
        name: "blockdev-reopen that turns a chain around",
        beside: |_| "x > y > file".into(),
        steps: |_| {
            one(Reopen(vec![
                reopen("y", true, &[("backing", Some("x"))]),
                reopen("x", false, &[("backing", None)]),
            ]))
        },
    },
    Row {
        name: "blockdev-reopen with a file that leaves one without a name",
        beside: |_| "x > file; m".into(),
        steps: |_| one(Reopen(vec![reopen("x", false, &[("file", Some("m"))])])),
    },
    Row {
        name: "block_set_io_throttle, made or changed, and removed",
        beside: nothing,
        steps: |_| {
            [Some("lim"), Some("thr"), None]
                .map(|group| Box::new(Throttle { door: "b0".into(), group }) as Box<dyn Mutator>)
                .into()
        },
    },
    Row {
        name: "a client made along comes and goes",
        beside: nothing,
        steps: |s| {
            let d = Door {
                filters: vec!["thr".into(), "dz".into()],
                to: Some("n".into()),
                writes: !s.client_side[1],
                along: true,
                ..NO_DOOR
            };
            vec![Box::new(AddDoor("b2".into(), d)), Box::new(Detach("b2".into()))]
        },
    },
    Row {
        name: "clients of backends made first",
        beside: nothing,
        steps: |_| {
            vec![
                Box::new(Attach("b0".into())),
                Box::new(Detach("b0".into())),
                Box::new(Attach("b0".into())),
                Box::new(DelDoor("b0".into())),
                Box::new(Detach("b0".into())),
                Box::new(DelDoor("b0".into())),
            ]
        },
    },
    Row {
        name: "a backend with copy-on-read beside others",
        beside: nothing,
        steps: |_| {
            let filters = vec!["thr".into(), "cor".into(), "dz".into()];
            let d = Door { filters, to: Some("n".into()), client: false, ..NO_DOOR };
            vec![Box::new(AddDoor("b2".into(), d)), Box::new(Attach("b2".into()))]
        },
    },
    Row {
        name: "blockdev-add on it, blockdev-del",
        beside: nothing,
        steps: |_| {
            vec![
                Box::new(Add { zeroes: true, ..add("g", Some("n")) }),
                Box::new(add("x", Some("n"))),
                Box::new(add("g", None)),
                Box::new(add("b0", None)),
                Box::new(add("y", Some("nobody"))),
                Box::new(Del("n".into())),
                Box::new(Del("g".into())),
            ]
        },
    },
];

/// Rows that go on the settings in which `n` is an overlay.
const MORE_ROWS: &[Row] = &[
    Row {
        name: "a medium out and in again",
        beside: nothing,
        steps: |s| {
            let back = || tray(Tray::Insert(under_b0(s).into()));
            vec![
                tray(Tray::Remove),
                back(),
                tray(Tray::Open),
                back(),
                tray(Tray::Remove),
                back(),
                tray(Tray::Close),
            ]
        },
    },
    Row {
        name: "eject, and another medium, which a client reads besides",
        beside: |_| "b2:ro > [dz] x > file; b3:ro:cd (cor); m9:ro".into(),
        steps: |_| {
            vec![
                tray(Tray::Eject),
                tray(Tray::Insert("m9".into())),
                tray(Tray::Insert("x".into())),
                tray(Tray::Close),
                Box::new(Media { door: "b3".into(), what: Tray::Insert("m9".into()) }),
                Box::new(Media { door: "b2".into(), what: Tray::Eject }),
            ]
        },
    },
    Row {
        name: "blockdev-change-medium, to what is there and to what is not",
        beside: nothing,
        steps: |_| {
            let change = |file: &str| tray(Tray::Change(file.into()));
            vec![change("missing.img"), change("new.img"), tray(Tray::Eject), change("other.img")]
        },
    },
    Row {
        name: "a backup starts and ends",
        beside: |_| "t > file".into(),
        steps: |_| vec![starts("j0", false, "n", "t"), ends("j0")],
    },
    Row {
        name: "a backup of what the client stands on, a medium out, and back",
        beside: |_| "t > file".into(),
        steps: |_| {
            vec![
                starts("j0", false, "b0", "t"),
                tray(Tray::Eject),
                tray(Tray::Insert("n".into())),
                ends("j0"),
            ]
        },
    },
    Row {
        name: "a snapshot while a backup runs, and node option detect-zeroes",
        beside: |_| "t > file; o > file".into(),
        steps: |s| {
            vec![
                starts("j0", false, "n", "t"),
                Box::new(Reopen(vec![reopen("n", !s.node_side, &[])])),
                Box::new(snapshot("n", "o")),
                ends("j0"),
            ]
        },
    },
    Row {
        name: "a mirror completes",
        beside: |_| "[dz] t > file".into(),
        steps: |_| vec![starts("j0", true, "n", "t"), completes("j0", "t", None)],
    },
    Row {
        name: "a mirror goes up over a snapshot beside a backup that stays, and completes",
        beside: |_| "t > file; u > file; o > file".into(),
        steps: |_| {
            vec![
                starts("j0", true, "n", "t"),
                starts("j1", false, "n", "u"),
                Box::new(snapshot("n", "o")),
                completes("j0", "t", None),
                ends("j1"),
            ]
        },
    },
    Row {
        name: "jobs that must not start, and what must not be done to those that run",
        beside: |_| "t > file; u > t; x > file".into(),
        steps: |_| {
            vec![
                starts("j0", false, "n", "n"),
                starts("j0", false, "n", "nobody"),
                starts("j0", false, "t", "u"),
                Box::new(job("j0", true, "n", "t", Some("x"))),
                starts("j0", true, "n", "x"),
                resize("n", 96, false),
                resize("x", 96, false),
                Box::new(Del("x".into())),
                Box::new(snapshot("t", "x")),
                ends("j0"),
            ]
        },
    },
    Row {
        name: "block_resize up and down, of the node and of the backend",
        beside: |_| "g > n".into(),
        steps: |_| {
            vec![
                resize("n", 96, false),
                resize("b0", 128, false),
                resize("n", 64, false),
                resize("g", 64, true),
            ]
        },
    },
    Row {
        name: "block_resize below others: a format, an overlay, a snapshot on what has grown",
        beside: |_| "b2 > a > k > file; a.file > m; o > file".into(),
        steps: |_| {
            vec![
                resize("m", 96, false),
                resize("k", 96, false),
                resize("a", 96, false),
                resize("n", 96, false),
                Box::new(snapshot("n", "o")),
                resize("o", 96, false),
                Box::new(snapshot("n", "o")),
            ]
        },
    },
];

/// Rows that go on the settings in which the node is `q`, which has copies.
const QUORUM_ROWS: &[Row] = &[
    Row {
        name: "x-blockdev-change, in and out",
        beside: |_| "[dz] m2; f2 > m2; m3".into(),
        steps: |_| {
            vec![
                grow("f2"),
                grow("m3"),
                grow("m3"),
                drop_child("children.1"),
                drop_child("children.3"),
                drop_child("children.2"),
            ]
        },
    },
    Row {
        name: "x-blockdev-change that is refused",
        beside: |_| "m2; m3:ro; b4 > m4; g > q".into(),
        steps: |_| {
            vec![
                grow("m3"),
                grow("m4"),
                grow("g"),
                grow("nobody"),
                drop_child("children.7"),
                drop_child("children.1"),
                Box::new(ChangeChild {
                    parent: "m2".into(),
                    change: ChildChange::Add("m4".into()),
                }),
                resize("m1", 96, false),
            ]
        },
    },
    Row {
        name: "a snapshot of a quorum, and of one of its children",
        beside: |_| "o > file; p > file; m2".into(),
        steps: |_| vec![Box::new(snapshot("m1", "p")), Box::new(snapshot("q", "o")), grow("m2")],
    },
    Row {
        name: "a mirror of a quorum repairs one of its children",
        beside: |_| "m2; m3; m4; o > file".into(),
        steps: |_| {
            vec![
                Box::new(job("j0", true, "q", "m2", Some("m1"))),
                grow("m3"),
                drop_child("children.1"),
                Box::new(snapshot("m1", "o")),
                starts("j1", false, "m1", "m4"),
                completes("j0", "m2", Some("m1")),
                ends("j1"),
                drop_child("children.1"),
            ]
        },
    },
    Row {
        name: "a mirror that can replace a child no more since a snapshot",
        beside: |_| "m2; o > file".into(),
        steps: |_| {
            vec![
                Box::new(job("j0", true, "q", "m2", Some("m1"))),
                Box::new(snapshot("q", "o")),
                completes("j0", "m2", Some("m1")),
                ends("j0"),
                drop_child("children.1"),
            ]
        },
    },
];

/// All rows, each with the node that it is about.
fn rows() -> impl Iterator<Item = (&'static str, &'static Row)> {
    let plain = ROWS.iter().chain(MORE_ROWS).map(|r| ("n", r));
    plain.chain(QUORUM_ROWS.iter().map(|r| ("q", r)))
}

/// Row and setting as one run; the number of changes of each outcome.
fn run(node: &str, row: &Row, s: &Setting, seed: u64) -> [usize; 2] {
    World::new(seed).run(async {
        let text = format!("{}\n{}", s.text(node), (row.beside)(s));
        let stage = Stage::build(&text, seed, file_options(seed.is_multiple_of(2))).await;
        assert_eq!(stage.sketch().await, Sketch::parse(&text), "built as written");
        let mut outcomes = [0, 0];
        for m in (row.steps)(s) {
            stage.work(2).await;
            let outcome = stage.change(&*m, None).await;
            outcomes[usize::from(outcome == Outcome::Refused)] += 1;
            stage.work(2).await;
        }
        stage.end().await;
        outcomes
    })
}

fn part(which: usize, of: usize) {
    let (mut cases, mut outcomes, mut failed) = (0, [0, 0], BTreeMap::new());
    for (i, (node, row)) in rows().enumerate() {
        for (j, s) in Setting::all().enumerate() {
            if (i + j) % of != which {
                continue;
            }
            let seed = (i * 1000 + j) as u64;
            match caught(|| run(node, row, &s, seed)) {
                Ok(r) => outcomes = [outcomes[0] + r[0], outcomes[1] + r[1]],
                Err(why) => {
                    let first = || (0, format!("{s:?}, seed {seed}:\n{}\n{why}", s.text(node)));
                    failed.entry(row.name).or_insert_with(first).0 += 1;
                }
            }
            cases += 1;
        }
    }
    println!(
        "{cases} cases: {} changes done, {} refused as they must be",
        outcomes[0], outcomes[1]
    );
    for (name, (n, first)) in &failed {
        println!("'{name}' fails in {n} settings, first in {first}\n");
    }
    assert!(failed.is_empty(), "{} rows fail", failed.len());
    assert_eq!(cases, rows().count() * Setting::all().count() / of);
}

#[test]
fn every_mutator_in_every_setting_first_half() {
    part(0, 2);
}

#[test]
fn every_mutator_in_every_setting_second_half() {
    part(1, 2);
}

//! Thousands of nodes and backends, and chains of hundreds of filters: the time of an operation
//! does not grow with what else is there, and that of a query only with what it tells.
#![allow(missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::load::{Host, quantile};
use common::soak;
use gipfel_testkit::Scratch;
use gipfel_testkit::qmp::Qmp;
use serde_json::{Value, json};

/// How much slower the last operations may be than the first, on a machine that does other things
/// too.
const SLOWER: f64 = 3.0;

/// Runs `f` for each number and compares the last tenth with the first. Gives the middle times.
fn steady(what: &str, numbers: impl Iterator<Item = usize>, mut f: impl FnMut(usize)) {
    let mut took: Vec<Duration> = numbers
        .map(|n| {
            let start = Instant::now();
            f(n);
            start.elapsed()
        })
        .collect();
    let tenth = took.len() / 10;
    let all: Duration = took.iter().sum();
    let first = quantile(&mut took[..tenth], 0.5);
    let end = took.len() - tenth;
    let last = quantile(&mut took[end..], 0.5);
    println!("{what}: {all:?} in all; one of the first {first:?}, of the last {last:?}");
    let (slow, fast) = (first.max(last), first.min(last).max(Duration::from_micros(20)));
    assert!(slow.as_secs_f64() <= SLOWER * fast.as_secs_f64(), "{what}: {first:?}, {last:?}");
}

const QUERIES: [&str; 4] =
    ["query-backends", "query-block", "query-named-block-nodes", "x-debug-query-block-graph"];

/// The number of things that a query told of, and the shortest time it took in up to `runs` runs:
/// no more are made once it was within `enough`.
fn query(q: &mut Qmp, name: &str, runs: usize, enough: Duration) -> (usize, Duration) {
    let flat = name == "query-named-block-nodes";
    let arguments = if flat { json!({ "flat": true }) } else { json!({}) };
    let (mut told, mut fastest) = (0, Duration::MAX);
    for _ in 0..runs {
        let start = Instant::now();
        let v = q.command(name, arguments.clone());
        fastest = fastest.min(start.elapsed());
        told = match &v {
            Value::Array(list) => list.len(),
            graph => graph["nodes"].as_array().unwrap().len(),
        };
        if fastest <= enough {
            break;
        }
    }
    (told, fastest)
}

#[test]
fn many_nodes_and_backends() {
    let count = soak(2_000, 10_000);
    let host = Host::start(Scratch::new("scale-many"), &[]);
    let mut q = host.qmp();
    let add_node = |q: &mut Qmp, n: usize| {
        let node = match n % 2 {
            0 => json!({ "driver": "null-co", "node-name": format!("n{n}"), "size": 65536 }),
            _ => json!({
                "driver": "raw", "node-name": format!("n{n}"), "file": format!("n{}", n - 1),
            }),
        };
        q.command("blockdev-add", node);
    };
    let add_backend = |q: &mut Qmp, n: usize| {
        // Two on each raw node.
        let backend = json!({ "name": format!("b{n}"), "node-name": format!("n{}", n | 1) });
        q.command("backend-add", backend);
    };
    // A quarter first, to see how the queries grow.
    let quarter = count / 4;
    (0..quarter).for_each(|n| add_node(&mut q, n));
    (0..quarter).for_each(|n| add_backend(&mut q, n));
    let few = QUERIES.map(|name| query(&mut q, name, 3, Duration::ZERO));
    (0..quarter).for_each(|n| drop(q.command("backend-del", json!({ "name": format!("b{n}") }))));
    let del = |q: &mut Qmp, n: usize| {
        q.command("blockdev-del", json!({ "node-name": format!("n{n}") }));
    };
    (0..quarter).rev().for_each(|n| del(&mut q, n));

    steady("blockdev-add", 0..count, |n| add_node(&mut q, n));
    steady("backend-add", 0..count, |n| add_backend(&mut q, n));
    for (name, (least, fast)) in QUERIES.into_iter().zip(few) {
        // Were it quadratic, it would be sixteen times as long.
        let bound = fast.mul_f64(4.0 * 2.5);
        let (most, slow) = query(&mut q, name, 20, bound);
        println!("{name}: {fast:?} for {least}, {slow:?} for {most}");
        assert!(most >= count && least * 4 == most, "{name} told of {least}, then of {most}");
        assert!(slow <= bound, "{name}: {fast:?}, then {slow:?}");
    }
    let e = q.refused("backend-add", json!({ "name": "b7" }));
    assert_eq!(e.desc, "there is a backend 'b7' already");
    steady("backend-del", 0..count, |n| {
        q.command("backend-del", json!({ "name": format!("b{n}") }));
    });
    // Those on top first.
    steady("blockdev-del", (0..count).rev(), |n| del(&mut q, n));
    for name in QUERIES {
        assert_eq!(query(&mut q, name, 1, Duration::MAX).0, 0, "{name}");
    }
    // With all of them there, the end is quick too.
    (0..count).for_each(|n| add_node(&mut q, n));
    (0..count).for_each(|n| add_backend(&mut q, n));
    let start = Instant::now();
    host.end();
    println!("the end, with all of them there: {:?}", start.elapsed());
}

/// A node of this driver over another.
fn layer(driver: &str, name: &str, below: &str) -> Value {
    let mut node = json!({ "driver": driver, "node-name": name, "file": below });
    if driver == "throttle" {
        node["throttle-group"] = json!("tg");
    }
    node
}

#[test]
fn chains_of_hundreds_of_filters() {
    for driver in ["throttle", "raw", "copy-on-read"] {
        let scratch = Scratch::new("scale-chain");
        let bytes: Vec<u8> = (0..1 << 20).map(|n: u32| (n / 4096) as u8).collect();
        let file = format!("file,node-name=c0,filename={}", scratch.file("disk.raw", &bytes));
        let group = "throttle-group,id=tg,limits.iops-total=1000000";
        let host = Host::start(scratch, &["--object", group, "--blockdev", &file]);
        let mut q = host.qmp();
        let start = Instant::now();
        for n in 1..=200 {
            q.command("blockdev-add", layer(driver, &format!("c{n}"), &format!("c{}", n - 1)));
        }
        println!("200 x {driver}: {:?}", start.elapsed());
        let export = json!({
            "type": "nbd", "id": "e", "name": "e", "node-name": "c200", "writable": true,
        });
        q.command("block-export-add", export);
        let mut c = host.client("e");
        let start = Instant::now();
        for n in 0..256u64 {
            assert_eq!(c.read(n * 4096, 4096).unwrap(), [n as u8; 4096]);
        }
        c.write(8192, &[0x77; 4096], 0).unwrap();
        c.flush().unwrap();
        assert_eq!(c.read(8192, 4096).unwrap(), [0x77; 4096]);
        let took = start.elapsed();
        println!("256 reads through them: {took:?}");
        assert!(took < Duration::from_secs(10), "{driver}: {took:?}");
        // In the middle one is put in and taken out.
        q.command("blockdev-add", layer("throttle", "mid", "c100"));
        q.command("blockdev-replace", json!({ "edge": "c101.file", "with": "mid" }));
        assert_eq!(c.read(8192, 4096).unwrap(), [0x77; 4096]);
        q.command("blockdev-replace", json!({ "edge": "c101.file", "with": "c100" }));
        q.command("blockdev-del", json!({ "node-name": "mid" }));
        // How deep it may be is told.
        let refused = (201..).find_map(|n| {
            let node = layer(driver, &format!("c{n}"), &format!("c{}", n - 1));
            q.try_command("blockdev-add", node).unwrap().err().map(|e| (n, e))
        });
        let (n, e) = refused.unwrap();
        assert!(n == 256 && e.desc.contains("at most 256 are allowed"), "{n}: {e:?}");
        let nodes = q.command("query-named-block-nodes", json!({ "flat": true }));
        assert_eq!(nodes.as_array().unwrap().len(), 256);
        // From below as well: the whole chain on top counts.
        q.command("blockdev-add", layer("throttle", "mid", "c100"));
        let e = q.refused("blockdev-replace", json!({ "edge": "c101.file", "with": "mid" }));
        assert!(e.desc.contains("at most 256 are allowed"), "{e:?}");
        assert_eq!(c.read(8192, 4096).unwrap(), [0x77; 4096]);
        c.disconnect().unwrap();
        host.end();
    }
}

//! Thousands of nodes and backends, and chains of hundreds of filters: a change costs what its
//! neighbourhood is large, not the graph, and a query what it tells of.
#![allow(missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::load::Host;
use common::{PATIENCE, soak};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Scratch, tools};
use serde_json::{Value, json};

/// How much more each thing may cost amid the most others than amid the fewest, an eighth of them.
/// Were the times quadratic, it would be eight times as much. What the processor's caches do not
/// hold any more accounts for some.
const DEARER: f64 = 3.0;
/// Costs below this are alike.
const LEAST: Duration = Duration::from_micros(20);

const QUERIES: [&str; 5] = [
    "query-named-block-nodes",
    "query-block",
    "query-backends",
    "query-graph",
    "x-debug-query-block-graph",
];

/// What each thing costs the daemon's main thread, for each size of the graph. That is not the time
/// until it is answered, which is also that of other processes.
struct Table<'a> {
    daemon: &'a Daemon,
    /// The size that is at hand.
    column: usize,
    rows: Vec<(String, Vec<Duration>)>,
}

impl Table<'_> {
    /// `f` does something `count` times. Of several such calls the cheapest counts: even time on a
    /// processor is longer while others use its caches.
    fn add(&mut self, what: &str, count: usize, f: impl FnOnce()) {
        let before = self.daemon.main_thread_time();
        f();
        let cost = (self.daemon.main_thread_time() - before) / count as u32;
        let row = self.rows.iter().position(|row| row.0 == what).unwrap_or_else(|| {
            self.rows.push((what.to_owned(), Vec::new()));
            self.rows.len() - 1
        });
        let costs = &mut self.rows[row].1;
        match costs.get_mut(self.column) {
            Some(least) => *least = cost.min(*least),
            None => costs.push(cost),
        }
    }

    /// Prints it, and looks whether each thing costs the same amid few and amid many.
    fn judge(&self, sizes: &[usize]) {
        println!("us for each, amid so many nodes and backends: {sizes:?}");
        for (what, costs) in &self.rows {
            let us: Vec<_> = costs.iter().map(|c| c.as_secs_f64() * 1e6).collect();
            println!("{what:28} {us:8.1?}");
        }
        for (what, costs) in &self.rows {
            let (few, many) = (costs[0].max(LEAST), costs[costs.len() - 1]);
            assert!(many <= few.mul_f64(DEARER), "{what}: {few:?} amid few, {many:?} amid many");
        }
    }
}

/// How many things a query tells of.
fn query(q: &mut Qmp, name: &str) -> usize {
    let arguments = match name {
        "query-named-block-nodes" => json!({ "flat": true }),
        _ => json!({}),
    };
    match q.command(name, arguments) {
        Value::Array(list) => list.len(),
        graph => graph["nodes"].as_array().unwrap().len(),
    }
}

/// Nodes and backends come and go amid the others.
fn add_and_del(q: &mut Qmp, t: &mut Table<'_>) {
    let count = 200;
    let mut each = |what: &str, arguments: &dyn Fn(usize) -> Value| {
        t.add(what, count, || (0..count).for_each(|n| drop(q.command(what, arguments(n)))));
    };
    each("blockdev-add", &|n| json!({ "driver": "null-co", "node-name": format!("x{n}") }));
    each("backend-add", &|n| json!({ "name": format!("y{n}"), "node-name": format!("x{n}") }));
    each("backend-del", &|n| json!({ "name": format!("y{n}") }));
    each("blockdev-del", &|n| json!({ "node-name": format!("x{n}") }));
}

/// Snapshots, and a filter put in and out, of one disk with a client amid all others.
fn mutators(scratch: &Scratch, q: &mut Qmp, t: &mut Table<'_>) {
    let overlays = 8;
    let below = |n: usize| if n == 0 { "base".to_owned() } else { format!("o{}", n - 1) };
    let base = json!({ "driver": "null-co", "node-name": "base", "size": 65536 });
    q.command("blockdev-add", base);
    let export = json!({
        "type": "nbd", "id": "e", "name": "e", "node-name": "base", "writable": true,
    });
    q.command("block-export-add", export);
    for n in 0..overlays {
        let file = scratch.arg(&format!("o{n}"));
        std::fs::copy(scratch.path("empty.qcow2"), &file).unwrap();
        let overlay = json!({
            "driver": "qcow2", "node-name": format!("o{n}"), "backing": null,
            "file": { "driver": "file", "filename": file },
        });
        q.command("blockdev-add", overlay);
    }
    t.add("blockdev-snapshot", overlays, || {
        for n in 0..overlays {
            let overlay = format!("o{n}");
            q.command("blockdev-snapshot", json!({ "node": below(n), "overlay": overlay }));
        }
    });
    let top = below(overlays);
    q.command("blockdev-add", json!({ "driver": "copy-on-read", "node-name": "f", "file": top }));
    t.add("blockdev-replace", 40, || {
        for _ in 0..20 {
            q.command("blockdev-replace", json!({ "node": top, "with": "f" }));
            q.command("blockdev-replace", json!({ "node": "f", "with": top }));
        }
    });
    q.command("blockdev-del", json!({ "node-name": "f" }));
    q.command("block-export-del", json!({ "id": "e" }));
    q.wait_event("BLOCK_EXPORT_DELETED", PATIENCE).unwrap();
    let del = |n: usize| json!({ "node-name": below(n) });
    (0..=overlays).rev().for_each(|n| drop(q.command("blockdev-del", del(n))));
}

#[test]
fn many_nodes_and_backends() {
    let most = soak(4_000, 10_000);
    let sizes = [most / 8, most / 4, most / 2, most];
    let scratch = Scratch::new("scale-many");
    let empty = scratch.arg("empty.qcow2");
    tools::run(
        &Daemon::binary().to_string_lossy(),
        &["img", "create", "-q", "-f", "qcow2", &empty, "64K"],
    );
    let host = Host::start(scratch, &[]);
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
    let mut t = Table { daemon: &host.daemon, column: 0, rows: Vec::new() };
    let mut there = 0;
    for size in sizes {
        let start = Instant::now();
        (there..size).for_each(|n| add_node(&mut q, n));
        (there..size).for_each(|n| add_backend(&mut q, n));
        println!("{there} to {size} nodes and backends: {:?}", start.elapsed());
        there = size;
        for _ in 0..3 {
            add_and_del(&mut q, &mut t);
            mutators(&host.scratch, &mut q, &mut t);
            for name in QUERIES {
                // For each thing told; both pictures tell of nodes and backends.
                let each = if name.ends_with("graph") { 2 * size } else { size };
                t.add(name, each, || assert_eq!(query(&mut q, name), each, "{name}"));
            }
        }
        t.column += 1;
    }
    t.judge(&sizes);
    let e = q.refused("backend-add", json!({ "name": "b7" }));
    assert_eq!(e.desc, "there is a backend 'b7' already");
    let start = Instant::now();
    (0..most).for_each(|n| drop(q.command("backend-del", json!({ "name": format!("b{n}") }))));
    // Those on top first.
    let del = |n: usize| json!({ "node-name": format!("n{n}") });
    (0..most).rev().for_each(|n| drop(q.command("blockdev-del", del(n))));
    println!("all of them removed: {:?}", start.elapsed());
    for name in QUERIES {
        assert_eq!(query(&mut q, name), 0, "{name}");
    }
    // With all of them there, the end is quick too.
    (0..most).for_each(|n| add_node(&mut q, n));
    (0..most).for_each(|n| add_backend(&mut q, n));
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

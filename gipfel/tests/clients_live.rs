//! What clients are promised while the graph changes: limits stay in force to the request, members
//! of a throttle group get equal shares, and an export of a moment stays at that moment.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::load::{Host, quantile};
use common::soak;
use gipfel_testkit::nbd::{Client, Command, wire};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Rng, Scratch, tools};
use serde_json::{Value, json};

const BLOCK: usize = 4096;

/// Keeps `depth` reads of `len` bytes in flight until told to stop, and counts those that are done.
fn keep_reading(mut c: Client, depth: usize, len: u32, stop: &AtomicBool, done: &AtomicU64) {
    let request = Command { kind: wire::CMD_READ, flags: 0, offset: 0, length: len, payload: &[] };
    c.submit_all(&vec![request; depth]).unwrap();
    while c.in_flight() > 0 {
        c.complete().unwrap().result.unwrap();
        done.fetch_add(1, Ordering::Relaxed);
        if !stop.load(Ordering::Relaxed) {
            c.submit(&request).unwrap();
        }
    }
}

fn limits(client: &str, iops: u64) -> Value {
    json!({
        "id": client, "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": iops, "iops_rd": 0, "iops_wr": 0,
    })
}

fn null(q: &mut Qmp, name: &str) {
    q.command("blockdev-add", json!({ "driver": "null-co", "node-name": name, "size": 1 << 20 }));
}

fn export(q: &mut Qmp, id: &str, node: &str, more: Value) {
    let mut e = json!({ "type": "nbd", "id": id, "name": id, "node-name": node });
    e.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    q.command("block-export-add", e);
}

const IOPS: u64 = 500;

/// Whom the limit belongs to.
#[derive(Clone, Copy, Debug)]
enum Limit {
    /// The backend: an implicit filter.
    Client,
    /// A node that stands on the disk.
    Node,
}

/// Completions in each of four seconds, while a snapshot, a filter put in and a filter taken out
/// happen under a queue of throttled requests.
fn rates(limit: Limit) -> Vec<f64> {
    let scratch = Scratch::new("clients-rate");
    let (base, over) = (scratch.arg("base.qcow2"), scratch.arg("over.qcow2"));
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &base, "1M"]);
    let object = format!("throttle-group,id=tg,limits.iops-total={IOPS}");
    let host = Host::start(scratch, &["--object", &object]);
    let mut q = host.qmp();
    let disk = json!({
        "driver": "qcow2", "node-name": "disk", "file": { "driver": "file", "filename": base },
    });
    q.command("blockdev-add", disk);
    let throttle = json!({
        "driver": "throttle", "node-name": "t", "throttle-group": "tg", "file": "disk",
    });
    match limit {
        Limit::Client => {
            export(&mut q, "e", "disk", json!({ "writable": true }));
            q.command("block_set_io_throttle", limits("e", IOPS));
        }
        Limit::Node => {
            q.command("blockdev-add", throttle);
            export(&mut q, "e", "t", json!({ "writable": true }));
        }
    }
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|s| {
        for _ in 0..4 {
            let c = host.client("e");
            s.spawn(|| keep_reading(c, 64, BLOCK as u32, &stop, &done));
        }
        // The first tenth of a second's worth goes at once: that is the bucket.
        std::thread::sleep(Duration::from_millis(500));
        let mut rates = Vec::new();
        for second in 0..4 {
            let (from, before) = (Instant::now(), done.load(Ordering::Relaxed));
            std::thread::sleep(Duration::from_millis(400));
            match second {
                1 => {
                    let s = json!({
                        "node-name": "disk", "snapshot-file": over, "snapshot-node-name": "over",
                    });
                    q.command("blockdev-snapshot-sync", s);
                }
                2 => {
                    let f = json!({ "driver": "copy-on-read", "node-name": "f", "file": "over" });
                    q.command("blockdev-add", f);
                    q.command("blockdev-replace", json!({ "node": "over", "with": "f" }));
                }
                3 => drop(q.command("blockdev-replace", json!({ "node": "f", "with": "over" }))),
                _ => {}
            }
            std::thread::sleep(Duration::from_secs(1).saturating_sub(from.elapsed()));
            let n = done.load(Ordering::Relaxed) - before;
            rates.push(n as f64 / from.elapsed().as_secs_f64());
        }
        stop.store(true, Ordering::Relaxed);
        // Nobody waits for the queue.
        match limit {
            Limit::Client => drop(q.command("block_set_io_throttle", limits("e", 0))),
            Limit::Node => {
                let no =
                    json!({ "path": "tg", "property": "limits", "value": { "iops-total": 0 } });
                q.command("qom-set", no);
            }
        }
        rates
    })
}

#[test]
fn limits_hold_through_a_snapshot_and_a_filter() {
    if !tools::have("qemu-img") {
        return;
    }
    let hold = |limit| {
        for _ in 0..soak(1, 5) {
            let seen = rates(limit);
            println!("{limit:?}, requests in each second of {IOPS} allowed: {seen:.1?}");
            let held = seen.iter().all(|r| (r / IOPS as f64 - 1.0).abs() <= 0.05);
            assert!(held, "{limit:?}: {seen:.1?}");
        }
    };
    std::thread::scope(|s| {
        let node = s.spawn(|| hold(Limit::Node));
        hold(Limit::Client);
        node.join().unwrap();
    });
}

/// Requests of each of six members, the first three in a group with a limit of requests, the
/// others in one with a limit of bytes.
fn shares() -> Vec<u64> {
    let host = Host::start(
        Scratch::new("clients-fair"),
        &[
            "--object",
            "throttle-group,id=g0,limits.iops-total=600",
            "--object",
            "throttle-group,id=g1,limits.bps-read=2457600",
        ],
    );
    let mut q = host.qmp();
    let (stop, done) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; 6]);
    std::thread::scope(|s| {
        for (n, count) in done.iter().enumerate() {
            let name = format!("n{n}");
            null(&mut q, &name);
            let group = format!("g{}", n / 3);
            let backend = json!({ "name": format!("b{n}"), "node-name": name, "read-only": true,
                                  "throttle-group": group });
            q.command("backend-add", backend);
            export(&mut q, &format!("e{n}"), &format!("b{n}"), json!({}));
            let (c, stop) = (host.client(&format!("e{n}")), &stop);
            // Whoever asks for more gets no more.
            s.spawn(move || keep_reading(c, 16 << (n % 3), BLOCK as u32, stop, count));
        }
        std::thread::sleep(Duration::from_millis(500));
        let now = || done.iter().map(|d| d.load(Ordering::Relaxed)).collect::<Vec<_>>();
        let before = now();
        std::thread::sleep(Duration::from_millis(soak(2000, 10_000)));
        let after = now();
        stop.store(true, Ordering::Relaxed);
        for g in ["g0", "g1"] {
            let no = json!({ "path": g, "property": "limits",
                             "value": { "iops-total": 0, "bps-read": 0 } });
            q.command("qom-set", no);
        }
        after.iter().zip(before).map(|(a, b)| a - b).collect()
    })
}

#[test]
fn members_of_two_groups_get_equal_shares() {
    let seen = shares();
    println!("requests of each member: {seen:?}");
    let fair = seen.chunks(3).all(|group| {
        let mean = group.iter().sum::<u64>() as f64 / 3.0;
        group.iter().all(|n| (*n as f64 / mean - 1.0).abs() <= 0.05)
    });
    assert!(fair, "{seen:?}");
}

/// Numbers written so far in each block of a disk.
struct Stamps {
    /// The last one that was sent.
    sent: Vec<u64>,
    /// The last one that was acknowledged.
    done: Vec<u64>,
}

/// Writes ever higher numbers into random blocks, several at a time.
fn stamp(mut c: Client, stamps: &Mutex<Stamps>, mut rng: Rng, stop: &AtomicBool) {
    let mut flying: Vec<(u64, usize, u64)> = Vec::new();
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) || !flying.is_empty() {
        while flying.len() < 8 && !stop.load(Ordering::Relaxed) {
            let block = rng.below(BLOCKS) as usize;
            if flying.iter().any(|f| f.1 == block) {
                continue;
            }
            number += 1;
            stamps.lock().unwrap().sent[block] = number;
            let data = u64::to_le_bytes(number).repeat(BLOCK / 8);
            let offset = (block * BLOCK) as u64;
            let length = BLOCK as u32;
            let w = Command { kind: wire::CMD_WRITE, flags: 0, offset, length, payload: &data };
            flying.push((c.submit(&w).unwrap(), block, number));
        }
        let answer = c.complete().unwrap();
        answer.result.unwrap();
        let at = flying.iter().position(|f| f.0 == answer.cookie).unwrap();
        let (_, block, number) = flying.swap_remove(at);
        stamps.lock().unwrap().done[block] = number;
    }
}

const BLOCKS: u64 = 1024;

/// The number in each block of an export; a block that holds two is torn.
fn numbers(c: &mut Client) -> Vec<u64> {
    let data = c.read(0, (BLOCKS as usize * BLOCK) as u32).unwrap();
    let number = |b: &[u8]| u64::from_le_bytes(b[..8].try_into().unwrap());
    data.chunks(BLOCK)
        .map(|b| {
            assert!(b.chunks(8).all(|w| w == &b[..8]), "a block is torn");
            number(b)
        })
        .collect()
}

#[test]
fn an_export_of_a_moment_stays_constant() {
    if !tools::have("qemu-img") {
        return;
    }
    let rng = Rng::from_env();
    println!("seed {}", rng.seed());
    let scratch = Scratch::new("clients-moment");
    let base = scratch.arg("base.qcow2");
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &base, "4M"]);
    let file = format!("qcow2,node-name=d0,file.driver=file,file.filename={base}");
    let host = Host::start(scratch, &["--blockdev", &file]);
    let mut q = host.qmp();
    export(&mut q, "live", "d0", json!({ "writable": true }));
    let blocks = BLOCKS as usize;
    let stamps = Arc::new(Mutex::new(Stamps { sent: vec![0; blocks], done: vec![0; blocks] }));
    let stop = Arc::new(AtomicBool::new(false));
    let (c, s, end) = (host.client("live"), stamps.clone(), stop.clone());
    let writer = std::thread::spawn(move || stamp(c, &s, rng, &end));
    let mut moments: Vec<(Client, Vec<u64>)> = Vec::new();
    let mut pauses = Vec::new();
    for round in 0..soak(6, 40) {
        std::thread::sleep(Duration::from_millis(50));
        let (node, id) = (format!("d{round}"), format!("m{round}"));
        export(&mut q, &id, &node, json!({ "follow": "node" }));
        let mut c = host.client(&id);
        numbers(&mut c);
        let before = stamps.lock().unwrap().done.clone();
        let start = Instant::now();
        let over = host.scratch.arg(&format!("d{}.qcow2", round + 1));
        let s = json!({
            "node-name": node, "snapshot-file": over,
            "snapshot-node-name": format!("d{}", round + 1),
        });
        q.command("blockdev-snapshot-sync", s);
        pauses.push(start.elapsed());
        let after = stamps.lock().unwrap().sent.clone();
        // The moment lies within the command.
        let now = numbers(&mut c);
        for b in 0..blocks {
            let within = before[b] <= now[b] && now[b] <= after[b];
            assert!(within, "block {b}: {} not from {} to {}", now[b], before[b], after[b]);
        }
        moments.push((c, now));
        for (c, then) in &mut moments {
            assert!(numbers(c) == *then, "an export of a moment has changed");
        }
        assert!(!writer.is_finished(), "the writer saw an error");
    }
    std::thread::sleep(Duration::from_millis(200));
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    for (c, then) in &mut moments {
        assert!(numbers(c) == *then, "an export of a moment has changed");
    }
    let live = numbers(&mut host.client("live"));
    assert!(live == stamps.lock().unwrap().done, "the live export shows what was written");
    assert!(moments.iter().all(|(_, then)| *then != live), "the writer wrote after each moment");
    println!("snapshots: half within {:?}", quantile(&mut pauses, 0.5));
    drop(moments);
    host.end();
}

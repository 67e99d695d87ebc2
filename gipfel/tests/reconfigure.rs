//! Snapshots and filters come and go under writers: no error, no wrong byte, clean images.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{Served, soak};
use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::{DiskModel, Rng, tools};
use serde_json::json;

const SIZE: u64 = 32 << 20;
const WRITERS: u64 = 4;

fn writer(address: &Address, n: u64, seed: u64, stop: &AtomicBool, done: &AtomicU64) -> DiskModel {
    let mut c = Client::connect(address, "x").unwrap();
    let mut rng = Rng::new(seed + n);
    let mut model = DiskModel::new(SIZE);
    let part = SIZE / WRITERS;
    while !stop.load(Ordering::Relaxed) {
        let at = n * part + rng.below(part - 20_000);
        let len = rng.between(1, 20_000);
        match rng.below(8) {
            0..=3 => {
                let data = rng.bytes(len as usize);
                c.write(at, &data, 0).unwrap();
                model.write(at, &data);
            }
            4 => {
                c.zero(at, len as u32, 0).unwrap();
                model.zero(at, len);
            }
            5 if rng.one_in(10) => c.flush().unwrap(),
            _ => model.expect(at, &c.read(at, len as u32).unwrap()),
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    c.flush().unwrap();
    model
}

#[test]
fn snapshots_and_filters_under_four_writers() {
    if !tools::have("qemu-img") {
        return;
    }
    let rng = Rng::from_env();
    println!("seed {}", rng.seed());
    let seed = rng.seed();
    let rounds = soak(25, 200);
    let served = Served::new("reconfigure", "32M", &[], "");
    let stop = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..WRITERS)
        .map(|n| {
            let (address, stop, done) = (served.address(), stop.clone(), done.clone());
            std::thread::spawn(move || writer(&address, n, seed, &stop, &done))
        })
        .collect();
    let mut qmp = served.qmp();
    let mut top = "disk".to_owned();
    for i in 1..=rounds {
        let before = done.load(Ordering::Relaxed);
        let over = format!("s{i}");
        let file = served.scratch.arg(&format!("{over}.qcow2"));
        qmp.command(
            "blockdev-snapshot-sync",
            json!({ "node-name": top, "snapshot-file": file, "snapshot-node-name": over }),
        );
        top = over;
        let throttle = json!({
            "driver": "throttle", "node-name": "filter", "throttle-group": "tg", "file": top
        });
        qmp.command("blockdev-add", throttle);
        qmp.command("blockdev-replace", json!({ "node": top, "with": "filter" }));
        qmp.command("blockdev-replace", json!({ "node": "filter", "with": top }));
        qmp.command("blockdev-del", json!({ "node-name": "filter" }));
        // The writers get on with it between the changes.
        while done.load(Ordering::Relaxed) < before + 40 {
            assert!(writers.iter().all(|w| !w.is_finished()), "a writer failed");
            std::thread::yield_now();
        }
    }
    stop.store(true, Ordering::Relaxed);
    let models: Vec<_> = writers.into_iter().map(|w| w.join().unwrap()).collect();
    let mut whole = DiskModel::new(SIZE);
    let part = SIZE / WRITERS;
    for (n, m) in models.iter().enumerate() {
        whole.write(n as u64 * part, &m.read(n as u64 * part, part));
    }
    let nodes = qmp.command("query-named-block-nodes", json!({ "flat": true }));
    let formats = nodes.as_array().unwrap().iter().filter(|n| n["drv"] == "qcow2").count();
    assert_eq!(formats, rounds + 1);
    let scratch = served.end();
    tools::qcow2_is_clean(&scratch.arg("disk.qcow2"));
    for i in 1..=rounds {
        tools::qcow2_is_clean(&scratch.arg(&format!("s{i}.qcow2")));
    }
    let raw = scratch.arg("model.raw");
    whole.save(&raw);
    tools::same_content("qcow2", &scratch.arg(&format!("s{rounds}.qcow2")), "raw", &raw);
}

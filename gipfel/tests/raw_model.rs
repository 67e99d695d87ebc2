//! A raw image served to several connections by two I/O threads, against a model: random reads,
//! writes, zeros and discards, while nodes and exports come and go beside them.
#![allow(missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::{PATIENCE, Served, Witness, soak};
use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::{DiskModel, Rng, tools};
use serde_json::json;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const CLIENTS: u64 = 4;
/// Clients own interleaved pieces of this size, in bytes: not aligned to anything.
const PIECE: u64 = 5000;

/// One client's work on its own pieces; what they hold at the end.
fn work(address: &Address, mine: u64, seed: u64, time: Duration) -> DiskModel {
    let mut c = Client::connect(address, "x").unwrap();
    let mut rng = Rng::new(seed + mine);
    let mut model = DiskModel::new(SIZE);
    let start = Instant::now();
    while start.elapsed() < time {
        let piece = rng.below(SIZE / PIECE / CLIENTS) * CLIENTS + mine;
        let from = rng.below(PIECE);
        let at = piece * PIECE + from;
        let len = rng.between(1, PIECE - from);
        let len32 = len as u32;
        match rng.below(10) {
            0..=3 => {
                let data = rng.bytes(len as usize);
                // Sometimes durable.
                c.write(at, &data, u16::from(rng.one_in(40))).unwrap();
                model.write(at, &data);
            }
            4 => {
                // Flags: none, NO_HOLE, FAST_ZERO (which may be refused, with nothing done).
                match c.zero(at, len32, *rng.pick(&[0, 2, 16])) {
                    Err(e) if e.errno() == 95 => {}
                    r => {
                        r.unwrap();
                        model.zero(at, len);
                    }
                }
            }
            5 => {
                let old = model.read(at, len);
                c.trim(at, len32, 0).unwrap();
                let got = c.read(at, len32).unwrap();
                let kept = got.iter().zip(&old).all(|(g, o)| g == o || *g == 0);
                assert!(kept, "after a discard: old bytes or zeros");
                model.write(at, &got);
            }
            6 if rng.one_in(20) => c.flush().unwrap(),
            7 => {
                let status = c.block_status(at, len32, 0).unwrap();
                let (n, flags) = status[0].extents[0];
                if flags & 2 != 0 {
                    let zeros = model.read(at, u64::from(n).min(len));
                    assert!(zeros.iter().all(|b| *b == 0), "said to be zeros at {at:#x}+{n}");
                }
            }
            _ => model.expect(at, &c.read(at, len32).unwrap()),
        }
    }
    c.flush().unwrap();
    model
}

fn run(name: &str, file_options: &str, time: Duration) {
    let seed = Rng::from_env().next_u64() >> 8;
    let served = Served::raw_with(name, SIZE, file_options, &[]);
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let address = served.address();
            std::thread::spawn(move || work(&address, n, seed, time))
        })
        .collect();
    let models: Vec<_> = clients.into_iter().map(|c| c.join().unwrap()).collect();
    let mut whole = DiskModel::new(SIZE);
    for piece in 0..SIZE / PIECE {
        let owner = &models[(piece % CLIENTS) as usize];
        whole.write(piece * PIECE, &owner.read(piece * PIECE, PIECE));
    }
    let mut c = served.client();
    for at in (0..SIZE).step_by(MIB as usize) {
        whole.expect(at, &c.read(at, MIB as u32).unwrap());
    }
    drop(c);
    let image = served.image();
    let scratch = served.end();
    whole.save(&scratch.arg("model"));
    if tools::have("qemu-img") {
        tools::same_content("raw", &image, "raw", &scratch.arg("model"));
    } else {
        assert!(std::fs::read(&image).unwrap() == whole.to_vec());
    }
}

#[test]
fn four_connections_agree_with_the_model() {
    run("raw", "", soak(Duration::from_secs(2), Duration::from_secs(60)));
}

#[test]
fn four_connections_agree_with_the_model_past_the_page_cache() {
    run("raw-direct", ",cache.direct=on", soak(Duration::from_secs(2), Duration::from_secs(60)));
}

#[test]
fn nodes_and_exports_come_and_go_beside_writers() {
    let mut rng = Rng::from_env();
    let served = Served::raw("raw-change", SIZE);
    let part = SIZE / 4;
    let writers: Vec<_> =
        (0..4).map(|n| Witness::start(served.address(), n * part, part, rng.next_u64())).collect();
    let mut q = served.qmp();
    let other = served.scratch.file("other.raw", &vec![3; MIB as usize]);
    for i in 0..soak(40, 400) {
        let (node, read_only) = (format!("n{i}"), i % 2 == 0);
        q.command(
            "blockdev-add",
            json!({
                "driver": "raw", "node-name": node, "read-only": read_only,
                "file": { "driver": "file", "filename": other }
            }),
        );
        let export = json!({
            "type": "nbd", "id": "e2", "node-name": node, "name": "y", "writable": !read_only
        });
        q.command("block-export-add", export);
        let mut c = Client::connect(&served.address(), "y").unwrap();
        let at = rng.below(MIB - 8);
        assert_eq!(c.read(at, 8).unwrap(), [3; 8]);
        if !read_only {
            c.write(at, &[3; 8], 0).unwrap();
        }
        let again = json!({ "node-name": node });
        assert!(q.refused("blockdev-del", again).desc.contains("in use"));
        q.command("block-export-del", json!({ "id": "e2", "mode": "hard" }));
        q.wait_event("BLOCK_EXPORT_DELETED", PATIENCE).unwrap();
        c.read(at, 8).expect_err("it was cut off");
        q.command("blockdev-del", json!({ "node-name": node }));
    }
    let mut whole = DiskModel::new(SIZE);
    for (n, w) in writers.into_iter().enumerate() {
        let (model, worst) = w.end();
        println!("longest request: {worst:?}");
        whole.write(n as u64 * part, &model.read(n as u64 * part, part));
    }
    drop(q);
    let image = served.image();
    let scratch = served.end();
    assert!(std::fs::read(&image).unwrap() == whole.to_vec());
    drop(scratch);
}

#[test]
fn reopening_read_only_waits_for_the_writer_to_go() {
    let served = Served::raw("raw-reopen", MIB);
    let mut q = served.qmp();
    let image = served.image();
    let options = |read_only: bool| {
        let node = json!({
            "driver": "file", "node-name": "f", "filename": image, "read-only": read_only,
            "discard": "unmap"
        });
        json!({ "options": [node] })
    };
    let mut c = served.client();
    c.write(0, &[1; 4096], 0).unwrap();
    let e = q.refused("blockdev-reopen", options(true));
    assert!(e.desc.contains("read-only") && e.desc.contains("'f'"), "{}", e.desc);
    c.write(4096, &[2; 4096], 0).unwrap();
    c.disconnect().unwrap();
    q.command("block-export-del", json!({ "id": "e", "mode": "hard" }));
    q.wait_event("BLOCK_EXPORT_DELETED", PATIENCE).unwrap();
    q.command("blockdev-reopen", options(true));
    let export = |writable: bool| {
        let mut e = json!({ "type": "nbd", "id": "e", "node-name": "f", "name": "x" });
        e["writable"] = writable.into();
        e
    };
    let e = q.refused("block-export-add", export(true));
    assert!(e.desc.contains("read-only"), "{}", e.desc);
    q.command("block-export-add", export(false));
    let mut c = served.client();
    assert_eq!(c.read(4096, 4096).unwrap(), [2; 4096]);
    let e = c.write(0, &[3], 0).unwrap_err();
    assert_eq!(e.errno(), 1, "EPERM");
    // Writable again, under the reader.
    q.command("blockdev-reopen", options(false));
    let writable = json!({ "type": "nbd", "id": "w", "node-name": "f", "writable": true });
    q.command("block-export-add", writable);
    let mut w = Client::connect(&served.address(), "f").unwrap();
    w.write(0, &[4; 512], 1).unwrap();
    assert_eq!(c.read(0, 512).unwrap(), [4; 512]);
    drop(q);
    served.end();
}

//! Bad images: each is refused with an error that names the fault, or read as far as it can be and
//! not written; the daemon goes on within bounded memory, and other clients notice nothing.
#![allow(missing_docs)]

mod common;

use common::{Served, Witness, grown};
use gipfel_testkit::nbd::Client;
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Rng, tools};
use serde_json::json;

const SIZE: u64 = 4 << 20;
/// The most that bad images may make the daemon hold, in KiB.
const BOUND: u64 = 192 << 10;
/// Where things lie in an image of one L1 entry as it is created: cluster by cluster.
const REFTABLE: usize = 0x10000;
const L1: usize = 0x30000;
const L2: usize = 0x40000;

fn beside_a_witness(name: &str, bad: impl FnOnce(&mut Served, &mut Qmp)) {
    if !tools::have("qemu-img") {
        return;
    }
    let mut rng = Rng::from_env();
    let mut served = Served::raw(name, SIZE);
    let witness = Witness::start(served.address(), 0, SIZE, rng.next_u64());
    witness.lives();
    let before = served.daemon.memory();
    let mut qmp = served.qmp();
    bad(&mut served, &mut qmp);
    witness.lives();
    let more = grown(&served.daemon, before);
    assert!(more < BOUND, "bad images made the daemon hold {more} KiB more");
    let nodes = qmp.command("query-named-block-nodes", json!({ "flat": true }));
    assert_eq!(nodes.as_array().unwrap().len(), 2, "nothing was left behind: {nodes}");
    witness.end();
    served.end();
}

/// A sound image: data in the first two clusters, the table for them behind the L1 table.
fn sample(s: &Served) -> Vec<u8> {
    let path = s.scratch.arg("sound.qcow2");
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &path, "1M"]);
    tools::qemu_io("qcow2", &path, &["write -P 1 0 128k"]);
    std::fs::read(path).unwrap()
}

/// What became of an image that was offered.
#[derive(Debug, PartialEq)]
enum Fate {
    /// It was not opened.
    Refused(String),
    /// It was opened, but not for writing.
    NotWritten(String),
    /// It was served: whether all of it could be read, and all of it written.
    Served { read: bool, written: bool },
}

fn offer(s: &Served, qmp: &mut Qmp, bytes: &[u8]) -> Fate {
    let file = s.scratch.file("bad.qcow2", bytes);
    let node = json!({
        "driver": "qcow2", "node-name": "bad", "file": { "driver": "file", "filename": file }
    });
    if let Err(e) = qmp.try_command("blockdev-add", node).unwrap() {
        return Fate::Refused(e.desc);
    }
    let export = json!({
        "type": "nbd", "id": "bad", "node-name": "bad", "name": "bad", "writable": true
    });
    let fate = match qmp.try_command("block-export-add", export).unwrap() {
        Err(e) => Fate::NotWritten(e.desc),
        Ok(_) => {
            let mut c = Client::connect(&s.address(), "bad").unwrap();
            let pieces: Vec<u64> = (0..c.size().min(1 << 20)).step_by(64 << 10).collect();
            let read = pieces.iter().all(|at| c.read(*at, 64 << 10).is_ok());
            let data = vec![5; 64 << 10];
            let written = pieces.iter().all(|at| c.write(*at, &data, 0).is_ok());
            drop(c);
            qmp.command("block-export-del", json!({ "id": "bad", "mode": "hard" }));
            qmp.wait_event("BLOCK_EXPORT_DELETED", common::PATIENCE).unwrap();
            Fate::Served { read, written }
        }
    };
    qmp.command("blockdev-del", json!({ "node-name": "bad" }));
    fate
}

#[track_caller]
fn says(fate: Fate, words: &str) {
    match fate {
        Fate::Refused(text) | Fate::NotWritten(text) if text.contains(words) => {}
        f => panic!("'{words}' was expected: {f:?}"),
    }
}

#[test]
fn headers_and_tables_out_of_range() {
    beside_a_witness("bad-headers", |s, qmp| {
        let good = sample(s);
        let with = |at: usize, value: &[u8]| {
            let mut b = good.clone();
            b[at..at + value.len()].copy_from_slice(value);
            b
        };
        let fields: [(usize, &[u8], &str); 12] = [
            (4, &[0, 0, 0, 9], "version is 9"),
            (20, &[0, 0, 0, 40], "cluster_bits is 40"),
            (24, &[0x10, 0, 0, 0, 0, 0, 0, 0], "size"),
            (36, &[0x7f, 0xff, 0xff, 0xff], "L1 table"),
            (40, &[0, 0, 1, 0, 0, 0, 0, 0], "past the end"),
            (40, &[0, 0, 0, 0, 0, 3, 0, 1], "not aligned"),
            (48, &[0, 0, 1, 0, 0, 0, 0, 0], "past the end"),
            (56, &[0xff, 0xff, 0xff, 0xff], "refcount table"),
            (60, &[0xff, 0xff, 0xff, 0xff], "snapshots"),
            (72, &[0x80, 0, 0, 0, 0, 0, 0, 0], "unknown"),
            (79, &[2], "corrupt"),
            (96, &[0, 0, 0, 8], "refcount_order is 8"),
        ];
        for (at, value, words) in fields {
            says(offer(s, qmp, &with(at, value)), words);
        }
        let entry = |host: u64| host.to_be_bytes();
        let tables = [
            (L1, entry(1 << 63 | 0x40200), "not aligned"),
            (L1, entry(1 << 63 | 1 << 40), "past the end"),
            (L1, entry(1 << 63 | 0x10000), "overlaps"),
            (REFTABLE, entry(0x20100 & !0x1ff | 0x200), "not aligned"),
            (REFTABLE, entry(1 << 40), "past the end"),
            (REFTABLE, entry(L1 as u64), "overlaps"),
        ];
        for (at, value, words) in tables {
            says(offer(s, qmp, &with(at, &value)), words);
        }
        // Entries of one cluster: the others stay readable, and metadata is not overwritten.
        for host in [1 << 63 | 0x50200, 1 << 63 | 1 << 40, 1 << 63 | L1 as u64] {
            let fate = offer(s, qmp, &with(L2, &entry(host)));
            assert_eq!(fate, Fate::Served { read: false, written: false }, "{host:#x}");
        }
        for len in [0, 1, 71, 100, 512, 0x10000, 0x20000, L1 + 4] {
            let fate = offer(s, qmp, &good[..len]);
            assert!(!matches!(fate, Fate::Served { read: true, .. }), "{len} bytes: {fate:?}");
        }
        let sound = Fate::Served { read: true, written: true };
        assert_eq!(offer(s, qmp, &good), sound);
    });
}

#[test]
fn compressed_garbage() {
    beside_a_witness("bad-compressed", |s, qmp| {
        let raw = s.scratch.file("text.raw", &b"gipfel! ".repeat(32 << 10));
        for kind in ["zlib", "zstd"] {
            let path = s.scratch.arg("packed.qcow2");
            let o = format!("compression_type={kind}");
            tools::qemu_img(&["convert", "-c", "-O", "qcow2", "-o", &o, &raw, &path]);
            let mut bytes = std::fs::read(&path).unwrap();
            assert_eq!(offer(s, qmp, &bytes), Fate::Served { read: true, written: true });
            // The streams lie behind the last table.
            let from = bytes.len() - bytes.len() % 0x10000;
            bytes[from..].fill(0xa5);
            let fate = offer(s, qmp, &bytes);
            assert!(matches!(fate, Fate::Served { read: false, .. }), "{kind}: {fate:?}");
        }
    });
}

#[test]
fn chains_without_end_and_disks_without_measure() {
    beside_a_witness("bad-chains", |s, qmp| {
        let make = |name: &str, base: &str, size: &str| {
            let path = s.scratch.arg(name);
            let args = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base];
            tools::qemu_img(&[&args[..], &[&path, size]].concat());
            path
        };
        let add = |qmp: &mut Qmp, file: &str| {
            let node = json!({
                "driver": "qcow2", "node-name": "bad",
                "file": { "driver": "file", "filename": file }
            });
            qmp.refused("blockdev-add", node).desc
        };
        let one = make("loop1.qcow2", "loop2.qcow2", "1M");
        make("loop2.qcow2", "loop1.qcow2", "1M");
        assert!(add(qmp, &one).contains("own backing chain"));
        let mut last = String::new();
        for n in 0..300 {
            last = make(&format!("c{n}.qcow2"), &format!("c{}.qcow2", n + 1), "1M");
        }
        tools::qemu_img(&["create", "-q", "-f", "qcow2", &s.scratch.arg("c300.qcow2"), "1M"]);
        assert!(!last.is_empty());
        let text = add(qmp, &s.scratch.arg("c0.qcow2"));
        assert!(text.contains("longer than"), "{text}");
        // As large as the format allows: opened, and no memory is taken for it.
        let huge = s.scratch.arg("huge.qcow2");
        tools::qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", &huge, "1E"]);
        let fate = offer(s, qmp, &std::fs::read(&huge).unwrap());
        assert_eq!(fate, Fate::Served { read: true, written: true });
    });
}

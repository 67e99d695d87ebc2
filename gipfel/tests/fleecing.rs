//! Fleecing end to end: copy-before-write goes in under writers, and an export of the moment shows
//! it byte for byte while they go on; the reference daemon shows the same data.
#![allow(missing_docs)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Rng, Scratch, tools};
use serde_json::{Value, json};

/// Bytes of the disk: the last granule of 64 KiB is cut short.
const SIZE: usize = (4 << 20) + 12 * 1024;
const GRANULE: u64 = 64 << 10;

struct Server {
    daemon: Daemon,
    scratch: Scratch,
}

impl Server {
    fn start(name: &str, start: fn(&[&str]) -> Daemon, more: &[&str]) -> Server {
        let scratch = Scratch::new(name);
        let (nbd, qmp) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
        let server = format!("addr.type=unix,addr.path={nbd},max-connections=0");
        let chardev = format!("socket,id=c,path={qmp},server=on,wait=off");
        let mut args = more.to_vec();
        args.extend(["--nbd-server", &server, "--chardev", &chardev, "--monitor", "c"]);
        let sockets: [PathBuf; 2] = [nbd.clone().into(), qmp.clone().into()];
        Server { daemon: start(&args).wait_for(&sockets), scratch }
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(self.scratch.path("qmp.sock")).unwrap()
    }

    fn client(&self, export: &str) -> Client {
        Client::connect(&Address::Unix(self.scratch.path("nbd.sock")), export).unwrap()
    }

    /// Adds a file of these bytes as a node.
    fn file(&self, q: &mut Qmp, node: &str, bytes: &[u8]) {
        let path = self.scratch.file(&format!("{node}.raw"), bytes);
        q.command(
            "blockdev-add",
            json!({ "driver": "file", "node-name": node, "filename": path, "discard": "unmap" }),
        );
    }

    fn qcow2(&self, q: &mut Qmp, node: &str, create: &[&str], backing: Value) {
        let path = self.scratch.arg(&format!("{node}.qcow2"));
        let size = SIZE.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(create);
        args.extend([path.as_str(), &size]);
        tools::qemu_img(&args);
        let file = json!({ "driver": "file", "filename": path, "discard": "unmap" });
        q.command(
            "blockdev-add",
            json!({ "driver": "qcow2", "node-name": node, "file": file, "backing": backing }),
        );
    }
}

fn export(q: &mut Qmp, node: &str, writable: bool) {
    let id = format!("export-{node}");
    q.command(
        "block-export-add",
        json!({ "type": "nbd", "id": id, "node-name": node, "name": node, "writable": writable }),
    );
}

fn add(q: &mut Qmp, driver: &str, node: &str, more: Value) {
    let mut o = more;
    o["driver"] = driver.into();
    o["node-name"] = node.into();
    q.command("blockdev-add", o);
}

fn read_all(c: &mut Client) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < SIZE {
        let n = (SIZE - bytes.len()).min(1 << 20);
        bytes.extend(c.read(bytes.len() as u64, n as u32).unwrap());
    }
    bytes
}

/// One random change within `from..to`.
fn change(c: &mut Client, rng: &mut Rng, from: u64, to: u64) {
    let at = (from + rng.below(to - from)) & !511;
    let len = (512 * (1 + rng.below(300))).min(to - at) as u32;
    match rng.below(6) {
        0 => c.zero(at, len, 0).unwrap(),
        1 => c.trim(at, len, 0).unwrap(),
        _ => c.write(at, &vec![rng.below(255) as u8; len as usize], 0).unwrap(),
    }
}

fn pattern() -> Vec<u8> {
    (0..SIZE).map(|i| (i / 512 % 251) as u8).collect()
}

/// Writers on a disk; again and again copy-before-write goes in, its moment is read through an
/// export while they go on, and it comes out.
#[test]
fn a_moment_is_exported_under_writers() {
    let s = Server::start("fleecing", Daemon::gipfel, &["--io-threads", "2"]);
    let mut q = s.qmp();
    s.file(&mut q, "disk", &pattern());
    export(&mut q, "disk", true);
    let ended = Arc::new(AtomicBool::new(false));
    let writes = Arc::new(AtomicU64::new(0));
    let writers: Vec<_> = (0..3u64)
        .map(|w| {
            let (mut c, ended, writes) = (s.client("disk"), ended.clone(), writes.clone());
            std::thread::spawn(move || {
                let mut rng = Rng::new(w);
                let part = SIZE as u64 / 3;
                while !ended.load(Ordering::SeqCst) {
                    change(&mut c, &mut rng, w * part, ((w + 1) * part) & !511);
                    writes.fetch_add(1, Ordering::SeqCst);
                }
            })
        })
        .collect();
    for round in 0..8u64 {
        match round % 3 {
            0 => s.file(&mut q, "target", &vec![0x5a; SIZE]),
            1 => s.qcow2(&mut q, "target", &[], Value::Null),
            _ => s.qcow2(&mut q, "target", &[], json!("disk")),
        }
        add(&mut q, "copy-before-write", "cbw", json!({ "file": "disk", "target": "target" }));
        q.command("blockdev-replace", json!({ "node": "disk", "with": "cbw" }));
        add(&mut q, "snapshot-access", "snap", json!({ "file": "cbw", "discard": "unmap" }));
        export(&mut q, "snap", true);
        let mut c = s.client("snap");
        let first = read_all(&mut c);
        let mut rng = Rng::new(round);
        let before = writes.load(Ordering::SeqCst);
        while writes.load(Ordering::SeqCst) < before + 300 {
            let at = rng.below(SIZE as u64 - 1);
            let len = (1 + rng.below(200_000)).min(SIZE as u64 - at);
            let seen = c.read(at, len as u32).unwrap();
            let wanted = &first[at as usize..(at + len) as usize];
            assert!(seen == wanted, "round {round}: {len} bytes at {at} have changed");
        }
        assert!(read_all(&mut c) == first, "round {round}");
        // What is known of the moment is true.
        for (at, len, flags) in c.map().unwrap() {
            let bytes = &first[at as usize..at as usize + len as usize];
            assert!(flags & 2 == 0 || bytes.iter().all(|b| *b == 0), "zeros at {at}");
        }
        c.trim(GRANULE, GRANULE as u32, 0).unwrap();
        c.read(2 * GRANULE - 1, 2).expect_err("it was discarded");
        // While the moment is read, nobody gets around the filter.
        let e = q.refused("blockdev-replace", json!({ "node": "cbw", "with": "disk" }));
        assert!(e.desc.contains("'write'"), "{}", e.desc);
        drop(c);
        q.command("block-export-del", json!({ "id": "export-snap", "mode": "hard" }));
        q.wait_event("BLOCK_EXPORT_DELETED", Duration::from_secs(10)).unwrap();
        q.command("blockdev-del", json!({ "node-name": "snap" }));
        q.command("blockdev-replace", json!({ "node": "cbw", "with": "disk" }));
        for node in ["cbw", "target"] {
            q.command("blockdev-del", json!({ "node-name": node }));
        }
    }
    ended.store(true, Ordering::SeqCst);
    for w in writers {
        w.join().unwrap();
    }
    let (mut daemon, scratch) = (s.daemon, s.scratch);
    assert!(daemon.terminate().success());
    tools::qcow2_is_clean(&scratch.arg("target.qcow2"));
}

/// The same writes to both daemons: the disk, the moment and its errors are the same.
#[test]
fn data_are_those_of_the_reference() {
    let mut outcomes = Vec::new();
    let starts: [fn(&[&str]) -> Daemon; 2] = [Daemon::reference, Daemon::gipfel];
    for (i, start) in starts.into_iter().enumerate() {
        let s = Server::start(&format!("fleecing-like-{i}"), start, &[]);
        let mut q = s.qmp();
        s.file(&mut q, "disk", &pattern());
        s.qcow2(&mut q, "target", &["-o", "cluster_size=128k"], json!("disk"));
        add(
            &mut q,
            "copy-before-write",
            "cbw",
            json!({
                "file": "disk", "target": "target", "discard": "unmap", "min-cluster-size": 4096,
                "on-cbw-error": "break-snapshot", "cbw-timeout": 30,
            }),
        );
        add(&mut q, "snapshot-access", "snap", json!({ "file": "cbw", "discard": "unmap" }));
        export(&mut q, "cbw", true);
        export(&mut q, "snap", true);
        let (mut disk, mut snap) = (s.client("cbw"), s.client("snap"));
        let mut rng = Rng::new(7);
        let mut seen = Vec::new();
        for _ in 0..5 {
            for _ in 0..20 {
                change(&mut disk, &mut rng, 0, SIZE as u64);
            }
            seen.push((read_all(&mut disk), read_all(&mut snap)));
        }
        assert!(seen.iter().all(|(_, old)| *old == pattern()));
        let mut errors = vec![
            snap.write(0, &[1; 512], 0).is_err(),
            snap.zero(0, 512, 0).is_err(),
            snap.trim(100_000, 300_000, 0).is_err(),
        ];
        // Granules of 128 KiB: two of them are whole.
        errors.extend((0..6).map(|g| snap.read(g << 17, 512).is_err()));
        let more = |key: &str, value: Value| {
            let (disk, target) = ("disk", "target");
            let mut o = json!({
                "driver": "copy-before-write", "node-name": "x", "file": disk, "target": target,
            });
            o[key] = value;
            o
        };
        let refused = [
            ("blockdev-add", more("min-cluster-size", 3.into())),
            ("blockdev-add", more("target", Value::Null)),
            ("blockdev-add", more("bitmap", json!({ "node": "disk", "name": "none" }))),
            (
                "block-export-add",
                json!({
                    "type": "nbd", "id": "d", "node-name": "disk", "writable": true,
                }),
            ),
            ("blockdev-del", json!({ "node-name": "cbw" })),
            ("blockdev-reopen", json!({ "options": [more("node-name", "cbw".into())] })),
        ];
        let classes = refused.map(|(command, args)| q.refused(command, args).class);
        outcomes.push((seen, errors, classes));
    }
    let (ours, theirs) = (outcomes.pop().unwrap(), outcomes.pop().unwrap());
    assert!(ours.0 == theirs.0, "data differ");
    assert_eq!((ours.1, ours.2), (theirs.1, theirs.2));
}

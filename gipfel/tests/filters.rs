//! Filters end to end: they come and go under writers, limits change while requests wait, zeros
//! become holes in the file, what is read from below is kept.
#![allow(missing_docs)]

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gipfel_testkit::nbd::{Address, Client, Command};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Rng, Scratch, tools};
use serde_json::json;

const MIB: usize = 1 << 20;

struct Disk {
    daemon: Daemon,
    scratch: Scratch,
}

impl Disk {
    /// Serves, writable, the node `export` of what `more` options make.
    fn serve(scratch: Scratch, export: &str, more: &[&str]) -> Disk {
        let (nbd, qmp) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
        let server = format!("addr.type=unix,addr.path={nbd},max-connections=0");
        let export = format!("nbd,id=e,node-name={export},name=x,writable=on");
        let chardev = format!("socket,id=c,path={qmp},server=on,wait=off");
        let mut args = vec!["--io-threads", "2"];
        args.extend(more);
        args.extend(["--nbd-server", &server, "--export", &export]);
        args.extend(["--chardev", &chardev, "--monitor", "c"]);
        let sockets: [PathBuf; 2] = [nbd.clone().into(), qmp.clone().into()];
        Disk { daemon: Daemon::gipfel(&args).wait_for(&sockets), scratch }
    }

    /// A raw image of `size` bytes as node `disk`.
    fn raw(name: &str, size: usize, options: &str, more: &[&str]) -> Disk {
        let scratch = Scratch::new(name);
        let file = scratch.file("disk.raw", &vec![0xee; size]);
        let file = format!("file,node-name=f,filename={file},discard=unmap");
        let disk = format!("raw,node-name=disk,file=f,discard=unmap{options}");
        let mut args = vec!["--blockdev", &file, "--blockdev", &disk];
        args.extend(more);
        Self::serve(scratch, "disk", &args)
    }

    fn client(&self) -> Client {
        Client::connect(&Address::Unix(self.scratch.path("nbd.sock")), "x").unwrap()
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(self.scratch.path("qmp.sock")).unwrap()
    }

    /// Bytes that the raw image takes on its file system.
    fn taken(&self) -> usize {
        std::fs::metadata(self.scratch.path("disk.raw")).unwrap().blocks() as usize * 512
    }

    fn end(mut self) -> Scratch {
        assert!(self.daemon.terminate().success());
        self.scratch
    }
}

/// Writes of 4 KiB, one at a time, for `time`: how many per second.
fn rate(c: &mut Client, time: Duration) -> f64 {
    let start = Instant::now();
    let mut n = 0;
    while start.elapsed() < time {
        c.write(n % 64 * 4096, &[1; 4096], 0).unwrap();
        n += 1;
    }
    n as f64 / start.elapsed().as_secs_f64()
}

#[test]
fn a_throttle_comes_and_goes_under_writers() {
    let group = ["--object", "throttle-group,id=tg,limits.iops-total=4000"];
    let disk = Disk::raw("filters-throttle", 4 * MIB, "", &group);
    let ended = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|w| {
            let (mut c, ended) = (disk.client(), ended.clone());
            std::thread::spawn(move || {
                let mut rng = Rng::new(w);
                let mut last = [0xee; 256];
                while !ended.load(Ordering::SeqCst) {
                    let block = rng.below(256);
                    let at = (w * 256 + block) * 4096;
                    let before = c.read(at, 4096).unwrap();
                    assert_eq!(before, [last[block as usize]; 4096], "writer {w}, block {block}");
                    let byte = rng.below(256) as u8;
                    c.write(at, &[byte; 4096], 0).unwrap();
                    last[block as usize] = byte;
                }
                last
            })
        })
        .collect();
    let mut q = disk.qmp();
    let filter = json!({
        "driver": "throttle", "node-name": "t", "throttle-group": "tg", "file": "disk",
    });
    for _ in 0..50 {
        q.command("blockdev-add", filter.clone());
        q.command("blockdev-replace", json!({ "node": "disk", "with": "t" }));
        std::thread::sleep(Duration::from_millis(5));
        q.command("blockdev-replace", json!({ "node": "t", "with": "disk" }));
        q.command("blockdev-del", json!({ "node-name": "t" }));
    }
    ended.store(true, Ordering::SeqCst);
    let wanted: Vec<u8> = writers
        .into_iter()
        .flat_map(|w| w.join().expect("a writer saw nothing wrong"))
        .flat_map(|byte| [byte; 4096])
        .collect();
    let scratch = disk.end();
    assert!(std::fs::read(scratch.path("disk.raw")).unwrap() == wanted, "the file differs");
}

#[test]
fn limits_of_a_group_change_while_requests_wait() {
    let scratch = Scratch::new("filters-limits");
    let file = scratch.file("disk.raw", &vec![0; MIB]);
    let node = json!({
        "driver": "throttle", "node-name": "t", "throttle-group": "json",
        "file": { "driver": "file", "filename": file },
    });
    // The three forms of an option.
    let disk = Disk::serve(
        scratch,
        "t",
        &[
            "--object",
            "throttle-group,id=dotted,limits.iops-total=5,limits.iops-total-max=7",
            "--object",
            "throttle-group,id=single,x-iops-total=5",
            "--object",
            r#"{"qom-type":"throttle-group","id":"json","limits":{"iops-write":200}}"#,
            "--blockdev",
            &node.to_string(),
        ],
    );
    let (mut c, mut q) = (disk.client(), disk.qmp());
    for (id, max) in [("dotted", 7), ("single", 0)] {
        let limits = q.command("qom-get", json!({ "path": id, "property": "limits" }));
        assert_eq!((&limits["iops-total"], &limits["iops-total-max"]), (&json!(5), &json!(max)));
    }
    let limited = rate(&mut c, Duration::from_millis(1500));
    assert!((150.0..270.0).contains(&limited), "{limited} writes per second");
    let set = |q: &mut Qmp, v| {
        let property = json!({ "path": "/objects/json", "property": "limits", "value": v });
        q.command("qom-set", property);
    };
    set(&mut q, json!({ "iops-write": 1 }));
    let start = Instant::now();
    let write = |c: &mut Client| {
        let request = Command { kind: 1, flags: 0, offset: 0, length: 4096, payload: &[2; 4096] };
        c.submit(&request).unwrap()
    };
    let waiting: Vec<_> = (0..20).map(|_| write(&mut c)).collect();
    std::thread::sleep(Duration::from_millis(200));
    let e = q.refused("object-del", json!({ "id": "json" }));
    assert!(e.desc.contains("node 't'"), "{}", e.desc);
    set(&mut q, json!({ "iops-write": 0 }));
    for cookie in waiting {
        c.wait(cookie).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(5), "they waited for the old limit");
    assert!(rate(&mut c, Duration::from_millis(300)) > 500.0);
    q.command("object-del", json!({ "id": "single" }));
    let e = q.refused("qom-get", json!({ "path": "single", "property": "limits" }));
    assert_eq!(e.class, "DeviceNotFound");
    disk.end();
}

#[test]
fn a_client_is_limited_and_freed_again() {
    let disk = Disk::raw("filters-client", MIB, "", &[]);
    let (mut c, mut q) = (disk.client(), disk.qmp());
    let limit = |iops: u64| {
        json!({
            "id": "e", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": iops, "iops_rd": 0, "iops_wr": 0,
        })
    };
    q.command("block_set_io_throttle", limit(200));
    let graph = q.command("x-debug-query-block-graph", json!({})).to_string();
    assert!(graph.contains("#throttle"), "{graph}");
    let limited = rate(&mut c, Duration::from_millis(1500));
    assert!((150.0..270.0).contains(&limited), "{limited} writes per second");
    // Removing it waits for nobody's turn.
    q.command("block_set_io_throttle", limit(1));
    let mut second = disk.client();
    let slow = std::thread::spawn(move || {
        for n in 0..10 {
            second.write(n * 4096, &[3; 4096], 0).unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    q.command("block_set_io_throttle", limit(0));
    slow.join().unwrap();
    assert!(start.elapsed() < Duration::from_secs(3));
    let graph = q.command("x-debug-query-block-graph", json!({})).to_string();
    assert!(!graph.contains("#throttle"), "{graph}");
    let mut on_node = limit(5);
    on_node.as_object_mut().unwrap().remove("id");
    on_node["device"] = json!("disk");
    let e = q.refused("block_set_io_throttle", on_node.clone());
    assert!(e.desc.contains("throttle node"), "{}", e.desc);
    on_node["device"] = json!("nobody");
    assert_eq!(q.refused("block_set_io_throttle", on_node).class, "DeviceNotFound");
    let mut both = limit(5);
    both["iops_rd"] = json!(5);
    let e = q.refused("block_set_io_throttle", both);
    assert!(e.desc.contains("'iops-total'"), "{}", e.desc);
    disk.end();
}

#[test]
fn written_zeros_become_holes() {
    let disk = Disk::raw("filters-zeroes", 4 * MIB, ",detect-zeroes=unmap", &[]);
    let (mut c, mut q) = (disk.client(), disk.qmp());
    let full = disk.taken();
    assert!(full >= 4 * MIB);
    c.write(0, &vec![0; 2 * MIB], 0).unwrap();
    let punched = disk.taken();
    assert!(punched <= full - 2 * MIB, "{punched} of {full} bytes are still taken");
    assert!(c.read(0, 2 * MIB as u32).unwrap().iter().all(|b| *b == 0));
    // One other byte, and the request is written as it came.
    let mut almost = vec![0; MIB];
    almost[MIB - 1] = 1;
    c.write(0, &almost, 0).unwrap();
    assert!(disk.taken() >= punched + MIB);
    assert_eq!(c.read(0, MIB as u32).unwrap(), almost);
    // Off: zeros are bytes like others.
    let plain = json!({ "driver": "raw", "node-name": "disk", "file": "f", "discard": "unmap" });
    q.command("blockdev-reopen", json!({ "options": [plain] }));
    let before = disk.taken();
    c.write(MIB as u64, &vec![0; MIB], 0).unwrap();
    assert!(disk.taken() >= before + MIB);
    disk.end();
}

#[test]
fn what_is_read_from_below_is_kept() {
    if !tools::have("qemu-img") {
        return;
    }
    let scratch = Scratch::new("filters-cor");
    let (base, top) = (scratch.arg("base.qcow2"), scratch.arg("top.qcow2"));
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &base, "4M"]);
    tools::qemu_io("qcow2", &base, &["write -q -P 7 0 1M", "write -q -P 8 2M 1M"]);
    tools::qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &top]);
    let node = |read_only: bool| {
        json!({
            "driver": "copy-on-read", "node-name": "cor",
            "file": {
                "driver": "qcow2", "node-name": "top", "read-only": read_only,
                "file": { "driver": "file", "filename": top },
            },
        })
        .to_string()
    };
    let own = || {
        let map = tools::qemu_img(&["map", "--output=json", "-f", "qcow2", &top]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let own = map.as_array().unwrap().iter().filter(|e| e["depth"] == 0 && e["data"] == true);
        own.map(|e| e["length"].as_u64().unwrap()).sum::<u64>()
    };
    let disk = Disk::serve(scratch, "cor", &["--blockdev", &node(false)]);
    let (mut c, mut q) = (disk.client(), disk.qmp());
    assert_eq!(c.read(100, 70_000).unwrap(), [7; 70_000]);
    c.write(2 << 20, &[9; 4096], 0).unwrap();
    assert_eq!(c.read(2 << 20, 8192).unwrap()[4095..4097], [9, 8]);
    // A hole of all layers stays one.
    assert!(c.read(1 << 20, 65536).unwrap().iter().all(|b| *b == 0));
    // Nobody writes past the filter while it may copy.
    let e = q.refused(
        "block-export-add",
        json!({ "type": "nbd", "id": "past", "node-name": "top", "writable": true }),
    );
    assert!(e.desc.contains("'cor.file'"), "{}", e.desc);
    let scratch = disk.end();
    assert_eq!(own(), 3 * 65536, "two clusters that were read, one that was written");
    tools::qcow2_is_clean(&top);
    // It rests over a medium that is read-only.
    let (nbd, node) = (scratch.arg("ro.sock"), node(true));
    let args = [
        "--blockdev",
        &node,
        "--nbd-server",
        &format!("addr.type=unix,addr.path={nbd}"),
        "--export",
        "nbd,id=e,node-name=cor,name=x",
    ];
    let mut daemon = Daemon::gipfel(&args).wait_for(&[&nbd]);
    let mut c = Client::connect(&Address::Unix(nbd.into()), "x").unwrap();
    assert_eq!(c.read(200_000, 8192).unwrap(), [7; 8192]);
    assert!(daemon.terminate().success());
    assert_eq!(own(), 3 * 65536);
}

//! Filters that change how an image is stored, end to end: compress, preallocate, and
//! copy-on-read with a bottom; and `img convert -c`. The reference tools judge.
#![allow(missing_docs)]

mod common;
mod img_tools;

use std::os::unix::fs::MetadataExt;

use common::Witness;
use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Rng, Scratch, tools};
use img_tools::{code, gipfel, stderr};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A daemon that serves the node `disk`, made from these options, as `x`.
struct Served {
    daemon: Daemon,
    scratch: Scratch,
}

impl Served {
    fn new(scratch: Scratch, disk: &Value) -> Served {
        let (nbd, qmp) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
        let daemon = Daemon::gipfel(&[
            "--io-threads",
            "2",
            "--blockdev",
            &disk.to_string(),
            "--nbd-server",
            &format!("addr.type=unix,addr.path={nbd},max-connections=0"),
            "--export",
            "nbd,id=e,node-name=disk,name=x,writable=on",
            "--chardev",
            &format!("socket,id=c,path={qmp},server=on,wait=off"),
            "--monitor",
            "c",
        ]);
        Served { daemon: daemon.wait_for(&[&nbd, &qmp]), scratch }
    }

    fn address(&self) -> Address {
        Address::Unix(self.scratch.path("nbd.sock"))
    }

    fn client(&self) -> Client {
        Client::connect(&self.address(), "x").unwrap()
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(self.scratch.path("qmp.sock")).unwrap()
    }

    fn end(mut self) -> Scratch {
        assert!(self.daemon.terminate().success());
        self.scratch
    }
}

/// Takes the export away, whoever uses it.
fn withdraw(q: &mut Qmp) {
    q.command("block-export-del", json!({ "id": "e", "mode": "hard" }));
    q.wait_event("BLOCK_EXPORT_DELETED", common::PATIENCE).unwrap();
}

/// Makes an image with `qemu-img create`; its size comes last.
fn qcow2(scratch: &Scratch, name: &str, create: &[&str]) -> String {
    let path = scratch.arg(name);
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    args.extend(create);
    args.insert(args.len() - 1, &path);
    tools::qemu_img(&args);
    path
}

fn image(driver: &str, path: &str) -> Value {
    json!({ "driver": driver, "file": { "driver": "file", "filename": path } })
}

/// Bytes of the image by what `qemu-img map` says of them.
fn mapped(path: &str, key: &str) -> u64 {
    let map = tools::qemu_img(&["map", "--output=json", "-f", "qcow2", path]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let found = map.as_array().unwrap().iter().filter(|e| e["depth"] == 0 && e[key] == true);
    found.map(|e| e["length"].as_u64().unwrap()).sum()
}

/// Half noise: shrinks to about five eighths.
fn text(rng: &mut Rng, len: usize) -> Vec<u8> {
    rng.bytes(len).iter().map(|b| b & 0x1f).collect()
}

#[test]
fn what_is_written_through_compress_is_compressed() {
    if !tools::have("qemu-img") {
        return;
    }
    for kind in ["zlib", "zstd"] {
        let scratch = Scratch::new(&format!("compress-{kind}"));
        let option = format!("compression_type={kind}");
        // The end of the disk cuts the last cluster short.
        let size = 8 * MIB + 1536;
        let path = qcow2(&scratch, "d.qcow2", &["-o", &option, &size.to_string()]);
        let disk =
            json!({ "driver": "compress", "node-name": "disk", "file": image("qcow2", &path) });
        let served = Served::new(scratch, &disk);
        let mut rng = Rng::from_env();
        let mut c = served.client();
        let mut wanted = vec![0; size as usize];
        let mut write = |c: &mut Client, at: u64, data: &[u8]| {
            c.write(at, data, 0).unwrap();
            wanted[at as usize..][..data.len()].copy_from_slice(data);
        };
        write(&mut c, 0, &text(&mut rng, MIB as usize));
        // In part, again, and to the end; and what does not shrink.
        write(&mut c, 300_000, &text(&mut rng, 100_000));
        write(&mut c, 65_536, &text(&mut rng, 65_536));
        write(&mut c, size - 2000, &text(&mut rng, 2000));
        let noise = rng.bytes(65_536);
        write(&mut c, 2 * MIB, &noise);
        c.zero(3 * MIB, 200_000, 0).unwrap();
        c.zero(100_000, 10, 0).unwrap();
        wanted[100_000..100_010].fill(0);
        // Several clients at once, whose parts share clusters.
        let part = 262_044;
        let witnesses: Vec<_> =
            (0..3).map(|w| Witness::start(served.address(), 4 * MIB + w * part, part, w)).collect();
        for (w, witness) in witnesses.into_iter().enumerate() {
            let (model, _) = witness.end();
            let from = (4 * MIB + w as u64 * part) as usize;
            wanted[from..from + part as usize].copy_from_slice(&model.to_vec()[from..]);
        }
        let scratch = served.end();
        tools::qcow2_is_clean(&path);
        let raw = scratch.file("wanted.raw", &wanted);
        tools::same_content("raw", &raw, "qcow2", &path);
        assert!(mapped(&path, "compressed") >= MIB + 65_536, "{kind}");
        assert_eq!(mapped(&path, "zero") / 65_536, mapped(&path, "zero").div_ceil(65_536));
    }
}

#[test]
fn compress_is_refused_over_what_cannot() {
    let scratch = Scratch::new("compress-refused");
    let raw = scratch.file("d.raw", &[0; 65_536]);
    let mut disk = image("raw", &raw);
    disk["node-name"] = json!("disk");
    let served = Served::new(scratch, &disk);
    let e = served
        .qmp()
        .refused("blockdev-add", json!({ "driver": "compress", "node-name": "c", "file": "disk" }));
    assert!(e.desc.contains("node 'disk' (driver 'raw') cannot"), "{}", e.desc);
    served.end();
}

#[test]
fn convert_compresses_as_the_reference_does() {
    if !tools::have("qemu-img") {
        return;
    }
    let scratch = Scratch::new("convert-c");
    let mut rng = Rng::from_env();
    // Text, noise, and holes that begin and end anywhere.
    let mut bytes = Vec::new();
    for _ in 0..40 {
        let len = rng.between(1, 600) as usize * 512;
        let part = match rng.below(4) {
            0 => vec![0; len],
            1 => rng.bytes(len),
            _ => text(&mut rng, len),
        };
        bytes.extend(part);
    }
    let raw = scratch.file("s.raw", &bytes);
    let base = qcow2(&scratch, "base.qcow2", &[&bytes.len().to_string()]);
    tools::qemu_io("qcow2", &base, &["write -q -P 3 100k 300k"]);
    let (ours, theirs) = (scratch.arg("ours.qcow2"), scratch.arg("theirs.qcow2"));
    let length = |p: &str| std::fs::metadata(p).unwrap().len();
    for options in [
        &["-m", "1"][..],
        &["-m", "1", "-o", "compression_type=zstd"],
        &["-m", "1", "-o", "cluster_size=2M"],
        &["-m", "1", "-o", "cluster_size=512"],
        &["-m", "1", "-o", "compat=0.10"],
        &["-m", "1", "-o", "refcount_bits=1"],
        &["-m", "1", "-B", &base, "-F", "qcow2"],
        &["-m", "1", "-S", "0"],
        &["-W", "-m", "3"],
        &[],
    ] {
        let start = ["convert", "-c", "-f", "raw", "-O", "qcow2"];
        tools::qemu_img(&[&start, options, &[&raw, &theirs]].concat());
        let done = gipfel(&[&start, options, &[&raw, &ours]].concat());
        assert_eq!(code(&done), 0, "{options:?}: {}", stderr(&done));
        tools::qcow2_is_clean(&ours);
        tools::same_content("raw", &raw, "qcow2", &ours);
        let (a, b) = (length(&ours), length(&theirs));
        println!("{options:?}: {a} bytes, the reference {b}");
        // Side by side, clusters that do not shrink come between those that share one.
        let more = if options.contains(&"1") { b / 50 } else { b / 10 };
        assert!(a <= b + more + (1 << 16), "{options:?}: {a} bytes, the reference {b}");
    }
    // And back from the reference's compressed image, into one that is there.
    tools::qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &theirs]);
    let done = gipfel(&["convert", "-c", "-n", "-O", "qcow2", &theirs, &ours]);
    assert_eq!(code(&done), 0, "{}", stderr(&done));
    tools::qcow2_is_clean(&ours);
    tools::same_content("raw", &raw, "qcow2", &ours);
    let preallocated = ["convert", "-c", "-O", "qcow2", "-o", "preallocation=full", &raw, &ours];
    assert_eq!(code(&gipfel(&preallocated)), code(&tools::try_run("qemu-img", &preallocated)));
}

#[test]
fn a_preallocated_file_is_longer_while_it_is_written() {
    if !tools::have("qemu-img") {
        return;
    }
    let scratch = Scratch::new("preallocate");
    let path = qcow2(&scratch, "d.qcow2", &["256M"]);
    let disk = json!({
        "driver": "qcow2", "node-name": "disk",
        "file": {
            "driver": "preallocate", "node-name": "p",
            "file": { "driver": "file", "node-name": "f", "filename": path },
        },
    });
    let state = || {
        let m = std::fs::metadata(&path).unwrap();
        (m.len(), m.blocks() * 512)
    };
    let tidy = || {
        tools::qcow2_is_clean(&path);
        let json = tools::qemu_img(&["check", "--output=json", "-f", "qcow2", &path]);
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["image-end-offset"], json!(state().0), "the file ends with its data");
    };
    let before = state().0;
    let mut served = Served::new(scratch, &disk);
    assert_eq!(state().0, before);
    served.client().write(0, &[1; 4096], 0).unwrap();
    let (len, taken) = state();
    assert!(len.is_multiple_of(MIB) && (before + 128 * MIB..before + 131 * MIB).contains(&len));
    assert!(taken >= len, "{taken} of {len} bytes are taken");
    let mut q = served.qmp();
    let nodes = q.command("query-named-block-nodes", json!({}));
    let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "p").unwrap();
    assert!(node["image"]["virtual-size"].as_u64().unwrap() < before + 2 * MIB);
    // Others don't change its length.
    let e = q.refused(
        "block-export-add",
        json!({
            "type": "nbd", "id": "past", "node-name": "f", "writable": true,
        }),
    );
    assert!(e.desc.contains("'p.file'"), "{}", e.desc);
    // Nobody writes any more; then somebody does, in smaller steps.
    withdraw(&mut q);
    let deadline = std::time::Instant::now() + common::PATIENCE;
    while state().0 > before + 2 * MIB {
        assert!(std::time::Instant::now() < deadline, "the file is not cut back");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    q.command(
        "blockdev-reopen",
        json!({ "options": [{
        "driver": "preallocate", "node-name": "p", "file": "f",
        "prealloc-size": MIB, "prealloc-align": 4096,
    }] }),
    );
    let export = json!({
        "type": "nbd", "id": "e", "node-name": "disk", "name": "x", "writable": true,
    });
    q.command("block-export-add", export.clone());
    served.client().write(MIB, &[2; 65_536], 0).unwrap();
    let len = state().0;
    assert!((before + MIB..before + 3 * MIB).contains(&len), "{len}");
    // Killed, it stays longer, and is whole.
    served.client().flush().unwrap();
    served.daemon.kill();
    // The kernel takes its ring down after it, and with that its listeners.
    for socket in ["nbd.sock", "qmp.sock"] {
        std::fs::remove_file(served.scratch.path(socket)).unwrap();
    }
    assert_eq!(state().0, len);
    tools::qcow2_is_clean(&path);
    let scratch = std::mem::replace(&mut served.scratch, Scratch::new("preallocate-2"));
    let served = Served::new(scratch, &disk);
    let (mut c, mut q) = (served.client(), served.qmp());
    assert_eq!(c.read(MIB, 65_536).unwrap(), [2; 65_536]);
    c.write(200 * MIB, &vec![3; 8 * MIB as usize], 0).unwrap();
    drop(c);
    withdraw(&mut q);
    q.command("blockdev-del", json!({ "node-name": "disk" }));
    assert!(state().0 < before + 14 * MIB);
    q.command("blockdev-add", disk.clone());
    q.command("block-export-add", export);
    served.client().write(100 * MIB, &vec![4; 8 * MIB as usize], 0).unwrap();
    assert!(state().0 > 128 * MIB);
    let _scratch = served.end();
    tidy();
}

#[test]
fn copies_on_read_end_at_the_bottom() {
    if !tools::have("qemu-img") {
        return;
    }
    let scratch = Scratch::new("cor-bottom");
    let layer = |name: &str, backing: Option<&str>, io: &str| {
        let path = scratch.arg(name);
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(backing.iter().flat_map(|b| ["-F", "qcow2", "-b", b]));
        args.extend([&path, "4M"]);
        tools::qemu_img(&args);
        tools::qemu_io("qcow2", &path, &[io]);
        path
    };
    let low = layer("low", None, "write -q -P 1 0 64k");
    let mid = layer("mid", Some(&low), "write -q -P 2 64k 64k");
    let top = layer("top", Some(&mid), "write -q -P 3 128k 64k");
    let mut disk = json!({
        "driver": "copy-on-read", "node-name": "disk", "bottom": "mid",
        "file": {
            "driver": "qcow2", "node-name": "top", "file": { "driver": "file", "filename": top },
            "backing": {
                "driver": "qcow2", "node-name": "mid",
                "file": { "driver": "file", "filename": mid },
                "backing": {
                    "driver": "qcow2", "node-name": "low",
                    "file": { "driver": "file", "filename": low },
                },
            },
        },
    });
    let served = Served::new(scratch, &disk);
    let mut c = served.client();
    for (i, byte) in [1u8, 2, 3].into_iter().enumerate() {
        assert_eq!(c.read(i as u64 * 65_536, 65_536).unwrap(), vec![byte; 65_536]);
    }
    drop(c);
    let mut q = served.qmp();
    withdraw(&mut q);
    q.command("blockdev-del", json!({ "node-name": "disk" }));
    assert_eq!(mapped(&top, "data"), 2 * 65_536, "what lies below the bottom was not copied");
    // What is not in the chain, or is a filter, is no bottom.
    let alone = json!({ "driver": "null-co", "node-name": "alone", "size": 4 * MIB });
    q.command("blockdev-add", alone);
    for bottom in ["alone", "nobody", "disk"] {
        disk["bottom"] = json!(bottom);
        let e = q.refused("blockdev-add", disk.clone());
        assert!(e.desc.contains(&format!("'{bottom}' is no image in the backing chain")), "{e:?}");
    }
    // The bottom may be the top: then nothing is copied.
    disk["bottom"] = json!("top");
    q.command("blockdev-add", disk);
    q.command(
        "block-export-add",
        json!({
            "type": "nbd", "id": "e", "node-name": "disk", "name": "x", "writable": true,
        }),
    );
    assert_eq!(served.client().read(0, 65_536).unwrap(), [1; 65_536]);
    let _scratch = served.end();
    assert_eq!(mapped(&top, "data"), 2 * 65_536);
    tools::qcow2_is_clean(&top);
}

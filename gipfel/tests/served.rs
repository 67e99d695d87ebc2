//! A real file system in a qcow2 image is served as it is: nbdcopy, nbdinfo and qemu-img agree.
#![allow(missing_docs)]

mod common;

use common::Served;
use gipfel_testkit::{Scratch, tools};
use serde_json::Value;

/// Extents as (start, length, hole or zero flags), neighbours joined.
fn joined(list: impl Iterator<Item = (u64, u64, u32)>) -> Vec<(u64, u64, u32)> {
    let mut out: Vec<(u64, u64, u32)> = Vec::new();
    for (start, len, flags) in list {
        match out.last_mut() {
            Some(last) if last.2 == flags => last.1 += len,
            _ => out.push((start, len, flags)),
        }
    }
    out
}

fn agree(served: &Served) {
    let image = served.image();
    let raw = served.scratch.arg("copy.raw");
    tools::run("nbdcopy", &[&served.uri(), &raw]);
    let args = ["compare", "-U", "-f", "qcow2", "-F", "raw", &image, &raw];
    tools::qemu_img(&args);
    let number = |v: &Value, k: &str| v[k].as_u64().unwrap_or_default();
    let info: Value =
        serde_json::from_str(&tools::run("nbdinfo", &["--map", "--json", &served.uri()])).unwrap();
    let ours = joined(
        info.as_array()
            .unwrap()
            .iter()
            .map(|e| (number(e, "offset"), number(e, "length"), number(e, "type") as u32)),
    );
    let map = tools::qemu_img(&["map", "-U", "--output=json", "-f", "qcow2", &image]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let theirs = joined(map.as_array().unwrap().iter().map(|e| {
        let hole = u32::from(e["data"] != true);
        let zero = u32::from(e["zero"] == true);
        (number(e, "start"), number(e, "length"), hole | zero << 1)
    }));
    assert_eq!(ours, theirs);
}

#[test]
fn a_file_system_of_real_files() {
    for t in ["qemu-img", "nbdcopy", "nbdinfo", "mkfs.ext4"] {
        if !tools::have(t) {
            return;
        }
    }
    let scratch = Scratch::new("served");
    let raw = scratch.arg("fs.raw");
    // A part of what every Debian has, so that the test stays short.
    let files = ["/usr/share/doc", "/usr/share/common-licenses"];
    let dir = files.into_iter().find(|d| std::path::Path::new(d).is_dir()).unwrap();
    tools::run("mkfs.ext4", &["-q", "-d", dir, &raw, "512M"]);
    let image = scratch.arg("disk.qcow2");
    tools::qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &raw, &image]);
    let served = Served::existing(scratch, "");
    agree(&served);
    let image = served.image();
    let scratch = served.end();
    tools::qcow2_is_clean(&image);
    // The same compressed.
    tools::qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &image]);
    let served = Served::existing(scratch, "");
    agree(&served);
    served.end();
}

#[test]
fn a_chain_of_several_formats() {
    for t in ["qemu-img", "nbdcopy", "nbdinfo"] {
        if !tools::have(t) {
            return;
        }
    }
    let scratch = Scratch::new("chain");
    let raw = scratch.file("base.raw", &[7; 3 << 20]);
    let mid = scratch.arg("mid.qcow2");
    let top = scratch.arg("disk.qcow2");
    tools::qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &raw, &mid, "8M"]);
    tools::qemu_io("qcow2", &mid, &["write -P 9 100k 200k", "write -z 1M 128k"]);
    let options = "cluster_size=4k";
    tools::qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        "-F",
        "qcow2",
        "-b",
        "mid.qcow2",
        &top,
        "16M",
    ]);
    tools::qemu_io("qcow2", &top, &["write -P 3 150k 1k", "write -P 4 15M 4k", "discard 2M 64k"]);
    let served = Served::existing(scratch, "");
    agree(&served);
    served.end();
}

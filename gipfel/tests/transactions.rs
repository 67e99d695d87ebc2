//! QMP `transaction`: several disks change as one, or not at all.
#![allow(missing_docs)]

mod common;

use std::path::Path;

use common::Served;
use gipfel_testkit::tools;
use serde_json::{Value, json};

fn snapshot(disk: &str, file: &str, name: &str) -> Value {
    json!({ "type": "blockdev-snapshot-sync",
            "data": { "node-name": disk, "snapshot-file": file, "snapshot-node-name": name } })
}

#[test]
fn all_or_nothing() {
    if !tools::have("qemu-img") {
        return;
    }
    let served = Served::new("transaction", "8M", &[], "");
    let s = &served.scratch;
    let mut q = served.qmp();
    for name in ["second", "over"] {
        let file = s.arg(&format!("{name}.qcow2"));
        tools::qemu_img(&["create", "-q", "-f", "qcow2", &file, "8M"]);
        q.command(
            "blockdev-add",
            json!({ "driver": "qcow2", "node-name": name, "backing": null,
                    "file": { "driver": "file", "filename": file } }),
        );
    }
    let mut c = served.client();
    c.write(0, &[1; 4096], 0).unwrap();
    let before = q.command("query-graph", json!({}));
    let (new, other) = (s.arg("new.qcow2"), s.arg("other.qcow2"));
    let over =
        json!({ "type": "blockdev-snapshot", "data": { "node": "second", "overlay": "over" } });
    for (last, says) in [
        (snapshot("nobody", &other, "x"), "action 2 (blockdev-snapshot-sync)"),
        (snapshot("second", &other, "new"), "there is a node 'new' already"),
        (snapshot("second", "/nonexistent/o.qcow2", "x"), "/nonexistent/o.qcow2"),
        (snapshot("second", &s.arg("over.qcow2"), "x"), "over.qcow2"),
        (json!({ "type": "abort", "data": {} }), "asked for its own failure"),
        (
            json!({ "type": "blockdev-snapshot", "data": { "node": "second", "overlay": "disk" } }),
            "overlay 'disk'",
        ),
    ] {
        let actions = json!({ "actions": [snapshot("disk", &new, "new"), last] });
        let e = q.refused("transaction", actions);
        assert!(e.desc.contains(says), "{e:?} does not say {says}");
        assert_eq!(q.command("query-graph", json!({})), before, "{e:?}");
        assert!(!Path::new(&new).exists() && !Path::new(&other).exists(), "{e:?} leaves files");
    }
    q.command("transaction", json!({ "actions": [snapshot("disk", &new, "new"), over] }));
    q.command("transaction", json!({ "actions": [] }));
    c.write(4096, &[2; 4096], 0).unwrap();
    assert_eq!(c.read(0, 8192).unwrap(), [[1; 4096], [2; 4096]].concat());
    let graph = q.command("query-graph", json!({})).to_string();
    assert!(graph.contains("over.backing") && graph.contains("new.backing"), "{graph}");
    c.disconnect().unwrap();
    let image = served.image();
    let scratch = served.end();
    for image in [&image, &new, &scratch.arg("over.qcow2")] {
        tools::qcow2_is_clean(image);
    }
    tools::qemu_io("qcow2", &new, &["read -P 1 0 4k", "read -P 2 4k 4k"]);
    tools::qemu_io("qcow2", &image, &["read -P 1 0 4k", "read -P 0 4k 4k"]);
}

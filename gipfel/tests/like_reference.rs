//! The same commands to the reference daemon and to ours: the same answers, the same classes of
//! errors, the same events.
#![allow(missing_docs)]

mod common;

use common::PATIENCE;
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Scratch, tools};
use serde_json::{Value, json};

/// What both are told, in this order. `DIR` stands for the folder.
fn script() -> Vec<(&'static str, Value)> {
    let file = json!({ "driver": "file", "filename": "DIR/a.raw" });
    let with = |mut v: Value, key: &str, x: Value| {
        v[key] = x;
        v
    };
    let named = with(file.clone(), "node-name", "f".into());
    let unix = |name: &str| json!({ "addr": { "type": "unix", "data": { "path": name } } });
    vec![
        ("blockdev-add", named.clone()),
        ("blockdev-add", json!({ "driver": "raw", "node-name": "r", "file": "f" })),
        ("query-named-block-nodes", json!({})),
        ("query-named-block-nodes", json!({ "flat": true })),
        ("query-block", json!({})),
        ("query-block-exports", json!({})),
        ("query-jobs", json!({})),
        ("nbd-server-start", unix("DIR/n.sock")),
        ("nbd-server-start", unix("DIR/m.sock")),
        ("nbd-server-add", json!({ "device": "r", "writable": true })),
        ("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "f" })),
        ("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "f" })),
        ("block-export-add", json!({ "type": "nbd", "id": "e2", "node-name": "f" })),
        ("query-block-exports", json!({})),
        ("blockdev-del", json!({ "node-name": "r" })),
        ("blockdev-del", json!({ "node-name": "none" })),
        ("block_resize", json!({ "node-name": "none", "size": 512 })),
        ("block-export-del", json!({ "id": "none" })),
        ("block-export-del", json!({ "id": "e" })),
        ("event", json!("BLOCK_EXPORT_DELETED")),
        ("nbd-server-remove", json!({ "name": "none" })),
        ("nbd-server-remove", json!({ "name": "r" })),
        ("event", json!("BLOCK_EXPORT_DELETED")),
        ("query-block-exports", json!({})),
        ("block_resize", json!({ "node-name": "r", "size": 2 << 20 })),
        ("query-named-block-nodes", json!({ "flat": true })),
        ("nbd-server-stop", json!({})),
        ("nbd-server-stop", json!({})),
        ("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "f" })),
        ("object-add", json!({ "qom-type": "iothread", "id": "io" })),
        ("object-add", json!({ "qom-type": "iothread", "id": "io" })),
        ("object-add", json!({ "qom-type": "throttle-group", "id": "tg" })),
        (
            "blockdev-add",
            json!({
                "driver": "throttle", "node-name": "t", "throttle-group": "tg", "file": "r"
            }),
        ),
        ("object-del", json!({ "id": "tg" })),
        ("blockdev-del", json!({ "node-name": "t" })),
        ("object-del", json!({ "id": "tg" })),
        ("object-del", json!({ "id": "io" })),
        ("object-del", json!({ "id": "io" })),
        ("qom-list", json!({ "path": "/objects" })),
        ("qom-list", json!({ "path": "/objects/io" })),
        (
            "blockdev-create",
            json!({
                "job-id": "j",
                "options": { "driver": "file", "filename": "DIR/made", "size": 65536 }
            }),
        ),
        ("event", json!("JOB_STATUS_CHANGE")),
        ("event", json!("JOB_STATUS_CHANGE")),
        ("event", json!("JOB_STATUS_CHANGE")),
        ("event", json!("JOB_STATUS_CHANGE")),
        ("event", json!("JOB_STATUS_CHANGE")),
        ("query-jobs", json!({})),
        ("job-dismiss", json!({ "id": "j" })),
        ("event", json!("JOB_STATUS_CHANGE")),
        ("job-dismiss", json!({ "id": "j" })),
        ("blockdev-add", named),
        ("blockdev-add", with(file.clone(), "node-name", "9bad".into())),
        ("blockdev-add", file),
        (
            "blockdev-reopen",
            json!({ "options": [
                { "driver": "file", "node-name": "f", "filename": "DIR/a.raw", "read-only": true }
            ] }),
        ),
        ("query-named-block-nodes", json!({ "flat": true })),
        ("blockdev-reopen", json!({ "options": [{ "driver": "null-co", "node-name": "f" }] })),
        ("blockdev-snapshot-sync", json!({ "node-name": "none", "snapshot-file": "DIR/s" })),
        ("blockdev-del", json!({ "node-name": "r" })),
        ("blockdev-del", json!({ "node-name": "f" })),
        ("query-named-block-nodes", json!({})),
        ("no-such-command", json!({})),
    ]
}

/// What both are told about a quorum.
fn quorum_script() -> Vec<(&'static str, Value)> {
    let add = |o: Value| {
        let mut q = json!({ "driver": "quorum", "node-name": "q" });
        q.as_object_mut().unwrap().extend(o.as_object().unwrap().clone());
        ("blockdev-add", q)
    };
    let change = |c: Value| ("x-blockdev-change", c);
    let q = |key: &str, name: &str| change(json!({ "parent": "q", key: name }));
    let del = |name: &str| ("blockdev-del", json!({ "node-name": name }));
    let nodes = || ("query-named-block-nodes", json!({ "flat": true }));
    let two = json!(["f0", "f1"]);
    let three = json!(["f0", "f1", "f2"]);
    let unix = json!({ "addr": { "type": "unix", "data": { "path": "DIR/n.sock" } } });
    let files = (0..4).map(|n| {
        let (name, path) = (format!("f{n}"), format!("DIR/f{n}.raw"));
        ("blockdev-add", json!({ "driver": "file", "node-name": name, "filename": path }))
    });
    let mut script: Vec<_> = files.collect();
    script.extend([
        add(json!({ "children": three, "vote-threshold": 0 })),
        add(json!({ "children": three, "vote-threshold": 4 })),
        add(json!({ "children": three, "vote-threshold": -1 })),
        add(json!({ "children": [], "vote-threshold": 1 })),
        add(json!({ "children": two })),
        add(json!({ "children": ["f0", "none"], "vote-threshold": 1 })),
        add(json!({ "children": three, "vote-threshold": 2, "blkverify": true })),
        add(json!({ "children": two, "vote-threshold": 1, "blkverify": true })),
        add(json!({
            "children": two, "vote-threshold": 2, "blkverify": true, "rewrite-corrupted": true
        })),
        add(json!({ "children": two, "vote-threshold": 2, "blkverify": true })),
        q("node", "f2"),
        q("child", "children.0"),
        nodes(),
        del("q"),
        add(json!({
            "children": three, "vote-threshold": 2, "blkverify": true, "read-pattern": "fifo"
        })),
        del("q"),
        add(json!({ "children": three, "vote-threshold": 2 })),
        nodes(),
        del("f0"),
        change(json!({ "parent": "q" })),
        change(json!({ "parent": "q", "child": "children.0", "node": "f3" })),
        change(json!({ "parent": "none", "node": "f3" })),
        change(json!({ "parent": "f0", "node": "f3" })),
        change(json!({ "parent": "f0", "child": "file" })),
        q("node", "none"),
        q("node", "q"),
        q("node", "f0"),
        q("child", "children.9"),
        q("node", "f3"),
        q("child", "children.1"),
        nodes(),
        q("node", "f1"),
        q("child", "children.4"),
        q("node", "f1"),
        q("child", "children.3"),
        q("child", "children.4"),
        q("child", "children.0"),
        nodes(),
        ("block_resize", json!({ "node-name": "q", "size": 2 << 20 })),
        q("node", "f3"),
        ("nbd-server-start", unix),
        (
            "block-export-add",
            json!({
                "type": "nbd", "id": "e", "node-name": "q", "writable": true
            }),
        ),
        ("io", json!("write -P 1 0 1M")),
        ("rot", json!("DIR/f2.raw")),
        ("io", json!("read -P 1 0 64k")),
        ("event", json!("QUORUM_REPORT_BAD")),
        ("io", json!("read -P 1 4608 512")),
        ("rot", json!("DIR/f3.raw")),
        ("io", json!("read -P 1 8192 4096")),
        ("io", json!("read 4096 8192")),
        ("rot", json!("DIR/f0.raw")),
        ("io", json!("read 4096 1024")),
        q("child", "children.3"),
        ("io", json!("read 5120 1024")),
        ("event", json!("QUORUM_FAILURE")),
        ("block-export-del", json!({ "id": "e" })),
        ("event", json!("BLOCK_EXPORT_DELETED")),
        del("q"),
        nodes(),
    ]);
    script
}

/// Puts bytes of this file's own at 4096.
fn rot(path: &str) {
    let f = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let own: Vec<u8> = path.bytes().cycle().take(4096).collect();
    std::os::unix::fs::FileExt::write_all_at(&f, &own, 4096).unwrap();
}

/// The value with `DIR` put in.
fn placed(v: &Value, dir: &str) -> Value {
    serde_json::from_str(&v.to_string().replace("DIR", dir)).unwrap()
}

/// What the daemon of this monitor answers to the script, folder names taken out.
fn answers(script: &[(&str, Value)], q: &mut Qmp, dir: &str) -> Vec<String> {
    let plain = |v: Value| sorted(v).to_string().replace(dir, "DIR");
    let said = |(command, arguments): &(&str, Value)| match *command {
        "event" => {
            let e = q.wait_event(arguments.as_str().unwrap(), PATIENCE);
            plain(e.expect("the event comes")["data"].take())
        }
        "io" => {
            let uri = format!("nbd+unix:///q?socket={dir}/n.sock");
            let io = arguments.as_str().unwrap();
            let done = tools::try_run("qemu-io", &["-f", "raw", "-c", io, &uri]);
            done.status.success().to_string()
        }
        "rot" => {
            rot(placed(arguments, dir).as_str().unwrap());
            String::new()
        }
        _ => match q.try_command(command, placed(arguments, dir)).unwrap() {
            Ok(v) => plain(v),
            Err(e) => e.class,
        },
    };
    script.iter().map(said).collect()
}

/// With the members of objects in order, those in file names too.
fn sorted(v: Value) -> Value {
    match v {
        Value::Object(m) => {
            let mut all: Vec<_> = m.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            all.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(all.into_iter().collect())
        }
        Value::Array(a) => a.into_iter().map(sorted).collect(),
        Value::String(s) => match s.strip_prefix("json:").map(serde_json::from_str) {
            Some(Ok(inner)) => format!("json:{}", sorted(inner)).into(),
            _ => s.into(),
        },
        v => v,
    }
}

#[test]
fn both_daemons_answer_alike() {
    compare(&script());
}

#[test]
fn both_daemons_have_the_same_quorum() {
    compare(&quorum_script());
}

fn compare(script: &[(&str, Value)]) {
    if !tools::have("qemu-storage-daemon") {
        return;
    }
    let run = |start: fn(&[&str]) -> Daemon| {
        let s = Scratch::new("like");
        for image in ["a.raw", "f0.raw", "f1.raw", "f2.raw", "f3.raw"] {
            std::fs::File::create(s.path(image)).unwrap().set_len(1 << 20).unwrap();
        }
        let sock = s.arg("qmp.sock");
        let chardev = format!("socket,id=c,path={sock},server=on,wait=off");
        let mut d = start(&["--chardev", &chardev, "--monitor", "c"]).wait_for(&[&sock]);
        let mut q = Qmp::connect(&sock).unwrap();
        let all = answers(script, &mut q, s.dir().to_str().unwrap());
        q.command("quit", json!({}));
        assert!(d.wait_end().success());
        all
    };
    let (theirs, ours) = (run(Daemon::reference), run(Daemon::gipfel));
    for ((step, theirs), ours) in script.iter().zip(theirs).zip(ours) {
        assert_eq!(ours, theirs, "{} {}", step.0, step.1);
    }
}

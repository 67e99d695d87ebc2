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

/// The value with `DIR` put in.
fn placed(v: &Value, dir: &str) -> Value {
    serde_json::from_str(&v.to_string().replace("DIR", dir)).unwrap()
}

/// What the daemon of this monitor answers to the script, folder names taken out.
fn answers(q: &mut Qmp, dir: &str) -> Vec<String> {
    let plain = |v: Value| sorted(v).to_string().replace(dir, "DIR");
    let said = |(command, arguments): (&str, Value)| match command {
        "event" => {
            let e = q.wait_event(arguments.as_str().unwrap(), PATIENCE);
            plain(e.expect("the event comes")["data"].take())
        }
        _ => match q.try_command(command, placed(&arguments, dir)).unwrap() {
            Ok(v) => plain(v),
            Err(e) => e.class,
        },
    };
    script().into_iter().map(said).collect()
}

/// With the members of objects in order.
fn sorted(v: Value) -> Value {
    match v {
        Value::Object(m) => {
            let mut all: Vec<_> = m.into_iter().map(|(k, v)| (k, sorted(v))).collect();
            all.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(all.into_iter().collect())
        }
        Value::Array(a) => a.into_iter().map(sorted).collect(),
        v => v,
    }
}

#[test]
fn both_daemons_answer_alike() {
    if !tools::have("qemu-storage-daemon") {
        return;
    }
    let run = |start: fn(&[&str]) -> Daemon| {
        let s = Scratch::new("like");
        std::fs::File::create(s.path("a.raw")).unwrap().set_len(1 << 20).unwrap();
        let sock = s.arg("qmp.sock");
        let chardev = format!("socket,id=c,path={sock},server=on,wait=off");
        let mut d = start(&["--chardev", &chardev, "--monitor", "c"]).wait_for(&[&sock]);
        let mut q = Qmp::connect(&sock).unwrap();
        let all = answers(&mut q, s.dir().to_str().unwrap());
        q.command("quit", json!({}));
        assert!(d.wait_end().success());
        all
    };
    let (theirs, ours) = (run(Daemon::reference), run(Daemon::gipfel));
    for ((step, theirs), ours) in script().iter().zip(theirs).zip(ours) {
        assert_eq!(ours, theirs, "{} {}", step.0, step.1);
    }
}

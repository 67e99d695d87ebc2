//! `gipfel graph`: text, DOT and SVG of a daemon, of an image, and of what a command would change.
#![allow(missing_docs)]

mod common;

use common::Served;
use gipfel_testkit::{Daemon, tools};
use serde_json::{Value, json};

fn graph(args: &[&str]) -> (bool, String, String) {
    let mut all = vec!["graph"];
    all.extend(args);
    let out = tools::try_run(&Daemon::binary().to_string_lossy(), &all);
    let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
    (out.status.success(), text(&out.stdout), text(&out.stderr))
}

#[test]
fn a_daemon_is_shown_and_a_change_rehearsed() {
    if !tools::have("qemu-img") {
        return;
    }
    let served = Served::new("graph", "8M", &[], "");
    let socket = served.scratch.arg("qmp.sock");
    let mut q = served.qmp();
    let over = served.scratch.arg("over.qcow2");
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &over, "8M"]);
    q.command(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "over", "backing": null,
                "file": { "driver": "file", "filename": over } }),
    );
    let (ok, before, _) = graph(&["--qmp", &socket]);
    assert!(ok && before.contains("`-- disk (qcow2)   root rw"), "{before}");
    let snapshot = json!({ "execute": "blockdev-snapshot",
                           "arguments": { "node": "disk", "overlay": "over" } });
    let dry =
        |c: &Value, f: &str| graph(&["--qmp", &socket, "--format", f, "--dry-run", &c.to_string()]);
    let (ok, text, _) = dry(&snapshot, "text");
    assert!(ok && text.starts_with(&format!("before:\n{before}")), "{text}");
    assert!(text.contains("+ over.backing -> disk\n"), "{text}");
    let (_, again, _) = graph(&["--qmp", &socket]);
    assert_eq!(again, before, "a rehearsal changes nothing");
    let (ok, svg, _) = dry(&snapshot, "svg");
    assert!(ok && svg.starts_with("<svg ") && svg.contains("class=\"edge new\""), "{svg}");
    let (ok, dot, _) = dry(&snapshot, "dot");
    assert!(ok && dot.starts_with("digraph ") && dot.contains("color=red"), "{dot}");
    q.command("blockdev-snapshot", snapshot["arguments"].clone());
    let (_, after, _) = graph(&["--qmp", &socket]);
    let told = text.split("after:\n").nth(1).unwrap().split("\nchanges:").next().unwrap();
    assert_eq!(told, after, "what was rehearsed is what came");
    for (command, says) in [
        (snapshot, "has a backing node already"),
        (json!({ "execute": "quit" }), "'quit' cannot be rehearsed"),
        (json!({ "execute": "blockdev-del", "arguments": { "node": 1 } }), "node"),
        (json!(["quit"]), "--dry-run takes a QMP command"),
    ] {
        let (ok, _, e) = dry(&command, "text");
        assert!(!ok && e.contains(says) && !e.contains("panicked"), "{e}");
    }
    served.end();
}

#[test]
fn a_chain_is_shown_without_a_daemon() {
    if !tools::have("qemu-img") {
        return;
    }
    let s = gipfel_testkit::Scratch::new("graph-offline");
    let base = s.file("base.raw", &[1; 4096]);
    let top = s.arg("top.qcow2");
    tools::qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &base, &top]);
    let (ok, text, e) = graph(&[&top]);
    assert!(ok && text.starts_with("image (qcow2, ro)\n|-- "), "{text}{e}");
    assert!(text.contains("(raw, ro)   backing"), "{text}");
    for (args, says) in
        [(vec!["/nonexistent/i.qcow2"], "No such file"), (vec!["--qmp", "/nonexistent/q"], "QMP")]
    {
        let (ok, _, e) = graph(&args);
        assert!(!ok && e.contains(says), "{e}");
    }
}

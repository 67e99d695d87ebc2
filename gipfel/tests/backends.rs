//! Backends end to end: drives, media that change under a client, exports that find a backend by
//! its name, what queries tell.
#![allow(missing_docs)]

use std::path::PathBuf;
use std::time::Duration;

use gipfel_testkit::nbd::{Address, Client, Handshake};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Scratch, tools};
use serde_json::{Value, json};

const KIB: usize = 1024;
const SOON: Duration = Duration::from_secs(5);

struct Host {
    daemon: Daemon,
    scratch: Scratch,
}

impl Host {
    fn start(scratch: Scratch, more: &[&str]) -> Host {
        let (nbd, qmp) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
        let server = format!("addr.type=unix,addr.path={nbd}");
        let chardev = format!("socket,id=c,path={qmp},server=on,wait=off");
        let mut args = vec!["--nbd-server", &server, "--chardev", &chardev, "--monitor", "c"];
        args.extend(more);
        let sockets: [PathBuf; 2] = [nbd.clone().into(), qmp.clone().into()];
        Host { daemon: Daemon::gipfel(&args).wait_for(&sockets), scratch }
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(self.scratch.path("qmp.sock")).unwrap()
    }

    fn address(&self) -> Address {
        Address::Unix(self.scratch.path("nbd.sock"))
    }

    fn client(&self, name: &str) -> Client {
        Client::connect(&self.address(), name).unwrap()
    }

    fn end(mut self) -> Scratch {
        assert!(self.daemon.terminate().success());
        self.scratch
    }
}

fn backend(q: &mut Qmp, name: &str) -> Value {
    let list = q.command("query-backends", json!({}));
    list.as_array().unwrap().iter().find(|b| b["name"] == name).unwrap().clone()
}

/// What query-block says of the only backend: is it removable, its tray open, a medium in it?
fn tray(q: &mut Qmp) -> (bool, bool, bool) {
    let b = &q.command("query-block", json!({}))[0];
    let flag = |k: &str| b[k].as_bool().unwrap();
    (flag("removable"), flag("tray_open"), b.get("inserted").is_some())
}

fn image(scratch: &Scratch, name: &str, byte: u8) -> String {
    scratch.file(name, &vec![byte; 64 * KIB])
}

#[test]
fn a_drive_is_a_backend_with_its_medium_and_filters() {
    let s = Scratch::new("drive");
    let (base, top) = (image(&s, "base.raw", 1), s.arg("top.qcow2"));
    tools::qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &base, &top]);
    let drive = format!(
        "file={top},id=vd0,if=virtio,index=2,serial=S1,cache=unsafe,discard=unmap,bps=50000000,\
         iops_max=900,iops=500,copy-on-read=on,detect-zeroes=unmap,werror=enospc,node-name=fmt"
    );
    let h = Host::start(s, &["--drive", &drive, "--export", "nbd,id=e,node-name=vd0,writable=on"]);
    let mut q = h.qmp();
    let b = backend(&mut q, "vd0");
    assert_eq!(b["client"], "export 'e'");
    assert_eq!((&b["node-name"], &b["werror"]), (&json!("fmt"), &json!("enospc")));
    assert_eq!((&b["copy-on-read"], &b["detect-zeroes"]), (&json!(true), &json!("unmap")));
    let d = &b["drive"];
    assert_eq!(d["interface"], "virtio");
    assert_eq!((&d["index"], &d["serial"]), (&json!(2), &json!("S1")));
    let shown = q.command("query-block", json!({}));
    let i = &shown[0]["inserted"];
    assert_eq!(
        (&i["bps"], &i["iops"], &i["iops_max"]),
        (&json!(50000000), &json!(500), &json!(900))
    );
    assert_eq!(i["cache"]["no-flush"], true);
    assert_eq!((&shown[0]["removable"], shown[0].get("tray_open")), (&json!(false), None));
    let mut c = h.client("vd0");
    assert_eq!(c.read(0, 4096).unwrap(), [1; 4096]);
    c.write(4096, &[7; 4096], 0).unwrap();
    c.disconnect().unwrap();
    let s = h.end();
    // What was read was kept, and so was what was written.
    std::fs::write(&base, vec![9; 64 * KIB]).unwrap();
    tools::qemu_io("qcow2", &top, &["read -P 1 0 4k", "read -P 7 4k 4k", "read -P 1 8k 56k"]);
    drop(s);
}

#[test]
fn a_temporary_overlay_goes_with_the_process() {
    let s = Scratch::new("overlay");
    let file = image(&s, "disk.raw", 1);
    let drive = format!("file={file},format=raw,id=d,snapshot=on");
    let h = Host::start(s, &["--drive", &drive, "--export", "nbd,id=e,node-name=d,writable=on"]);
    let mut c = h.client("d");
    c.write(0, &[2; 512], 0).unwrap();
    assert_eq!(c.read(0, 1024).unwrap(), [[2; 512], [1; 512]].concat());
    c.disconnect().unwrap();
    drop(h.end());
    let s = Scratch::new("overlay-bad");
    let refused = Daemon::gipfel(&["--drive", "id=d,snapshot=on"]).wait_end();
    assert!(!refused.success());
    drop(s);
}

/// An export without medium is listed; who would go in is told, at once, that it has none.
fn no_client_gets_in(h: &Host) {
    let mut shake = Handshake::connect(&h.address()).unwrap();
    let listed = shake.list().unwrap();
    assert!(listed.iter().any(|e| e.0 == "cd"), "{listed:?}");
    let e = Client::connect(&h.address(), "cd").unwrap_err();
    assert!(e.to_string().contains("no medium"), "{e}");
    assert!(Handshake::connect(&h.address()).unwrap().export_name("cd").is_err());
}

#[test]
fn media_change_under_a_client() {
    let s = Scratch::new("media");
    let (a, b) = (image(&s, "a.raw", 1), image(&s, "b.raw", 2));
    let node = format!("raw,node-name=b,file.driver=file,file.filename={b}");
    let h = Host::start(s, &["--blockdev", &node]);
    let mut q = h.qmp();
    q.command("backend-add", json!({ "name": "cd", "removable": true, "read-only": true }));
    let id = json!({ "type": "nbd", "id": "e", "node-name": "cd" });
    q.command("block-export-add", id.clone());
    let mut again = id;
    again["id"] = json!("f");
    let e = q.refused("block-export-add", again);
    assert!(e.desc.contains("backend 'cd' has a client already: export 'e'"), "{e:?}");
    no_client_gets_in(&h);
    let change = json!({ "device": "cd", "filename": a, "format": "raw" });
    q.command("blockdev-change-medium", change);
    let moved = q.wait_event("DEVICE_TRAY_MOVED", SOON).unwrap();
    assert_eq!(moved["data"], json!({ "device": "cd", "id": "", "tray-open": false }));
    assert_eq!(backend(&mut q, "cd")["size"], 64 * KIB);
    let mut c = h.client("cd");
    assert_eq!(c.read(0, 512).unwrap(), [1; 512]);
    let e = q.refused("blockdev-remove-medium", json!({ "id": "e" }));
    assert!(e.desc.contains("the tray of backend 'cd' is closed"), "{e:?}");
    q.command("eject", json!({ "id": "e" }));
    assert!(c.read(0, 512).is_err(), "no medium");
    no_client_gets_in(&h);
    assert_eq!(backend(&mut q, "cd").get("node-name"), None);
    assert_eq!(tray(&mut q), (true, true, false));
    q.command("blockdev-insert-medium", json!({ "device": "cd", "node-name": "b" }));
    q.command("blockdev-close-tray", json!({ "device": "cd" }));
    assert_eq!(tray(&mut q), (true, false, true));
    assert_eq!(c.read(0, 512).unwrap(), [2; 512]);
    let missing = json!({ "device": "cd", "filename": "/nonexistent/c.raw" });
    q.refused("blockdev-change-medium", missing);
    assert_eq!(c.read(0, 512).unwrap(), [2; 512], "the old medium stays");
    let e = q.refused("blockdev-open-tray", json!({ "device": "b" }));
    assert!(e.desc.contains("'b' is a node, no backend"), "{e:?}");
    let e = q.refused("backend-del", json!({ "name": "cd" }));
    assert!(e.desc.contains("in use by export 'e'"), "{e:?}");
    c.disconnect().unwrap();
    q.command("block-export-del", json!({ "id": "e", "mode": "hard" }));
    q.wait_event("BLOCK_EXPORT_DELETED", SOON).unwrap();
    q.command("backend-del", json!({ "name": "cd" }));
    q.command("blockdev-del", json!({ "node-name": "b" }));
    drop(h.end());
}

#[test]
fn wrong_drives_are_refused_clearly() {
    let s = Scratch::new("drive-bad");
    let file = image(&s, "d.raw", 1);
    for (options, says) in [
        ("id=x,format=raw,file=/nonexistent/x".to_owned(), "/nonexistent/x"),
        (format!("id=9x,format=raw,file={file}"), "'9x' cannot be a backend name"),
        (format!("id=x,format=raw,file={file},bps=1,bps_rd=1"), "bps"),
        (format!("id=x,format=raw,file={file},rerror=enospc"), "for writes only"),
        (format!("id=x,format=raw,file={file},werror=never"), "werror"),
        (format!("id=x,format=raw,file={file},media=tape"), "neither disk nor cdrom"),
        (format!("id=x,format=raw,file={file},cache=sometimes"), "cache"),
        (format!("id=x,format=raw,file={file},colour=red"), "colour"),
        (format!("id=x,format=raw,file={file},copy-on-read=on,read-only=on"), "read-only"),
    ] {
        let out = tools::try_run(
            &Daemon::binary().to_string_lossy(),
            &["storage-daemon", "--drive", &options],
        );
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && text.contains(says), "{options}: {text}");
        assert!(!text.contains("panicked"), "{options}: {text}");
    }
}

#[test]
fn a_client_stopped_by_a_full_disk_goes_on_after_backend_resume() {
    let s = Scratch::new("stopped");
    let file = image(&s, "d.raw", 1);
    let node = json!({
        "driver": "blkdebug", "node-name": "full",
        "inject-error": [{ "event": "none", "iotype": "write", "errno": 28, "once": true }],
        "image": { "driver": "file", "filename": file }
    });
    let h = Host::start(s, &["--blockdev", &node.to_string()]);
    let mut q = h.qmp();
    q.command("backend-add", json!({ "name": "d", "node-name": "full", "werror": "stop" }));
    let export = json!({ "type": "nbd", "id": "e", "node-name": "d", "writable": true });
    q.command("block-export-add", export);
    let mut c = h.client("d");
    let status = |q: &mut Qmp| q.command("query-block", json!({}))[0]["io-status"].clone();
    assert_eq!(status(&mut q), "ok");
    let writer = std::thread::spawn(move || {
        c.write(0, &[2; 512], 0).unwrap();
        assert_eq!(c.read(0, 512).unwrap(), [2; 512]);
        c.disconnect().unwrap();
    });
    let e = q.wait_event("BLOCK_IO_ERROR", SOON).unwrap();
    assert_eq!((&e["data"]["action"], &e["data"]["nospace"]), (&json!("stop"), &json!(true)));
    assert_eq!(status(&mut q), "nospace");
    assert!(!writer.is_finished(), "the client waits");
    q.command("backend-resume", json!({ "name": "d" }));
    writer.join().unwrap();
    assert_eq!(status(&mut q), "ok");
    drop(h.end());
}

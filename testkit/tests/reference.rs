//! The test kit against the reference servers: a kit that misjudges them would misjudge us.

use gipfel_testkit::nbd::{Address, Client, Command, Handshake, wire};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, DiskModel, Rng, Scratch, tools};
use serde_json::json;
use std::time::Duration;

const SIZE: u64 = 4 << 20;

fn exercise(address: &Address, name: &str, rng: &mut Rng) {
    let mut h = Handshake::connect(address).unwrap();
    assert!(h.list().unwrap().iter().any(|(n, _)| n == name));
    assert!(h.info("no such export, surely").is_err() || name.is_empty());
    let unknown = h.option(1000, b"?").unwrap();
    assert_eq!(unknown[0].kind, wire::REP_ERR_UNSUP);
    assert!(h.abort().unwrap());
    let mut simple = Client::connect_simple(address, name).unwrap();
    assert_eq!(simple.size(), SIZE);
    let mut model = DiskModel::new(SIZE);
    let data = rng.bytes(70_000);
    simple.write(12_345, &data, 0).unwrap();
    model.write(12_345, &data);
    model.expect(0, &simple.read(0, 200_000).unwrap());
    simple.disconnect().unwrap();

    let mut c = Client::connect(address, name).unwrap();
    c.zero(20_000, 30_000, 0).unwrap();
    model.zero(20_000, 30_000);
    c.trim(1 << 20, 4096, 0).unwrap();
    c.flush().unwrap();
    let reads: Vec<_> = (0..32)
        .map(|_| {
            let offset = rng.below(300_000) & !511;
            Command { kind: wire::CMD_READ, flags: 0, offset, length: 4096, payload: &[] }
        })
        .collect();
    let cookies = c.submit_all(&reads).unwrap();
    for _ in &reads {
        let done = c.complete().unwrap();
        let i = cookies.iter().position(|k| *k == done.cookie).unwrap();
        model.expect(reads[i].offset, &done.result.unwrap().bytes);
    }
    assert_eq!(c.in_flight(), 0);
    let map = c.map().unwrap();
    assert_eq!(map.iter().map(|e| e.1).sum::<u64>(), SIZE);
    assert!(c.read(SIZE, 512).is_err());
    model.expect(0, &c.read(0, 100_000).unwrap());
    c.disconnect().unwrap();
}

#[test]
fn qemu_nbd() {
    if !tools::have("qemu-nbd") {
        return;
    }
    let s = Scratch::new("qnbd");
    let image = s.arg("a.qcow2");
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &image, "4M"]);
    let socket = s.arg("s");
    let args =
        ["-t", "-k", &socket, "-f", "qcow2", "-x", "x", "-e", "4", "--discard=unmap", &image];
    let mut d = Daemon::start("qemu-nbd", &args).wait_for(&[&socket]);
    exercise(&Address::unix(&socket), "x", &mut Rng::from_env());
    assert!(d.terminate().success());
    tools::qcow2_is_clean(&image);
}

#[test]
fn nbdkit() {
    if !tools::have("nbdkit") {
        return;
    }
    let s = Scratch::new("kit");
    let socket = s.arg("s");
    let args = ["-f", "-U", &socket, "memory", "4M"];
    let _d = Daemon::start("nbdkit", &args).wait_for(&[&socket]);
    exercise(&Address::unix(&socket), "", &mut Rng::from_env());
}

#[test]
fn reference_daemon_over_qmp() {
    if !tools::have("qemu-storage-daemon") {
        return;
    }
    let s = Scratch::new("qsd");
    let (nbd, qmp) = (s.arg("nbd"), s.arg("qmp"));
    let chardev = format!("socket,id=c,path={qmp},server=on,wait=off");
    let args = ["--chardev", &chardev, "--monitor", "chardev=c"];
    let mut d = Daemon::reference(&args).wait_for(&[&qmp]);
    let mut q = Qmp::connect(&qmp).unwrap();
    assert!(q.greeting()["QMP"]["version"].is_object());
    q.command(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n", "size": SIZE,
        "read-zeroes": true}),
    );
    let addr = json!({"type": "unix", "data": {"path": nbd}});
    q.command("nbd-server-start", json!({ "addr": addr }));
    let export = json!({"type": "nbd", "id": "e", "node-name": "n", "name": "x", "writable": true});
    q.command("block-export-add", export);
    let refused = q.refused("blockdev-del", json!({"node-name": "n"}));
    assert_eq!(refused.class, "GenericError");
    let mut c = Client::connect(&Address::unix(&nbd), "x").unwrap();
    assert_eq!(c.size(), SIZE);
    assert!(c.read(0, 4096).unwrap().iter().all(|b| *b == 0));
    c.disconnect().unwrap();
    q.command("block-export-del", json!({"id": "e", "mode": "hard"}));
    let event = q.wait_event("BLOCK_EXPORT_DELETED", Duration::from_secs(5)).unwrap();
    assert_eq!(event["data"]["id"], "e");
    assert!(q.wait_event("NO_SUCH_EVENT", Duration::from_millis(50)).is_err());
    q.command("quit", json!({}));
    assert!(d.wait_end().success());
    assert!(!d.is_running());
}

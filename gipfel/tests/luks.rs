//! Encrypted disks end to end: secrets as objects, a node over an image that others made, served
//! and written over NBD, and read again by the reference.
#![allow(missing_docs)]

use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, DiskModel, Rng, Scratch, tools};
use serde_json::json;

/// An image of 1 MiB that opens with the file `pass` in `scratch`, and `pass` itself.
fn image(scratch: &Scratch) -> (String, String) {
    let pass = scratch.file("pass", b"tell nobody");
    let path = scratch.file("disk.luks", &vec![0; 3 << 20]);
    let mut args = vec!["luksFormat", "-q", "--type", "luks1", "--disable-locks"];
    args.extend(["--pbkdf-force-iterations", "1000", &path, &pass]);
    tools::run("cryptsetup", &args);
    (path, pass)
}

#[test]
fn a_disk_is_served_and_the_reference_reads_it() {
    if !tools::have("cryptsetup") || !tools::have("qemu-img") {
        return;
    }
    let scratch = Scratch::new("luks-served");
    let (path, pass) = image(&scratch);
    let (nbd, qmp) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
    let secret = format!("secret,id=s,file={pass}");
    let node = json!({
        "driver": "luks", "node-name": "disk", "key-secret": "s",
        "file": { "driver": "file", "filename": path },
    });
    let args = [
        "--io-threads",
        "2",
        "--object",
        &secret,
        "--blockdev",
        &node.to_string(),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={nbd},max-connections=0"),
        "--export",
        "nbd,id=e,node-name=disk,name=x,writable=on",
        "--chardev",
        &format!("socket,id=c,path={qmp},server=on,wait=off"),
        "--monitor",
        "c",
    ];
    let mut daemon = Daemon::gipfel(&args).wait_for(&[&nbd, &qmp]);
    // Several clients, each with its own part of the disk, whose ends share sectors.
    let clients: Vec<_> = (0..4u64)
        .map(|c| {
            let mut client = Client::connect(&Address::Unix(nbd.clone().into()), "x").unwrap();
            std::thread::spawn(move || {
                let (start, size) = (c * 262_044, 262_044);
                let mut rng = Rng::new(c);
                let mut model = DiskModel::new(size);
                client.write(start, &vec![0; size as usize], 0).unwrap();
                for _ in 0..100 {
                    let at = rng.below(size);
                    let len = rng.between(1, (size - at).min(50_000));
                    if rng.one_in(2) {
                        let data = rng.bytes(len as usize);
                        client.write(start + at, &data, 0).unwrap();
                        model.write(at, &data);
                    } else {
                        model.expect(at, &client.read(start + at, len as u32).unwrap());
                    }
                }
                model.to_vec()
            })
        })
        .collect();
    let mut wanted: Vec<u8> = clients.into_iter().flat_map(|c| c.join().unwrap()).collect();
    let mut client = Client::connect(&Address::Unix(nbd.into()), "x").unwrap();
    let rest = (1 << 20) - wanted.len();
    wanted.extend(client.read(wanted.len() as u64, rest as u32).unwrap());
    let mut q = Qmp::connect(&qmp).unwrap();
    let nodes = q.command("query-named-block-nodes", json!({}));
    let disk = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == "disk").unwrap();
    assert_eq!(disk["encrypted"], true);
    assert_eq!(disk["image"]["format-specific"]["data"]["cipher-alg"], "aes-256");
    assert!(daemon.terminate().success());
    let raw = scratch.file("wanted.raw", &wanted);
    let image = format!("driver=luks,key-secret=s,file.filename={path}");
    let raw = format!("driver=raw,file.filename={raw}");
    tools::qemu_img(&["compare", "--object", &secret, "--image-opts", &image, &raw]);
}

#[test]
fn secrets_come_and_go_and_are_not_told() {
    if !tools::have("cryptsetup") {
        return;
    }
    let scratch = Scratch::new("luks-secrets");
    let (path, pass) = image(&scratch);
    let qmp = scratch.arg("qmp.sock");
    let chardev = format!("socket,id=c,path={qmp},server=on,wait=off");
    let _daemon = Daemon::gipfel(&["--chardev", &chardev, "--monitor", "c"])
        .wait_for(std::slice::from_ref(&qmp));
    let mut q = Qmp::connect(&qmp).unwrap();
    let node = |secret: &str| {
        json!({
            "driver": "luks", "node-name": "disk", "key-secret": secret,
            "file": { "driver": "file", "filename": path },
        })
    };
    let e = q.refused("blockdev-add", node("s"));
    assert!(e.desc.contains("no secret 's'"), "{}", e.desc);
    let mut keyless = node("s");
    keyless.as_object_mut().unwrap().remove("key-secret");
    let e = q.refused("blockdev-add", keyless);
    assert!(e.desc.contains("'key-secret'"), "{}", e.desc);
    q.command("object-add", json!({ "qom-type": "secret", "id": "w", "data": "wrong" }));
    let e = q.refused("blockdev-add", node("w"));
    assert!(e.desc.contains("opens none of the image's 1"), "{}", e.desc);
    // 'tell nobody' in base64.
    let secret = json!({
        "qom-type": "secret", "id": "s", "data": "dGVsbCBub2JvZHk=", "format": "base64",
    });
    q.command("object-add", secret.clone());
    let e = q.refused("object-add", secret);
    assert!(e.desc.contains("already"), "{}", e.desc);
    q.command("blockdev-add", node("s"));
    let list = q.command("qom-list", json!({ "path": "/objects" })).to_string();
    assert!(list.contains("child<secret>"), "{list}");
    let get = |property: &str| json!({ "path": "/objects/s", "property": property });
    assert_eq!(q.command("qom-get", get("format")), "base64");
    let e = q.refused("qom-get", get("data"));
    assert!(e.desc.contains("told to nobody"), "{}", e.desc);
    let mut set = get("format");
    set["value"] = json!("raw");
    q.refused("qom-set", set);
    // An open node needs its secret no more.
    q.command("object-del", json!({ "id": "s" }));
    q.command("blockdev-del", json!({ "node-name": "disk" }));
    let e = q.refused("blockdev-add", node("s"));
    assert!(e.desc.contains("no secret 's'"), "{}", e.desc);
    let from_file = json!({ "qom-type": "secret", "id": "s", "file": pass });
    q.command("object-add", from_file);
    q.command("blockdev-add", node("s"));
}

#[test]
fn images_are_told_of_and_copied() {
    if !tools::have("cryptsetup") || !tools::have("qemu-img") {
        return;
    }
    let scratch = Scratch::new("luks-img");
    let (path, pass) = image(&scratch);
    let gipfel = Daemon::binary().display().to_string();
    let secret = format!("secret,id=s,file={pass}");
    let options = format!("driver=luks,key-secret=s,file.filename={path}");
    let info = |tool: &str, first: &[&str], format: &str| {
        let output = format!("--output={format}");
        let rest = ["info", &output, "--object", &secret, "--image-opts", &options];
        tools::run(tool, &[first, &rest].concat())
    };
    // The name of the image is told in another way.
    let rest = |s: String| {
        let lines = s.lines().filter(|l| !l.starts_with("image:")).map(str::to_owned);
        lines.collect::<Vec<_>>()
    };
    let (ours, theirs) = (info(&gipfel, &["img"], "human"), info("qemu-img", &[], "human"));
    assert_eq!(rest(ours), rest(theirs));
    let json = |s: String| {
        let mut v: serde_json::Value = serde_json::from_str(&s).unwrap();
        v["filename"].take();
        v
    };
    let (ours, theirs) = (info(&gipfel, &["img"], "json"), info("qemu-img", &[], "json"));
    assert_eq!(json(ours), json(theirs));
    let (copy, theirs) = (scratch.arg("copy.raw"), scratch.arg("theirs.raw"));
    let convert = ["convert", "--object", &secret, "-O", "raw", "--image-opts", &options];
    tools::run(&gipfel, &[&["img"], &convert[..], &[&copy]].concat());
    tools::qemu_img(&[&convert[..], &[&theirs]].concat());
    assert!(std::fs::read(copy).unwrap() == std::fs::read(theirs).unwrap());
    let out = tools::try_run(&gipfel, &["img", "convert", "-O", "raw", &path, &pass]);
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && said.contains("'key-secret'"), "{said}");
}

#[test]
fn a_plain_overlay_is_warned_of() {
    if !tools::have("cryptsetup") {
        return;
    }
    let scratch = Scratch::new("luks-overlay");
    let (path, pass) = image(&scratch);
    let (qmp, log) = (scratch.arg("qmp.sock"), scratch.arg("log"));
    let chardev = format!("socket,id=c,path={qmp},server=on,wait=off");
    let binary = Daemon::binary().display().to_string();
    let mut args = vec!["-c", r#"exec "$0" "$@" 2>"$LOG""#, &binary, "storage-daemon"];
    let script = args[1].replace("$LOG", &log);
    args[1] = &script;
    let secret = format!("secret,id=s,file={pass}");
    args.extend(["--object", &secret, "--chardev", &chardev, "--monitor", "c"]);
    let daemon = Daemon::start("sh", &args).wait_for(std::slice::from_ref(&qmp));
    let mut q = Qmp::connect(&qmp).unwrap();
    q.command(
        "blockdev-add",
        json!({
            "driver": "luks", "node-name": "disk", "key-secret": "s",
            "file": { "driver": "file", "filename": path },
        }),
    );
    q.command(
        "blockdev-snapshot-sync",
        json!({
            "node-name": "disk", "snapshot-file": scratch.arg("top"), "snapshot-node-name": "top",
        }),
    );
    let said = std::fs::read_to_string(log).unwrap();
    assert!(said.contains("node 'disk' is encrypted and its overlay 'top' is not"), "{said}");
    drop(daemon);
}

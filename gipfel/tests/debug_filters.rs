//! blkdebug, blklogwrites and blkverify end to end: the same requests fail as in the reference, the
//! same is logged, and a qcow2 image lives through whatever fails below it.
#![allow(missing_docs)]

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::{Daemon, Rng, Scratch, tools};
use serde_json::{Value, json};

const SIZE: u64 = 1 << 20;

/// A daemon that serves the node that `options` say, and a client of it.
struct Served {
    client: Option<Client>,
    daemon: Daemon,
}

impl Served {
    fn start(reference: bool, scratch: &Scratch, mut options: Value) -> Served {
        let socket = scratch.arg(if reference { "ref.sock" } else { "our.sock" });
        options["node-name"] = "top".into();
        let node = options.to_string();
        let server = format!("addr.type=unix,addr.path={socket}");
        let export = "nbd,id=e,node-name=top,name=x,writable=on";
        let args = ["--blockdev", &node, "--nbd-server", &server, "--export", export];
        let daemon = if reference { Daemon::reference(&args) } else { Daemon::gipfel(&args) };
        let daemon = daemon.wait_for(&[PathBuf::from(&socket)]);
        // The socket may be that of the daemon before, and the reference lets clients in before it
        // has its exports.
        let address = Address::Unix(socket.into());
        let end = Instant::now() + Duration::from_secs(10);
        let client = loop {
            // Where replies are structured the reference disconnects when a read fails.
            match Client::connect_simple(&address, "x") {
                Ok(c) => break c,
                Err(e) => assert!(Instant::now() < end, "{e}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        Served { client: Some(client), daemon }
    }

    fn client(&mut self) -> &mut Client {
        self.client.as_mut().expect("it is there until the end")
    }

    /// Lets the client go, and ends the daemon.
    fn end(mut self) {
        self.client.take().unwrap().disconnect().unwrap();
        assert!(self.daemon.terminate().success());
    }
}

/// One request.
#[derive(Clone, Debug)]
enum Ask {
    Read(u64, u32),
    Write(u64, Vec<u8>),
    Zero(u64, u32),
    Trim(u64, u32),
    Flush,
}

impl Ask {
    fn random(rng: &mut Rng, unit: u64) -> Ask {
        let at = rng.below(SIZE / 16 / unit) * unit;
        let len = (1 + rng.below(8)) * unit;
        match rng.below(9) {
            0..3 => Ask::Read(at, len as u32),
            3..6 => Ask::Write(at, vec![rng.below(255) as u8 + 1; len as usize]),
            6 => Ask::Zero(at, len as u32),
            7 => Ask::Trim(at, len as u32),
            _ => Ask::Flush,
        }
    }

    /// Does it; gives the error's number, 0 for success.
    fn run(&self, c: &mut Client) -> i32 {
        let done = match self {
            Ask::Read(at, len) => c.read(*at, *len).map(drop),
            Ask::Write(at, data) => c.write(*at, data, 0),
            Ask::Zero(at, len) => c.zero(*at, *len, 0),
            Ask::Trim(at, len) => c.trim(*at, *len, 0),
            Ask::Flush => c.flush(),
        };
        match done {
            Ok(()) => 0,
            Err(e) => e.errno(),
        }
    }
}

/// Random rules, for events that every node has.
fn random_rules(rng: &mut Rng) -> (Value, Value) {
    let events = [
        "none",
        "read_aio",
        "write_aio",
        "pwritev",
        "pwritev_done",
        "pwritev_zero",
        "flush_to_os",
        "flush_to_disk",
        "l2_load",
    ];
    let kinds = ["read", "write", "write-zeroes", "discard", "flush", "block-status"];
    let mut injects = Vec::new();
    for _ in 0..rng.between(1, 5) {
        let errno = *rng.pick(&[1, 5, 12, 22, 28]);
        let mut rule = json!({ "event": rng.pick(&events), "errno": errno });
        for (key, value) in [
            ("state", json!(rng.between(1, 4))),
            ("iotype", json!(rng.pick(&kinds))),
            ("sector", json!(rng.below(SIZE / 16 / 512))),
            ("once", json!(true)),
            ("immediately", json!(true)),
        ] {
            if rng.one_in(2) {
                rule[key] = value;
            }
        }
        injects.push(rule);
    }
    let mut changes = Vec::new();
    for _ in 0..rng.between(1, 5) {
        let mut rule = json!({ "event": rng.pick(&events), "new_state": rng.between(1, 4) });
        if rng.one_in(2) {
            rule["state"] = json!(rng.between(1, 4));
        }
        changes.push(rule);
    }
    (Value::Array(injects), Value::Array(changes))
}

#[test]
fn the_same_requests_fail_as_in_the_reference() {
    if !tools::have("qemu-storage-daemon") {
        return;
    }
    let mut rng = Rng::from_env();
    println!("seed {}", rng.seed());
    let scratch = Scratch::new("debug-like-reference");
    let mut failed = 0;
    for round in 0..12 {
        let (injects, changes) = random_rules(&mut rng);
        let asked: Vec<Ask> = (0..60)
            .flat_map(|_| match Ask::random(&mut rng, 512) {
                // The reference makes no flush where nothing was written since the last one.
                Ask::Flush => vec![Ask::Write(0, vec![1; 512]), Ask::Flush],
                other => vec![other],
            })
            .collect();
        let outcome = |reference: bool| {
            let file = scratch.file("disk.raw", &vec![1; SIZE as usize]);
            let file = json!({ "driver": "file", "filename": file, "discard": "unmap" });
            let debug = json!({
                "driver": "blkdebug", "image": file, "discard": "unmap",
                "inject-error": injects, "set-state": changes,
            });
            let top = json!({ "driver": "raw", "file": debug, "discard": "unmap" });
            let mut s = Served::start(reference, &scratch, top);
            let done: Vec<i32> = asked.iter().map(|a| a.run(s.client())).collect();
            s.daemon.kill();
            done
        };
        let (theirs, ours) = (outcome(true), outcome(false));
        failed += ours.iter().filter(|e| **e != 0).count();
        let story = asked.iter().zip(theirs.iter().zip(&ours)).fold(String::new(), |mut s, x| {
            let what = match x.0 {
                Ask::Write(at, data) => format!("Write({at}, {})", data.len()),
                other => format!("{other:?}"),
            };
            writeln!(s, "{what}: reference {} ours {}", x.1.0, x.1.1).unwrap();
            s
        });
        assert_eq!(theirs, ours, "round {round}\n{injects:#}\n{changes:#}\n{story}");
    }
    assert!(failed > 0, "something was injected");
}

/// Events of a qcow2 image.
const METADATA: [&str; 16] = [
    "l1_update",
    "l2_load",
    "l2_update",
    "l2_alloc_write",
    "refblock_load",
    "refblock_update",
    "refblock_alloc_write",
    "refblock_alloc_hookup",
    "reftable_update",
    "cluster_alloc",
    "cluster_free",
    "cow_read",
    "cow_write",
    "write_aio",
    "flush_to_os",
    "flush_to_disk",
];

#[test]
fn whatever_fails_below_an_image_it_is_not_corrupted() {
    if !tools::have("qemu-img") {
        return;
    }
    let mut rng = Rng::from_env();
    println!("seed {}", rng.seed());
    let scratch = Scratch::new("debug-qcow2");
    let (image, base) = (scratch.arg("disk.qcow2"), scratch.file("base.raw", &vec![0xbb; 1 << 19]));
    let (mut failed, mut flushed) = (0, 0);
    for round in 0..25 {
        let options = format!(
            "cluster_size={},refcount_bits={}",
            512 << (3 * rng.below(3)),
            1 << rng.between(0, 6)
        );
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if rng.one_in(2) {
            create.extend(["-b", &base, "-F", "raw"]);
        }
        create.extend([image.as_str(), "1M"]);
        tools::qemu_img(&create);
        let rules: Vec<Value> = (0..rng.between(1, 4))
            .map(|_| {
                let (event, once) = (rng.pick(&METADATA), rng.one_in(2));
                json!({ "event": event, "errno": 5, "once": once, "state": 2 })
            })
            .collect();
        // Some requests later, and over again some later.
        let starts = *rng.pick(&["cluster_alloc", "l2_update", "flush_to_os", "write_aio"]);
        let ends = *rng.pick(&METADATA);
        let file = json!({ "driver": "file", "filename": image, "discard": "unmap" });
        let debug = json!({
            "driver": "blkdebug", "image": file, "discard": "unmap", "inject-error": rules,
            "set-state": [
                { "event": starts, "state": 1, "new_state": 2 },
                { "event": ends, "state": 2, "new_state": rng.between(1, 4) },
            ],
        });
        let top = json!({ "driver": "qcow2", "file": debug, "discard": "unmap" });
        let story = format!("round {round}, {options}\n{top:#}");
        let mut s = Served::start(false, &scratch, top);
        // What each sector must hold, if that is known.
        let mut model = vec![None; (SIZE / 512) as usize];
        for _ in 0..120 {
            let ask = Ask::random(&mut rng, 512);
            if let Ask::Read(at, len) = ask {
                let Ok(data) = s.client().read(at, len) else { continue };
                for (i, sector) in data.chunks(512).enumerate() {
                    let known: Option<u8> = model[at as usize / 512 + i];
                    let right = known.is_none_or(|b| sector.iter().all(|x| *x == b));
                    assert!(right, "{story}\nsector {} at {at}", at as usize / 512 + i);
                }
                continue;
            }
            let ok = ask.run(s.client()) == 0;
            failed += usize::from(!ok);
            let (at, len, now) = match &ask {
                Ask::Write(at, data) => (*at, data.len() as u64, ok.then_some(data[0])),
                Ask::Zero(at, len) => (*at, u64::from(*len), ok.then_some(0)),
                Ask::Trim(at, len) => (*at, u64::from(*len), None),
                Ask::Read(..) | Ask::Flush => continue,
            };
            model[(at / 512) as usize..((at + len) / 512) as usize].fill(now);
        }
        let durable = Ask::Flush.run(s.client()) == 0;
        s.end();
        let check = tools::try_run("qemu-img", &["check", "-f", "qcow2", &image]);
        let text = String::from_utf8_lossy(&check.stdout).into_owned();
        // 3: only leaks.
        assert!(matches!(check.status.code(), Some(0 | 3)), "{story}\n{text}");
        if durable {
            flushed += 1;
            let out = scratch.arg("out.raw");
            tools::qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &image, &out]);
            let data = std::fs::read(out).unwrap();
            for (i, (sector, known)) in data.chunks(512).zip(&model).enumerate() {
                let right = known.is_none_or(|b| sector.iter().all(|x| *x == b));
                assert!(right, "{story}\nafter a flush: sector {i}");
            }
        }
    }
    assert!(failed > 0 && flushed > 0, "something was injected, and not always");
}

/// Entries of a log of writes but for flushes: flags, first sector, number of sectors, data.
fn entries(log: &[u8]) -> Vec<(u64, u64, u64, Vec<u8>)> {
    let word = |at: usize| u64::from_le_bytes(log[at..at + 8].try_into().unwrap());
    let sector = u32::from_le_bytes(log[24..28].try_into().unwrap()) as usize;
    let (mut found, mut at) = (Vec::new(), sector);
    for _ in 0..word(16) {
        let (first, n, flags) = (word(at), word(at + 8), word(at + 16));
        at += sector;
        let len = if flags & 4 == 0 { n as usize * sector } else { 0 };
        if flags & 1 == 0 {
            // A log of the reference may end in a hole.
            let data = (at..at + len).map(|i| log.get(i).copied().unwrap_or(0)).collect();
            found.push((flags, first, n, data));
        }
        at += len;
    }
    found
}

#[test]
fn the_same_is_logged_as_by_the_reference() {
    if !tools::have("qemu-storage-daemon") {
        return;
    }
    let mut rng = Rng::from_env();
    println!("seed {}", rng.seed());
    let scratch = Scratch::new("log-like-reference");
    for unit in [512, 100] {
        let asked: Vec<Ask> = (0..150)
            .map(|_| Ask::random(&mut rng, unit))
            .filter(|a| unit == 512 || !matches!(a, Ask::Trim(..) | Ask::Zero(..)))
            .collect();
        let log = |reference: bool| {
            let disk = scratch.file("disk.raw", &vec![0; SIZE as usize]);
            let log = scratch.file("log.raw", b"");
            let file =
                |name: &str| json!({ "driver": "file", "filename": name, "discard": "unmap" });
            let top = json!({
                "driver": "blklogwrites", "file": file(&disk), "log": file(&log),
                "discard": "unmap",
            });
            let mut s = Served::start(reference, &scratch, top);
            for a in &asked {
                assert_eq!(a.run(s.client()), 0, "{a:?}");
            }
            s.end();
            (entries(&std::fs::read(log).unwrap()), std::fs::read(disk).unwrap())
        };
        let ((theirs, _), (ours, disk)) = (log(true), log(false));
        assert_eq!(theirs.len(), ours.len(), "unit {unit}");
        for (i, (a, b)) in theirs.iter().zip(&ours).enumerate() {
            assert!(a == b, "unit {unit}, entry {i}: reference {:?} ours {:?}", a.0, b.0);
        }
        let mut image = vec![0; SIZE as usize];
        for (flags, first, n, data) in ours {
            let at = (first * 512) as usize;
            match flags {
                0 => image[at..at + data.len()].copy_from_slice(&data),
                _ => image[at..at + (n * 512) as usize].fill(0),
            }
        }
        assert!(image == disk, "unit {unit}: the replay is the image");
    }
}

#[test]
fn an_image_is_compared_with_raw_bytes() {
    if !tools::have("qemu-img") {
        return;
    }
    let mut rng = Rng::from_env();
    let scratch = Scratch::new("verify");
    let (image, raw) = (scratch.arg("t.qcow2"), scratch.file("r.raw", &vec![0; SIZE as usize]));
    tools::qemu_img(&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", &image, "1M"]);
    let file = |name: &str| json!({ "driver": "file", "filename": name });
    let top = json!({
        "driver": "blkverify", "raw": file(&raw),
        "test": { "driver": "qcow2", "file": file(&image) },
    });
    let mut s = Served::start(false, &scratch, top.clone());
    for _ in 0..300 {
        let ask = Ask::random(&mut rng, 512);
        assert_eq!(ask.run(s.client()), 0, "{ask:?}");
    }
    s.end();
    tools::same_content("qcow2", &image, "raw", &raw);
    // Behind its back.
    tools::qemu_io("raw", &raw, &["write -P 0xfe 4096 512"]);
    let mut s = Served::start(false, &scratch, top);
    assert_eq!(Ask::Read(0, 8192).run(s.client()), 5);
    assert_eq!(Ask::Read(8192, 8192).run(s.client()), 0);
    s.end();
}

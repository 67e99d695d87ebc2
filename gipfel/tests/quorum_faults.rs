//! A quorum of three with one failing and one corrupting child: clients get right data, the
//! monitor hears what the reference's hears, the failing child is replaced under a writer, and at
//! the end all three are whole.
#![allow(missing_docs)]

mod common;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use common::PATIENCE;
use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, DiskModel, Rng, Scratch, tools};
use serde_json::{Value, json};

const SIZE: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Where reads of the failing child fail.
const FAILS: u64 = 0x10000;
/// Where the corrupting child has other bytes.
const ROTTEN: u64 = 0x20000;
/// Where both is so.
const BOTH: u64 = 0x30000;
/// Where writes to the failing child fail.
const REFUSES: u64 = 0x40000;
/// The writer's part.
const LIVE: u64 = 0x80000;
/// The monitor tells of the same thing once a second at most.
const QUIET: Duration = Duration::from_millis(1200);

/// A daemon that serves quorum `q` of `c0` (good), `c1` (fails) and `c2` (has other bytes).
struct Site {
    daemon: Daemon,
    scratch: Scratch,
    client: Option<Client>,
    qmp: Qmp,
    model: DiskModel,
}

/// What the monitor heard, without times and texts.
type Told = Vec<(String, Value)>;

fn inject(event: &str, iotype: &str, at: Option<u64>) -> Value {
    let mut rule = json!({ "event": event, "iotype": iotype, "errno": 5 });
    if let Some(at) = at {
        rule["sector"] = json!(at / 512);
    }
    rule
}

impl Site {
    fn start(reference: bool) -> Site {
        let scratch = Scratch::new(if reference { "faults-ref" } else { "faults-our" });
        let mut rng = Rng::new(7);
        let data = rng.bytes(SIZE as usize);
        let mut rotten = data.clone();
        for at in [ROTTEN, BOTH] {
            rotten[at as usize..(at + BLOCK) as usize].fill(0xbd);
        }
        let file = |n: usize, bytes: &[u8]| {
            let filename = scratch.file(&format!("c{n}"), bytes);
            json!({ "driver": "file", "filename": filename })
        };
        let mut nodes = [file(0, &data), json!({ "driver": "blkdebug" }), file(2, &rotten)];
        nodes[1]["image"] = file(1, &data);
        nodes[1]["inject-error"] = json!([
            inject("none", "read", Some(FAILS)),
            inject("none", "read", Some(BOTH)),
            inject("none", "write", Some(REFUSES)),
            inject("none", "flush", None),
        ]);
        for (n, node) in nodes.iter_mut().enumerate() {
            node["node-name"] = json!(format!("c{n}"));
        }
        let quorum = json!({
            "driver": "quorum", "node-name": "q", "vote-threshold": 2, "rewrite-corrupted": true,
            "children": ["c0", "c1", "c2"],
        });
        let nodes: Vec<String> = nodes.into_iter().chain([quorum]).map(|v| v.to_string()).collect();
        let (nbd, monitor) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
        let server = format!("addr.type=unix,addr.path={nbd},max-connections=0");
        let chardev = format!("socket,id=c,path={monitor},server=on,wait=off");
        let mut args: Vec<&str> = nodes.iter().flat_map(|n| ["--blockdev", n]).collect();
        args.extend(["--nbd-server", &server, "--chardev", &chardev, "--monitor", "c"]);
        args.extend(["--export", "nbd,id=e,node-name=q,name=x,writable=on"]);
        let sockets = [PathBuf::from(&nbd), PathBuf::from(&monitor)];
        let daemon = if reference { Daemon::reference(&args) } else { Daemon::gipfel(&args) };
        let daemon = daemon.wait_for(&sockets);
        let qmp = Qmp::connect(&monitor).unwrap();
        let mut site = Site { daemon, scratch, client: None, qmp, model: DiskModel::of(&data) };
        site.client = Some(site.connect());
        site
    }

    fn connect(&self) -> Client {
        let address = Address::Unix(self.scratch.path("nbd.sock"));
        let end = Instant::now() + PATIENCE;
        loop {
            // Where replies are structured the reference disconnects when a read fails, and it
            // lets clients in before it has its exports.
            match Client::connect_simple(&address, "x") {
                Ok(c) => return c,
                Err(e) => assert!(Instant::now() < end, "{e}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Does something as the client, and gives what the monitor heard of it.
    fn told(&mut self, f: impl FnOnce(&mut Client, &mut DiskModel)) -> Told {
        f(self.client.as_mut().unwrap(), &mut self.model);
        // Later than the second in which repetitions are held back.
        std::thread::sleep(QUIET);
        self.qmp.command("query-version", json!({}));
        let mut told: Told = self
            .qmp
            .take_events()
            .into_iter()
            .map(|mut e| {
                let mut data = e["data"].take();
                if let Some(text) = data.get_mut("error") {
                    *text = json!("told");
                }
                (e["event"].as_str().unwrap().to_owned(), data)
            })
            .collect();
        told.sort_by_key(|t| (t.0.clone(), t.1.to_string()));
        told.dedup();
        told
    }

    fn read(&mut self, at: u64) -> Told {
        self.told(|c, model| model.expect(at, &c.read(at, BLOCK as u32).unwrap()))
    }

    /// Takes `c1` out and puts a copy in its place, while a client writes and reads.
    fn replace(&mut self) {
        let stop = AtomicBool::new(false);
        let mut c = self.connect();
        std::thread::scope(|s| {
            let model = &mut self.model;
            let writer = s.spawn(|| {
                let mut rng = Rng::new(8);
                while !stop.load(Ordering::Relaxed) {
                    let at = LIVE + rng.below((SIZE - LIVE) / BLOCK) * BLOCK;
                    let data = rng.bytes(BLOCK as usize);
                    c.write(at, &data, 0).unwrap();
                    model.write(at, &data);
                    model.expect(at, &c.read(at, BLOCK as u32).unwrap());
                }
                c.disconnect().unwrap();
            });
            let mut change = |v: Value| {
                std::thread::sleep(Duration::from_millis(50));
                self.qmp.command("x-blockdev-change", v);
            };
            change(json!({ "parent": "q", "child": "children.1" }));
            // What is written from here on the copy lacks, and gets when it is read.
            let copy = self.scratch.arg("new");
            std::fs::copy(self.scratch.path("c0"), &copy).unwrap();
            let node = json!({ "driver": "file", "node-name": "new", "filename": copy });
            self.qmp.command("blockdev-add", node);
            let mut change = |v: Value| self.qmp.command("x-blockdev-change", v);
            change(json!({ "parent": "q", "node": "new" }));
            std::thread::sleep(Duration::from_millis(100));
            stop.store(true, Ordering::Relaxed);
            writer.join().expect("the writer saw no error and no wrong byte");
        });
        self.qmp.command("blockdev-del", json!({ "node-name": "c1" }));
        self.told(|c, model| {
            let all = c.read(LIVE, (SIZE - LIVE) as u32).unwrap();
            model.expect(LIVE, &all);
        });
    }

    fn end(mut self) {
        self.client.take().unwrap().disconnect().unwrap();
        assert!(self.daemon.terminate().success());
        for n in ["c0", "c2", "new"] {
            self.model.expect(0, &std::fs::read(self.scratch.path(n)).unwrap());
        }
    }
}

fn scenario(reference: bool) -> Vec<(&'static str, Told)> {
    let mut s = Site::start(reference);
    let mut all = vec![("nothing fails", s.read(0))];
    all.push(("one fails", s.read(FAILS)));
    all.push(("one is wrong", s.read(ROTTEN)));
    all.push(("it was mended", s.read(ROTTEN)));
    let both = |c: &mut Client, _: &mut DiskModel| {
        assert_eq!(c.read(BOTH, BLOCK as u32).unwrap_err().errno(), 5);
    };
    all.push(("one fails and one is wrong", s.told(both)));
    let write = |c: &mut Client, model: &mut DiskModel| {
        c.write(REFUSES, &[9; BLOCK as usize], 0).unwrap();
        model.write(REFUSES, &[9; BLOCK as usize]);
    };
    all.push(("one does not take a write", s.told(write)));
    all.push(("and has other bytes since", s.read(REFUSES)));
    all.push(("one does not flush", s.told(|c, _| c.flush().unwrap())));
    s.replace();
    all.push(("one is wrong, none fails", s.read(BOTH)));
    all.push(("a flush", s.told(|c, _| c.flush().unwrap())));
    let whole = |c: &mut Client, model: &mut DiskModel| {
        model.expect(0, &c.read(0, SIZE as u32).unwrap());
    };
    all.push(("all of it", s.told(whole)));
    s.end();
    all
}

#[test]
fn one_child_fails_and_one_corrupts() {
    let (ours, theirs) = std::thread::scope(|s| {
        let reference = tools::have("qemu-storage-daemon").then(|| s.spawn(|| scenario(true)));
        let theirs = |r: ScopedJoinHandle<_>| r.join().expect("the reference runs it through");
        (scenario(false), reference.map(theirs))
    });
    for (step, told) in &ours {
        println!("{step}: {}", json!(told));
    }
    let names = |step: &str| {
        let told = &ours.iter().find(|s| s.0 == step).unwrap().1;
        told.iter()
            .map(|(event, data)| (event.clone(), data["node-name"].clone(), data["type"].clone()))
            .collect::<Vec<_>>()
    };
    let bad = |node: &str, kind: &str| ("QUORUM_REPORT_BAD".to_owned(), json!(node), json!(kind));
    assert_eq!(names("one fails"), [bad("c1", "read")]);
    assert_eq!(names("one is wrong"), [bad("c2", "read")]);
    let failure = ("QUORUM_FAILURE".to_owned(), Value::Null, Value::Null);
    assert_eq!(names("one fails and one is wrong")[0], failure);
    assert_eq!(names("one does not take a write"), [bad("c1", "write")]);
    assert_eq!(names("one does not flush"), [bad("c1", "flush")]);
    assert_eq!(names("one is wrong, none fails"), [bad("c2", "read")]);
    for quiet in ["nothing fails", "it was mended", "a flush", "all of it"] {
        assert_eq!(names(quiet), [], "{quiet}");
    }
    let Some(theirs) = theirs else { return };
    for ((step, ours), (_, theirs)) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "{step}: what the monitor hears, here and there");
    }
}

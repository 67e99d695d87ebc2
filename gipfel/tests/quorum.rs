//! A quorum end to end: a copy rots behind its back and is told of and healed, one goes and one
//! comes while clients write, and a slow copy holds no change up.
#![allow(missing_docs)]

mod common;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::PATIENCE;
use gipfel_testkit::nbd::{Address, Client, Command};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Rng, Scratch, tools};
use serde_json::{Value, json};

const SIZE: u64 = 4 << 20;
const BLOCK: u64 = 4096;
const WRITERS: u64 = 3;

struct Quorum {
    daemon: Daemon,
    scratch: Scratch,
}

impl Quorum {
    /// Serves `q`, a quorum of the nodes that `more` makes.
    fn serve(scratch: Scratch, more: &[&str]) -> Quorum {
        let (nbd, qmp) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
        let server = format!("addr.type=unix,addr.path={nbd},max-connections=0");
        let chardev = format!("socket,id=c,path={qmp},server=on,wait=off");
        let mut args = vec!["--io-threads", "2"];
        args.extend(more);
        args.extend(["--nbd-server", &server]);
        args.extend(["--export", "nbd,id=e,node-name=q,name=x,writable=on"]);
        args.extend(["--chardev", &chardev, "--monitor", "c"]);
        let sockets: [PathBuf; 2] = [nbd.clone().into(), qmp.clone().into()];
        Quorum { daemon: Daemon::gipfel(&args).wait_for(&sockets), scratch }
    }

    fn client(&self) -> Client {
        Client::connect(&Address::Unix(self.scratch.path("nbd.sock")), "x").unwrap()
    }

    fn qmp(&self) -> Qmp {
        Qmp::connect(self.scratch.path("qmp.sock")).unwrap()
    }

    /// A client that writes blocks of its own share and reads them back, until `ended`. It gives
    /// what it wrote last to each block.
    fn writer(&self, share: u64, ended: &Arc<AtomicBool>) -> JoinHandle<Vec<u8>> {
        let (mut c, ended) = (self.client(), ended.clone());
        let blocks = SIZE / BLOCK / WRITERS;
        std::thread::spawn(move || {
            let mut rng = Rng::new(share);
            let mut last = vec![0; blocks as usize];
            while !ended.load(Ordering::SeqCst) {
                let block = rng.below(blocks);
                let at = (share * blocks + block) * BLOCK;
                let seen = c.read(at, BLOCK as u32).unwrap();
                assert_eq!(seen, [last[block as usize]; BLOCK as usize], "block at {at:#x}");
                let byte = rng.below(256) as u8;
                c.write(at, &[byte; BLOCK as usize], 0).unwrap();
                last[block as usize] = byte;
            }
            last
        })
    }
}

fn changed(q: &mut Qmp, change: Value) {
    let mut arguments = json!({ "parent": "q" });
    arguments.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    assert_eq!(q.command("x-blockdev-change", arguments), json!({}));
}

/// Puts garbage over a stretch of a file.
fn rot(path: &str, at: u64, len: usize) {
    let f = OpenOptions::new().write(true).open(path).unwrap();
    f.write_all_at(&vec![0xbd; len], at).unwrap();
}

#[test]
fn a_copy_rots_one_goes_one_comes_under_writers() {
    let scratch = Scratch::new("quorum-live");
    let mut nodes = Vec::new();
    for n in 0..3 {
        File::create(scratch.path(&format!("c{n}"))).unwrap().set_len(SIZE).unwrap();
        let file = scratch.arg(&format!("c{n}"));
        nodes.push(format!("file,node-name=c{n},filename={file}"));
    }
    let quorum = "quorum,node-name=q,vote-threshold=2,rewrite-corrupted=on,\
                  children.0=c0,children.1=c1,children.2=c2";
    let mut args: Vec<&str> = nodes.iter().flat_map(|n| ["--blockdev", n.as_str()]).collect();
    args.extend(["--blockdev", quorum]);
    let d = Quorum::serve(scratch, &args);
    let mut q = d.qmp();
    let ended = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS).map(|w| d.writer(w, &ended)).collect();

    rot(&d.scratch.arg("c1"), 1 << 20, 1 << 20);
    let bad = q.wait_event("QUORUM_REPORT_BAD", PATIENCE).expect("the rot is noticed");
    assert_eq!((&bad["data"]["node-name"], &bad["data"]["type"]), (&json!("c1"), &json!("read")));
    assert_eq!(bad["data"]["sectors-count"], json!(8));
    assert!(bad["data"]["sector-num"].as_u64().unwrap() >= 2048, "{bad}");
    assert!(bad["data"].get("error").is_none());

    // The bad copy goes, and what it holds from then on is nobody's affair.
    rot(&d.scratch.arg("c1"), 0, 64 << 10);
    changed(&mut q, json!({ "child": "children.1" }));
    let left = std::fs::read(d.scratch.path("c1")).unwrap();
    q.command("blockdev-del", json!({ "node-name": "c1" }));
    let e = q.refused("x-blockdev-change", json!({ "parent": "q", "child": "children.0" }));
    assert!(e.desc.contains("vote-threshold is 2"), "{}", e.desc);

    // An empty copy of another format comes. Reading it all makes it whole.
    let image = d.scratch.arg("new.qcow2");
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &image, &SIZE.to_string()]);
    let file = json!({ "driver": "file", "filename": image });
    q.command("blockdev-add", json!({ "driver": "qcow2", "node-name": "new", "file": file }));
    changed(&mut q, json!({ "node": "new" }));
    let graph = q.command("x-debug-query-block-graph", json!({})).to_string();
    assert!(graph.contains("children.3") && !graph.contains("children.1"), "{graph}");
    std::thread::sleep(Duration::from_millis(200));
    ended.store(true, Ordering::SeqCst);
    let mut wanted: Vec<u8> = writers
        .into_iter()
        .flat_map(|w| w.join().expect("a writer saw nothing wrong"))
        .flat_map(|byte| [byte; BLOCK as usize])
        .collect();
    wanted.resize(SIZE as usize, 0);
    let mut c = d.client();
    assert!(c.read(0, SIZE as u32).unwrap() == wanted);
    q.take_events();
    std::thread::sleep(Duration::from_millis(2500));
    q.command("query-block", json!({}));
    q.take_events();
    assert!(c.read(0, SIZE as u32).unwrap() == wanted);
    q.command("query-block", json!({}));
    assert!(q.take_events().is_empty(), "all copies are whole again");
    let Quorum { mut daemon, scratch } = d;
    assert!(daemon.terminate().success());
    for n in ["c0", "c2"] {
        assert!(std::fs::read(scratch.path(n)).unwrap() == wanted, "{n} is not whole");
    }
    tools::same_content("raw", &scratch.arg("c0"), "qcow2", &image);
    tools::qcow2_is_clean(&image);
    assert!(std::fs::read(scratch.path("c1")).unwrap() == left, "c1 was written after it had gone");
}

#[test]
fn a_slow_copy_holds_no_change_up() {
    let scratch = Scratch::new("quorum-slow");
    let d = Quorum::serve(
        scratch,
        &[
            "--object",
            "throttle-group,id=tg,limits.iops-write=1",
            "--blockdev",
            "null-co,node-name=n,size=1M",
            "--blockdev",
            "throttle,node-name=slow,throttle-group=tg,file=n",
            "--blockdev",
            "quorum,node-name=q,vote-threshold=1,children.0.driver=null-co,children.0.size=1M,\
             children.1=slow",
        ],
    );
    let (mut c, mut q) = (d.client(), d.qmp());
    let waiting: Vec<_> = (0..30u64)
        .map(|n| {
            let offset = n * BLOCK;
            let payload = &[1; BLOCK as usize];
            let length = BLOCK as u32;
            c.submit(&Command { kind: 1, flags: 0, offset, length, payload }).unwrap()
        })
        .collect();
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    changed(&mut q, json!({ "child": "children.1" }));
    for cookie in waiting {
        c.wait(cookie).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(10), "30 s is what the throttle would take");
    let Quorum { mut daemon, .. } = d;
    assert!(daemon.terminate().success());
}

//! The demonstration: a daemon serves a disk over NBD, clients write and read it at full speed,
//! and meanwhile snapshots are taken and a filter comes and goes.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use gipfel_base::units::{KIB, MIB, human_size};
use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_testkit::Scratch;
use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::qmp::Qmp;
use serde_json::{Value, json};

use crate::graph;

const DISK: u64 = 64 * MIB;
const BLOCK: u64 = 4 * KIB;
const CLIENTS: u64 = 4;
const ROUNDS: usize = 8;
const PAUSE: Duration = Duration::from_millis(150);

/// A daemon of our own, ended with its owner.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What one client did and felt.
#[derive(Default)]
struct Felt {
    written: u64,
    read: u64,
    requests: u64,
    worst: Duration,
    latencies: Vec<u32>,
}

/// Runs the demonstration and prints what happens.
pub fn run() -> Result<()> {
    let scratch = Scratch::new("demo");
    let path = |name: &str| scratch.arg(name);
    let exe = std::env::current_exe().at(|| "finding this program")?;
    let child = Command::new(exe)
        .args(["storage-daemon", "--object", "throttle-group,id=limits,limits.iops-total=1000000"])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", path("nbd.sock"))])
        .args([
            "--chardev",
            &format!("socket,id=qmp,path={},server=on,wait=off", path("qmp.sock")),
            "--monitor",
            "qmp",
        ])
        .stdin(Stdio::null())
        .spawn()
        .at(|| "starting the daemon")?;
    let mut daemon = Daemon(child);
    let mut qmp = connect(&scratch.path("qmp.sock"), &mut daemon)?;
    make_disk(&mut qmp, &path("disk.qcow2"))?;

    println!("A qcow2 disk of {} is served over NBD to {CLIENTS} clients.", human_size(DISK));
    println!("They write and read {} blocks at full speed and check", human_size(BLOCK));
    println!("every byte, while snapshots are taken and a filter comes and goes.\n");
    println!("Before:\n\n{}", indent(&graph(&mut qmp)?));
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let (address, stop) = (Address::Unix(scratch.path("nbd.sock")), stop.clone());
            std::thread::spawn(move || client(&address, n, &stop))
        })
        .collect();
    let changed = changes(&mut qmp, &scratch);
    stop.store(true, Ordering::Relaxed);
    let mut total = Felt::default();
    for c in clients {
        let felt = c.join().map_err(|_| Error::corrupt("a client's thread panicked"))??;
        total.written += felt.written;
        total.read += felt.read;
        total.requests += felt.requests;
        total.worst = total.worst.max(felt.worst);
        total.latencies.extend(felt.latencies);
    }
    let commands = changed?;
    println!("After {ROUNDS} snapshots and {ROUNDS} comings and goings of a filter:\n");
    println!("{}", indent(&graph(&mut qmp)?));
    call(&mut qmp, "quit", json!({}))?;
    total.latencies.sort_unstable();
    let at = |share: usize| total.latencies[(total.latencies.len() - 1) * share / 1000];
    println!("changes of the graph   {commands}");
    println!("requests               {}", total.requests);
    println!("written, read back     {}, {}", human_size(total.written), human_size(total.read));
    println!("a request took         {} us (median), {} us (99.9 %)", at(500), at(999));
    println!("worst pause felt       {:.1} ms", total.worst.as_secs_f64() * 1e3);
    println!("\nnothing lost");
    Ok(())
}

fn connect(socket: &Path, daemon: &mut Daemon) -> Result<Qmp> {
    let start = Instant::now();
    loop {
        match Qmp::connect(socket) {
            Ok(q) => return Ok(q),
            Err(e) if start.elapsed() > Duration::from_secs(10) => return Err(e),
            Err(_) => {}
        }
        if let Some(status) = daemon.0.try_wait()? {
            let text = format!("the daemon ended before it was ready: {status}");
            return Err(Error::new(ErrorKind::Disconnected, text));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn call(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<Value> {
    qmp.try_command(command, arguments)?
        .map_err(|e| Error::invalid(format!("{command}: {}", e.desc)))
}

fn graph(qmp: &mut Qmp) -> Result<String> {
    Ok(graph::draw(&graph::Picture::read(&call(qmp, "query-graph", json!({}))?)?))
}

fn indent(text: &str) -> String {
    text.lines().map(|l| format!("    {l}\n")).collect()
}

/// Makes the image through jobs of the daemon itself, and serves it.
fn make_disk(qmp: &mut Qmp, file: &str) -> Result<()> {
    let create = |qmp: &mut Qmp, options: Value| -> Result<()> {
        call(qmp, "blockdev-create", json!({ "job-id": "make", "options": options }))?;
        loop {
            let jobs = call(qmp, "query-jobs", json!({}))?;
            if jobs[0]["status"] == "concluded" {
                if let Some(e) = jobs[0]["error"].as_str() {
                    return Err(Error::invalid(e));
                }
                return call(qmp, "job-dismiss", json!({ "id": "make" })).map(drop);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    create(qmp, json!({ "driver": "file", "filename": file, "size": 0 }))?;
    let node = json!({ "driver": "file", "node-name": "file0", "filename": file });
    call(qmp, "blockdev-add", node)?;
    create(qmp, json!({ "driver": "qcow2", "file": "file0", "size": DISK }))?;
    let node = json!({ "driver": "qcow2", "node-name": "disk0", "file": "file0" });
    call(qmp, "blockdev-add", node)?;
    let export = json!({
        "type": "nbd", "id": "vm", "node-name": "disk0", "name": "disk", "writable": true
    });
    call(qmp, "block-export-add", export).map(drop)
}

/// Snapshots, and a throttle filter put in and taken out. Gives the number of commands.
fn changes(qmp: &mut Qmp, scratch: &Scratch) -> Result<usize> {
    let mut commands = 0;
    for i in 1..=ROUNDS {
        std::thread::sleep(PAUSE);
        let (below, over) = (format!("disk{}", i - 1), format!("disk{i}"));
        let snapshot = json!({
            "node-name": below,
            "snapshot-file": scratch.arg(&format!("{over}.qcow2")),
            "snapshot-node-name": over,
        });
        call(qmp, "blockdev-snapshot-sync", snapshot)?;
        let filter = json!({
            "driver": "throttle", "node-name": "filter", "throttle-group": "limits", "file": over
        });
        call(qmp, "blockdev-add", filter)?;
        call(qmp, "blockdev-replace", json!({ "node": over, "with": "filter" }))?;
        std::thread::sleep(PAUSE / 2);
        call(qmp, "blockdev-replace", json!({ "node": "filter", "with": over }))?;
        call(qmp, "blockdev-del", json!({ "node-name": "filter" }))?;
        commands += 5;
    }
    Ok(commands)
}

/// Writes and reads its own part of the disk until it is told to stop; then checks all of it.
fn client(address: &Address, number: u64, stop: &AtomicBool) -> Result<Felt> {
    let mut c = Client::connect(address, "disk")?;
    let blocks = DISK / CLIENTS / BLOCK;
    let first = number * blocks;
    let mut versions = vec![0u64; blocks as usize];
    let mut felt = Felt::default();
    let mut step = number;
    let timed = |felt: &mut Felt, f: &mut dyn FnMut() -> Result<()>| {
        let start = Instant::now();
        f()?;
        let took = start.elapsed();
        felt.requests += 1;
        felt.worst = felt.worst.max(took);
        felt.latencies.push(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
        Ok::<(), Error>(())
    };
    while !stop.load(Ordering::Relaxed) {
        // Steps that visit all blocks in an order that looks random.
        step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let block = (step >> 33) % blocks;
        let offset = (first + block) * BLOCK;
        let version = &mut versions[block as usize];
        if step >> 63 == 0 {
            let data = content(first + block, *version + 1);
            timed(&mut felt, &mut || c.write(offset, &data, 0))?;
            *version += 1;
            felt.written += BLOCK;
        } else {
            let mut got = Vec::new();
            timed(&mut felt, &mut || {
                got = c.read(offset, BLOCK as u32)?;
                Ok(())
            })?;
            felt.read += BLOCK;
            check(&got, first + block, *version)?;
        }
    }
    for (block, version) in versions.iter().enumerate() {
        let block = first + block as u64;
        check(&c.read(block * BLOCK, BLOCK as u32)?, block, *version)?;
        felt.read += BLOCK;
    }
    Ok(felt)
}

/// What a block holds after its `version`th write.
fn content(block: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK as usize];
    }
    let word = (block << 32 | version).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK as usize).collect()
}

fn check(got: &[u8], block: u64, version: u64) -> Result<()> {
    if got == content(block, version) {
        return Ok(());
    }
    Err(Error::corrupt(format!("block {block} does not hold what write {version} left there")))
}

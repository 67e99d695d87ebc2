//! Random mutators in a row, under four NBD clients at full speed on two backends and one that
//! reads a medium that comes and goes: no lost, wrong or failed request, and clean images. How
//! long requests wait for mutators is compared with as many stretches of the same run, as long as
//! the mutators', in which nothing is done.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::load::{Host, Load, Loaded, Sample, quantile};
use common::soak;
use gipfel_testkit::nbd::Client;
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{DiskModel, Rng, Scratch, tools};
use serde_json::{Value, json};

const SIZE: u64 = 16 << 20;
/// In flight of each client.
const DEPTH: u64 = 4;

/// A node of a disk's chain.
struct Layer {
    name: String,
    filter: bool,
}

/// A disk that is written all the time, with what stands on what, the lowest first.
struct Disk {
    letter: char,
    /// How `block_set_io_throttle` names its backend.
    client: Value,
    layers: Vec<Layer>,
    snapshots: usize,
    throttled: bool,
    filters: usize,
    /// How the quorum calls its third child, if it is in.
    third: Option<String>,
}

impl Disk {
    /// The second one stands on a quorum, of its image, a copy, and a third child that comes and
    /// goes.
    fn new(letter: char, client: Value) -> Disk {
        let name = if letter == 'b' { "q".to_owned() } else { format!("{letter}0") };
        let layers = vec![Layer { name, filter: false }];
        let third = None;
        Disk { letter, client, layers, snapshots: 0, throttled: false, filters: 0, third }
    }

    fn chain(&self) -> String {
        let names: Vec<_> = self.layers.iter().rev().map(|l| l.name.as_str()).collect();
        names.join(" > ")
    }

    fn top_format(&self) -> usize {
        self.layers.iter().rposition(|l| !l.filter).unwrap()
    }

    fn file(&self, scratch: &Scratch, n: usize) -> String {
        scratch.arg(&format!("{}{n}.qcow2", self.letter))
    }

    /// The edge that leads to layer `i` as users name it, if only one name fits.
    fn edge_to(&self, i: usize) -> Option<String> {
        match self.layers.get(i + 1) {
            Some(l) => Some(format!("{}.{}", l.name, if l.filter { "file" } else { "backing" })),
            // Only the first disk's backend has a name that we gave.
            None => (self.letter == 'a').then(|| "vm0.root".to_owned()),
        }
    }

    /// What blockdev-replace takes to send the parent of layer `i` to `with`.
    fn replace(&self, i: usize, with: &str, rng: &mut Rng) -> Value {
        match self.edge_to(i) {
            // A backing edge moves only when it is named.
            Some(edge) if i < self.top_format() || rng.one_in(2) => {
                json!({ "edge": edge, "with": with })
            }
            _ => json!({ "node": self.layers[i].name, "with": with }),
        }
    }

    fn snapshot(&mut self, q: &mut Qmp, scratch: &Scratch, rng: &mut Rng) -> &'static str {
        let top = self.layers.len() - 1;
        let at = if rng.one_in(4) { top } else { self.top_format() };
        let below = self.layers[at].name.clone();
        self.snapshots += 1;
        let (name, file) =
            (format!("{}{}", self.letter, self.snapshots), self.file(scratch, self.snapshots));
        let what = if self.snapshots % 2 == 1 {
            let node = json!({
                "driver": "qcow2", "node-name": name, "backing": null,
                "file": { "driver": "file", "filename": file },
            });
            q.command("blockdev-add", node);
            q.command("blockdev-snapshot", json!({ "node": below, "overlay": name }));
            "snapshot"
        } else {
            let s = json!({
                "node-name": below, "snapshot-file": file, "snapshot-node-name": name,
            });
            q.command("blockdev-snapshot-sync", s);
            "snapshot-sync"
        };
        self.layers.insert(at + 1, Layer { name, filter: false });
        what
    }

    fn filter_in(&mut self, q: &mut Qmp, rng: &mut Rng) -> &'static str {
        let at = rng.below(self.layers.len() as u64) as usize;
        // Below the topmost format nothing is written, so nothing is kept there either.
        let kind =
            if at >= self.top_format() && rng.one_in(2) { "copy-on-read" } else { "throttle" };
        self.filters += 1;
        let name = format!("{kind}-{}{}", self.letter, self.filters);
        let mut node = json!({
            "driver": kind, "node-name": name, "file": self.layers[at].name,
        });
        if kind == "throttle" {
            node["throttle-group"] = json!("tg");
        }
        q.command("blockdev-add", node);
        let command = self.replace(at, &name, rng);
        q.command("blockdev-replace", command);
        self.layers.insert(at + 1, Layer { name, filter: true });
        "filter in"
    }

    fn filter_out(&mut self, q: &mut Qmp, rng: &mut Rng) -> &'static str {
        let filters: Vec<usize> =
            (0..self.layers.len()).filter(|i| self.layers[*i].filter).collect();
        let at = *rng.pick(&filters);
        let command = self.replace(at, &self.layers[at - 1].name, rng);
        q.command("blockdev-replace", command);
        let gone = self.layers.remove(at);
        q.command("blockdev-del", json!({ "node-name": gone.name }));
        "filter out"
    }

    fn reopen(&mut self, q: &mut Qmp, scratch: &Scratch, rng: &mut Rng) -> &'static str {
        let at = self.top_format();
        let file = self.file(scratch, self.snapshots);
        // Under the quorum, where that is the topmost one.
        let name = if at == 0 { format!("{}0", self.letter) } else { self.layers[at].name.clone() };
        let mut node = json!({
            "driver": "qcow2", "node-name": name,
            "file": { "driver": "file", "filename": file },
            "discard": *rng.pick(&["unmap", "ignore"]),
        });
        if at > 0 {
            node["backing"] = json!(self.layers[at - 1].name);
        }
        // Zeros are unmapped only where discards are.
        let zeroes: &[&str] =
            if node["discard"] == "unmap" { &["off", "on", "unmap"] } else { &["off", "on"] };
        node["detect-zeroes"] = json!(*rng.pick(zeroes));
        q.command("blockdev-reopen", json!({ "options": [node] }));
        "reopen"
    }

    /// Lets the quorum's third child come or go. What it missed it gets as it is read.
    fn child(&mut self, q: &mut Qmp) -> &'static str {
        match self.third.take() {
            Some(child) => {
                q.command("x-blockdev-change", json!({ "parent": "q", "child": child }));
                "quorum del"
            }
            None => {
                q.command("x-blockdev-change", json!({ "parent": "q", "node": "b-third" }));
                // As in the reference a number is given again if it was the last one.
                self.third = Some("children.2".to_owned());
                "quorum add"
            }
        }
    }

    fn throttle(&mut self, q: &mut Qmp) -> &'static str {
        self.throttled = !self.throttled;
        let mut limits = self.client.clone();
        for limit in ["bps", "bps_rd", "bps_wr", "iops_rd", "iops_wr"] {
            limits[limit] = json!(0);
        }
        limits["iops"] = json!(if self.throttled { 10_000_000 } else { 0 });
        q.command("block_set_io_throttle", limits);
        if self.throttled { "throttle on" } else { "throttle off" }
    }
}

/// What was done, told where the test fails.
struct History(Vec<String>);

impl Drop for History {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.iter().for_each(|step| println!("{step}"));
        }
    }
}

/// While its medium is being changed.
const CHANGING: u64 = 0xff;

/// The third backend, with a client that reads what medium there is. Each medium is full of its
/// own number; 0 stands for none.
struct Removable {
    /// What is in, with the number of the change that put it there: what was the same before and
    /// after a read held during that read.
    state: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    reader: JoinHandle<(u64, u64)>,
    medium: u64,
    open: bool,
}

impl Removable {
    fn start(mut c: Client, medium: u64) -> Removable {
        let state = Arc::new(AtomicU64::new(medium));
        let stop = Arc::new(AtomicBool::new(false));
        let (seen, end) = (state.clone(), stop.clone());
        let reader = std::thread::spawn(move || {
            let (mut good, mut none) = (0, 0);
            while !end.load(Ordering::SeqCst) {
                let before = seen.load(Ordering::SeqCst);
                let data = c.read((good + none) % 16 * 4096, 4096);
                let same = seen.load(Ordering::SeqCst) == before;
                let medium = before & 0xff;
                match data {
                    Ok(data) => {
                        good += 1;
                        assert!((1..=3).contains(&data[0]) && data.iter().all(|b| *b == data[0]));
                        let right = medium == CHANGING || medium == u64::from(data[0]);
                        assert!(!same || right, "read {} from medium {medium}", data[0]);
                    }
                    Err(e) => {
                        none += 1;
                        let may = medium == CHANGING || medium == 0;
                        assert!(!same || may, "medium {medium} is in: {e}");
                    }
                }
            }
            (good, none)
        });
        Removable { state, stop, reader, medium, open: false }
    }

    fn mutate(&mut self, q: &mut Qmp, scratch: &Scratch, rng: &mut Rng) -> &'static str {
        let change = (self.state.load(Ordering::SeqCst) >> 8) + 1;
        self.state.store(change << 8 | CHANGING, Ordering::SeqCst);
        let device = json!({ "device": "cd" });
        let what = match rng.below(4) {
            0 if self.medium > 0 => {
                q.command("eject", device);
                (self.medium, self.open) = (0, true);
                "eject"
            }
            1 if self.open && self.medium == 0 => {
                q.command("blockdev-insert-medium", json!({ "device": "cd", "node-name": "m3" }));
                q.command("blockdev-close-tray", device);
                (self.medium, self.open) = (3, false);
                "insert-medium"
            }
            2 if !self.open => {
                q.command("blockdev-open-tray", device.clone());
                q.command("blockdev-close-tray", device);
                "open and close tray"
            }
            _ => {
                self.medium = rng.between(1, 2);
                let filename = scratch.arg(&format!("m{}.raw", self.medium));
                let command = json!({ "device": "cd", "filename": filename, "format": "raw" });
                q.command("blockdev-change-medium", command);
                self.open = false;
                "change-medium"
            }
        };
        self.state.store(change << 8 | self.medium, Ordering::SeqCst);
        what
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        let (good, none) = self.reader.join().expect("the reader saw only what is allowed");
        println!("medium: {good} reads, {none} told that there is none");
        assert!(good > 0 && none > 0);
    }
}

/// A mutator, for the figures.
struct Window {
    from: Instant,
    to: Instant,
    /// The disk that it changed.
    disk: Option<usize>,
    what: &'static str,
}

/// Nothing was done for as long as the mutator before took, which changed the same disk.
const NOTHING: &str = "nothing";

/// The windows that overlap a request; they are in order and do not overlap each other.
fn overlapping<'a>(windows: &'a [Window], s: &Sample) -> impl Iterator<Item = (usize, &'a Window)> {
    let end = s.at + s.took;
    let first = windows.partition_point(|w| w.to < s.at);
    windows.iter().enumerate().skip(first).take_while(move |(_, w)| w.from <= end)
}

/// How long requests took.
#[derive(Default)]
struct Figures {
    /// Those that overlap no mutator.
    own: Vec<Duration>,
    /// For each window the longest that overlaps it: of the disk changed, and of the other one.
    pauses: Vec<[Option<Duration>; 2]>,
}

/// Flushes are left out: they wait for the storage.
fn figures(windows: &[Window], loads: &[Loaded]) -> Figures {
    let mut f = Figures { pauses: vec![[None; 2]; windows.len()], ..Figures::default() };
    for (n, load) in loads.iter().enumerate() {
        for s in load.samples.iter().filter(|s| !s.flush) {
            let mut own = true;
            for (i, w) in overlapping(windows, s) {
                own &= w.what == NOTHING;
                let other = usize::from(w.disk != Some(n / 2));
                f.pauses[i][other] = f.pauses[i][other].max(Some(s.took));
            }
            if own {
                f.own.push(s.took);
            }
        }
    }
    f
}

fn told(what: &str, all: &mut [Duration]) {
    let [half, most, max] = [0.5, 0.9, 1.0].map(|p| quantile(all, p));
    println!("{what:34} {:5} {half:>12.2?} {most:>12.2?} {max:>12.2?}", all.len());
}

/// The longest request of each mutator, of each stretch without, and the load's own 99.9 %.
fn compare(windows: &[Window], loads: &[Loaded]) {
    let mut f = figures(windows, loads);
    let [half, most, rare, max] = [0.5, 0.99, 0.999, 1.0].map(|p| quantile(&mut f.own, p));
    let n = f.own.len();
    println!(
        "apart from mutators: {n} requests, 50% {half:.2?}, 99% {most:.2?}, 99.9% {rare:.2?}, \
         worst {max:.2?}"
    );
    let longest = |which: fn(&Window) -> bool, disk: usize| -> Vec<Duration> {
        let all = windows.iter().zip(&f.pauses).filter(|(w, _)| w.disk.is_some() && which(w));
        all.filter_map(|(_, p)| p[disk]).collect()
    };
    println!("the longest request of each, and below the commands: number, half, 90%, worst");
    let mutator = |w: &Window| w.what != NOTHING;
    let nothing = |w: &Window| w.what == NOTHING;
    let [mut here, mut idle] = [longest(mutator, 0), longest(nothing, 0)];
    let [mut there, mut still] = [longest(mutator, 1), longest(nothing, 1)];
    told("mutator, its disk", &mut here);
    told("nothing done, that disk", &mut idle);
    told("mutator, the other disk", &mut there);
    told("nothing done, the other disk", &mut still);
    let mut names: Vec<_> = windows.iter().filter(|w| mutator(w)).map(|w| w.what).collect();
    names.sort_unstable();
    for of in names.chunk_by(|a, b| a == b) {
        let mine = || windows.iter().zip(&f.pauses).filter(|(w, _)| w.what == of[0]);
        let mut longest: Vec<_> = mine().filter_map(|(_, p)| p[0]).collect();
        told(of[0], &mut mine().map(|(w, _)| w.to - w.from).collect::<Vec<_>>());
        if !longest.is_empty() {
            told("  longest request of its disk", &mut longest);
        }
    }
    judge([here, idle, there, still], rare);
}

/// What is asked: a mutator makes no request wait longer than the load's own 99.9 %, `rare`, and
/// the other disk notices nothing. With much room in a short run: it has few windows, and the
/// machine may be busy with other things.
fn judge([mut here, mut idle, mut there, mut still]: [Vec<Duration>; 4], rare: Duration) {
    let worst = quantile(&mut here, 1.0);
    assert!(worst < Duration::from_secs(2), "a request waited {worst:?} for a mutator");
    let pause = quantile(&mut here, 0.5);
    assert!(pause <= soak(rare * 5, rare), "{pause:?}; 99.9 % of the requests take {rare:?}");
    let (times, room) = soak((5.0, Duration::from_millis(10)), (1.5, Duration::from_millis(1)));
    for part in [0.5, 0.9] {
        for (what, with, without) in
            [("its disk", &mut here, &mut idle), ("the other disk", &mut there, &mut still)]
        {
            let (with, without) = (quantile(with, part), quantile(without, part));
            let most = without.mul_f64(times) + room;
            assert!(with <= most, "{part} of the mutators: {what}: {with:?}, without {without:?}");
        }
    }
}

/// The images that the test begins from, and the overlays that blockdev-add opens.
fn images(scratch: &Scratch, snapshots: usize) {
    for d in ['a', 'b'] {
        let name = |n: usize| scratch.arg(&format!("{d}{n}.qcow2"));
        tools::qemu_img(&["create", "-q", "-f", "qcow2", &name(0), "16M"]);
        for n in (1..=snapshots).step_by(2) {
            let mut args = vec!["create", "-q", "-f", "qcow2", "-u", "-F", "qcow2", "-b"];
            let (below, own) = (name(n - 1), name(n));
            args.extend([below.as_str(), own.as_str(), "16M"]);
            tools::qemu_img(&args);
        }
    }
    for n in 1..=3 {
        scratch.file(&format!("m{n}.raw"), &[n; 16 * 4096]);
    }
    // The copies that the second disk has of its image.
    for copy in ["b-copy.raw", "b-third.raw"] {
        std::fs::File::create(scratch.path(copy)).unwrap().set_len(SIZE).unwrap();
    }
}

/// The first disk below a backend that was made before its client, the second below one that is
/// made along, and the third backend with medium 3.
fn start(scratch: Scratch) -> Host {
    let node = |name: &str, format: &str| {
        let file = scratch.arg(&format!("{name}.{format}"));
        format!("{format},node-name={name},file.driver=file,file.filename={file}")
    };
    let quorum = "quorum,node-name=q,vote-threshold=2,rewrite-corrupted=on,\
                  children.0=b0,children.1=b-copy"
        .to_owned();
    let nodes = [
        node("a0", "qcow2"),
        node("b0", "qcow2"),
        node("b-copy", "raw"),
        node("b-third", "raw"),
        quorum,
        node("m3", "raw"),
    ];
    let mut args = vec!["--object", "throttle-group,id=tg,limits.iops-total=10000000"];
    args.extend(nodes.iter().flat_map(|n| ["--blockdev", n]));
    let host = Host::start(scratch, &args);
    let mut q = host.qmp();
    q.command("backend-add", json!({ "name": "vm0", "node-name": "a0" }));
    q.command("backend-add", json!({ "name": "cd", "removable": true, "read-only": true }));
    q.command("blockdev-insert-medium", json!({ "device": "cd", "node-name": "m3" }));
    q.command("blockdev-close-tray", json!({ "device": "cd" }));
    for (id, node, writable) in [("ea", "vm0", true), ("eb", "q", true), ("ec", "cd", false)] {
        let export = json!({
            "type": "nbd", "id": id, "node-name": node, "name": id, "writable": writable,
        });
        q.command("block-export-add", export);
    }
    host
}

#[test]
fn random_mutators_under_four_clients() {
    if !tools::have("qemu-img") {
        return;
    }
    let mut rng = Rng::from_env();
    println!("seed {}", rng.seed());
    let (rounds, snapshots) = soak((60, 6), (1000, 30));
    let scratch = Scratch::new("mutators-live");
    images(&scratch, snapshots);
    let host = start(scratch);
    let mut q = host.qmp();
    let mut disks =
        [Disk::new('a', json!({ "device": "vm0" })), Disk::new('b', json!({ "id": "eb" }))];
    let loads: Vec<Load> = (0..4)
        .map(|n| {
            let c = host.client(["ea", "eb"][n / 2]);
            let half = SIZE / 2;
            Load::start(c, n as u64 % 2 * half, half, rng.next_u64(), DEPTH)
        })
        .collect();
    let mut cd = Removable::start(host.client("ec"), 3);
    let mut windows = Vec::new();
    let mut history = History(Vec::new());
    let rest = |rng: &mut Rng| std::thread::sleep(Duration::from_micros(rng.below(8_000)));
    for round in 0..rounds {
        rest(&mut rng);
        let which = rng.below(2) as usize;
        let d = &mut disks[which];
        let filters = d.layers.iter().filter(|l| l.filter).count();
        let from = Instant::now();
        let mut disk = Some(which);
        let what = match rng.below(22) {
            0..=2 if d.snapshots < snapshots => d.snapshot(&mut q, &host.scratch, &mut rng),
            0..=6 if filters < 4 => d.filter_in(&mut q, &mut rng),
            3..=9 if filters > 0 => d.filter_out(&mut q, &mut rng),
            0..=11 => d.reopen(&mut q, &host.scratch, &mut rng),
            12 | 13 => d.throttle(&mut q),
            14..=17 => {
                disk = None;
                cd.mutate(&mut q, &host.scratch, &mut rng)
            }
            18 | 19 => {
                disk = Some(1);
                disks[1].child(&mut q)
            }
            _ => {
                disk = None;
                let name = format!("n{round}");
                let node = json!({ "driver": "null-co", "node-name": name, "read-zeroes": true });
                q.command("blockdev-add", node);
                q.command("blockdev-del", json!({ "node-name": name }));
                "add and del"
            }
        };
        let to = Instant::now();
        windows.push(Window { from, to, disk, what });
        rest(&mut rng);
        let idle = Instant::now();
        std::thread::sleep(to - from);
        windows.push(Window { from: idle, to: Instant::now(), disk, what: NOTHING });
        history.0.push(format!("{round}: {what} ({disk:?}): {}", disks[which].chain()));
        if loads.iter().any(Load::failed) {
            // Of the backend with a name the daemon tells the reason.
            std::thread::sleep(Duration::from_millis(100));
            q.command("query-version", json!({}));
            let told = q.take_events();
            history
                .0
                .extend(told.iter().filter(|e| e["data"]["device"] == "vm0").map(Value::to_string));
        }
        loads.iter().for_each(Load::lives);
    }
    cd.end();
    let loads: Vec<Loaded> = loads.into_iter().map(Load::end).collect();
    compare(&windows, &loads);
    let scratch = host.end();
    for (n, d) in disks.iter().enumerate() {
        let mut whole = DiskModel::new(SIZE);
        for (half, load) in loads[2 * n..2 * n + 2].iter().enumerate() {
            let from = half as u64 * SIZE / 2;
            whole.write(from, &load.model.read(from, SIZE / 2));
        }
        for s in 0..=d.snapshots {
            tools::qcow2_is_clean(&d.file(&scratch, s));
        }
        let raw = scratch.arg("model.raw");
        whole.save(&raw);
        tools::same_content("qcow2", &d.file(&scratch, d.snapshots), "raw", &raw);
    }
    // What the quorum was told before the first snapshot, or all of it.
    tools::same_content("qcow2", &disks[1].file(&scratch, 0), "raw", &scratch.arg("b-copy.raw"));
}

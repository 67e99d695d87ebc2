//! A daemon with whatever disks a test wants, and clients that keep many requests in flight, each
//! checked against a model and timed.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gipfel_testkit::nbd::{Address, Client, Command, wire};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, DiskModel, Rng, Scratch};

/// A daemon with an NBD server and a monitor.
pub struct Host {
    pub daemon: Daemon,
    pub scratch: Scratch,
}

impl Host {
    /// Starts it on two I/O threads with these further arguments.
    pub fn start(scratch: Scratch, more: &[&str]) -> Host {
        let (nbd, qmp) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
        let server = format!("addr.type=unix,addr.path={nbd},max-connections=0");
        let chardev = format!("socket,id=c,path={qmp},server=on,wait=off");
        let mut args = vec!["--io-threads", "2", "--nbd-server", &server];
        args.extend(["--chardev", &chardev, "--monitor", "c"]);
        args.extend(more);
        let sockets: [PathBuf; 2] = [nbd.clone().into(), qmp.clone().into()];
        Host { daemon: Daemon::gipfel(&args).wait_for(&sockets), scratch }
    }

    pub fn qmp(&self) -> Qmp {
        Qmp::connect(self.scratch.path("qmp.sock")).expect("the monitor is there")
    }

    pub fn address(&self) -> Address {
        Address::Unix(self.scratch.path("nbd.sock"))
    }

    pub fn client(&self, export: &str) -> Client {
        Client::connect(&self.address(), export).expect("the export is there")
    }

    /// Ends the daemon as a service manager does, and expects it to end well.
    pub fn end(mut self) -> Scratch {
        let status = self.daemon.terminate();
        assert!(status.success(), "the daemon ended with {status}");
        self.scratch
    }
}

/// One request: when it was sent and how long it took.
#[derive(Clone, Copy)]
pub struct Sample {
    pub at: Instant,
    pub took: Duration,
    /// It waits for the storage, and others that change something wait for it.
    pub flush: bool,
}

/// What a load has come to.
pub struct Loaded {
    /// What its part of the disk holds.
    pub model: DiskModel,
    pub samples: Vec<Sample>,
}

/// A client that keeps requests in flight in its part of a disk until it is told to stop. Each of
/// its lanes has a range of its own and one request at a time, so that each answer is known.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<Loaded>,
}

struct Lane {
    from: u64,
    len: u64,
    cookie: u64,
    at: Instant,
    /// The request, for messages: type, offset, length.
    request: (u16, u64, u32),
    /// What a read must bring.
    expected: Option<Vec<u8>>,
}

const LONGEST: u64 = 20_000;

impl Lane {
    /// Sends the next request: reads, writes, zeroes, discards, flushes, of odd sizes.
    fn submit(&mut self, c: &mut Client, rng: &mut Rng, model: &mut DiskModel) {
        let len = rng.between(1, LONGEST.min(self.len));
        let at = self.from + rng.below(self.len - len + 1);
        let (mut kind, mut payload) = (wire::CMD_READ, Vec::new());
        self.expected = None;
        match rng.below(16) {
            0..=6 => {
                kind = wire::CMD_WRITE;
                payload = rng.bytes(len as usize);
                model.write(at, &payload);
            }
            7 => {
                kind = wire::CMD_WRITE_ZEROES;
                model.zero(at, len);
            }
            8 if rng.one_in(8) => kind = wire::CMD_FLUSH,
            _ => self.expected = Some(model.read(at, len)),
        }
        let (offset, length) = if kind == wire::CMD_FLUSH { (0, 0) } else { (at, len as u32) };
        (self.at, self.request) = (Instant::now(), (kind, offset, length));
        let request = Command { kind, flags: 0, offset, length, payload: &payload };
        self.cookie = c.submit(&request).unwrap();
    }
}

impl Load {
    /// A load of `depth` requests at once on the `len` bytes at `from`, which hold zeros.
    pub fn start(c: Client, from: u64, len: u64, seed: u64, depth: u64) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let (s, d) = (stop.clone(), done.clone());
        let thread = std::thread::spawn(move || run(c, from, len, Rng::new(seed), depth, &s, &d));
        Load { stop, done, thread }
    }

    /// Requests completed so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Whether it saw an error or a wrong byte.
    pub fn failed(&self) -> bool {
        self.thread.is_finished()
    }

    /// Panics where it has failed.
    #[track_caller]
    pub fn lives(&self) {
        assert!(!self.failed(), "a client saw an error or a wrong byte");
    }

    /// Ends it: what it wrote is read again and compared.
    pub fn end(self) -> Loaded {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the client saw no error and no wrong byte")
    }
}

fn run(
    mut c: Client,
    from: u64,
    len: u64,
    mut rng: Rng,
    depth: u64,
    stop: &AtomicBool,
    done: &AtomicU64,
) -> Loaded {
    let mut model = DiskModel::new(from + len);
    let mut samples = Vec::new();
    let part = len / depth;
    let at = Instant::now();
    let lane = |n| {
        let request = Default::default();
        Lane { from: from + n * part, len: part, cookie: 0, at, request, expected: None }
    };
    let mut lanes: Vec<Lane> = (0..depth).map(lane).collect();
    lanes.iter_mut().for_each(|l| l.submit(&mut c, &mut rng, &mut model));
    let mut waiting = lanes.len();
    while waiting > 0 {
        let answer = c.complete().unwrap();
        let lane = lanes.iter_mut().find(|l| l.cookie == answer.cookie).unwrap();
        let flush = lane.request.0 == wire::CMD_FLUSH;
        samples.push(Sample { at: lane.at, took: lane.at.elapsed(), flush });
        let request = lane.request;
        let data = answer.result.unwrap_or_else(|e| panic!("request {request:?}: {e}"));
        if let Some(wanted) = &lane.expected {
            assert!(data.bytes == *wanted, "request {request:?}: other bytes than were written");
        }
        done.fetch_add(1, Ordering::Relaxed);
        if stop.load(Ordering::Relaxed) {
            waiting -= 1;
        } else {
            lane.submit(&mut c, &mut rng, &mut model);
        }
    }
    c.flush().unwrap();
    model.expect(from, &c.read(from, len as u32).unwrap());
    Loaded { model, samples }
}

/// The duration that `part` (0 to 1) of them do not exceed; zero of none.
pub fn quantile(samples: &mut [Duration], part: f64) -> Duration {
    samples.sort_unstable();
    let at = (samples.len() as f64 * part).ceil() as usize;
    samples.get(at.saturating_sub(1)).copied().unwrap_or_default()
}

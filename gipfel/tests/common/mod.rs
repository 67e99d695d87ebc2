//! What the end-to-end tests share: a daemon that serves an image, a client that writes and checks
//! all the time, and how long tests run.
#![allow(dead_code, reason = "each test file uses its own part")]

pub mod load;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, DiskModel, Rng, Scratch, tools};

/// The size of a soak from the environment: `GIPFEL_SOAK=1` for what issues ask, else a short run.
pub fn soak<T>(short: T, long: T) -> T {
    if std::env::var_os("GIPFEL_SOAK").is_some() { long } else { short }
}

/// How long something may take that is not measured here.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon with `disk.FORMAT` as node `disk` (over `f`), export `x` and a monitor.
pub struct Served {
    pub daemon: Daemon,
    pub scratch: Scratch,
}

impl Served {
    /// Makes a qcow2 image with `qemu-img create` and these further arguments, and serves it.
    pub fn new(name: &str, size: &str, create: &[&str], node_options: &str) -> Served {
        let scratch = Scratch::new(name);
        let image = scratch.arg("disk.qcow2");
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(create);
        args.extend([image.as_str(), size]);
        tools::qemu_img(&args);
        Self::existing(scratch, node_options)
    }

    /// Serves the `disk.qcow2` that is in the folder.
    pub fn existing(scratch: Scratch, node_options: &str) -> Served {
        let daemon = start(&scratch, node_options);
        Served { daemon, scratch }
    }

    /// Serves a raw image of `size` zero bytes.
    pub fn raw(name: &str, size: u64) -> Served {
        Self::raw_with(name, size, "", &[])
    }

    /// As [`Served::raw`], with more options of the file node and of the NBD server.
    pub fn raw_with(name: &str, size: u64, file_options: &str, more: &[&str]) -> Served {
        let scratch = Scratch::new(name);
        std::fs::File::create(scratch.path("disk.raw")).unwrap().set_len(size).unwrap();
        let daemon = start_over(&scratch, "raw", file_options, "", more);
        Served { daemon, scratch }
    }

    pub fn image(&self) -> String {
        let raw = self.scratch.arg("disk.raw");
        if std::path::Path::new(&raw).exists() { raw } else { self.scratch.arg("disk.qcow2") }
    }

    pub fn address(&self) -> Address {
        Address::Unix(self.scratch.path("nbd.sock"))
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.address(), "x").expect("the export is there")
    }

    pub fn qmp(&self) -> Qmp {
        Qmp::connect(self.scratch.path("qmp.sock")).expect("the monitor is there")
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///x?socket={}", self.scratch.arg("nbd.sock"))
    }

    /// Ends the daemon as a service manager does, and expects it to end well.
    pub fn end(mut self) -> Scratch {
        let status = self.daemon.terminate();
        assert!(status.success(), "the daemon ended with {status}");
        self.scratch
    }
}

/// Starts the daemon over the `disk.qcow2` of the folder and waits for its sockets.
pub fn start(scratch: &Scratch, node_options: &str) -> Daemon {
    start_over(scratch, "qcow2", "", node_options, &[])
}

fn start_over(
    scratch: &Scratch,
    format: &str,
    file_options: &str,
    node_options: &str,
    more: &[&str],
) -> Daemon {
    let image = scratch.arg(&format!("disk.{format}"));
    let (nbd, qmp) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
    let sockets: [PathBuf; 2] = [nbd.clone().into(), qmp.clone().into()];
    let file = format!("file,node-name=f,filename={image},discard=unmap{file_options}");
    let disk = format!("{format},node-name=disk,file=f,discard=unmap{node_options}");
    let server = format!("addr.type=unix,addr.path={nbd},max-connections=0");
    let chardev = format!("socket,id=c,path={qmp},server=on,wait=off");
    let mut args = vec![
        "--io-threads",
        "2",
        "--object",
        "throttle-group,id=tg,limits.iops-total=10000000",
        "--blockdev",
        &file,
        "--blockdev",
        &disk,
        "--nbd-server",
        &server,
        "--export",
        "nbd,id=e,node-name=disk,name=x,writable=on",
        "--chardev",
        &chardev,
        "--monitor",
        "c",
    ];
    args.extend(more);
    Daemon::gipfel(&args).wait_for(&sockets)
}

/// A client that writes, reads and compares its part of the disk until it is told to stop.
pub struct Witness {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<(DiskModel, Duration)>,
}

impl Witness {
    /// A witness on export `x` that keeps to the `len` bytes at `from`.
    pub fn start(address: Address, from: u64, len: u64, seed: u64) -> Witness {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let (s, d) = (stop.clone(), done.clone());
        let thread = std::thread::spawn(move || {
            let mut c = Client::connect(&address, "x").unwrap();
            let mut rng = Rng::new(seed);
            let mut model = DiskModel::new(from + len);
            let mut worst = Duration::ZERO;
            while !s.load(Ordering::Relaxed) {
                let n = rng.between(1, 20_000.min(len));
                let at = from + rng.below(len - n + 1);
                let start = Instant::now();
                match rng.below(8) {
                    0..=2 => {
                        let data = rng.bytes(n as usize);
                        c.write(at, &data, 0).unwrap();
                        model.write(at, &data);
                    }
                    3 => {
                        c.zero(at, n as u32, 0).unwrap();
                        model.zero(at, n);
                    }
                    4 if rng.one_in(20) => c.flush().unwrap(),
                    _ => model.expect(at, &c.read(at, n as u32).unwrap()),
                }
                worst = worst.max(start.elapsed());
                d.fetch_add(1, Ordering::Relaxed);
            }
            c.flush().unwrap();
            model.expect(from, &c.read(from, len as u32).unwrap());
            (model, worst)
        });
        Witness { stop, done, thread }
    }

    /// Waits until it has done some more; panics where it failed or stands still.
    #[track_caller]
    pub fn lives(&self) {
        let before = self.done.load(Ordering::Relaxed);
        let deadline = Instant::now() + PATIENCE;
        while self.done.load(Ordering::Relaxed) < before + 20 {
            assert!(!self.thread.is_finished(), "the client beside has failed");
            assert!(Instant::now() < deadline, "the client beside stands still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends it; gives what its part of the disk holds and the longest that one request took.
    pub fn end(self) -> (DiskModel, Duration) {
        self.lives();
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the client beside has seen no wrong byte and no error")
    }
}

/// How many KiB the most memory that the daemon ever held has grown beyond `before`.
pub fn grown(daemon: &Daemon, before: (u64, u64)) -> u64 {
    daemon.memory().0.saturating_sub(before.1)
}

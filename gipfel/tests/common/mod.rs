//! What the end-to-end tests share: a daemon that serves a qcow2 image, and how long they run.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::PathBuf;
use std::time::Duration;

use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Scratch, tools};

/// The size of a soak from the environment: `GIPFEL_SOAK=1` for what issues ask, else a short run.
pub fn soak<T>(short: T, long: T) -> T {
    if std::env::var_os("GIPFEL_SOAK").is_some() { long } else { short }
}

/// How long something may take that is not measured here.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A daemon with `disk.qcow2` as node `disk` (over `f`), export `x` and a monitor.
pub struct Served {
    pub daemon: Daemon,
    pub scratch: Scratch,
}

impl Served {
    /// Makes an image with `qemu-img create` and these further arguments, and serves it.
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

    pub fn image(&self) -> String {
        self.scratch.arg("disk.qcow2")
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
    let image = scratch.arg("disk.qcow2");
    let (nbd, qmp) = (scratch.arg("nbd.sock"), scratch.arg("qmp.sock"));
    let sockets: [PathBuf; 2] = [nbd.clone().into(), qmp.clone().into()];
    Daemon::gipfel(&[
        "--io-threads",
        "2",
        "--object",
        "throttle-group,id=tg,limits.iops-total=10000000",
        "--blockdev",
        &format!("file,node-name=f,filename={image},discard=unmap"),
        "--blockdev",
        &format!("qcow2,node-name=disk,file=f,discard=unmap{node_options}"),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={nbd},max-connections=0"),
        "--export",
        "nbd,id=e,node-name=disk,name=x,writable=on",
        "--chardev",
        &format!("socket,id=c,path={qmp},server=on,wait=off"),
        "--monitor",
        "c",
    ])
    .wait_for(&sockets)
}

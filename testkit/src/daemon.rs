//! The daemon under test, and the reference daemon: started, waited for, killed at the end.

use crate::tools;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// A running server process; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    what: String,
}

impl Daemon {
    /// The gipfel binary: `GIPFEL_BIN`, else what cargo built for this test, else
    /// `target/debug/gipfel` beside the running test.
    pub fn binary() -> PathBuf {
        for var in ["GIPFEL_BIN", "CARGO_BIN_EXE_gipfel"] {
            if let Some(path) = std::env::var_os(var) {
                return PathBuf::from(path);
            }
        }
        let exe = std::env::current_exe().expect("a test knows its own path");
        let found = exe.ancestors().skip(1).map(|d| d.join("gipfel")).find(|p| p.is_file());
        found.unwrap_or_else(|| {
            panic!("no gipfel binary: build it (cargo build -p gipfel) or set GIPFEL_BIN")
        })
    }

    /// Starts `gipfel storage-daemon` with `args`.
    pub fn gipfel(args: &[&str]) -> Self {
        let mut all = vec!["storage-daemon"];
        all.extend(args);
        Self::start(Self::binary(), &all)
    }

    /// As [`Daemon::gipfel`], with a descriptor passed on as number 3, as service managers do.
    pub fn gipfel_passing(fd: OwnedFd, args: &[&str]) -> Self {
        let what = format!("gipfel storage-daemon {}", args.join(" "));
        // The shell moves it from where a command's input stands.
        let child = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 </dev/null"])
            .arg(Self::binary())
            .arg("storage-daemon")
            .args(args)
            .stdin(Stdio::from(fd))
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {what}: {e}"));
        Self { child, what }
    }

    /// Starts the reference daemon with `args`.
    pub fn reference(args: &[&str]) -> Self {
        Self::start(PathBuf::from("qemu-storage-daemon"), args)
    }

    /// Starts `program`; its output goes to the test's.
    pub fn start(program: impl AsRef<Path>, args: &[&str]) -> Self {
        let program = program.as_ref();
        let what = format!("{} {}", program.display(), args.join(" "));
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {what}: {e}"));
        Self { child, what }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the unix sockets accept connections; panics where the process ends before or
    /// ten seconds pass.
    #[track_caller]
    pub fn wait_for(mut self, sockets: &[impl AsRef<Path>]) -> Self {
        let deadline = Instant::now() + Duration::from_secs(10);
        for socket in sockets {
            let socket = socket.as_ref();
            while std::os::unix::net::UnixStream::connect(socket).is_err() {
                if let Some(status) = self.child.try_wait().expect("wait for a child") {
                    panic!("{} ended with {status} before it listened", self.what);
                }
                let late = Instant::now() > deadline;
                assert!(!late, "{} does not listen on {}", self.what, socket.display());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills the process as `kill -9` does and waits for its end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks the process to end (SIGTERM) and waits for it; panics where it does not within 20 s.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        tools::run("kill", &["-TERM", &self.pid().to_string()]);
        self.wait_end()
    }

    /// Waits for the process to end on its own; panics where it does not within 20 s.
    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().expect("wait for a child") {
                return status;
            }
            assert!(Instant::now() < deadline, "{} does not end", self.what);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Peak and present resident memory in KiB, from /proc.
    pub fn memory(&self) -> (u64, u64) {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))
            .unwrap_or_else(|e| panic!("{}: {e}", self.what));
        let field = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_default();
            line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
        };
        (field("VmHWM:"), field("VmRSS:"))
    }

    /// Time that the main thread (of gipfel: the one on which monitors and the graph live) has
    /// spent on a processor, from /proc. What other processes do meanwhile does not count.
    pub fn main_thread_time(&self) -> Duration {
        let text = std::fs::read_to_string(format!("/proc/{}/schedstat", self.pid()))
            .unwrap_or_else(|e| panic!("{}: {e}", self.what));
        let ns = text.split_whitespace().next().and_then(|n| n.parse().ok());
        Duration::from_nanos(ns.unwrap_or_else(|| panic!("schedstat says '{text}'")))
    }

    /// Number of open file descriptors, from /proc.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

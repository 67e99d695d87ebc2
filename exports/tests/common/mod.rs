//! A disk in memory whose requests can be held up and made to fail, and a server around it.
#![allow(dead_code)]

use event_listener::Event;
use gipfel_base::{ByteRange, Error, Result};
use gipfel_exports::nbd::{Disk, ExportOptions, Extent, Server, ServerOptions, ZeroFlags};
use gipfel_io::net::Listener;
use gipfel_io::{Buf, Runtime, yield_now};
use gipfel_testkit::nbd::Address;
use gipfel_testkit::{DiskModel, Scratch};
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub const SIZE: u64 = 8 << 20;

/// The disk. Extents are blocks of 4 KiB: never written, or written.
#[derive(Default)]
pub struct MemoryDisk {
    pub data: Mutex<DiskModel>,
    written: Mutex<std::collections::HashSet<u64>>,
    /// Errno that every request fails with, if not 0.
    pub errno: AtomicU64,
    /// While set, requests wait.
    pub held: AtomicBool,
    released: Event,
    pub flushes: AtomicU64,
    pub running: AtomicU64,
    pub most_running: AtomicU64,
}

impl MemoryDisk {
    pub fn new(size: u64) -> Arc<Self> {
        Arc::new(Self { data: Mutex::new(DiskModel::new(size)), ..Self::default() })
    }

    pub fn release(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.released.notify(usize::MAX);
    }

    async fn start(&self) -> Result<()> {
        let now = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_running.fetch_max(now, Ordering::SeqCst);
        yield_now().await;
        loop {
            let released = self.released.listen();
            if !self.held.load(Ordering::SeqCst) {
                break;
            }
            released.await;
        }
        self.running.fetch_sub(1, Ordering::SeqCst);
        match self.errno.load(Ordering::SeqCst) {
            0 => Ok(()),
            e => Err(Error::os(e as i32, "/secret/path/of/the/host")),
        }
    }

    fn mark(&self, range: ByteRange, written: bool) {
        let mut w = self.written.lock().unwrap();
        for block in range.start() / 4096..range.end().div_ceil(4096) {
            if written {
                w.insert(block)
            } else {
                w.remove(&block)
            };
        }
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        self.data.lock().unwrap().size()
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<()> {
        self.start().await?;
        buf.copy_from(0, &self.data.lock().unwrap().read(offset, buf.len() as u64));
        Ok(())
    }

    async fn write(&self, offset: u64, buf: Buf, fua: bool) -> Result<()> {
        self.start().await?;
        assert!(buf.len() < 4096 || buf.is_aligned(4096), "payloads are aligned for direct I/O");
        self.data.lock().unwrap().write(offset, &buf.to_vec());
        self.mark(ByteRange::new(offset, buf.len() as u64), true);
        self.flushes.fetch_add(u64::from(fua), Ordering::SeqCst);
        Ok(())
    }

    async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if flags.fast && !flags.may_unmap {
            return Err(Error::unsupported("not fast"));
        }
        self.start().await?;
        self.data.lock().unwrap().zero(range.start(), range.len());
        if let Some(inner) = range.narrow(4096).filter(|_| flags.may_unmap) {
            self.mark(inner, false);
        }
        Ok(())
    }

    async fn discard(&self, range: ByteRange, _: bool) -> Result<()> {
        self.start().await?;
        if let Some(inner) = range.narrow(4096) {
            self.data.lock().unwrap().zero(inner.start(), inner.len());
            self.mark(inner, false);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.start().await?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    async fn prefetch(&self, _: ByteRange) -> Result<()> {
        self.start().await
    }

    async fn block_status(&self, range: ByteRange) -> Result<Extent> {
        self.start().await?;
        let first = range.start() / 4096;
        let allocated = self.written.lock().unwrap().contains(&first);
        let len = ((first + 1) * 4096).min(range.end()) - range.start();
        Ok(Extent { len, allocated, zero: !allocated })
    }
}

/// What a test's control side has.
pub struct Site {
    pub server: Server<MemoryDisk>,
    pub disk: Arc<MemoryDisk>,
    pub address: Address,
    pub tcp: Address,
    pub dir: std::path::PathBuf,
}

impl Site {
    /// Runs blocking client code beside the server.
    pub async fn client<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Address) -> T + Send + 'static,
    ) -> T {
        self.at(&self.address, f).await
    }

    /// The same with another address.
    pub async fn at<T: Send + 'static>(
        &self,
        address: &Address,
        f: impl FnOnce(&Address) -> T + Send + 'static,
    ) -> T {
        let address = address.clone();
        beside(move || f(&address)).await
    }
}

/// Runs blocking code on a thread of its own; a panic there is one here.
pub async fn beside<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let done = Arc::new(Event::new());
    let (d, thread) = (done.clone(), std::thread::spawn(f));
    let handle = std::thread::spawn(move || {
        let outcome = thread.join();
        d.notify(usize::MAX);
        outcome
    });
    while !handle.is_finished() {
        let l = done.listen();
        if handle.is_finished() {
            break;
        }
        let wait = std::time::Duration::from_millis(20);
        gipfel_io::time::timeout(wait, l).await;
    }
    match handle.join().unwrap() {
        Ok(v) => v,
        Err(e) => std::panic::resume_unwind(e),
    }
}

/// Runs `test` on the control thread of a server with two I/O threads, listening on a unix socket
/// and on TCP, with one writable export "x".
pub fn with_server<F: Future>(options: ServerOptions, test: impl FnOnce(Site) -> F) -> F::Output {
    let runtime = Runtime::new(2).unwrap();
    let threads = runtime.io_threads();
    let scratch = Scratch::new("nbd");
    let dir = scratch.dir().to_owned();
    runtime
        .block_on(async move {
            let path = dir.join("s");
            let server = Server::new(threads, options);
            let disk = MemoryDisk::new(SIZE);
            let x = ExportOptions { name: "x".into(), writable: true, description: None };
            server.add(x, disk.clone()).unwrap();
            server.listen(Listener::unix(&path).await.unwrap());
            let tcp = Listener::tcp(([127, 0, 0, 1], 0).into()).await.unwrap();
            let tcp_address = Address::Tcp(tcp.tcp_address().unwrap().to_string());
            server.listen(tcp);
            let address = Address::unix(path);
            test(Site { server, disk, address, tcp: tcp_address, dir }).await
        })
        .unwrap()
}

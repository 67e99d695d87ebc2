//! A sparse disk in memory that remembers its writes.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_node::{
    Child, Driver, DriverDef, IoFuture, Kind, Node, OpenArgs, Opened, Status, WriteFlags,
};

const PAGE: u64 = 4096;

static MEMORY: DriverDef = DriverDef {
    name: "memory",
    kind: Kind::Protocol,
    children: &[],
    open: |_: OpenArgs| Box::pin(async { Err::<Opened, _>(Error::unsupported("tests only")) }),
    create: None,
    probe: None,
    check: None,
};

/// What happened to the disk.
#[derive(Clone, Debug)]
pub enum Event {
    Write(u64, Vec<u8>),
    Flush,
}

#[derive(Clone, Default)]
struct State {
    pages: BTreeMap<u64, Vec<u8>>,
    len: u64,
    log: Vec<Event>,
    /// Reads of this byte fail.
    bad: Option<u64>,
}

/// The disk; clones are the same disk.
#[derive(Clone, Default)]
pub struct Disk(Arc<Mutex<State>>);

impl Disk {
    pub fn sparse(len: u64) -> Disk {
        let d = Disk::default();
        d.0.lock().unwrap().len = len;
        d
    }

    pub fn load(path: impl AsRef<Path>) -> Disk {
        let bytes = std::fs::read(path).unwrap();
        let d = Disk::sparse(bytes.len() as u64);
        d.put(0, &bytes);
        d
    }

    pub fn save(&self, path: impl AsRef<Path>) {
        std::fs::write(path, self.get(0, self.len())).unwrap();
    }

    pub fn copy(&self) -> Disk {
        let state = State { log: Vec::new(), ..self.0.lock().unwrap().clone() };
        Disk(Arc::new(Mutex::new(state)))
    }

    pub fn child(&self) -> Arc<Child> {
        let node = Node::new("disk".into(), &MEMORY, Box::new(self.clone()));
        Child::new("test.file", Some(node))
    }

    pub fn len(&self) -> u64 {
        self.0.lock().unwrap().len
    }

    pub fn fail_reads_of(&self, byte: u64) {
        self.0.lock().unwrap().bad = Some(byte);
    }

    pub fn take_log(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap().log)
    }

    pub fn get(&self, offset: u64, len: u64) -> Vec<u8> {
        let s = self.0.lock().unwrap();
        let mut out = vec![0; len as usize];
        let mut at = 0;
        while at < len {
            let (page, in_page) = ((offset + at) / PAGE, (offset + at) % PAGE);
            let n = (PAGE - in_page).min(len - at);
            if let Some(p) = s.pages.get(&page) {
                let from = &p[in_page as usize..(in_page + n) as usize];
                out[at as usize..(at + n) as usize].copy_from_slice(from);
            }
            at += n;
        }
        out
    }

    pub fn put(&self, offset: u64, bytes: &[u8]) {
        let mut s = self.0.lock().unwrap();
        let mut at = 0;
        while at < bytes.len() as u64 {
            let (page, in_page) = ((offset + at) / PAGE, (offset + at) % PAGE);
            let n = (PAGE - in_page).min(bytes.len() as u64 - at);
            let part = &bytes[at as usize..(at + n) as usize];
            if s.pages.contains_key(&page) || part.iter().any(|b| *b != 0) {
                let p = s.pages.entry(page).or_insert_with(|| vec![0; PAGE as usize]);
                p[in_page as usize..(in_page + n) as usize].copy_from_slice(part);
            }
            at += n;
        }
        s.len = s.len.max(offset + bytes.len() as u64);
    }

    pub fn get_be(&self, offset: u64, len: u64) -> u64 {
        self.get(offset, len).iter().fold(0, |v, b| v << 8 | u64::from(*b))
    }

    pub fn put_be(&self, offset: u64, len: usize, value: u64) {
        self.put(offset, &value.to_be_bytes()[8 - len..]);
    }
}

impl Driver for Disk {
    fn size(&self) -> u64 {
        self.len()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        let bad = self.0.lock().unwrap().bad;
        let range = offset..offset + buf.len() as u64;
        Box::pin(async move {
            if bad.is_some_and(|b| range.contains(&b)) {
                return Err(Error::os(5, format!("read at {offset:#x}")));
            }
            buf.copy_from(0, &self.get(offset, buf.len() as u64));
            Ok(())
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, _: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let bytes = buf.to_vec();
            self.put(offset, &bytes);
            self.0.lock().unwrap().log.push(Event::Write(offset, bytes));
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            self.0.lock().unwrap().log.push(Event::Flush);
            Ok(())
        })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        let s = self.0.lock().unwrap();
        let pages = range.start() / PAGE..range.end().div_ceil(PAGE);
        let empty = s.pages.range(pages).next().is_none();
        let len = range.len();
        Box::pin(async move { Ok(if empty { Status::hole(len) } else { Status::data(len, None) }) })
    }

    fn grows(&self) -> bool {
        true
    }
}

/// Runs a future that has nothing to wait for.
pub fn run<T>(future: impl Future<Output = Result<T>>) -> Result<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(r) => r,
        Poll::Pending => panic!("the disk in memory never makes one wait"),
    }
}

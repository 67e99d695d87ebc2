//! A node over a simulated file, images in it, and an edge to an open image.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::{Buf, File, OpenOptions, ZeroMode};
use gipfel_node::{
    Access, CheckArgs, CheckReport, Child, Common, CreateArgs, Discard, Driver, DriverDef, Fix,
    IoFuture, Kind, Mapping, Node, OpenArgs, Opened, Perm, Perms, Status, WriteFlags,
};
use serde_json::{Value, json};

use crate::qcow2::QCOW2;

static PLAIN: DriverDef = DriverDef {
    name: "plain",
    kind: Kind::Protocol,
    children: &[],
    open: |_: OpenArgs| Box::pin(async { Err::<Opened, _>(Error::unsupported("tests only")) }),
    create: None,
    probe: None,
    check: None,
};

/// A growing file.
struct Plain {
    file: File,
    size: AtomicU64,
}

impl Driver for Plain {
    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn map(&self, _: Access, range: ByteRange) -> Mapping<'_> {
        if range.end() > self.size() {
            return Mapping::Work { len: range.len() };
        }
        let (offset, len) = (range.start(), range.len());
        Mapping::File { file: &self.file, offset, len, pin: None }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(self.file.read_at(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, _: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let end = offset + buf.len() as u64;
            self.file.write_at(offset, buf).await?;
            self.size.fetch_max(end, Ordering::SeqCst);
            Ok(())
        })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        Box::pin(self.file.zero(range, ZeroMode::Unmap))
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.file.sync())
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { Ok(Status::data(range.len(), Some(range.start()))) })
    }

    fn grows(&self) -> bool {
        true
    }

    fn reads_zero_when_new(&self) -> bool {
        true
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        Box::pin(async move {
            self.file.set_len(size).await?;
            self.size.store(size, Ordering::SeqCst);
            Ok(())
        })
    }
}

/// An edge to the simulated file `path`, which is made if there is none.
pub async fn file(path: &str) -> Arc<Child> {
    let how = OpenOptions { write: true, ..OpenOptions::default() };
    let file = match File::open(Path::new(path), how).await {
        Ok(f) => f,
        Err(_) => {
            let how = OpenOptions { create_new: true, ..how };
            File::open(Path::new(path), how).await.unwrap()
        }
    };
    let size = file.info().await.unwrap().len;
    let node = Plain { file, size: AtomicU64::new(size) };
    Child::new(format!("{path}.root"), Some(Node::new(path.into(), &PLAIN, Box::new(node))))
}

/// Makes an image in `path`, with a data file `path.data` if the option `data` is true.
pub async fn create(path: &str, mut options: Value) {
    let mut children = vec![("file".to_owned(), file(path).await)];
    if options.as_object_mut().unwrap().remove("data").is_some_and(|d| d == true) {
        children.push(("data-file".to_owned(), file(&format!("{path}.data")).await));
    }
    let create = QCOW2.create.unwrap();
    create(CreateArgs { options, children }).await.unwrap();
}

/// An edge to the image in `path`, open for writing, over the file `backing` if there is one.
///
/// Where there is a file `path.data`, that is the data file.
pub async fn open(path: &str, backing: Option<&str>, options: Value) -> Result<Arc<Child>> {
    let data_path = format!("{path}.data");
    let data = match File::open(Path::new(&data_path), OpenOptions::default()).await {
        Ok(_) => file(&data_path).await.node().await,
        Err(_) => None,
    };
    let below = match backing {
        Some(b) => file(b).await.node().await,
        None => None,
    };
    let args = OpenArgs {
        node_name: path.into(),
        options,
        common: Common { discard: Discard::Unmap, ..Common::default() },
        children: vec![
            file(path).await,
            Child::new("image.backing", below),
            Child::new("image.data-file", data),
        ],
    };
    let driver = (QCOW2.open)(args).await?.driver;
    let used = Perm::CONSISTENT_READ | Perm::WRITE;
    driver.set_perms(Perms { used, shared: Perm::ALL }).await?;
    Ok(Child::new("image.root", Some(Node::new(path.into(), &QCOW2, driver))))
}

/// What the check finds in `path`.
pub async fn check(path: &str) -> Result<CheckReport> {
    let args = CheckArgs { file: file(path).await, fix: Fix::Nothing };
    (QCOW2.check.unwrap())(args).await
}

/// Closes the image behind an edge.
pub async fn close(image: &Child) -> Result<()> {
    image.node().await.unwrap().driver().close().await
}

/// The ways to make an image that are tried.
pub fn shapes() -> Vec<Value> {
    vec![
        json!({ "size": 300 << 10, "cluster-size": 512, "refcount-bits": 16 }),
        json!({ "size": 300 << 10, "cluster-size": 512, "refcount-bits": 64 }),
        json!({ "size": (300 << 10) + 512, "cluster-size": 1024, "refcount-bits": 1 }),
        json!({ "size": 1 << 20, "cluster-size": 4096, "refcount-bits": 16 }),
        json!({ "size": 1 << 20, "cluster-size": 4096, "version": "v2" }),
        json!({ "size": 1 << 20, "cluster-size": 65536, "refcount-bits": 8 }),
        json!({ "size": 1 << 20, "cluster-size": 16384, "extended-l2": true }),
        json!({ "size": (1 << 20) + 1536, "cluster-size": 65536, "extended-l2": true }),
        json!({ "size": 1 << 20, "cluster-size": 4096, "data": true }),
        json!({ "size": 300 << 10, "cluster-size": 1024, "data": true, "data-file-raw": true }),
        json!({ "size": 1 << 20, "cluster-size": 16384, "data": true, "extended-l2": true }),
    ]
}

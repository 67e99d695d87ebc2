//! What is handed down, over a node in memory that says that it can compress.

use std::sync::{Arc, Mutex};

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_io::sim::World;
use gipfel_node::{
    Child, Common, Driver, DriverDef, IoFuture, Kind, Node, OpenArgs, Status, WriteFlags, ZeroFlags,
};
use serde_json::json;

use super::COMPRESS;
use crate::testing::{Bytes, unopened};

const UNIT: u64 = 4096;
const SIZE: u64 = 10 * UNIT + 100;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Compressed(ByteRange),
    Plain(ByteRange),
    Zeros(ByteRange),
}

/// Remembers what is written to it.
struct Image {
    seen: Arc<Mutex<Vec<Seen>>>,
    zeros: bool,
}

static IMAGE: DriverDef = unopened("image", Kind::Format, &[]);
static BYTES: DriverDef = unopened("bytes", Kind::Protocol, &[]);

impl Driver for Image {
    fn size(&self) -> u64 {
        SIZE
    }

    fn compresses(&self) -> Option<u32> {
        Some(UNIT as u32)
    }

    fn read<'a>(&'a self, _: u64, buf: Buf) -> IoFuture<'a> {
        buf.fill(0);
        Box::pin(async { Ok(()) })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        let range = ByteRange::new(offset, buf.len() as u64);
        let seen = if flags.compressed { Seen::Compressed(range) } else { Seen::Plain(range) };
        self.seen.lock().unwrap().push(seen);
        Box::pin(async { Ok(()) })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, _: ZeroFlags) -> IoFuture<'a> {
        if !self.zeros {
            return Box::pin(async { Err(Error::unsupported("no zeros here")) });
        }
        self.seen.lock().unwrap().push(Seen::Zeros(range));
        Box::pin(async { Ok(()) })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { Ok(Status::data(range.len(), None)) })
    }
}

async fn over(node: Arc<Node>) -> Result<Arc<Node>> {
    let args = OpenArgs {
        node_name: "c".into(),
        options: json!({}),
        common: Common::default(),
        children: vec![Child::new("c.file", Some(node))],
    };
    Ok(Node::new("c".into(), &COMPRESS, (COMPRESS.open)(args).await?.driver))
}

async fn image(zeros: bool) -> (Arc<Child>, Arc<Mutex<Vec<Seen>>>) {
    let seen = Arc::<Mutex<Vec<Seen>>>::default();
    let driver = Box::new(Image { seen: seen.clone(), zeros });
    let node = over(Node::new("image".into(), &IMAGE, driver)).await.unwrap();
    (Child::new("client.root", Some(node)), seen)
}

#[test]
fn writes_are_compressed_and_whole_zeros_stay_zeros() {
    World::new(1).run(async {
        let (root, seen) = image(true).await;
        let taken = || std::mem::take(&mut *seen.lock().unwrap());
        root.write(100, Buf::zeroed(5000), WriteFlags::default()).await.unwrap();
        assert_eq!(taken(), [Seen::Compressed(ByteRange::new(100, 5000))]);
        let zero = async |start, end, no_fallback| {
            let flags = ZeroFlags { no_fallback, ..ZeroFlags::default() };
            root.write_zeroes(ByteRange::between(start, end), flags).await
        };
        zero(UNIT, 3 * UNIT, true).await.unwrap();
        zero(9 * UNIT, SIZE, true).await.unwrap();
        let whole = [ByteRange::new(UNIT, 2 * UNIT), ByteRange::between(9 * UNIT, SIZE)];
        assert_eq!(taken(), whole.map(Seen::Zeros));
        zero(100, 2 * UNIT + 7, false).await.unwrap();
        let parts = [ByteRange::between(100, UNIT), ByteRange::new(2 * UNIT, 7)];
        let [head, tail] = parts.map(Seen::Compressed);
        assert_eq!(taken(), [Seen::Zeros(ByteRange::new(UNIT, UNIT)), head, tail]);
        zero(10, 20, false).await.unwrap();
        assert_eq!(taken(), [Seen::Compressed(ByteRange::new(10, 10))]);
        assert!(zero(10, 2 * UNIT, true).await.is_err() && taken().is_empty());
        // Where there are no zeros, they come as data to be compressed too.
        let (root, seen) = image(false).await;
        root.write_zeroes(ByteRange::new(0, UNIT), ZeroFlags::default()).await.unwrap();
        assert_eq!(*seen.lock().unwrap(), [Seen::Compressed(ByteRange::new(0, UNIT))]);
    });
}

#[test]
fn children_that_cannot_are_refused() {
    World::new(2).run(async {
        let bytes = Node::new("b".into(), &BYTES, Box::<Bytes>::default());
        let refused = |r: Result<Arc<Node>>| r.err().map(|e| e.to_string()).unwrap();
        let e = refused(over(bytes.clone()).await);
        assert!(e.contains("node 'b' (driver 'bytes') cannot"), "{e}");
        let (root, _) = image(true).await;
        let e = refused(over(root.node().await.unwrap()).await);
        assert!(e.contains("compresses already"), "{e}");
        // And so is a write that is to be compressed, wherever it arrives.
        let edge = Child::new("client.root", Some(bytes));
        let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
        let e = edge.write(0, Buf::zeroed(512), flags).await.unwrap_err().to_string();
        assert!(e.contains("node 'b' (driver 'bytes') cannot"), "{e}");
    });
}

//! What the file is told while an image is worked with (`gipfel_node::debug`).

use std::sync::{Arc, Mutex};

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_io::sim::World;
use gipfel_node::DebugEvent::{self, *};
use gipfel_node::{
    Binding, Child, ChildSpec, Common, Debugger, Discard, Driver, DriverDef, Held, IoFuture, Kind,
    Node, OpenArgs, Opened, Perm, Perms, Role, Status, WriteFlags,
};
use serde_json::json;

use super::disk;
use crate::qcow2::QCOW2;

static EAR: DriverDef = DriverDef {
    name: "ear",
    kind: Kind::Filter,
    children: &[ChildSpec {
        name: "file",
        role: Role::Filtered,
        binding: Binding::Position,
        required: true,
    }],
    open: |_: OpenArgs| Box::pin(async { Err::<Opened, _>(Error::unsupported("tests only")) }),
    create: None,
    probe: None,
    check: None,
};

/// A filter that remembers what it is told.
struct Ear {
    children: [Arc<Child>; 1],
    heard: Arc<Mutex<Vec<DebugEvent>>>,
    size: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl Debugger for Ear {
    fn event(&self, event: DebugEvent) -> Option<Held<'_>> {
        self.heard.lock().unwrap().push(event);
        None
    }

    fn set_break(&self, _: DebugEvent, _: &str) {}

    fn remove_break(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn resume(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn wait_break<'a>(&'a self, _: &'a str) -> Held<'a> {
        Box::pin(async {})
    }

    fn status(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
}

impl Driver for Ear {
    fn size(&self) -> u64 {
        (self.size)()
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn grows(&self) -> bool {
        true
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(self.children[0].read(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(self.children[0].write(offset, buf, flags))
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.children[0].flush())
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(self.children[0].status(range))
    }

    fn debugger(&self) -> Option<&dyn Debugger> {
        Some(self)
    }
}

struct Image {
    root: Arc<Child>,
    heard: Arc<Mutex<Vec<DebugEvent>>>,
}

impl Image {
    async fn open(path: &str, backing: &str) -> Image {
        let heard = Arc::<Mutex<Vec<_>>>::default();
        let file = disk::file(path).await;
        let node = file.node().await.unwrap();
        let size = Box::new(move || node.size());
        let ear = Ear { children: [file], heard: heard.clone(), size };
        let ear = Child::new("x", Some(Node::new("ear".into(), &EAR, Box::new(ear))));
        let below = disk::file(backing).await.node().await;
        let args = OpenArgs {
            node_name: path.into(),
            options: json!({}),
            common: Common { discard: Discard::Unmap, ..Common::default() },
            children: vec![
                ear,
                Child::new("image.backing", below),
                Child::new("image.data-file", None),
            ],
        };
        let driver = (QCOW2.open)(args).await.unwrap().driver;
        let used = Perm::CONSISTENT_READ | Perm::WRITE;
        driver.set_perms(Perms { used, shared: Perm::ALL }).await.unwrap();
        let root = Child::new("image.root", Some(Node::new(path.into(), &QCOW2, driver)));
        Image { root, heard }
    }

    /// Fails unless these were heard, in this order, since the last time, whatever else was.
    #[track_caller]
    fn told(&self, wanted: &[DebugEvent]) {
        let heard = std::mem::take(&mut *self.heard.lock().unwrap());
        let mut left = heard.iter();
        for w in wanted {
            assert!(left.any(|e| e == w), "{w:?} of {wanted:?} is missing in {heard:?}");
        }
    }

    async fn write(&self, at: u64, len: usize) {
        let buf = Buf::from_slice(&vec![7; len]);
        self.root.write(at, buf, WriteFlags::default()).await.unwrap();
    }
}

#[test]
fn the_file_hears_of_every_step() {
    let world = World::new(1);
    world.put_file("base", vec![3; 100 << 10]);
    world.run(async {
        let size = 4 << 20;
        let options = json!({ "size": size, "cluster-size": 512, "refcount-bits": 64 });
        disk::create("image", options).await;
        let image = Image::open("image", "base").await;
        image.told(&[ReftableLoad]);

        image.write(700, 100).await;
        image.told(&[
            ClusterAlloc,
            RefblockLoad,
            L2AllocWrite,
            ClusterAlloc,
            CowRead,
            ReadBackingAio,
            CowWrite,
            WriteAio,
        ]);
        image.root.flush().await.unwrap();
        image.told(&[FlushToOs, RefblockUpdate, L2Update, L1Update, FlushToDisk]);
        image.root.flush().await.unwrap();
        image.told(&[FlushToOs, FlushToDisk]);
        // What is only mapped is told as well.
        image.write(512, 512).await;
        image.told(&[WriteAio]);
        image.root.read(600, Buf::new(10)).await.unwrap();
        image.told(&[ReadAio]);
        image.root.read(3000, Buf::new(10)).await.unwrap();
        image.told(&[ReadBackingAio]);

        image.write(8 << 10, 40 << 10).await;
        image.told(&[RefblockAlloc, RefblockAllocWrite, WriteAio]);
        image.root.flush().await.unwrap();
        image.told(&[FlushToOs, RefblockUpdate, RefblockAllocHookup, ReftableUpdate, L2Update]);
        for at in (0..3 << 20).step_by(64 << 10) {
            image.write(at, 64 << 10).await;
        }
        image.root.flush().await.unwrap();
        image.told(&[
            FlushToOs,
            ReftableGrow,
            RefblockAllocWriteBlocks,
            RefblockAllocWriteTable,
            RefblockAllocSwitchTable,
            FlushToDisk,
        ]);

        image.root.discard(ByteRange::new(0, 4096)).await.unwrap();
        image.root.flush().await.unwrap();
        image.told(&[FlushToOs, L2Update, FlushToDisk, ClusterFree]);
        image.root.node().await.unwrap().driver().resize(64 << 20).await.unwrap();
        image.told(&[L1GrowAllocTable, L1GrowWriteTable, L1GrowActivateTable]);
        disk::close(&image.root).await.unwrap();

        let image = Image::open("image", "base").await;
        image.root.read(1 << 20, Buf::new(512)).await.unwrap();
        image.told(&[ReftableLoad, L2Load, ReadAio]);
        let found = disk::check("image").await.unwrap();
        assert_eq!((found.corruptions, found.leaks), (0, 0), "{:?}", found.findings);
    });
}

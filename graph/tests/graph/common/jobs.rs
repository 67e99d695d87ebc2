//! Filters as jobs put them into the graph: a small copy-before-write and a small mirror. Both
//! copy block by block, under a lock for each block.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use gipfel_base::{ByteRange, Result};
use gipfel_graph::{JobFilterSpec, MakeJobFilter};
use gipfel_io::{Buf, RangeLock};
use gipfel_node::{
    Binding, Child, ChildSpec, Driver, DriverDef, IoFuture, Kind, Perm, Perms, Role, Status,
    WriteFlags, ZeroFlags,
};

use crate::common::BLOCK;

/// What the lab follows are the writes of clients, and not the copies of them.
const COPIED: WriteFlags = WriteFlags { fua: false, unchanged: true, compressed: false };

/// What a filter and its job share.
pub struct Copy {
    children: Vec<Arc<Child>>,
    size: u64,
    before_write: bool,
    held: RangeLock,
    done: Mutex<BTreeSet<u64>>,
}

impl Copy {
    /// Copies a block that was not copied yet.
    async fn copy(&self, block: u64) -> Result<()> {
        if self.done.lock().unwrap().contains(&block) {
            return Ok(());
        }
        let buf = Buf::new(BLOCK as usize);
        self.children[0].read(block * BLOCK, buf.clone()).await?;
        self.children[1].write(block * BLOCK, buf, COPIED).await?;
        self.done.lock().unwrap().insert(block);
        Ok(())
    }

    /// Copies every block, as the job does in the background.
    pub async fn run(&self) {
        for block in 0..self.size / BLOCK {
            let _held = self.held.lock(ByteRange::new(block * BLOCK, BLOCK)).await;
            self.copy(block).await.unwrap();
        }
    }
}

struct Filter(Arc<Copy>);

impl Driver for Filter {
    fn size(&self) -> u64 {
        self.0.size
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.0.children
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(self.0.children[0].read(offset, buf))
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let range = ByteRange::new(offset, buf.len() as u64);
            let _held = self.0.held.lock(range).await;
            if self.0.before_write {
                for block in range.start() / BLOCK..range.end() / BLOCK {
                    self.0.copy(block).await?;
                }
                return self.0.children[0].write(offset, buf, flags).await;
            }
            self.0.children[0].write(offset, buf.clone(), flags).await?;
            self.0.children[1].write(offset, buf, COPIED).await
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let _held = self.0.held.lock(range).await;
            if self.0.before_write {
                for block in range.start() / BLOCK..range.end() / BLOCK {
                    self.0.copy(block).await?;
                }
                return self.0.children[0].write_zeroes(range, flags).await;
            }
            self.0.children[0].write_zeroes(range, flags).await?;
            let flags = ZeroFlags { unchanged: true, ..flags };
            self.0.children[1].write_zeroes(range, flags).await
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.0.children[0].flush())
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(self.0.children[0].status(range))
    }

    fn child_perms(&self, index: usize, _: Role, above: Perms, _: bool) -> Perms {
        match index {
            _ if above.used.is_empty() => Perms::IDLE,
            0 => Perms {
                used: above.used | Perm::CONSISTENT_READ,
                shared: above.shared & !Perm::WRITE,
            },
            _ => Perms { used: Perm::WRITE, shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED },
        }
    }
}

const CHILDREN: &[ChildSpec] = &[
    ChildSpec { name: "file", role: Role::Filtered, binding: Binding::Position, required: true },
    ChildSpec { name: "target", role: Role::Data, binding: Binding::Position, required: true },
];

const fn def(name: &'static str) -> DriverDef {
    DriverDef {
        name,
        kind: Kind::Filter,
        children: CHILDREN,
        open: |_| Box::pin(async { Err(gipfel_base::Error::unsupported("made by jobs only")) }),
        create: None,
        probe: None,
        check: None,
    }
}

static CBW: DriverDef = def("cbw");
static MIRROR: DriverDef = def("mirror");

fn spec(def: &'static DriverDef, job: &str, target: &str) -> (JobFilterSpec, Shared) {
    let shared: Shared = Arc::default();
    let (slot, before_write) = (shared.clone(), std::ptr::eq(def, &CBW));
    let make: MakeJobFilter = Box::new(move |children, size| {
        let (held, done) = (RangeLock::new(), Mutex::default());
        let copy = Arc::new(Copy { children, size, before_write, held, done });
        *slot.lock().unwrap() = Some(copy.clone());
        Ok(Box::new(Filter(copy)))
    });
    let binding = if before_write { Binding::Content } else { Binding::Position };
    let others = vec![target.to_owned()];
    let spec = JobFilterSpec {
        job: job.to_owned(),
        name: None,
        def,
        binding,
        others,
        replaces: None,
        make,
    };
    (spec, shared)
}

/// Where a filter's driver is found once it was made.
pub type Shared = Arc<Mutex<Option<Arc<Copy>>>>;

/// A backup's filter.
pub fn cbw(job: &str, target: &str) -> (JobFilterSpec, Shared) {
    spec(&CBW, job, target)
}

/// A mirror's filter.
pub fn mirror(job: &str, target: &str) -> (JobFilterSpec, Shared) {
    spec(&MIRROR, job, target)
}

/// Lets the job behind a filter copy everything.
pub async fn run(shared: &Shared) {
    let copy = shared.lock().unwrap().clone().expect("the filter was made");
    copy.run().await;
}

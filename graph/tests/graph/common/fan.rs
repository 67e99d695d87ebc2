//! A driver whose children come and go: writes reach all of them, reads the first.
//!
//! It keeps a log of the set that each write went to, in the order in which writes end.

use std::cell::RefCell;

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_node::{
    Binding, ChildSpec, Copies, CopySet, Driver, DriverDef, IoFuture, Kind, OpenArgs, Opened, Role,
    Status, WriteFlags, ZeroFlags,
};

use super::lab::pause;

thread_local! {
    /// Every simulated world runs on one thread.
    static LOG: RefCell<Vec<Vec<String>>> = const { RefCell::new(Vec::new()) };
}

/// The labels of the edges that each write used, in the order in which they ended.
pub fn log() -> Vec<Vec<String>> {
    LOG.with_borrow(Clone::clone)
}

/// Forgets the writes so far.
pub fn clear_log() {
    LOG.with_borrow_mut(Vec::clear);
}

struct Fan {
    copies: Copies,
    size: u64,
    least: usize,
}

fn labels(set: &CopySet) -> Vec<String> {
    set.iter().map(|c| c.label().to_owned()).collect()
}

impl Driver for Fan {
    fn size(&self) -> u64 {
        self.size
    }

    fn copies(&self) -> Option<&Copies> {
        Some(&self.copies)
    }

    fn check_copies(&self, count: usize) -> Result<()> {
        if count < self.least {
            return Err(Error::invalid(format!("{count} children are too few")));
        }
        Ok(())
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            let set = self.copies.enter().await;
            set[0].read(offset, buf).await
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let set = self.copies.enter().await;
            for (i, c) in set.iter().enumerate() {
                pause(offset ^ i as u64).await;
                // The lab follows what reaches the first.
                let flags = WriteFlags { unchanged: flags.unchanged || i > 0, ..flags };
                c.write(offset, buf.clone(), flags).await?;
            }
            LOG.with_borrow_mut(|l| l.push(labels(&set)));
            Ok(())
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            for (i, c) in self.copies.enter().await.iter().enumerate() {
                let flags = ZeroFlags { unchanged: flags.unchanged || i > 0, ..flags };
                c.write_zeroes(range, flags).await?;
            }
            Ok(())
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            for c in self.copies.present().await.iter() {
                c.flush().await?;
            }
            Ok(())
        })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { Ok(Status::data(range.len(), None)) })
    }
}

fn open(a: OpenArgs) -> IoFuture<'static, Opened> {
    Box::pin(async move {
        let size = a.children.first().ok_or_else(|| Error::invalid("no children"))?.size().await?;
        let least = a.options["least"].as_u64().unwrap_or(1) as usize;
        let driver = Box::new(Fan { copies: Copies::new(a.children), size, least });
        Ok(Opened { driver, implicit: Vec::new() })
    })
}

/// Its definition.
pub static FAN: DriverDef = DriverDef {
    name: "fan",
    kind: Kind::Format,
    children: &[ChildSpec {
        name: "children",
        role: Role::Copy,
        binding: Binding::Position,
        required: true,
    }],
    open,
    create: None,
    probe: None,
    check: None,
};

/// What [`log`] says of a node `q` with children of these numbers.
pub fn numbered(numbers: &[usize]) -> Vec<String> {
    numbers.iter().map(|n| format!("q.children.{n}")).collect()
}

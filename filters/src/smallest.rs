//! The smallest filter: nobody overwrites the first 4 KiB.

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_node::{Access, DriverDef, IoFuture, Kind, Mapping, Opened, WriteFlags, ZeroFlags};

use crate::filter::{Below, FILE, Filter, Filtered};

/// The driver as `blockdev-add` would find it.
pub static GUARD: DriverDef = DriverDef {
    name: "guard",
    kind: Kind::Filter,
    children: FILE,
    open: |args| {
        Box::pin(async {
            let driver = Filtered::open(args.children, Guard).await?;
            Ok(Opened { driver, implicit: Vec::new() })
        })
    },
    create: None,
    probe: None,
    check: None,
};

struct Guard;

fn check(offset: u64) -> Result<()> {
    let refused = || Error::new(ErrorKind::ReadOnly, "the first 4 KiB are guarded");
    if offset < 4096 { Err(refused()) } else { Ok(()) }
}

impl Filter for Guard {
    fn map<'a>(&'a self, below: &'a Below, access: Access, range: ByteRange) -> Mapping<'a> {
        match access {
            Access::Write if range.start() < 4096 => Mapping::Work { len: range.len() },
            _ => below.straight(range),
        }
    }

    fn write<'a>(&'a self, _: &'a Below, offset: u64, _: Buf, _: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move { check(offset) })
    }

    fn write_zeroes<'a>(&'a self, b: &'a Below, range: ByteRange, f: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            check(range.start())?;
            b.child().write_zeroes(range, f).await
        })
    }

    fn discard<'a>(&'a self, b: &'a Below, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            check(range.start())?;
            b.child().discard(range).await
        })
    }
}

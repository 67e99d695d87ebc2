//! Filter detect-zeroes: writes whose bytes are all zero become writes of zeros.
//!
//! The option `detect-zeroes` of nodes and backends makes it; the QMP reference has no driver of
//! that name. A request is looked at as a whole: one with a single other byte is written as it
//! came. Looking costs a pass over the bytes of a write, which ends at the first that is not zero.

#[cfg(test)]
mod tests;

use std::sync::Arc;

use gipfel_base::{ByteRange, Error, ErrorKind};
use gipfel_io::Buf;
use gipfel_node::{
    Access, Child, Driver, DriverDef, IoFuture, Kind, Mapping, WriteFlags, ZeroFlags,
};

use crate::filter::{Below, FILE, Filter, Filtered, span};

/// The filter detect-zeroes. It cannot be opened by name: see [`make`].
pub static DETECT_ZEROES: DriverDef = DriverDef {
    name: "detect-zeroes",
    kind: Kind::Filter,
    children: FILE,
    open: |_| {
        Box::pin(async {
            Err(Error::unsupported("detect-zeroes is an option of nodes: detect-zeroes=on"))
        })
    },
    create: None,
    probe: None,
    check: None,
};

/// The filter over `child`; with `unmap` zeros give space back (detect-zeroes=unmap).
pub fn make(child: Arc<Child>, unmap: bool) -> Box<dyn Driver> {
    Filtered::implicit(child, DetectZeroes { unmap })
}

struct DetectZeroes {
    unmap: bool,
}

impl Filter for DetectZeroes {
    fn map<'a>(&'a self, below: &'a Below, access: Access, range: ByteRange) -> Mapping<'a> {
        match access {
            Access::Read => below.straight(range),
            Access::Write => Mapping::Work { len: range.len() },
        }
    }

    fn write<'a>(
        &'a self,
        below: &'a Below,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            if buf.is_zero() {
                let zero = ZeroFlags {
                    fua: false,
                    unmap: self.unmap,
                    // The zeros are at hand already, if it comes to writing them.
                    no_fallback: true,
                    unchanged: flags.unchanged,
                };
                match below.child().write_zeroes(span(offset, &buf)?, zero).await {
                    Err(e) if e.kind() == ErrorKind::Unsupported => {}
                    done => return done,
                }
            }
            below.child().write(offset, buf, flags).await
        })
    }
}

//! Drivers `null-co` and `null-aio`: a disk without storage (BlockdevOptionsNull). Writes vanish.
//!
//! Reads give zeros also with `read-zeroes=off`, where the reference leaves the reader's memory
//! as it was: memory here is reused, and what it held may be another client's. That option then
//! only says whether the driver *tells* that there are zeros.

use std::time::Duration;

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::{Buf, time};
use gipfel_node::{
    Ability, Access, Driver, DriverDef, DriverInfo, FromName, IoFuture, Kind, Mapping, OpenArgs,
    Opened, Status, WriteFlags, ZeroFlags,
};
use serde::Deserialize;

/// The driver `null-co`.
pub static NULL_CO: DriverDef = def("null-co");
/// The driver `null-aio`, the same under its other name.
pub static NULL_AIO: DriverDef = def("null-aio");

const fn def(name: &'static str) -> DriverDef {
    DriverDef {
        name,
        kind: Kind::Protocol,
        children: &[],
        open: |args| Box::pin(async move { open(args) }),
        create: None,
        probe: None,
        check: None,
    }
}

/// Reads the rest of a file name `null-co://` or `null-aio://`, which says nothing more.
pub fn read_name(rest: &str) -> Result<FromName> {
    if rest == "//" {
        return Ok(FromName::default());
    }
    let text = format!("a null driver's file name ends with '://', not '{rest}': it has no file");
    Err(Error::invalid(text))
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    #[serde(default = "one_gib")]
    size: u64,
    #[serde(default)]
    latency_ns: u64,
    #[serde(default)]
    read_zeroes: bool,
}

fn one_gib() -> u64 {
    1 << 30
}

/// Largest disk, in bytes: sizes end at 2^63 - 1.
const MAX_SIZE: u64 = i64::MAX as u64;

struct Null {
    size: u64,
    latency: Option<Duration>,
    read_zeroes: bool,
}

fn open(args: OpenArgs) -> Result<Opened> {
    let o: Options = serde_json::from_value(args.options)
        .map_err(|e| Error::invalid(format!("options of a null driver: {e}")))?;
    if o.size > MAX_SIZE {
        return Err(Error::invalid(format!("size {} is more than {MAX_SIZE}", o.size)));
    }
    let latency = (o.latency_ns > 0).then(|| Duration::from_nanos(o.latency_ns));
    let driver = Null { size: o.size, latency, read_zeroes: o.read_zeroes };
    Ok(Opened { driver: Box::new(driver), implicit: Vec::new() })
}

impl Null {
    fn wait<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            if let Some(d) = self.latency {
                time::sleep(d).await;
            }
            Ok(())
        })
    }
}

impl Driver for Null {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, access: Access, range: ByteRange) -> Mapping<'_> {
        match access {
            Access::Read if self.latency.is_none() => Mapping::Zero { len: range.len() },
            _ => Mapping::Work { len: range.len() },
        }
    }

    fn read<'a>(&'a self, _: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            self.wait().await?;
            buf.fill(0);
            Ok(())
        })
    }

    fn write<'a>(&'a self, _: u64, _: Buf, _: WriteFlags) -> IoFuture<'a> {
        self.wait()
    }

    fn write_zeroes<'a>(&'a self, _: ByteRange, _: ZeroFlags) -> IoFuture<'a> {
        self.wait()
    }

    fn discard<'a>(&'a self, _: ByteRange) -> IoFuture<'a> {
        self.wait()
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        self.wait()
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        let at = Some(range.start());
        let data = Status::data(range.len(), at);
        let s = if self.read_zeroes { Status { zero: true, ..data } } else { data };
        Box::pin(async move { Ok(s) })
    }

    fn reads_zero_when_new(&self) -> bool {
        self.read_zeroes
    }

    fn zero_ability(&self) -> Ability {
        Ability::Native
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        Box::pin(async { Ok(DriverInfo { allocated: Some(0), ..DriverInfo::default() }) })
    }
}

#[cfg(test)]
mod tests;

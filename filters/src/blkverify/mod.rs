//! Filter blkverify: two children that should hold the same bytes (BlockdevOptionsBlkverify of the
//! QMP reference). `raw` holds the right ones, `test` is on trial.
//!
//! Writes go to both, reads are read from both and compared. Where they differ, the request fails
//! with EIO, and a line on standard error says where; so it does where a request succeeds on one
//! side only. Discards are dropped: what is read after one is not defined.

#[cfg(test)]
mod tests;

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::{Buf, RangeLock};
use gipfel_node::{
    Access, Binding, Child, ChildSpec, DriverDef, FromName, IoFuture, Kind, Mapping, NameFor,
    OpenArgs, Opened, Role, WriteFlags, ZeroFlags,
};
use serde_json::Value;

use crate::filter::{Below, Filter, Filtered, no_options, span};

/// The filter blkverify.
pub static BLKVERIFY: DriverDef = DriverDef {
    name: "blkverify",
    kind: Kind::Filter,
    children: &[
        ChildSpec { name: "raw", role: Role::Filtered, binding: Binding::Position, required: true },
        ChildSpec { name: "test", role: Role::Data, binding: Binding::Position, required: true },
    ],
    open: |args| Box::pin(open(args)),
    create: None,
    probe: None,
    check: None,
};

/// Longest piece that is compared at once, in bytes.
const PIECE: usize = 1 << 20;
/// EIO.
const EIO: i32 = 5;

async fn open(args: OpenArgs) -> Result<Opened> {
    no_options(BLKVERIFY.name, &args.options)?;
    if let [raw, test] = &args.children[..] {
        let (right, tried) = (raw.size().await?, test.size().await?);
        if right != tried {
            return Err(Error::invalid(format!(
                "'test' has {tried} bytes and 'raw' {right}: they must have the same size"
            )));
        }
    }
    let filter = Blkverify { name: args.node_name, held: RangeLock::new() };
    Ok(Opened { driver: Filtered::open(args.children, filter).await?, implicit: Vec::new() })
}

/// Reads the rest of a file name `blkverify:RAW:TEST`: storage, and an image of any format.
pub fn read_name(rest: &str) -> Result<FromName> {
    let (raw, test) = rest.split_once(':').ok_or_else(|| {
        Error::invalid("two parts are missing: blkverify:FILE NAME OF 'raw':FILE NAME OF 'test'")
    })?;
    let children =
        vec![("raw", raw.to_owned(), NameFor::Storage), ("test", test.to_owned(), NameFor::Image)];
    Ok(FromName { children, ..FromName::default() })
}

struct Blkverify {
    name: String,
    /// Ranges that are being written or compared.
    held: RangeLock,
}

impl Blkverify {
    /// Reports that the two sides differ; the error that the request fails with.
    fn mismatch(&self, what: &str) -> Error {
        let text = format!("node '{}': blkverify: {what}", self.name);
        eprintln!("gipfel: {text}");
        Error::new(ErrorKind::Os(EIO), text)
    }

    /// The outcome of a request that was made on both sides.
    fn agree(&self, what: &str, range: ByteRange, raw: Result<()>, test: Result<()>) -> Result<()> {
        let place = format!("{what} of {} bytes at {:#x}", range.len(), range.start());
        match (raw, test) {
            (Ok(()), Ok(())) => Ok(()),
            (Err(e), Err(_)) => Err(e),
            (Ok(()), Err(e)) => Err(self.mismatch(&format!("{place} failed on 'test' only: {e}"))),
            (Err(e), Ok(())) => Err(self.mismatch(&format!("{place} failed on 'raw' only: {e}"))),
        }
    }

    /// Reads `buf` from 'raw' and compares it with what 'test' has.
    async fn read_piece(&self, below: &Below, offset: u64, buf: Buf) -> Result<()> {
        let range = span(offset, &buf)?;
        let tried = Buf::new(buf.len());
        let test = below.other().read(offset, tried.clone()).await;
        let raw = below.child().read(offset, buf.clone()).await;
        self.agree("a read", range, raw, test)?;
        let (right, tried) = (buf.to_vec(), tried.to_vec());
        match right.iter().zip(&tried).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(i) => Err(self.mismatch(&format!(
                "contents differ at {:#x}: 'raw' has {:#04x}, 'test' has {:#04x}",
                offset + i as u64,
                right[i],
                tried[i]
            ))),
        }
    }
}

impl Filter for Blkverify {
    fn map<'a>(&'a self, _: &'a Below, _: Access, range: ByteRange) -> Mapping<'a> {
        Mapping::Work { len: range.len() }
    }

    fn read<'a>(&'a self, below: &'a Below, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            let _held = self.held.lock(span(offset, &buf)?).await;
            let (mut at, mut left) = (offset, buf);
            while !left.is_empty() {
                let rest = left.split_off(left.len().min(PIECE));
                let n = left.len() as u64;
                self.read_piece(below, at, left).await?;
                (at, left) = (at + n, rest);
            }
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        below: &'a Below,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            let range = span(offset, &buf)?;
            let _held = self.held.lock(range).await;
            let test = below.other().write(offset, buf.clone(), flags).await;
            let raw = below.child().write(offset, buf, flags).await;
            self.agree("a write", range, raw, test)
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            if flags.no_fallback {
                // One side may be able to and the other not.
                return Err(Error::unsupported("zeros are written to two nodes"));
            }
            let _held = self.held.lock(range).await;
            let test = below.other().write_zeroes(range, flags).await;
            let raw = below.child().write_zeroes(range, flags).await;
            self.agree("a write of zeros", range, raw, test)
        })
    }

    fn discard<'a>(&'a self, _: &'a Below, _: ByteRange) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn flush<'a>(&'a self, below: &'a Below) -> IoFuture<'a> {
        Box::pin(async move {
            let test = below.other().flush().await;
            let raw = below.flush().await;
            self.agree("a flush", ByteRange::new(0, below.size()), raw, test)
        })
    }

    fn resize<'a>(&'a self, below: &'a Below, size: u64) -> IoFuture<'a> {
        Box::pin(async move {
            let children: [&Child; 2] = [below.other(), below.child()];
            for c in children {
                below.resize(c, size).await?;
            }
            Ok(())
        })
    }

    fn same_options(&self, options: Value) -> Result<()> {
        no_options(BLKVERIFY.name, &options)
    }
}

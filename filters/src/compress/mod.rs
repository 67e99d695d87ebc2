//! Filter compress: what is written through it is stored compressed by the image below
//! (BlockdevOptions, driver `compress`, of the QMP reference).
//!
//! It only says so with each write; compressing is the format's work, and so is what happens to
//! clusters that are written in part or again. Zeros stay zeros where whole clusters are; the rest
//! of such a request is written as data, so that the cluster is compressed anew. A child that
//! cannot store compressed data is refused.

#[cfg(test)]
mod tests;

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_node::{
    Access, DriverDef, IoFuture, Kind, Limits, Mapping, Node, OpenArgs, Opened, WriteFlags,
    ZeroFlags,
};
use serde_json::Value;

use crate::filter::{Below, FILE, Filter, Filtered, no_options};

/// The filter compress.
pub static COMPRESS: DriverDef = DriverDef {
    name: "compress",
    kind: Kind::Filter,
    children: FILE,
    open: |args| Box::pin(open(args)),
    create: None,
    probe: None,
    check: None,
};

async fn open(args: OpenArgs) -> Result<Opened> {
    no_options(COMPRESS.name, &args.options)?;
    let below = match args.children.first() {
        Some(c) => c.node().await,
        None => None,
    };
    if let Some(node) = below {
        check(&node)?;
    }
    Ok(Opened { driver: Filtered::open(args.children, Compress).await?, implicit: Vec::new() })
}

/// Fails unless `node` can store compressed data, and does not do so anyway.
fn check(node: &Node) -> Result<()> {
    let (name, driver) = (node.name(), node.def().name);
    if driver == COMPRESS.name {
        return Err(Error::invalid(format!(
            "node '{name}' compresses already: leave one of the two out"
        )));
    }
    match node.driver().compresses() {
        Some(_) => Ok(()),
        None => Err(Error::unsupported(format!(
            "node '{name}' (driver '{driver}') cannot store data compressed: 'file' must be an \
             image that can, such as one of format qcow2"
        ))),
    }
}

struct Compress;

impl Compress {
    /// Writes zeros as data to be compressed.
    async fn zeros_as_data(
        &self,
        below: &Below,
        range: ByteRange,
        flags: WriteFlags,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        below.child().write(range.start(), Buf::zeroed(range.len() as usize), flags).await
    }
}

impl Filter for Compress {
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
        Box::pin(below.child().write(offset, buf, WriteFlags { compressed: true, ..flags }))
    }

    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            let unit = u64::from(below.ask(|d| d.compresses()).flatten().unwrap_or(1));
            // What the end of the disk cuts short counts as whole.
            let to_end = range.end() == below.size();
            let end = if to_end { range.end() } else { range.end() - range.end() % unit };
            let start = range.start().next_multiple_of(unit).min(range.end());
            let inner = ByteRange::between(start, end.max(start));
            let parts = [
                ByteRange::between(range.start(), inner.start()),
                ByteRange::between(inner.end(), range.end()),
            ];
            let in_part = parts.iter().any(|p| !p.is_empty());
            if flags.no_fallback && in_part {
                return Err(Error::unsupported("parts of clusters would have to be compressed"));
            }
            if !inner.is_empty() {
                // Where that is not possible, zeros come as data, by way of this filter.
                let inside = ZeroFlags { no_fallback: true, ..flags };
                below.child().write_zeroes(inner, inside).await?;
            }
            let write = WriteFlags {
                unchanged: flags.unchanged,
                compressed: true,
                ..WriteFlags::default()
            };
            for p in parts {
                self.zeros_as_data(below, p, write).await?;
            }
            Ok(())
        })
    }

    fn limits(&self, below: Limits) -> Limits {
        Limits { align: below.preferred, ..below }
    }

    fn same_options(&self, options: Value) -> Result<()> {
        no_options(COMPRESS.name, &options)
    }
}

//! Filter blklogwrites: what is written to `file` is logged, in order, in `log`
//! (BlockdevOptionsBlklogwrites of the QMP reference). The log is that of the device mapper's
//! target log-writes; see [`log`].
//!
//! A write is logged once it has succeeded, and completes once it is logged. Writes that overlap
//! are logged in the order in which they were made. A write with FUA comes as a write and a flush
//! and is logged so. What could not be logged is missing in the log for good: from then on every
//! change is refused.

mod log;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};

use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_io::{Buf, RangeLock};
use gipfel_node::{
    Access, Binding, ChildSpec, DriverDef, IoFuture, Kind, Mapping, OpenArgs, Opened, Perm, Perms,
    Role, WriteFlags, ZeroFlags,
};
use serde::Deserialize;
use serde_json::Value;

use crate::filter::{Below, Filter, Filtered, parse, span};
use log::{Entry, Log};

/// The filter blklogwrites.
pub static BLKLOGWRITES: DriverDef = DriverDef {
    name: "blklogwrites",
    kind: Kind::Filter,
    children: &[
        ChildSpec {
            name: "file",
            role: Role::Filtered,
            binding: Binding::Position,
            required: true,
        },
        ChildSpec { name: "log", role: Role::Data, binding: Binding::Position, required: true },
    ],
    open: |args| Box::pin(open(args)),
    create: None,
    probe: None,
    check: None,
};

/// Entries after which the log's head is written, unless an option says otherwise.
const SUPER_INTERVAL: u64 = 4096;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    log_sector_size: Option<u32>,
    #[serde(default)]
    log_append: bool,
    log_super_update_interval: Option<u64>,
}

async fn open(args: OpenArgs) -> Result<Opened> {
    let given = args.options.clone();
    let o: Options = parse(BLKLOGWRITES.name, args.options)?;
    let interval = o.log_super_update_interval.unwrap_or(SUPER_INTERVAL);
    if interval == 0 {
        return Err(Error::invalid("log-super-update-interval is 0: give 1 or more"));
    }
    let [_, to] = &args.children[..] else {
        return Err(Error::invalid("driver 'blklogwrites' has two children, 'file' and 'log'"));
    };
    let log = match (o.log_append, o.log_sector_size) {
        (true, Some(_)) => {
            return Err(Error::invalid(
                "log-append goes on with the log's own sector size: leave log-sector-size out",
            ));
        }
        (true, None) => Log::read(to, interval).await.at(|| "child 'log'")?,
        (false, size) => Log::new(size.unwrap_or(log::SECTOR), interval)?,
    };
    let filter = Blklogwrites {
        given,
        name: args.node_name,
        log,
        held: RangeLock::new(),
        broken: AtomicBool::new(false),
    };
    Ok(Opened { driver: Filtered::open(args.children, filter).await?, implicit: Vec::new() })
}

struct Blklogwrites {
    /// The options as they were given.
    given: Value,
    name: String,
    log: Log,
    /// Ranges that are being changed and logged.
    held: RangeLock,
    /// Something that was written is not in the log.
    broken: AtomicBool,
}

impl Blklogwrites {
    /// `range` in whole sectors of the log.
    fn widen(&self, range: ByteRange) -> ByteRange {
        range.widen(self.log.sector()).unwrap_or(range)
    }

    fn is_whole(&self) -> Result<()> {
        if !self.broken.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::os(
            5,
            format!("node '{}': an earlier change could not be logged; writing", self.name),
        ))
    }

    async fn append(&self, below: &Below, entry: Entry, data: Option<Buf>) -> Result<()> {
        let done = self.log.append(below.other(), entry, data).await;
        if done.is_err() {
            self.broken.store(true, Ordering::Release);
        }
        done.at(|| format!("node '{}': the log", self.name))
    }

    /// The bytes of the whole sectors `wide`: `buf` in `range`, and what is stored around it.
    async fn whole_sectors(
        &self,
        below: &Below,
        range: ByteRange,
        wide: ByteRange,
        buf: &Buf,
    ) -> Result<Buf> {
        let all = Buf::zeroed(wide.len() as usize);
        let window = |r: ByteRange| {
            let at = (r.start() - wide.start()) as usize;
            all.slice(at..at + r.len() as usize)
        };
        let stored = ByteRange::new(0, below.size());
        let around = [
            ByteRange::between(wide.start(), range.start()),
            ByteRange::between(range.end(), wide.end()),
        ];
        for r in around.into_iter().filter_map(|r| r.intersect(stored)) {
            below.child().read(r.start(), window(r)).await?;
        }
        window(range).copy_from_buf(0, buf);
        Ok(all)
    }
}

impl Filter for Blklogwrites {
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
            let range = span(offset, &buf)?;
            let wide = self.widen(range);
            let _held = self.held.lock(wide).await;
            self.is_whole()?;
            // Logged is what was written, even if the client changes its buffer meanwhile.
            let all = self.whole_sectors(below, range, wide, &buf).await?;
            let at = (range.start() - wide.start()) as usize;
            below.child().write(offset, all.slice(at..at + buf.len()), flags).await?;
            self.append(below, Entry::write(wide, self.log.sector()), Some(all)).await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            let wide = self.widen(range);
            if wide != range {
                // What lies around is logged with it, as with data.
                return Err(Error::unsupported("zeros are logged in whole sectors"));
            }
            let _held = self.held.lock(wide).await;
            self.is_whole()?;
            below.child().write_zeroes(range, flags).await?;
            self.append(below, Entry::write(wide, self.log.sector()), None).await
        })
    }

    fn discard<'a>(&'a self, below: &'a Below, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            let _held = self.held.lock(self.widen(range)).await;
            self.is_whole()?;
            below.child().discard(range).await?;
            match range.narrow(self.log.sector()) {
                Some(r) if !r.is_empty() => {
                    self.append(below, Entry::discard(r, self.log.sector()), None).await
                }
                _ => Ok(()),
            }
        })
    }

    fn flush<'a>(&'a self, below: &'a Below) -> IoFuture<'a> {
        Box::pin(async move {
            below.flush().await?;
            // Of a node that only reads nothing is logged.
            let writes = below.other().granted().contains(Perm::WRITE);
            if writes || self.log.is_unfinished() {
                self.append(below, Entry::FLUSH, None).await?;
                self.log.finish(below.other()).await?;
            }
            Ok(())
        })
    }

    fn other_perms(&self, _: Role, above: Perms, writable: bool) -> Perms {
        // The log is written by this node alone.
        let used = match writable && above.writes() {
            true => Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE,
            false => Perm::CONSISTENT_READ,
        };
        Perms { used, shared: Perm::CONSISTENT_READ }
    }

    fn same_options(&self, options: Value) -> Result<()> {
        if options == self.given {
            return Ok(());
        }
        Err(Error::unsupported(
            "no option of driver 'blklogwrites' can be changed while it is open",
        ))
    }

    fn close<'a>(&'a self, below: &'a Below) -> IoFuture<'a> {
        Box::pin(async move {
            match self.log.is_unfinished() {
                true => self.log.finish(below.other()).await,
                false => Ok(()),
            }
        })
    }
}

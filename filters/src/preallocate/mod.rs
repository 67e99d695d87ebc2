//! Filter preallocate: a file that grows with its writes grows in large allocated steps
//! (BlockdevOptionsPreallocate of the QMP reference). Made for a `file` node under a format.
//!
//! A write past the end makes the file reach to `prealloc-size` bytes behind what is written,
//! rounded up to `prealloc-align`, all of it allocated and reading as zeros. Above the filter the
//! length is that of the data. The file is cut back to that when nobody writes through the filter
//! any more and when the node goes; a process that is killed leaves it longer, which formats do
//! not mind. Where the file cannot be made longer in advance, it grows with its data as ever.

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_lock::Mutex;
use gipfel_base::units::{MIB, SECTOR};
use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_node::{
    Access, DriverDef, IoFuture, Kind, Mapping, OpenArgs, Opened, Perm, Perms, Reopen, WriteFlags,
    ZeroFlags,
};
use serde::Deserialize;
use serde_json::Value;

use crate::filter::{Below, FILE, Filter, Filtered, parse, span};

/// The filter preallocate.
pub static PREALLOCATE: DriverDef = DriverDef {
    name: "preallocate",
    kind: Kind::Filter,
    children: FILE,
    open: |args| Box::pin(open(args)),
    create: None,
    probe: None,
    check: None,
};

/// Nothing is preallocated: the data end where the file does.
const AT_FILE_END: u64 = u64::MAX;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    #[serde(default = "default_align")]
    prealloc_align: u64,
    #[serde(default = "default_size")]
    prealloc_size: u64,
}

fn default_align() -> u64 {
    MIB
}

fn default_size() -> u64 {
    128 * MIB
}

impl Options {
    fn parse(options: Value) -> Result<Options> {
        let o: Options = parse(PREALLOCATE.name, options)?;
        if !o.prealloc_align.is_multiple_of(SECTOR) {
            return Err(Error::invalid(format!(
                "prealloc-align is {}: it must be a multiple of {SECTOR}",
                o.prealloc_align
            )));
        }
        Ok(o)
    }
}

async fn open(args: OpenArgs) -> Result<Opened> {
    let options = Options::parse(args.options)?;
    let steps = Steps::default();
    steps.set(&options);
    let filter = Preallocate {
        steps: Arc::new(steps),
        data_end: AtomicU64::new(AT_FILE_END),
        growing: Mutex::new(()),
    };
    Ok(Opened { driver: Filtered::open(args.children, filter).await?, implicit: Vec::new() })
}

/// How far ahead the file grows, in bytes; a reopen changes it.
#[derive(Default)]
struct Steps {
    align: AtomicU64,
    size: AtomicU64,
}

impl Steps {
    fn set(&self, o: &Options) {
        self.align.store(o.prealloc_align.max(1), Ordering::Relaxed);
        self.size.store(o.prealloc_size, Ordering::Relaxed);
    }

    /// Where the file is to end if its data end at `end`.
    fn after(&self, end: u64) -> Option<u64> {
        let far = end.checked_add(self.size.load(Ordering::Relaxed))?;
        far.checked_next_multiple_of(self.align.load(Ordering::Relaxed))
    }
}

struct Preallocate {
    steps: Arc<Steps>,
    /// Where the data end, in bytes; what the file has behind reads as zeros.
    data_end: AtomicU64,
    /// Held while the file's length is changed.
    growing: Mutex<()>,
}

impl Preallocate {
    fn end(&self, below: &Below) -> u64 {
        self.data_end.load(Ordering::SeqCst).min(below.size())
    }

    /// The data reach at least to `end`.
    fn reaches(&self, end: u64) {
        let now = self.data_end.load(Ordering::SeqCst);
        if now != AT_FILE_END {
            self.data_end.fetch_max(end, Ordering::SeqCst);
        }
    }

    /// Makes the file reach to `end` and beyond, if it does not and can; whoever calls holds
    /// `growing`.
    async fn grow(&self, below: &Below, end: u64) {
        let file_end = below.size();
        let Some(to) = self.steps.after(end).filter(|_| end > file_end) else { return };
        // The length stays what it is while the file gets longer.
        let _ = self.data_end.compare_exchange(
            AT_FILE_END,
            file_end,
            Ordering::SeqCst,
            Ordering::SeqCst,
        );
        let flags = ZeroFlags { no_fallback: true, ..ZeroFlags::default() };
        // It is a help only: where it fails, the write itself makes the file longer.
        let _ = below.child().write_zeroes(ByteRange::between(file_end, to), flags).await;
    }

    /// Makes the file end where its data do.
    async fn cut(&self, below: &Below) -> Result<()> {
        let _alone = self.growing.lock().await;
        let end = self.data_end.load(Ordering::SeqCst);
        if end < below.size() {
            below.resize(below.child(), end).await?;
        }
        self.data_end.store(AT_FILE_END, Ordering::SeqCst);
        Ok(())
    }
}

impl Filter for Preallocate {
    fn size(&self, below: &Below) -> u64 {
        self.end(below)
    }

    fn map<'a>(&'a self, below: &'a Below, access: Access, range: ByteRange) -> Mapping<'a> {
        match access {
            Access::Write if range.end() > self.end(below) => Mapping::Work { len: range.len() },
            _ => below.straight(range),
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
            let end = span(offset, &buf)?.end();
            if end > self.end(below) {
                let _alone = self.growing.lock().await;
                self.grow(below, end).await;
            }
            let done = below.child().write(offset, buf, flags).await;
            // What a failed write left behind does not show as zeros later.
            self.reaches(end.min(below.size()));
            done
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            let old = self.end(below);
            if range.end() <= old {
                return below.child().write_zeroes(range, flags).await;
            }
            let alone = self.growing.lock().await;
            self.grow(below, range.end()).await;
            let old = self.end(below).clamp(range.start(), range.end());
            let mut left = range;
            if range.end() <= below.size() {
                // What lies behind the data reads as zeros already.
                self.reaches(range.end());
                left = ByteRange::between(range.start(), old);
            }
            drop(alone);
            if !left.is_empty() {
                below.child().write_zeroes(left, flags).await?;
                self.reaches(left.end());
            }
            Ok(())
        })
    }

    fn resize<'a>(&'a self, below: &'a Below, size: u64) -> IoFuture<'a> {
        Box::pin(async move {
            let _alone = self.growing.lock().await;
            let now = self.data_end.load(Ordering::SeqCst);
            if now != AT_FILE_END && (now..=below.size()).contains(&size) {
                self.data_end.store(size, Ordering::SeqCst);
                return Ok(());
            }
            below.resize(below.child(), size).await?;
            self.data_end.store(AT_FILE_END, Ordering::SeqCst);
            Ok(())
        })
    }

    fn child_perms(&self, above: Perms, writable: bool) -> Perms {
        if !writable || !above.writes() {
            return above;
        }
        let length = Perm::WRITE | Perm::RESIZE;
        Perms { used: above.used | length, shared: above.shared & !length }
    }

    fn set_perms<'a>(&'a self, below: &'a Below, perms: Perms) -> IoFuture<'a> {
        Box::pin(async move { if perms.writes() { Ok(()) } else { self.cut(below).await } })
    }

    fn reopen(&self, options: Value) -> Result<Box<dyn Reopen>> {
        struct Prepared(Arc<Steps>, Options);
        impl Reopen for Prepared {
            fn commit(self: Box<Self>) {
                self.0.set(&self.1);
            }
        }
        Ok(Box::new(Prepared(self.steps.clone(), Options::parse(options)?)))
    }

    fn close<'a>(&'a self, below: &'a Below) -> IoFuture<'a> {
        Box::pin(self.cut(below))
    }
}

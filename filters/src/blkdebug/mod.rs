//! Filter blkdebug: makes requests fail by rules, holds them at breakpoints, and shows a child
//! with other limits than its own (BlockdevOptionsBlkdebug of the QMP reference).
//!
//! Rules wait for events, which the node above tells (see [`gipfel_node::debug`]); those of a
//! write as such are told here. Which requests fail is in [`rules`], the file that can hold rules
//! in [`config`], breakpoints in [`breaks`]. Limits are kept here: unaligned requests are widened,
//! long ones are cut.

mod breaks;
mod config;
mod rules;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use gipfel_base::{ByteRange, Error, ErrorKind, Result, ResultExt};
use gipfel_io::{Buf, File, OpenOptions, RangeLock, yield_now};
use gipfel_node::{
    Access, Binding, ChildSpec, DebugEvent, Debugger, DriverDef, FromName, Held, IoFuture, Kind,
    Limits, Mapping, NameFor, OpenArgs, Opened, Perm, Perms, Role, Status, WriteFlags, ZeroFlags,
};
use serde::Deserialize;
use serde_json::Value;

use crate::filter::{Below, Filter, Filtered, parse};
use breaks::Breaks;
use config::Config;
use rules::{InjectError, IoType, Rules, SetState};

/// The filter blkdebug.
pub static BLKDEBUG: DriverDef = DriverDef {
    name: "blkdebug",
    kind: Kind::Filter,
    children: &[ChildSpec {
        name: "image",
        role: Role::Filtered,
        binding: Binding::Position,
        required: true,
    }],
    open: |args| Box::pin(open(args)),
    create: None,
    probe: None,
    check: None,
};

/// Largest file of rules, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
/// Largest alignment that can be asked for, in bytes: a request may need two such buffers more.
const MAX_ALIGN: u64 = 32 << 20;
/// Zeros are written in pieces of this size where they must be written as data, in bytes.
const ZEROS: u64 = 1 << 20;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    config: Option<String>,
    align: Option<u64>,
    max_transfer: Option<u32>,
    opt_write_zero: Option<u32>,
    max_write_zero: Option<u32>,
    opt_discard: Option<u32>,
    max_discard: Option<u32>,
    #[serde(default)]
    inject_error: Vec<InjectError>,
    #[serde(default)]
    set_state: Vec<SetState>,
    #[serde(default)]
    take_child_perms: Vec<String>,
    #[serde(default)]
    unshare_child_perms: Vec<String>,
}

async fn open(args: OpenArgs) -> Result<Opened> {
    let given = args.options.clone();
    let options: Options = parse(BLKDEBUG.name, args.options)?;
    let bounds = Bounds::new(&options)?;
    let Config { mut injects, mut changes } = match &options.config {
        Some(name) => read_config(name).await?,
        None => Config::default(),
    };
    injects.extend(options.inject_error);
    changes.extend(options.set_state);
    let mut rules = Rules::new(&injects, &changes)?;
    rules.event(DebugEvent::Created);
    let filter = Blkdebug {
        given,
        bounds,
        rules: Mutex::new(rules),
        breaks: Breaks::default(),
        held: RangeLock::new(),
        take: perms(&options.take_child_perms)?,
        unshare: perms(&options.unshare_child_perms)?,
    };
    Ok(Opened { driver: Filtered::open(args.children, filter).await?, implicit: Vec::new() })
}

/// Reads the rest of a file name `blkdebug:[CONFIG]:IMAGE`: a file of rules, and the storage that
/// it stands on.
pub fn read_name(rest: &str) -> Result<FromName> {
    let (config, image) = rest.split_once(':').ok_or_else(|| {
        Error::invalid("two parts are missing: blkdebug:[FILE OF RULES]:FILE NAME OF THE IMAGE")
    })?;
    let config = (!config.is_empty()).then(|| ("config".to_owned(), config.into()));
    Ok(FromName {
        options: config.into_iter().collect(),
        children: vec![("image", image.to_owned(), NameFor::Storage)],
    })
}

async fn read_config(name: &str) -> Result<Config> {
    let text = async {
        let file = File::open(Path::new(name), OpenOptions::default()).await?;
        let len = file.info().await?.len;
        if len > MAX_CONFIG {
            let text = format!("it has {len} bytes, a file of rules has at most {MAX_CONFIG}");
            return Err(Error::new(ErrorKind::Limit, text));
        }
        let buf = Buf::new(len as usize);
        file.read_at(0, buf.clone()).await?;
        String::from_utf8(buf.to_vec()).map_err(|_| Error::invalid("it is not UTF-8 text"))
    };
    let text = text.await.at(|| format!("file of rules '{name}'"))?;
    config::parse(name, &text)
}

fn perms(names: &[String]) -> Result<Perm> {
    let all = [Perm::CONSISTENT_READ, Perm::WRITE, Perm::WRITE_UNCHANGED, Perm::RESIZE];
    names.iter().try_fold(Perm::NONE, |sum, name| {
        let found = all.iter().find(|p| p.names().eq([name.as_str()]));
        let unknown = || Error::invalid(format!("there is no permission '{name}'"));
        found.map(|p| sum | *p).ok_or_else(unknown)
    })
}

/// What requests the child gets, in bytes.
#[derive(Debug)]
struct Bounds {
    /// Offsets and lengths are multiples of it; 1 where any will do.
    align: u64,
    max_transfer: u64,
    opt_write_zero: u64,
    max_write_zero: u64,
    opt_discard: u64,
    max_discard: u64,
}

impl Bounds {
    fn new(o: &Options) -> Result<Bounds> {
        let align = o.align.filter(|a| *a != 0).unwrap_or(1);
        if !align.is_power_of_two() || align > MAX_ALIGN {
            return Err(Error::invalid(format!(
                "align {align} is not a power of two up to {MAX_ALIGN}"
            )));
        }
        let bound = |name: &str, given: Option<u32>, unit: u64, none: u64| {
            let n = u64::from(given.unwrap_or(0));
            if n % unit != 0 {
                let text = format!("{name} {n} is not a multiple of {unit}");
                return Err(Error::invalid(text));
            }
            Ok(if n == 0 { none } else { n })
        };
        let opt_write_zero = bound("opt-write-zero", o.opt_write_zero, align, align)?;
        let opt_discard = bound("opt-discard", o.opt_discard, align, align)?;
        let max = u64::MAX;
        Ok(Bounds {
            align,
            max_transfer: bound("max-transfer", o.max_transfer, align, max)?,
            opt_write_zero,
            max_write_zero: bound("max-write-zero", o.max_write_zero, opt_write_zero, max)?,
            opt_discard,
            max_discard: bound("max-discard", o.max_discard, opt_discard, max)?,
        })
    }
}

/// The pieces of `range` that are at most `most` bytes long.
fn pieces(range: ByteRange, most: u64) -> impl Iterator<Item = ByteRange> {
    let mut left = range;
    std::iter::from_fn(move || {
        let piece = left.take(most);
        left = left.skip(piece.len());
        (!piece.is_empty()).then_some(piece)
    })
}

/// The whole units in `range`; what its end cuts short at the end of the disk counts as one.
fn inner(range: ByteRange, unit: u64, size: u64) -> ByteRange {
    let end = if range.end() == size { range.end() } else { range.end() / unit * unit };
    let start = range.start().div_ceil(unit).saturating_mul(unit).min(range.end());
    ByteRange::between(start, end.max(start))
}

/// The window of `buf`, the bytes of `whole`, in which `part` lies.
fn window(buf: &Buf, whole: ByteRange, part: ByteRange) -> Buf {
    let at = (part.start() - whole.start()) as usize;
    buf.slice(at..at + part.len() as usize)
}

struct Blkdebug {
    /// The options as they were given.
    given: Value,
    bounds: Bounds,
    rules: Mutex<Rules>,
    breaks: Breaks,
    /// Ranges that are being changed, where they are widened.
    held: RangeLock,
    take: Perm,
    unshare: Perm,
}

impl Blkdebug {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn happens(&self, event: DebugEvent) {
        if let Some(held) = self.event(event) {
            held.await;
        }
    }

    /// Fails where a rule says so. A flush has no range.
    async fn inject(&self, io: IoType, range: Option<ByteRange>) -> Result<()> {
        let Some(f) = self.rules().check(io, range) else { return Ok(()) };
        if !f.immediately {
            yield_now().await;
        }
        Err(injected(f.errno, io, range))
    }

    /// `range` in whole blocks, as far as the disk goes.
    fn widen(&self, below: &Below, range: ByteRange) -> ByteRange {
        let wide = range.widen(self.bounds.align).unwrap_or(range);
        let end = wide.end().min(below.size().max(range.end()));
        ByteRange::between(wide.start(), end)
    }

    async fn read_pieces(&self, below: &Below, range: ByteRange, buf: &Buf) -> Result<()> {
        for p in pieces(range, self.bounds.max_transfer) {
            self.inject(IoType::Read, Some(p)).await?;
            below.child().read(p.start(), window(buf, range, p)).await?;
        }
        Ok(())
    }

    /// Reads the block around `at`, the first or last byte of a write, into the buffer of `wide`.
    async fn read_block(&self, below: &Below, at: u64, wide: ByteRange, buf: &Buf) -> Result<()> {
        let block = self.widen(below, ByteRange::new(at, 1)).intersect(wide);
        let stored = block.and_then(|b| b.intersect(ByteRange::new(0, below.size())));
        match stored {
            Some(r) => self.read_pieces(below, r, &window(buf, wide, r)).await,
            None => Ok(()),
        }
    }

    /// The bytes of `wide`: `buf`, the data of `range`, with what lies around it in its blocks.
    async fn fill_up(
        &self,
        below: &Below,
        range: ByteRange,
        wide: ByteRange,
        buf: &Buf,
    ) -> Result<Buf> {
        let all = Buf::zeroed(wide.len() as usize);
        let one_block = wide.len() <= self.bounds.align;
        if range.start() > wide.start() || one_block {
            self.happens(DebugEvent::PwritevRmwHead).await;
            self.read_block(below, wide.start(), wide, &all).await?;
            self.happens(DebugEvent::PwritevRmwAfterHead).await;
        }
        if range.end() < wide.end() && !one_block {
            self.happens(DebugEvent::PwritevRmwTail).await;
            self.read_block(below, wide.end() - 1, wide, &all).await?;
            self.happens(DebugEvent::PwritevRmwAfterTail).await;
        }
        window(&all, wide, range).copy_from_buf(0, buf);
        Ok(all)
    }

    async fn write_range(
        &self,
        below: &Below,
        range: ByteRange,
        buf: Buf,
        flags: WriteFlags,
    ) -> Result<()> {
        let wide = self.widen(below, range);
        let _held = match self.bounds.align {
            1 => None,
            _ => Some(self.held.lock(wide).await),
        };
        let buf = match wide == range {
            true => buf,
            false => self.fill_up(below, range, wide, &buf).await?,
        };
        self.happens(DebugEvent::Pwritev).await;
        let write = async {
            for p in pieces(wide, self.bounds.max_transfer) {
                self.inject(IoType::Write, Some(p)).await?;
                below.child().write(p.start(), window(&buf, wide, p), flags).await?;
            }
            Ok(())
        };
        let done = write.await;
        self.happens(DebugEvent::PwritevDone).await;
        done
    }

    async fn zero_whole(&self, below: &Below, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let _held = match self.bounds.align {
            1 => None,
            _ => Some(self.held.lock(range).await),
        };
        self.happens(DebugEvent::PwritevZero).await;
        let zero = async {
            for p in pieces(range, self.bounds.max_write_zero) {
                self.inject(IoType::WriteZeroes, Some(p)).await?;
                below.child().write_zeroes(p, flags).await?;
            }
            Ok(())
        };
        let done = zero.await;
        self.happens(DebugEvent::PwritevDone).await;
        done
    }

    async fn zero_range(&self, below: &Below, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let whole = inner(range, self.bounds.opt_write_zero, below.size());
        let head = ByteRange::between(range.start(), whole.start());
        let tail = ByteRange::between(whole.end(), range.end());
        if flags.no_fallback && !(head.is_empty() && tail.is_empty()) {
            return Err(Error::unsupported("part of a block would have to be written as data"));
        }
        let write = WriteFlags { unchanged: flags.unchanged, ..WriteFlags::default() };
        for p in pieces(head, ZEROS).chain(pieces(tail, ZEROS)) {
            self.write_range(below, p, Buf::zeroed(p.len() as usize), write).await?;
        }
        match whole.is_empty() {
            true => Ok(()),
            false => self.zero_whole(below, whole, flags).await,
        }
    }
}

/// The error that a rule injects. Its number is the rule's, whatever kind of error that means.
fn injected(errno: i32, io: IoType, range: Option<ByteRange>) -> Error {
    let place =
        range.map_or(String::new(), |r| format!(" of {} bytes at {:#x}", r.len(), r.start()));
    let error = Error::os(errno, format!("injected into a {}{place}", io.name()));
    match error.errno() == errno {
        true => error,
        false => Error::new(ErrorKind::Os(errno), error.to_string()),
    }
}

impl Debugger for Blkdebug {
    fn event(&self, event: DebugEvent) -> Option<Held<'_>> {
        self.rules().event(event);
        self.breaks.reach(event)
    }

    fn set_break(&self, event: DebugEvent, tag: &str) {
        self.breaks.set(event, tag);
    }

    fn remove_break(&self, tag: &str) -> Result<()> {
        self.breaks.remove(tag)
    }

    fn resume(&self, tag: &str) -> Result<()> {
        self.breaks.resume(tag)
    }

    fn wait_break<'a>(&'a self, tag: &'a str) -> Held<'a> {
        Box::pin(self.breaks.wait(tag))
    }

    fn status(&self, offset: u64, len: u64) -> Result<()> {
        let range = ByteRange::checked(offset, len);
        match self.rules().check(IoType::BlockStatus, range) {
            Some(f) => Err(injected(f.errno, IoType::BlockStatus, range)),
            None => Ok(()),
        }
    }
}

impl Filter for Blkdebug {
    fn map<'a>(&'a self, _: &'a Below, _: Access, range: ByteRange) -> Mapping<'a> {
        Mapping::Work { len: range.len() }
    }

    fn read<'a>(&'a self, below: &'a Below, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            let range = ByteRange::new(offset, buf.len() as u64);
            let wide = self.widen(below, range);
            if wide == range {
                return self.read_pieces(below, range, &buf).await;
            }
            let all = Buf::new(wide.len() as usize);
            self.read_pieces(below, wide, &all).await?;
            buf.copy_from_buf(0, &window(&all, wide, range));
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
        let range = ByteRange::new(offset, buf.len() as u64);
        Box::pin(self.write_range(below, range, buf, flags))
    }

    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(self.zero_range(below, range, flags))
    }

    fn discard<'a>(&'a self, below: &'a Below, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            let whole = inner(range, self.bounds.opt_discard, below.size());
            let _held = match self.bounds.align {
                1 => None,
                _ => Some(self.held.lock(whole).await),
            };
            for p in pieces(whole, self.bounds.max_discard) {
                self.inject(IoType::Discard, Some(p)).await?;
                below.child().discard(p).await?;
            }
            Ok(())
        })
    }

    fn flush<'a>(&'a self, below: &'a Below) -> IoFuture<'a> {
        Box::pin(async move {
            self.inject(IoType::Flush, None).await?;
            below.flush().await
        })
    }

    fn status<'a>(&'a self, below: &'a Below, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move {
            self.inject(IoType::BlockStatus, Some(range)).await?;
            below.child().status(range).await
        })
    }

    fn limits(&self, below: Limits) -> Limits {
        Limits { align: below.align.max(self.bounds.align as u32), ..below }
    }

    fn child_perms(&self, above: Perms, _: bool) -> Perms {
        Perms { used: above.used | self.take, shared: above.shared & !self.unshare }
    }

    fn debugger(&self) -> Option<&dyn Debugger> {
        Some(self)
    }

    fn same_options(&self, options: Value) -> Result<()> {
        if options == self.given {
            return Ok(());
        }
        Err(Error::unsupported("no option of driver 'blkdebug' can be changed while it is open"))
    }
}

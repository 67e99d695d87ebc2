//! Driver `file`: a regular file or a block device of the host.
//!
//! Plain requests are only mapped here; the runner carries them out. What the driver does itself
//! is the rest: growing, direct I/O that is not aligned ([`direct`]), zeros and discard
//! ([`space`]), flushes ([`flush`]), locks against other processes ([`lock`]), creating
//! ([`create`]). Options are those of BlockdevOptionsFile in the QMP reference.

mod create;
mod direct;
mod flush;
mod lock;
mod options;
mod reopen;
mod space;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use gipfel_base::{ByteRange, Error, ErrorKind, Result, ResultExt};
use gipfel_io::{Buf, File, FileKind, OpenOptions, RangeLock};
use gipfel_node::{
    Ability, Access, Common, Discard, Driver, DriverDef, DriverInfo, IoFuture, Kind, Limits,
    Mapping, OpenArgs, Opened, Perms, Reopen, Status, WriteFlags, ZeroFlags,
};
use serde_json::{Value, json};

use direct::Direct;
use flush::Flushes;
use lock::Locks;
use options::Options;
use reopen::Flags;

/// The driver `file`.
pub static FILE: DriverDef = DriverDef {
    name: "file",
    kind: Kind::Protocol,
    children: &[],
    open: |args| Box::pin(open(args)),
    create: Some(|args| Box::pin(create::create(args))),
    probe: None,
    check: None,
};

/// An open file.
struct FileDriver {
    options: Options,
    path: PathBuf,
    /// As it was opened first; carries the locks.
    first: File,
    /// Whether that was for writing too.
    first_writes: bool,
    /// Opened for writing later, when somebody came who writes.
    second: OnceLock<File>,
    direct_io: bool,
    kind: FileKind,
    /// Length in bytes as far as this node knows it: it grows with its writes.
    size: AtomicU64,
    flags: Arc<Flags>,
    no_flush: bool,
    direct: Direct,
    /// What must not overlap: growing, and read-modify-write of blocks.
    ranges: RangeLock,
    locks: Locks,
    /// The data extent that was looked up last.
    extent: Mutex<Option<ByteRange>>,
    space: space::Ability,
    flushes: Flushes,
}

async fn open(args: OpenArgs) -> Result<Opened> {
    let options = Options::parse(args.options, &args.common)?;
    let driver = FileDriver::open(options, args.common).await?;
    Ok(Opened { driver: Box::new(driver), implicit: Vec::new() })
}

impl FileDriver {
    async fn open(options: Options, common: Common) -> Result<FileDriver> {
        let path = PathBuf::from(&options.filename);
        // With auto-read-only it is opened for writing once somebody writes.
        let write = !common.read_only && !common.auto_read_only;
        let how = OpenOptions { write, direct: common.direct, ..OpenOptions::default() };
        let first = File::open(&path, how).await?;
        let at = || format!("'{}'", options.filename);
        let info = first.info().await.at(at)?;
        if info.kind == FileKind::Char {
            return Err(Error::invalid(
                "it is a character device; driver 'file' takes regular \
                 files and block devices",
            )
            .context(at()));
        }
        let locks = Locks::new(if common.force_share { lock::Use::Off } else { options.locking });
        Ok(FileDriver {
            options,
            path,
            first,
            first_writes: write,
            second: OnceLock::new(),
            direct_io: common.direct,
            kind: info.kind,
            size: AtomicU64::new(info.len),
            flags: Arc::new(Flags {
                writable: AtomicBool::new(write),
                may_write: AtomicBool::new(!common.read_only),
                unmap: AtomicBool::new(common.discard == Discard::Unmap),
            }),
            no_flush: common.no_flush,
            direct: Direct::new(info.offset_align),
            ranges: RangeLock::new(),
            locks,
            extent: Mutex::default(),
            space: space::Ability::default(),
            flushes: Flushes::default(),
        })
    }

    fn file(&self) -> &File {
        self.second.get().unwrap_or(&self.first)
    }

    fn grown_to(&self, end: u64) {
        self.size.fetch_max(end, Ordering::AcqRel);
    }

    fn at(&self) -> String {
        format!("'{}'", self.options.filename)
    }

    fn check_writable(&self) -> Result<()> {
        if self.flags.writable.load(Ordering::Acquire) {
            return Ok(());
        }
        let why = if self.flags.may_write.load(Ordering::Acquire) {
            "it is open for reading only, because nobody asked for writing"
        } else {
            "it was opened with read-only=on"
        };
        Err(Error::new(ErrorKind::ReadOnly, why).context(self.at()))
    }

    /// Opens the file for writing if it is not open so already.
    async fn become_writable(&self) -> Result<()> {
        if self.flags.writable.load(Ordering::Acquire) {
            return Ok(());
        }
        if !self.flags.may_write.load(Ordering::Acquire) {
            // A reopen for writing that is prepared but not committed has the file open already.
            return if self.first_writes || self.second.get().is_some() {
                Ok(())
            } else {
                self.check_writable()
            };
        }
        self.open_for_writing().await?;
        self.flags.writable.store(true, Ordering::Release);
        Ok(())
    }

    async fn open_for_writing(&self) -> Result<()> {
        if !self.first_writes && self.second.get().is_none() {
            let how = OpenOptions { write: true, direct: self.direct_io, ..Default::default() };
            let file = File::open(&self.path, how).await.map_err(|e| match e.errno() {
                EROFS | EACCES | EPERM => Error::new(ErrorKind::ReadOnly, e.to_string()),
                _ => e,
            })?;
            let (old, new) = (self.first.info().await?, file.info().await?);
            if old.identity != new.identity {
                return Err(Error::new(
                    ErrorKind::InUse,
                    "another file has taken its name since it was opened",
                )
                .context(self.at()));
            }
            // Whoever was first has put the same file there.
            let _ = self.second.set(file);
        }
        Ok(())
    }

    async fn resize_file(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        if size > MAX_SIZE {
            let text = format!("{size} bytes are more than a file can have ({MAX_SIZE})");
            return Err(Error::invalid(text).context(self.at()));
        }
        if self.kind != FileKind::Regular {
            return match self.first.info().await?.len {
                // A device changes its size by itself; this makes the node see it.
                len if size <= len => {
                    self.size.store(len, Ordering::Release);
                    Ok(())
                }
                len => Err(Error::unsupported(format!(
                    "{} is a device of {len} bytes and cannot grow to {size}",
                    self.at()
                ))),
            };
        }
        let held = self.ranges.lock(ByteRange::between(size.min(self.size()), u64::MAX)).await;
        *self.known_extent() = None;
        self.file().set_len(size).await.at(|| self.at())?;
        self.size.store(size, Ordering::Release);
        drop(held);
        Ok(())
    }
}

/// Largest file that the system can have, in bytes.
const MAX_SIZE: u64 = i64::MAX as u64;

const EPERM: i32 = 1;
const EACCES: i32 = 13;
const EROFS: i32 = 30;

impl Driver for FileDriver {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn map(&self, access: Access, range: ByteRange) -> Mapping<'_> {
        let file = || Mapping::File {
            file: self.file(),
            offset: range.start(),
            len: range.len(),
            pin: None,
        };
        match access {
            Access::Read if self.direct.suits(range) => file(),
            Access::Write
                if self.flags.writable.load(Ordering::Acquire) && range.end() <= self.size() =>
            {
                if !self.direct.is_on() {
                    return file();
                }
                match self.direct.pin(range) {
                    Some(pin) => Mapping::File {
                        file: self.file(),
                        offset: range.start(),
                        len: range.len(),
                        pin: Some(pin),
                    },
                    None => Mapping::Work { len: range.len() },
                }
            }
            _ => Mapping::Work { len: range.len() },
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move { self.read_around(offset, buf).await.at(|| self.at()) })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, _: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            self.check_writable()?;
            self.write_held(offset, buf).await.at(|| self.at())
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            self.check_writable()?;
            self.zero(range, flags).await.at(|| self.at())
        })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            self.check_writable()?;
            self.punch(range).await.at(|| self.at())
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(self.flush_file())
    }

    fn unflushed(&self) -> u64 {
        // Direct writes are past the page cache already.
        if self.direct_io { 0 } else { self.file().unsynced() }
    }

    fn write_back<'a>(
        &'a self,
        enough: &'a dyn Fn() -> bool,
    ) -> Pin<Box<dyn Future<Output = ()> + 'a>> {
        Box::pin(self.write_back_file(enough))
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(self.extent_status(range))
    }

    fn grows(&self) -> bool {
        self.kind == FileKind::Regular
    }

    fn reads_zero_when_new(&self) -> bool {
        self.kind == FileKind::Regular
    }

    fn zero_ability(&self) -> Ability {
        self.space.zeroes()
    }

    fn limits(&self) -> Limits {
        Limits { align: self.direct.align(), preferred: 4096 }
    }

    fn set_perms<'a>(&'a self, perms: Perms) -> IoFuture<'a> {
        Box::pin(async move {
            self.locks.set(&self.first, &self.options.filename, perms).await?;
            if perms.writes() { self.become_writable().await } else { Ok(()) }
        })
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        Box::pin(self.resize_file(size))
    }

    fn reopen<'a>(&'a self, options: Value, read_only: bool) -> IoFuture<'a, Box<dyn Reopen>> {
        Box::pin(self.prepare_reopen(options, read_only))
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        Box::pin(async move {
            let i = self.first.info().await.at(|| self.at())?;
            Ok(DriverInfo {
                filename: Some(self.options.filename.clone()),
                allocated: Some(i.allocated),
                // A file is as its last write left it.
                dirty: Some(false),
                specific: Some(json!({ "type": "file", "data": {} })),
                ..DriverInfo::default()
            })
        })
    }
}

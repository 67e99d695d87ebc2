//! Files and block devices: whole reads and writes, flush, space, extents, sizes, byte locks.
//!
//! A read past the end gives zeros, a write is whole or an error. What a format or a client sees
//! of it is decided above. With O_DIRECT offsets and lengths must be aligned by the caller (see
//! [`FileInfo`]); memory that is not aligned goes through a bounce buffer here.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use io_uring::{opcode, types::Fd, types::FsyncFlags};

use crate::blocking::call;
use crate::buf::Buf;
use crate::op::{Keep, Op, check};
use crate::time::Instant;
use crate::{exec, sim};

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// For reading and writing, not only for reading.
    pub write: bool,
    /// Past the page cache (O_DIRECT).
    pub direct: bool,
    /// Made new; an existing file is an error.
    pub create_new: bool,
    /// Made if it does not exist; an existing one is cut to nothing.
    pub create: bool,
}

/// What kind of file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file: it can grow, and what was never written reads as zeros.
    Regular,
    /// A block device.
    Block,
    /// A character device.
    Char,
}

/// What the system says of an open file.
#[derive(Clone, Copy, Debug)]
pub struct FileInfo {
    /// Regular file or device.
    pub kind: FileKind,
    /// Length in bytes (a block device's size).
    pub len: u64,
    /// Bytes allocated on storage.
    pub allocated: u64,
    /// Alignment of offsets and lengths in bytes: 1 unless opened for direct I/O.
    pub offset_align: u32,
    /// Alignment of memory in bytes: 1 unless opened for direct I/O.
    pub memory_align: u32,
    /// Device and inode: which file it is, whatever its path.
    pub identity: (u64, u64),
}

/// How [`File::zero`] may do it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// Give the space back (punch a hole).
    Unmap,
    /// Keep or reserve the space.
    Keep,
}

/// An open file. Clones share it.
#[derive(Clone)]
pub struct File(Inner);

#[derive(Clone)]
enum Inner {
    Os(Arc<OsFile>),
    Sim(sim::Opened),
}

struct OsFile {
    fd: Arc<OwnedFd>,
    /// A regular file behind the page cache: small transfers are copies that the calling thread
    /// does itself (decisions 0003 and 0006).
    buffered: bool,
    /// What direct I/O demands of memory and of offsets, in bytes (1 without direct I/O).
    align: (u32, u32),
    /// Inline writes took too long; until this moment (nanoseconds) writes go through the ring.
    slow_until: AtomicU64,
    /// Flushes in flight: they can hold up a write for milliseconds.
    syncing: AtomicU32,
    /// Bytes written since the last flush began.
    unsynced: AtomicU64,
    /// Reads left to go straight to the ring, since the page cache did not hold an earlier one;
    /// `u32::MAX` for all of them: the file system has no reads that don't wait.
    cold: AtomicU32,
}

impl OsFile {
    fn new(fd: OwnedFd) -> OsFile {
        let info = info_os(fd.as_raw_fd());
        let buffered =
            info.as_ref().is_ok_and(|i| i.kind == FileKind::Regular && i.offset_align == 1);
        let align = info.map_or((1, 1), |i| (i.memory_align, i.offset_align));
        OsFile {
            fd: Arc::new(fd),
            buffered,
            align,
            slow_until: AtomicU64::new(0),
            syncing: AtomicU32::new(0),
            unsynced: AtomicU64::new(0),
            cold: AtomicU32::new(0),
        }
    }

    /// The buffer itself where its memory is aligned well enough, else an aligned one as long.
    fn aligned(&self, buf: &Buf) -> Option<Buf> {
        let align = self.align.0 as usize;
        (align > 1 && !buf.is_aligned(align)).then(|| Buf::new(buf.len().max(align)))
    }

    /// Reads on this thread what the page cache holds; returns the bytes read.
    fn read_inline(&self, offset: u64, buf: &Buf) -> usize {
        if !self.buffered || buf.len() > INLINE_READ {
            return 0;
        }
        match self.cold.load(Ordering::Relaxed) {
            0 => {}
            u32::MAX => return 0,
            n => {
                self.cold.store(n - 1, Ordering::Relaxed);
                return 0;
            }
        }
        let iov = libc::iovec { iov_base: buf.ptr().cast(), iov_len: buf.len() };
        // SAFETY: the memory is the buffer's own and outlives the call.
        let n = unsafe {
            libc::preadv2(
                self.fd.as_raw_fd(),
                &raw const iov,
                1,
                offset as libc::off_t,
                libc::RWF_NOWAIT,
            )
        };
        if n < 0 {
            let refused = std::io::Error::last_os_error().raw_os_error() == Some(libc::EOPNOTSUPP);
            self.cold.store(if refused { u32::MAX } else { COLD_READS }, Ordering::Relaxed);
        }
        // An error is left to the ring, which meets it again and reports it.
        usize::try_from(n).unwrap_or(0)
    }

    /// Writes on this thread if that is known to be quick; returns the bytes written.
    fn write_inline(&self, offset: u64, buf: &Buf) -> usize {
        if !self.buffered || buf.len() > INLINE_WRITE || self.syncing.load(Ordering::Relaxed) > 0 {
            return 0;
        }
        let start = Instant::now();
        if start.nanos() < self.slow_until.load(Ordering::Relaxed) {
            return 0;
        }
        // SAFETY: the memory is the buffer's own and outlives the call.
        let n = unsafe {
            libc::pwrite(self.fd.as_raw_fd(), buf.ptr().cast(), buf.len(), offset as libc::off_t)
        };
        let end = Instant::now();
        let took = end.since(start);
        if took > SLOW_WRITE {
            self.slow_until.store((end + took * SLOW_PAUSE).nanos(), Ordering::Relaxed);
        }
        // An error is left to the ring, which meets it again and reports it.
        usize::try_from(n).unwrap_or(0)
    }
}

/// Counts a flush in flight, until it is dropped.
struct Syncing<'a>(&'a AtomicU32);

impl<'a> Syncing<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Syncing(count)
    }
}

impl Drop for Syncing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Longest read done by the calling thread, in bytes.
const INLINE_READ: usize = 256 << 10;
/// Reads that go through the ring after one that the page cache could not answer.
const COLD_READS: u32 = 8;
/// Longest write done by the calling thread, in bytes.
const INLINE_WRITE: usize = 256 << 10;
/// A write by the calling thread that took longer than this says that the file is slow now.
const SLOW_WRITE: Duration = Duration::from_millis(1);
/// For how long writes to a slow file then go through the ring, as a multiple of the time the
/// slow one took: the calling thread waits for at most this part of its time.
const SLOW_PAUSE: u32 = 10;

impl File {
    /// Opens `path`. Inside a simulation this is a simulated file of that name.
    pub async fn open(path: &Path, options: OpenOptions) -> Result<File> {
        if let Some(w) = exec::simulated() {
            return Ok(File(Inner::Sim(w.open(path, options).await?)));
        }
        let path = path.to_owned();
        let file = call(move || open_os(&path, options).map(OsFile::new)).await?;
        Ok(File(Inner::Os(Arc::new(file))))
    }

    /// Takes over an open descriptor.
    pub fn from_fd(fd: OwnedFd) -> File {
        File(Inner::Os(Arc::new(OsFile::new(fd))))
    }

    fn call_os<T: Send + 'static>(
        file: &OsFile,
        f: impl FnOnce(RawFd) -> Result<T> + Send + 'static,
    ) -> impl Future<Output = Result<T>> {
        let fd = file.fd.clone();
        call(move || f(fd.as_raw_fd()))
    }

    /// Reads all of `buf` from `offset`; what lies past the end of the file is zeros.
    pub async fn read_at(&self, offset: u64, buf: Buf) -> Result<()> {
        let file = match &self.0 {
            Inner::Os(f) => f,
            Inner::Sim(d) => return d.read(offset, buf).await,
        };
        match file.aligned(&buf) {
            None => Self::read_os(file, offset, buf).await,
            Some(bounce) => {
                let part = bounce.slice(0..buf.len());
                Self::read_os(file, offset, part.clone()).await?;
                buf.copy_from_buf(0, &part);
                Ok(())
            }
        }
    }

    async fn read_os(file: &OsFile, offset: u64, buf: Buf) -> Result<()> {
        let fd = &file.fd;
        let mut at = file.read_inline(offset, &buf);
        while at < buf.len() {
            let n = (buf.len() - at).min(MAX_TRANSFER) as u32;
            let p = buf.ptr().wrapping_add(at);
            let entry =
                opcode::Read::new(Fd(fd.as_raw_fd()), p, n).offset(offset + at as u64).build();
            let keep = Keep::File { _fd: fd.clone(), _buf: Some(buf.clone()) };
            let (res, _keep) = Op::submit(entry, keep).await;
            if retry(res) {
                continue;
            }
            let got = check(res, || format!("read of {n} bytes at {:#x}", offset + at as u64))?;
            at += got as usize;
            // A direct read that stops inside a block has met the end of the file.
            if got == 0 || got % file.align.1 != 0 {
                buf.slice(at..buf.len()).fill(0);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Writes all of `buf` at `offset`.
    pub async fn write_at(&self, offset: u64, buf: Buf) -> Result<()> {
        let file = match &self.0 {
            Inner::Os(f) => f,
            Inner::Sim(d) => return d.write(offset, buf).await,
        };
        let buf = match file.aligned(&buf) {
            None => buf,
            Some(bounce) => {
                bounce.copy_from_buf(0, &buf);
                bounce.slice(0..buf.len())
            }
        };
        file.unsynced.fetch_add(buf.len() as u64, Ordering::Relaxed);
        let fd = &file.fd;
        let mut at = file.write_inline(offset, &buf);
        while at < buf.len() {
            let n = (buf.len() - at).min(MAX_TRANSFER) as u32;
            let p = buf.ptr().wrapping_add(at);
            let entry =
                opcode::Write::new(Fd(fd.as_raw_fd()), p, n).offset(offset + at as u64).build();
            let keep = Keep::File { _fd: fd.clone(), _buf: Some(buf.clone()) };
            let (res, _keep) = Op::submit(entry, keep).await;
            let what = || format!("write of {n} bytes at {:#x}", offset + at as u64);
            match res {
                0 => return Err(Error::os(libc::EIO, what())),
                _ if retry(res) => {}
                _ => at += check(res, what)? as usize,
            }
        }
        Ok(())
    }

    /// Makes all completed writes durable (fdatasync).
    pub async fn sync(&self) -> Result<()> {
        let file = match &self.0 {
            Inner::Os(f) => f,
            Inner::Sim(d) => return d.sync().await,
        };
        let fd = &file.fd;
        let entry = opcode::Fsync::new(Fd(fd.as_raw_fd())).flags(FsyncFlags::DATASYNC).build();
        let _syncing = Syncing::new(&file.syncing);
        file.unsynced.store(0, Ordering::Relaxed);
        let (res, _) = Op::submit(entry, Keep::File { _fd: fd.clone(), _buf: None }).await;
        check(res, || "flush".to_owned()).map(drop)
    }

    /// Bytes written since the last flush began: about what a flush has to write.
    pub fn unsynced(&self) -> u64 {
        match &self.0 {
            Inner::Os(f) => f.unsynced.load(Ordering::Relaxed),
            Inner::Sim(_) => 0,
        }
    }

    /// Where in `range` the page cache holds bytes that are not written back, in pieces of `piece`
    /// bytes. Empty where the kernel does not tell (before Linux 6.5).
    pub async fn dirty(&self, range: ByteRange, piece: u64) -> Result<Vec<ByteRange>> {
        match &self.0 {
            Inner::Os(f) => Self::call_os(f, move |fd| Ok(dirty_os(fd, range, piece))).await,
            Inner::Sim(_) => Ok(Vec::new()),
        }
    }

    /// Starts to write `range` back to storage. It waits for nothing and makes nothing durable;
    /// an error is left to the next flush, which meets it too.
    pub async fn start_write_back(&self, range: ByteRange) {
        if let Inner::Os(f) = &self.0 {
            let entry = opcode::SyncFileRange::new(Fd(f.fd.as_raw_fd()), range.len() as u32)
                .offset(range.start())
                .flags(libc::SYNC_FILE_RANGE_WRITE)
                .build();
            Op::submit(entry, Keep::File { _fd: f.fd.clone(), _buf: None }).await;
        }
    }

    async fn fallocate(&self, fd: &Arc<OwnedFd>, range: ByteRange, mode: i32) -> Result<()> {
        loop {
            let entry = opcode::Fallocate::new(Fd(fd.as_raw_fd()), range.len())
                .offset(range.start())
                .mode(mode)
                .build();
            let (res, _) = Op::submit(entry, Keep::File { _fd: fd.clone(), _buf: None }).await;
            if !retry(res) {
                return check(res, || format!("fallocate of {range:?}")).map(drop);
            }
        }
    }

    /// Makes `range` read as zeros, without writing them. The file grows if the range ends past
    /// it in mode [`ZeroMode::Keep`]. [`ErrorKind::Unsupported`] where the file system can't.
    pub async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        match (&self.0, mode) {
            (Inner::Os(fd), ZeroMode::Unmap) => {
                let flags = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                self.fallocate(&fd.fd, range, flags).await
            }
            (Inner::Os(fd), ZeroMode::Keep) => {
                self.fallocate(&fd.fd, range, libc::FALLOC_FL_ZERO_RANGE).await
            }
            (Inner::Sim(d), m) => d.zero(range, m).await,
        }
    }

    /// Reserves space for `range`; the file grows if the range ends past it.
    pub async fn reserve(&self, range: ByteRange) -> Result<()> {
        match &self.0 {
            Inner::Os(fd) => self.fallocate(&fd.fd, range, 0).await,
            Inner::Sim(d) => d.grow(range.end()).await,
        }
    }

    /// Sets the length of a regular file in bytes; new space reads as zeros.
    pub async fn set_len(&self, len: u64) -> Result<()> {
        match &self.0 {
            Inner::Os(fd) => {
                Self::call_os(fd, move |fd| {
                    // SAFETY: ftruncate takes no pointers.
                    os(unsafe { libc::ftruncate(fd, len as libc::off_t) }, "truncate").map(drop)
                })
                .await
            }
            Inner::Sim(d) => d.set_len(len).await,
        }
    }

    /// Whether data or a hole lies at `offset`, and where that ends: the end of the file at most.
    /// Past the end it is a hole that ends nowhere (`u64::MAX`).
    pub async fn extent(&self, offset: u64) -> Result<(bool, u64)> {
        match &self.0 {
            Inner::Os(fd) => Self::call_os(fd, move |fd| extent_os(fd, offset)).await,
            Inner::Sim(d) => Ok(d.extent(offset)),
        }
    }

    /// Size, kind and alignments, asked anew.
    pub async fn info(&self) -> Result<FileInfo> {
        match &self.0 {
            Inner::Os(fd) => Self::call_os(fd, info_os).await,
            Inner::Sim(d) => Ok(d.info()),
        }
    }

    /// Takes a shared lock on one byte of the file, for this open file (OFD lock).
    /// [`ErrorKind::InUse`] where someone holds it exclusively.
    pub async fn lock_byte(&self, at: u64) -> Result<()> {
        self.lock_op(libc::F_OFD_SETLK, at, libc::F_RDLCK as i16).await.map(drop)
    }

    /// Gives up the lock on one byte.
    pub async fn unlock_byte(&self, at: u64) -> Result<()> {
        self.lock_op(libc::F_OFD_SETLK, at, libc::F_UNLCK as i16).await.map(drop)
    }

    /// Whether another open file holds any lock on that byte.
    pub async fn is_byte_locked(&self, at: u64) -> Result<bool> {
        self.lock_op(libc::F_OFD_GETLK, at, libc::F_WRLCK as i16).await
    }

    async fn lock_op(&self, command: i32, at: u64, kind: i16) -> Result<bool> {
        match &self.0 {
            Inner::Os(fd) => Self::call_os(fd, move |fd| lock_os(fd, command, at, kind)).await,
            // A simulated world has one process: nobody else could hold a lock.
            Inner::Sim(_) => Ok(false),
        }
    }
}

/// The most that one read or write moves (the kernel's own limit is just under 2 GiB).
const MAX_TRANSFER: usize = 1 << 30;

fn retry(res: i32) -> bool {
    res == -libc::EINTR || res == -libc::EAGAIN
}

fn os(res: i32, what: &str) -> Result<i32> {
    if res < 0 { Err(last(what)) } else { Ok(res) }
}

fn last(what: &str) -> Error {
    Error::os(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO), what)
}

fn open_os(path: &Path, o: OpenOptions) -> Result<OwnedFd> {
    let text = path.display();
    let c = std::ffi::CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::invalid(format!("file name {text:?} holds a zero byte")))?;
    // Opening a pipe must not wait for somebody at its other end.
    let mut flags = libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK;
    flags |= if o.write { libc::O_RDWR } else { libc::O_RDONLY };
    if o.direct {
        flags |= libc::O_DIRECT;
    }
    if o.create_new {
        flags |= libc::O_CREAT | libc::O_EXCL;
    } else if o.create {
        flags |= libc::O_CREAT | libc::O_TRUNC;
    }
    // SAFETY: `c` is a terminated string that outlives the call.
    let fd = unsafe { libc::open(c.as_ptr(), flags, 0o644) };
    if fd < 0 {
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        // Where writing alone is refused, reading may well be allowed: that is worth knowing.
        let refused = matches!(errno, libc::EPERM | libc::EACCES | libc::EROFS);
        let how = if o.write && refused { " for writing" } else { "" };
        let e = Error::os(errno, format!("opening '{text}'{how}"));
        return Err(if o.direct && errno == libc::EINVAL {
            Error::unsupported(format!(
                "opening '{text}': its file system has no direct I/O; leave cache.direct off"
            ))
        } else {
            e
        });
    }
    // SAFETY: the descriptor was just made and nobody else owns it.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: fcntl F_GETFL takes no pointers.
    let now = os(unsafe { libc::fcntl(fd, libc::F_GETFL) }, "fcntl")?;
    // SAFETY: fcntl F_SETFL takes no pointers.
    os(unsafe { libc::fcntl(fd, libc::F_SETFL, now & !libc::O_NONBLOCK) }, "fcntl")?;
    Ok(owned)
}

fn extent_os(fd: RawFd, offset: u64) -> Result<(bool, u64)> {
    let seek = |at: u64, whence| {
        // SAFETY: lseek takes no pointers.
        let r = unsafe { libc::lseek(fd, at as libc::off_t, whence) };
        if r >= 0 { Ok(Some(r as u64)) } else { seek_error() }
    };
    loop {
        let Some(data) = seek(offset, libc::SEEK_DATA)? else {
            return Ok((false, u64::MAX));
        };
        if data > offset {
            return Ok((false, data));
        }
        // A hole begins at the end of the file at the latest.
        let hole = seek(offset, libc::SEEK_HOLE)?.unwrap_or(u64::MAX);
        if hole > offset {
            return Ok((true, hole));
        }
        // The data were given back between the two questions.
    }
}

/// The number of the system call cachestat(2), which `libc` does not name for this target yet. It
/// is the same on every architecture but alpha.
const CACHESTAT: libc::c_long = 451;
/// Ranges of a [`dirty_os`] search are asked in this many parts at a time.
const DIRTY_PARTS: u64 = 64;

fn dirty_os(fd: RawFd, range: ByteRange, piece: u64) -> Vec<ByteRange> {
    let mut found = Vec::new();
    // Ranges to be looked at, the lowest last.
    let mut open = vec![range];
    while let Some(r) = open.pop() {
        match dirty_pages(fd, r) {
            None => return Vec::new(),
            Some(0) => {}
            Some(_) if r.len() <= piece => found.push(r),
            Some(_) => {
                let part = r.len().div_ceil(DIRTY_PARTS).next_multiple_of(piece);
                let starts = (r.start()..r.end()).step_by(part as usize);
                let parts = starts.map(|s| ByteRange::new(s, part.min(r.end() - s)));
                let from = open.len();
                open.extend(parts);
                open[from..].reverse();
            }
        }
    }
    found
}

/// Pages of `range` that wait to be written back (cachestat(2)).
fn dirty_pages(fd: RawFd, range: ByteRange) -> Option<u64> {
    let asked = [range.start(), range.len()];
    // Of cached, dirty, under write-back, evicted, recently evicted pages.
    let mut counts = [0u64; 5];
    // SAFETY: the call reads a pair of 64-bit numbers and writes five; both outlive it.
    let r = unsafe { libc::syscall(CACHESTAT, fd, asked.as_ptr(), counts.as_mut_ptr(), 0) };
    (r == 0).then_some(counts[1])
}

fn seek_error() -> Result<Option<u64>> {
    let e = last("seek for data");
    match e.kind() {
        ErrorKind::Os(libc::ENXIO) => Ok(None),
        _ => Err(e),
    }
}

fn info_os(fd: RawFd) -> Result<FileInfo> {
    // SAFETY: statx is plain data for which all zeros is a value.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_BASIC_STATS | libc::STATX_DIOALIGN;
    // SAFETY: an empty terminated path and a buffer that outlives the call.
    let r = unsafe { libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut st) };
    os(r, "statx")?;
    // SAFETY: fcntl F_GETFL takes no pointers.
    let flags = os(unsafe { libc::fcntl(fd, libc::F_GETFL) }, "fcntl")?;
    let direct = flags & libc::O_DIRECT != 0;
    let kind = match u32::from(st.stx_mode) & libc::S_IFMT {
        libc::S_IFREG => FileKind::Regular,
        libc::S_IFBLK => FileKind::Block,
        libc::S_IFCHR => FileKind::Char,
        libc::S_IFDIR => return Err(Error::invalid("it is a directory")),
        _ => return Err(Error::invalid("it is neither a regular file nor a device")),
    };
    let mut len = st.stx_size;
    if kind == FileKind::Block {
        // SAFETY: lseek takes no pointers.
        let end = unsafe { libc::lseek(fd, 0, libc::SEEK_END) };
        len = u64::try_from(end).map_err(|_| last("size of the device"))?;
    }
    let known = st.stx_mask & libc::STATX_DIOALIGN != 0 && st.stx_dio_offset_align > 0;
    let (offset_align, memory_align) = match (direct, known) {
        (false, _) => (1, 1),
        (true, true) => (st.stx_dio_offset_align, st.stx_dio_mem_align.max(1)),
        (true, false) => (4096, 4096),
    };
    Ok(FileInfo {
        kind,
        len,
        allocated: st.stx_blocks * 512,
        offset_align,
        memory_align,
        identity: (u64::from(st.stx_dev_major) << 32 | u64::from(st.stx_dev_minor), st.stx_ino),
    })
}

fn lock_os(fd: RawFd, command: i32, at: u64, kind: i16) -> Result<bool> {
    // SAFETY: flock is plain data for which all zeros is a value.
    let mut l: libc::flock = unsafe { std::mem::zeroed() };
    l.l_type = kind;
    l.l_whence = libc::SEEK_SET as i16;
    l.l_start = at as libc::off_t;
    l.l_len = 1;
    // SAFETY: the flock outlives the call.
    let r = unsafe { libc::fcntl(fd, command, &raw mut l) };
    if r < 0 {
        let e = last("file lock");
        return Err(match e.errno() {
            libc::EAGAIN | libc::EACCES => Error::new(ErrorKind::InUse, "file lock is held"),
            _ => e,
        });
    }
    Ok(l.l_type != libc::F_UNLCK as i16)
}

/// Removes the file `path`.
pub async fn remove(path: &Path) -> Result<()> {
    if let Some(w) = exec::simulated() {
        return w.remove(path);
    }
    let path = path.to_owned();
    call(move || Ok(std::fs::remove_file(&path)?)).await
}

//! A simulated file: what readers see, what is durable, and what lies between.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gipfel_base::{ByteRange, Error, Result};

use super::{IoKind, Rng, world};
use crate::buf::Buf;
use crate::file::{FileInfo, FileKind, ZeroMode};

/// What a power loss keeps of the writes that no flush covered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    Nothing,
    /// Everything that was completed or in flight.
    Everything,
    /// A random subset of whole writes.
    Some,
    /// A random subset of the 512-byte sectors of each write.
    Torn,
}

enum Change {
    Write(u64, Vec<u8>),
    Zero(ByteRange),
    Len(u64),
}

struct Pending {
    serial: u64,
    done: bool,
    change: Change,
}

struct State {
    seen: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Pending>,
    next: u64,
}

/// A simulated file.
pub(crate) struct Disk {
    path: PathBuf,
    state: Mutex<State>,
}

/// A simulated file as one opening of it sees it. Clones share it.
#[derive(Clone)]
pub(crate) struct Opened {
    disk: Arc<Disk>,
    /// What is demanded of offsets and lengths, in bytes.
    align: u32,
}

impl Opened {
    pub(crate) fn new(disk: Arc<Disk>, align: u32) -> Opened {
        Opened { disk, align }
    }

    fn check(&self, what: &str, offset: u64, len: usize) -> Result<()> {
        let r = ByteRange::new(offset, len as u64);
        if r.is_aligned(u64::from(self.align)) {
            return Ok(());
        }
        // The number of the system's EINVAL, as direct I/O answers it.
        Err(Error::os(22, self.disk.at(what, r)))
    }

    pub(crate) async fn read(&self, offset: u64, buf: Buf) -> Result<()> {
        self.check("read of", offset, buf.len())?;
        self.disk.read(offset, buf).await
    }

    pub(crate) async fn write(&self, offset: u64, buf: Buf) -> Result<()> {
        self.check("write of", offset, buf.len())?;
        self.disk.write(offset, buf).await
    }

    pub(crate) fn info(&self) -> FileInfo {
        FileInfo { offset_align: self.align, ..self.disk.info() }
    }
}

impl std::ops::Deref for Opened {
    type Target = Disk;
    fn deref(&self) -> &Disk {
        &self.disk
    }
}

const EXTENT: usize = 4096;

fn apply(to: &mut Vec<u8>, c: &Change, sectors: &mut dyn FnMut() -> bool) {
    let mut put = |at: u64, len: usize, data: Option<&[u8]>| {
        let at = at as usize;
        if to.len() < at + len {
            to.resize(at + len, 0);
        }
        let mut i = 0;
        while i < len {
            // Sectors are those of the device: cut at multiples of 512.
            let n = (512 - (at + i) % 512).min(len - i);
            if sectors() {
                match data {
                    Some(d) => to[at + i..at + i + n].copy_from_slice(&d[i..i + n]),
                    None => to[at + i..at + i + n].fill(0),
                }
            }
            i += n;
        }
    };
    match c {
        Change::Write(at, d) => put(*at, d.len(), Some(d)),
        Change::Zero(r) => put(r.start(), r.len() as usize, None),
        Change::Len(n) => to.resize(*n as usize, 0),
    }
}

impl Disk {
    pub(crate) fn new(path: PathBuf, contents: Vec<u8>) -> Disk {
        let s = State { durable: contents.clone(), seen: contents, pending: Vec::new(), next: 0 };
        Disk { path, state: Mutex::new(s) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        self.state().seen.clone()
    }

    pub(crate) fn after_power_loss(&self, keep: Keep, rng: &mut Rng) -> Vec<u8> {
        let s = self.state();
        let mut v = s.durable.clone();
        for p in &s.pending {
            let whole = match keep {
                Keep::Nothing => false,
                Keep::Everything | Keep::Torn => true,
                Keep::Some => rng.one_in(2),
            };
            if whole {
                apply(&mut v, &p.change, &mut || keep != Keep::Torn || rng.one_in(2));
            }
        }
        v
    }

    fn at(&self, what: &str, r: ByteRange) -> String {
        format!("'{}': {what} {r:?}", self.path.display())
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<()> {
        let r = ByteRange::new(offset, buf.len() as u64);
        world().io(IoKind::Read, || self.at("read of", r)).await?;
        let s = self.state();
        let from = (offset as usize).min(s.seen.len());
        let n = buf.len().min(s.seen.len() - from);
        buf.copy_from(0, &s.seen[from..from + n]);
        buf.slice(n..buf.len()).fill(0);
        Ok(())
    }

    async fn change(&self, what: &str, r: ByteRange, c: Change) -> Result<()> {
        // In flight it may or may not survive a crash, and nobody sees it yet.
        let serial = {
            let mut s = self.state();
            s.next += 1;
            let serial = s.next;
            s.pending.push(Pending { serial, done: false, change: c });
            serial
        };
        let outcome = world().io(IoKind::Write, || self.at(what, r)).await;
        let mut s = self.state();
        let s = &mut *s;
        let Some(i) = s.pending.iter().position(|p| p.serial == serial) else { return outcome };
        if outcome.is_err() {
            s.pending.remove(i);
            return outcome;
        }
        // It becomes visible now, after all that became visible before.
        let mut p = s.pending.remove(i);
        apply(&mut s.seen, &p.change, &mut || true);
        p.done = true;
        s.pending.push(p);
        Ok(())
    }

    async fn write(&self, offset: u64, buf: Buf) -> Result<()> {
        let r = ByteRange::new(offset, buf.len() as u64);
        self.change("write of", r, Change::Write(offset, buf.to_vec())).await
    }

    pub(crate) async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let end = match mode {
            ZeroMode::Unmap => range.end().min(self.state().seen.len() as u64),
            ZeroMode::Keep => range.end(),
        };
        if end <= range.start() {
            return Ok(());
        }
        let r = ByteRange::between(range.start(), end);
        self.change("zero of", r, Change::Zero(r)).await
    }

    pub(crate) async fn grow(&self, len: u64) -> Result<()> {
        if self.state().seen.len() as u64 >= len {
            return Ok(());
        }
        self.set_len(len).await
    }

    pub(crate) async fn set_len(&self, len: u64) -> Result<()> {
        self.change("truncate to", ByteRange::new(len, 0), Change::Len(len)).await
    }

    pub(crate) async fn sync(&self) -> Result<()> {
        let upto: Vec<u64> =
            self.state().pending.iter().filter(|p| p.done).map(|p| p.serial).collect();
        world().io(IoKind::Sync, || format!("'{}': flush", self.path.display())).await?;
        let mut s = self.state();
        let s = &mut *s;
        let (now, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut s.pending).into_iter().partition(|p| upto.contains(&p.serial));
        s.pending = later;
        for p in now {
            apply(&mut s.durable, &p.change, &mut || true);
        }
        Ok(())
    }

    pub(crate) fn extent(&self, offset: u64) -> (bool, u64) {
        let s = self.state();
        let len = s.seen.len();
        let data = |at: usize| {
            let block = at / EXTENT * EXTENT;
            s.seen[block..(block + EXTENT).min(len)].iter().any(|b| *b != 0)
        };
        let mut at = offset as usize;
        if at >= len {
            return (false, u64::MAX);
        }
        let kind = data(at);
        while at < len && data(at) == kind {
            at = (at / EXTENT + 1) * EXTENT;
        }
        match (kind, at >= len) {
            (false, true) => (false, u64::MAX),
            (k, _) => (k, at.min(len) as u64),
        }
    }

    fn info(&self) -> FileInfo {
        let len = self.state().seen.len() as u64;
        let mut hash = 0u64;
        for b in self.path.as_os_str().as_encoded_bytes() {
            hash = hash.wrapping_mul(31).wrapping_add(u64::from(*b));
        }
        FileInfo {
            kind: FileKind::Regular,
            len,
            allocated: len,
            offset_align: 1,
            memory_align: 1,
            identity: (0, hash),
        }
    }
}

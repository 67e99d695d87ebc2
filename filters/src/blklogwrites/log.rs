//! The log's format: that of the device mapper's target log-writes (kernel documentation,
//! admin-guide/device-mapper/log-writes), little-endian.
//!
//! The first sector is the head: magic, version (1), number of entries (64 bits each), sector size
//! (32 bits). An entry is a sector with first sector, number of sectors, flags and length of a
//! mark's text (64 bits each), followed by the data written, in whole sectors; a discard has none.
//! The head is written now and then, and never says more entries than are there.

use std::sync::{Mutex, MutexGuard, PoisonError};

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::{Buf, RangeLock};
use gipfel_node::{Child, WriteFlags, ZeroFlags};

/// The sector size of a new log, in bytes.
pub(super) const SECTOR: u32 = 512;
const MAX_SECTOR: u32 = 8 << 20;
const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;
const HEAD: u64 = 28;
/// Bytes of an entry, without its data.
const ENTRY: u64 = 32;
const FLAG_FLUSH: u64 = 1;
const FLAG_DISCARD: u64 = 4;

/// What is logged.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    first: u64,
    sectors: u64,
    flags: u64,
}

impl Entry {
    /// A flush.
    pub(super) const FLUSH: Entry = Entry { first: 0, sectors: 0, flags: FLAG_FLUSH };

    /// A write of `range`, which is whole sectors of `sector` bytes.
    pub(super) fn write(range: ByteRange, sector: u64) -> Entry {
        Entry { first: range.start() / sector, sectors: range.len() / sector, flags: 0 }
    }

    /// A discard of such a range.
    pub(super) fn discard(range: ByteRange, sector: u64) -> Entry {
        Entry { flags: FLAG_DISCARD, ..Self::write(range, sector) }
    }

    /// Bytes that it takes in the log; `None` past 2^64.
    fn len(self, sector: u64) -> Option<u64> {
        let data = if self.flags & FLAG_DISCARD == 0 { self.sectors } else { 0 };
        data.checked_add(1)?.checked_mul(sector)
    }
}

struct State {
    entries: u64,
    /// Where the next entry goes, in bytes.
    end: u64,
    /// How many entries the head says, once it is there.
    head: Option<u64>,
}

/// A log that is being written.
pub(super) struct Log {
    sector: u64,
    interval: u64,
    state: Mutex<State>,
    /// Whose turn it is to write: one at a time, so that entries are in their places in order.
    turn: RangeLock,
}

fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

async fn read_words<const N: usize>(from: &Child, at: u64) -> Result<[u64; N]> {
    let buf = Buf::new(N * 8);
    from.read(at, buf.clone()).await?;
    let bytes = buf.to_vec();
    Ok(std::array::from_fn(|i| {
        let word = bytes[i * 8..i * 8 + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(word)
    }))
}

impl Log {
    /// A log that begins anew.
    pub(super) fn new(sector: u32, interval: u64) -> Result<Log> {
        if !sector.is_power_of_two() || !(ENTRY as u32..=MAX_SECTOR).contains(&sector) {
            return Err(Error::invalid(format!(
                "log-sector-size {sector} is not a power of two from {ENTRY} to {MAX_SECTOR}"
            )));
        }
        let state = State { entries: 0, end: u64::from(sector), head: None };
        Ok(Self::with(u64::from(sector), interval, state))
    }

    fn with(sector: u64, interval: u64, state: State) -> Log {
        Log { sector, interval, state: Mutex::new(state), turn: RangeLock::new() }
    }

    /// The log that is there, to be continued; an empty file is a log without entries.
    pub(super) async fn read(from: &Child, interval: u64) -> Result<Log> {
        let size = from.size().await?;
        if size == 0 {
            return Self::new(SECTOR, interval);
        }
        if size < HEAD.next_multiple_of(8) {
            return Err(Error::corrupt(format!("{size} bytes are no log of writes")));
        }
        let [magic, version, entries, sector] = read_words(from, 0).await?;
        if (magic, version) != (MAGIC, VERSION) {
            return Err(Error::corrupt(format!(
                "there is no log of writes to append to: it begins with {magic:#x}, version \
                 {version}"
            )));
        }
        let sector = Self::new(sector as u32, interval)
            .map_err(|e| Error::corrupt(format!("the log's head: {e}")))?
            .sector;
        let mut end = sector;
        for n in 0..entries {
            let beyond = || {
                Error::corrupt(format!(
                    "entry {n} of {entries} at {end:#x} passes the end of the log at {size:#x}"
                ))
            };
            if end.checked_add(ENTRY).is_none_or(|e| e > size) {
                return Err(beyond());
            }
            let [first, sectors, flags, _] = read_words(from, end).await?;
            let len = Entry { first, sectors, flags }.len(sector).ok_or_else(beyond)?;
            end = end.checked_add(len).ok_or_else(beyond)?;
        }
        Ok(Self::with(sector, interval, State { entries, end, head: Some(entries) }))
    }

    /// Bytes in a sector.
    pub(super) fn sector(&self) -> u64 {
        self.sector
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there are entries that the head does not say.
    pub(super) fn is_unfinished(&self) -> bool {
        let s = self.state();
        s.head.is_some_and(|h| h < s.entries)
    }

    /// Puts `entry` at the end, with its data; without any, a write is one of zeros.
    pub(super) async fn append(&self, to: &Child, entry: Entry, data: Option<Buf>) -> Result<()> {
        let _turn = self.turn.lock(ByteRange::new(0, 1)).await;
        let (end, head) = {
            let s = self.state();
            (s.end, s.head)
        };
        if head.is_none() {
            // What may be left of an older log counts no longer.
            self.write_head(to, 0).await?;
        }
        let full = || Error::new(gipfel_base::ErrorKind::NoSpace, "the log passes 2^64 bytes");
        let next = entry.len(self.sector).and_then(|n| end.checked_add(n)).ok_or_else(full)?;
        let sector = Buf::zeroed(self.sector as usize);
        sector.copy_from(0, &words(&[entry.first, entry.sectors, entry.flags, 0]));
        to.write(end, sector, WriteFlags::default()).await?;
        let rest = ByteRange::between(end + self.sector, next);
        match data {
            Some(data) => to.write(rest.start(), data, WriteFlags::default()).await?,
            None if rest.is_empty() => {}
            None => to.write_zeroes(rest, ZeroFlags::default()).await?,
        }
        let entries = {
            let mut s = self.state();
            s.end = next;
            s.entries += 1;
            s.entries
        };
        if entries - head.unwrap_or(0) >= self.interval {
            self.write_head(to, entries).await?;
        }
        Ok(())
    }

    /// Lets the head say all entries, and makes the log durable.
    pub(super) async fn finish(&self, to: &Child) -> Result<()> {
        let _turn = self.turn.lock(ByteRange::new(0, 1)).await;
        let entries = self.state().entries;
        if self.is_unfinished() {
            // The entries before the head that says them.
            to.flush().await?;
            self.write_head(to, entries).await?;
        }
        to.flush().await
    }

    async fn write_head(&self, to: &Child, entries: u64) -> Result<()> {
        let sector = Buf::zeroed(self.sector as usize);
        sector.copy_from(0, &words(&[MAGIC, VERSION, entries]));
        sector.copy_from(24, &(self.sector as u32).to_le_bytes());
        to.write(0, sector, WriteFlags::default()).await?;
        self.state().head = Some(entries);
        Ok(())
    }
}

//! The active L1 table, whole in memory (qcow2 spec, L1 table entry).

use std::collections::BTreeSet;

use gipfel_base::sync::sync::atomic::{AtomicU64, Ordering};
use gipfel_base::sync::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use super::entry::{COPIED, OFFSET_MASK};

/// Entries that are written together: 512 bytes, so that a torn write tears none.
pub(super) const SECTOR: usize = 64;

/// Where an L2 table lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// Host offset in bytes.
    pub(super) host: u64,
    /// Whether it is referred to from here only.
    pub(super) copied: bool,
}

/// The table.
pub(super) struct L1 {
    entries: RwLock<Vec<AtomicU64>>,
    /// Sectors to be written.
    dirty: Mutex<BTreeSet<usize>>,
}

impl L1 {
    pub(super) fn new(entries: Vec<u64>) -> L1 {
        let entries = entries.into_iter().map(AtomicU64::new).collect();
        L1 { entries: RwLock::new(entries), dirty: Mutex::default() }
    }

    fn entries(&self) -> RwLockReadGuard<'_, Vec<AtomicU64>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn dirty(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table of entry `index`, if it has one.
    pub(super) fn get(&self, index: u64) -> Option<Table> {
        let e = self.entries().get(index as usize)?.load(Ordering::Acquire);
        let host = e & OFFSET_MASK;
        (host != 0).then_some(Table { host, copied: e & COPIED != 0 })
    }

    /// Puts a table that is referred to from here only.
    pub(super) fn set(&self, index: u64, host: u64) {
        self.entries()[index as usize].store(host | COPIED, Ordering::Release);
        self.dirty().insert(index as usize / SECTOR);
    }

    /// Takes the table of entry `index` out.
    pub(super) fn clear(&self, index: u64) {
        self.entries()[index as usize].store(0, Ordering::Release);
        self.dirty().insert(index as usize / SECTOR);
    }

    pub(super) fn len(&self) -> usize {
        self.entries().len()
    }

    /// All entries, as they are on disk.
    pub(super) fn snapshot(&self) -> Vec<u64> {
        self.entries().iter().map(|e| e.load(Ordering::Acquire)).collect()
    }

    /// Puts another table in place of all entries.
    pub(super) fn replace(&self, entries: Vec<u64>) {
        let mut e = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        *e = entries.into_iter().map(AtomicU64::new).collect();
    }

    /// Makes the table longer.
    pub(super) fn grow(&self, len: usize) {
        let mut e = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        while e.len() < len {
            e.push(AtomicU64::new(0));
        }
    }

    /// The sectors that wait to be written: their numbers and entries.
    pub(super) fn take_dirty(&self) -> Sectors<'_> {
        let sectors = std::mem::take(&mut *self.dirty());
        let entries = self.entries();
        let copy = |s: usize| {
            let end = (s * SECTOR + SECTOR).min(entries.len());
            entries[s * SECTOR..end].iter().map(|e| e.load(Ordering::Acquire)).collect()
        };
        let list = sectors.into_iter().map(|s| (s, copy(s))).collect();
        Sectors { l1: self, list }
    }
}

/// Sectors that are being written; dropped without [`Sectors::written`] they wait again.
pub(super) struct Sectors<'a> {
    l1: &'a L1,
    pub(super) list: Vec<(usize, Vec<u64>)>,
}

impl Sectors<'_> {
    /// Says that all of them were written.
    pub(super) fn written(mut self) {
        self.list.clear();
    }
}

impl Drop for Sectors<'_> {
    fn drop(&mut self) {
        if !self.list.is_empty() {
            self.l1.dirty().extend(self.list.iter().map(|s| s.0));
        }
    }
}

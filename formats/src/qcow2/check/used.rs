//! How often each host cluster is used, and what else is known of it: pages of counts that come
//! into being where something is used, so that a file of many TiB with little in it costs little.

use std::cell::Cell;
use std::collections::BTreeMap;

use gipfel_base::{Error, ErrorKind, Result};

/// Clusters in a page. Small, because a hostile image puts one entry into each of many pages.
const PAGE: u64 = 1024;
/// Memory that the pages of one check may take, in bytes: enough for 32 TiB in use, with
/// clusters of 64 KiB. Tests reach a smaller limit sooner.
const MAX_MEMORY: u64 = if cfg!(test) { 64 << 20 } else { 1 << 30 };
/// What a page costs at first, in bytes: a count and the flags of each cluster, and its place.
const PAGE_MEMORY: u64 = 2 * PAGE + 128;
/// What it costs more where a count does not fit in a byte.
const WIDE_MEMORY: u64 = 8 * PAGE;

/// The cluster holds metadata that is found without L1 tables: header, tables, refcount blocks.
pub(super) const HARD: u8 = 1;
/// The cluster is an L2 table that has been listed.
pub(super) const TABLE: u8 = 2;
/// The stored refcount is one, or will be once the check has done its work.
pub(super) const ONE: u8 = 4;

enum Counts {
    Narrow(Box<[u8]>),
    Wide(Box<[u64]>),
}

struct Page {
    counts: Counts,
    flags: Box<[u8]>,
}

impl Page {
    fn count(&self, i: usize) -> u64 {
        match &self.counts {
            Counts::Narrow(c) => u64::from(c[i]),
            Counts::Wide(c) => c[i],
        }
    }
}

/// The counts of all clusters. Clusters are numbered from the start of the file.
pub(super) struct Used {
    pages: Vec<Page>,
    /// Where in `pages` the page of a number is.
    index: BTreeMap<u64, usize>,
    /// The page looked up last, by number and place: neighbours are asked for one by one.
    last: Cell<(u64, usize)>,
    memory: u64,
}

impl Default for Used {
    fn default() -> Used {
        let (pages, index) = (Vec::new(), BTreeMap::new());
        Used { pages, index, last: Cell::new((u64::MAX, 0)), memory: 0 }
    }
}

fn place(cluster: u64) -> (u64, usize) {
    (cluster / PAGE, (cluster % PAGE) as usize)
}

impl Used {
    /// Takes `bytes` more into the account, for lists that others keep.
    pub(super) fn charge(&mut self, bytes: u64) -> Result<()> {
        if self.memory + bytes > MAX_MEMORY {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the check of this image needs more than {} MiB of memory, which is the limit",
                    MAX_MEMORY >> 20
                ),
            ));
        }
        self.memory += bytes;
        Ok(())
    }

    fn find(&self, number: u64) -> Option<usize> {
        let (last, at) = self.last.get();
        if last == number {
            return Some(at);
        }
        let at = *self.index.get(&number)?;
        self.last.set((number, at));
        Some(at)
    }

    fn find_or_make(&mut self, number: u64) -> Result<usize> {
        if let Some(at) = self.find(number) {
            return Ok(at);
        }
        self.charge(PAGE_MEMORY)?;
        let zeros = || vec![0; PAGE as usize].into_boxed_slice();
        self.pages.push(Page { counts: Counts::Narrow(zeros()), flags: zeros() });
        let at = self.pages.len() - 1;
        self.index.insert(number, at);
        Ok(at)
    }

    /// Counts `n` more uses of `cluster`.
    pub(super) fn add(&mut self, cluster: u64, n: u64) -> Result<()> {
        let (number, i) = place(cluster);
        let at = self.find_or_make(number)?;
        let sum = self.pages[at].count(i).saturating_add(n);
        if let (Counts::Narrow(c), true) = (&self.pages[at].counts, sum > u64::from(u8::MAX)) {
            let wide = c.iter().map(|n| u64::from(*n)).collect();
            self.charge(WIDE_MEMORY)?;
            self.pages[at].counts = Counts::Wide(wide);
        }
        match &mut self.pages[at].counts {
            Counts::Narrow(c) => c[i] = sum as u8,
            Counts::Wide(c) => c[i] = sum,
        }
        Ok(())
    }

    /// Takes back one use of `cluster`.
    pub(super) fn remove(&mut self, cluster: u64) {
        let (number, i) = place(cluster);
        match self.find(number).map(|at| &mut self.pages[at].counts) {
            Some(Counts::Narrow(c)) => c[i] = c[i].saturating_sub(1),
            Some(Counts::Wide(c)) => c[i] = c[i].saturating_sub(1),
            None => {}
        }
    }

    /// How often `cluster` is used.
    pub(super) fn count(&self, cluster: u64) -> u64 {
        let (number, i) = place(cluster);
        self.find(number).map_or(0, |at| self.pages[at].count(i))
    }

    /// Whether `flag` is set for `cluster`.
    pub(super) fn has(&self, cluster: u64, flag: u8) -> bool {
        let (number, i) = place(cluster);
        self.find(number).is_some_and(|at| self.pages[at].flags[i] & flag != 0)
    }

    /// Sets `flag` for `cluster`, which is used.
    pub(super) fn set(&mut self, cluster: u64, flag: u8) -> Result<()> {
        let (number, i) = place(cluster);
        let at = self.find_or_make(number)?;
        self.pages[at].flags[i] |= flag;
        Ok(())
    }

    /// The first cluster from `from` on, below `to`, that is used, and how often.
    pub(super) fn next(&self, from: u64, to: u64) -> Option<(u64, u64)> {
        let mut pages = self.index.range(from / PAGE..to.div_ceil(PAGE));
        pages.find_map(|(number, at)| {
            let (first, page) = (number * PAGE, &self.pages[*at]);
            let low = from.saturating_sub(first).min(PAGE) as usize;
            let high = (to - first).min(PAGE) as usize;
            let i = (low..high).find(|&i| page.count(i) > 0)?;
            Some((first + i as u64, page.count(i)))
        })
    }

    /// The number behind the last used cluster.
    pub(super) fn end(&self) -> u64 {
        let last = self.index.iter().rev().find_map(|(number, at)| {
            let page = &self.pages[*at];
            let i = (0..PAGE as usize).rev().find(|&i| page.count(i) > 0)?;
            Some(number * PAGE + i as u64 + 1)
        });
        last.unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_any_size_far_apart() {
        let mut u = Used::default();
        for (c, n) in [(3, 1), (3, 254), (5, 200), (3, 1), (1 << 50, 7), (2000, 1 << 40)] {
            u.add(c, n).unwrap();
        }
        u.set(3, ONE).unwrap();
        assert_eq!((u.count(3), u.count(4), u.count(2000), u.count(1 << 50)), (256, 0, 1 << 40, 7));
        assert_eq!(u.count(5), 200);
        assert!(u.has(3, ONE) && !u.has(3, HARD) && !u.has(2000, ONE));
        assert_eq!(u.next(0, u64::MAX), Some((3, 256)));
        assert_eq!(u.next(6, 2000), None);
        assert_eq!(u.next(6, 2001), Some((2000, 1 << 40)));
        assert_eq!(u.next(2001, u64::MAX), Some((1 << 50, 7)));
        assert_eq!(u.end(), (1 << 50) + 1);
        u.remove(3);
        assert_eq!(u.count(3), 255);
    }

    #[test]
    fn memory_has_an_end() {
        let mut u = Used::default();
        let e = (0..).find_map(|i| u.add(i * PAGE, 1).err()).unwrap();
        assert_eq!(e.kind(), ErrorKind::Limit);
        assert!(u.pages.len() as u64 * PAGE_MEMORY <= MAX_MEMORY);
    }
}

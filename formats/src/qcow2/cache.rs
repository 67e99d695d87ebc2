//! A cache of table slices: L2 entries and refcounts, as words of 64 bits.
//!
//! Looking a word up takes no lock and never waits: a slice is found by its tag in one of a few
//! places, and the tag is looked at again after the word was read, so a slice that was exchanged
//! meanwhile is noticed. Everything else (changing words, choosing what makes room, what has to be
//! written) is done under one mutex and for an instant only. No I/O happens here.
//!
//! Pages are plain words and states plain values, so that they can be kept in a mapping of their
//! own (invariant 8 of the design).

use std::sync::OnceLock;

use gipfel_base::sync::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use gipfel_base::sync::sync::{Mutex, MutexGuard, PoisonError};

/// Places where a slice can be.
const WAYS: usize = 8;
/// The part of a tag that names the slice (plus one; zero is an empty place). The rest counts
/// how often the place was given away.
const ID_MASK: u64 = (1 << 40) - 1;

struct Slot {
    tag: AtomicU64,
    /// Odd while words are being changed, and another one after that.
    changes: AtomicU64,
    /// Looked at since the last search for room.
    used: AtomicBool,
    /// An entry in it contradicts the image: it is looked at closely each time.
    suspect: AtomicBool,
    words: OnceLock<Box<[AtomicU64]>>,
}

/// What happens to a slot, apart from its words.
#[derive(Clone, Copy, Default)]
struct State {
    /// Reserved for a slice that is being read.
    loading: bool,
    /// Changed since it was last copied out for writing.
    dirty: bool,
    /// Copied out, and not yet known to be written.
    writing: bool,
}

impl State {
    fn replaceable(self) -> bool {
        !self.loading && !self.dirty && !self.writing
    }
}

struct Directory {
    states: Vec<State>,
    /// Dirty slots, in the order in which they became dirty.
    dirty: Vec<usize>,
    /// Where the last search for room ended.
    hand: usize,
}

/// A cache of slices of equal length.
pub struct TableCache {
    words: usize,
    ways: usize,
    slots: Box<[Slot]>,
    directory: Mutex<Directory>,
}

/// A slice that was copied out to be written.
pub struct Dirty {
    /// Which slice.
    pub id: u64,
    /// Its words at that moment.
    pub words: Vec<u64>,
    slot: usize,
}

/// Slices that are being written. They stay in the cache, and unless [`Batch::written`] is
/// called they count as changed again when this is dropped.
pub struct Batch<'a> {
    cache: &'a TableCache,
    slices: Vec<Dirty>,
    good: bool,
}

impl Batch<'_> {
    /// The slices.
    pub fn slices(&self) -> &[Dirty] {
        &self.slices
    }

    /// Says that all of them were written.
    pub fn written(mut self) {
        self.good = true;
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let mut d = self.cache.directory();
        for s in &self.slices {
            d.states[s.slot].writing = false;
            if !self.good && !d.states[s.slot].dirty {
                d.states[s.slot].dirty = true;
                d.dirty.push(s.slot);
            }
        }
    }
}

/// The outcome of [`TableCache::reserve`].
pub enum Reserve<'a> {
    /// It is there already.
    Present,
    /// A place for it.
    Place(Place<'a>),
    /// Every place that it could take holds a slice that must be written first.
    Full,
}

/// An empty place that waits for a slice. Dropping it gives it up.
pub struct Place<'a> {
    cache: &'a TableCache,
    slot: usize,
    id: u64,
}

/// A slice in the cache, as a reader found it.
#[derive(Clone, Copy)]
pub struct Found<'a> {
    slot: &'a Slot,
    tag: u64,
}

impl Found<'_> {
    /// Word `index`, unless the slice has gone meanwhile.
    pub fn word(&self, index: usize) -> Option<u64> {
        let w = self.slot.words.get()?[index].load(Ordering::Acquire);
        // A word of the next slice was stored after the tag was cleared: reading it with
        // Acquire makes that visible here.
        (self.slot.tag.load(Ordering::Acquire) == self.tag).then_some(w)
    }

    /// Words `index` and the next one as they stood there together, unless they were being changed
    /// or the slice has gone meanwhile.
    pub fn pair(&self, index: usize) -> Option<(u64, u64)> {
        let changes = self.slot.changes.load(Ordering::Acquire);
        let pair = (self.word(index)?, self.word(index + 1)?);
        // As with the tag: a word that was stored meanwhile was read with Acquire, and makes
        // visible that the count had become another one before.
        let same = self.slot.changes.load(Ordering::Acquire) == changes;
        (changes.is_multiple_of(2) && same).then_some(pair)
    }

    /// Whether an entry of it contradicts the image.
    pub fn is_suspect(&self) -> bool {
        self.slot.suspect.load(Ordering::Acquire)
    }
}

impl TableCache {
    /// A cache of at most `budget` bytes (but at least two slices) for slices of `words` words.
    /// Memory is taken as slices come.
    pub fn new(words: usize, budget: u64) -> TableCache {
        let count = (budget / (words as u64 * 8)).clamp(2, 1 << 24) as usize;
        let ways = WAYS.min(count);
        let count = count / ways * ways;
        let slot = || Slot {
            tag: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            used: AtomicBool::new(false),
            suspect: AtomicBool::new(false),
            words: OnceLock::new(),
        };
        TableCache {
            words,
            ways,
            slots: (0..count).map(|_| slot()).collect(),
            directory: Mutex::new(Directory {
                states: vec![State::default(); count],
                dirty: Vec::new(),
                hand: 0,
            }),
        }
    }

    /// Words of one slice.
    pub fn words(&self) -> usize {
        self.words
    }

    fn directory(&self) -> MutexGuard<'_, Directory> {
        self.directory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first of the places for `id`.
    fn first_way(&self, id: u64) -> usize {
        let sets = (self.slots.len() / self.ways) as u64;
        (id % sets) as usize * self.ways
    }

    /// The slice `id`, if it is here.
    pub fn get(&self, id: u64) -> Option<Found<'_>> {
        let first = self.first_way(id);
        for slot in &self.slots[first..first + self.ways] {
            let tag = slot.tag.load(Ordering::Acquire);
            if tag & ID_MASK == id + 1 {
                if !slot.used.load(Ordering::Relaxed) {
                    slot.used.store(true, Ordering::Relaxed);
                }
                return Some(Found { slot, tag });
            }
        }
        None
    }

    fn find(&self, id: u64) -> Option<usize> {
        let first = self.first_way(id);
        (first..first + self.ways)
            .find(|s| self.slots[*s].tag.load(Ordering::Acquire) & ID_MASK == id + 1)
    }

    /// Changes words of slice `id` and makes it dirty; `None` where it is not here. The slice
    /// cannot go while `f` runs.
    pub fn update<R>(&self, id: u64, f: impl FnOnce(&[AtomicU64]) -> R) -> Option<R> {
        let mut d = self.directory();
        let slot = self.find(id)?;
        let s = &self.slots[slot];
        let words = s.words.get()?;
        s.changes.fetch_add(1, Ordering::AcqRel);
        let r = f(words);
        s.changes.fetch_add(1, Ordering::AcqRel);
        if !d.states[slot].dirty {
            d.states[slot].dirty = true;
            d.dirty.push(slot);
        }
        Some(r)
    }

    /// Reads words of slice `id` while nobody changes them; `None` where it is not here.
    pub fn inspect<R>(&self, id: u64, f: impl FnOnce(&[AtomicU64]) -> R) -> Option<R> {
        let _d = self.directory();
        let slot = self.find(id)?;
        Some(f(self.slots[slot].words.get()?))
    }

    /// Finds room for slice `id`. Whoever reads it in must be alone with that (see
    /// `Tables::load`), else there would be two of it.
    pub fn reserve(&self, id: u64) -> Reserve<'_> {
        let mut d = self.directory();
        if self.find(id).is_some() {
            return Reserve::Present;
        }
        let first = self.first_way(id);
        d.hand = (d.hand + 1) % self.ways;
        // Twice round: the first time those in use get another chance.
        for n in 0..2 * self.ways {
            let at = first + (d.hand + n) % self.ways;
            let slot = &self.slots[at];
            let tag = slot.tag.load(Ordering::Acquire);
            if !d.states[at].replaceable() {
                continue;
            }
            if tag & ID_MASK != 0 && n < self.ways && slot.used.swap(false, Ordering::Relaxed) {
                continue;
            }
            slot.tag.store((tag & !ID_MASK).wrapping_add(ID_MASK + 1), Ordering::Release);
            d.states[at].loading = true;
            return Reserve::Place(Place { cache: self, slot: at, id });
        }
        Reserve::Full
    }

    /// Forgets every slice that nobody has changed.
    pub fn clear(&self) {
        let d = self.directory();
        for (slot, state) in self.slots.iter().zip(&d.states) {
            let tag = slot.tag.load(Ordering::Acquire);
            if state.replaceable() && tag & ID_MASK != 0 {
                slot.tag.store((tag & !ID_MASK).wrapping_add(ID_MASK + 1), Ordering::Release);
            }
        }
    }

    /// Copies out up to `most` slices that were changed.
    pub fn take_dirty(&self, most: usize) -> Batch<'_> {
        let mut d = self.directory();
        let d = &mut *d;
        let mut taken = Vec::new();
        let mut left = Vec::new();
        for slot in std::mem::take(&mut d.dirty) {
            if taken.len() == most || d.states[slot].writing {
                left.push(slot);
                continue;
            }
            let id = (self.slots[slot].tag.load(Ordering::Acquire) & ID_MASK) - 1;
            let words = self.slots[slot].words.get().expect("a dirty slot has words");
            let words = words.iter().map(|w| w.load(Ordering::Acquire)).collect();
            d.states[slot] = State { dirty: false, writing: true, ..d.states[slot] };
            taken.push(Dirty { id, words, slot });
        }
        d.dirty = left;
        Batch { cache: self, slices: taken, good: false }
    }
}

impl Place<'_> {
    /// Fills the place; from now on the slice is found. `dirty`: it must be written.
    pub fn fill(self, words: impl Iterator<Item = u64>, suspect: bool, dirty: bool) {
        let slot = &self.cache.slots[self.slot];
        let page = slot.words.get_or_init(|| {
            (0..self.cache.words).map(|_| AtomicU64::new(0)).collect::<Vec<_>>().into_boxed_slice()
        });
        for (to, word) in page.iter().zip(words) {
            to.store(word, Ordering::Release);
        }
        slot.suspect.store(suspect, Ordering::Release);
        slot.used.store(true, Ordering::Relaxed);
        let mut d = self.cache.directory();
        let version = slot.tag.load(Ordering::Acquire) & !ID_MASK;
        slot.tag.store(version | (self.id + 1), Ordering::Release);
        if dirty {
            d.states[self.slot].dirty = true;
            d.dirty.push(self.slot);
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.cache.directory().states[self.slot].loading = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(c: &TableCache, id: u64, value: u64) -> bool {
        match c.reserve(id) {
            Reserve::Place(p) => {
                p.fill(std::iter::repeat(value), false, false);
                true
            }
            Reserve::Present => true,
            Reserve::Full => false,
        }
    }

    #[test]
    fn slices_come_go_and_are_noticed() {
        let c = TableCache::new(4, 2 * 32);
        assert!(put(&c, 7, 70) && put(&c, 8, 80));
        let seven = c.get(7).unwrap();
        assert_eq!(seven.word(3), Some(70));
        assert!(put(&c, 9, 90) && put(&c, 10, 100));
        assert_eq!(seven.word(3), None, "its place was given to another");
        assert!(c.get(7).is_none() && c.get(8).is_none());
        assert_eq!(c.get(10).unwrap().word(0), Some(100));
    }

    #[test]
    fn what_is_dirty_stays_until_it_is_written() {
        let c = TableCache::new(4, 2 * 32);
        assert!(put(&c, 1, 0) && put(&c, 2, 0));
        for id in [1, 2] {
            c.update(id, |w| w[0].store(id, Ordering::Release)).unwrap();
        }
        assert!(!put(&c, 3, 0));
        let d = c.take_dirty(usize::MAX);
        let taken: Vec<_> = d.slices().iter().map(|d| (d.id, d.words[0])).collect();
        assert_eq!(taken, [(1, 1), (2, 2)]);
        assert!(!put(&c, 3, 0), "still being written");
        c.update(2, |w| w[0].store(22, Ordering::Release)).unwrap();
        d.written();
        assert!(put(&c, 3, 0) && c.get(2).is_some() && c.get(1).is_none());
        let d = c.take_dirty(usize::MAX);
        assert_eq!((d.slices().len(), d.slices()[0].words[0]), (1, 22));
        drop(d);
        assert_eq!(c.take_dirty(1).slices().len(), 1, "what was not written is dirty again");
    }

    #[test]
    fn a_pair_is_read_whole_or_not() {
        let c = TableCache::new(4, 2 * 32);
        assert!(put(&c, 1, 5));
        let found = c.get(1).unwrap();
        assert_eq!(found.pair(2), Some((5, 5)));
        c.update(1, |w| {
            w[2].store(6, Ordering::Release);
            assert_eq!(found.pair(2), None, "it is being changed");
            w[3].store(7, Ordering::Release);
        })
        .unwrap();
        assert_eq!(found.pair(2), Some((6, 7)));
    }

    #[test]
    fn a_place_that_is_given_up_is_free_again() {
        let c = TableCache::new(4, 2 * 32);
        for _ in 0..10 {
            let Reserve::Place(p) = c.reserve(5) else { panic!("there is room") };
            assert!(c.get(5).is_none());
            drop(p);
        }
        assert!(put(&c, 5, 1) && put(&c, 6, 1));
    }
}

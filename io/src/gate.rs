//! Values that requests pass through and that change only while nobody is inside.
//!
//! A [`Gate`] holds a value (the node that an edge points to). Entering costs one uncontended
//! atomic add; closing waits, without polling, until everyone inside has left, and gives a
//! [`Drained`] that may replace the value. A drained edge is thus a value that one holds; letting
//! go of it resumes whoever waits. An [`Epoch`] answers the weaker question "has everyone who was
//! inside at that moment left?", without stopping those who come.
//!
//! Both are checked under shuttle (`tests/shuttle.rs`).

use std::cell::UnsafeCell;
use std::ops::Deref;

use event_listener::{Event, listener};
use gipfel_base::sync::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::shard::{Lines, SHARDS, lines, mine};

/// A value that can be replaced only while nobody is inside.
pub struct Gate<T> {
    inside: Lines,
    closed: AtomicBool,
    opened: Event,
    left: Event,
    value: UnsafeCell<T>,
}

// SAFETY: the value is read by those inside and written only by the holder of `Drained`, which
// exists only while nobody is inside and nobody can enter.
unsafe impl<T: Send + Sync> Sync for Gate<T> {}
// SAFETY: nothing in a gate is bound to a thread but the value itself.
unsafe impl<T: Send> Send for Gate<T> {}

impl<T> Gate<T> {
    /// An open gate that holds `value`.
    pub fn new(value: T) -> Self {
        Gate {
            inside: lines(),
            closed: AtomicBool::new(false),
            opened: Event::new(),
            left: Event::new(),
            value: UnsafeCell::new(value),
        }
    }

    /// Goes in if the gate is open.
    pub fn try_enter(&self) -> Option<Entered<'_, T>> {
        let shard = mine();
        self.inside[shard].0.fetch_add(1, Ordering::SeqCst);
        // Counted before the look: a closer that sees no one inside has set `closed` before us.
        if self.closed.load(Ordering::SeqCst) {
            self.leave(shard);
            return None;
        }
        Some(Entered { gate: self, shard })
    }

    /// Goes in, after waiting for the gate to open if it is closed.
    pub async fn enter(&self) -> Entered<'_, T> {
        loop {
            if let Some(e) = self.try_enter() {
                return e;
            }
            listener!(self.opened => opened);
            if let Some(e) = self.try_enter() {
                return e;
            }
            opened.await;
        }
    }

    fn leave(&self, shard: usize) {
        self.inside[shard].0.fetch_sub(1, Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            self.left.notify(usize::MAX);
        }
    }

    fn is_empty(&self) -> bool {
        // With `closed` set, a shard that was once zero gains only those who turn back at once,
        // so seeing each shard at zero, one after the other, means that all have left.
        self.inside.iter().all(|l| l.0.load(Ordering::SeqCst) == 0)
    }

    /// Closes the gate and waits until everyone inside has left. Closers wait for each other.
    pub async fn close(&self) -> Drained<'_, T> {
        while self.closed.swap(true, Ordering::SeqCst) {
            listener!(self.opened => opened);
            if self.closed.load(Ordering::SeqCst) {
                opened.await;
            }
        }
        // From here on dropping (also of this future) opens the gate again.
        let drained = Drained { gate: self };
        let mut seen = [false; SHARDS];
        loop {
            listener!(self.left => left);
            for (s, l) in seen.iter_mut().zip(&self.inside) {
                *s |= l.0.load(Ordering::SeqCst) == 0;
            }
            if seen.iter().all(|s| *s) {
                return drained;
            }
            left.await;
        }
    }

    /// The value, when no one else can reach the gate.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }

    /// Whether someone holds the gate closed.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Whether nobody is inside at this moment (others may come).
    pub fn is_idle(&self) -> bool {
        self.is_empty()
    }
}

/// Someone inside a [`Gate`]; the value cannot change while this lives.
pub struct Entered<'a, T> {
    gate: &'a Gate<T>,
    shard: usize,
}

impl<T> Deref for Entered<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: while this is counted as inside, no `Drained` hands out the value for writing.
        unsafe { &*self.gate.value.get() }
    }
}

impl<T> Drop for Entered<'_, T> {
    fn drop(&mut self) {
        self.gate.leave(self.shard);
    }
}

/// A closed gate with nobody inside. Dropping it opens the gate.
pub struct Drained<'a, T> {
    gate: &'a Gate<T>,
}

impl<T> Drained<'_, T> {
    /// Puts `value` into the gate and returns the one before.
    pub fn replace(&mut self, value: T) -> T {
        // SAFETY: nobody is inside and nobody gets in while `closed` is set by us.
        std::mem::replace(unsafe { &mut *self.gate.value.get() }, value)
    }

    /// The value in the gate.
    pub fn get(&self) -> &T {
        // SAFETY: as in `replace`; only this holder could write.
        unsafe { &*self.gate.value.get() }
    }
}

impl<T> Drop for Drained<'_, T> {
    fn drop(&mut self) {
        self.gate.closed.store(false, Ordering::SeqCst);
        self.gate.opened.notify(usize::MAX);
    }
}

/// Who is inside, by epoch: lets one wait until all who came before a moment have left.
///
/// Two sets of counters alternate (as in sleepable RCU). Things taken out of use at epoch `n` are
/// free once the epoch has advanced twice.
pub struct Epoch {
    current: AtomicU64,
    inside: [Lines; 2],
}

impl Default for Epoch {
    fn default() -> Self {
        Epoch { current: AtomicU64::new(0), inside: [lines(), lines()] }
    }
}

/// Someone inside an [`Epoch`].
pub struct EpochPin<'a> {
    epoch: &'a Epoch,
    parity: u8,
    shard: u8,
}

impl Epoch {
    /// Goes in.
    pub fn pin(&self) -> EpochPin<'_> {
        let shard = mine();
        let parity = (self.current.load(Ordering::SeqCst) & 1) as u8;
        // The epoch may have gone on since that load: whichever set a pin is counted in, one of
        // the next two advances needs that set empty.
        self.inside[parity as usize][shard].0.fetch_add(1, Ordering::SeqCst);
        EpochPin { epoch: self, parity, shard: shard as u8 }
    }

    /// The number of the current epoch.
    pub fn current(&self) -> u64 {
        self.current.load(Ordering::SeqCst)
    }

    /// Goes on to the next epoch if everyone who came in during the one before the current has
    /// left; returns the number of the current epoch. For one caller at a time.
    pub fn advance(&self) -> u64 {
        let e = self.current.load(Ordering::SeqCst);
        let previous = &self.inside[((e + 1) & 1) as usize];
        if previous.iter().all(|l| l.0.load(Ordering::SeqCst) == 0) {
            self.current.store(e + 1, Ordering::SeqCst);
            return e + 1;
        }
        e
    }
}

impl Drop for EpochPin<'_> {
    fn drop(&mut self) {
        self.epoch.inside[self.parity as usize][self.shard as usize]
            .0
            .fetch_sub(1, Ordering::SeqCst);
    }
}

//! Counters split by thread: each thread adds to a cache line of its own.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering as StdOrdering};

use gipfel_base::sync::sync::atomic::AtomicU64;

/// Number of cache lines; threads beyond it share.
pub(crate) const SHARDS: usize = 8;

#[repr(align(128))]
pub(crate) struct Line(pub(crate) AtomicU64);

/// A counter for each shard.
pub(crate) type Lines = [Line; SHARDS];

pub(crate) fn lines() -> Lines {
    std::array::from_fn(|_| Line(AtomicU64::new(0)))
}

static NEXT: AtomicUsize = AtomicUsize::new(0);

#[cfg(not(shuttle))]
thread_local! {
    static MINE: Cell<usize> = const { Cell::new(usize::MAX) };
}

#[cfg(shuttle)]
shuttle::thread_local! {
    static MINE: Cell<usize> = Cell::new(usize::MAX);
}

/// The shard of this thread.
pub(crate) fn mine() -> usize {
    MINE.with(|m| {
        if m.get() == usize::MAX {
            m.set(NEXT.fetch_add(1, StdOrdering::Relaxed) % SHARDS);
        }
        m.get()
    })
}

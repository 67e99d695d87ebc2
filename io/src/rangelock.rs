//! Ranges that exclude each other: who asks first goes first, without polling.
//!
//! For work that must not overlap (read-modify-write of a block, copying a cluster). It knows
//! nothing of what is done inside; a lock is held by a value, and dropping that wakes who waits.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use gipfel_base::ByteRange;
use gipfel_base::sync::sync::{Mutex, MutexGuard, PoisonError};

struct Entry {
    id: u64,
    range: ByteRange,
    waker: Option<Waker>,
}

#[derive(Default)]
struct Queue {
    next: u64,
    /// In the order of arrival: holders and those who wait.
    entries: Vec<Entry>,
}

/// A set of locked ranges. Overlapping ones are held one after the other, in order of arrival.
#[derive(Default)]
pub struct RangeLock {
    queue: Mutex<Queue>,
}

impl RangeLock {
    /// A lock that nobody holds.
    pub fn new() -> RangeLock {
        RangeLock::default()
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until no earlier lock overlaps `range`, then holds it. The place in the order is
    /// taken by this call, not by the first poll.
    pub fn lock(&self, range: ByteRange) -> Waiting<'_> {
        let mut q = self.queue();
        q.next += 1;
        let id = q.next;
        q.entries.push(Entry { id, range, waker: None });
        drop(q);
        Waiting { held: Some(RangeGuard { lock: self, id, range }) }
    }

    /// Whether nobody holds or waits for a range.
    pub fn is_idle(&self) -> bool {
        self.queue().entries.is_empty()
    }
}

/// The future of [`RangeLock::lock`]. Dropping it gives up the place.
pub struct Waiting<'a> {
    held: Option<RangeGuard<'a>>,
}

impl<'a> Future for Waiting<'a> {
    type Output = RangeGuard<'a>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<RangeGuard<'a>> {
        let guard = self.held.take().expect("not polled again after it was ready");
        let mut q = guard.lock.queue();
        let mine = q.entries.iter().position(|e| e.id == guard.id);
        let Some(mine) = mine else { unreachable!("an entry lives as long as its guard") };
        let (earlier, rest) = q.entries.split_at_mut(mine);
        if earlier.iter().any(|e| e.range.overlaps(guard.range)) {
            let w = &mut rest[0].waker;
            if !w.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                *w = Some(cx.waker().clone());
            }
            drop(q);
            self.held = Some(guard);
            return Poll::Pending;
        }
        rest[0].waker = None;
        drop(q);
        Poll::Ready(guard)
    }
}

/// A held range. Dropping it lets the next ones go on.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    id: u64,
    range: ByteRange,
}

impl RangeGuard<'_> {
    /// What is held.
    pub fn range(&self) -> ByteRange {
        self.range
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut wake = Vec::new();
        {
            let mut q = self.lock.queue();
            if let Some(i) = q.entries.iter().position(|e| e.id == self.id) {
                q.entries.remove(i);
                for e in q.entries[i..].iter_mut().filter(|e| e.range.overlaps(self.range)) {
                    wake.extend(e.waker.take());
                }
            }
        }
        for w in wake {
            w.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::rc::Rc;
    use std::time::Duration;

    use crate::sim::{Rng, World};
    use crate::{spawn_local, time};

    #[test]
    fn overlapping_ranges_are_held_one_after_the_other() {
        for seed in 0..50 {
            let world = World::new(seed);
            world.run(async {
                let lock = Rc::new(RangeLock::new());
                let inside: Rc<Vec<Cell<bool>>> = Rc::new((0..64).map(|_| false.into()).collect());
                let mut rng = Rng::new(seed);
                let tasks: Vec<_> = (0..100)
                    .map(|_| {
                        let (lock, inside) = (lock.clone(), inside.clone());
                        let start = rng.below(60);
                        let r = ByteRange::new(start, 1 + rng.below(4));
                        let (nap, gives_up) = (rng.below(50), rng.one_in(5));
                        spawn_local(async move {
                            if gives_up {
                                let d = Duration::from_nanos(nap);
                                let _ = time::timeout(d, lock.lock(r)).await;
                                return;
                            }
                            let _held = lock.lock(r).await;
                            let cells = r.start() as usize..r.end() as usize;
                            assert!(inside[cells.clone()].iter().all(|c| !c.replace(true)));
                            time::sleep(Duration::from_nanos(nap)).await;
                            inside[cells].iter().for_each(|c| c.set(false));
                        })
                    })
                    .collect();
                for t in tasks {
                    t.await;
                }
                assert!(lock.is_idle(), "seed {seed}");
            });
        }
    }
}

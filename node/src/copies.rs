//! Children that come and go while their parent is in use (those of [`Role::Copy`]).
//!
//! Most drivers have the same children for life and give them by [`Driver::children`]. One that
//! can get more of them and lose some keeps them here: each of its requests enters the set that
//! there is and uses no other until it is done. So a request sees the old set or the new one.
//!
//! The graph drains the set before it puts a larger one in its place: of two writes the earlier
//! one must not reach the old children last and the new one never. Children that go are in nobody's
//! way: requests that come use the smaller set at once, and the graph only waits for those that
//! still use the old one.
//!
//! [`Role::Copy`]: crate::Role::Copy
//! [`Driver::children`]: crate::Driver::children

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use gipfel_io::{Drained, Entered, Gate};

use crate::child::{Child, Expedited};

/// The children at one moment.
pub type CopySet = Arc<[Arc<Child>]>;

/// The changing children of one driver, in the order of their numbers. Sets and numbers are the
/// graph's to change, one change at a time.
pub struct Copies {
    /// The set in force and the one before it.
    sets: [Gate<CopySet>; 2],
    /// Which of them is in force.
    now: AtomicUsize,
    next: AtomicUsize,
}

impl Copies {
    /// These children.
    pub fn new(children: Vec<Arc<Child>>) -> Copies {
        let next = AtomicUsize::new(children.len());
        let sets = [children.into(), CopySet::default()].map(Gate::new);
        Copies { sets, now: AtomicUsize::new(0), next }
    }

    /// The number of the next child that comes.
    pub fn next_number(&self) -> usize {
        self.next.load(Ordering::Relaxed)
    }

    /// Says that child number `n` has come.
    pub fn number_taken(&self, n: usize) {
        self.next.store(n + 1, Ordering::Relaxed);
    }

    /// Says that child number `n` has gone: as in the reference its number is given again if it
    /// was the last one given, and never otherwise.
    pub fn number_freed(&self, n: usize) {
        if self.next_number() == n + 1 {
            self.next.store(n, Ordering::Relaxed);
        }
    }

    /// The present set, which stays in force while the result lives. Waits while it is drained.
    pub async fn enter(&self) -> Entered<'_, CopySet> {
        loop {
            if let Some(e) = self.try_enter() {
                return e;
            }
            let now = self.now.load(Ordering::SeqCst);
            let e = self.sets[now].enter().await;
            if self.is_now(now) {
                return e;
            }
        }
    }

    /// The present set, unless it is drained.
    pub fn try_enter(&self) -> Option<Entered<'_, CopySet>> {
        loop {
            let now = self.now.load(Ordering::SeqCst);
            let e = self.sets[now].try_enter();
            // Looked at from inside: who is in before another set comes into force is waited for.
            if self.is_now(now) {
                return e;
            }
        }
    }

    fn is_now(&self, at: usize) -> bool {
        self.now.load(Ordering::SeqCst) == at
    }

    /// A copy of the present set, for what need not hold it in force, such as a flush.
    pub async fn present(&self) -> CopySet {
        self.enter().await.clone()
    }

    /// Stops new requests before the set and waits until those that use it have settled. For the
    /// graph: the result alone can put another set in its place, and dropping it lets requests go
    /// on.
    pub async fn drain(&self) -> Drained<'_, CopySet> {
        let _held_back = self.hurry().await;
        self.sets[self.now.load(Ordering::SeqCst)].close().await
    }

    /// Puts a set in force that lacks some children, and waits until the requests that use the one
    /// before it have settled. Requests that come meanwhile go on, on the new set. For the graph.
    pub async fn shrink(&self, set: CopySet) {
        let _held_back = self.hurry().await;
        let old = self.now.load(Ordering::SeqCst);
        self.sets[1 - old].close().await.replace(set);
        self.now.store(1 - old, Ordering::SeqCst);
        self.sets[old].close().await.replace(CopySet::default());
    }

    /// While the result lives, nothing below holds requests back by choice.
    async fn hurry(&self) -> Vec<Expedited> {
        let mut held_back = Vec::new();
        for c in self.present().await.iter() {
            held_back.extend(c.node().await.map(Expedited::new));
        }
        held_back
    }
}

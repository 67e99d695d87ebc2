//! Children that come and go while their parent is in use (those of [`Role::Copy`]).
//!
//! Most drivers have the same children for life and give them by [`Driver::children`]. One that
//! can get more of them and lose some keeps them here: each of its requests enters the set that
//! there is and uses no other until it is done, and the graph drains the set before it puts
//! another in its place. So a request sees the old set or the new one, and for those who stand
//! above the driver a change is a short wait at most.
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
    set: Gate<CopySet>,
    next: AtomicUsize,
}

impl Copies {
    /// These children.
    pub fn new(children: Vec<Arc<Child>>) -> Copies {
        let next = AtomicUsize::new(children.len());
        Copies { set: Gate::new(children.into()), next }
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
        match self.set.try_enter() {
            Some(e) => e,
            None => self.set.enter().await,
        }
    }

    /// The present set, unless it is drained.
    pub fn try_enter(&self) -> Option<Entered<'_, CopySet>> {
        self.set.try_enter()
    }

    /// A copy of the present set, for what need not hold it in force, such as a flush.
    pub async fn present(&self) -> CopySet {
        self.enter().await.clone()
    }

    /// Stops new requests before the set and waits until those that use it have settled. For the
    /// graph: the result alone can put another set in its place, and dropping it lets requests go
    /// on.
    pub async fn drain(&self) -> Drained<'_, CopySet> {
        let mut held_back = Vec::new();
        for c in self.present().await.iter() {
            held_back.extend(c.node().await.map(Expedited::new));
        }
        self.set.close().await
    }
}

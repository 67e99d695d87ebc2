//! Flushes: one at a time, shared by those who came before it began, and never forgiven.
//!
//! The kernel tells an error of writing back once for each open file. So that the one flush that
//! hears of it is not overtaken by another that does not, they go one after the other; who waited
//! while one began and ended is served by it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_io::RangeLock;

use super::FileDriver;

/// The flushes of a file.
#[derive(Default)]
pub(super) struct Flushes {
    turn: RangeLock,
    /// How many have begun.
    begun: AtomicU64,
    /// The number of the last one that succeeded.
    succeeded: AtomicU64,
    /// The first that lost data.
    failed: Mutex<Option<Error>>,
}

impl Flushes {
    fn failed(&self) -> MutexGuard<'_, Option<Error>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FileDriver {
    pub(super) async fn flush_file(&self) -> Result<()> {
        // Also a node that is read-only by now may have unflushed writes from before.
        if self.no_flush || !(self.first_writes || self.second.get().is_some()) {
            return Ok(());
        }
        let f = &self.flushes;
        let before = f.begun.load(Ordering::SeqCst);
        let _turn = f.turn.lock(ByteRange::new(0, 1)).await;
        if let Some(e) = &*f.failed() {
            return Err(e.clone().context("an earlier flush failed, and with it data were lost"));
        }
        if f.succeeded.load(Ordering::SeqCst) > before {
            return Ok(());
        }
        let number = f.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let outcome = self.file().sync().await.at(|| self.at());
        match &outcome {
            Ok(()) => f.succeeded.store(number, Ordering::SeqCst),
            // The kernel forgets dirty pages that it could not write: a later flush would
            // succeed without them.
            Err(e) if !self.direct_io => *f.failed() = Some(e.clone()),
            Err(_) => {}
        }
        outcome
    }
}

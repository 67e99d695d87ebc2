//! Flushes: one at a time, shared by those who came before it began, and never forgiven.
//!
//! The kernel tells an error of writing back once for each open file. So that the one flush that
//! hears of it is not overtaken by another that does not, they go one after the other; who waited
//! while one began and ended is served by it.
//!
//! A flush that nobody waits for is prepared by writing back bit by bit (decision 0007).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use gipfel_base::units::MIB;
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_io::RangeLock;
use gipfel_io::time::sleep;

use super::FileDriver;

/// What is written back at a time, in bytes.
const PIECE: u64 = MIB;
/// Where to write back is looked up for this many bytes at a time at least,
const MIN_WINDOW: u64 = 64 * MIB;
/// and for as many that the file has no more such windows.
const MAX_WINDOWS: u64 = 1024;
/// The pause after each piece, in which others get the processor and the disk.
const PAUSE: Duration = Duration::from_micros(500);

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

    pub(super) async fn write_back_file(&self, enough: &dyn Fn() -> bool) {
        let len = self.size.load(Ordering::Acquire);
        let window = (len / MAX_WINDOWS).next_multiple_of(PIECE).max(MIN_WINDOW);
        for start in (0..len).step_by(window as usize) {
            // Looking takes time as well, a few ns for each cached page.
            sleep(PAUSE).await;
            if enough() {
                return;
            }
            let file = self.file();
            let window = ByteRange::new(start, window.min(len - start));
            for range in file.dirty(window, PIECE).await.unwrap_or_default() {
                if enough() {
                    return;
                }
                file.start_write_back(range).await;
                sleep(PAUSE).await;
            }
        }
    }
}

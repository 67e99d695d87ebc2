//! How far a command is: shown with `-p`, told when a signal asks.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use gipfel_base::{Error, Result};
use gipfel_io::time;

use super::{Either, first_of};

/// How often progress is shown.
const INTERVAL: Duration = Duration::from_millis(100);

/// Bytes done, of all there are to do.
#[derive(Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// Nothing done, and not known of how much.
    pub fn new() -> Arc<Progress> {
        Arc::default()
    }

    /// There are `bytes` to do.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Ordering::Relaxed);
    }

    /// So many of them are done, altogether.
    pub fn set_done(&self, bytes: u64) {
        self.done.store(bytes, Ordering::Relaxed);
    }

    /// So many more are done.
    pub fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    fn text(&self) -> String {
        let total = self.total.load(Ordering::Relaxed).max(1);
        let share = self.done.load(Ordering::Relaxed) as f64 / total as f64;
        format!("    ({:.2}/100%)", share.min(1.0) * 100.0)
    }

    /// Tells it to whoever asked by a signal.
    pub fn report(&self) {
        eprintln!("{}", self.text());
    }

    /// Carries `work` out. If `show`, progress is printed meanwhile; the line is left open.
    pub async fn shown<T, E: From<Error>>(
        &self,
        show: bool,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let mut work = pin!(work);
        if !show {
            return work.await;
        }
        let print = |text: &str| super::print(&format!("{text}\r"));
        print("    (0.00/100%)")?;
        let done = loop {
            match first_of(work.as_mut(), time::sleep(INTERVAL)).await {
                Either::Left(done) => break done,
                Either::Right(()) => print(&self.text())?,
            }
        };
        if done.is_ok() {
            print("    (100.00/100%)")?;
        }
        done
    }

    /// The same, and the line is ended.
    pub async fn shown_whole<T>(
        &self,
        show: bool,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let done = self.shown(show, work).await;
        if show {
            super::print("\n")?;
        }
        done
    }
}

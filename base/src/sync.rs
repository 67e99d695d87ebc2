//! The atomics, mutexes and threads that concurrent cores use: std's, or shuttle's under
//! `--cfg shuttle`, so that the same code runs under the model checker.

#[cfg(not(shuttle))]
pub use std::{sync, thread};

#[cfg(shuttle)]
pub use shuttle::{sync, thread};

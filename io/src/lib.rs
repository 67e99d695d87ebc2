//! The executor on io_uring, files, sockets, timers and owned buffers.
//!
//! One ring and one run queue for each thread; a task stays on the thread that spawned it, wakers
//! work from any thread. [`sim`] is the same interface behind a seeded simulation on one thread
//! with a virtual clock. This crate knows nothing of nodes or formats; it is the only one below
//! the exports where `unsafe` is allowed, each use with its reason.
#![allow(unsafe_code)]

pub mod address;
mod blocking;
pub mod buf;
mod exec;
pub mod file;
pub mod gate;
pub mod net;
mod op;
pub mod process;
pub mod rangelock;
mod ring;
mod shard;
pub mod signals;
pub mod sim;
pub mod time;

pub use blocking::compute;
pub use buf::Buf;
pub use exec::{Handle, JoinHandle, Runtime, Task, current, spawn_local, yield_now};
pub use file::{File, FileInfo, FileKind, OpenOptions, ZeroMode};
pub use gate::{Drained, Entered, Epoch, EpochPin, Gate};
pub use rangelock::{RangeGuard, RangeLock};

//! Errors, byte ranges, units and named limits that every other gipfel crate uses.
//!
//! This crate knows nothing of I/O, nodes or the graph.

pub mod error;
pub mod limits;
pub mod range;
pub mod sync;
pub mod units;

pub use error::{Error, ErrorKind, Result, ResultExt};
pub use range::ByteRange;

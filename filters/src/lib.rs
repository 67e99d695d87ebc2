//! Filter drivers: throttle, copy-on-read, detect-zeroes; and quorum, which shows what its children
//! agree on.
//!
//! A filter shows exactly the data of its one child, `file`, and does something beside. Each is
//! made by the graph for an option (an implicit filter) or, where the QMP reference has a driver
//! of that name, by `blockdev-add`. What a filter does not change goes straight through: see
//! `filter`.

pub mod copy_on_read;
pub mod detect_zeroes;
mod filter;
pub mod quorum;
#[cfg(test)]
mod testing;
pub mod throttle;

pub use copy_on_read::COPY_ON_READ;
pub use detect_zeroes::DETECT_ZEROES;
pub use quorum::QUORUM;
pub use throttle::{Groups, Limits, THROTTLE, ThrottleGroup};

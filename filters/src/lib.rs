//! Filter drivers: throttle, copy-on-read, copy-before-write, detect-zeroes, compress, preallocate;
//! snapshot-access, which reads what copy-before-write keeps; quorum, which shows what its children
//! agree on; and, for tests, blkdebug, blkverify, blklogwrites.
//!
//! A filter shows exactly the data of one child, mostly `file`, and does something beside. Each is
//! made by the graph for an option (an implicit filter) or, where the QMP reference has a driver
//! of that name, by `blockdev-add`. What a filter does not change goes straight through: see
//! `filter`.

pub mod blkdebug;
pub mod blklogwrites;
pub mod blkverify;
pub mod compress;
pub mod copy_before_write;
pub mod copy_on_read;
pub mod detect_zeroes;
mod filter;
pub mod preallocate;
pub mod quorum;
#[cfg(test)]
mod smallest;
#[cfg(test)]
mod smallest_tests;
pub mod snapshot_access;
#[cfg(test)]
mod testing;
pub mod throttle;

pub use blkdebug::BLKDEBUG;
pub use blklogwrites::BLKLOGWRITES;
pub use blkverify::BLKVERIFY;
pub use compress::COMPRESS;
pub use copy_before_write::COPY_BEFORE_WRITE;
pub use copy_on_read::COPY_ON_READ;
pub use detect_zeroes::DETECT_ZEROES;
pub use preallocate::PREALLOCATE;
pub use quorum::QUORUM;
pub use snapshot_access::SNAPSHOT_ACCESS;
pub use throttle::{Groups, Limits, THROTTLE, ThrottleGroup};

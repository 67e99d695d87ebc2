//! Protocol drivers: nodes that reach storage and have no children.
//!
//! They know nothing of formats or of the graph; the binary registers them.

pub mod file;
pub mod null;

pub use file::FILE;
pub use null::{NULL_AIO, NULL_CO};

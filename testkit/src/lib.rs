//! What the tests share: an NBD client, a QMP client, scratch folders, the reference tools, the
//! daemon under test, a model of a disk and a seeded random generator.
//!
//! The NBD client is written from the specification on its own, not on the server's codec, so
//! that the two check one another. Everything here blocks and panics freely: it is for tests.

pub mod daemon;
pub mod model;
pub mod nbd;
pub mod qmp;
pub mod rng;
pub mod scratch;
pub mod tools;

pub use daemon::Daemon;
pub use model::DiskModel;
pub use rng::Rng;
pub use scratch::Scratch;

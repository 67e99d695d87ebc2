//! The NBD export: protocol codec, connections, server.
//!
//! - [`proto`]: the wire format and its rules, free of I/O.
//! - [`disk`]: what an export needs of a disk.
//! - [`server`]: listeners, exports by name, limits, removal and stop.
//! - `connection`: one client, from greeting to goodbye; `flow`: its requests in flight.
//!
//! A connection lives on one I/O thread and shares nothing with others but its export's disk.
//! Source: the NBD protocol specification, doc/proto.md of NetworkBlockDevice/nbd.

mod connection;
pub mod disk;
mod flow;
pub mod proto;
pub mod server;

pub use disk::{Disk, Extent, ZeroFlags};
pub use server::{ExportOptions, Removal, Server, ServerOptions};

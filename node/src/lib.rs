//! The node contract: what a driver is, how requests cross from node to node.
//!
//! A [`Driver`] answers, without waiting, where the bytes of a request lie ([`Driver::map`]); the
//! runner behind [`Child`] then does the plain I/O, the same for all drivers. Only what needs work
//! (allocation, copy-on-write, decompression, throttling) goes the asynchronous way through the
//! driver. Every crossing is an edge, checked and counted: see [`Child`].
//!
//! This crate knows no concrete driver, no graph, no client.

pub mod check;
pub mod child;
pub mod copies;
pub mod debug;
pub mod def;
pub mod driver;
pub mod image;
pub mod node;
pub mod perm;
pub mod report;
mod runner;
pub mod secret;
pub mod snapshot;
pub mod status;

pub use check::{CheckArgs, CheckReport, Fix};
pub use child::Child;
pub use copies::{Copies, CopySet};
pub use debug::{DebugEvent, Debugger, Held};
pub use def::{
    ChildSpec, Common, CreateArgs, Discard, DriverDef, FromName, Implicit, Kind, NameFor, OpenArgs,
    Opened, ReadName,
};
pub use driver::{
    Ability, Access, Driver, DriverInfo, IoFuture, Limits, Mapping, Reopen, WriteFlags, ZeroFlags,
};
pub use image::{BackingName, ImageFormat, ImageSize, Preallocation};
pub use node::Node;
pub use perm::{Binding, Perm, Perms, Role};
pub use report::{Report, Reports};
pub use secret::{Secret, Secrets};
pub use snapshot::SnapshotSource;
pub use status::Status;

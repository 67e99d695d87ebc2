//! The block graph: backends, permissions, drained sections, transactions, mutators.
//!
//! [`model`] is the graph as plain values; every change is an edit of it that is checked before
//! anything live is touched ([`transaction`]). This crate names no driver: concrete ones come
//! through the [`Registry`].

mod add;
pub mod backend;
mod backends;
mod copies;
mod create;
mod faults;
mod filename;
mod graph;
mod group;
mod image;
mod job_filter;
mod medium;
pub mod model;
mod open;
mod perms;
mod picture;
mod query;
mod registry;
mod reopen;
mod replace;
mod resize;
mod snapshot;
mod throttle;
mod transaction;
mod ways;

pub use backend::{Backend, Follow};
pub use backends::Tray;
pub use copies::ChildChange;
pub use faults::{Faults, IoStatus, OnError, Operation};
pub use filename::{NameMeans, nest, relative_to};
pub use graph::{BackendOptions, Graph};
pub use group::Action;
pub use job_filter::{JobFilter, JobFilterSpec, MakeJobFilter};
pub use medium::{Medium, ReadOnlyMode};
pub use model::{BackendId, EdgeId, Model, NodeId};
pub use registry::{ImplicitFilters, MakeThrottle, Opener, Registry, ZeroDetection};
pub use replace::ReplaceEdges;
pub use snapshot::SnapshotSync;

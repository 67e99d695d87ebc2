//! QMP: one definition of commands, events and options; the monitor.
//!
//! Everything about the control protocol follows from the schema in `qmp/schema/*.qmp`: the
//! checking of commands ([`Session`]), of option text on command lines
//! ([`Schema::read_option`]), introspection, and the reference page. A program fills a
//! [`Registry`] with handlers and does the I/O.
//!
//! This crate knows no driver code, no node and no graph; it does no I/O and reads no clock.

mod class;
pub mod json;
pub mod keyval;
mod lexer;
pub mod limits;
mod registry;
pub mod schema;
mod session;

pub use class::ErrorClass;
pub use registry::{LocalBoxFuture, Registry};
pub use schema::{Form, Schema};
pub use session::{Incoming, Outgoing, Request, Session, Timestamp, Version};

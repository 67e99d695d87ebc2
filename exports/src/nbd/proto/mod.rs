//! The NBD wire format and its rules, free of I/O: bytes in, decisions and bytes out.
//!
//! - [`consts`]: numbers of the protocol, and the named limits of this server.
//! - [`negotiate`]: the handshake phase as a state machine.
//! - [`request`]: transmission requests, and whether an export may run them.
//! - [`reply`]: transmission replies, written into buffers of the caller.
//!
//! What it does not do: sockets, time, disks, TLS, extended headers (both refused as the
//! specification says). Section names in comments are those of doc/proto.md (2025-05).

pub mod consts;
pub mod negotiate;
pub mod reply;
pub mod request;

#[cfg(test)]
mod tests;

pub use consts::WireError;
pub use negotiate::{Close, ExportInfo, ExportList, Negotiation, Progress, Session};
pub use request::{Op, Refusal, Request, Verdict};

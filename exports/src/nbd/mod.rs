//! The NBD export: protocol codec (`proto`).
//!
//! Source: the NBD protocol specification, doc/proto.md of NetworkBlockDevice/nbd.

pub mod proto;

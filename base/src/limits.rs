//! Named limits: what a client, a file or a command can make the process hold or do.
//!
//! Drivers keep limits that concern only their own format beside their code.

use crate::units::{KIB, MIB};

/// Longest chain of nodes under one edge, the node itself included.
pub const MAX_CHAIN_DEPTH: usize = 256;
/// Longest single read or write that enters the graph, in bytes.
pub const MAX_REQUEST: u64 = 64 * MIB;
/// Longest node-name, backend name or export id, in bytes.
pub const MAX_NAME: usize = 255;
/// Longest node-name, in bytes (QMP reference, BlockdevOptions).
pub const MAX_NODE_NAME: usize = 31;
/// Memory that the free lists of one I/O thread keep for reuse, in bytes.
pub const MAX_POOLED: u64 = 8 * MIB;
/// Buffers in I/O are aligned to this, in bytes; no known device demands more.
pub const BUFFER_ALIGN: usize = (4 * KIB) as usize;

//! A blocking NBD client: handshake option by option, pipelined requests, and raw bytes.
//!
//! Source: doc/proto.md of NetworkBlockDevice/nbd. It checks the server: chunks that overlap,
//! leave gaps, come twice or belong to nobody are errors, not details.

mod client;
mod handshake;
mod stream;

pub use client::{BlockStatus, Client, Command, Completion, Data};
pub use handshake::{Handshake, Info, OptionReply};
pub use stream::{Address, Stream};

/// Numbers of the protocol that tests need.
pub mod wire {
    /// Client flags: fixed newstyle and no zeroes.
    pub const CLIENT_FLAGS: u32 = 3;
    /// Options.
    pub const OPT_EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const OPT_ABORT: u32 = 2;
    /// List exports.
    pub const OPT_LIST: u32 = 3;
    /// TLS.
    pub const OPT_STARTTLS: u32 = 5;
    /// Ask about an export.
    pub const OPT_INFO: u32 = 6;
    /// Choose an export.
    pub const OPT_GO: u32 = 7;
    /// Structured replies.
    pub const OPT_STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const OPT_LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const OPT_SET_META_CONTEXT: u32 = 10;
    /// Extended headers.
    pub const OPT_EXTENDED_HEADERS: u32 = 11;

    /// Option done.
    pub const REP_ACK: u32 = 1;
    /// An export.
    pub const REP_SERVER: u32 = 2;
    /// Information.
    pub const REP_INFO: u32 = 3;
    /// A metadata context.
    pub const REP_META_CONTEXT: u32 = 4;
    /// Unknown option.
    pub const REP_ERR_UNSUP: u32 = 0x8000_0001;
    /// Malformed option.
    pub const REP_ERR_INVALID: u32 = 0x8000_0003;
    /// Unknown export.
    pub const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
    /// Block sizes must be asked for.
    pub const REP_ERR_BLOCK_SIZE_REQD: u32 = 0x8000_0008;
    /// Option too large.
    pub const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

    /// Request types.
    pub const CMD_READ: u16 = 0;
    /// Write.
    pub const CMD_WRITE: u16 = 1;
    /// Disconnect.
    pub const CMD_DISC: u16 = 2;
    /// Flush.
    pub const CMD_FLUSH: u16 = 3;
    /// Discard.
    pub const CMD_TRIM: u16 = 4;
    /// Read ahead.
    pub const CMD_CACHE: u16 = 5;
    /// Make zero.
    pub const CMD_WRITE_ZEROES: u16 = 6;
    /// Block status.
    pub const CMD_BLOCK_STATUS: u16 = 7;

    /// Durable before the reply.
    pub const FLAG_FUA: u16 = 1;
    /// Zeroes must stay allocated.
    pub const FLAG_NO_HOLE: u16 = 2;
    /// One content chunk.
    pub const FLAG_DF: u16 = 4;
    /// One extent.
    pub const FLAG_REQ_ONE: u16 = 8;
    /// Zero quickly or fail.
    pub const FLAG_FAST_ZERO: u16 = 16;

    /// Transmission flag: read-only.
    pub const EXPORT_READ_ONLY: u16 = 1 << 1;
    /// Transmission flag: DF is known.
    pub const EXPORT_SEND_DF: u16 = 1 << 7;
    /// Transmission flag: several connections are safe.
    pub const EXPORT_CAN_MULTI_CONN: u16 = 1 << 8;
}

//! Numbers of the NBD protocol ("Values") and the limits that this server sets.

use gipfel_base::units::{KIB, MIB};

/// First magic of the handshake, "NBDMAGIC" ("Newstyle negotiation").
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Magic of options, "IHAVEOPT" ("Newstyle negotiation").
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Magic of option replies ("Fixed newstyle negotiation").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Magic of a request ("Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Magic of a simple reply ("Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Magic of a structured reply chunk ("Structured reply chunk message").
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags and client flags ("Handshake flags", "Client flags").
pub mod handshake {
    /// The peer speaks fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// The 124 zero bytes after EXPORT_NAME may be left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags ("Transmission flags").
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused with EPERM.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is offered.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA command flag is honoured.
    pub const SEND_FUA: u16 = 1 << 3;
    /// The medium turns.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is offered.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES and NO_HOLE are offered.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF command flag is honoured (only with structured replies).
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see one another's flushed writes.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is offered.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The FAST_ZERO command flag is honoured.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the handshake ("Option types").
pub mod option {
    /// Choose an export without a way to answer errors.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Ask about an export.
    pub const INFO: u32 = 6;
    /// Choose an export.
    pub const GO: u32 = 7;
    /// Agree on structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Agree on extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options ("Option reply types").
pub mod option_reply {
    /// The option is done.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information on an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Option unknown here.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// Option known, forbidden here.
    pub const ERR_POLICY: u32 = (1 << 31) + 2;
    /// Option malformed.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// The server is stopping.
    pub const ERR_SHUTDOWN: u32 = (1 << 31) + 7;
    /// The client must ask for block sizes first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = (1 << 31) + 8;
    /// Option or reply too large.
    pub const ERR_TOO_BIG: u32 = (1 << 31) + 9;
}

/// Kinds of information in INFO and GO ("Option reply types", NBD_REP_INFO).
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Description for people.
    pub const DESCRIPTION: u16 = 2;
    /// Size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Request types ("Request types").
pub mod command {
    /// Read bytes.
    pub const READ: u16 = 0;
    /// Write bytes.
    pub const WRITE: u16 = 1;
    /// Disconnect, no reply.
    pub const DISC: u16 = 2;
    /// Make finished writes durable.
    pub const FLUSH: u16 = 3;
    /// Bytes are no longer needed.
    pub const TRIM: u16 = 4;
    /// Bytes will be needed soon.
    pub const CACHE: u16 = 5;
    /// Make bytes zero.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask for metadata of a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests ("Command flags").
pub mod command_flag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES must leave the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ must be answered in one content chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS wants one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES must fail rather than be slow.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Structured reply flags and types ("Structured reply flags", "Structured reply types").
pub mod chunk {
    /// Flag: the last chunk of a reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// No payload; success, if no error chunk came before.
    pub const NONE: u16 = 0;
    /// Bytes at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents of one metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// An error.
    pub const ERROR: u16 = (1 << 15) + 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
}

/// Flags of a `base:allocation` extent ("`base:allocation` metadata context").
pub mod allocation {
    /// The context's name.
    pub const NAME: &str = "base:allocation";
    /// Not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Bytes in a request header.
pub const REQUEST_LEN: usize = 28;
/// Bytes in a simple reply header.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Bytes in the header of a structured reply chunk.
pub const CHUNK_HEADER_LEN: usize = 20;
/// Longest string of the protocol, in bytes ("Conventions").
pub const MAX_STRING: usize = 4096;

/// Limit: option data that is kept and looked at, in bytes; longer data are skipped and the
/// option is refused as too big.
pub const MAX_OPTION_DATA: u32 = 64 * KIB as u32;
/// Limit: option data that are skipped rather than answered by closing, in bytes.
pub const MAX_OPTION_SKIP: u32 = 16 * MIB as u32;
/// Limit: options in one handshake; more is no negotiation any longer.
pub const MAX_OPTIONS: u32 = 4096;
/// Limit: longest READ and WRITE, in bytes; advertised as maximum payload size. The
/// specification asks for at least 2^25 by default ("Size constraints").
pub const MAX_PAYLOAD: u32 = 32 * MIB as u32;
/// Limit: payload of a refused WRITE that is skipped rather than answered by closing, in bytes.
pub const MAX_PAYLOAD_SKIP: u32 = 64 * MIB as u32;
/// Limit: extents in one BLOCK_STATUS chunk; the specification's own bound is 2^20.
pub const MAX_EXTENTS: usize = 2048;

/// Error numbers that may stand in a reply ("Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum WireError {
    /// Operation not permitted: a write to a read-only export.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Out of memory.
    NoMem = 12,
    /// The request breaks a rule.
    Inval = 22,
    /// No space left, or a write past the end.
    NoSpace = 28,
    /// Too large to answer.
    Overflow = 75,
    /// Not supported: only as answer to FAST_ZERO.
    NotSup = 95,
    /// The server is stopping.
    Shutdown = 108,
}

impl WireError {
    /// The protocol's number for a Linux errno. EDQUOT and EFBIG become ENOSPC; ENOTSUP may
    /// only answer a FAST_ZERO request and is EINVAL otherwise; anything unknown is EIO.
    pub fn from_errno(errno: i32, fast_zero: bool) -> Self {
        const EACCES: i32 = 13;
        const EFBIG: i32 = 27;
        const EROFS: i32 = 30;
        const EDQUOT: i32 = 122;
        match errno {
            1 | EACCES | EROFS => Self::Perm,
            12 => Self::NoMem,
            22 => Self::Inval,
            28 | EFBIG | EDQUOT => Self::NoSpace,
            95 if fast_zero => Self::NotSup,
            95 => Self::Inval,
            108 => Self::Shutdown,
            _ => Self::Io,
        }
    }

    /// The number on the wire.
    pub fn number(self) -> u32 {
        self as u32
    }
}

//! Transmission requests: the 28 bytes of a header, and the decision what becomes of it.
//!
//! [`Request::judge`] is a pure function of request and session. It runs nothing.

use super::consts::{
    MAX_PAYLOAD, MAX_PAYLOAD_SKIP, REQUEST_LEN, REQUEST_MAGIC, WireError, command, command_flag,
    export_flag,
};
use super::negotiate::Session;
use gipfel_base::ByteRange;

/// A request as it stands on the wire ("Request message").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Request type.
    pub kind: u16,
    /// The client's name for the request; the reply repeats it.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
}

/// What an accepted request asks of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read; `df`: answer in one content chunk.
    Read {
        /// What to read, in bytes.
        range: ByteRange,
        /// Do not fragment.
        df: bool,
    },
    /// Write the payload.
    Write {
        /// Where, in bytes.
        range: ByteRange,
        /// Durable before the reply.
        fua: bool,
    },
    /// Make zero.
    WriteZeroes {
        /// Where, in bytes.
        range: ByteRange,
        /// Durable before the reply.
        fua: bool,
        /// The range may become a hole.
        may_unmap: bool,
        /// Fail with ENOTSUP rather than write zero bytes.
        fast: bool,
    },
    /// Forget the contents.
    Trim {
        /// Where, in bytes.
        range: ByteRange,
        /// Durable before the reply.
        fua: bool,
    },
    /// Read ahead.
    Cache {
        /// Where, in bytes.
        range: ByteRange,
    },
    /// Make finished writes durable.
    Flush,
    /// Report extents.
    BlockStatus {
        /// Where, in bytes; never empty.
        range: ByteRange,
        /// At most one extent for each context, within the range.
        one: bool,
    },
    /// A request of length 0 that has nothing to do: answer success.
    Nothing,
}

/// A request that is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The number in the reply.
    pub error: WireError,
    /// What to tell people, where the reply has room for it.
    pub message: &'static str,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Run it (after its payload arrived, for a write).
    Run(Op),
    /// Skip its payload (see [`Request::payload`]), answer the error, go on.
    Refuse(Refusal),
    /// The client is done: finish what is in flight, then close ("NBD_CMD_DISC").
    Disconnect,
    /// The client broke the protocol past repair: close.
    Violation(&'static str),
}

fn refuse(error: WireError, message: &'static str) -> Verdict {
    Verdict::Refuse(Refusal { error, message })
}

impl Request {
    /// Reads a header; `None` where it does not start with the request magic, after which the
    /// stream cannot be followed any more.
    pub fn parse(b: &[u8; REQUEST_LEN]) -> Option<Request> {
        let u16_at = |i: usize| u16::from_be_bytes([b[i], b[i + 1]]);
        let u32_at = |i: usize| u32::from_be_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) << 32 | u64::from(u32_at(i + 4));
        (u32_at(0) == REQUEST_MAGIC).then(|| Request {
            flags: u16_at(4),
            kind: u16_at(6),
            cookie: u64_at(8),
            offset: u64_at(16),
            length: u32_at(24),
        })
    }

    /// Bytes that follow the header on the wire, whatever the verdict is: only WRITE has some.
    pub fn payload(&self) -> u32 {
        if self.kind == command::WRITE { self.length } else { 0 }
    }

    /// Decides what to do with the request on this session's export.
    pub fn judge(&self, session: &Session) -> Verdict {
        if self.kind == command::DISC {
            return Verdict::Disconnect;
        }
        if self.payload() > MAX_PAYLOAD_SKIP {
            return Verdict::Violation("a write is longer than any payload this server would skip");
        }
        if let Err(r) = self.check_flags(session) {
            return Verdict::Refuse(r);
        }
        let flag = |f| self.flags & f != 0;
        let fua = flag(command_flag::FUA);
        match self.kind {
            command::READ => self.judge_read(session),
            command::WRITE => self.writing(session, |range| Op::Write { range, fua }),
            command::WRITE_ZEROES => self.writing(session, |range| Op::WriteZeroes {
                range,
                fua,
                may_unmap: !flag(command_flag::NO_HOLE),
                fast: flag(command_flag::FAST_ZERO),
            }),
            command::TRIM => self.writing(session, |range| Op::Trim { range, fua }),
            command::CACHE => self.ranged(session, |range| Op::Cache { range }),
            // "NBD_CMD_FLUSH": length and offset are reserved and must be zero.
            command::FLUSH if self.offset != 0 || self.length != 0 => {
                refuse(WireError::Inval, "a flush has offset and length 0")
            }
            command::FLUSH => Verdict::Run(Op::Flush),
            command::BLOCK_STATUS if session.contexts.is_empty() => {
                refuse(WireError::Inval, "no metadata context was agreed on for this export")
            }
            command::BLOCK_STATUS if self.length == 0 => {
                refuse(WireError::Inval, "block status of no bytes")
            }
            command::BLOCK_STATUS => {
                let one = flag(command_flag::REQ_ONE);
                self.ranged(session, |range| Op::BlockStatus { range, one })
            }
            // "Error values": EINVAL for an unknown command.
            _ => refuse(WireError::Inval, "unknown request type"),
        }
    }

    /// "Command flags": a flag that is unknown, not of this command, or not advertised, is EINVAL.
    /// FUA is accepted on every command where it is advertised.
    fn check_flags(&self, session: &Session) -> Result<(), Refusal> {
        let offered = |bit| session.flags & bit != 0;
        let mut legal = 0;
        if offered(export_flag::SEND_FUA) {
            legal |= command_flag::FUA;
        }
        match self.kind {
            command::READ if offered(export_flag::SEND_DF) => legal |= command_flag::DF,
            command::WRITE_ZEROES => {
                legal |= command_flag::NO_HOLE;
                if offered(export_flag::SEND_FAST_ZERO) {
                    legal |= command_flag::FAST_ZERO;
                }
            }
            command::BLOCK_STATUS => legal |= command_flag::REQ_ONE,
            _ => {}
        }
        if self.flags & !legal != 0 {
            let message = "a command flag that was not offered for this request";
            return Err(Refusal { error: WireError::Inval, message });
        }
        let (bit, message) = match self.kind {
            command::FLUSH => (export_flag::SEND_FLUSH, "this export offers no flush"),
            command::TRIM => (export_flag::SEND_TRIM, "this export offers no trim"),
            command::WRITE_ZEROES => {
                (export_flag::SEND_WRITE_ZEROES, "this export offers no write zeroes")
            }
            _ => return Ok(()),
        };
        // On a read-only export these are EPERM (in `writing`), offered or not.
        let read_only = offered(export_flag::READ_ONLY) && self.kind != command::FLUSH;
        if offered(bit) || read_only {
            return Ok(());
        }
        Err(Refusal { error: WireError::Inval, message })
    }

    fn judge_read(&self, session: &Session) -> Verdict {
        if self.length > MAX_PAYLOAD {
            // "NBD_CMD_READ": a structured reply may refuse a large read with EOVERFLOW;
            // "Error values" keeps that number from simple replies.
            let error = if session.structured { WireError::Overflow } else { WireError::Inval };
            return refuse(error, "read longer than the maximum payload size");
        }
        let df = self.flags & command_flag::DF != 0;
        self.ranged(session, |range| Op::Read { range, df })
    }

    /// Checks of requests that change the disk: EPERM on a read-only export, ENOSPC past the end
    /// ("Error values"); a trim past the end is EINVAL.
    fn writing(&self, session: &Session, op: impl FnOnce(ByteRange) -> Op) -> Verdict {
        if session.flags & export_flag::READ_ONLY != 0 {
            return refuse(WireError::Perm, "the export is read-only");
        }
        if self.payload() > MAX_PAYLOAD {
            return refuse(WireError::Inval, "write longer than the maximum payload size");
        }
        if self.kind != command::TRIM && self.range_in(session.size).is_none() {
            return refuse(WireError::NoSpace, "write past the end of the export");
        }
        self.ranged(session, op)
    }

    fn ranged(&self, session: &Session, op: impl FnOnce(ByteRange) -> Op) -> Verdict {
        let Some(range) = self.range_in(session.size) else {
            return refuse(WireError::Inval, "range past the end of the export");
        };
        if !range.is_aligned(u64::from(session.min_block)) {
            let message = "offset or length is no multiple of the minimum block size";
            return refuse(WireError::Inval, message);
        }
        Verdict::Run(if range.is_empty() { Op::Nothing } else { op(range) })
    }

    fn range_in(&self, size: u64) -> Option<ByteRange> {
        ByteRange::checked(self.offset, u64::from(self.length)).filter(|r| r.end() <= size)
    }
}

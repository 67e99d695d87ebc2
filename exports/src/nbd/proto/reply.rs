//! Transmission replies, written into buffers that the caller owns. Nothing here allocates.
//!
//! Each function returns how many bytes it wrote, and panics where the buffer is shorter than the
//! constant it names: buffers are the server's own, never of a size that a client chose.

use super::consts::{
    CHUNK_HEADER_LEN, CHUNK_MAGIC, SIMPLE_REPLY_LEN, SIMPLE_REPLY_MAGIC, WireError, chunk,
};

/// Bytes of an OFFSET_DATA chunk before its data.
pub const DATA_PREFIX_LEN: usize = CHUNK_HEADER_LEN + 8;
/// Bytes of an OFFSET_HOLE chunk.
pub const HOLE_LEN: usize = CHUNK_HEADER_LEN + 12;
/// Bytes of a BLOCK_STATUS chunk before its extents.
pub const STATUS_PREFIX_LEN: usize = CHUNK_HEADER_LEN + 4;
/// Bytes of one extent in a BLOCK_STATUS chunk.
pub const EXTENT_LEN: usize = 8;
/// Longest message in an error chunk, in bytes; longer ones are cut.
pub const MAX_MESSAGE: usize = 200;
/// Room that any error reply fits in, in bytes.
pub const MAX_ERROR_LEN: usize = CHUNK_HEADER_LEN + 6 + MAX_MESSAGE + 8;

/// A simple reply ("Simple reply message"); read data follow where `error` is none.
pub fn simple(out: &mut [u8], cookie: u64, error: Option<WireError>) -> usize {
    out[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out[4..8].copy_from_slice(&error.map_or(0, WireError::number).to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    SIMPLE_REPLY_LEN
}

/// The header of a chunk ("Structured reply chunk message") with `len` bytes of payload.
fn header(out: &mut [u8], cookie: u64, kind: u16, done: bool, len: u32) {
    let flags = if done { chunk::FLAG_DONE } else { 0 };
    out[0..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&kind.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..20].copy_from_slice(&len.to_be_bytes());
}

/// A chunk without payload that ends a reply.
pub fn none(out: &mut [u8], cookie: u64) -> usize {
    header(out, cookie, chunk::NONE, true, 0);
    CHUNK_HEADER_LEN
}

/// What precedes `len` bytes of data read at `offset`. `len` is not 0 and at most `MAX_PAYLOAD`.
pub fn data_prefix(out: &mut [u8], cookie: u64, offset: u64, len: u32, done: bool) -> usize {
    header(out, cookie, chunk::OFFSET_DATA, done, len + 8);
    out[20..28].copy_from_slice(&offset.to_be_bytes());
    DATA_PREFIX_LEN
}

/// `len` (not 0) bytes at `offset` read as zeroes.
pub fn hole(out: &mut [u8], cookie: u64, offset: u64, len: u32, done: bool) -> usize {
    header(out, cookie, chunk::OFFSET_HOLE, done, 12);
    out[20..28].copy_from_slice(&offset.to_be_bytes());
    out[28..32].copy_from_slice(&len.to_be_bytes());
    HOLE_LEN
}

/// An error that ends the reply, with a message for people (cut at [`MAX_MESSAGE`] bytes).
pub fn error(out: &mut [u8], cookie: u64, error: WireError, message: &str) -> usize {
    let message = cut(message);
    let len = 6 + message.len();
    header(out, cookie, chunk::ERROR, true, len as u32);
    error_body(out, error, message);
    CHUNK_HEADER_LEN + len
}

/// As [`error`], for a failure at `offset`; `done` ends the reply.
pub fn error_at(
    out: &mut [u8],
    cookie: u64,
    error: WireError,
    message: &str,
    offset: u64,
    done: bool,
) -> usize {
    let message = cut(message);
    let len = 6 + message.len() + 8;
    header(out, cookie, chunk::ERROR_OFFSET, done, len as u32);
    let at = error_body(out, error, message);
    out[at..at + 8].copy_from_slice(&offset.to_be_bytes());
    CHUNK_HEADER_LEN + len
}

fn error_body(out: &mut [u8], error: WireError, message: &str) -> usize {
    out[20..24].copy_from_slice(&error.number().to_be_bytes());
    out[24..26].copy_from_slice(&(message.len() as u16).to_be_bytes());
    let end = 26 + message.len();
    out[26..end].copy_from_slice(message.as_bytes());
    end
}

fn cut(message: &str) -> &str {
    &message[..message.floor_char_boundary(MAX_MESSAGE)]
}

/// Writes one BLOCK_STATUS chunk ("NBD_REPLY_TYPE_BLOCK_STATUS"). Neighbours of equal status
/// become one extent.
pub struct StatusChunk<'a> {
    out: &'a mut [u8],
    used: usize,
    last: Option<(u32, u32)>,
    limit: usize,
}

impl<'a> StatusChunk<'a> {
    /// A chunk of at most `limit` extents in `out`, which holds at least one.
    pub fn new(out: &'a mut [u8], limit: usize) -> Self {
        assert!(limit > 0 && out.len() >= STATUS_PREFIX_LEN + EXTENT_LEN);
        Self { out, used: STATUS_PREFIX_LEN, last: None, limit }
    }

    /// Appends an extent. `false`, and nothing appended, where the chunk is full.
    pub fn push(&mut self, len: u32, status: u32) -> bool {
        if len == 0 {
            return true;
        }
        if let Some((before, s)) = self.last
            && s == status
            && let Some(sum) = before.checked_add(len)
        {
            self.last = Some((sum, status));
            let at = self.used - EXTENT_LEN;
            self.out[at..at + 4].copy_from_slice(&sum.to_be_bytes());
            return true;
        }
        if self.extents() == self.limit || self.out.len() - self.used < EXTENT_LEN {
            return false;
        }
        let at = self.used;
        self.out[at..at + 4].copy_from_slice(&len.to_be_bytes());
        self.out[at + 4..at + 8].copy_from_slice(&status.to_be_bytes());
        self.used += EXTENT_LEN;
        self.last = Some((len, status));
        true
    }

    /// Extents so far.
    pub fn extents(&self) -> usize {
        (self.used - STATUS_PREFIX_LEN) / EXTENT_LEN
    }

    /// Completes the chunk and returns its length in bytes. At least one extent was pushed.
    pub fn finish(self, cookie: u64, context: u32, done: bool) -> usize {
        assert!(self.used > STATUS_PREFIX_LEN, "a status chunk needs an extent");
        let len = (self.used - CHUNK_HEADER_LEN) as u32;
        header(self.out, cookie, chunk::BLOCK_STATUS, done, len);
        self.out[20..24].copy_from_slice(&context.to_be_bytes());
        self.used
    }
}

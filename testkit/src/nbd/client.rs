//! The client's side of the transmission phase.

use super::handshake::{Handshake, Info, broken};
use super::stream::{Address, Stream, read_exact};
use super::wire;
use gipfel_base::{Error, Result};
use std::collections::HashMap;
use std::io::BufReader;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Extents of one metadata context: length in bytes and status flags.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Name of the context.
    pub context: String,
    /// The extents in order.
    pub extents: Vec<(u32, u32)>,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// Request type.
    pub kind: u16,
    /// Command flags.
    pub flags: u16,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
    /// Payload of a write.
    pub payload: &'a [u8],
}

/// What a request brought back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Data {
    /// Bytes of a read.
    pub bytes: Vec<u8>,
    /// Extents of a block status.
    pub status: Vec<BlockStatus>,
    /// Content chunks that a read came in.
    pub chunks: u32,
    /// Bytes of a read that came as holes.
    pub hole_bytes: u64,
}

/// A finished request.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Its cookie.
    pub cookie: u64,
    /// What it brought, or the server's error number with its message.
    pub result: Result<Data>,
}

#[derive(Debug)]
struct Pending {
    kind: u16,
    flags: u16,
    offset: u64,
    length: u32,
    data: Data,
    covered: Vec<(u64, u64)>,
    error: Option<Error>,
}

/// A connection in the transmission phase.
#[derive(Debug)]
pub struct Client {
    stream: Stream,
    reader: BufReader<Stream>,
    info: Info,
    structured: bool,
    contexts: Vec<(u32, String)>,
    pending: HashMap<u64, Pending>,
    done: HashMap<u64, Completion>,
    next_cookie: u64,
}

impl Client {
    pub(super) fn new(
        stream: Stream,
        info: Info,
        structured: bool,
        contexts: Vec<(u32, String)>,
    ) -> Self {
        let clone = stream.try_clone().expect("a socket can be cloned");
        Self {
            stream,
            reader: BufReader::with_capacity(256 << 10, clone),
            info,
            structured,
            contexts,
            pending: HashMap::new(),
            done: HashMap::new(),
            next_cookie: 0x1000,
        }
    }

    /// Connects to `export` with structured replies and `base:allocation`.
    pub fn connect(address: &Address, export: &str) -> Result<Self> {
        let mut h = Handshake::connect(address)?;
        h.structured_reply()?;
        h.set_meta_context(export, &["base:allocation"])?;
        h.go(export)
    }

    /// Connects to `export` with simple replies.
    pub fn connect_simple(address: &Address, export: &str) -> Result<Self> {
        Handshake::connect(address)?.go(export)
    }

    /// What the server said about the export.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.info.size
    }

    /// Requests without a completion yet.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// The connection, for raw bytes to send.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// The next raw bytes, for tests that decode by themselves.
    pub fn receive_raw(&mut self, n: usize) -> Result<Vec<u8>> {
        let mut buf = vec![0; n];
        read_exact(&mut self.reader, &mut buf)?;
        Ok(buf)
    }

    /// The bytes of a request as they go on the wire.
    pub fn encode(c: &Command, cookie: u64) -> Vec<u8> {
        let mut m = Vec::with_capacity(28 + c.payload.len());
        m.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        m.extend_from_slice(&c.flags.to_be_bytes());
        m.extend_from_slice(&c.kind.to_be_bytes());
        m.extend_from_slice(&cookie.to_be_bytes());
        m.extend_from_slice(&c.offset.to_be_bytes());
        m.extend_from_slice(&c.length.to_be_bytes());
        m.extend_from_slice(c.payload);
        m
    }

    /// Sends a request and returns its cookie.
    pub fn submit(&mut self, c: &Command) -> Result<u64> {
        self.submit_all(std::slice::from_ref(c)).map(|cookies| cookies[0])
    }

    /// Sends several requests in one write and returns their cookies.
    pub fn submit_all(&mut self, commands: &[Command]) -> Result<Vec<u64>> {
        let mut message = Vec::new();
        let mut cookies = Vec::new();
        for c in commands {
            self.next_cookie += 1;
            let cookie = self.next_cookie;
            message.extend_from_slice(&Self::encode(c, cookie));
            let bytes = if c.kind == wire::CMD_READ { c.length as usize } else { 0 };
            let data = Data { bytes: vec![0xa5; bytes], ..Data::default() };
            let pending = Pending {
                kind: c.kind,
                flags: c.flags,
                offset: c.offset,
                length: c.length,
                data,
                covered: Vec::new(),
                error: None,
            };
            self.pending.insert(cookie, pending);
            cookies.push(cookie);
        }
        self.stream.send(&message)?;
        Ok(cookies)
    }

    /// Waits for the next request that ends, whichever it is.
    pub fn complete(&mut self) -> Result<Completion> {
        if let Some(cookie) = self.done.keys().next().copied()
            && let Some(c) = self.done.remove(&cookie)
        {
            return Ok(c);
        }
        loop {
            if let Some(c) = self.step()? {
                return Ok(c);
            }
        }
    }

    /// Waits for this request to end.
    pub fn wait(&mut self, cookie: u64) -> Result<Data> {
        if let Some(c) = self.done.remove(&cookie) {
            return c.result;
        }
        loop {
            match self.step()? {
                Some(c) if c.cookie == cookie => return c.result,
                Some(c) => {
                    self.done.insert(c.cookie, c);
                }
                None => {}
            }
        }
    }

    /// Runs one request to its end.
    pub fn run(&mut self, c: &Command) -> Result<Data> {
        let cookie = self.submit(c)?;
        self.wait(cookie)
    }

    fn plain(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> Result<Data> {
        self.run(&Command { kind, flags, offset, length, payload: &[] })
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>> {
        Ok(self.plain(wire::CMD_READ, 0, offset, length)?.bytes)
    }

    /// Writes; `flags` as in [`wire::FLAG_FUA`].
    pub fn write(&mut self, offset: u64, data: &[u8], flags: u16) -> Result<()> {
        let length = data.len() as u32;
        let c = Command { kind: wire::CMD_WRITE, flags, offset, length, payload: data };
        self.run(&c).map(drop)
    }

    /// Makes zero.
    pub fn zero(&mut self, offset: u64, length: u32, flags: u16) -> Result<()> {
        self.plain(wire::CMD_WRITE_ZEROES, flags, offset, length).map(drop)
    }

    /// Discards.
    pub fn trim(&mut self, offset: u64, length: u32, flags: u16) -> Result<()> {
        self.plain(wire::CMD_TRIM, flags, offset, length).map(drop)
    }

    /// Makes finished writes durable.
    pub fn flush(&mut self) -> Result<()> {
        self.plain(wire::CMD_FLUSH, 0, 0, 0).map(drop)
    }

    /// Reads ahead.
    pub fn cache(&mut self, offset: u64, length: u32) -> Result<()> {
        self.plain(wire::CMD_CACHE, 0, offset, length).map(drop)
    }

    /// Extents of all chosen contexts.
    pub fn block_status(
        &mut self,
        offset: u64,
        length: u32,
        flags: u16,
    ) -> Result<Vec<BlockStatus>> {
        Ok(self.plain(wire::CMD_BLOCK_STATUS, flags, offset, length)?.status)
    }

    /// The whole `base:allocation` map of the export: start, length, flags, neighbours joined.
    pub fn map(&mut self) -> Result<Vec<(u64, u64, u32)>> {
        let mut map: Vec<(u64, u64, u32)> = Vec::new();
        let mut at = 0;
        while at < self.size() {
            let length = (self.size() - at).min(1 << 30) as u32;
            let status = self.block_status(at, length, 0)?;
            let extents = &status.first().ok_or_else(|| broken("no context".into()))?.extents;
            for (len, flags) in extents {
                match map.last_mut() {
                    Some(last) if last.2 == *flags => last.1 += u64::from(*len),
                    _ => map.push((at, u64::from(*len), *flags)),
                }
                at += u64::from(*len);
            }
        }
        Ok(map)
    }

    /// Says goodbye and waits for the server to close; what it still sends is an error.
    pub fn disconnect(mut self) -> Result<()> {
        let c = Command { kind: wire::CMD_DISC, flags: 0, offset: 0, length: 0, payload: &[] };
        let message = Self::encode(&c, 0);
        self.stream.send(&message)?;
        while !self.pending.is_empty() {
            self.step()?;
        }
        match self.receive_raw(1) {
            Err(e) if e.kind() == gipfel_base::ErrorKind::Disconnected => Ok(()),
            Err(e) => Err(e),
            Ok(b) => Err(broken(format!("byte {b:02x?} after the client's goodbye"))),
        }
    }

    /// Receives one message; a completion where it ended a request.
    fn step(&mut self) -> Result<Option<Completion>> {
        let mut magic = [0; 4];
        read_exact(&mut self.reader, &mut magic)?;
        match u32::from_be_bytes(magic) {
            SIMPLE_MAGIC => self.simple().map(Some),
            CHUNK_MAGIC => self.chunk(),
            m => Err(broken(format!("reply magic {m:#x}"))),
        }
    }

    fn simple(&mut self) -> Result<Completion> {
        let mut h = [0; 12];
        read_exact(&mut self.reader, &mut h)?;
        let error = be32(&h[..4]);
        let cookie = be64(&h[4..]);
        let mut p = self.take_pending(cookie)?;
        if self.structured && p.kind == wire::CMD_READ {
            return Err(broken("simple reply to a read under structured replies".into()));
        }
        if p.kind == wire::CMD_BLOCK_STATUS && error == 0 {
            return Err(broken("simple reply to a block status".into()));
        }
        if error != 0 {
            let result = Err(Error::os(error as i32, "NBD reply"));
            return Ok(Completion { cookie, result });
        }
        if p.kind == wire::CMD_READ {
            read_exact(&mut self.reader, &mut p.data.bytes)?;
            p.data.chunks = 1;
        }
        Ok(Completion { cookie, result: Ok(p.data) })
    }

    fn take_pending(&mut self, cookie: u64) -> Result<Pending> {
        let p = self.pending.remove(&cookie);
        p.ok_or_else(|| broken(format!("reply to {cookie:#x}, which is not in flight")))
    }

    fn chunk(&mut self) -> Result<Option<Completion>> {
        let mut h = [0; 16];
        read_exact(&mut self.reader, &mut h)?;
        let flags = u16::from_be_bytes([h[0], h[1]]);
        let kind = u16::from_be_bytes([h[2], h[3]]);
        let (cookie, len) = (be64(&h[4..12]), be32(&h[12..]));
        if !self.structured {
            return Err(broken("structured reply that was not agreed on".into()));
        }
        if flags & !1 != 0 || len > (64 << 20) {
            return Err(broken(format!("chunk flags {flags:#x}, length {len}")));
        }
        let mut p = self.take_pending(cookie)?;
        let done = flags & 1 != 0;
        match kind {
            0 if len == 0 && done => {}
            1 if len >= 9 => self.data_chunk(&mut p, len)?,
            2 if len == 12 => {
                let mut b = [0; 12];
                read_exact(&mut self.reader, &mut b)?;
                let (at, n) = (be64(&b[..8]), u64::from(be32(&b[8..])));
                let place = p.content(at, n)?;
                p.data.bytes[place].fill(0);
                p.data.hole_bytes += n;
            }
            5 if len >= 12 && (len - 4) % 8 == 0 => self.status_chunk(&mut p, len)?,
            _ if kind & 1 << 15 != 0 && len >= 6 => {
                let mut b = vec![0; len as usize];
                read_exact(&mut self.reader, &mut b)?;
                let n = usize::from(u16::from_be_bytes([b[4], b[5]]));
                let error = be32(&b[..4]);
                let text = b.get(6..6 + n).ok_or_else(|| broken("message too long".into()))?;
                if error == 0 {
                    return Err(broken("error chunk without an error".into()));
                }
                p.error = Some(Error::os(error as i32, String::from_utf8_lossy(text)));
            }
            _ => return Err(broken(format!("chunk type {kind:#x} of {len} bytes"))),
        }
        if !done {
            self.pending.insert(cookie, p);
            return Ok(None);
        }
        Ok(Some(Completion { cookie, result: self.finish(p)? }))
    }

    fn data_chunk(&mut self, p: &mut Pending, len: u32) -> Result<()> {
        let mut b = [0; 8];
        read_exact(&mut self.reader, &mut b)?;
        let place = p.content(be64(&b), u64::from(len - 8))?;
        read_exact(&mut self.reader, &mut p.data.bytes[place])
    }

    fn status_chunk(&mut self, p: &mut Pending, len: u32) -> Result<()> {
        let mut b = vec![0; len as usize];
        read_exact(&mut self.reader, &mut b)?;
        let id = be32(&b);
        let known = self.contexts.iter().find(|(i, _)| *i == id);
        let name = known.ok_or_else(|| broken(format!("metadata context {id}")))?.1.clone();
        let extents: Vec<_> =
            b[4..].chunks_exact(8).map(|e| (be32(&e[..4]), be32(&e[4..]))).collect();
        let twice = p.data.status.iter().any(|s| s.context == name);
        let before_last: u64 = extents.iter().rev().skip(1).map(|e| u64::from(e.0)).sum();
        let one = p.flags & wire::FLAG_REQ_ONE != 0;
        if twice
            || p.kind != wire::CMD_BLOCK_STATUS
            || extents.iter().any(|e| e.0 == 0)
            || before_last >= u64::from(p.length)
            || one && (extents.len() != 1 || extents[0].0 > p.length)
        {
            return Err(broken(format!("block status of {name}: {extents:?} for {p:?}")));
        }
        p.data.status.push(BlockStatus { context: name, extents });
        Ok(())
    }

    /// The last chunk came: was the reply whole? The outer error is a broken server.
    fn finish(&self, mut p: Pending) -> Result<Result<Data>> {
        if let Some(e) = p.error {
            return Ok(Err(e));
        }
        if p.kind == wire::CMD_READ {
            p.covered.sort_unstable();
            let sum: u64 = p.covered.iter().map(|(_, n)| n).sum();
            if sum != u64::from(p.length) {
                return Err(broken(format!("read of {} bytes got {sum}", p.length)));
            }
        }
        if p.kind == wire::CMD_BLOCK_STATUS && p.data.status.len() != self.contexts.len() {
            return Err(broken("block status without all chosen contexts".into()));
        }
        Ok(Ok(p.data))
    }
}

impl Pending {
    /// Checks a content chunk against the rules and says where its bytes go.
    fn content(&mut self, at: u64, n: u64) -> Result<std::ops::Range<usize>> {
        let end = self.offset + u64::from(self.length);
        let inside = n > 0 && at >= self.offset && at.checked_add(n).is_some_and(|e| e <= end);
        let overlap = self.covered.iter().any(|(a, l)| at < a + l && *a < at + n);
        self.data.chunks += 1;
        let fragmented = self.flags & wire::FLAG_DF != 0 && self.data.chunks > 1;
        if self.kind != wire::CMD_READ || !inside || overlap || fragmented {
            return Err(broken(format!(
                "content chunk {at:#x}+{n:#x} for {:#x}+{:#x}, flags {:#x}, chunks {}",
                self.offset, self.length, self.flags, self.data.chunks
            )));
        }
        self.covered.push((at, n));
        let start = (at - self.offset) as usize;
        Ok(start..start + n as usize)
    }
}

fn be32(b: &[u8]) -> u32 {
    u32::from_be_bytes([b[0], b[1], b[2], b[3]])
}

fn be64(b: &[u8]) -> u64 {
    u64::from(be32(b)) << 32 | u64::from(be32(&b[4..]))
}

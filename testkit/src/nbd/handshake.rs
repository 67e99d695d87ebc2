//! The client's side of the handshake, one option at a time.

use super::client::Client;
use super::stream::{Address, Stream, read_exact};
use super::wire;
use gipfel_base::{Error, ErrorKind, Result};

const OPTION_MAGIC: &[u8; 8] = b"IHAVEOPT";
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    /// Reply type.
    pub kind: u32,
    /// Its data.
    pub data: Vec<u8>,
}

/// What INFO or GO told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// Canonical name, where sent.
    pub name: Option<String>,
    /// Description, where sent.
    pub description: Option<String>,
    /// Minimum, preferred block size and maximum payload, where sent.
    pub block_size: Option<(u32, u32, u32)>,
}

/// A connection in the handshake phase.
#[derive(Debug)]
pub struct Handshake {
    stream: Stream,
    no_zeroes: bool,
    structured: bool,
    contexts: Vec<(u32, String)>,
}

impl Handshake {
    /// Connects and exchanges flags.
    pub fn connect(address: &Address) -> Result<Self> {
        Self::start(address.connect()?, wire::CLIENT_FLAGS)
    }

    /// Reads the greeting and sends `client_flags`.
    pub fn start(mut stream: Stream, client_flags: u32) -> Result<Self> {
        let greeting = stream.receive(18)?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(broken(format!("greeting {greeting:02x?}")));
        }
        if u16::from_be_bytes([greeting[16], greeting[17]]) != 3 {
            return Err(broken(format!("handshake flags {:02x?}", &greeting[16..])));
        }
        stream.send(&client_flags.to_be_bytes())?;
        Ok(Self {
            stream,
            no_zeroes: client_flags & 2 != 0,
            structured: false,
            contexts: Vec::new(),
        })
    }

    /// The connection, for raw bytes.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// Sends an option without waiting.
    pub fn send_option(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut message = OPTION_MAGIC.to_vec();
        message.extend_from_slice(&option.to_be_bytes());
        message.extend_from_slice(&(data.len() as u32).to_be_bytes());
        message.extend_from_slice(data);
        self.stream.send(&message)
    }

    /// Sends an option and returns its replies, the last of which is an ACK or an error.
    pub fn option(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>> {
        self.send_option(option, data)?;
        self.replies(option)
    }

    /// The replies to `option` up to the last one.
    pub fn replies(&mut self, option: u32) -> Result<Vec<OptionReply>> {
        let mut all = Vec::new();
        loop {
            let mut h = [0; 20];
            read_exact(&mut self.stream, &mut h)?;
            let word = |i: usize| u32::from_be_bytes([h[i], h[i + 1], h[i + 2], h[i + 3]]);
            let magic = u64::from(word(0)) << 32 | u64::from(word(4));
            if magic != REPLY_MAGIC || word(8) != option {
                return Err(broken(format!("option reply {h:02x?} to option {option}")));
            }
            let (kind, len) = (word(12), word(16));
            if len > 1 << 20 {
                return Err(broken(format!("option reply of {len} bytes")));
            }
            let data = self.stream.receive(len as usize)?;
            all.push(OptionReply { kind, data });
            if kind == wire::REP_ACK || kind & 1 << 31 != 0 {
                return Ok(all);
            }
        }
    }

    /// As [`Self::option`], but an error reply is an error.
    fn accepted(&mut self, option: u32, data: &[u8]) -> Result<Vec<OptionReply>> {
        let mut replies = self.option(option, data)?;
        match replies.pop() {
            Some(last) if last.kind == wire::REP_ACK => Ok(replies),
            Some(last) => Err(refused(option, &last)),
            None => Err(broken(format!("no reply to option {option}"))),
        }
    }

    /// Names and descriptions of the exports.
    pub fn list(&mut self) -> Result<Vec<(String, String)>> {
        let replies = self.accepted(wire::OPT_LIST, &[])?;
        replies.iter().map(parse_server).collect()
    }

    /// Agrees on structured replies.
    pub fn structured_reply(&mut self) -> Result<()> {
        self.accepted(wire::OPT_STRUCTURED_REPLY, &[])?;
        self.structured = true;
        Ok(())
    }

    /// Lists metadata contexts of an export.
    pub fn list_meta_context(&mut self, export: &str, queries: &[&str]) -> Result<Vec<String>> {
        let data = meta_query(export, queries);
        let replies = self.accepted(wire::OPT_LIST_META_CONTEXT, &data)?;
        Ok(parse_contexts(&replies)?.into_iter().map(|(_, name)| name).collect())
    }

    /// Chooses metadata contexts of an export; returns those that the server granted.
    pub fn set_meta_context(&mut self, export: &str, queries: &[&str]) -> Result<Vec<String>> {
        let data = meta_query(export, queries);
        self.contexts.clear();
        let replies = self.accepted(wire::OPT_SET_META_CONTEXT, &data)?;
        self.contexts = parse_contexts(&replies)?;
        Ok(self.contexts.iter().map(|(_, name)| name.clone()).collect())
    }

    /// Asks about an export.
    pub fn info(&mut self, export: &str) -> Result<Info> {
        let replies = self.accepted(wire::OPT_INFO, &info_query(export, &[1, 2, 3]))?;
        parse_info(&replies)
    }

    /// Chooses an export and enters the transmission phase.
    pub fn go(self, export: &str) -> Result<Client> {
        self.go_asking(export, &[1, 2, 3])
    }

    /// As [`Self::go`], with these requests for information.
    pub fn go_asking(mut self, export: &str, requests: &[u16]) -> Result<Client> {
        let replies = self.accepted(wire::OPT_GO, &info_query(export, requests))?;
        let info = parse_info(&replies)?;
        Ok(Client::new(self.stream, info, self.structured, self.contexts))
    }

    /// Chooses an export the old way; an unknown export is a closed connection.
    pub fn export_name(mut self, export: &str) -> Result<Client> {
        self.send_option(wire::OPT_EXPORT_NAME, export.as_bytes())?;
        let len = if self.no_zeroes { 10 } else { 134 };
        let reply = self.stream.receive(len)?;
        if reply[10..].iter().any(|b| *b != 0) {
            return Err(broken("the reserved bytes after the export's flags are not zero".into()));
        }
        let mut size = [0; 8];
        size.copy_from_slice(&reply[..8]);
        let info = Info {
            size: u64::from_be_bytes(size),
            flags: u16::from_be_bytes([reply[8], reply[9]]),
            ..Info::default()
        };
        Ok(Client::new(self.stream, info, self.structured, self.contexts))
    }

    /// Ends the session; returns whether the server acknowledged before it closed.
    pub fn abort(mut self) -> Result<bool> {
        self.send_option(wire::OPT_ABORT, &[])?;
        Ok(self.replies(wire::OPT_ABORT).is_ok())
    }
}

/// Data of INFO and GO.
pub(super) fn info_query(export: &str, requests: &[u16]) -> Vec<u8> {
    let mut d = (export.len() as u32).to_be_bytes().to_vec();
    d.extend_from_slice(export.as_bytes());
    d.extend_from_slice(&(requests.len() as u16).to_be_bytes());
    requests.iter().for_each(|r| d.extend_from_slice(&r.to_be_bytes()));
    d
}

fn meta_query(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut d = (export.len() as u32).to_be_bytes().to_vec();
    d.extend_from_slice(export.as_bytes());
    d.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for q in queries {
        d.extend_from_slice(&(q.len() as u32).to_be_bytes());
        d.extend_from_slice(q.as_bytes());
    }
    d
}

fn parse_server(r: &OptionReply) -> Result<(String, String)> {
    let bad = || broken(format!("export in a list: {r:02x?}"));
    let (len, rest) = r.data.split_first_chunk::<4>().ok_or_else(bad)?;
    let len = u32::from_be_bytes(*len) as usize;
    let (name, description) = rest.split_at_checked(len).ok_or_else(bad)?;
    Ok((utf8(name)?, utf8(description)?))
}

fn parse_contexts(replies: &[OptionReply]) -> Result<Vec<(u32, String)>> {
    let mut all: Vec<(u32, String)> = Vec::new();
    for r in replies {
        let split = r.data.split_first_chunk::<4>();
        let Some((id, name)) = split.filter(|_| r.kind == wire::REP_META_CONTEXT) else {
            return Err(broken(format!("metadata context {r:02x?}")));
        };
        all.push((u32::from_be_bytes(*id), utf8(name)?));
    }
    Ok(all)
}

fn parse_info(replies: &[OptionReply]) -> Result<Info> {
    let mut info = Info::default();
    let mut seen_export = false;
    for r in replies {
        let bad = || broken(format!("information reply {r:02x?}"));
        let (kind, d) = r.data.split_first_chunk::<2>().ok_or_else(bad)?;
        let word = |i: usize| d.get(i..i + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
        match (u16::from_be_bytes(*kind), d.len()) {
            (0, 10) => {
                let high = word(0).ok_or_else(bad)?;
                info.size = u64::from(high) << 32 | u64::from(word(4).ok_or_else(bad)?);
                info.flags = u16::from_be_bytes([d[8], d[9]]);
                seen_export = true;
            }
            (1, _) => info.name = Some(utf8(d)?),
            (2, _) => info.description = Some(utf8(d)?),
            (3, 12) => {
                let w = |i| word(i).ok_or_else(bad);
                info.block_size = Some((w(0)?, w(4)?, w(8)?));
            }
            _ => return Err(bad()),
        }
    }
    if !seen_export {
        return Err(broken("no information about the export itself".into()));
    }
    Ok(info)
}

fn utf8(b: &[u8]) -> Result<String> {
    String::from_utf8(b.to_vec()).map_err(|_| broken("a string that is not UTF-8".into()))
}

pub(super) fn broken(what: String) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the NBD server broke the protocol: {what}"))
}

fn refused(option: u32, reply: &OptionReply) -> Error {
    let kind = match reply.kind {
        wire::REP_ERR_UNKNOWN => ErrorKind::NotFound,
        wire::REP_ERR_UNSUP => ErrorKind::Unsupported,
        wire::REP_ERR_TOO_BIG => ErrorKind::Limit,
        _ => ErrorKind::InvalidInput,
    };
    let text = String::from_utf8_lossy(&reply.data);
    Error::new(kind, format!("option {option} refused with {:#x}: {text}", reply.kind))
}

//! The handshake phase, fixed newstyle, as a state machine without I/O.
//!
//! The owner sends [`Negotiation::greeting`], then feeds what the client sends to
//! [`Negotiation::push`] and sends what that wrote, until the outcome is a [`Session`] or an end.
//! One call handles at most one option, so that replies never pile up unsent. TLS is not offered:
//! NOTLS mode ("TLS support"). Time limits are the owner's business.

use super::consts::{
    INIT_MAGIC, MAX_OPTION_DATA, MAX_OPTION_SKIP, MAX_OPTIONS, MAX_PAYLOAD, MAX_STRING,
    OPTION_MAGIC, OPTION_REPLY_MAGIC, export_flag, handshake, info, option, option_reply,
};

/// What the handshake says about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Name, at most [`MAX_STRING`] bytes without NUL; empty: the default export.
    pub name: String,
    /// Text for people, at most [`MAX_STRING`] bytes.
    pub description: Option<String>,
    /// Size in bytes.
    pub size: u64,
    /// Whether there is a medium to serve. Without one the export is listed, but nobody gets in:
    /// a session keeps its size to its end, and 0 is what no later medium has.
    pub has_medium: bool,
    /// Transmission flags ([`export_flag`]); the handshake itself sets HAS_FLAGS and SEND_DF.
    pub flags: u16,
    /// Smallest addressable unit in bytes, a power of two up to 65536 ("Size constraints").
    pub min_block: u32,
    /// Unit of efficient requests in bytes, a power of two, at least 512 and `min_block`.
    pub preferred_block: u32,
    /// Refuse clients that did not ask for the block sizes.
    pub require_block_size: bool,
    /// Full names of the metadata contexts; the index is the context's id.
    pub contexts: Vec<String>,
}

/// The exports that a handshake can see. It may change between two options.
pub trait ExportList {
    /// Calls `each` for every export, in the order of the list.
    fn for_each(&self, each: &mut dyn FnMut(&ExportInfo));
    /// The export that answers to `name`.
    fn find(&self, name: &str) -> Option<ExportInfo>;
}

impl ExportList for [ExportInfo] {
    fn for_each(&self, each: &mut dyn FnMut(&ExportInfo)) {
        self.iter().for_each(each);
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        self.iter().find(|e| e.name == name).cloned()
    }
}

/// What both sides agreed on; rules the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Canonical name of the chosen export.
    pub export: String,
    /// Size in bytes that the client was told.
    pub size: u64,
    /// Transmission flags that the client was told.
    pub flags: u16,
    /// Requests are multiples of this, in bytes.
    pub min_block: u32,
    /// Structured replies were agreed on.
    pub structured: bool,
    /// Ids of the chosen metadata contexts (indices in [`ExportInfo::contexts`]).
    pub contexts: Vec<u32>,
}

/// Why a handshake ended without a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// The client asked for it ("NBD_OPT_ABORT").
    Aborted,
    /// EXPORT_NAME named no export, or one without medium; there is no other way to say so.
    UnknownExport,
    /// The client broke the protocol in a way that cannot be answered.
    Violation(&'static str),
}

/// What came of the bytes pushed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All were used; more are needed.
    More,
    /// One option was answered, perhaps with bytes left: send the answer, push the rest.
    Answered,
    /// Send what was written; bytes left over belong to the transmission phase.
    Done(Session),
    /// Send what was written, then close.
    Close(Close),
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    ClientFlags,
    Header,
    Data { option: u32, len: u32 },
    Skip { option: u32, left: u32, reply: u32, message: &'static str },
    Over,
}

/// One handshake.
#[derive(Debug)]
pub struct Negotiation {
    stage: Stage,
    buf: Vec<u8>,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export that the contexts were chosen for, and their ids.
    contexts: Option<(String, Vec<u32>)>,
    options: u32,
}

const UNFIXED: &str = "an option other than EXPORT_NAME from a client without fixed newstyle";

impl Default for Negotiation {
    fn default() -> Self {
        Self::new()
    }
}

impl Negotiation {
    /// A handshake that waits for the client's flags.
    pub fn new() -> Self {
        Self {
            stage: Stage::ClientFlags,
            buf: Vec::new(),
            fixed: false,
            no_zeroes: false,
            structured: false,
            contexts: None,
            options: 0,
        }
    }

    /// The server's first bytes ("Newstyle negotiation").
    pub fn greeting() -> [u8; 18] {
        let mut out = [0; 18];
        out[..8].copy_from_slice(&INIT_MAGIC.to_be_bytes());
        out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        out[16..].copy_from_slice(&flags.to_be_bytes());
        out
    }

    /// Takes bytes of the client, appends the answer to `out`, and says how many bytes it took.
    /// It takes no byte after [`Progress::Done`] or [`Progress::Close`].
    pub fn push(
        &mut self,
        input: &[u8],
        exports: &(impl ExportList + ?Sized),
        out: &mut Vec<u8>,
    ) -> (usize, Progress) {
        let mut used = 0;
        loop {
            let need = match self.stage {
                Stage::ClientFlags => 4,
                Stage::Header => 16,
                Stage::Data { len, .. } => len as usize,
                Stage::Skip { option, left, reply, message } => {
                    let n = (left as usize).min(input.len() - used);
                    used += n;
                    let left = left - n as u32;
                    if left > 0 {
                        self.stage = Stage::Skip { option, left, reply, message };
                        return (used, Progress::More);
                    }
                    self.stage = Stage::Header;
                    Answer { option, out }.error(reply, message);
                    return (used, Progress::Answered);
                }
                Stage::Over => {
                    return (used, Progress::Close(Close::Violation("the handshake is over")));
                }
            };
            let n = (need - self.buf.len()).min(input.len() - used);
            self.buf.extend_from_slice(&input[used..used + n]);
            used += n;
            if self.buf.len() < need {
                return (used, Progress::More);
            }
            let data = std::mem::take(&mut self.buf);
            let progress = match self.stage {
                Stage::ClientFlags => self.client_flags(&data),
                Stage::Header => self.header(&data),
                Stage::Data { option, .. } => {
                    self.stage = Stage::Header;
                    Some(self.option(option, &data, exports, out))
                }
                Stage::Skip { .. } | Stage::Over => None,
            };
            match progress {
                None => {}
                Some(p) => {
                    if matches!(p, Progress::Done(_) | Progress::Close(_)) {
                        self.stage = Stage::Over;
                    }
                    return (used, p);
                }
            }
        }
    }

    /// "Client flags": unknown ones end the connection.
    fn client_flags(&mut self, data: &[u8]) -> Option<Progress> {
        let flags = be32(data, 0);
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags & !known != 0 {
            return Some(violation("unknown client flags"));
        }
        self.fixed = flags & u32::from(handshake::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.stage = Stage::Header;
        None
    }

    fn header(&mut self, data: &[u8]) -> Option<Progress> {
        let (magic, option, len) = (be64(data, 0), be32(data, 8), be32(data, 12));
        if magic != OPTION_MAGIC {
            return Some(violation("an option does not start with IHAVEOPT"));
        }
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Some(violation("too many options in one handshake"));
        }
        if option == option::EXPORT_NAME {
            if len as usize > MAX_STRING {
                return Some(violation("an export name is longer than 4096 bytes"));
            }
        } else if !self.fixed {
            return Some(violation(UNFIXED));
        }
        if len > MAX_OPTION_SKIP && option != option::ABORT {
            return Some(violation("an option is too long even to skip"));
        }
        let known = matches!(
            option,
            option::EXPORT_NAME
                | option::ABORT
                | option::LIST
                | option::INFO
                | option::GO
                | option::STRUCTURED_REPLY
                | option::LIST_META_CONTEXT
                | option::SET_META_CONTEXT
                | option::STARTTLS
        );
        self.stage = match option {
            // Its data are to be ignored; whether they arrive does not matter either.
            option::ABORT => Stage::Data { option, len: 0 },
            _ if !known => Stage::Skip {
                option,
                left: len,
                reply: option_reply::ERR_UNSUP,
                message: match option {
                    option::EXTENDED_HEADERS => "extended headers are not offered",
                    _ => "unknown option",
                },
            },
            _ if len > MAX_OPTION_DATA => Stage::Skip {
                option,
                left: len,
                reply: option_reply::ERR_TOO_BIG,
                message: "the option's data are longer than 64 KiB",
            },
            _ => Stage::Data { option, len },
        };
        None
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &(impl ExportList + ?Sized),
        out: &mut Vec<u8>,
    ) -> Progress {
        let mut answer = Answer { option, out };
        match option {
            option::EXPORT_NAME => return self.export_name(data, exports, answer.out),
            option::ABORT => {
                answer.ack();
                return Progress::Close(Close::Aborted);
            }
            option::INFO | option::GO => return self.info(data, exports, answer),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(data, exports, answer);
            }
            // The rest carry no data ("Option types").
            _ if !data.is_empty() => {
                answer.error(option_reply::ERR_INVALID, "this option has no data");
            }
            option::STRUCTURED_REPLY => {
                self.structured = true;
                answer.ack();
            }
            option::LIST => {
                exports.for_each(&mut |e| answer.server(e));
                answer.ack();
            }
            option::STARTTLS => {
                answer.error(option_reply::ERR_UNSUP, "this server does not speak TLS");
            }
            _ => answer.error(option_reply::ERR_UNSUP, "unknown option"),
        }
        Progress::Answered
    }

    /// "NBD_OPT_EXPORT_NAME": errors can only be told by closing.
    fn export_name(
        &mut self,
        data: &[u8],
        exports: &(impl ExportList + ?Sized),
        out: &mut Vec<u8>,
    ) -> Progress {
        let found = text(data).and_then(|name| exports.find(name));
        let Some(e) = found.filter(|e| e.has_medium) else {
            return Progress::Close(Close::UnknownExport);
        };
        if e.require_block_size {
            return violation("the export demands a client that knows block sizes");
        }
        out.extend_from_slice(&e.size.to_be_bytes());
        out.extend_from_slice(&self.flags(&e).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        Progress::Done(self.session(e))
    }

    /// "NBD_OPT_INFO and NBD_OPT_GO".
    fn info(
        &mut self,
        data: &[u8],
        exports: &(impl ExportList + ?Sized),
        mut answer: Answer,
    ) -> Progress {
        let Some((name, requests)) = parse_info(data) else {
            answer.error(option_reply::ERR_INVALID, "malformed request for information");
            return Progress::Answered;
        };
        let Some(e) = exports.find(name) else {
            answer.error(option_reply::ERR_UNKNOWN, "no export has this name");
            return Progress::Answered;
        };
        if !e.has_medium {
            // "Option reply types": the export is not available.
            let message = "this export has no medium: connect again once one is in";
            answer.error(option_reply::ERR_UNKNOWN, message);
            return Progress::Answered;
        }
        let asked = |kind| requests.chunks_exact(2).any(|r| r == u16::to_be_bytes(kind));
        let mut body = Vec::with_capacity(16);
        body.extend_from_slice(&info::EXPORT.to_be_bytes());
        body.extend_from_slice(&e.size.to_be_bytes());
        body.extend_from_slice(&self.flags(&e).to_be_bytes());
        answer.reply(option_reply::INFO, &[&body]);
        if asked(info::NAME) {
            answer.reply(option_reply::INFO, &[&info::NAME.to_be_bytes(), e.name.as_bytes()]);
        }
        if let Some(d) = e.description.as_ref().filter(|_| asked(info::DESCRIPTION)) {
            answer.reply(option_reply::INFO, &[&info::DESCRIPTION.to_be_bytes(), d.as_bytes()]);
        }
        let strict = e.require_block_size;
        if asked(info::BLOCK_SIZE) || strict {
            let sizes = [e.min_block, e.preferred_block, MAX_PAYLOAD].map(u32::to_be_bytes);
            let kind = info::BLOCK_SIZE.to_be_bytes();
            answer.reply(option_reply::INFO, &[&kind, &sizes[0], &sizes[1], &sizes[2]]);
        }
        if strict && !asked(info::BLOCK_SIZE) {
            let message = "this export needs a client that asks for block sizes";
            answer.error(option_reply::ERR_BLOCK_SIZE_REQD, message);
            return Progress::Answered;
        }
        answer.ack();
        if answer.option == option::INFO {
            return Progress::Answered;
        }
        Progress::Done(self.session(e))
    }

    /// "NBD_OPT_LIST_META_CONTEXT", "NBD_OPT_SET_META_CONTEXT" and "Metadata querying".
    fn meta_context(
        &mut self,
        data: &[u8],
        exports: &(impl ExportList + ?Sized),
        mut answer: Answer,
    ) {
        let set = answer.option == option::SET_META_CONTEXT;
        if set {
            // Earlier choices go even where this one fails.
            self.contexts = None;
            if !self.structured {
                let message = "agree on structured replies before metadata contexts";
                return answer.error(option_reply::ERR_INVALID, message);
            }
        }
        let Some((name, queries)) = parse_meta_context(data) else {
            let message = "malformed metadata context query";
            return answer.error(option_reply::ERR_INVALID, message);
        };
        let Some(e) = exports.find(name) else {
            return answer.error(option_reply::ERR_UNKNOWN, "no export has this name");
        };
        let mut chosen = Vec::new();
        for (id, context) in e.contexts.iter().enumerate() {
            let matches = |query: &&str| {
                // "ns:" stands for the whole namespace in a list, and for nothing in a choice.
                let wildcard = !set && query.ends_with(':') && context.starts_with(*query);
                context == query || wildcard
            };
            if queries.iter().any(matches) || (!set && queries.is_empty()) {
                let shown = if set { id as u32 } else { 0 };
                let parts: [&[u8]; 2] = [&shown.to_be_bytes(), context.as_bytes()];
                answer.reply(option_reply::META_CONTEXT, &parts);
                chosen.push(id as u32);
            }
        }
        answer.ack();
        if set {
            self.contexts = Some((e.name, chosen));
        }
    }

    /// Transmission flags that this client is told ("Transmission flags").
    fn flags(&self, e: &ExportInfo) -> u16 {
        let df = if self.structured { export_flag::SEND_DF } else { 0 };
        e.flags & !export_flag::SEND_DF | export_flag::HAS_FLAGS | df
    }

    fn session(&mut self, e: ExportInfo) -> Session {
        let flags = self.flags(&e);
        // Contexts count only where they were chosen for the very export that is used.
        let contexts = self.contexts.take().filter(|(name, _)| *name == e.name);
        Session {
            export: e.name,
            size: e.size,
            flags,
            min_block: e.min_block,
            structured: self.structured,
            contexts: contexts.map(|(_, ids)| ids).unwrap_or_default(),
        }
    }
}

/// Writes replies to one option ("Fixed newstyle negotiation").
struct Answer<'a> {
    option: u32,
    out: &'a mut Vec<u8>,
}

impl Answer<'_> {
    fn reply(&mut self, kind: u32, parts: &[&[u8]]) {
        let len: usize = parts.iter().map(|p| p.len()).sum();
        self.out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&self.option.to_be_bytes());
        self.out.extend_from_slice(&kind.to_be_bytes());
        self.out.extend_from_slice(&(len as u32).to_be_bytes());
        parts.iter().for_each(|p| self.out.extend_from_slice(p));
    }

    fn ack(&mut self) {
        self.reply(option_reply::ACK, &[]);
    }

    fn error(&mut self, kind: u32, message: &str) {
        self.reply(kind, &[message.as_bytes()]);
    }

    fn server(&mut self, e: &ExportInfo) {
        let description = e.description.as_deref().unwrap_or("");
        let len = (e.name.len() as u32).to_be_bytes();
        let parts: [&[u8]; 3] = [&len, e.name.as_bytes(), description.as_bytes()];
        self.reply(option_reply::SERVER, &parts);
    }
}

fn violation(why: &'static str) -> Progress {
    Progress::Close(Close::Violation(why))
}

fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn be64(b: &[u8], at: usize) -> u64 {
    u64::from(be32(b, at)) << 32 | u64::from(be32(b, at + 4))
}

/// A string of the protocol ("Conventions"): UTF-8 without NUL, at most 4096 bytes.
fn text(b: &[u8]) -> Option<&str> {
    if b.len() > MAX_STRING || b.contains(&0) {
        return None;
    }
    std::str::from_utf8(b).ok()
}

/// A string with its length before it, and what follows.
fn counted(b: &[u8]) -> Option<(&str, &[u8])> {
    let (len, rest) = b.split_first_chunk::<4>()?;
    let (s, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    Some((text(s)?, rest))
}

/// Name and the bytes of the information requests, which fill the option exactly.
fn parse_info(data: &[u8]) -> Option<(&str, &[u8])> {
    let (name, rest) = counted(data)?;
    let (count, rest) = rest.split_first_chunk::<2>()?;
    (rest.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some((name, rest))
}

/// Export name and queries, each with a namespace and a colon, filling the option exactly.
fn parse_meta_context(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let (name, rest) = counted(data)?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let count = u32::from_be_bytes(*count) as usize;
    // Each query takes at least the 4 bytes of its length: a huge count reserves nothing.
    if count > rest.len() / 4 {
        return None;
    }
    let mut queries = Vec::with_capacity(count);
    for _ in 0..count {
        let (query, r) = counted(rest)?;
        if query.find(':').is_none_or(|at| at == 0) {
            return None;
        }
        queries.push(query);
        rest = r;
    }
    rest.is_empty().then_some((name, queries))
}

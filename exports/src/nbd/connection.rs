//! One client: handshake within a time limit, then requests until either side has enough.
//!
//! The reader takes whatever has arrived and parses all of it before it receives again. Payloads
//! of large writes are received straight into the request's own aligned buffer; small ones are
//! copied out of the receive buffer, which costs less than another receive. While a client still
//! has replies to read, small requests are left to gather for a moment (decision 0006).

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use gipfel_base::units::KIB;
use gipfel_base::{Error, ErrorKind, Result};
use gipfel_io::net::{Message, Stream};
use gipfel_io::time::sleep;
use gipfel_io::{Buf, spawn_local};

use super::disk::Disk;
use super::flow::{Flow, Job, charge};
use super::proto::consts::{REQUEST_LEN, command};
use super::proto::{ExportList, Negotiation, Op, Progress, Request, Session, Verdict};

/// Bytes that are received at once at most.
const RECEIVE: usize = 64 * KIB as usize;
/// Bytes that are received at once in the handshake.
const HANDSHAKE_RECEIVE: usize = 4 * KIB as usize;
/// Longest write payload that goes through the receive buffer.
const COPIED: usize = 16 * KIB as usize;
/// Requests gather while the client has this many bytes of replies to read.
const GATHER_UNREAD: usize = 48 * KIB as usize;
/// That many requests taken at once are enough: they need not gather.
const GATHER_ENOUGH: usize = 8;
/// Larger requests do not gather, in bytes.
const GATHER_LARGEST: usize = 16 * KIB as usize;
/// The longest time requests gather.
const GATHER_MAX: Duration = Duration::from_micros(60);

/// A connection past its handshake, with what the client sent ahead.
pub(super) struct Opened<E> {
    pub session: Session,
    pub export: E,
    ahead: Buf,
}

/// Runs the handshake. `claim` turns the chosen export's name into the export, before the client
/// is told that all is well. `None`: the client left, or nothing could be agreed on.
pub(super) async fn handshake<E>(
    stream: &Stream,
    exports: &impl ExportList,
    claim: impl Fn(&str) -> Option<E>,
) -> Result<Option<Opened<E>>> {
    let mut message = Message::new();
    message.push(Buf::from_slice(&Negotiation::greeting()));
    let (sent, mut message) = stream.send(message).await;
    sent?;
    let mut negotiation = Negotiation::new();
    let buf = Buf::new(HANDSHAKE_RECEIVE);
    let mut input = vec![0; HANDSHAKE_RECEIVE];
    loop {
        let n = stream.recv(buf.clone()).await?;
        if n == 0 {
            return Ok(None);
        }
        buf.copy_to(0, &mut input[..n]);
        let mut at = 0;
        loop {
            let mut out = Vec::new();
            let (used, progress) = negotiation.push(&input[at..n], exports, &mut out);
            at += used;
            let export = match &progress {
                Progress::Done(session) => match claim(&session.export) {
                    Some(e) => Some(e),
                    None => return Ok(None),
                },
                _ => None,
            };
            if !out.is_empty() {
                message.push(Buf::from_slice(&out));
                let sent: Result<()>;
                (sent, message) = stream.send(message).await;
                sent?;
            }
            match (progress, export) {
                (Progress::Done(session), Some(export)) => {
                    let ahead = Buf::from_slice(&input[at..n]);
                    return Ok(Some(Opened { session, export, ahead }));
                }
                (Progress::More, _) => break,
                (Progress::Answered, _) => {}
                _ => return Ok(None),
            }
        }
    }
}

/// Serves requests until the client leaves, breaks the protocol, or the stream is shut down.
/// Returns when nothing is in flight any more.
pub(super) async fn transmission<D: Disk, E>(stream: &Stream, disk: Arc<D>, opened: &Opened<E>) {
    let flow = Flow::new(stream.clone(), disk, opened.session.clone());
    let writer = spawn_local(flow.clone().writer());
    let mut reader = Reader::new(stream, &opened.session, &opened.ahead);
    let end = reader.run(&flow).await;
    // "Terminating the transmission phase": a client that said goodbye, or just closed, gets what
    // it asked for before; one that broke the rules is cut off, its writes still finish.
    let send = end.is_ok_and(|e| e == End::Goodbye);
    flow.finish(send, writer).await;
}

#[derive(PartialEq, Eq)]
enum End {
    Goodbye,
    Violation,
}

struct Reader<'a> {
    stream: &'a Stream,
    session: &'a Session,
    buf: Buf,
    /// Bytes `start..end` of `buf` are received and not used yet.
    start: usize,
    end: usize,
    /// Requests taken since the last receive, and what the largest of them holds, in bytes.
    taken: usize,
    largest: usize,
}

impl<'a> Reader<'a> {
    fn new(stream: &'a Stream, session: &'a Session, ahead: &Buf) -> Self {
        let buf = Buf::new(RECEIVE);
        buf.copy_from_buf(0, ahead);
        Self { stream, session, buf, start: 0, end: ahead.len(), taken: 0, largest: 0 }
    }

    fn held(&self) -> usize {
        self.end - self.start
    }

    /// How long to let requests gather before the next receive, while the client has `unread`
    /// bytes of replies to read: about half the time it needs for them, so that it does not run
    /// dry. Large requests gain nothing by being taken together, nor do many.
    fn gather_time(&self, unread: usize) -> Option<Duration> {
        let few_and_small = self.taken < GATHER_ENOUGH && self.largest <= GATHER_LARGEST;
        let time = Duration::from_micros(unread as u64 * 3 / (8 * KIB)).min(GATHER_MAX);
        (few_and_small && unread >= GATHER_UNREAD).then_some(time)
    }

    /// Receives until `n` bytes (at most the buffer's size) are held.
    async fn need(&mut self, n: usize) -> Result<()> {
        while self.held() < n {
            if self.start == self.end {
                (self.start, self.end) = (0, 0);
                if let Some(time) = self.gather_time(self.stream.unread()) {
                    sleep(time).await;
                }
                (self.taken, self.largest) = (0, 0);
            } else if self.start + n > self.buf.len() {
                self.buf.copy_from_buf(0, &self.buf.slice(self.start..self.end));
                (self.start, self.end) = (0, self.held());
            }
            match self.stream.recv(self.buf.slice(self.end..self.buf.len())).await? {
                0 => return Err(Error::new(ErrorKind::Disconnected, "the client has closed")),
                got => self.end += got,
            }
        }
        Ok(())
    }

    async fn run<D: Disk>(&mut self, flow: &Rc<Flow<D>>) -> Result<End> {
        loop {
            match self.need(REQUEST_LEN).await {
                Ok(()) => {}
                // An end between two requests is a goodbye without words.
                Err(e) if e.kind() == ErrorKind::Disconnected && self.held() == 0 => {
                    return Ok(End::Goodbye);
                }
                Err(e) => return Err(e),
            }
            if flow.is_dead() {
                // What a client left behind that is gone is of no use to anybody.
                return Err(Error::new(ErrorKind::Disconnected, "the client is gone"));
            }
            let mut header = [0; REQUEST_LEN];
            self.buf.copy_to(self.start, &mut header);
            self.start += REQUEST_LEN;
            let Some(request) = Request::parse(&header) else { return Ok(End::Violation) };
            let (cookie, payload) = (request.cookie, request.payload() as usize);
            match request.judge(self.session) {
                Verdict::Run(Op::Nothing) => {
                    let held = charge(&Op::Nothing);
                    flow.admit(held).await;
                    flow.succeed(cookie, request.kind == command::READ, held);
                }
                Verdict::Run(op) => {
                    let held = charge(&op);
                    self.taken += 1;
                    self.largest = self.largest.max(held);
                    flow.admit(held).await;
                    let payload = match payload {
                        0 => None,
                        n => match self.payload(n).await {
                            Ok(buf) => Some(buf),
                            Err(e) => {
                                flow.release(held);
                                return Err(e);
                            }
                        },
                    };
                    flow.dispatch(Job { cookie, op, payload }, held);
                }
                Verdict::Refuse(r) => {
                    self.skip(payload).await?;
                    let held = charge(&Op::Nothing);
                    flow.admit(held).await;
                    flow.refuse(cookie, held, r.error, r.message);
                }
                Verdict::Disconnect => return Ok(End::Goodbye),
                Verdict::Violation(_) => return Ok(End::Violation),
            }
        }
    }

    /// The next `n` bytes in a buffer of their own.
    async fn payload(&mut self, n: usize) -> Result<Buf> {
        if n <= COPIED {
            self.need(n).await?;
        }
        let buf = Buf::new(n);
        let here = self.held().min(n);
        buf.copy_from_buf(0, &self.buf.slice(self.start..self.start + here));
        self.start += here;
        if here < n {
            self.stream.recv_exact(buf.slice(here..n)).await?;
        }
        Ok(buf)
    }

    /// Forgets the next `n` bytes.
    async fn skip(&mut self, mut n: usize) -> Result<()> {
        while n > 0 {
            self.need(1).await?;
            let here = self.held().min(n);
            self.start += here;
            n -= here;
        }
        Ok(())
    }
}

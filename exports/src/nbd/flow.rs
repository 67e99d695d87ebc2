//! The requests of one connection that are in flight: workers that run them, the writer that
//! sends their replies, and the limits of both.
//!
//! Workers are spawned when first needed and reused; a request moves from the reader to a worker
//! to the queue of ready replies without an allocation once the connection has warmed up. The
//! writer sends all replies that are ready in one gathered send. A request counts against the
//! limits until its reply is sent, so a client that stops reading only stops itself.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use gipfel_base::units::{KIB, MIB};
use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::net::{Message, Stream};
use gipfel_io::{Buf, spawn_local};

use super::disk::{Disk, ZeroFlags};
use super::proto::consts::{MAX_EXTENTS, SIMPLE_REPLY_LEN, WireError, allocation};
use super::proto::{Op, Session, reply};

/// Limit: requests of one connection in flight (replies not sent yet included).
pub(super) const MAX_IN_FLIGHT: usize = 128;
/// Limit: bytes of requests of one connection in flight. One request is let in in any case.
const MAX_BYTES: usize = 32 * MIB as usize;
/// Room for the heads of the replies in one send.
const HEADS: usize = 16 * KIB as usize;
/// Longest reply head that has no buffer of its own.
const HEAD: usize = 32;
/// What a reply without data counts against [`MAX_BYTES`].
const SMALL: usize = 512;

/// One request on its way to a worker.
pub(super) struct Job {
    pub cookie: u64,
    pub op: Op,
    /// Payload of a write.
    pub payload: Option<Buf>,
}

/// A reply that is ready to be sent.
struct Reply {
    head: [u8; HEAD],
    head_len: u8,
    body: Option<Buf>,
    /// What it counts against [`MAX_BYTES`].
    charge: usize,
}

#[derive(Default)]
struct Slot {
    job: Option<(Job, usize)>,
    waker: Option<Waker>,
}

#[derive(Default)]
struct State {
    ready: VecDeque<Reply>,
    in_flight: usize,
    bytes: usize,
    slots: Vec<Slot>,
    idle: Vec<usize>,
    writer: Option<Waker>,
    reader: Option<Waker>,
    /// Nothing new comes; workers and writer end when all is done.
    closing: bool,
    /// Sends are pointless: replies are dropped.
    dead: bool,
}

/// The requests of one connection in flight.
pub(super) struct Flow<D> {
    stream: Stream,
    disk: Arc<D>,
    session: Session,
    state: RefCell<State>,
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(w) = waker.take() {
        w.wake();
    }
}

/// Leaves the waker of the polling task in `slot`, without a clone where it is there already.
fn keep_waker(slot: &mut Option<Waker>, waker: &Waker) {
    match slot {
        Some(w) => w.clone_from(waker),
        None => *slot = Some(waker.clone()),
    }
}

/// Bytes that a request holds until its reply is sent.
pub(super) fn charge(op: &Op) -> usize {
    match op {
        Op::Read { range, .. } | Op::Write { range, .. } => range.len() as usize + SMALL,
        Op::BlockStatus { one: false, .. } => MAX_EXTENTS * reply::EXTENT_LEN + SMALL,
        _ => SMALL,
    }
}

impl<D: Disk> Flow<D> {
    pub(super) fn new(stream: Stream, disk: Arc<D>, session: Session) -> Rc<Self> {
        Rc::new(Self { stream, disk, session, state: RefCell::default() })
    }

    /// Waits until the limits allow one more request that holds `charge` bytes, and counts it.
    pub(super) async fn admit(&self, charge: usize) {
        poll_fn(|cx| {
            let mut s = self.state.borrow_mut();
            let fits = s.in_flight < MAX_IN_FLIGHT && s.bytes + charge <= MAX_BYTES;
            if !fits && s.in_flight > 0 {
                keep_waker(&mut s.reader, cx.waker());
                return Poll::Pending;
            }
            s.in_flight += 1;
            s.bytes += charge;
            Poll::Ready(())
        })
        .await;
    }

    /// Whether the client cannot be answered any more.
    pub(super) fn is_dead(&self) -> bool {
        self.state.borrow().dead
    }

    /// Forgets an admitted request that will have no answer.
    pub(super) fn release(&self, charge: usize) {
        let mut s = self.state.borrow_mut();
        s.in_flight -= 1;
        s.bytes -= charge;
    }

    /// Gives an admitted request to a worker.
    pub(super) fn dispatch(self: &Rc<Self>, job: Job, charge: usize) {
        let mut s = self.state.borrow_mut();
        match s.idle.pop() {
            Some(i) => {
                let slot = &mut s.slots[i];
                slot.job = Some((job, charge));
                wake(&mut slot.waker);
            }
            None => {
                let i = s.slots.len();
                s.slots.push(Slot { job: Some((job, charge)), waker: None });
                drop(s);
                spawn_local(self.clone().worker(i)).detach();
            }
        }
    }

    /// Answers an admitted request with an error, at once.
    pub(super) fn refuse(&self, cookie: u64, charge: usize, error: WireError, message: &str) {
        self.answer(self.error(cookie, error, message), charge);
    }

    /// Answers an admitted request with success, at once.
    pub(super) fn succeed(&self, cookie: u64, read: bool, charge: usize) {
        self.answer(self.success(cookie, read), charge);
    }

    /// No request comes any more: waits until all are answered (`send`: and the answers sent).
    pub(super) async fn finish(&self, send: bool, writer: gipfel_io::Task<()>) {
        {
            let mut s = self.state.borrow_mut();
            s.closing = true;
            s.dead |= !send;
            s.slots.iter_mut().for_each(|slot| wake(&mut slot.waker));
            wake(&mut s.writer);
        }
        if !send {
            self.stream.shutdown();
        }
        writer.await;
        self.stream.shutdown();
    }

    async fn worker(self: Rc<Self>, index: usize) {
        loop {
            let next = poll_fn(|cx| {
                let mut s = self.state.borrow_mut();
                let closing = s.closing;
                let slot = &mut s.slots[index];
                match slot.job.take() {
                    Some(job) => Poll::Ready(Some(job)),
                    None if closing => Poll::Ready(None),
                    None => {
                        keep_waker(&mut slot.waker, cx.waker());
                        Poll::Pending
                    }
                }
            })
            .await;
            let Some((job, charge)) = next else { return };
            let r = self.run(job).await;
            self.answer(r, charge);
            self.state.borrow_mut().idle.push(index);
        }
    }

    fn answer(&self, mut r: Reply, charge: usize) {
        r.charge = charge;
        let mut s = self.state.borrow_mut();
        s.ready.push_back(r);
        wake(&mut s.writer);
    }

    /// Runs a request to its reply.
    async fn run(&self, job: Job) -> Reply {
        let Job { cookie, op, payload } = job;
        let disk = &*self.disk;
        let (fast, done) = match op {
            Op::Read { range, .. } => return self.read(cookie, range).await,
            Op::BlockStatus { range, one } => return self.block_status(cookie, range, one).await,
            Op::Write { range, fua } => match payload {
                Some(buf) => (false, disk.write(range.start(), buf, fua).await),
                None => (false, Err(Error::invalid("a write without its payload"))),
            },
            Op::WriteZeroes { range, fua, may_unmap, fast } => {
                let flags = ZeroFlags { fua, may_unmap, fast };
                (fast, disk.write_zeroes(range, flags).await)
            }
            Op::Trim { range, fua } => (false, disk.discard(range, fua).await),
            Op::Cache { range } => (false, disk.prefetch(range).await),
            Op::Flush => (false, disk.flush().await),
            Op::Nothing => (false, Ok(())),
        };
        match done {
            Ok(()) => self.success(cookie, false),
            Err(e) => self.failure(cookie, &e, fast),
        }
    }

    async fn read(&self, cookie: u64, range: ByteRange) -> Reply {
        let buf = Buf::new(range.len() as usize);
        if let Err(e) = self.disk.read(range.start(), buf.clone()).await {
            return self.failure(cookie, &e, false);
        }
        let mut head = [0; HEAD];
        // The whole read has succeeded before its first byte is sent, so one chunk can say "done"
        // ("NBD_CMD_READ"), and DF needs nothing more.
        let head_len = if self.session.structured {
            reply::data_prefix(&mut head, cookie, range.start(), range.len() as u32, true)
        } else {
            reply::simple(&mut head, cookie, None)
        };
        Reply { head, head_len: head_len as u8, body: Some(buf), charge: 0 }
    }

    /// "NBD_REPLY_TYPE_BLOCK_STATUS": `base:allocation` is the one context that is offered.
    async fn block_status(&self, cookie: u64, range: ByteRange, one: bool) -> Reply {
        let limit = if one { 1 } else { MAX_EXTENTS };
        let mut room = vec![0; reply::STATUS_PREFIX_LEN + limit * reply::EXTENT_LEN];
        let mut chunk = reply::StatusChunk::new(&mut room, limit);
        let mut left = range;
        while !left.is_empty() {
            let e = match self.disk.block_status(left).await {
                Ok(e) => e,
                Err(e) if chunk.extents() == 0 => return self.failure(cookie, &e, false),
                // What is known is an answer; the client asks again from there.
                Err(_) => break,
            };
            let len = e.len.clamp(1, left.len());
            let hole = if e.allocated { 0 } else { allocation::HOLE };
            let zero = if e.zero { allocation::ZERO } else { 0 };
            if !chunk.push(len as u32, hole | zero) {
                break;
            }
            left = left.skip(len);
        }
        let context = self.session.contexts.first().copied().unwrap_or(0);
        let n = chunk.finish(cookie, context, true);
        Reply { head: [0; HEAD], head_len: 0, body: Some(Buf::from_slice(&room[..n])), charge: 0 }
    }

    /// Success without data. A read of no bytes needs a chunk under structured replies; for all
    /// else the simple reply is shorter and allowed ("Structured reply chunk message").
    fn success(&self, cookie: u64, read: bool) -> Reply {
        let mut head = [0; HEAD];
        let head_len = if read && self.session.structured {
            reply::none(&mut head, cookie)
        } else {
            reply::simple(&mut head, cookie, None)
        };
        Reply { head, head_len: head_len as u8, body: None, charge: 0 }
    }

    /// The text of the error itself stays here: it may name files of the host.
    fn failure(&self, cookie: u64, e: &Error, fast_zero: bool) -> Reply {
        let error = WireError::from_errno(e.errno(), fast_zero);
        let message = match error {
            WireError::Perm => "the disk refuses this",
            WireError::NoSpace => "no space is left on the storage below the export",
            WireError::NotSup => "zeroing would not be faster than writing",
            WireError::Shutdown => "the server is stopping",
            _ => "the disk reports a failure",
        };
        self.error(cookie, error, message)
    }

    fn error(&self, cookie: u64, error: WireError, message: &str) -> Reply {
        let mut head = [0; HEAD];
        if !self.session.structured {
            let head_len = reply::simple(&mut head, cookie, Some(error)) as u8;
            return Reply { head, head_len, body: None, charge: 0 };
        }
        let mut room = [0; reply::MAX_ERROR_LEN];
        let n = reply::error(&mut room, cookie, error, message);
        Reply { head, head_len: 0, body: Some(Buf::from_slice(&room[..n])), charge: 0 }
    }

    /// Sends replies until the connection closes and all are gone.
    pub(super) async fn writer(self: Rc<Self>) {
        let mut message = Message::new();
        let heads = Buf::new(HEADS);
        while let Some((count, charge)) = self.gather(&mut message, &heads).await {
            let sent: Result<()>;
            (sent, message) = self.stream.send(message).await;
            let mut s = self.state.borrow_mut();
            s.in_flight -= count;
            s.bytes -= charge;
            wake(&mut s.reader);
            if sent.is_err() {
                s.dead = true;
                drop(s);
                // The reader learns of it by the end of the stream.
                self.stream.shutdown();
            }
        }
    }

    /// Waits for replies and puts all that are ready into `message`: their number and charge.
    /// `None` at the end of the connection.
    async fn gather(&self, message: &mut Message, heads: &Buf) -> Option<(usize, usize)> {
        poll_fn(|cx| {
            let mut s = self.state.borrow_mut();
            if s.ready.is_empty() {
                if s.closing && s.in_flight == 0 {
                    return Poll::Ready(None);
                }
                keep_waker(&mut s.writer, cx.waker());
                return Poll::Pending;
            }
            let (mut count, mut charge) = (0, 0);
            // Heads [from, to) are written but not part of the message yet.
            let (mut from, mut to) = (0, 0);
            while let Some(r) = s.ready.front() {
                let room = message.parts() + 2 < Message::MAX_PARTS && to + HEAD <= heads.len();
                if !room && !s.dead {
                    break;
                }
                count += 1;
                charge += r.charge;
                let Some(r) = s.ready.pop_front() else { break };
                if s.dead {
                    continue;
                }
                let n = usize::from(r.head_len);
                heads.copy_from(to, &r.head[..n]);
                to += n;
                if let Some(body) = r.body {
                    message.push(heads.slice(from..to));
                    message.push(body);
                    from = to;
                }
            }
            message.push(heads.slice(from..to));
            Poll::Ready(Some((count, charge)))
        })
        .await
    }
}

const _: () = assert!(reply::DATA_PREFIX_LEN <= HEAD && SIMPLE_REPLY_LEN <= HEAD);

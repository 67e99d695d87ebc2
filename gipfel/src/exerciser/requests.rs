//! Requests: reads and writes of all kinds, and discards; those that the next command waits for,
//! and those that go on meanwhile.

use std::cell::Cell;
use std::io::Read;
use std::rc::Rc;
use std::time::Duration;

use event_listener::Event;
use gipfel_base::units::SECTOR;
use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_io::time::Instant;
use gipfel_io::{Buf, spawn_local};
use gipfel_node::ZeroFlags;

use super::commands::Verb;
use super::failed;
use super::medium::Medium;
use super::report::{self, Show};
use super::words::{Call, bytes, pattern};

/// Longest request, in bytes: 2^31 less one sector.
const MAX_LENGTH: u64 = (1 << 31) - SECTOR;
/// Requests under way at once.
const MAX_IN_FLIGHT: usize = 4096;
/// What is written unless the command says otherwise.
const DEFAULT_PATTERN: u8 = 0xcd;
/// How far buffers are from where they should be, with `--misalign`, in bytes.
const MISALIGNED: usize = 16;
/// Dumps are printed, and patterns compared, in pieces of this size, in bytes.
const PIECE: usize = 1 << 16;

enum Work {
    Read(Buf),
    Write(Buf, bool),
    Zero(u64, ZeroFlags),
    Discard(u64),
    /// What this version cannot do.
    Missing(&'static str),
    /// An invalid request, to be counted only.
    Invalid,
}

/// Bytes that should all be the same: where they begin in the buffer, how many.
struct Check {
    byte: u8,
    from: u64,
    len: u64,
}

/// A request that is ready to begin.
pub struct Request {
    medium: Medium,
    /// What is said to have failed.
    name: &'static str,
    offset: u64,
    work: Work,
    check: Option<Check>,
    dump: bool,
    show: Show,
}

fn length(text: &str) -> Result<u64> {
    let len = bytes(text)?;
    match len <= MAX_LENGTH {
        true => Ok(len),
        false => Err(too_long(text)),
    }
}

fn too_long(what: &str) -> Error {
    Error::invalid(format!("length {what} is too long: a request has at most {MAX_LENGTH} bytes"))
}

/// The sum of several lengths.
fn lengths(texts: &[&str]) -> Result<u64> {
    let sum = texts.iter().try_fold(0, |sum, t| length(t).map(|n| sum + n))?;
    if sum > MAX_LENGTH { Err(too_long(&sum.to_string())) } else { Ok(sum) }
}

fn buffer(len: u64, misaligned: bool) -> Buf {
    let (len, skip) = (len as usize, if misaligned { MISALIGNED } else { 0 });
    Buf::new(len + skip).slice(skip..len + skip)
}

impl Request {
    /// The request that a command asks for.
    pub fn new(call: &Call<'_>, medium: Medium, misaligned: bool) -> Result<Request> {
        let show = match () {
            () if call.has('q') => Show::Nothing,
            () if call.has('C') => Show::Machine,
            () => Show::Human,
        };
        let request = Request {
            medium,
            name: call.def.name(),
            offset: bytes(call.args[0])?,
            work: Work::Invalid,
            check: None,
            dump: call.has('v'),
            show,
        };
        match call.def.verb {
            Verb::Discard => Ok(Request { work: Work::Discard(length(call.args[1])?), ..request }),
            Verb::Read | Verb::Readv | Verb::AioRead => request.reading(call, misaligned),
            _ => request.writing(call, misaligned),
        }
    }

    fn reading(self, call: &Call<'_>, misaligned: bool) -> Result<Request> {
        let len = lengths(&call.args[1..])?;
        let check = check(call, len)?;
        let work = match () {
            () if call.has('b') => {
                whole_sector_request(self.offset, len)?;
                Work::Missing("the state of a virtual machine is not offered by this version")
            }
            // `-i` of aio_read only.
            () if call.has('i') => Work::Invalid,
            () => Work::Read(buffer(len, misaligned)),
        };
        let name = if call.def.verb == Verb::AioRead { "readv" } else { self.name };
        Ok(Request { work, check, name, ..self })
    }

    fn writing(self, call: &Call<'_>, misaligned: bool) -> Result<Request> {
        let zeroes = call.has('z');
        let refuse = |text: &str| Err(call.def.usage_error(text));
        let is_write = call.def.verb == Verb::Write;
        let (vm_state, compressed) = (is_write && call.has('b'), is_write && call.has('c'));
        let fills = [zeroes, call.has('P'), is_write && call.has('s')];
        match () {
            () if vm_state && zeroes => return refuse("-b and -z exclude each other"),
            () if call.has('f') && (vm_state || compressed) => {
                return refuse("-f goes neither with -b nor with -c");
            }
            () if call.has('n') && !zeroes => return refuse("-n needs -z"),
            () if call.has('u') && !zeroes => return refuse("-u needs -z"),
            () if fills.iter().filter(|f| **f).count() > 1 => {
                return refuse("-z, -P and -s exclude each other");
            }
            () if zeroes && call.args.len() > 2 => return refuse("-z takes one length"),
            () => {}
        }
        let byte = call.value('P').map_or(Ok(DEFAULT_PATTERN), pattern)?;
        let unbounded = zeroes && call.has('n');
        let len = if unbounded { bytes(call.args[1])? } else { lengths(&call.args[1..])? };
        if vm_state || compressed {
            whole_sector_request(self.offset, len)?;
        }
        let fua = call.has('f');
        let work = match () {
            () if call.has('i') => Work::Invalid,
            () if vm_state => {
                Work::Missing("the state of a virtual machine is not offered by this version")
            }
            () if compressed => {
                Work::Missing("writing compressed data is not offered by this version")
            }
            () if zeroes => {
                let (unmap, no_fallback) = (call.has('u'), call.has('n'));
                Work::Zero(len, ZeroFlags { fua, unmap, no_fallback, unchanged: false })
            }
            () => {
                let buf = buffer(len, misaligned);
                match call.value('s').filter(|_| is_write) {
                    Some(file) => fill_from(&buf, file).at(|| format!("'{file}'"))?,
                    None => buf.fill(byte),
                }
                Work::Write(buf, fua)
            }
        };
        Ok(Request { work, ..self })
    }

    async fn carry_out(&self) -> Result<Duration> {
        let start = Instant::now();
        match &self.work {
            Work::Read(buf) => self.medium.read(self.offset, buf.clone()).await?,
            Work::Write(buf, fua) => self.medium.write(self.offset, buf.clone(), *fua).await?,
            Work::Zero(len, flags) => self.medium.write_zeroes(self.offset, *len, *flags).await?,
            Work::Discard(len) => self.medium.discard(self.offset, *len).await?,
            Work::Missing(what) => return Err(Error::unsupported(*what)),
            Work::Invalid => {}
        }
        Ok(Instant::now().since(start))
    }

    /// Does it, and prints what came of it. Whether all was well.
    pub async fn run(self) -> Result<bool> {
        let took = match self.carry_out().await {
            Ok(took) => took,
            Err(e) => {
                let no_fast_way = matches!(&self.work, Work::Zero(_, f) if f.no_fallback);
                return failed(self.name, &e, !no_fast_way);
            }
        };
        let (op, len) = match &self.work {
            Work::Read(buf) => ("read", buf.len() as u64),
            Work::Write(buf, _) => ("wrote", buf.len() as u64),
            Work::Zero(len, _) => ("wrote", *len),
            Work::Discard(len) => ("discard", *len),
            Work::Missing(_) | Work::Invalid => return Ok(true),
        };
        let good = self.verify()?;
        if self.show != Show::Nothing {
            self.print_dump()?;
            let text = report::statistics(op, self.offset, len, took, self.show);
            crate::img::print(&text)?;
        }
        Ok(good)
    }

    /// Compares what was read with the pattern, and says where it is not.
    fn verify(&self) -> Result<bool> {
        let (Some(c), Work::Read(buf)) = (&self.check, &self.work) else { return Ok(true) };
        let mut piece = [0; PIECE];
        let (mut at, end) = (c.from as usize, (c.from + c.len) as usize);
        while at < end {
            let part = &mut piece[..PIECE.min(end - at)];
            buf.copy_to(at, part);
            if part.iter().any(|b| *b != c.byte) {
                let (at, len) = (self.offset + c.from, c.len);
                let text = format!("Pattern verification failed at offset {at}, {len} bytes\n");
                return crate::img::print(&text).map(|()| false);
            }
            at += part.len();
        }
        Ok(true)
    }

    fn print_dump(&self) -> Result<()> {
        let Work::Read(buf) = &self.work else { return Ok(()) };
        let mut at = 0;
        while self.dump && at < buf.len() {
            let end = buf.len().min(at + PIECE);
            let mut text = String::new();
            report::dump(self.offset + at as u64, &buf.slice(at..end), &mut text);
            crate::img::print(&text)?;
            at = end;
        }
        Ok(())
    }
}

/// What `-P`, `-s` and `-l` of a read ask for.
fn check(call: &Call<'_>, len: u64) -> Result<Option<Check>> {
    let Some(byte) = call.value('P').map(pattern).transpose()? else {
        return match call.has('s') || call.has('l') {
            true => Err(call.def.usage_error("-s and -l need -P")),
            false => Ok(None),
        };
    };
    let from = call.value('s').map_or(Ok(0), bytes)?;
    let most = len.checked_sub(from);
    let len = call.value('l').map_or(Ok(most.unwrap_or(0)), bytes)?;
    if most.is_none_or(|most| len > most) {
        return Err(call.def.usage_error("-s and -l reach past the end of what is read"));
    }
    Ok(Some(Check { byte, from, len }))
}

fn whole_sector_request(offset: u64, len: u64) -> Result<()> {
    match offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "with -b and -c, offset and length are multiples of {SECTOR} bytes"
        ))),
    }
}

/// Fills `buf` with the bytes of a file, again and again.
fn fill_from(buf: &Buf, file: &str) -> Result<()> {
    let mut bytes = Vec::new();
    std::fs::File::open(file)?.take(buf.len() as u64).read_to_end(&mut bytes)?;
    if bytes.is_empty() && !buf.is_empty() {
        return Err(Error::invalid("the file is empty: there is nothing to write"));
    }
    for at in (0..buf.len()).step_by(bytes.len().max(1)) {
        buf.copy_from(at, &bytes[..bytes.len().min(buf.len() - at)]);
    }
    Ok(())
}

/// The requests that go on while further commands are carried out.
#[derive(Default)]
pub struct InFlight {
    count: Cell<usize>,
    ended: Event,
}

/// One of them.
struct Counted(Rc<InFlight>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.count.set(self.0.count.get() - 1);
        self.0.ended.notify(usize::MAX);
    }
}

impl InFlight {
    /// Lets a request begin before this returns; its end is printed when it comes.
    pub async fn begin(self: &Rc<Self>, request: Request) -> Result<()> {
        if self.count.get() >= MAX_IN_FLIGHT {
            let text = format!("{MAX_IN_FLIGHT} requests are under way: aio_flush waits for them");
            return Err(Error::new(ErrorKind::Limit, text));
        }
        self.count.set(self.count.get() + 1);
        let counted = Counted(self.clone());
        let mut work = Box::pin(async move {
            // What came of it is printed, and fails nothing.
            if let Err(e) = request.run().await {
                crate::complain(&e);
            }
            drop(counted);
        });
        let mut done = false;
        std::future::poll_fn(|cx| {
            done = work.as_mut().poll(cx).is_ready();
            std::task::Poll::Ready(())
        })
        .await;
        if !done {
            spawn_local(work).detach();
        }
        Ok(())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count.get() == 0
    }

    /// Waits until the next one ends.
    pub async fn next_end(&self) {
        if !self.is_empty() {
            self.ended.listen().await;
        }
    }

    /// Waits until there is none.
    pub async fn settle(&self) {
        while !self.is_empty() {
            self.next_end().await;
        }
    }
}

//! The copying of `img convert`: several workers on the I/O threads, each with a piece of the disk.
//!
//! One cursor hands the pieces out in order. Reads go on side by side; writes begin in the order
//! of the disk, so that a format lays its clusters out that way, unless that is waived.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use event_listener::Event;
use gipfel_base::units::{KIB, MIB};
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_graph::Backend;
use gipfel_io::{Buf, Handle, time};
use gipfel_node::{IoFuture, ZeroFlags};

use super::sparse;

/// Pieces under way at once, at most.
pub const MAX_WORKERS: usize = 16;
/// Data are copied in pieces of this size, in bytes, unless longer holes are looked for: those
/// under way stay in a processor's cache between being read, searched and written.
const PIECE: u64 = 256 * KIB;
/// Zeros are written in pieces of this size, in bytes: few, but not so long that a target that
/// has to write them out shows no progress.
const ZERO_PIECE: u64 = 64 * MIB;

/// A source of the copy, and where it begins in the target.
pub struct Source {
    /// The way to its bytes.
    pub backend: Arc<Backend>,
    /// What messages call it.
    pub name: String,
    /// Its place in the target.
    pub range: ByteRange,
    /// Whether it stands on a backing image.
    pub has_backing: bool,
}

/// What is copied, and how.
pub struct Options {
    /// The sources, one after the other.
    pub sources: Vec<Source>,
    /// The target, at least as long as they are together.
    pub target: Arc<Backend>,
    /// What messages call it.
    pub target_name: String,
    /// Bytes of the target that the copy is answerable for: the sources and the padding at their
    /// ends.
    pub len: u64,
    /// Whether unwritten parts of the target read as zeros.
    pub is_zero: bool,
    /// Whether the target stands on an image that shows what the sources' own backing image does.
    pub on_backing: bool,
    /// Shortest run of zeros that is left out, in bytes; 0 to write everything.
    pub shortest_hole: u64,
    /// Whether data are searched for zeros (else only what is known without reading counts).
    pub search: bool,
    /// Whether writes may begin in any order.
    pub any_order: bool,
    /// Bytes a second at most.
    pub rate: Option<u64>,
    /// Data are stored compressed, in whole units of this size, in bytes.
    pub compressed: Option<u64>,
}

/// A copy under way.
pub struct Copy {
    options: Options,
    cursor: async_lock::Mutex<Cursor>,
    /// The number of the piece whose writing may begin.
    turn: AtomicU64,
    /// Told of each turn: the one of the piece's number modulo [`MAX_WORKERS`]. Pieces that wait
    /// have successive numbers, and there is one for each worker at most.
    turned: [Event; MAX_WORKERS],
    done: AtomicU64,
    stopped: AtomicBool,
    failed: Mutex<Option<Error>>,
}

/// Where the next piece begins.
#[derive(Default)]
struct Cursor {
    at: u64,
    number: u64,
    /// What is known from `at` on.
    known: Option<(ByteRange, Kind)>,
    /// When the next data may be read.
    due: Option<time::Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// To be read and written.
    Data,
    /// To read as zeros.
    Zero,
    /// Shown by the target already.
    Same,
}

struct Piece {
    number: u64,
    /// Index of the source; none for padding.
    source: Option<usize>,
    range: ByteRange,
    kind: Kind,
}

impl Copy {
    /// A copy that has not begun.
    pub fn new(options: Options) -> Arc<Copy> {
        Arc::new(Copy {
            options,
            cursor: async_lock::Mutex::default(),
            turn: AtomicU64::new(0),
            turned: std::array::from_fn(|_| Event::new()),
            done: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            failed: Mutex::default(),
        })
    }

    /// How much is done, of 1.
    pub fn progress(&self) -> f64 {
        let len = self.options.len.max(1);
        self.done.load(Ordering::Relaxed) as f64 / len as f64
    }

    /// Copies with `workers` pieces (at most [`MAX_WORKERS`]) under way, on these threads.
    pub async fn run(self: &Arc<Self>, threads: &[Handle], workers: usize) -> Result<()> {
        let started: Vec<_> = (0..workers.min(MAX_WORKERS))
            .map(|i| {
                let copy = self.clone();
                threads[i % threads.len()].spawn(move || async move { copy.work().await })
            })
            .collect();
        for w in started {
            w.await?;
        }
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        failed.map_or(Ok(()), Err)
    }

    async fn work(&self) {
        while !self.stopped.load(Ordering::Relaxed) {
            let done = match self.next().await {
                Ok(None) => return,
                Ok(Some(p)) => self.copy(p).await,
                Err(e) => Err(e),
            };
            if let Err(e) = done {
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.get_or_insert(e);
                drop(failed);
                self.stopped.store(true, Ordering::SeqCst);
                for t in &self.turned {
                    t.notify(usize::MAX);
                }
            }
        }
    }

    /// The next piece that needs work.
    async fn next(&self) -> Result<Option<Piece>> {
        let mut c = self.cursor.lock().await;
        loop {
            if c.at >= self.options.len {
                return Ok(None);
            }
            let source = self.options.sources.iter().position(|s| s.range.contains(at(c.at)));
            let (range, kind) = match c.known.take() {
                Some(k) => k,
                None => self.look(source, c.at).await?,
            };
            let (range, kind) = self.whole_units(source, range, kind);
            let piece = self.cut(range, kind);
            c.at = piece.end();
            let rest = range.skip(piece.len());
            c.known = (!rest.is_empty()).then_some((rest, kind));
            let writes = match kind {
                Kind::Data => true,
                Kind::Zero => !self.options.is_zero || self.options.shortest_hole == 0,
                Kind::Same => false,
            };
            if !writes {
                self.done.fetch_add(piece.len(), Ordering::Relaxed);
                continue;
            }
            if kind == Kind::Data {
                self.pace(&mut c, piece.len()).await;
            }
            c.number += 1;
            return Ok(Some(Piece { number: c.number - 1, source, range: piece, kind }));
        }
    }

    /// What is known of the disk from `at` on.
    async fn look(&self, source: Option<usize>, at: u64) -> Result<(ByteRange, Kind)> {
        let o = &self.options;
        let Some(source) = source.map(|i| &o.sources[i]) else {
            let next = o.sources.iter().map(|s| s.range.start()).filter(|s| *s > at).min();
            return Ok((ByteRange::between(at, next.unwrap_or(o.len)), Kind::Zero));
        };
        let rest = ByteRange::between(at, source.range.end());
        if o.shortest_hole == 0 && !o.on_backing {
            return Ok((rest, Kind::Data));
        }
        let below = ByteRange::new(at - source.range.start(), rest.len());
        let status = source.backend.status(below).await;
        let (s, depth) = status.at(|| format!("looking at '{}'", source.name))?;
        let mut known = rest.take(s.len);
        let from_backing = source.has_backing && (depth > 0 || !s.allocated);
        let mut kind = if s.zero { Kind::Zero } else { Kind::Data };
        if o.on_backing && (from_backing || s.zero) {
            // The target's backing image may be shorter than that of the source, or show zeros by
            // itself: what the target shows decides.
            let (t, _) = o.target.status(known).await.at(|| o.target_name.clone())?;
            known = known.take(t.len);
            kind = match (t.zero, s.zero) {
                (true, true) => Kind::Same,
                (false, _) if from_backing && !s.zero => Kind::Same,
                _ => kind,
            };
        }
        Ok((known, kind))
    }

    /// Where data are compressed: units that are data in part are data, to their ends.
    fn whole_units(
        &self,
        source: Option<usize>,
        range: ByteRange,
        kind: Kind,
    ) -> (ByteRange, Kind) {
        let (Some(unit), Some(source)) = (self.options.compressed, source) else {
            return (range, kind);
        };
        let (start, source) = (range.start(), self.options.sources[source].range);
        let last = range.end() - range.end() % unit;
        if range.end() == source.end() || kind != Kind::Data && last == range.end() {
            return (range, kind);
        }
        if kind != Kind::Data && last > start {
            return (ByteRange::between(start, last), kind);
        }
        let end = range.end().next_multiple_of(unit).min(source.end());
        (ByteRange::between(start, end), Kind::Data)
    }

    /// The first piece of a range, ending at a round place.
    fn cut(&self, range: ByteRange, kind: Kind) -> ByteRange {
        let unit = self.options.compressed.unwrap_or(0);
        let piece = match kind {
            Kind::Data => PIECE.max(self.options.shortest_hole).max(unit),
            Kind::Zero => ZERO_PIECE,
            Kind::Same => return range,
        };
        range.take(piece - range.start() % piece)
    }

    /// Waits until `len` bytes more may be read.
    async fn pace(&self, c: &mut Cursor, len: u64) {
        let Some(rate) = self.options.rate else { return };
        let now = time::Instant::now();
        let due = c.due.map_or(now, |d| d.max(now));
        if due > now {
            time::sleep_until(due).await;
        }
        let takes = std::time::Duration::from_secs_f64(len as f64 / rate as f64);
        c.due = Some(due + takes);
    }

    async fn copy(&self, p: Piece) -> Result<()> {
        let o = &self.options;
        let buf = match (p.kind, p.source) {
            (Kind::Data, Some(i)) => {
                let s = &o.sources[i];
                let buf = Buf::new(p.range.len() as usize);
                let read = s.backend.read(p.range.start() - s.range.start(), buf.clone()).await;
                read.at(|| format!("reading '{}'", s.name))?;
                Some(buf)
            }
            _ => None,
        };
        let mut writes: Vec<IoFuture<'_>> = Vec::new();
        match &buf {
            Some(buf) => {
                let shortest = if o.search { o.shortest_hole } else { 0 };
                let parts = match o.compressed {
                    Some(unit) if shortest > 0 => {
                        sparse::units(buf, p.range.start(), unit as usize)
                    }
                    _ => sparse::split(buf, p.range.start(), shortest as usize),
                };
                for (at, len, data) in parts {
                    let start = p.range.start() + at as u64;
                    if data {
                        writes.push(self.data(start, buf.slice(at..at + len)));
                    } else if !o.is_zero {
                        writes.push(self.zero(ByteRange::new(start, len as u64)));
                    }
                }
            }
            None => writes.push(self.zero(p.range)),
        }
        let written = self.in_turn(p.number, writes).await;
        written.at(|| format!("writing '{}' at {:#x}", o.target_name, p.range.start()))?;
        self.done.fetch_add(p.range.len(), Ordering::Relaxed);
        Ok(())
    }

    /// Writes data to the target.
    fn data(&self, start: u64, buf: Buf) -> IoFuture<'_> {
        match self.options.compressed {
            Some(_) => Box::pin(self.options.target.write_compressed(start, buf)),
            None => Box::pin(self.options.target.write(start, buf, false)),
        }
    }

    /// Makes a range of the target read as zeros, by writing them if nothing is to be left out.
    fn zero(&self, range: ByteRange) -> IoFuture<'_> {
        let flags = ZeroFlags { unmap: self.options.shortest_hole > 0, ..ZeroFlags::default() };
        if flags.unmap {
            return Box::pin(self.options.target.write_zeroes(range, flags));
        }
        Box::pin(async move {
            let piece = PIECE.max(self.options.compressed.unwrap_or(0));
            let zeros = Buf::zeroed(piece.min(range.len()) as usize);
            let mut left = range;
            while !left.is_empty() {
                let part = zeros.slice(0..left.take(piece).len() as usize);
                self.data(left.start(), part).await?;
                left = left.skip(piece);
            }
            Ok(())
        })
    }

    /// Carries out the writes of piece `number`; they begin after those of the pieces before it.
    async fn in_turn(&self, number: u64, mut writes: Vec<IoFuture<'_>>) -> Result<()> {
        if !self.options.any_order {
            self.wait_for_turn(number).await?;
        }
        let mut failed = None;
        let mut first = true;
        std::future::poll_fn(|cx| {
            writes.retain_mut(|w| match w.as_mut().poll(cx) {
                Poll::Pending => true,
                Poll::Ready(Ok(())) => false,
                Poll::Ready(Err(e)) => {
                    failed.get_or_insert(e);
                    false
                }
            });
            if std::mem::take(&mut first) && !self.options.any_order {
                self.turn.store(number + 1, Ordering::SeqCst);
                self.turned_to(number + 1).notify(usize::MAX);
            }
            if writes.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        failed.map_or(Ok(()), Err)
    }

    fn turned_to(&self, number: u64) -> &Event {
        &self.turned[(number % MAX_WORKERS as u64) as usize]
    }

    async fn wait_for_turn(&self, number: u64) -> Result<()> {
        loop {
            let listener = self.turned_to(number).listen();
            if self.turn.load(Ordering::SeqCst) == number {
                return Ok(());
            }
            if self.stopped.load(Ordering::SeqCst) {
                return Err(Error::new(gipfel_base::ErrorKind::Cancelled, "the copy has failed"));
            }
            listener.await;
        }
    }
}

fn at(offset: u64) -> ByteRange {
    ByteRange::new(offset, 1)
}

//! The copying of `img convert` and `img commit`: several workers on the I/O threads, each with a
//! piece of the disk.
//!
//! One cursor hands the pieces out in order. Reads go on side by side; writes begin in the order
//! of the disk, so that a format lays its clusters out that way, unless that is waived.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;

use event_listener::Event;
use gipfel_base::units::{KIB, MIB, SECTOR};
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_graph::Backend;
use gipfel_io::{Buf, Handle, time};
use gipfel_node::{IoFuture, Status, ZeroFlags};

use super::progress::Progress;
use super::sparse;

/// Pieces under way at once, unless more or fewer are asked for.
pub const WORKERS: usize = 8;
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
    /// The sources, one after the other, or as layers.
    pub sources: Vec<Source>,
    /// Whether the sources are layers of one disk, the topmost first, each of which decides what
    /// is read where it is allocated. What none decides is left as it is.
    pub layered: bool,
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
    /// What cannot be read of the sources is taken for zeros, and told; told to nobody if `quiet`.
    pub salvage: Option<Salvage>,
}

/// How unreadable parts are dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Salvage {
    /// Nothing is printed of them.
    pub quiet: bool,
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
    progress: Arc<Progress>,
    stopped: AtomicBool,
    failed: Mutex<Option<Error>>,
}

/// Where the next piece begins.
#[derive(Default)]
struct Cursor {
    at: u64,
    number: u64,
    /// What is known from `at` on.
    known: Option<Known>,
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

/// A range that is alike throughout.
#[derive(Clone, Copy)]
struct Known {
    range: ByteRange,
    kind: Kind,
    /// Index of the source; none for padding.
    source: Option<usize>,
}

struct Piece {
    number: u64,
    known: Known,
}

impl Copy {
    /// A copy that has not begun.
    pub fn new(options: Options, progress: &Arc<Progress>) -> Arc<Copy> {
        progress.set_total(options.len);
        Arc::new(Copy {
            options,
            cursor: async_lock::Mutex::default(),
            turn: AtomicU64::new(0),
            turned: std::array::from_fn(|_| Event::new()),
            progress: progress.clone(),
            stopped: AtomicBool::new(false),
            failed: Mutex::default(),
        })
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
            let known = match c.known.take() {
                Some(k) => k,
                None if self.options.layered => self.look_down(c.at).await?,
                None => self.look(c.at).await?,
            };
            let Known { range, kind, source } = known;
            let (range, kind) = self.whole_units(source, range, kind);
            let piece = self.cut(range, kind);
            c.at = piece.end();
            let rest = range.skip(piece.len());
            c.known = (!rest.is_empty()).then_some(Known { range: rest, ..known });
            let writes = match kind {
                Kind::Data => true,
                Kind::Zero => !self.options.is_zero || self.options.shortest_hole == 0,
                Kind::Same => false,
            };
            if !writes {
                self.progress.add(piece.len());
                continue;
            }
            if kind == Kind::Data {
                self.pace(&mut c, piece.len()).await;
            }
            c.number += 1;
            let known = Known { range: piece, ..known };
            return Ok(Some(Piece { number: c.number - 1, known }));
        }
    }

    /// What is known of the disk from `start` on.
    async fn look(&self, start: u64) -> Result<Known> {
        let o = &self.options;
        let index = o.sources.iter().position(|s| s.range.contains(at(start)));
        let Some(source) = index.map(|i| &o.sources[i]) else {
            let next = o.sources.iter().map(|s| s.range.start()).filter(|s| *s > start).min();
            let range = ByteRange::between(start, next.unwrap_or(o.len));
            return Ok(Known { range, kind: Kind::Zero, source: None });
        };
        let rest = ByteRange::between(start, source.range.end());
        if o.shortest_hole == 0 && !o.on_backing {
            return Ok(Known { range: rest, kind: Kind::Data, source: index });
        }
        let below = ByteRange::new(start - source.range.start(), rest.len());
        let (s, depth) = self.status(source, below).await?;
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
        Ok(Known { range: known, kind, source: index })
    }

    /// What the layers say of the disk from `start` on.
    async fn look_down(&self, start: u64) -> Result<Known> {
        let mut range = ByteRange::between(start, self.options.len);
        for (i, s) in self.options.sources.iter().enumerate() {
            if start >= s.range.end() {
                // A layer that ends before those above it shows zeros there.
                return Ok(Known { range, kind: Kind::Zero, source: None });
            }
            range = range.take(s.range.end() - start);
            let (status, _) = self.status(s, range).await?;
            range = range.take(status.len);
            if status.allocated {
                let kind = if status.zero { Kind::Zero } else { Kind::Data };
                return Ok(Known { range, kind, source: Some(i) });
            }
        }
        Ok(Known { range, kind: Kind::Same, source: None })
    }

    /// What is known of a part of a source; where that cannot be found out, it is to be read when
    /// reading goes on after errors.
    async fn status(&self, source: &Source, range: ByteRange) -> Result<(Status, u32)> {
        let found = source.backend.status(range).await;
        match found.at(|| format!("looking at '{}'", source.name)) {
            Err(e) if self.options.salvage.is_some() => {
                self.tell_salvaged(&e);
                Ok((Status::data(range.take(PIECE).len(), None), 0))
            }
            r => r,
        }
    }

    fn tell_salvaged(&self, e: &Error) {
        if self.options.salvage.is_some_and(|s| !s.quiet) {
            eprintln!("warning: {e}");
        }
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
        let Known { range, kind, source } = p.known;
        let buf = match (kind, source) {
            (Kind::Data, Some(i)) => Some(self.read(&o.sources[i], range).await?),
            _ => None,
        };
        let mut writes: Vec<IoFuture<'_>> = Vec::new();
        match &buf {
            Some(buf) => {
                let shortest = if o.search { o.shortest_hole } else { 0 };
                let parts = match o.compressed {
                    Some(unit) if shortest > 0 => sparse::units(buf, range.start(), unit as usize),
                    _ => sparse::split(buf, range.start(), shortest as usize),
                };
                for (at, len, data) in parts {
                    let start = range.start() + at as u64;
                    if data {
                        writes.push(self.data(start, buf.slice(at..at + len)));
                    } else if !o.is_zero {
                        writes.push(self.zero(ByteRange::new(start, len as u64)));
                    }
                }
            }
            None => writes.push(self.zero(range)),
        }
        let written = self.in_turn(p.number, writes).await;
        written.at(|| format!("writing '{}' at {:#x}", o.target_name, range.start()))?;
        self.progress.add(range.len());
        Ok(())
    }

    /// Reads `range` of the disk from a source.
    async fn read(&self, s: &Source, range: ByteRange) -> Result<Buf> {
        let buf = Buf::new(range.len() as usize);
        let from = range.start() - s.range.start();
        let read = s.backend.read(from, buf.clone()).await;
        match read.at(|| format!("reading '{}'", s.name)) {
            Err(_) if self.options.salvage.is_some() => self.salvage(s, from, &buf).await,
            r => r?,
        }
        Ok(buf)
    }

    /// Reads again what can be read, sector by sector, and takes the rest for zeros.
    async fn salvage(&self, s: &Source, from: u64, buf: &Buf) {
        let mut left = buf.clone();
        let mut at = from;
        while !left.is_empty() {
            let n = (SECTOR - at % SECTOR).min(left.len() as u64);
            let rest = left.split_off(n as usize);
            let read = s.backend.read(at, left.clone()).await;
            if let Err(e) = read.at(|| format!("{n} bytes at {at:#x} of '{}' are lost", s.name)) {
                self.tell_salvaged(&e);
                left.fill(0);
            }
            (at, left) = (at + n, rest);
        }
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

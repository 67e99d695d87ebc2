//! What a disk may hold: for each sector the contents that a crash may leave.

use gipfel_base::{ByteRange, Result};
use gipfel_io::sim::Rng;
use gipfel_io::{Buf, spawn_local, time};
use gipfel_node::{Child, WriteFlags, ZeroFlags};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a sector: what is written at once or not at all.
pub const SECTOR: u64 = 512;

/// What one sector may hold: tags of contents, oldest first; those before the first one are
/// overwritten for good.
#[derive(Clone, Debug)]
struct Sector {
    candidates: Vec<u64>,
    /// How many of them are completed.
    completed: usize,
}

/// The whole disk.
#[derive(Clone)]
pub struct Model(Vec<Sector>);

/// The contents that a tag stands for.
pub fn content(sector: u64, tag: u64) -> Vec<u8> {
    if tag == 0 {
        return vec![0; SECTOR as usize];
    }
    let word = (sector << 32 | tag).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    word.to_le_bytes().iter().copied().cycle().take(SECTOR as usize).collect()
}

/// The tag of what a backing image holds in every other kilobyte.
pub fn backing_tag(sector: u64) -> u64 {
    if sector % 4 < 2 { 1 } else { 0 }
}

impl Model {
    pub fn new(size: u64, first: impl Fn(u64) -> u64) -> Model {
        let sector = |s| Sector { candidates: vec![first(s)], completed: 1 };
        Model((0..size / SECTOR).map(sector).collect())
    }

    fn begin(&mut self, s: u64, tag: u64) {
        self.0[s as usize].candidates.push(tag);
    }

    fn complete(&mut self, s: u64) {
        let x = &mut self.0[s as usize];
        x.completed = x.candidates.len();
    }

    fn last(&self, s: u64) -> u64 {
        *self.0[s as usize].candidates.last().unwrap()
    }

    /// What is completed now will be durable once a flush that begins now has ended.
    fn marks(&self) -> Vec<usize> {
        self.0.iter().map(|s| s.completed).collect()
    }

    /// The flush that began at `marks` has ended. `dropped` counts what was forgotten since.
    fn flushed(&mut self, marks: &[usize], dropped: &mut [usize]) {
        for ((s, m), d) in self.0.iter_mut().zip(marks).zip(dropped) {
            let gone = (m - 1).saturating_sub(*d);
            s.candidates.drain(..gone);
            s.completed -= gone;
            *d += gone;
        }
    }

    pub fn may_hold(&self, s: u64, bytes: &[u8]) -> bool {
        self.0[s as usize].candidates.iter().any(|t| content(s, *t) == bytes)
    }

    pub fn sectors(&self) -> u64 {
        self.0.len() as u64
    }

    pub fn describe(&self, s: u64) -> String {
        format!("{:?}", self.0[s as usize])
    }
}

/// A model that several tasks work on.
pub struct Shared {
    pub model: RefCell<Model>,
    /// How many candidates of each sector were forgotten, for flushes that overlap.
    dropped: RefCell<Vec<usize>>,
}

impl Shared {
    pub fn new(model: Model) -> Rc<Shared> {
        let dropped = vec![0; model.0.len()];
        Rc::new(Shared { model: RefCell::new(model), dropped: RefCell::new(dropped) })
    }
}

/// Work of several tasks on parts of the disk that interleave, to its end.
pub async fn work(image: &Arc<Child>, shared: &Rc<Shared>, seed: u64, tasks: u64, steps: u64) {
    let list: Vec<_> = (0..tasks)
        .map(|t| {
            let (image, shared) = (image.clone(), shared.clone());
            spawn_local(async move {
                let mut rng = Rng::new(seed * 100 + t);
                for _ in 0..steps {
                    step(&image, &shared, &mut rng, t, tasks).await.unwrap();
                }
            })
        })
        .collect();
    for t in list {
        t.await;
    }
}

/// Sectors that belong to task `t`: every `tasks`th run of seven.
fn range(rng: &mut Rng, sectors: u64, t: u64, tasks: u64) -> (u64, u64) {
    const RUN: u64 = 7;
    let runs = sectors / RUN / tasks;
    let first = (rng.below(runs) * tasks + t) * RUN;
    let skip = rng.below(RUN);
    (first + skip, 1 + rng.below(RUN - skip))
}

/// How to write: often compressed, where the image can store that.
pub async fn sometimes_compressed(image: &Child, rng: &mut Rng) -> WriteFlags {
    let can = image.node().await.is_some_and(|n| n.driver().compresses().is_some());
    WriteFlags { compressed: rng.one_in(2) && can, ..WriteFlags::default() }
}

async fn step(
    image: &Arc<Child>,
    shared: &Rc<Shared>,
    rng: &mut Rng,
    t: u64,
    tasks: u64,
) -> Result<()> {
    let sectors = shared.model.borrow().sectors();
    let (first, n) = range(rng, sectors, t, tasks);
    let bytes = ByteRange::new(first * SECTOR, n * SECTOR);
    let begin = |tag: u64| (first..first + n).for_each(|s| shared.model.borrow_mut().begin(s, tag));
    let complete = || (first..first + n).for_each(|s| shared.model.borrow_mut().complete(s));
    match rng.below(16) {
        0..=6 => {
            let tag = 2 + (rng.next_u64() >> 40);
            begin(tag);
            let data: Vec<u8> = (first..first + n).flat_map(|s| content(s, tag)).collect();
            let flags = sometimes_compressed(image, rng).await;
            image.write(bytes.start(), Buf::from_slice(&data), flags).await?;
            complete();
        }
        7 | 8 => {
            begin(0);
            let flags = ZeroFlags { unmap: rng.one_in(2), ..ZeroFlags::default() };
            image.write_zeroes(bytes, flags).await?;
            complete();
        }
        9 | 10 => {
            // What was there may stay, or read as zeros.
            begin(0);
            image.discard(bytes).await?;
            let buf = Buf::new(bytes.len() as usize);
            image.read(bytes.start(), buf.clone()).await?;
            for s in first..first + n {
                let at = ((s - first) * SECTOR) as usize;
                let is_zero = buf.slice(at..at + SECTOR as usize).is_zero();
                let old = {
                    let m = shared.model.borrow();
                    m.0[s as usize].candidates.iter().rev().nth(1).copied().unwrap()
                };
                if !is_zero {
                    shared.model.borrow_mut().begin(s, old);
                }
            }
            complete();
            check(image, shared, first, n).await?;
        }
        11 if rng.one_in(2) => {
            let marks = shared.model.borrow().marks();
            let before = shared.dropped.borrow().clone();
            image.flush().await?;
            let mut m = shared.model.borrow_mut();
            let mut dropped = shared.dropped.borrow_mut();
            // Marks count from what had been forgotten when the flush began.
            let absolute: Vec<_> = marks.iter().zip(&before).map(|(m, b)| m + b).collect();
            m.flushed(&absolute, &mut dropped);
        }
        12 => time::sleep(Duration::from_micros(rng.below(500))).await,
        _ => check(image, shared, first, n).await?,
    }
    Ok(())
}

/// Whether the task's own sectors hold what was written last.
async fn check(image: &Arc<Child>, shared: &Rc<Shared>, first: u64, n: u64) -> Result<()> {
    let buf = Buf::new((n * SECTOR) as usize);
    image.read(first * SECTOR, buf.clone()).await?;
    let bytes = buf.to_vec();
    for (s, got) in (first..).zip(bytes.chunks(SECTOR as usize)) {
        let want = shared.model.borrow().last(s);
        assert!(got == content(s, want), "sector {s} does not hold {want}");
    }
    Ok(())
}

/// Whether every sector holds what was written last.
pub async fn check_all(image: &Arc<Child>, shared: &Rc<Shared>) {
    let n = shared.model.borrow().sectors();
    check(image, shared, 0, n).await.unwrap();
}

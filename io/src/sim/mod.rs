//! The same I/O interface behind a seeded simulation: one thread, a virtual clock, files in memory
//! with a volatile cache, injected errors, and a crash after any single I/O.
//!
//! Everything random comes from the seed: which task runs next, how long each I/O takes, what a
//! crash keeps. The same seed gives the same run. Nothing here touches the real system.

mod disk;
mod pipe;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use event_listener::Event;
use gipfel_base::{Error, ErrorKind, Result};

pub use disk::Keep;
pub(crate) use disk::{Disk, Opened};
pub(crate) use pipe::PipeEnd;

use crate::exec;
use crate::file::OpenOptions;
use crate::time::{Instant, sleep};

/// A small seeded generator (splitmix64).
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that always gives the same numbers for the same seed.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n` (which is not zero).
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// What kind of I/O a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// A read.
    Read,
    /// A write, a zeroing, a change of length.
    Write,
    /// A flush.
    Sync,
}

/// An error to be injected.
#[derive(Clone, Debug)]
pub struct Fault {
    /// Which I/O fails: the `nth` (from 0) of the given kind, of any kind for `None`.
    pub nth: u64,
    /// Which kind is counted.
    pub kind: Option<IoKind>,
    /// The error number it fails with.
    pub errno: i32,
    /// Whether all later I/O of that kind fails as well.
    pub sticky: bool,
}

/// A simulated world: a clock, files, chance.
pub struct World {
    seed: u64,
    rng: RefCell<Rng>,
    clock: Cell<u64>,
    files: RefCell<HashMap<PathBuf, Arc<Disk>>>,
    fault: RefCell<Option<Fault>>,
    ios: Cell<u64>,
    crash_at: Cell<Option<u64>>,
    crashed: Cell<bool>,
    crash_event: Event,
    slowest: Cell<u64>,
    direct_align: Cell<u32>,
}

impl World {
    /// A world without files whose chance comes from `seed`.
    pub fn new(seed: u64) -> Rc<World> {
        Rc::new(World {
            seed,
            rng: RefCell::new(Rng::new(seed)),
            clock: Cell::new(0),
            files: RefCell::default(),
            fault: RefCell::default(),
            ios: Cell::new(0),
            crash_at: Cell::new(None),
            crashed: Cell::new(false),
            crash_event: Event::new(),
            slowest: Cell::new(200_000),
            direct_align: Cell::new(1),
        })
    }

    /// Runs `future` in this world to its end. Panics, naming the seed, where all tasks wait for
    /// something that can never happen.
    pub fn run<F: Future>(self: &Rc<Self>, future: F) -> F::Output {
        exec::run_simulated(self, future)
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The longest an I/O takes (200 microseconds at first); each takes a random time up to it.
    pub fn set_slowest_io(&self, d: Duration) {
        self.slowest.set(d.as_nanos() as u64);
    }

    /// What files opened for direct I/O from now on demand of offsets and lengths, in bytes (1 at
    /// first).
    pub fn set_direct_align(&self, align: u32) {
        self.direct_align.set(align);
    }

    /// Makes or replaces the file `path` with these durable contents.
    pub fn put_file(&self, path: impl Into<PathBuf>, contents: Vec<u8>) {
        let path = path.into();
        self.files.borrow_mut().insert(path.clone(), Arc::new(Disk::new(path, contents)));
    }

    /// The contents of `path` as a reader sees them now.
    pub fn file(&self, path: impl AsRef<Path>) -> Option<Vec<u8>> {
        self.files.borrow().get(path.as_ref()).map(|d| d.contents())
    }

    /// Arms a fault, or disarms it.
    pub fn set_fault(&self, fault: Option<Fault>) {
        *self.fault.borrow_mut() = fault;
        self.ios.set(0);
    }

    /// Number of I/Os that counted since the last [`World::set_fault`] or [`World::set_crash`].
    pub fn io_count(&self) -> u64 {
        self.ios.get()
    }

    /// From the `nth` I/O on nothing is answered any more; see [`World::crashed`].
    pub fn set_crash(&self, nth: Option<u64>) {
        self.ios.set(0);
        self.crashed.set(false);
        self.crash_at.set(nth);
    }

    /// Completes when the crash set by [`World::set_crash`] has come.
    pub async fn crashed(&self) {
        while !self.crashed.get() {
            let l = self.crash_event.listen();
            if self.crashed.get() {
                return;
            }
            l.await;
        }
    }

    /// The world after the power was lost: each file with its durable contents and what `keep`
    /// leaves of the writes that were not flushed. Chance comes from `seed`.
    pub fn after_power_loss(&self, keep: Keep, seed: u64) -> Rc<World> {
        let mut rng = Rng::new(seed ^ 0x5eed);
        let world = World::new(seed);
        let files = self.files.borrow();
        let mut names: Vec<_> = files.keys().cloned().collect();
        names.sort();
        for n in names {
            let contents = files[&n].after_power_loss(keep, &mut rng);
            world.put_file(n, contents);
        }
        world
    }

    pub(crate) fn now(&self) -> Instant {
        Instant(self.clock.get())
    }

    pub(crate) fn advance_to(&self, t: Instant) {
        self.clock.set(self.clock.get().max(t.0));
    }

    pub(crate) fn pick(&self, n: usize) -> usize {
        self.rng.borrow_mut().below(n as u64) as usize
    }

    pub(crate) async fn open(&self, path: &Path, o: OpenOptions) -> Result<Opened> {
        let align = if o.direct { self.direct_align.get() } else { 1 };
        self.find(path, o).map(|d| Opened::new(d, align))
    }

    fn find(&self, path: &Path, o: OpenOptions) -> Result<Arc<Disk>> {
        let at = || format!("opening '{}'", path.display());
        let mut files = self.files.borrow_mut();
        match files.get(path) {
            Some(_) if o.create_new => Err(Error::new(ErrorKind::Exists, at() + ": file exists")),
            Some(d) if !o.create => Ok(d.clone()),
            None if !o.create && !o.create_new => {
                Err(Error::new(ErrorKind::NotFound, at() + ": no such file"))
            }
            _ => {
                let d = Arc::new(Disk::new(path.to_owned(), Vec::new()));
                files.insert(path.to_owned(), d.clone());
                Ok(d)
            }
        }
    }

    pub(crate) fn remove(&self, path: &Path) -> Result<()> {
        match self.files.borrow_mut().remove(path) {
            Some(_) => Ok(()),
            None => Err(Error::new(ErrorKind::NotFound, "no such file")),
        }
    }

    /// One I/O takes its time, and perhaps fails. Never ends after the crash.
    pub(crate) async fn io(&self, kind: IoKind, what: impl Fn() -> String) -> Result<()> {
        let mut n = self.ios.get();
        let counted = match &*self.fault.borrow() {
            Some(f) => f.kind.is_none_or(|k| k == kind),
            None => true,
        };
        if counted {
            self.ios.set(n + 1);
        } else {
            n = u64::MAX;
        }
        if self.crash_at.get().is_some_and(|c| n >= c) {
            self.crashed.set(true);
            self.crash_event.notify(usize::MAX);
        }
        if self.crashed.get() {
            std::future::pending::<()>().await;
        }
        let slowest = self.slowest.get().max(1);
        let nanos = self.rng.borrow_mut().below(slowest);
        sleep(Duration::from_nanos(nanos)).await;
        if self.crashed.get() {
            std::future::pending::<()>().await;
        }
        let fails = match &*self.fault.borrow() {
            Some(f) if counted && (n == f.nth || f.sticky && n > f.nth) => Some(f.errno),
            _ => None,
        };
        match fails {
            Some(errno) => Err(Error::os(errno, format!("{} (injected)", what()))),
            None => Ok(()),
        }
    }
}

pub(crate) fn world() -> Rc<World> {
    exec::simulated().expect("a simulated file is used inside its simulation only")
}

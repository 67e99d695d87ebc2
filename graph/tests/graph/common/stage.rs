//! A graph in use: clients that read, write and flush all the time and know what they must find,
//! and changes that are compared with the oracle.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use gipfel_base::{Error, ErrorKind};
use gipfel_graph::{Backend, BackendId, Graph, JobFilter};
use gipfel_io::sim::Rng;
use gipfel_io::time::sleep;
use gipfel_io::{Buf, Task, spawn_local};
use serde_json::Value;

use super::jobs::Shared;
use super::lab::{BLOCK, Call, Lab, SIZE, registry, tag_of};
use super::mutate::Mutator;
use super::notation::{Handle, Sketch, View, view};
use super::oracle::{Refused, because, finds_zeroes, may_change, moved, permissions, reaches};

/// Blocks that each writing client has for itself.
const OWN: u64 = 4;
/// Blocks of a disk.
const BLOCKS: u64 = SIZE / BLOCK;

/// What the requests of one client have to agree with.
struct Client {
    name: String,
    number: u64,
    live: Arc<Backend>,
    lab: Arc<Lab>,
    sequence: Cell<u64>,
    /// What each of its own blocks holds; `None` while one does not know.
    own: RefCell<BTreeMap<u64, Option<u64>>>,
    /// What it saw last in blocks of others.
    seen: RefCell<BTreeMap<u64, u64>>,
    /// What it saw since nobody may change what it sees.
    still: RefCell<BTreeMap<u64, u64>>,
    constant: Cell<bool>,
    /// Whether what it sees may go back: a job copies there.
    copied_to: Cell<bool>,
    /// Grows when one of these two changes: an answer that spans a change of it proves nothing.
    period: Cell<u64>,
    /// Grows when the medium changes; odd while it does.
    medium: Cell<u64>,
    stop: Cell<bool>,
    done: Cell<u64>,
    in_flight: Cell<u32>,
}

impl Client {
    async fn request<T>(&self, r: impl Future<Output = T>) -> T {
        self.in_flight.set(self.in_flight.get() + 1);
        let out = r.await;
        self.in_flight.set(self.in_flight.get() - 1);
        self.done.set(self.done.get() + 1);
        out
    }

    /// The tag of a block, unless there is no medium; the whole block must be of that tag.
    async fn read(&self, block: u64) -> Option<u64> {
        let buf = Buf::new(BLOCK as usize);
        let r = self.request(self.live.read(block * BLOCK, buf.clone())).await;
        if !self.done(r, "read") {
            return None;
        }
        let bytes = buf.to_vec();
        let tag = tag_of(&bytes);
        let whole = bytes.chunks_exact(8).all(|c| tag_of(c) == tag);
        assert!(whole, "'{}': block {block} is of several writes", self.name);
        Some(tag)
    }

    /// Whether a request was done: all are, or else there is no medium.
    fn done(&self, r: Result<(), Error>, what: &str) -> bool {
        match r {
            Ok(()) => true,
            Err(e) if e.kind() == ErrorKind::NoMedium => false,
            Err(e) => panic!("'{}': a {what} failed: {e}", self.name),
        }
    }

    /// Knows nothing any more of what its medium holds.
    fn forget(&self) {
        self.medium.set(self.medium.get() + 1);
        self.period.set(self.period.get() + 1);
        self.own.borrow_mut().clear();
        self.seen.borrow_mut().clear();
        self.still.borrow_mut().clear();
    }

    /// Whether the medium is and stays the one of that number.
    fn is_medium(&self, number: u64) -> bool {
        number == self.medium.get() && number.is_multiple_of(2)
    }

    async fn write(&self, block: u64, zero: bool) {
        self.sequence.set(self.sequence.get() + 1);
        let tag = if zero { 0 } else { self.number << 32 | self.sequence.get() };
        let bytes: Vec<u8> = tag.to_le_bytes().repeat(BLOCK as usize / 8);
        let (old, medium) = (self.own.borrow_mut().insert(block, None), self.medium.get());
        let buf = Buf::from_slice(&bytes);
        let r = self.request(self.live.write(block * BLOCK, buf, false)).await;
        let holds = if self.done(r, "write") { Some(tag) } else { old.flatten() };
        if self.is_medium(medium) {
            self.own.borrow_mut().insert(block, holds);
        }
    }

    async fn flush(&self) {
        let covered: BTreeSet<u64> = self.own.borrow().values().filter_map(|t| *t).collect();
        // A flush holds no edge: it may end after the change that came in between.
        match self.live.flush().await {
            Ok(()) => {
                let left = self.lab.volatile(&covered);
                assert!(left.is_empty(), "'{}': {left:x?} were not flushed", self.name);
            }
            Err(e) if e.kind() == ErrorKind::NoMedium => {}
            Err(e) => assert!(e.to_string().contains("injected"), "'{}': {e}", self.name),
        }
    }

    async fn check_own(&self, block: u64) {
        let Some(Some(want)) = self.own.borrow().get(&block).copied() else { return };
        let medium = self.medium.get();
        let Some(tag) = self.read(block).await.filter(|_| self.is_medium(medium)) else { return };
        assert_eq!(tag, want, "'{}': block {block} holds {tag:#x}, not {want:#x}", self.name);
    }

    async fn writer(self: Rc<Self>, mut rng: Rng, blocks: Vec<u64>) {
        while !self.stop.get() {
            let block = blocks[rng.below(blocks.len() as u64) as usize];
            match rng.below(16) {
                0 => self.flush().await,
                1 => self.write(block, true).await,
                2..9 => self.write(block, false).await,
                _ => self.check_own(block).await,
            }
            sleep(Duration::from_nanos(1 + rng.below(3000))).await;
        }
    }

    /// What others write never goes back, and what is constant does not change.
    async fn reader(self: Rc<Self>, mut rng: Rng) {
        while !self.stop.get() {
            let block = rng.below(BLOCKS);
            let period = self.period.get();
            let tag = self.read(block).await;
            sleep(Duration::from_nanos(1 + rng.below(3000))).await;
            let Some(tag) = tag.filter(|_| period == self.period.get()) else { continue };
            let name = &self.name;
            let old = self.seen.borrow_mut().insert(block, tag).unwrap_or(0);
            if tag != 0 && old != 0 && !self.copied_to.get() {
                assert!(tag >= old, "'{name}': block {block} went back to {tag:#x} from {old:#x}");
            }
            if self.constant.get() {
                let first = *self.still.borrow_mut().entry(block).or_insert(tag);
                assert_eq!(tag, first, "'{name}': block {block} changed, and nobody may write it");
            }
        }
    }

    fn expect(&self, constant: bool, copied_to: bool) {
        let was = (self.constant.replace(constant), self.copied_to.replace(copied_to));
        if was != (constant, copied_to) {
            self.period.set(self.period.get() + 1);
            self.still.borrow_mut().clear();
            self.seen.borrow_mut().clear();
        }
    }
}

/// A client at work: its backend, its requests, what makes them.
type Working = (BackendId, Rc<Client>, Vec<Task<()>>);

/// A graph in use.
pub struct Stage {
    /// The graph.
    pub graph: Rc<Graph>,
    /// What its drivers share.
    pub lab: Arc<Lab>,
    /// Options of files without a name.
    pub file: Value,
    seed: u64,
    clients: RefCell<BTreeMap<String, Working>>,
    numbers: Cell<u64>,
    /// The jobs, by id.
    pub jobs: RefCell<BTreeMap<String, Job>>,
}

/// A job under way: its filter, what does the copying, and the node to be replaced.
pub type Job = (JobFilter, Shared, Option<String>);

/// How a change ended, where it ended as the oracle said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// It was refused as it has to be.
    Refused,
    /// It was refused because of the injected fault.
    Failed,
}

impl Stage {
    /// The graph that `text` describes, its clients at work.
    pub async fn build(text: &str, seed: u64, file: Value) -> Stage {
        let lab = Arc::new(Lab::default());
        let graph = Graph::new(registry(&lab));
        let (clients, jobs) = (RefCell::default(), RefCell::default());
        let stage = Stage { graph, lab, file, seed, clients, numbers: Cell::new(0), jobs };
        for (name, h) in Sketch::parse(text).build(&stage.graph, &stage.file).await {
            stage.arrived(&name, h);
        }
        stage
    }

    /// The graph as it is.
    pub async fn view(&self) -> View {
        view(&self.graph.model().await)
    }

    /// The graph as a sketch.
    pub async fn sketch(&self) -> Sketch {
        self.view().await.sketch
    }

    /// The backend of a client.
    pub fn id(&self, name: &str) -> BackendId {
        self.clients.borrow()[name].0
    }

    /// Takes a job out of the list of those under way.
    pub fn job(&self, id: &str) -> Result<Job, Error> {
        let job = self.jobs.borrow_mut().remove(id);
        job.ok_or_else(|| Error::invalid("there is no such job"))
    }

    /// The names of those who have clients at work.
    pub fn clients(&self) -> Vec<String> {
        self.clients.borrow().keys().cloned().collect()
    }

    /// Puts a client that has come to work.
    pub fn arrived(&self, name: &str, (id, live): Handle) {
        let number = self.numbers.get();
        self.numbers.set(number + 1);
        let client = Rc::new(Client {
            name: name.to_owned(),
            number: number + 1,
            lab: self.lab.clone(),
            sequence: Cell::new(0),
            own: RefCell::default(),
            seen: RefCell::default(),
            still: RefCell::default(),
            constant: Cell::new(false),
            copied_to: Cell::new(false),
            period: Cell::new(0),
            medium: Cell::new(0),
            stop: Cell::new(false),
            done: Cell::new(0),
            in_flight: Cell::new(0),
            live,
        });
        let mut rng = Rng::new(self.seed.wrapping_mul(1009) + number);
        let mut tasks = Vec::new();
        if client.live.size() == 0 {
            // Without a medium there is nothing to do.
            client.stop.set(true);
        } else if !client.live.is_writable() {
            tasks.push(spawn_local(client.clone().reader(rng)));
        } else if number < BLOCKS / OWN {
            // The last block is for `find_zeroes`.
            for part in [0..1, 1..OWN - 1] {
                let first = number * OWN;
                let (rng, blocks) =
                    (Rng::new(rng.next_u64()), first + part.start..first + part.end);
                tasks.push(spawn_local(client.clone().writer(rng, blocks.collect())));
            }
        }
        self.clients.borrow_mut().insert(name.to_owned(), (id, client, tasks));
    }

    /// Waits until each client has done `n` requests more.
    pub async fn work(&self, n: u64) {
        let working = |c: &Working| (!c.2.is_empty() && !c.1.stop.get()).then(|| c.1.clone());
        let all: Vec<_> = self.clients.borrow().values().filter_map(working).collect();
        let until: Vec<_> = all.iter().map(|c| c.done.get() + n).collect();
        for _ in 0..100_000 {
            if all.iter().zip(&until).all(|(c, n)| c.done.get() >= *n) {
                return;
            }
            sleep(Duration::from_micros(10)).await;
        }
        panic!("the clients do not get on");
    }

    fn oracle(m: &dyn Mutator, before: &Sketch) -> Result<(Sketch, Perms), Refused> {
        let mut next = before.clone();
        m.next(&mut next)?;
        next.sweep();
        Self::check_frozen(before, &next)?;
        let perms = permissions(&next)?;
        Ok((next, perms))
    }

    /// Edges that a job rests on lead where they led, as long as it runs.
    fn check_frozen(before: &Sketch, next: &Sketch) -> Result<(), Refused> {
        let jobs = before.jobs().filter(|j| next.jobs().any(|n| n.id == j.id));
        let frozen: Vec<_> = jobs.flat_map(|j| j.frozen.iter().map(|l| (l, &j.id))).collect();
        if frozen.is_empty() {
            return Ok(());
        }
        let [old, new] = [before, next].map(|s| s.links().into_iter().collect::<BTreeMap<_, _>>());
        match frozen.iter().find(|(l, _)| old.get(*l) != new.get(*l)) {
            Some((l, job)) => Err(because([l.as_str(), "is in use by job", job])),
            None => Ok(()),
        }
    }

    /// Who cannot see a change of bytes in any of these graphs.
    fn hold_constant(&self, sketches: &[&Sketch]) {
        for (name, (_, c, _)) in &*self.clients.borrow() {
            let still = |s: &&Sketch| {
                let to = s.doors.get(name).and_then(|d| d.to.as_ref());
                to.is_some_and(|t| !may_change(s, t))
            };
            let place = |s: &&Sketch| s.doors.get(name).and_then(|d| d.to.clone());
            let first = place(&sketches[0]);
            let on = sketches.iter().all(|s| still(s) && place(s) == first);
            let copied_to = |s: &&Sketch| {
                let to = s.doors.get(name).and_then(|d| d.to.as_ref());
                to.is_some_and(|t| s.jobs().any(|j| reaches(s, t, &j.target)))
            };
            c.expect(on, sketches.iter().any(copied_to));
        }
    }

    /// Does `m`, with `fault` injected, and compares everything with the oracle.
    pub async fn change(&self, m: &dyn Mutator, fault: Option<(Call, u64)>) -> Outcome {
        let before = self.view().await;
        let expected = Self::oracle(m, &before.sketch);
        let next = expected.as_ref().map_or(&before.sketch, |n| &n.0);
        self.hold_constant(&[&before.sketch, next]);
        let leaving = m.leaves().map(|n| self.clients.borrow()[n].1.clone());
        if let Some(c) = &leaving {
            c.stop.set(true);
        }
        let swapping = m.swaps_medium();
        let swapping = swapping.and_then(|n| Some(self.clients.borrow().get(n)?.1.clone()));
        swapping.iter().for_each(|c| c.forget());
        self.lab.arm(fault);
        let result = m.run(self).await;
        let fired = fault.is_some() && !self.lab.is_armed();
        self.lab.arm(None);
        swapping.iter().for_each(|c| c.forget());
        if let (Some(c), Ok(())) = (&leaving, &result) {
            assert_eq!(c.in_flight.get(), 0, "{m:?}: requests of '{}' are in flight", c.name);
        }
        let after = self.view().await;
        let outcome = match (result, &expected) {
            (Ok(()), Ok((next, perms))) => {
                Self::compare(m, &before, &after, next, perms);
                Outcome::Done
            }
            (Err(e), _) if fired && e.to_string().contains("injected") => {
                Self::unchanged(m, &before, &after);
                Outcome::Failed
            }
            (Err(e), Err(why)) => {
                Self::check_words(m, &e, why);
                Self::unchanged(m, &before, &after);
                Outcome::Refused
            }
            (Ok(()), Err(why)) => {
                panic!("{m:?} had to be refused: {why:?}, on\n{}", before.sketch)
            }
            (Err(e), Ok(_)) => panic!("{m:?} was refused: {e}, on\n{}", before.sketch),
        };
        self.check_held().await;
        self.find_zeroes(&after.sketch).await;
        self.hold_constant(&[&after.sketch]);
        if let Some(name) = m.leaves().filter(|_| outcome == Outcome::Done) {
            self.finish(name).await;
        }
        let wrong = self.lab.wrong();
        assert!(wrong.is_empty(), "{m:?}: {wrong:?}");
        outcome
    }

    /// Zeros that clients write as bytes arrive as writes of zeros below detect-zeroes, wherever
    /// that stands, and as bytes elsewhere.
    async fn find_zeroes(&self, s: &Sketch) {
        for name in self.clients() {
            let c = self.clients.borrow()[&name].1.clone();
            let idle = c.stop.get() || c.live.size() == 0;
            if idle || !c.live.is_writable() || c.number > BLOCKS / OWN {
                continue;
            }
            let block = c.number * OWN - 1;
            c.write(block, true).await;
            let came = self.lab.zeroed(block * BLOCK);
            assert_eq!(came, Some(finds_zeroes(s, &name)), "zeros of '{name}' on\n{s}");
        }
    }

    fn check_words(m: &dyn Mutator, e: &Error, why: &Refused) {
        let text = e.to_string();
        let fits = |says: &Vec<String>| says.iter().all(|w| text.contains(w));
        assert!(why.iter().any(fits), "{m:?}: '{text}' says none of {why:?}");
    }

    fn unchanged(m: &dyn Mutator, before: &View, after: &View) {
        assert_eq!(after.sketch.to_string(), before.sketch.to_string(), "{m:?} left changes");
        assert_eq!(after.sketch, before.sketch, "{m:?} left changes");
        assert_eq!(after.edges, before.edges, "{m:?} left permissions");
        assert_eq!(after.drains, before.drains, "{m:?} was refused after it drained");
    }

    fn compare(m: &dyn Mutator, before: &View, after: &View, next: &Sketch, perms: &Perms) {
        let (was, is, wants) =
            (before.sketch.to_string(), after.sketch.to_string(), next.to_string());
        assert_eq!(is, wants, "\n{m:?} on\n{was}\nmade\n{is}\ninstead of\n{wants}\n");
        assert_eq!(after.sketch, *next, "{m:?} on\n{was}");
        assert_eq!(after.edges, *perms, "permissions after {m:?} on\n{was}");
        let drained =
            after.drains.iter().filter(|(l, n)| before.drains.get(*l).is_some_and(|o| o != *n));
        let drained: BTreeSet<String> = drained.map(|(l, _)| l.clone()).collect();
        let mut quiesced = moved(&before.sketch, next);
        quiesced.extend(m.quiesces(&before.sketch));
        assert_eq!(drained, quiesced, "edges quiesced by {m:?} on\n{was}");
    }

    /// Storage holds what the graph says, as soon as flushes that are owed are done.
    async fn check_held(&self) {
        for last in (0..2000).map(|i| i == 1999) {
            let v = self.view().await;
            let names: Vec<_> =
                self.lab.open().into_iter().filter(|n| v.above.contains_key(n)).collect();
            let wrong = names.into_iter().find(|n| self.lab.held(n) != v.above.get(n).copied());
            let Some(n) = wrong else { return };
            let (held, want) = (self.lab.held(&n), v.above.get(&n));
            assert!(!last, "'{n}' holds {held:?}, and {want:?} is needed");
            sleep(Duration::from_micros(20)).await;
        }
    }

    /// Lets a client end and find everything that it wrote.
    async fn stop(&self, name: &str) -> Rc<Client> {
        let (client, tasks) = {
            let mut all = self.clients.borrow_mut();
            let c = all.get_mut(name).unwrap();
            (c.1.clone(), std::mem::take(&mut c.2))
        };
        client.stop.set(true);
        for t in tasks {
            t.await;
        }
        client
    }

    /// A client that has gone.
    async fn finish(&self, name: &str) {
        self.stop(name).await;
        self.clients.borrow_mut().remove(name);
    }

    /// Lets all clients end, which find what they wrote and see the same where they see the same
    /// node, takes everything away, one by one, and looks whether something is left.
    pub async fn end(self) {
        let mut stopped = Vec::new();
        for name in self.clients() {
            stopped.push(self.stop(&name).await);
        }
        let jobs = std::mem::take(&mut *self.jobs.borrow_mut());
        for (filter, ..) in jobs.into_values() {
            self.graph.remove_job_filter(&filter).await.unwrap();
        }
        let s = self.sketch().await;
        for c in &stopped {
            let own: Vec<u64> = c.own.borrow().keys().copied().collect();
            for block in own {
                c.check_own(block).await;
            }
            let to = s.doors[&c.name].to.clone();
            let own = c.own.borrow().clone();
            for other in stopped.iter().filter(|o| s.doors[&o.name].to == to) {
                for (block, want) in own.clone() {
                    // Trays may be open.
                    if let Some(tag) = other.read(block).await.filter(|_| c.live.size() > 0) {
                        assert_eq!(Some(tag), want, "'{}'", other.name);
                    }
                }
            }
        }
        drop(stopped);
        let clients = std::mem::take(&mut *self.clients.borrow_mut());
        for (id, ..) in clients.into_values() {
            self.graph.detach(id).await.unwrap();
        }
        for name in self.sketch().await.doors.keys() {
            self.graph.backend_del(name).await.unwrap();
        }
        loop {
            let s = self.sketch().await;
            let free = s.nodes.keys().filter(|n| s.users(n).is_empty());
            let free: Vec<_> = free.cloned().collect();
            for n in &free {
                self.graph.blockdev_del(n).await.unwrap_or_else(|e| panic!("{n}: {e} in\n{s}"));
            }
            if free.is_empty() {
                break;
            }
        }
        let m = self.graph.model().await;
        let left = m.nodes().count() + m.edges().count() + m.backends().count();
        assert_eq!(left, 0, "something is left in the graph");
        drop(m);
        for _ in 0..2000 {
            if self.lab.open().is_empty() {
                break;
            }
            sleep(Duration::from_micros(20)).await;
        }
        assert!(self.lab.open().is_empty(), "still open: {:?}", self.lab.open());
        assert!(self.lab.wrong().is_empty(), "{:?}", self.lab.wrong());
    }
}

/// The permissions of all edges.
type Perms = BTreeMap<String, gipfel_node::Perms>;

//! The executor: one run queue and one ring for each thread, tasks that stay at home, wakers that
//! work from anywhere.
//!
//! The loop runs what is ready, hands all new operations to the kernel in one call, and sleeps in
//! that same call when nothing is ready. It never blocks anywhere else.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant as OsInstant, SystemTime};

use async_task::Runnable;
use gipfel_base::{Error, ErrorKind, Result};

use crate::blocking::Pool;
use crate::ring::Ring;
use crate::sim::World;
use crate::time::Instant;

/// A task of this thread. Dropping it cancels the work; [`Task::detach`] lets it run on.
pub type Task<T> = async_task::Task<T>;

/// Tasks that run before the kernel is asked again, so that no task keeps I/O waiting.
const BUDGET: usize = 512;

type Job = Box<dyn FnOnce() + Send>;

/// What other threads reach of an executor.
pub(crate) struct Shared {
    name: String,
    inbox: Mutex<Inbox>,
    /// Set by the loop before it sleeps; whoever clears it must ring the bell.
    sleeping: AtomicBool,
    bell: crate::ring::Bell,
    stop: AtomicBool,
}

#[derive(Default)]
struct Inbox {
    runnables: Vec<Runnable>,
    jobs: Vec<Job>,
    closed: bool,
}

impl Shared {
    fn new(name: &str) -> Result<Arc<Shared>> {
        Ok(Arc::new(Shared {
            name: name.to_owned(),
            inbox: Mutex::default(),
            sleeping: AtomicBool::new(false),
            bell: crate::ring::Bell::new()?,
            stop: AtomicBool::new(false),
        }))
    }

    fn ring_bell(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            self.bell.ring();
        }
    }

    fn schedule(self: &Arc<Self>, runnable: Runnable) {
        let here = CURRENT.with(|c| match &*c.borrow() {
            Some(l) if Arc::ptr_eq(&l.shared, self) => Ok(l.clone()),
            _ => Err(()),
        });
        match here {
            Ok(local) => local.queue.borrow_mut().push_back(runnable),
            Err(()) => {
                let mut inbox = self.inbox.lock().unwrap_or_else(PoisonError::into_inner);
                if inbox.closed {
                    // The thread has ended: the task can only be dropped there, so it is leaked.
                    std::mem::forget(runnable);
                    return;
                }
                inbox.runnables.push(runnable);
                drop(inbox);
                self.ring_bell();
            }
        }
    }
}

/// What one thread's executor is made of.
pub(crate) struct Local {
    shared: Arc<Shared>,
    queue: RefCell<VecDeque<Runnable>>,
    timers: RefCell<BTreeMap<(Instant, u64), Waker>>,
    next_timer: Cell<u64>,
    pub(crate) kind: Kind,
    pool: Arc<Pool>,
}

/// What carries out I/O and tells the time.
pub(crate) enum Kind {
    Ring(Box<RefCell<Ring>>),
    Sim(Rc<World>),
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Local>>> = const { RefCell::new(None) };
}

fn clock_start() -> OsInstant {
    static START: OnceLock<OsInstant> = OnceLock::new();
    *START.get_or_init(OsInstant::now)
}

/// Runs `f` with the executor of this thread.
///
/// Panics on a thread without one: I/O futures live on executors only.
pub(crate) fn with_local<R>(f: impl FnOnce(&Rc<Local>) -> R) -> R {
    CURRENT.with(|c| f(c.borrow().as_ref().expect("this thread runs a gipfel executor")))
}

/// The executor of this thread, if it has one that is not about to end.
pub(crate) fn try_local() -> Option<Rc<Local>> {
    CURRENT.try_with(|c| c.borrow().clone()).ok().flatten()
}

pub(crate) fn pool() -> Arc<Pool> {
    with_local(|l| l.pool.clone())
}

pub(crate) fn simulated() -> Option<Rc<World>> {
    with_local(|l| match &l.kind {
        Kind::Sim(w) => Some(w.clone()),
        Kind::Ring(_) => None,
    })
}

pub(crate) fn now() -> Instant {
    with_local(|l| l.now())
}

pub(crate) fn wall_clock() -> (u64, u32) {
    let d = match simulated() {
        Some(w) => Duration::from_secs(1_700_000_000) + Duration::from_nanos(w.now().0),
        None => SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default(),
    };
    (d.as_secs(), d.subsec_micros())
}

pub(crate) fn set_timer(deadline: Instant, key: Option<u64>, waker: &Waker) -> u64 {
    with_local(|l| {
        let key = key.unwrap_or_else(|| {
            l.next_timer.set(l.next_timer.get() + 1);
            l.next_timer.get()
        });
        l.timers.borrow_mut().insert((deadline, key), waker.clone());
        key
    })
}

pub(crate) fn cancel_timer(deadline: Instant, key: u64) {
    CURRENT.with(|c| {
        if let Ok(c) = c.try_borrow()
            && let Some(l) = c.as_ref()
        {
            l.timers.borrow_mut().remove(&(deadline, key));
        }
    });
}

impl Local {
    fn now(&self) -> Instant {
        match &self.kind {
            Kind::Ring(_) => Instant(clock_start().elapsed().as_nanos() as u64),
            Kind::Sim(w) => w.now(),
        }
    }

    fn fire_timers(&self) {
        if self.timers.borrow().is_empty() {
            return;
        }
        let now = self.now();
        loop {
            let due = {
                let mut t = self.timers.borrow_mut();
                match t.first_entry() {
                    Some(e) if e.key().0 <= now => e.remove(),
                    _ => return,
                }
            };
            due.wake();
        }
    }

    fn take_inbox(&self) {
        let (runnables, jobs) = {
            let mut i = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
            if i.runnables.is_empty() && i.jobs.is_empty() {
                return;
            }
            (std::mem::take(&mut i.runnables), std::mem::take(&mut i.jobs))
        };
        self.queue.borrow_mut().extend(runnables);
        for j in jobs {
            j();
        }
    }

    /// Runs ready tasks, at most [`BUDGET`]; says whether more are ready.
    fn run_ready(&self) -> bool {
        for _ in 0..BUDGET {
            let next = match &self.kind {
                Kind::Ring(_) => self.queue.borrow_mut().pop_front(),
                Kind::Sim(w) => {
                    let mut q = self.queue.borrow_mut();
                    let n = q.len();
                    if n == 0 { None } else { q.swap_remove_back(w.pick(n)) }
                }
            };
            match next {
                Some(r) => drop(r.run()),
                None => return false,
            }
        }
        !self.queue.borrow().is_empty()
    }

    /// One turn of the loop: run, submit, sleep if idle, reap. Returns false where a simulation
    /// has nothing left that could ever happen.
    fn turn(&self, main_ready: impl Fn() -> bool) -> bool {
        self.take_inbox();
        let more = self.run_ready();
        match &self.kind {
            Kind::Ring(ring) => {
                let busy = more || main_ready();
                if !busy {
                    self.shared.sleeping.store(true, Ordering::SeqCst);
                }
                let missed = !busy && self.inbox_filled();
                let wait = if busy || missed { Some(Duration::ZERO) } else { self.until_timer() };
                Ring::enter(ring, wait);
                self.shared.sleeping.store(false, Ordering::SeqCst);
                Ring::reap(ring);
                self.fire_timers();
                true
            }
            Kind::Sim(w) => {
                if more || main_ready() || self.inbox_filled() {
                    return true;
                }
                let next = self.timers.borrow().keys().next().map(|k| k.0);
                match next {
                    Some(t) => w.advance_to(t),
                    None => return false,
                }
                self.fire_timers();
                true
            }
        }
    }

    fn inbox_filled(&self) -> bool {
        let i = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        !i.runnables.is_empty() || !i.jobs.is_empty() || self.shared.stop.load(Ordering::SeqCst)
    }

    /// How long the loop may sleep; `None` without end.
    fn until_timer(&self) -> Option<Duration> {
        let first = self.timers.borrow().keys().next().map(|k| k.0)?;
        Some(first.since(self.now()))
    }
}

/// Makes an executor the current one of this thread, for as long as this lives.
struct Enter;

impl Enter {
    fn new(local: Rc<Local>) -> Enter {
        CURRENT.with(|c| {
            let old = c.borrow_mut().replace(local);
            assert!(old.is_none(), "one executor at a time on a thread");
        });
        Enter
    }
}

impl Drop for Enter {
    fn drop(&mut self) {
        let local = CURRENT.with(|c| c.borrow_mut().take());
        if let Some(l) = local {
            let (runnables, jobs) = {
                let mut i = l.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
                i.closed = true;
                (std::mem::take(&mut i.runnables), std::mem::take(&mut i.jobs))
            };
            drop(jobs);
            drop(runnables);
            let ready = std::mem::take(&mut *l.queue.borrow_mut());
            drop(ready);
            if let Kind::Ring(ring) = &l.kind {
                Ring::shut_down(ring);
            }
        }
    }
}

struct MainWaker {
    ready: AtomicBool,
    shared: Weak<Shared>,
}

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        self.ready.store(true, Ordering::SeqCst);
        if let Some(s) = self.shared.upgrade() {
            s.ring_bell();
        }
    }
}

fn run<F: Future>(local: &Rc<Local>, future: F, stuck: impl Fn() -> String) -> F::Output {
    let mut future = pin!(future);
    let main =
        Arc::new(MainWaker { ready: AtomicBool::new(true), shared: Arc::downgrade(&local.shared) });
    let waker = Waker::from(main.clone());
    let mut cx = Context::from_waker(&waker);
    loop {
        if main.ready.swap(false, Ordering::SeqCst)
            && let Poll::Ready(v) = future.as_mut().poll(&mut cx)
        {
            return v;
        }
        if !local.turn(|| main.ready.load(Ordering::SeqCst)) {
            panic!("{}", stuck());
        }
    }
}

/// Runs `future` in a simulated world, on this thread.
pub(crate) fn run_simulated<F: Future>(world: &Rc<World>, future: F) -> F::Output {
    let local = Rc::new(Local {
        shared: Shared::new("sim").expect("an eventfd can be made"),
        queue: RefCell::default(),
        timers: RefCell::default(),
        next_timer: Cell::new(0),
        kind: Kind::Sim(world.clone()),
        pool: Pool::new(0),
    });
    let _enter = Enter::new(local.clone());
    let seed = world.seed();
    run(&local, future, || format!("simulation with seed {seed} is stuck: all tasks wait"))
}

/// A thread's executor, as seen from others: where work can be sent.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
}

impl Handle {
    /// The thread's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Runs the future that `f` makes on that thread; the outcome comes back through the returned
    /// future. The work goes on if that is dropped.
    pub fn spawn<T, Fut>(&self, f: impl FnOnce() -> Fut + Send + 'static) -> JoinHandle<T>
    where
        T: Send + 'static,
        Fut: Future<Output = T> + 'static,
    {
        let (give, take) = oneshot();
        let job: Job = Box::new(move || spawn_local(async move { give.put(f().await) }).detach());
        let mut i = self.shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        if !i.closed {
            i.jobs.push(job);
        }
        drop(i);
        self.shared.ring_bell();
        take
    }
}

struct Slot<T> {
    value: Option<T>,
    waker: Option<Waker>,
    gone: bool,
}

struct Give<T>(Arc<Mutex<Slot<T>>>);

/// The outcome of work on another thread, as a future.
pub struct JoinHandle<T>(Arc<Mutex<Slot<T>>>);

fn oneshot<T>() -> (Give<T>, JoinHandle<T>) {
    let s = Arc::new(Mutex::new(Slot { value: None, waker: None, gone: false }));
    (Give(s.clone()), JoinHandle(s))
}

impl<T> Give<T> {
    fn put(self, value: T) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).value = Some(value);
    }
}

impl<T> Drop for Give<T> {
    fn drop(&mut self) {
        let mut s = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        s.gone = true;
        let w = s.waker.take();
        drop(s);
        if let Some(w) = w {
            w.wake();
        }
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Result<T>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let mut s = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(v) = s.value.take() {
            return Poll::Ready(Ok(v));
        }
        if s.gone {
            return Poll::Ready(Err(Error::new(ErrorKind::Cancelled, "the I/O thread has ended")));
        }
        s.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// The I/O threads of a process, and the control thread that calls [`Runtime::block_on`].
pub struct Runtime {
    threads: Vec<(Handle, Option<std::thread::JoinHandle<()>>)>,
    pool: Arc<Pool>,
}

/// How late the timers of an I/O thread may be, in nanoseconds; by default it is 50 us.
const TIMER_SLACK: libc::c_ulong = 1_000;

/// Threads for calls that the ring does not offer (open, seek for data, locks).
const BLOCKING_THREADS: usize = 4;
/// Stack of an I/O thread, in bytes: a request is polled through each node of its chain, which may
/// have 256 of them, 10 to 20 KiB each. Memory that is not touched is not taken.
const STACK: usize = 16 << 20;

impl Runtime {
    /// Starts `io_threads` threads, each with a ring of its own. Fails where the kernel offers no
    /// io_uring.
    pub fn new(io_threads: usize) -> Result<Runtime> {
        clock_start();
        let pool = Pool::new(BLOCKING_THREADS);
        let mut threads = Vec::new();
        for n in 0..io_threads {
            let shared = Shared::new(&format!("io{n}"))?;
            let (give, ready) = std::sync::mpsc::sync_channel(1);
            let (s, p) = (shared.clone(), pool.clone());
            let join = std::thread::Builder::new()
                .name(format!("gipfel-io{n}"))
                .stack_size(STACK)
                .spawn(move || io_thread(s, p, &give))
                .map_err(|e| Error::from(e).context("starting an I/O thread"))?;
            ready.recv().map_err(|_| Error::new(ErrorKind::Cancelled, "I/O thread died"))??;
            threads.push((Handle { shared }, Some(join)));
        }
        Ok(Runtime { threads, pool })
    }

    /// The I/O threads.
    pub fn io_threads(&self) -> Vec<Handle> {
        self.threads.iter().map(|t| t.0.clone()).collect()
    }

    /// Runs `future` to its end on this thread, with a ring of its own: the control thread.
    pub fn block_on<F: Future>(&self, future: F) -> Result<F::Output> {
        let shared = Shared::new("control")?;
        let local = ring_local(shared, self.pool.clone())?;
        let _enter = Enter::new(local.clone());
        Ok(run(&local, future, String::new))
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        for (h, _) in &self.threads {
            h.shared.stop.store(true, Ordering::SeqCst);
            h.shared.ring_bell();
        }
        for (_, j) in &mut self.threads {
            if let Some(j) = j.take() {
                // A panic there was already printed by that thread.
                let _ = j.join();
            }
        }
    }
}

fn ring_local(shared: Arc<Shared>, pool: Arc<Pool>) -> Result<Rc<Local>> {
    let ring = Ring::new(&shared.bell)?;
    Ok(Rc::new(Local {
        shared,
        queue: RefCell::default(),
        timers: RefCell::default(),
        next_timer: Cell::new(0),
        kind: Kind::Ring(Box::new(RefCell::new(ring))),
        pool,
    }))
}

fn io_thread(
    shared: Arc<Shared>,
    pool: Arc<Pool>,
    ready: &std::sync::mpsc::SyncSender<Result<()>>,
) {
    let local = match ring_local(shared.clone(), pool) {
        Ok(l) => l,
        Err(e) => {
            let _ = ready.send(Err(e));
            return;
        }
    };
    // SAFETY: this option takes no pointers.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, TIMER_SLACK) };
    let _enter = Enter::new(local.clone());
    let _ = ready.send(Ok(()));
    while !shared.stop.load(Ordering::SeqCst) {
        local.turn(|| false);
    }
}

/// Starts `future` on this thread's executor.
pub fn spawn_local<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    let shared = with_local(|l| l.shared.clone());
    let (runnable, task) = async_task::spawn_local(future, move |r| shared.schedule(r));
    runnable.schedule();
    task
}

/// The executor of this thread.
pub fn current() -> Handle {
    with_local(|l| Handle { shared: l.shared.clone() })
}

/// Lets the other ready tasks of this thread run first.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

//! A throttle group: limits that its members share, and the requests that wait for them.
//!
//! Requests of one member and direction go in the order in which they came; members take turns,
//! a request each, and so do the directions where both could go. One of the requests that wait,
//! the timekeeper, sleeps until the next one may go; whoever finds that requests may go lets them
//! go in one step, on whichever thread that is. A request that waits is in flight above the
//! filter only: nothing below it is entered before its turn.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use gipfel_base::Result;
use gipfel_io::time::{Instant, Sleep, sleep_until};

use super::bucket::{Bucket, UNIT};
use super::limits::{BPS, IOPS, Limits};

/// Which way a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    /// Writes, of zeros too, and discards.
    Write,
}

impl Way {
    fn other(self) -> Way {
        match self {
            Way::Read => Way::Write,
            Way::Write => Way::Read,
        }
    }

    /// The buckets that its requests fill.
    fn buckets(self) -> [usize; 4] {
        let own = 1 + self as usize;
        [BPS, BPS + own, IOPS, IOPS + own]
    }
}

/// Limits, shared by name.
pub struct ThrottleGroup {
    name: String,
    /// Whether requests of a way need not be counted.
    open: [AtomicBool; 2],
    state: Mutex<State>,
}

struct State {
    limits: Limits,
    buckets: [Bucket; 6],
    /// Until when the buckets have leaked.
    leaked: Instant,
    members: Vec<Queues>,
    /// Members with waiting requests, in the order of their turns.
    turns: [VecDeque<u64>; 2],
    /// Which way goes first where both could.
    turn: Way,
    /// Names members and waiting requests.
    next: u64,
    /// The request that sleeps until the next one may go.
    timekeeper: Option<u64>,
}

/// What waits of one member.
struct Queues {
    member: u64,
    name: String,
    waiting: [VecDeque<Waiter>; 2],
}

struct Waiter {
    id: u64,
    bytes: u64,
    waker: Waker,
}

impl ThrottleGroup {
    pub(super) fn new(name: String, limits: Limits) -> Result<Arc<ThrottleGroup>> {
        limits.check()?;
        let state = State {
            limits: Limits::default(),
            buckets: Default::default(),
            leaked: Instant::default(),
            members: Vec::new(),
            turns: Default::default(),
            turn: Way::Read,
            next: 0,
            timekeeper: None,
        };
        let open = [AtomicBool::new(true), AtomicBool::new(true)];
        let group = Arc::new(ThrottleGroup { name, open, state: Mutex::new(state) });
        group.apply(&mut group.state(), limits);
        Ok(group)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The limits in force.
    pub fn limits(&self) -> Limits {
        self.state().limits
    }

    /// The names of its members.
    pub fn members(&self) -> Vec<String> {
        self.state().members.iter().map(|m| m.name.clone()).collect()
    }

    /// Changes the limits, for waiting requests too. Called on an executor's thread.
    ///
    /// # Errors
    /// Contradictory limits; then nothing has changed.
    pub fn set_limits(&self, limits: Limits) -> Result<()> {
        limits.check()?;
        let mut state = self.state();
        state.leak();
        self.apply(&mut state, limits);
        let mut wake = state.serve();
        // When the next one may go has changed as well.
        wake.extend(state.timekeeper.and_then(|id| state.waker_of(id)));
        drop(state);
        wake.into_iter().for_each(Waker::wake);
        Ok(())
    }

    fn apply(&self, state: &mut State, limits: Limits) {
        state.limits = limits;
        for (bucket, rate) in state.buckets.iter_mut().zip(limits.rates) {
            bucket.set_rate(rate);
        }
        for way in [Way::Read, Way::Write] {
            let open = way.buckets().iter().all(|b| limits.rates[*b].avg == 0);
            self.open[way as usize].store(open, Ordering::Release);
        }
    }

    /// Makes a member, called `name` in messages.
    pub(super) fn join(self: &Arc<Self>, name: &str) -> Member {
        let mut state = self.state();
        let id = state.fresh();
        let queues = Queues { member: id, name: name.to_owned(), waiting: Default::default() };
        state.members.push(queues);
        Member { group: self.clone(), id, hurried: AtomicU64::new(0) }
    }
}

impl State {
    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Brings the buckets up to now.
    fn leak(&mut self) {
        let now = Instant::now();
        let nanos = u64::try_from(now.since(self.leaked).as_nanos()).unwrap_or(u64::MAX);
        if nanos > 0 {
            self.leaked = now;
            self.buckets.iter_mut().for_each(|b| b.leak(nanos));
        }
    }

    /// Nanoseconds until a request of this way may go.
    fn wait(&self, way: Way) -> u64 {
        way.buckets().iter().map(|b| self.buckets[*b].wait()).max().unwrap_or(0)
    }

    /// What a request of `bytes` bytes counts in bucket `at`.
    fn cost(&self, at: usize, bytes: u64) -> u128 {
        if at < IOPS {
            return u128::from(bytes) * UNIT;
        }
        match u128::from(self.limits.iops_size) {
            size if size > 0 && u128::from(bytes) > size => u128::from(bytes) * UNIT / size,
            _ => UNIT,
        }
    }

    fn fill(&mut self, way: Way, bytes: u64) {
        for b in way.buckets() {
            let cost = self.cost(b, bytes);
            self.buckets[b].fill(cost);
        }
    }

    fn take_back(&mut self, way: Way, bytes: u64) {
        for b in way.buckets() {
            let cost = self.cost(b, bytes);
            self.buckets[b].take_back(cost);
        }
    }

    fn nobody_waits(&self) -> bool {
        self.turns.iter().all(VecDeque::is_empty)
    }

    fn queue(&mut self, member: u64, way: Way) -> Option<&mut VecDeque<Waiter>> {
        let m = self.members.iter_mut().find(|m| m.member == member)?;
        Some(&mut m.waiting[way as usize])
    }

    /// The waiting request `id`. The numbers in a queue ascend.
    fn waiter(&mut self, member: u64, way: Way, id: u64) -> Option<&mut Waiter> {
        let q = self.queue(member, way)?;
        let at = q.binary_search_by_key(&id, |w| w.id).ok()?;
        q.get_mut(at)
    }

    fn waker_of(&self, id: u64) -> Option<Waker> {
        let all = self.members.iter().flat_map(|m| m.waiting.iter().flatten());
        all.filter(|w| w.id == id).map(|w| w.waker.clone()).next()
    }

    fn push(&mut self, member: u64, way: Way, waiter: Waiter) {
        let Some(q) = self.queue(member, way) else { return };
        q.push_back(waiter);
        if q.len() == 1 {
            self.turns[way as usize].push_back(member);
        }
    }

    /// Takes the next request of `member` out of its queue; the member's next turn comes after
    /// those of all others that wait.
    fn pop(&mut self, member: u64, way: Way) -> Option<Waiter> {
        let q = self.queue(member, way)?;
        let waiter = q.pop_front()?;
        let more = !q.is_empty();
        let turns = &mut self.turns[way as usize];
        turns.retain(|m| *m != member);
        if more {
            turns.push_back(member);
        }
        if self.timekeeper == Some(waiter.id) {
            self.timekeeper = None;
        }
        Some(waiter)
    }

    /// Takes a request that is given up out of its queue. Whether it was there.
    fn remove(&mut self, member: u64, way: Way, id: u64) -> bool {
        let Some(q) = self.queue(member, way) else { return false };
        let Ok(at) = q.binary_search_by_key(&id, |w| w.id) else { return false };
        q.remove(at);
        if q.is_empty() {
            self.turns[way as usize].retain(|m| *m != member);
        }
        if self.timekeeper == Some(id) {
            self.timekeeper = None;
        }
        true
    }

    /// Lets all requests go that may go now; the buckets have leaked. Whom to wake.
    fn serve(&mut self) -> Vec<Waker> {
        let mut wake = Vec::new();
        loop {
            let may_go = |w: Way| !self.turns[w as usize].is_empty() && self.wait(w) == 0;
            let way = match self.turn {
                w if may_go(w) => w,
                w if may_go(w.other()) => w.other(),
                _ => break,
            };
            let Some(waiter) =
                self.turns[way as usize].front().copied().and_then(|member| self.pop(member, way))
            else {
                break;
            };
            self.turn = way.other();
            self.fill(way, waiter.bytes);
            wake.push(waiter.waker);
        }
        self.appoint(&mut wake);
        wake
    }

    /// Sees to it that somebody keeps the time while requests wait.
    fn appoint(&mut self, wake: &mut Vec<Waker>) {
        if self.timekeeper.is_some() {
            return;
        }
        let next = self.turns.iter().find_map(|t| t.front().copied());
        let Some(m) = next.and_then(|id| self.members.iter().find(|m| m.member == id)) else {
            return;
        };
        if let Some(w) = m.waiting.iter().find_map(|q| q.front()) {
            self.timekeeper = Some(w.id);
            wake.push(w.waker.clone());
        }
    }

    /// When the next request may go; there is one that waits.
    fn next_at(&self) -> Instant {
        let ways = [Way::Read, Way::Write];
        let waits = ways.iter().filter(|w| !self.turns[**w as usize].is_empty());
        let nanos = waits.map(|w| self.wait(*w)).min().unwrap_or(0);
        self.leaked + Duration::from_nanos(nanos)
    }
}

/// One who shares a group's limits. Dropped, it leaves the group.
pub(super) struct Member {
    group: Arc<ThrottleGroup>,
    id: u64,
    /// How many wait for its requests to settle: then they go at once, and count.
    hurried: AtomicU64,
}

impl Member {
    pub(super) fn group(&self) -> &Arc<ThrottleGroup> {
        &self.group
    }

    /// Whether requests of this way go without being counted.
    pub(super) fn is_open(&self, way: Way) -> bool {
        self.group.open[way as usize].load(Ordering::Acquire)
    }

    /// Waits for the turn of a request of `bytes` bytes.
    pub(super) fn admit(&self, way: Way, bytes: u64) -> Admission<'_> {
        Admission { member: self, way, bytes, place: Place::Outside, sleep: None }
    }

    /// While `on`, requests do not wait; what they count is paid by those that come later.
    pub(super) fn hurry(&self, on: bool) {
        if !on {
            self.hurried.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        // Counted before the look into the queues: a request comes either before that look or
        // after the count.
        self.hurried.fetch_add(1, Ordering::SeqCst);
        let wake = {
            let mut state = self.group.state();
            let mut wake = state.let_go(self.id);
            state.appoint(&mut wake);
            wake
        };
        wake.into_iter().for_each(Waker::wake);
    }

    /// Leaves the group; what waits goes on.
    pub(super) fn leave(&self) {
        let mut state = self.group.state();
        let mut wake = state.let_go(self.id);
        state.members.retain(|m| m.member != self.id);
        state.appoint(&mut wake);
        drop(state);
        wake.into_iter().for_each(Waker::wake);
    }
}

impl State {
    /// Lets all requests of a member go, in their order.
    fn let_go(&mut self, member: u64) -> Vec<Waker> {
        let mut wake = Vec::new();
        for way in [Way::Read, Way::Write] {
            while let Some(w) = self.pop(member, way) {
                self.fill(way, w.bytes);
                wake.push(w.waker);
            }
        }
        wake
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Where a request stands.
#[derive(Clone, Copy)]
enum Place {
    /// It has not asked yet.
    Outside,
    /// It has this place in its queue, or has been let go from there and does not know yet.
    Queued(u64),
    /// It was let go, or never counted.
    Gone,
}

/// The future of [`Member::admit`]. Dropped before its end, it gives its place or what it counted
/// back.
pub(super) struct Admission<'a> {
    member: &'a Member,
    way: Way,
    bytes: u64,
    place: Place,
    sleep: Option<Sleep>,
}

impl Admission<'_> {
    /// Asks for the first time. Whether the request may go at once.
    fn enter(&mut self, state: &mut State, cx: &Context<'_>, wake: &mut Vec<Waker>) -> bool {
        let hurried = self.member.hurried.load(Ordering::SeqCst) > 0;
        if hurried || state.nobody_waits() && state.wait(self.way) == 0 {
            state.fill(self.way, self.bytes);
            return true;
        }
        let id = state.fresh();
        let waiter = Waiter { id, bytes: self.bytes, waker: cx.waker().clone() };
        let before = state.next_at();
        state.push(self.member.id, self.way, waiter);
        self.place = Place::Queued(id);
        if state.timekeeper.is_none() || state.next_at() < before {
            // Nobody keeps the time, or sleeps too long for this one.
            state.timekeeper = Some(id);
        }
        wake.extend(state.serve());
        false
    }

    /// One look; whom to wake, and whether the request goes.
    fn look(&mut self, cx: &mut Context<'_>) -> (Vec<Waker>, Poll<()>) {
        let mut wake = Vec::new();
        let (member, way) = (self.member, self.way);
        let mut state = member.group.state();
        state.leak();
        match self.place {
            Place::Gone => return (wake, Poll::Ready(())),
            Place::Queued(_) => {}
            Place::Outside => {
                if self.enter(&mut state, cx, &mut wake) {
                    self.place = Place::Gone;
                    return (wake, Poll::Ready(()));
                }
            }
        }
        let Place::Queued(id) = self.place else { return (wake, Poll::Ready(())) };
        if state.timekeeper == Some(id) {
            wake.extend(state.serve());
        }
        let Some(w) = state.waiter(member.id, way, id) else {
            self.place = Place::Gone;
            return (wake, Poll::Ready(()));
        };
        if !w.waker.will_wake(cx.waker()) {
            w.waker = cx.waker().clone();
        }
        self.sleep = (state.timekeeper == Some(id)).then(|| sleep_until(state.next_at()));
        (wake, Poll::Pending)
    }
}

impl Future for Admission<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let (wake, outcome) = self.look(cx);
            // Waking may run code of other executors: never under the lock.
            wake.into_iter().for_each(Waker::wake);
            if outcome.is_ready() {
                self.sleep = None;
                return Poll::Ready(());
            }
            let Some(sleep) = &mut self.sleep else { return Poll::Pending };
            if Pin::new(sleep).poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        let Place::Queued(id) = self.place else { return };
        let mut state = self.member.group.state();
        let mut wake = Vec::new();
        if !state.remove(self.member.id, self.way, id) {
            // It was let go and never came to be: others may go instead.
            state.take_back(self.way, self.bytes);
            wake = state.serve();
            wake.extend(state.timekeeper.and_then(|id| state.waker_of(id)));
        }
        state.appoint(&mut wake);
        drop(state);
        wake.into_iter().for_each(Waker::wake);
    }
}

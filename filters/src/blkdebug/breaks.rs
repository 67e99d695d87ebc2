//! Breakpoints: requests that reach one wait until somebody lets them go on.
//!
//! Both are told on standard output, in the words that scripts for the reference look for.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::{DebugEvent, Held};

/// A request at a breakpoint.
struct Waiting {
    id: u64,
    tag: String,
    waker: Option<Waker>,
}

#[derive(Default)]
struct State {
    points: Vec<(DebugEvent, String)>,
    /// The longest there comes first.
    waiting: Vec<Waiting>,
    last_id: u64,
    /// Who waits for a request to come.
    watchers: Vec<Waker>,
}

impl State {
    /// Lets the request at `index` go on.
    fn release(&mut self, index: usize) {
        let request = self.waiting.remove(index);
        println!("blkdebug: Resuming request '{}'", request.tag);
        if let Some(w) = request.waker {
            w.wake();
        }
    }

    fn find(&self, tag: &str) -> Option<usize> {
        self.waiting.iter().position(|w| w.tag == tag)
    }
}

/// The breakpoints of a node.
#[derive(Default)]
pub(super) struct Breaks(Mutex<State>);

/// A request's stay at one or more breakpoints.
struct Stay<'a> {
    breaks: &'a Breaks,
    ids: Vec<u64>,
}

impl Future for Stay<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.breaks.state();
        let mut held = false;
        for w in state.waiting.iter_mut().filter(|w| self.ids.contains(&w.id)) {
            w.waker = Some(cx.waker().clone());
            held = true;
        }
        if held { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        self.breaks.state().waiting.retain(|w| !self.ids.contains(&w.id));
    }
}

impl Breaks {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`gipfel_node::Debugger::set_break`].
    pub(super) fn set(&self, event: DebugEvent, tag: &str) {
        self.state().points.push((event, tag.to_owned()));
    }

    /// A request comes to `event`: it takes all breakpoints there with it.
    pub(super) fn reach(&self, event: DebugEvent) -> Option<Held<'_>> {
        let mut state = self.state();
        let mut ids = Vec::new();
        for (_, tag) in state.points.extract_if(.., |p| p.0 == event).collect::<Vec<_>>() {
            state.last_id += 1;
            ids.push(state.last_id);
            let id = state.last_id;
            println!("blkdebug: Suspended request '{tag}'");
            state.waiting.push(Waiting { id, tag, waker: None });
        }
        if ids.is_empty() {
            return None;
        }
        state.watchers.drain(..).for_each(Waker::wake);
        Some(Box::pin(Stay { breaks: self, ids }))
    }

    /// As [`gipfel_node::Debugger::remove_break`].
    pub(super) fn remove(&self, tag: &str) -> Result<()> {
        let mut state = self.state();
        let before = state.points.len();
        state.points.retain(|p| p.1 != tag);
        let mut found = state.points.len() < before;
        while let Some(i) = state.find(tag) {
            state.release(i);
            found = true;
        }
        let none = || Error::new(ErrorKind::NotFound, format!("there is no breakpoint '{tag}'"));
        found.then_some(()).ok_or_else(none)
    }

    /// As [`gipfel_node::Debugger::resume`].
    pub(super) fn resume(&self, tag: &str) -> Result<()> {
        let mut state = self.state();
        let at = state.find(tag).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("no request waits at breakpoint '{tag}'"))
        })?;
        state.release(at);
        Ok(())
    }

    /// As [`gipfel_node::Debugger::wait_break`].
    pub(super) async fn wait(&self, tag: &str) {
        std::future::poll_fn(|cx| {
            let mut state = self.state();
            if state.find(tag).is_some() {
                return Poll::Ready(());
            }
            state.watchers.push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

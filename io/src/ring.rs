//! One io_uring: the operations in flight and what they keep alive.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use gipfel_base::{Error, Result};
use io_uring::types::{CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use slab::Slab;

use crate::op::Keep;

/// Entries of the submission queue; more operations than that may be in flight.
const ENTRIES: u32 = 512;
/// Entries of the completion queue.
const COMPLETIONS: u32 = 4096;
/// Marks the completion of the bell's read.
const BELL: u64 = u64::MAX;
/// Marks completions nobody waits for.
const IGNORED: u64 = u64::MAX - 1;
/// `io_uring_enter` flag: run completion work and return what is there.
const GETEVENTS: u32 = 1;
/// How long the end of a thread waits for its last operations.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// An eventfd that wakes a sleeping ring.
pub(crate) struct Bell(Arc<OwnedFd>);

impl Bell {
    pub(crate) fn new() -> Result<Bell> {
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(Error::from(std::io::Error::last_os_error()).context("eventfd"));
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        Ok(Bell(Arc::new(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    pub(crate) fn ring(&self) {
        let one = 1u64;
        // SAFETY: writes 8 bytes from a live local. A full counter still wakes, so the result
        // needs no look.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

enum State {
    Pending(Option<Waker>),
    Done(i32),
    /// Nobody waits any more; what it keeps lives until the kernel answers.
    Orphan,
}

struct Entry {
    state: State,
    keep: Keep,
}

pub(crate) struct Ring {
    uring: IoUring,
    ops: Slab<Entry>,
    bell: Arc<OwnedFd>,
    bell_count: Box<u64>,
    woken: Vec<Waker>,
}

impl Ring {
    pub(crate) fn new(bell: &Bell) -> Result<Ring> {
        let base = || {
            let mut b = IoUring::builder();
            b.dontfork().setup_cqsize(COMPLETIONS).setup_clamp();
            b
        };
        let uring = base()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(ENTRIES)
            .or_else(|_| base().build(ENTRIES))
            .map_err(|e| {
                Error::from(e).context(
                    "io_uring (the kernel must offer it: Linux 5.15 or newer, \
                     and kernel.io_uring_disabled 0)",
                )
            })?;
        let mut r = Ring {
            uring,
            ops: Slab::with_capacity(256),
            bell: bell.0.clone(),
            bell_count: Box::new(0),
            woken: Vec::with_capacity(64),
        };
        r.arm_bell();
        Ok(r)
    }

    fn arm_bell(&mut self) {
        let e = opcode::Read::new(Fd(self.bell.as_raw_fd()), (&raw mut *self.bell_count).cast(), 8)
            .build()
            .user_data(BELL);
        self.push(&e);
    }

    fn push(&mut self, e: &squeue::Entry) {
        // SAFETY: what the entry points to is kept alive by `ops` (or by the ring itself, for the
        // bell) until its completion has been seen.
        while unsafe { self.uring.submission().push(e) }.is_err() {
            // The queue is full: hand it over. An error here comes again at the next enter.
            if self.uring.submit().is_err() {
                std::thread::yield_now();
            }
        }
    }

    /// Starts an operation; `keep` lives until the kernel has answered.
    pub(crate) fn submit(&mut self, entry: squeue::Entry, keep: Keep) -> usize {
        let key = self.ops.insert(Entry { state: State::Pending(None), keep });
        self.push(&entry.user_data(key as u64));
        key
    }

    pub(crate) fn poll(&mut self, key: usize, cx: &mut Context<'_>) -> Poll<(i32, Keep)> {
        let entry = &mut self.ops[key];
        match &mut entry.state {
            State::Done(res) => {
                let res = *res;
                let keep = self.ops.remove(key).keep;
                Poll::Ready((res, keep))
            }
            State::Pending(w) => {
                match w {
                    Some(w) => w.clone_from(cx.waker()),
                    None => *w = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
            State::Orphan => unreachable!("an orphan has no future"),
        }
    }

    /// The future of an operation was dropped. Returns what may be dropped now.
    pub(crate) fn abandon(&mut self, key: usize) -> Option<Keep> {
        match self.ops[key].state {
            State::Done(_) => Some(self.ops.remove(key).keep),
            _ => {
                let entry = &mut self.ops[key];
                entry.state = State::Orphan;
                if entry.keep.cancel_when_abandoned() {
                    let e = opcode::AsyncCancel::new(key as u64).build().user_data(IGNORED);
                    self.push(&e);
                }
                None
            }
        }
    }

    /// Hands new operations to the kernel and waits for a completion: not at all for a `wait` of
    /// zero, without end for `None`.
    pub(crate) fn enter(ring: &RefCell<Ring>, wait: Option<Duration>) {
        let mut ring = ring.borrow_mut();
        let ring = &mut *ring;
        if !ring.uring.completion().is_empty() && ring.uring.submission().is_empty() {
            return;
        }
        let result = match wait {
            Some(Duration::ZERO) => {
                let pending = ring.uring.submission().len() as u32;
                // SAFETY: no sigmask and no extended argument are passed; the entries were
                // pushed under the contract of `push`.
                unsafe {
                    ring.uring.submitter().enter::<libc::sigset_t>(pending, 0, GETEVENTS, None)
                }
            }
            Some(d) => {
                let ts = Timespec::from(d);
                ring.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&ts))
            }
            None => ring.uring.submit_and_wait(1),
        };
        if let Err(e) = result {
            match e.raw_os_error() {
                // Interrupted, timed out, or completions must be reaped first: the loop does that.
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => {}
                _ => panic!("io_uring_enter failed and no I/O can go on: {e}"),
            }
        }
    }

    /// Wakes the owners of completed operations.
    pub(crate) fn reap(ring: &RefCell<Ring>) {
        let mut woken = {
            let mut r = ring.borrow_mut();
            let r = &mut *r;
            let mut rearm = false;
            for c in r.uring.completion() {
                match c.user_data() {
                    BELL => rearm = true,
                    IGNORED => {}
                    key => {
                        let key = key as usize;
                        let state =
                            std::mem::replace(&mut r.ops[key].state, State::Done(c.result()));
                        match state {
                            State::Pending(w) => r.woken.extend(w),
                            State::Orphan => drop(r.ops.remove(key)),
                            State::Done(_) => unreachable!("one completion for each operation"),
                        }
                    }
                }
            }
            if rearm {
                r.arm_bell();
            }
            std::mem::take(&mut r.woken)
        };
        for w in woken.drain(..) {
            w.wake();
        }
        ring.borrow_mut().woken = woken;
    }

    /// Cancels all that is in flight and waits for the kernel to let go of the memory.
    pub(crate) fn shut_down(ring: &RefCell<Ring>) {
        let mut r = ring.borrow_mut();
        let r = &mut *r;
        let _ = r.uring.submit();
        let _ = r.uring.submitter().register_sync_cancel(None, CancelBuilder::any());
        let end = std::time::Instant::now() + LAST_WAIT;
        let mut waits_bell = true;
        loop {
            for c in r.uring.completion() {
                match c.user_data() {
                    BELL => waits_bell = false,
                    IGNORED => {}
                    key => {
                        let entry = &mut r.ops[key as usize];
                        entry.state = State::Done(c.result());
                    }
                }
            }
            let open = r.ops.iter().any(|(_, e)| !matches!(e.state, State::Done(_))) || waits_bell;
            if !open {
                r.ops.clear();
                return;
            }
            if std::time::Instant::now() > end {
                // Memory the kernel may still write to is never freed.
                std::mem::forget(std::mem::take(&mut r.ops));
                std::mem::forget(std::mem::take(&mut r.bell_count));
                return;
            }
            let ts = Timespec::from(Duration::from_millis(50));
            let _ = r.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&ts));
        }
    }
}

//! A few threads for system calls that the ring does not offer and that may block, and for long
//! computations.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::task::Waker;

use gipfel_base::{Error, ErrorKind, Result};

use crate::exec;

type Job = Box<dyn FnOnce() + Send>;

/// The waiting calls and how many threads may serve them.
pub(crate) struct Pool {
    state: Mutex<State>,
    work: Condvar,
    max: usize,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// A thread without work ends after this long.
const LINGER: std::time::Duration = std::time::Duration::from_secs(5);

impl Pool {
    pub(crate) fn new(max: usize) -> Arc<Pool> {
        Arc::new(Pool { state: Mutex::default(), work: Condvar::new(), max })
    }

    fn push(self: &Arc<Self>, job: Job) -> Result<()> {
        let mut s = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        s.jobs.push_back(job);
        if s.idle < s.jobs.len() && s.threads < self.max {
            let me = Arc::downgrade(self);
            let started =
                std::thread::Builder::new().name("gipfel-call".into()).spawn(move || serve(&me));
            match started {
                Ok(_) => s.threads += 1,
                Err(e) if s.threads == 0 => {
                    s.jobs.pop_back();
                    return Err(Error::from(e).context("starting a thread for system calls"));
                }
                Err(_) => {}
            }
        }
        drop(s);
        self.work.notify_one();
        Ok(())
    }
}

fn serve(pool: &Weak<Pool>) {
    while let Some(pool) = pool.upgrade() {
        let mut s = pool.state.lock().unwrap_or_else(PoisonError::into_inner);
        if s.jobs.is_empty() {
            s.idle += 1;
            let (guard, waited) =
                pool.work.wait_timeout(s, LINGER).unwrap_or_else(PoisonError::into_inner);
            s = guard;
            s.idle -= 1;
            if waited.timed_out() && s.jobs.is_empty() {
                s.threads -= 1;
                return;
            }
        }
        let job = s.jobs.pop_front();
        drop(s);
        if let Some(j) = job {
            j();
        }
    }
}

struct Outcome<T> {
    value: Mutex<(Option<T>, Option<Waker>)>,
}

/// Runs a long computation beside the I/O threads, so that nobody waits for it but the caller.
/// In a simulation it takes no time.
pub async fn compute<T: Send + 'static>(
    f: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    if exec::simulated().is_some() { f() } else { call(f).await }
}

/// Runs `f` on a thread of the pool and gives its outcome.
pub(crate) async fn call<T: Send + 'static>(
    f: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let pool = exec::pool();
    let out = Arc::new(Outcome { value: Mutex::new((None, None)) });
    let give = out.clone();
    pool.push(Box::new(move || {
        let v = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Os(libc::EIO), "a system call's thread panicked"))
        });
        let mut o = give.value.lock().unwrap_or_else(PoisonError::into_inner);
        o.0 = Some(v);
        let w = o.1.take();
        drop(o);
        if let Some(w) = w {
            w.wake();
        }
    }))?;
    std::future::poll_fn(|cx| {
        let mut o = out.value.lock().unwrap_or_else(PoisonError::into_inner);
        match o.0.take() {
            Some(v) => std::task::Poll::Ready(v),
            None => {
                o.1 = Some(cx.waker().clone());
                std::task::Poll::Pending
            }
        }
    })
    .await
}

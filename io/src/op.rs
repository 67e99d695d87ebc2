//! An operation on the ring as a future. It owns what the kernel reads and writes.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use gipfel_base::{Error, Result};
use io_uring::squeue;

use crate::buf::Buf;
use crate::exec::{self, Kind};
use crate::net::Message;

/// What an operation keeps alive until the kernel has answered.
pub(crate) enum Keep {
    /// A file operation on this descriptor and this memory.
    File { _fd: Arc<OwnedFd>, _buf: Option<Buf> },
    /// A socket operation; nobody wants its end once the future is gone.
    Socket { _fd: Arc<OwnedFd>, _buf: Option<Buf> },
    /// A gathered send.
    Message { _fd: Arc<OwnedFd>, message: Box<Message> },
}

impl Keep {
    pub(crate) fn cancel_when_abandoned(&self) -> bool {
        matches!(self, Keep::Socket { .. } | Keep::Message { .. })
    }
}

/// An operation in flight on this thread's ring.
pub(crate) struct Op {
    key: Option<usize>,
}

impl Op {
    pub(crate) fn submit(entry: squeue::Entry, keep: Keep) -> Op {
        exec::with_local(|l| match &l.kind {
            Kind::Ring(r) => Op { key: Some(r.borrow_mut().submit(entry, keep)) },
            Kind::Sim(_) => panic!("a real file or socket is used inside a simulation"),
        })
    }
}

impl Future for Op {
    type Output = (i32, Keep);
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("an operation is polled until it is ready, and not after");
        let p = exec::with_local(|l| match &l.kind {
            Kind::Ring(r) => r.borrow_mut().poll(key, cx),
            Kind::Sim(_) => unreachable!("submit refuses"),
        });
        if p.is_ready() {
            self.key = None;
        }
        p
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        // On a thread that is ending the ring itself waits for what is in flight.
        let kept = exec::try_local().and_then(|l| match &l.kind {
            Kind::Ring(r) => r.borrow_mut().abandon(key),
            Kind::Sim(_) => None,
        });
        drop(kept);
    }
}

/// The result of a system call as the ring reports it.
pub(crate) fn check(res: i32, what: impl FnOnce() -> String) -> Result<u32> {
    if res < 0 { Err(Error::os(-res, what())) } else { Ok(res as u32) }
}

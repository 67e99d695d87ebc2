//! Signals as something to wait for.

use std::os::fd::{FromRawFd, OwnedFd};

use gipfel_base::{Error, Result};

use crate::buf::Buf;
use crate::net::Stream;

/// Signals that are taken out of the usual way and waited for.
pub struct Signals(Stream);

impl Signals {
    /// Blocks these signals for the whole process and collects them here. To be called before any
    /// other thread starts, since threads inherit it.
    pub fn take(signals: &[i32]) -> Result<Signals> {
        // SAFETY: sigset_t is plain data that sigemptyset fills.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is a live local for all four calls.
        let fd = unsafe {
            libc::sigemptyset(&raw mut set);
            for s in signals {
                libc::sigaddset(&raw mut set, *s);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(Error::from(std::io::Error::last_os_error()).context("signalfd"));
        }
        // SAFETY: the descriptor was just made and nobody else owns it.
        Ok(Signals(Stream::from_pipe(unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    /// Waits for the next signal and gives its number.
    pub async fn next(&self) -> Result<i32> {
        // struct signalfd_siginfo has 128 bytes and begins with the number (signalfd(2)).
        let buf = Buf::new(128);
        self.0.recv_exact(buf.clone()).await?;
        let mut number = [0; 4];
        buf.copy_to(0, &mut number);
        Ok(i32::from_ne_bytes(number))
    }
}

/// Sends this thread the signal `number`.
pub fn raise(number: i32) -> Result<()> {
    // SAFETY: raise takes no pointers.
    match unsafe { libc::raise(number) } {
        0 => Ok(()),
        _ => Err(Error::from(std::io::Error::last_os_error()).context(format!("signal {number}"))),
    }
}

/// The signals that ask a process to end: SIGTERM, SIGINT, SIGHUP.
pub const TERMINATION: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];

/// The signal that asks for a report of progress: SIGUSR1.
pub const REPORT: i32 = libc::SIGUSR1;

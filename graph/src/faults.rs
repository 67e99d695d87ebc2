//! What becomes of a client's requests that fail: the error policies of a backend (rerror, werror).

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use event_listener::Event;
use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::{Report, Reports};
use serde_json::json;

/// What is done with a request that failed (BlockdevOnError of the QMP reference).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum OnError {
    /// The client is told.
    #[default]
    Report = 0,
    /// The client is told that all went well.
    Ignore = 1,
    /// As `Stop` where space ran out, else as `Report`. Only for writes.
    Enospc = 2,
    /// The client waits until the backend is let go on; then the request is done again.
    Stop = 3,
}

impl OnError {
    /// The policy of that name in the QMP reference.
    pub fn parse(name: &str) -> Result<OnError> {
        Ok(match name {
            "report" | "auto" => OnError::Report,
            "ignore" => OnError::Ignore,
            "enospc" => OnError::Enospc,
            "stop" => OnError::Stop,
            _ => {
                return Err(Error::invalid(format!(
                    "'{name}' is no error policy: report, ignore, enospc or stop"
                )));
            }
        })
    }

    /// Its name in the QMP reference.
    pub fn name(self) -> &'static str {
        match self {
            OnError::Report => "report",
            OnError::Ignore => "ignore",
            OnError::Enospc => "enospc",
            OnError::Stop => "stop",
        }
    }

    fn of(code: u8) -> OnError {
        match code {
            1 => OnError::Ignore,
            2 => OnError::Enospc,
            3 => OnError::Stop,
            _ => OnError::Report,
        }
    }
}

/// What kind of request failed; flushes and discards count as writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// A read.
    Read,
    /// Anything else.
    Write,
}

/// How the last request that failed left a backend (BlockDeviceIoStatus).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoStatus {
    /// None failed, or the client was let go on since.
    Ok,
    /// One failed, and the client waits.
    Failed,
    /// One found no space, and the client waits.
    NoSpace,
}

/// What the backend does next with a failed request.
pub(crate) enum Verdict {
    Report,
    Ignore,
    Again,
}

/// The policies of one backend and the requests that they hold.
pub struct Faults {
    policies: [AtomicU8; 2],
    reports: Option<Arc<Reports>>,
    stopped: Mutex<Option<IoStatus>>,
    resumed: Event,
}

impl Faults {
    pub(crate) fn new(reports: Option<Arc<Reports>>) -> Faults {
        Faults {
            policies: Default::default(),
            reports,
            stopped: Mutex::new(None),
            resumed: Event::new(),
        }
    }

    /// Sets the policies for reads and writes.
    ///
    /// # Errors
    /// `Enospc` for reads.
    pub fn set_policies(&self, read: OnError, write: OnError) -> Result<()> {
        check(read)?;
        self.policies[0].store(read as u8, Ordering::Relaxed);
        self.policies[1].store(write as u8, Ordering::Relaxed);
        Ok(())
    }

    /// The policy for requests of a kind.
    pub fn policy(&self, operation: Operation) -> OnError {
        OnError::of(self.policies[operation as usize].load(Ordering::Relaxed))
    }

    /// Whether failures of that kind are not simply reported.
    pub(crate) fn settles(&self, operation: Operation) -> bool {
        self.policy(operation) != OnError::Report || self.reports.is_some()
    }

    /// How the last failure left it.
    pub fn status(&self) -> IoStatus {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(IoStatus::Ok)
    }

    /// Lets requests that are held be done again.
    pub fn resume(&self) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.resumed.notify(usize::MAX);
    }

    /// The client goes: nothing is held for it any more, failures are reported.
    pub fn give_up(&self) {
        self.policies.iter().for_each(|p| p.store(OnError::Report as u8, Ordering::Relaxed));
        self.resume();
    }

    /// Says what becomes of a failed request, after waiting if it must wait.
    pub(crate) async fn judge(&self, backend: &str, operation: Operation, e: &Error) -> Verdict {
        let kind = e.kind();
        // These are answers to the client and say nothing of the storage.
        if matches!(kind, ErrorKind::NoMedium | ErrorKind::ReadOnly | ErrorKind::InvalidInput) {
            return Verdict::Report;
        }
        let no_space = kind == ErrorKind::NoSpace;
        let action = match self.policy(operation) {
            OnError::Enospc if no_space => OnError::Stop,
            OnError::Enospc => OnError::Report,
            other => other,
        };
        let listener = self.resumed.listen();
        if action == OnError::Stop {
            let status = if no_space { IoStatus::NoSpace } else { IoStatus::Failed };
            *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
        }
        if let Some(reports) = &self.reports {
            let operation = match operation {
                Operation::Read => "read",
                Operation::Write => "write",
            };
            let data = json!({
                "qom-path": "",
                "device": backend,
                "operation": operation,
                "action": action.name(),
                "nospace": no_space,
                "reason": e.to_string(),
            });
            let about = format!("{backend} {operation}");
            reports.send(Report { event: "BLOCK_IO_ERROR", about, data });
        }
        match action {
            OnError::Ignore => Verdict::Ignore,
            OnError::Stop => {
                listener.await;
                Verdict::Again
            }
            OnError::Report | OnError::Enospc => Verdict::Report,
        }
    }
}

/// Fails for a policy that reads cannot have.
pub(crate) fn check(read: OnError) -> Result<()> {
    match read {
        OnError::Enospc => Err(Error::invalid(
            "the error policy 'enospc' is for writes only: a read needs no space",
        )),
        _ => Ok(()),
    }
}

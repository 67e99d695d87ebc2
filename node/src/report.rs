//! What drivers tell unasked: from any I/O thread to the one task that passes it on.
//!
//! A report is a plain value in the shape of an event of the QMP reference. A driver that reports
//! is opened with the process's [`Reports`]; it does not know who listens, or whether anybody does.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use event_listener::Event;
use serde_json::Value;

/// Something that happened at a node.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The event's name.
    pub event: &'static str,
    /// What it is about: of reports that agree in this, the last one says enough.
    pub about: String,
    /// The event's data.
    pub data: Value,
}

/// Reports that wait to be passed on.
#[derive(Default)]
pub struct Reports {
    waiting: Mutex<VecDeque<Report>>,
    more: Event,
}

impl Reports {
    /// Reports that wait at most; of more than that the oldest go unsaid.
    pub const MAX_WAITING: usize = 256;

    /// Adds a report. Never waits.
    pub fn send(&self, report: Report) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.len() == Self::MAX_WAITING {
            waiting.pop_front();
        }
        waiting.push_back(report);
        drop(waiting);
        self.more.notify(usize::MAX);
    }

    /// The oldest report, if there is one.
    pub fn take(&self) -> Option<Report> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// The oldest report, after waiting for one.
    pub async fn next(&self) -> Report {
        loop {
            let more = self.more.listen();
            if let Some(r) = self.take() {
                return r;
            }
            more.await;
        }
    }
}

//! Simulated connections: two byte queues of bounded size.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_listener::Event;
use gipfel_base::{Error, ErrorKind, Result};

use super::world;
use crate::buf::Buf;

/// What one direction holds at most, in bytes, as a socket's buffer does.
const CAPACITY: usize = 64 << 10;

#[derive(Default)]
struct Queue {
    state: Mutex<(VecDeque<u8>, bool)>,
    changed: Event,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, (VecDeque<u8>, bool)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.state().1 = true;
        self.changed.notify(usize::MAX);
    }
}

/// One end of a simulated connection.
pub(crate) struct PipeEnd {
    from: Arc<Queue>,
    to: Arc<Queue>,
}

impl PipeEnd {
    pub(crate) fn pair() -> (PipeEnd, PipeEnd) {
        let (a, b) = (Arc::new(Queue::default()), Arc::new(Queue::default()));
        (PipeEnd { from: a.clone(), to: b.clone() }, PipeEnd { from: b, to: a })
    }

    pub(crate) async fn recv(&self, buf: &Buf) -> usize {
        loop {
            let l = self.from.changed.listen();
            {
                let mut s = self.from.state();
                if !s.0.is_empty() {
                    // Streams cut messages anywhere.
                    let most = s.0.len().min(buf.len());
                    let n = 1 + world().pick(most);
                    let bytes: Vec<u8> = s.0.drain(..n).collect();
                    buf.copy_from(0, &bytes);
                    drop(s);
                    self.from.changed.notify(usize::MAX);
                    return n;
                }
                if s.1 {
                    return 0;
                }
            }
            l.await;
        }
    }

    pub(crate) async fn send(&self, parts: &[Buf]) -> Result<()> {
        for p in parts {
            let bytes = p.to_vec();
            let mut at = 0;
            while at < bytes.len() {
                let l = self.to.changed.listen();
                {
                    let mut s = self.to.state();
                    if s.1 {
                        return Err(Error::new(ErrorKind::Disconnected, "send: peer has closed"));
                    }
                    let n = CAPACITY.saturating_sub(s.0.len()).min(bytes.len() - at);
                    if n > 0 {
                        s.0.extend(&bytes[at..at + n]);
                        at += n;
                        drop(s);
                        self.to.changed.notify(usize::MAX);
                        continue;
                    }
                }
                l.await;
            }
        }
        Ok(())
    }

    pub(crate) fn close(&self) {
        self.from.close();
        self.to.close();
    }
}

impl Drop for PipeEnd {
    fn drop(&mut self) {
        self.close();
    }
}

//! Events on their way to the monitors, and the bounded queue of lines of each monitor.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};

use event_listener::Event;
use gipfel_io::net::Stream;
use gipfel_io::time::{sleep, timeout, wall_clock};
use gipfel_qmp::{Outgoing, Schema, Timestamp};
use serde_json::Value;

/// Bytes of answers that wait for a monitor's client before its next command is taken, and bytes
/// of events that do so at most: one that reads nothing loses its connection. A single answer may
/// be larger.
const MAX_QUEUED: usize = 4 << 20;
/// How long the end of the daemon waits for its last words to be read.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_millis(500);

/// The lines that wait to be sent to one client.
pub struct Outbox {
    stream: Stream,
    pretty: bool,
    lines: RefCell<VecDeque<Line>>,
    /// Bytes that wait, and those of them that are events'.
    bytes: Cell<usize>,
    event_bytes: Cell<usize>,
    sending: Cell<bool>,
    changed: Event,
    closed: Cell<bool>,
    negotiated: Cell<bool>,
}

struct Line {
    text: String,
    is_event: bool,
}

impl Outbox {
    /// Nothing to be sent on `stream` yet; messages will be indented for people if `pretty`.
    pub fn new(stream: Stream, pretty: bool) -> Outbox {
        Outbox {
            stream,
            pretty,
            lines: RefCell::default(),
            bytes: Cell::new(0),
            event_bytes: Cell::new(0),
            sending: Cell::new(false),
            changed: Event::new(),
            closed: Cell::new(false),
            negotiated: Cell::new(false),
        }
    }

    /// Adds the greeting or an answer.
    pub fn push(&self, message: &Outgoing) {
        self.add(message, false);
    }

    fn add(&self, message: &Outgoing, is_event: bool) {
        if self.closed.get() {
            return;
        }
        let text = message.text(self.pretty);
        self.count(text.len() as isize, is_event);
        self.lines.borrow_mut().push_back(Line { text, is_event });
        self.changed.notify(usize::MAX);
    }

    /// Counts bytes that are added, or taken out where `n` is negative.
    fn count(&self, n: isize, is_event: bool) {
        self.bytes.set(self.bytes.get().wrapping_add_signed(n));
        if is_event {
            self.event_bytes.set(self.event_bytes.get().wrapping_add_signed(n));
        }
    }

    /// Lets events come from now on.
    pub fn set_negotiated(&self) {
        self.negotiated.set(true);
    }

    /// Nothing is added any more; what waits is still sent.
    pub fn close(&self) {
        self.closed.set(true);
        self.changed.notify(usize::MAX);
    }

    /// Ends the connection at once, and forgets what waits.
    pub fn cut_off(&self) {
        self.lines.borrow_mut().clear();
        self.bytes.set(0);
        self.event_bytes.set(0);
        self.close();
        self.stream.shutdown();
    }

    /// Whether the connection is at its end.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// The next line, after waiting for it; `None` at the end.
    pub async fn next(&self) -> Option<String> {
        self.sending.set(false);
        loop {
            let next = self.lines.borrow_mut().pop_front();
            // Others wait for room or for an empty box; this comes before it waits itself.
            self.changed.notify(usize::MAX);
            if let Some(line) = next {
                self.count(-(line.text.len() as isize), line.is_event);
                self.sending.set(true);
                return Some(line.text);
            }
            if self.closed.get() {
                return None;
            }
            self.changed.listen().await;
        }
    }

    /// Waits until few enough bytes are queued to take another command.
    pub async fn room(&self) {
        loop {
            let l = self.changed.listen();
            if self.bytes.get() < MAX_QUEUED || self.closed.get() {
                return;
            }
            l.await;
        }
    }

    fn is_idle(&self) -> bool {
        self.closed.get() || self.lines.borrow().is_empty() && !self.sending.get()
    }
}

/// Tells all monitors what happens.
pub struct Events {
    schema: &'static Schema,
    boxes: RefCell<Vec<Weak<Outbox>>>,
}

impl Events {
    /// No monitors yet.
    pub fn new(schema: &'static Schema) -> Rc<Events> {
        Rc::new(Events { schema, boxes: RefCell::default() })
    }

    /// Lets a monitor hear of events.
    pub fn add(&self, b: &Rc<Outbox>) {
        let mut boxes = self.boxes.borrow_mut();
        boxes.retain(|b| b.strong_count() > 0);
        boxes.push(Rc::downgrade(b));
    }

    /// Tells every monitor that has negotiated.
    pub fn emit(&self, name: &str, data: Value) {
        let (seconds, microseconds) = wall_clock();
        let at = Timestamp { seconds: seconds as i64, microseconds };
        let message = match self.schema.event_message(name, data, at) {
            Ok(m) => m,
            Err(e) => {
                eprintln!("gipfel: {e}");
                return;
            }
        };
        for b in self.boxes.borrow().iter().filter_map(Weak::upgrade) {
            if !b.negotiated.get() || b.closed.get() {
                continue;
            }
            if b.event_bytes.get() > MAX_QUEUED {
                b.cut_off();
            } else {
                b.add(&message, true);
            }
        }
    }

    /// Waits until all is sent, but not long for clients that do not read.
    pub async fn drained(&self) {
        let all = async {
            while self.boxes.borrow().iter().filter_map(Weak::upgrade).any(|b| !b.is_idle()) {
                sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        // A client that reads nothing does not keep the daemon from its end.
        let _ = timeout(LAST_WORDS, all).await;
    }
}

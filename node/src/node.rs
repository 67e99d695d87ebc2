//! A node: a driver instance under a name.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use event_listener::Event;
use gipfel_base::{ByteRange, Error, Result};

use crate::copies::Copies;
use crate::def::DriverDef;
use crate::driver::Driver;

/// A driver instance in the graph.
pub struct Node {
    name: String,
    def: &'static DriverDef,
    driver: Box<dyn Driver>,
    owed: Mutex<Vec<Arc<Owed>>>,
}

/// A flush of another node that must complete before this node's next flush does
/// (mutators.md, rule 9).
pub struct Owed {
    outcome: Mutex<Option<Result<()>>>,
    settled: Event,
    wanted: AtomicBool,
}

impl Default for Owed {
    fn default() -> Self {
        Owed { outcome: Mutex::new(None), settled: Event::new(), wanted: AtomicBool::new(false) }
    }
}

impl Owed {
    /// Says how that flush ended.
    pub fn settle(&self, outcome: Result<()>) {
        *self.outcome.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome);
        self.settled.notify(usize::MAX);
    }

    /// Whether somebody waits for it.
    pub fn wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    fn outcome(&self) -> Option<Result<()>> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn wait(&self) -> Result<()> {
        self.wanted.store(true, Ordering::Relaxed);
        loop {
            if let Some(r) = self.outcome() {
                return r;
            }
            let l = self.settled.listen();
            if let Some(r) = self.outcome() {
                return r;
            }
            l.await;
        }
    }
}

impl Node {
    /// A node named `name`.
    pub fn new(name: String, def: &'static DriverDef, driver: Box<dyn Driver>) -> Arc<Node> {
        Arc::new(Node { name, def, driver, owed: Mutex::default() })
    }

    /// Its node-name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its driver's definition.
    pub fn def(&self) -> &'static DriverDef {
        self.def
    }

    /// Its driver.
    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    /// Visible size in bytes.
    pub fn size(&self) -> u64 {
        self.driver.size()
    }

    /// `top` and all nodes below it, once each, in whichever way they are shared. An edge that is
    /// being changed is left out.
    pub fn all_below(top: Arc<Node>) -> Vec<Arc<Node>> {
        let mut found = vec![top];
        let mut seen: HashSet<*const Node> = found.iter().map(Arc::as_ptr).collect();
        let mut at = 0;
        while at < found.len() {
            let node = found[at].clone();
            let copies = node.driver().copies().and_then(Copies::try_enter);
            let copies = copies.iter().flat_map(|set| set.iter());
            for c in node.driver().children().iter().chain(copies) {
                let below = c.try_enter().and_then(|e| e.clone());
                found.extend(below.filter(|n| seen.insert(Arc::as_ptr(n))));
            }
            at += 1;
        }
        found
    }

    /// Lets the next flushes of this node wait for `owed`.
    pub fn owe(&self, owed: Arc<Owed>) {
        self.owed.lock().unwrap_or_else(PoisonError::into_inner).push(owed);
    }

    /// Waits for what is owed; an owed flush that failed makes every later flush fail, since the
    /// data it spoke of may be lost.
    pub(crate) async fn settle_owed(&self) -> Result<()> {
        loop {
            let next = self.owed.lock().unwrap_or_else(PoisonError::into_inner).last().cloned();
            let Some(o) = next else { return Ok(()) };
            o.wait().await?;
            self.owed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|x| !Arc::ptr_eq(x, &o));
        }
    }

    pub(crate) fn check(&self, offset: u64, len: u64, may_grow: bool) -> Result<ByteRange> {
        let range = ByteRange::checked(offset, len);
        match range {
            Some(r) if r.end() <= self.size() || may_grow && self.driver.grows() => Ok(r),
            _ => Err(Error::invalid(format!(
                "node '{}': {len} bytes at {offset:#x} reach past its end at {:#x}",
                self.name,
                self.size()
            ))),
        }
    }
}

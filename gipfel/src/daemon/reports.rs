//! What drivers report becomes events, and not too many of them.
//!
//! A broken child of a quorum could report with every request. Of reports about the same thing one
//! goes out at once and then the newest once in [`INTERVAL`] (QMP specification, rate limits of
//! events).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use gipfel_io::spawn_local;
use gipfel_io::time::sleep;
use gipfel_node::{Report, Reports};

use super::events::Events;

/// Between two events about the same thing.
const INTERVAL: Duration = Duration::from_secs(1);

/// What was reported within the last interval, and the newest that has not been told yet.
type Recent = Rc<RefCell<BTreeMap<(&'static str, String), Option<Report>>>>;

/// Passes on reports as long as the process lives.
pub fn pass_on(events: Rc<Events>, reports: Arc<Reports>) {
    let recent = Recent::default();
    spawn_local(async move {
        loop {
            let report = reports.next().await;
            let key = (report.event, report.about.clone());
            if let Some(waiting) = recent.borrow_mut().get_mut(&key) {
                *waiting = Some(report);
                continue;
            }
            events.emit(report.event, report.data);
            recent.borrow_mut().insert(key.clone(), None);
            spawn_local(hold_back(events.clone(), recent.clone(), key)).detach();
        }
    })
    .detach();
}

/// Tells the newest report about `key` after each interval, until there was none.
async fn hold_back(events: Rc<Events>, recent: Recent, key: (&'static str, String)) {
    loop {
        sleep(INTERVAL).await;
        let newest = recent.borrow_mut().get_mut(&key).and_then(Option::take);
        match newest {
            Some(r) => events.emit(r.event, r.data),
            None => break,
        }
    }
    recent.borrow_mut().remove(&key);
}

//! A graph over drivers that live in memory, for tests of the graph.

pub mod fan;
pub mod jobs;
pub mod lab;
pub mod mutate;
pub mod notation;
pub mod oracle;
pub mod stage;
pub mod steps;

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::Once;

use gipfel_graph::Graph;
use serde_json::{Map, Value, json};

pub use lab::BLOCK;

/// An empty graph over these drivers.
pub fn graph() -> Rc<Graph> {
    Graph::new(lab::registry(&std::sync::Arc::default()))
}

/// Runs `f`; where it panics, says with what words and where. Nothing is printed then.
pub fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    // What was said last, on a thread that wants to know.
    thread_local!(static WORDS: RefCell<Option<String>> = const { RefCell::new(None) });
    static LISTEN: Once = Once::new();
    LISTEN.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            WORDS.with_borrow_mut(|w| match w {
                Some(words) => *words = info.to_string(),
                None => usual(info),
            });
        }));
    });
    WORDS.set(Some(String::new()));
    let r = panic::catch_unwind(AssertUnwindSafe(f));
    let words = WORDS.take().unwrap_or_default();
    r.map_err(|_| words)
}

/// A JSON object as options.
pub fn map(v: Value) -> Map<String, Value> {
    match v {
        Value::Object(m) => m,
        _ => panic!("options are an object"),
    }
}

/// Adds an overlay node without a backing node.
pub async fn add_overlay(g: &Rc<Graph>, name: &str) -> gipfel_base::Result<()> {
    let file = json!({ "driver": "mem" });
    let o = json!({ "driver": "overlay", "node-name": name, "file": file, "backing": null });
    g.blockdev_add(map(o)).await
}

/// The graph as sorted lines `PARENT.CHILD -> NODE`, implicit nodes included.
pub async fn picture(g: &Rc<Graph>) -> Vec<String> {
    let m = g.model().await;
    let mut lines: Vec<_> = m
        .edges()
        .filter_map(|(_, e)| Some(format!("{} -> {}", e.label, m.node(e.target?).name)))
        .collect();
    lines.extend(m.nodes().map(|(_, n)| format!("node {}", n.name)));
    lines.extend(m.backends().map(|(_, b)| format!("backend {}", b.name)));
    lines.sort();
    lines
}

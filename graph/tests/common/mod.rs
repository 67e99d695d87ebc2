//! A graph over drivers that live in memory, for tests of the graph.

#[allow(dead_code, reason = "each test file uses its own part")]
pub mod fan;
#[allow(dead_code, reason = "each test file uses its own part")]
pub mod lab;
#[allow(dead_code, reason = "each test file uses its own part")]
pub mod mutate;
#[allow(dead_code, reason = "each test file uses its own part")]
pub mod notation;
#[allow(dead_code, reason = "each test file uses its own part")]
pub mod oracle;
#[allow(dead_code, reason = "each test file uses its own part")]
pub mod stage;
#[allow(dead_code, reason = "each test file uses its own part")]
pub mod steps;

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::rc::Rc;
use std::sync::Once;

use gipfel_graph::Graph;
use serde_json::{Map, Value, json};

#[allow(unused_imports, reason = "each test file uses its own part")]
pub use lab::BLOCK;

/// An empty graph over these drivers.
#[allow(dead_code, reason = "each test file uses its own part")]
pub fn graph() -> Rc<Graph> {
    Graph::new(lab::registry(&std::sync::Arc::default()))
}

/// Runs `f`; where it panics, says with what words and where. Nothing is printed.
#[allow(dead_code, reason = "each test file uses its own part")]
pub fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    thread_local!(static WORDS: RefCell<String> = const { RefCell::new(String::new()) });
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        panic::set_hook(Box::new(|info| WORDS.with(|w| *w.borrow_mut() = info.to_string())));
    });
    panic::catch_unwind(AssertUnwindSafe(f)).map_err(|_| WORDS.with(|w| w.take()))
}

/// A JSON object as options.
pub fn map(v: Value) -> Map<String, Value> {
    match v {
        Value::Object(m) => m,
        _ => panic!("options are an object"),
    }
}

/// Adds an overlay node without a backing node.
#[allow(dead_code, reason = "each test file uses its own part")]
pub async fn add_overlay(g: &Rc<Graph>, name: &str) -> gipfel_base::Result<()> {
    let file = json!({ "driver": "mem" });
    let o = json!({ "driver": "overlay", "node-name": name, "file": file, "backing": null });
    g.blockdev_add(map(o)).await
}

/// The graph as sorted lines `PARENT.CHILD -> NODE`, implicit nodes included.
#[allow(dead_code, reason = "each test file uses its own part")]
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

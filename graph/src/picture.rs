//! The graph as a picture: plain values for query-graph, and what a change would make of it
//! (graph-rehearse), computed on a draft that is then dropped.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::Binding;
use serde_json::{Value, json};

use crate::graph::Graph;
use crate::model::{EdgeInfo, Model, NodeInfo, Owner, Parent};
use crate::query::nodes_and_edges;

/// Where a rehearsed change leaves the picture of the graph that it would have made.
pub(crate) type Rehearsal = Rc<RefCell<Option<Value>>>;

/// The model as a picture (BlockGraph of our QMP reference).
pub(crate) fn picture(model: &Model) -> Value {
    // A number for each point: nodes first, then backends.
    let nodes: HashMap<_, _> = model.nodes().enumerate().map(|(i, (id, _))| (id, i)).collect();
    let count = nodes.len();
    let backends: HashMap<_, _> =
        model.backends().enumerate().map(|(i, (id, _))| (id, count + i)).collect();
    let place = |p: Parent| match p {
        Parent::Node(n) => nodes.get(&n).copied(),
        Parent::Backend(b) => backends.get(&b).copied(),
    };
    let below = model.nodes().map(|(id, n)| node(model, nodes[&id], n));
    let above = model.backends().map(|(id, b)| {
        let mut v = json!({ "id": backends[&id], "kind": "backend", "name": b.name });
        if let Some(c) = &b.client {
            v["client"] = json!(c);
        }
        v
    });
    let edges =
        model.edges().filter_map(|(_, e)| Some(edge(e, place(e.parent)?, *nodes.get(&e.target?)?)));
    nodes_and_edges(below.chain(above).collect(), edges.collect())
}

fn node(model: &Model, id: usize, n: &NodeInfo) -> Value {
    let mut v = json!({
        "id": id,
        "kind": "node",
        "name": n.name,
        "driver": n.live.def().name,
        "size": n.live.size(),
        "read-only": n.read_only,
    });
    match n.implicit {
        None => {}
        Some(Owner::Backend(b)) => {
            v["kind"] = json!("client-filter");
            v["owner"] = json!(model.get_backend(b).map(|b| b.name.clone()));
        }
        Some(Owner::Node(n)) => {
            v["kind"] = json!("node-filter");
            v["owner"] = json!(model.get_node(n).map(|n| n.name.clone()));
        }
    }
    v
}

fn edge(e: &EdgeInfo, parent: usize, child: usize) -> Value {
    let binding = match e.binding {
        Binding::Position => "position",
        Binding::Content => "content",
    };
    let mut v = json!({
        "parent": parent,
        "child": child,
        "name": e.name,
        "label": e.label,
        "binding": binding,
        "perm": e.perms.used.names().collect::<Vec<_>>(),
        "shared-perm": e.perms.shared.names().collect::<Vec<_>>(),
    });
    if let Some(who) = &e.frozen {
        v["frozen"] = json!(who);
    }
    v
}

/// What ends a rehearsed change before it touches anything.
pub(crate) fn rehearsed() -> Error {
    Error::new(ErrorKind::Cancelled, "this was a rehearsal")
}

impl Graph {
    /// query-graph.
    pub async fn query_picture(&self) -> Value {
        picture(&*self.state.lock().await)
    }

    /// Lets `change` be carried out on a graph that stops before anything is done: the pictures
    /// before and after.
    ///
    /// # Errors
    /// Those of the change, where it would be refused.
    pub async fn rehearse<F: Future<Output = Result<()>>>(
        &self,
        change: impl FnOnce(Rc<Graph>) -> F,
    ) -> Result<(Value, Value)> {
        let before = self.query_picture().await;
        let end = Rehearsal::default();
        let done = change(Rc::new(self.with_rehearsal(end.clone()))).await;
        match (end.take(), done) {
            (Some(after), _) => Ok((before, after)),
            (None, Err(e)) => Err(e),
            // It came to its end without a change.
            (None, Ok(())) => Ok((before.clone(), before)),
        }
    }
}

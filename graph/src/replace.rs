//! blockdev-replace (our own): puts an explicit filter in or takes it out, live.

use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::{Kind, Role};

use crate::graph::Graph;
use crate::model::{Draft, EdgeId, Model, Named, NodeId, Parent};
use crate::snapshot::is_position;

/// Which edges blockdev-replace re-points.
#[derive(Clone, Debug)]
pub enum ReplaceEdges {
    /// The edge of that name, `PARENT.CHILD`; for a backend `BACKEND.root`.
    Named(String),
    /// All position-bound edges of that node.
    AllOf(String),
    /// The one position-bound edge of that node; more than one is refused.
    OnlyOf(String),
}

impl Graph {
    /// Points the edges at the node `with`, which must show the data of what it replaces.
    pub async fn blockdev_replace(self: &Rc<Self>, edges: &ReplaceEdges, with: &str) -> Result<()> {
        let mut model = self.state.lock().await;
        let new = model.find_node(with)?;
        self.transact(&mut model, |draft| {
            let moving: Vec<EdgeId> = match edges {
                ReplaceEdges::Named(name) => vec![find_edge(draft, name)?],
                ReplaceEdges::AllOf(name) | ReplaceEdges::OnlyOf(name) => {
                    let old = draft.find_node(name)?;
                    let new_own = |d: &Draft<'_>, e: &EdgeId| match d.edge(*e).parent {
                        Parent::Node(p) => d.reaches(new, p),
                        Parent::Backend(_) => false,
                    };
                    let outer = draft.outer_parents(old).into_iter();
                    outer.filter(|e| is_position(draft, *e) && !new_own(draft, e)).collect()
                }
            };
            if let (ReplaceEdges::OnlyOf(name), true) = (edges, moving.len() > 1) {
                let labels: Vec<_> = moving.iter().map(|e| draft.edge(*e).label.clone()).collect();
                return Err(Error::invalid(format!(
                    "node '{name}' has several such edges ({}): name one of them as 'edge', or \
                     say all=on to move them all",
                    labels.join(", ")
                )));
            }
            let top = draft.top_of(new);
            for e in moving {
                let old = draft.edge(e).target.ok_or_else(|| {
                    Error::new(
                        ErrorKind::NoMedium,
                        format!("edge '{}' leads to no node: insert a medium instead", {
                            &draft.edge(e).label
                        }),
                    )
                })?;
                same_data(draft, old, new, with)?;
                draft.repoint(e, Some(top))?;
            }
            Ok(())
        })
        .await
        .map(drop)
    }
}

/// The edge called `name`. For a backend (also by its client's export id) it is the one from its
/// client-side filters to its node.
fn find_edge(model: &Model, name: &str) -> Result<EdgeId> {
    let missing = || {
        Error::new(
            ErrorKind::NotFound,
            format!("there is no edge '{name}': edges are called PARENT.CHILD, as in 'disk.file'"),
        )
    };
    // Names of parents and of children may have dots themselves.
    for (at, _) in name.rmatch_indices('.') {
        let (parent, child) = (&name[..at], &name[at + 1..]);
        match model.lookup(parent) {
            Some(Named::Backend(b)) if child == "root" => {
                return Ok(model.cut_edge(model.backend(b)));
            }
            Some(Named::Node(_)) => {
                let edges = &model.node(model.find_node(parent)?).children;
                if let Some(e) = edges.iter().find(|e| model.edge(**e).name == child) {
                    return Ok(*e);
                }
            }
            _ => {}
        }
    }
    Err(missing())
}

/// The node whose data `n` shows, filters looked through.
pub(crate) fn data_of(model: &Model, n: NodeId) -> NodeId {
    let mut at = n;
    while let Some(t) = model.filtered(at) {
        at = t;
    }
    at
}

impl Model {
    /// The node whose data the filter `n` shows; `None` for what is no filter.
    pub(crate) fn filtered(&self, n: NodeId) -> Option<NodeId> {
        let info = self.node(n);
        if info.live.def().kind != Kind::Filter {
            return None;
        }
        let mut edges = info.children.iter().map(|e| self.edge(*e));
        edges.find(|e| e.role == Role::Filtered)?.target
    }
}

fn same_data(model: &Model, old: NodeId, new: NodeId, with: &str) -> Result<()> {
    let (a, b) = (data_of(model, old), data_of(model, new));
    if a == b {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "node '{with}' shows the data of '{}', not of '{}': that would be a change of medium",
        model.node(b).name,
        model.node(a).name
    )))
}

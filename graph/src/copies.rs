//! x-blockdev-change: children of a node that come and go while it is in use (mutators.md,
//! section 3).

use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_node::{ChildSpec, Copies, Perms, Role};

use crate::graph::Graph;
use crate::model::{Draft, EdgeId, EdgeInfo, Model, NodeId, Parent};

/// What x-blockdev-change does to the children of a node.
#[derive(Clone, Debug)]
pub enum ChildChange {
    /// The node of that name becomes a child.
    Add(String),
    /// The child of that name goes.
    Remove(String),
}

/// The name of copy number `n`.
pub(crate) fn copy_name(spec: &ChildSpec, n: usize) -> String {
    format!("{}.{n}", spec.name)
}

/// The edges of a node to the children that come and go.
pub(crate) fn copies(model: &Model, id: NodeId) -> impl Iterator<Item = (EdgeId, &EdgeInfo)> {
    let edges = model.node(id).children.iter().map(|e| (*e, model.edge(*e)));
    edges.filter(|(_, e)| e.role == Role::Copy)
}

/// The kind of child that can be added to a node.
fn spec_of(model: &Model, id: NodeId) -> Result<&'static ChildSpec> {
    let node = model.node(id);
    let def = node.live.def();
    def.children.iter().find(|c| c.role == Role::Copy).ok_or_else(|| {
        Error::unsupported(format!(
            "node '{}' ({}) has a fixed set of children: none can be added or removed",
            node.name, def.name
        ))
    })
}

fn add_edit(draft: &mut Draft<'_>, parent: NodeId, new: NodeId) -> Result<()> {
    let spec = spec_of(draft, parent)?;
    let (q, m) = (draft.node(parent).live.clone(), draft.node(new).live.clone());
    let at = || format!("node '{}'", q.name());
    q.driver().check_copies(copies(draft, parent).count() + 1).at(at)?;
    if let Some((_, e)) =
        copies(draft, parent).find(|(_, e)| e.target.map(|t| draft.under_side(t)) == Some(new))
    {
        return Err(Error::new(
            ErrorKind::InUse,
            format!("node '{}' is the child '{}' of '{}' already", m.name(), e.name, q.name()),
        ));
    }
    if m.size() < q.size() {
        return Err(Error::invalid(format!(
            "node '{}' ({} bytes) is smaller than node '{}' ({} bytes)",
            m.name(),
            m.size(),
            q.name(),
            q.size()
        )));
    }
    let number = q.driver().copies().map_or(0, Copies::next_number);
    let name = copy_name(spec, number);
    let live = gipfel_node::Child::new(format!("{}.{name}", q.name()), None);
    let info = EdgeInfo {
        label: live.label().to_owned(),
        parent: Parent::Node(parent),
        name: name.into(),
        role: spec.role,
        binding: spec.binding,
        target: None,
        perms: Perms::IDLE,
        frozen: None,
        live,
    };
    let top = draft.top_of(new);
    draft.add_edge(info, Some(top)).map(drop)
}

fn remove_edit(draft: &mut Draft<'_>, parent: NodeId, child: &str) -> Result<()> {
    let name = draft.node(parent).name.clone();
    let edges = draft.node(parent).children.iter();
    let edge = edges.copied().find(|e| draft.edge(*e).name == child).ok_or_else(|| {
        let names: Vec<_> =
            draft.node(parent).children.iter().map(|e| &*draft.edge(*e).name).collect();
        let has = if names.is_empty() { "none".into() } else { names.join(", ") };
        let text = format!("node '{name}' has no child '{child}'; its children: {has}");
        Error::new(ErrorKind::NotFound, text)
    })?;
    spec_of(draft, parent)?;
    let live = draft.node(parent).live.clone();
    let left = copies(draft, parent).count() - 1;
    live.driver().check_copies(left).at(|| format!("node '{name}'"))?;
    draft.remove_copy(edge)
}

impl Graph {
    /// Adds a child to the node or backend `parent`, or removes one. Requests in flight there end
    /// on the old set of children, later ones see the new one: they wait for the others where a
    /// child comes, and go on beside them where one goes.
    pub async fn blockdev_change(
        self: &Rc<Self>,
        parent: &str,
        change: &ChildChange,
    ) -> Result<()> {
        let mut model = self.state.lock().await;
        let q = model.find_disk(parent)?;
        let live = model.node(q).live.clone();
        let numbers = live.driver().copies();
        match change {
            ChildChange::Add(node) => {
                let m = model.find_node(node)?;
                self.transact(&mut model, |d| add_edit(d, q, m)).await?;
                numbers.into_iter().for_each(|n| n.number_taken(n.next_number()));
            }
            ChildChange::Remove(child) => {
                self.transact(&mut model, |d| remove_edit(d, q, child)).await?;
                let gone = child.rsplit_once('.').and_then(|(_, n)| n.parse().ok());
                numbers.zip(gone).into_iter().for_each(|(n, gone)| n.number_freed(gone));
            }
        }
        Ok(())
    }
}

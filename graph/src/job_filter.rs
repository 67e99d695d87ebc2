//! The filters that jobs put above a node while they run, and take out again: copy-before-write of
//! a backup, the guards of mirror and commit (mutators.md, section 1: node-side, dynamic).
//!
//! Every edge of the node goes through its newest job filter, and later ones attach on top. The
//! job reads through a backend of its own, the source, which stands on its filter and stays there.
//! A filter bound to the content (backup) stays with its node; one bound to the position (mirror)
//! goes up over what is put on the node. What the job does with the data is the job's business.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::{Binding, Child, Driver, DriverDef, Node, Perms, Role};
use serde_json::Map;

use crate::backend::{Backend, Follow};
use crate::faults::Faults;
use crate::graph::{BackendOptions, Graph, add_backend};
use crate::model::{
    BackendId, Draft, EdgeId, EdgeInfo, JobInterest, Model, NodeId, NodeInfo, Owner, Parent,
};
use crate::registry::ZeroDetection;
use crate::snapshot::is_position;

/// Makes the driver of a job filter over these edges (empty until the filter is in place), for a
/// node of so many bytes.
pub type MakeJobFilter = Box<dyn FnOnce(Vec<Arc<Child>>, u64) -> Result<Box<dyn Driver>>>;

/// A filter that a job wants above a node.
pub struct JobFilterSpec {
    /// The job's id.
    pub job: String,
    /// The option `filter-node-name`: then the filter shows in queries.
    pub name: Option<String>,
    /// The filter's driver; its first child is the filtered one.
    pub def: &'static DriverDef,
    /// Whether it stays with the node (content) or with the disk that is there (position).
    pub binding: Binding,
    /// The nodes at its further children: targets, which must hold what the node holds.
    pub others: Vec<String>,
    /// The node whose place the target takes in the end, where that is not the disk itself: one
    /// that the disk reaches through filters and quorums only. What leads there stays as it is
    /// while the job runs.
    pub replaces: Option<String>,
    /// Makes the driver.
    pub make: MakeJobFilter,
}

/// A job filter in its place.
pub struct JobFilter {
    filter: NodeId,
    backend: BackendId,
    source: Arc<Backend>,
    replaces: Option<NodeId>,
    /// The edges that the job rests on, its source's own aside.
    frozen: Vec<EdgeId>,
}

impl JobFilter {
    /// What the job reads through.
    pub fn source(&self) -> &Arc<Backend> {
        &self.source
    }
}

impl Graph {
    /// Puts a job filter above the node or backend called `disk`: on top of what is there, under
    /// all its clients.
    pub async fn insert_job_filter(
        self: &Rc<Self>,
        disk: &str,
        spec: JobFilterSpec,
    ) -> Result<JobFilter> {
        let mut model = self.state.lock().await;
        let node = model.find_disk(disk)?;
        let others: Vec<NodeId> =
            spec.others.iter().map(|n| check_target(&model, node, n)).collect::<Result<_>>()?;
        let replaces = match &spec.replaces {
            Some(n) => {
                let r = model.find_node(n)?;
                check_replaced(&model, node, r)?;
                Some(r)
            }
            None => None,
        };
        let name = match &spec.name {
            Some(n) => {
                model.check_node_name(n)?;
                n.clone()
            }
            None => model.auto_name(spec.def.name),
        };
        let backend_name = model.auto_name("backend");
        let edges: Vec<Arc<Child>> = (spec.def.children.iter())
            .map(|c| Child::new(format!("{name}.{}", c.name), None))
            .collect();
        let driver = (spec.make)(edges.clone(), model.node(node).live.size())?;
        let live = Node::new(name.clone(), spec.def, driver);
        let job = JobInterest { job: spec.job, binding: spec.binding };
        let edit = |draft: &mut Draft<'_>| {
            let outer = draft.outer_parents(node);
            let filter = add_filter(draft, name, live, job.clone(), node)?;
            let ends: Vec<NodeId> = [draft.top_of(node)]
                .into_iter()
                .chain(others.iter().map(|t| draft.top_of(*t)))
                .collect();
            for (at, (edge, end)) in edges.into_iter().zip(ends).enumerate() {
                add_edge(draft, filter, at, edge, end)?;
            }
            put_on_top(draft, filter, node, outer)?;
            let backend = add_source(draft, backend_name, &job.job, filter)?;
            let frozen = match replaces {
                Some(r) => freeze(draft, node, r, &job.job)?,
                None => Vec::new(),
            };
            Ok((filter, backend, frozen))
        };
        let ((filter, backend, frozen), model) = self.transact(&mut model, edit).await?;
        let source = model.backend(backend).live.clone();
        Ok(JobFilter { filter, backend, source, replaces, frozen })
    }

    /// Takes a job filter out again, with the job's source: whoever stands on it then stands on
    /// what is below. Where something outside the graph makes it fail, all stays and it can be
    /// tried again.
    pub async fn remove_job_filter(self: &Rc<Self>, filter: &JobFilter) -> Result<()> {
        let mut model = self.state.lock().await;
        self.transact(&mut model, |draft| remove(draft, filter)).await.map(drop)
    }

    /// Takes a job filter out and puts the node `target` in the place of the disk that it is on,
    /// or of the node that it `replaces`: the position-bound edges move there, others stay. Where
    /// that is refused, the filter stays as it is.
    pub async fn complete_job_filter(
        self: &Rc<Self>,
        filter: &JobFilter,
        target: &str,
    ) -> Result<()> {
        let mut model = self.state.lock().await;
        let new = model.find_node(target)?;
        if model.get_node(filter.filter).is_none() {
            return Err(gone());
        }
        let disk = model.under_side(filter.filter);
        let old = filter.replaces.unwrap_or(disk);
        // The disk may have got an overlay since the start.
        check_replaced(&model, disk, old)?;
        let (has, needs) = (model.node(new).live.size(), model.node(old).live.size());
        if has < needs {
            return Err(Error::invalid(format!(
                "node '{target}' has {has} bytes, less than the {needs} of node '{}'",
                model.node(old).name
            )));
        }
        self.transact(&mut model, |draft| {
            let outer = draft.outer_parents(old);
            remove(draft, filter)?;
            let top = draft.top_of(new);
            for e in outer {
                if draft.get_edge(e).is_some() && is_position(draft, e) {
                    draft.repoint(e, Some(top))?;
                }
            }
            draft.remove_orphan(old)
        })
        .await
        .map(drop)
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::NotFound, "the job's filter is gone already")
}

/// The nodes that show what `disk` shows, from there downwards: through filters, and through nodes
/// whose children hold all the same.
fn showing_below(model: &Model, disk: NodeId) -> BTreeSet<NodeId> {
    let mut open = vec![disk];
    let mut found = BTreeSet::new();
    while let Some(n) = open.pop() {
        if found.insert(n) {
            let edges = model.node(n).children.iter().map(|e| model.edge(*e));
            let same = edges.filter(|e| matches!(e.role, Role::Filtered | Role::Copy));
            open.extend(same.filter_map(|e| e.target));
        }
    }
    found
}

/// Fails unless the node `replaced` holds what `disk` holds and is reached from there.
fn check_replaced(model: &Model, disk: NodeId, replaced: NodeId) -> Result<()> {
    if showing_below(model, disk).contains(&replaced) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "node '{}' cannot be replaced by a copy of node '{}', which does not reach it through \
         filters and quorums only",
        model.node(replaced).name,
        model.node(disk).name
    )))
}

/// Freezes the edges below `disk` that lead to the node which the job `job` is to replace.
fn freeze(draft: &mut Draft<'_>, disk: NodeId, replaced: NodeId, job: &str) -> Result<Vec<EdgeId>> {
    let showing = showing_below(draft, disk);
    let below = |d: &Draft<'_>, e: &EdgeId| match d.edge(*e).parent {
        Parent::Node(p) => showing.contains(&p),
        Parent::Backend(_) => false,
    };
    let mut edges = draft.outer_parents(replaced);
    edges.retain(|e| below(draft, e) && is_position(draft, *e));
    for e in &edges {
        draft.check_free(*e)?;
        draft.edge_mut(*e).frozen = Some(format!("job '{job}'"));
    }
    Ok(edges)
}

/// The node called `name`, if it can take what `node` holds.
fn check_target(model: &Model, node: NodeId, name: &str) -> Result<NodeId> {
    let target = model.find_node(name)?;
    let (n, t) = (model.node(node), model.node(target));
    if model.reaches(target, node) {
        return Err(Error::new(
            ErrorKind::InUse,
            format!("target '{name}' stands on node '{}' or is that node", n.name),
        ));
    }
    if t.live.size() < n.live.size() {
        return Err(Error::invalid(format!(
            "target '{name}' is smaller ({} bytes) than node '{}' ({} bytes)",
            t.live.size(),
            n.name,
            n.live.size()
        )));
    }
    Ok(target)
}

fn add_filter(
    draft: &mut Draft<'_>,
    name: String,
    live: Arc<Node>,
    job: JobInterest,
    node: NodeId,
) -> Result<NodeId> {
    Ok(draft.add_node(NodeInfo {
        name,
        live,
        children: Vec::new(),
        parents: Default::default(),
        implicit: Some(Owner::Node(node)),
        job: Some(job),
        added_by_user: false,
        read_only: false,
        options: Map::new(),
        common: Default::default(),
        detect_zeroes: ZeroDetection::Off,
        side_top: None,
        above: Perms::IDLE,
    }))
}

fn add_edge(
    draft: &mut Draft<'_>,
    filter: NodeId,
    at: usize,
    live: Arc<Child>,
    end: NodeId,
) -> Result<EdgeId> {
    let spec = draft.node(filter).live.def().children[at];
    let info = EdgeInfo {
        label: live.label().to_owned(),
        parent: Parent::Node(filter),
        name: spec.name.into(),
        role: spec.role,
        binding: spec.binding,
        target: None,
        perms: Perms::IDLE,
        frozen: None,
        live,
    };
    draft.add_edge(info, Some(end))
}

/// The job's own backend, on its filter; nothing moves it from there.
fn add_source(draft: &mut Draft<'_>, name: String, job: &str, filter: NodeId) -> Result<BackendId> {
    let options = BackendOptions { follow: Follow::Node, ..BackendOptions::default() };
    let client = format!("job '{job}'");
    let id = add_backend(draft, name, &options, Faults::new(None), Vec::new(), Some(&client))?;
    let root = draft.backend(id).root;
    draft.repoint(root, Some(filter))?;
    draft.edge_mut(root).frozen = Some(client);
    Ok(id)
}

/// Whether an edge is that of a job to its own filter.
fn is_source(model: &Model, e: EdgeId) -> bool {
    let e = model.edge(e);
    matches!(e.parent, Parent::Backend(_)) && e.frozen.is_some()
}

/// Makes `filter`, which stands on `node` and its stack, the topmost of the stack. `outer` are the
/// edges that end there: all but the sources of other jobs go through it.
fn put_on_top(
    draft: &mut Draft<'_>,
    filter: NodeId,
    node: NodeId,
    outer: Vec<EdgeId>,
) -> Result<()> {
    for e in outer {
        if !is_source(draft, e) {
            draft.restack(e, Some(filter))?;
        }
    }
    draft.node_mut(node).side_top = Some(filter);
    Ok(())
}

/// Takes a filter out of its node's stack; what stands on it, `but` for some edges, stands on what
/// is below then. The filter's own edge still leads there, and that node is given back.
fn take_out(draft: &mut Draft<'_>, filter: NodeId, but: &[EdgeId]) -> Result<NodeId> {
    let node = draft.under_side(filter);
    let file = draft.node(filter).children[0];
    let below = draft
        .edge(file)
        .target
        .ok_or_else(|| Error::invalid(format!("'{}' leads to no node", draft.edge(file).label)))?;
    for e in draft.node(filter).parents.clone() {
        if !but.contains(&e) {
            draft.restack(e, Some(below))?;
        }
    }
    if draft.node(node).side_top == Some(filter) {
        draft.node_mut(node).side_top = (below != node).then_some(below);
    }
    Ok(below)
}

fn remove(draft: &mut Draft<'_>, f: &JobFilter) -> Result<()> {
    if draft.get_node(f.filter).is_none() {
        return Err(gone());
    }
    let root = draft.backend(f.backend).root;
    for e in f.frozen.iter().chain([&root]) {
        draft.edge_mut(*e).frozen = None;
    }
    take_out(draft, f.filter, &[root])?;
    // The filter goes with its last client.
    draft.remove_backend(f.backend)?;
    match draft.get_node(f.filter) {
        Some(_) => draft.remove_node(f.filter),
        None => Ok(()),
    }
}

/// Moves the job filters of `disk` that are bound to the position up over `overlay`, in their
/// order, each with its job's source.
pub(crate) fn lift(draft: &mut Draft<'_>, disk: NodeId, overlay: NodeId) -> Result<()> {
    let mut moving = Vec::new();
    let mut at = draft.top_of(disk);
    while at != disk {
        let info = draft.node(at);
        if info.job.as_ref().is_some_and(|j| j.binding == Binding::Position) {
            moving.push(at);
        }
        match draft.edge(info.children[0]).target {
            Some(next) => at = next,
            None => break,
        }
    }
    for filter in moving.into_iter().rev() {
        let parents = draft.node(filter).parents.iter().copied();
        let sources: Vec<EdgeId> = parents.filter(|e| is_source(draft, *e)).collect();
        take_out(draft, filter, &sources)?;
        let (file, top) = (draft.node(filter).children[0], draft.top_of(overlay));
        draft.repoint(file, Some(top))?;
        draft.node_mut(filter).implicit = Some(Owner::Node(overlay));
        draft.node_mut(overlay).side_top = Some(filter);
    }
    Ok(())
}

impl Model {
    /// The node-side filter of `n` that belongs to the node itself and not to a job: the lowest.
    pub(crate) fn fixed_filter(&self, n: NodeId) -> Option<NodeId> {
        let mut at = self.top_of(n);
        while at != n {
            let info = self.node(at);
            if info.job.is_none() {
                return Some(at);
            }
            at = self.edge(info.children[0]).target?;
        }
        None
    }
}

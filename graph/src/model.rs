//! The graph as plain values, and drafts of its next state.
//!
//! A [`Draft`] edits the model in place and remembers what was there before; dropping it without
//! [`Draft::keep`] puts everything back. So a change that is refused has changed nothing, and the
//! price of a change does not grow with the size of the graph.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Deref;
use std::sync::Arc;

use gipfel_base::limits::{MAX_CHAIN_DEPTH, MAX_NAME, MAX_NODE_NAME};
use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::{Binding, Child, Common, Node, Perms, Role};
use serde_json::{Map, Value};

use crate::backend::{Backend, Follow};
use crate::backends::Tray;
use crate::graph::BackendOptions;
use crate::registry::ZeroDetection;

/// Names a node of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u64);

/// Names an edge of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EdgeId(u64);

/// Names a backend of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId(u64);

/// Where an edge begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// At a node.
    Node(NodeId),
    /// At a backend.
    Backend(BackendId),
}

/// Whose interest an implicit filter serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A backend's: client-side, goes where the backend goes.
    Backend(BackendId),
    /// A node's: node-side, stays right above it.
    Node(NodeId),
}

/// What a job's filter above a node is there for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInterest {
    /// The job's id.
    pub job: String,
    /// Whether it stays with the disk (goes up over an overlay) or with the node.
    pub binding: Binding,
}

/// A node as the model sees it.
#[derive(Clone)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// The running instance.
    pub live: Arc<Node>,
    /// Its edges to children, in the order of its driver's definition.
    pub children: Vec<EdgeId>,
    /// The edges that end here.
    pub parents: BTreeSet<EdgeId>,
    /// For implicit filters: whose.
    pub implicit: Option<Owner>,
    /// For node-side filters that a job made: the job's.
    pub job: Option<JobInterest>,
    /// Whether the user added it as such; others go when their last parent goes.
    pub added_by_user: bool,
    /// Whether it was opened for reading only.
    pub read_only: bool,
    /// The options it was opened with, children included.
    pub options: Map<String, Value>,
    /// The common options in force.
    pub common: Common,
    /// The node option detect-zeroes.
    pub detect_zeroes: ZeroDetection,
    /// The topmost of its node-side filters, if it has any.
    pub side_top: Option<NodeId>,
    /// What its parents together use and allow.
    pub above: Perms,
}

/// An edge as the model sees it.
#[derive(Clone)]
pub struct EdgeInfo {
    /// `PARENT.CHILD`.
    pub label: String,
    /// Where it begins.
    pub parent: Parent,
    /// The child's name at the parent, such as `file` or `children.0`.
    pub name: Cow<'static, str>,
    /// What the child is to the parent.
    pub role: Role,
    /// Whether it moves when its node is overlaid.
    pub binding: Binding,
    /// Where it ends.
    pub target: Option<NodeId>,
    /// What it uses and allows.
    pub perms: Perms,
    /// Who rests on it staying as it is.
    pub frozen: Option<String>,
    /// The running edge.
    pub live: Arc<Child>,
}

/// A backend as the model sees it.
#[derive(Clone)]
pub struct BackendInfo {
    /// Its name.
    pub name: String,
    /// Its edge into the graph.
    pub root: EdgeId,
    /// Its client-side filters, topmost first.
    pub stack: Vec<NodeId>,
    /// The throttle group that it is a member of; then its topmost filter is the throttle.
    pub throttle: Option<String>,
    /// Whether it was made along with its client and goes with it.
    pub made_along: bool,
    /// How it was made, for its clients to come.
    pub options: BackendOptions,
    /// Its tray, if its medium can be taken out.
    pub tray: Option<Tray>,
    /// Who uses it.
    pub client: Option<String>,
    /// What its client needs and allows; nothing while it has none.
    pub perms: Perms,
    /// Whether it follows the disk or the node.
    pub follow: Follow,
    /// The running backend.
    pub live: Arc<Backend>,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// A node.
    Node(NodeId),
    /// A backend.
    Backend(BackendId),
}

/// The graph as plain values.
#[derive(Default)]
pub struct Model {
    nodes: BTreeMap<NodeId, NodeInfo>,
    edges: BTreeMap<EdgeId, EdgeInfo>,
    backends: BTreeMap<BackendId, BackendInfo>,
    names: BTreeMap<String, Named>,
    next: u64,
    next_auto: u64,
}

impl Model {
    /// A number that names nothing yet.
    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// A node-name of ours (they begin with `#`, which users cannot choose).
    pub fn auto_name(&mut self, what: &str) -> String {
        self.next_auto += 1;
        format!("#{what}{}", self.next_auto)
    }

    /// All nodes, oldest first.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &NodeInfo)> {
        self.nodes.iter().map(|(i, n)| (*i, n))
    }

    /// All edges, oldest first.
    pub fn edges(&self) -> impl Iterator<Item = (EdgeId, &EdgeInfo)> {
        self.edges.iter().map(|(i, e)| (*i, e))
    }

    /// All backends, oldest first.
    pub fn backends(&self) -> impl Iterator<Item = (BackendId, &BackendInfo)> {
        self.backends.iter().map(|(i, b)| (*i, b))
    }

    /// A node that is known to exist.
    pub fn node(&self, id: NodeId) -> &NodeInfo {
        &self.nodes[&id]
    }

    /// A node, if it (still) exists.
    pub fn get_node(&self, id: NodeId) -> Option<&NodeInfo> {
        self.nodes.get(&id)
    }

    /// An edge that is known to exist.
    pub fn edge(&self, id: EdgeId) -> &EdgeInfo {
        &self.edges[&id]
    }

    /// An edge, if it (still) exists.
    pub fn get_edge(&self, id: EdgeId) -> Option<&EdgeInfo> {
        self.edges.get(&id)
    }

    /// A backend that is known to exist.
    pub fn backend(&self, id: BackendId) -> &BackendInfo {
        &self.backends[&id]
    }

    /// A backend, if it (still) exists.
    pub fn get_backend(&self, id: BackendId) -> Option<&BackendInfo> {
        self.backends.get(&id)
    }

    /// What `name` stands for.
    pub fn lookup(&self, name: &str) -> Option<Named> {
        self.names.get(name).copied()
    }

    /// The node of that name; for implicit filters an error that says what to name instead.
    pub fn find_node(&self, name: &str) -> Result<NodeId> {
        match self.lookup(name) {
            Some(Named::Node(id)) => match self.node(id).implicit {
                None => Ok(id),
                Some(owner) => Err(self.implicit_error(name, id, owner)),
            },
            _ => Err(Error::new(ErrorKind::NotFound, format!("there is no node '{name}'"))),
        }
    }

    fn implicit_error(&self, name: &str, id: NodeId, owner: Owner) -> Error {
        let (whose, instead) = match owner {
            Owner::Node(n) => {
                let n = &self.node(n).name;
                let whose = match &self.node(id).job {
                    Some(j) => format!("job '{}' on node '{n}'", j.job),
                    None => format!("node '{n}'"),
                };
                (whose, n.clone())
            }
            Owner::Backend(b) => {
                let b = self.backend(b);
                let below = self.below_stack(b);
                let node = below.map_or_else(String::new, |n| self.node(n).name.clone());
                (format!("backend '{}'", b.name), node)
            }
        };
        Error::new(
            ErrorKind::InvalidInput,
            format!("'{name}' is an implicit filter of {whose}: name '{instead}' instead"),
        )
    }

    /// The node that a device or node name leads to: a backend's medium under its client-side
    /// filters, or the node itself.
    pub fn find_disk(&self, name: &str) -> Result<NodeId> {
        match self.lookup(name) {
            Some(Named::Backend(id)) => {
                let b = self.backend(id);
                self.below_stack(b).map(|n| self.under_side(n)).ok_or_else(|| {
                    Error::new(ErrorKind::NoMedium, format!("backend '{name}' has no medium"))
                })
            }
            Some(Named::Node(_)) => self.find_node(name),
            None => Err(Error::new(
                ErrorKind::NotFound,
                format!("there is no backend and no node '{name}'"),
            )),
        }
    }

    /// The node under a backend's client-side filters (still above node-side ones).
    pub fn below_stack(&self, b: &BackendInfo) -> Option<NodeId> {
        let last = match b.stack.last() {
            Some(f) => self.node(*f).children[0],
            None => b.root,
        };
        self.edge(last).target
    }

    /// The edge of a backend that crosses from its client-side filters to its node.
    pub fn cut_edge(&self, b: &BackendInfo) -> EdgeId {
        b.stack.last().map_or(b.root, |f| self.node(*f).children[0])
    }

    /// The node that the node-side filter `n` belongs to, or `n` itself.
    pub fn under_side(&self, n: NodeId) -> NodeId {
        match self.node(n).implicit {
            Some(Owner::Node(base)) => base,
            _ => n,
        }
    }

    /// Where new edges to `n` attach: on top of its node-side filters (mutators.md, rule 2).
    pub fn top_of(&self, n: NodeId) -> NodeId {
        self.node(n).side_top.unwrap_or(n)
    }

    /// The edges from outside that end at `n` or at one of its node-side filters.
    pub fn outer_parents(&self, n: NodeId) -> Vec<EdgeId> {
        let mut found = Vec::new();
        let mut at = Some(self.top_of(n));
        while let Some(x) = at {
            let own = |e: &EdgeId| match self.edge(*e).parent {
                Parent::Node(p) => self.node(p).implicit == Some(Owner::Node(n)),
                Parent::Backend(_) => false,
            };
            found.extend(self.node(x).parents.iter().filter(|e| !own(e)));
            at = if x == n { None } else { self.edge(self.node(x).children[0]).target };
        }
        found
    }

    /// Who a parent is, for messages; for an implicit filter, whose that is.
    pub fn parent_name(&self, e: &EdgeInfo) -> String {
        let owner = match e.parent {
            Parent::Backend(b) => Owner::Backend(b),
            Parent::Node(n) => match self.node(n).implicit {
                _ if let Some(j) = &self.node(n).job => return format!("job '{}'", j.job),
                Some(owner) => owner,
                None => return format!("node '{}' (its child '{}')", self.node(n).name, e.name),
            },
        };
        match owner {
            Owner::Node(n) => format!("node '{}'", self.node(n).name),
            Owner::Backend(b) => {
                let b = self.backend(b);
                b.client.clone().unwrap_or_else(|| format!("backend '{}'", b.name))
            }
        }
    }

    /// Whether nothing holds a node: no edge and no user. A node-side filter is held by its node.
    fn is_orphan(&self, id: NodeId) -> bool {
        let held = |n: &NodeInfo| match n.implicit {
            Some(Owner::Node(base)) => self.get_node(base).is_some_and(|b| b.added_by_user),
            _ => n.added_by_user,
        };
        self.get_node(id).is_some_and(|n| n.parents.is_empty() && !held(n))
    }

    /// Whether a name may be given to a node or backend by a user.
    pub fn check_new_name(&self, name: &str, longest: usize, what: &str) -> Result<()> {
        let mut chars = name.chars();
        let ok = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
            && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
        if !ok || name.len() > longest {
            return Err(Error::invalid(format!(
                "'{name}' cannot be a {what}: it must begin with a letter, go on with letters, \
                 digits, '-', '.' or '_', and have at most {longest} characters"
            )));
        }
        match self.lookup(name) {
            None => Ok(()),
            Some(Named::Node(_)) => {
                Err(Error::new(ErrorKind::Exists, format!("there is a node '{name}' already")))
            }
            Some(Named::Backend(_)) => {
                Err(Error::new(ErrorKind::Exists, format!("there is a backend '{name}' already")))
            }
        }
    }

    /// [`Model::check_new_name`] for a node-name.
    pub fn check_node_name(&self, name: &str) -> Result<()> {
        self.check_new_name(name, MAX_NODE_NAME, "node-name")
    }

    /// [`Model::check_new_name`] for a backend's name.
    pub fn check_backend_name(&self, name: &str) -> Result<()> {
        self.check_new_name(name, MAX_NAME, "backend name")
    }
}

/// The next state of the graph, in the making. Reads like the model; dropped without
/// [`Draft::keep`] it undoes every edit.
pub struct Draft<'a> {
    model: &'a mut Model,
    pub(crate) before: Before,
    /// Edges that are drained though they lead where they led.
    pub(crate) drained: BTreeSet<EdgeId>,
}

/// What a draft has touched, as it was.
#[derive(Default)]
pub(crate) struct Before {
    pub(crate) nodes: BTreeMap<NodeId, Option<NodeInfo>>,
    pub(crate) edges: BTreeMap<EdgeId, Option<EdgeInfo>>,
    backends: BTreeMap<BackendId, Option<BackendInfo>>,
    names: BTreeMap<String, Option<Named>>,
}

impl Deref for Draft<'_> {
    type Target = Model;
    fn deref(&self) -> &Model {
        self.model
    }
}

impl<'a> Draft<'a> {
    /// A draft that begins as the present state.
    pub fn new(model: &'a mut Model) -> Draft<'a> {
        Draft { model, before: Before::default(), drained: BTreeSet::new() }
    }

    /// Lets the requests that go through an edge end before the change.
    pub(crate) fn drain(&mut self, id: EdgeId) {
        self.drained.insert(id);
    }

    /// Makes the draft the present state.
    pub fn keep(mut self) {
        self.before = Before::default();
    }

    pub(crate) fn node_mut(&mut self, id: NodeId) -> &mut NodeInfo {
        let n = self.model.nodes.get_mut(&id).expect("the draft holds this node");
        self.before.nodes.entry(id).or_insert_with(|| Some(n.clone()));
        n
    }

    pub(crate) fn edge_mut(&mut self, id: EdgeId) -> &mut EdgeInfo {
        let e = self.model.edges.get_mut(&id).expect("the draft holds this edge");
        self.before.edges.entry(id).or_insert_with(|| Some(e.clone()));
        e
    }

    pub(crate) fn backend_mut(&mut self, id: BackendId) -> &mut BackendInfo {
        let b = self.model.backends.get_mut(&id).expect("the draft holds this backend");
        self.before.backends.entry(id).or_insert_with(|| Some(b.clone()));
        b
    }

    fn name(&mut self, name: &str, what: Option<Named>) {
        let old = match what {
            Some(w) => self.model.names.insert(name.to_owned(), w),
            None => self.model.names.remove(name),
        };
        self.before.names.entry(name.to_owned()).or_insert(old);
    }

    /// Adds a node; its edges come with [`Draft::add_edge`]. The name was checked.
    pub fn add_node(&mut self, info: NodeInfo) -> NodeId {
        let id = NodeId(self.model.fresh());
        self.before.nodes.insert(id, None);
        let name = info.name.clone();
        self.model.nodes.insert(id, info);
        self.name(&name, Some(Named::Node(id)));
        id
    }

    /// Adds an edge of a node and points it at `target`. Fails for a cycle or too deep a chain.
    pub fn add_edge(&mut self, mut info: EdgeInfo, target: Option<NodeId>) -> Result<EdgeId> {
        let id = EdgeId(self.model.fresh());
        self.before.edges.insert(id, None);
        info.target = None;
        if let Parent::Node(p) = info.parent {
            self.node_mut(p).children.push(id);
        }
        self.model.edges.insert(id, info);
        self.repoint(id, target)?;
        Ok(id)
    }

    /// Points an edge at another node, or at none. Fails for a cycle, too deep a chain, or a
    /// frozen edge.
    pub fn repoint(&mut self, id: EdgeId, target: Option<NodeId>) -> Result<()> {
        if self.edge(id).target != target {
            self.check_free(id)?;
        }
        self.restack(id, target)
    }

    /// [`Draft::repoint`] within the node-side filters of one node, which come and go under frozen
    /// edges too: what the edge means stays.
    pub(crate) fn restack(&mut self, id: EdgeId, target: Option<NodeId>) -> Result<()> {
        let e = self.edge(id);
        let (old, parent, label) = (e.target, e.parent, e.label.clone());
        if old == target {
            return Ok(());
        }
        if let (Parent::Node(p), Some(t)) = (parent, target)
            && self.reaches(t, p)
        {
            return Err(Error::invalid(format!(
                "'{label}' cannot lead to node '{}': that would be a cycle",
                self.node(t).name
            )));
        }
        self.edge_mut(id).target = target;
        if let Some(o) = old {
            self.node_mut(o).parents.remove(&id);
        }
        if let Some(t) = target {
            self.node_mut(t).parents.insert(id);
            self.check_depth(parent, t)?;
        }
        Ok(())
    }

    /// Fails for an edge that someone rests on.
    pub(crate) fn check_free(&self, id: EdgeId) -> Result<()> {
        let e = self.edge(id);
        let Some(who) = &e.frozen else { return Ok(()) };
        let text = format!("edge '{}' is in use by {who} and cannot be changed now", e.label);
        Err(Error::new(ErrorKind::InUse, text))
    }

    fn check_depth(&self, parent: Parent, target: NodeId) -> Result<()> {
        let above = match parent {
            Parent::Node(p) => 1 + self.depth_above(p),
            Parent::Backend(_) => 0,
        };
        let depth = above + self.depth_below(target, &mut HashMap::new());
        if depth > MAX_CHAIN_DEPTH {
            return Err(Error::new(
                ErrorKind::Limit,
                format!(
                    "the chain through node '{}' would be {depth} nodes deep; \
                     at most {MAX_CHAIN_DEPTH} are allowed",
                    self.node(target).name
                ),
            ));
        }
        Ok(())
    }

    fn remove_edge(&mut self, id: EdgeId) -> Result<()> {
        self.repoint(id, None)?;
        self.edge_mut(id);
        self.model.edges.remove(&id);
        Ok(())
    }

    /// Removes an edge of a node whose children come and go, and what only that edge held.
    pub fn remove_copy(&mut self, id: EdgeId) -> Result<()> {
        let (parent, below) = (self.edge(id).parent, self.edge(id).target);
        self.remove_edge(id)?;
        if let Parent::Node(p) = parent {
            self.node_mut(p).children.retain(|e| *e != id);
        }
        match below {
            Some(n) if self.is_orphan(n) => self.remove_node(n),
            _ => Ok(()),
        }
    }

    /// Removes a node that no edge ends at, and whatever only it held. Removed nodes are listed
    /// by the transaction.
    pub fn remove_node(&mut self, id: NodeId) -> Result<()> {
        let mut open = vec![id];
        while let Some(n) = open.pop() {
            let info = self.node(n).clone();
            debug_assert!(info.parents.is_empty(), "a node with parents is not removed");
            for e in info.children {
                let below = self.edge(e).target;
                self.remove_edge(e)?;
                open.extend(below.filter(|b| self.is_orphan(*b)));
            }
            self.node_mut(n);
            self.model.nodes.remove(&n);
            self.name(&info.name, None);
        }
        Ok(())
    }

    /// Removes a node that an edge has left, if nobody holds it any more.
    pub fn remove_orphan(&mut self, id: NodeId) -> Result<()> {
        if self.is_orphan(id) { self.remove_node(id) } else { Ok(()) }
    }

    /// Removes what nobody holds any more since its last edge went.
    pub(crate) fn sweep(&mut self) -> Result<()> {
        let touched = self.before.nodes.iter();
        let left = touched.filter(|(_, b)| b.as_ref().is_some_and(|b| !b.parents.is_empty()));
        left.map(|(n, _)| *n)
            .collect::<Vec<_>>()
            .into_iter()
            .try_for_each(|n| self.remove_orphan(n))
    }

    /// Adds a backend with an empty root edge. The name was checked.
    pub fn add_backend(
        &mut self,
        make: impl FnOnce(EdgeId) -> (BackendInfo, Arc<Child>),
    ) -> BackendId {
        let (id, edge) = (BackendId(self.model.fresh()), EdgeId(self.model.fresh()));
        let (info, live) = make(edge);
        self.before.backends.insert(id, None);
        self.before.edges.insert(edge, None);
        let e = EdgeInfo {
            label: live.label().to_owned(),
            parent: Parent::Backend(id),
            name: "root".into(),
            role: Role::Filtered,
            binding: match info.follow {
                Follow::Disk => Binding::Position,
                Follow::Node => Binding::Content,
            },
            target: None,
            perms: info.perms,
            frozen: None,
            live,
        };
        self.model.edges.insert(edge, e);
        let name = info.name.clone();
        self.model.backends.insert(id, info);
        self.name(&name, Some(Named::Backend(id)));
        id
    }

    /// Removes a backend with its client-side filters.
    pub fn remove_backend(&mut self, id: BackendId) -> Result<()> {
        let info = self.backend(id).clone();
        let below = self.edge(info.root).target;
        self.remove_edge(info.root)?;
        below.map_or(Ok(()), |n| self.remove_orphan(n))?;
        self.backend_mut(id);
        self.model.backends.remove(&id);
        self.name(&info.name, None);
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        let b = std::mem::take(&mut self.before);
        put_back(&mut self.model.nodes, b.nodes);
        put_back(&mut self.model.edges, b.edges);
        put_back(&mut self.model.backends, b.backends);
        put_back(&mut self.model.names, b.names);
    }
}

fn put_back<K: Ord, V>(map: &mut BTreeMap<K, V>, before: BTreeMap<K, Option<V>>) {
    for (k, v) in before {
        match v {
            Some(v) => drop(map.insert(k, v)),
            None => drop(map.remove(&k)),
        }
    }
}

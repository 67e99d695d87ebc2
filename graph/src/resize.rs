//! block_resize: the size of a node changes while it is in use (mutators.md, section 3).

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_io::Drained;
use gipfel_node::{Child, Node, Role};

use crate::backend::Follow;
use crate::graph::{BackendOptions, Graph, NewMedium};
use crate::model::{Model, NodeId, Parent};
use crate::transaction::join;

/// The filters from the topmost one on `n`'s own side down to what they all show the data of.
fn way_down(model: &Model, n: NodeId) -> Vec<NodeId> {
    let mut way = vec![model.top_of(n)];
    while let Some(t) = way.last().and_then(|n| model.filtered(*n)) {
        way.push(t);
    }
    way
}

/// All nodes that show what the nodes in `way` show: those and the filters that stand on them.
fn all_showing(model: &Model, way: &[NodeId]) -> BTreeSet<NodeId> {
    let mut open = way.to_vec();
    let mut found = BTreeSet::new();
    while let Some(n) = open.pop() {
        if found.insert(n) {
            let edges = model.node(n).parents.iter().map(|e| model.edge(*e));
            open.extend(edges.filter_map(|e| match e.parent {
                Parent::Node(p) if e.role == Role::Filtered => Some(p),
                _ => None,
            }));
        }
    }
    found
}

/// Fails where someone relies on the size that the disk has.
fn check(model: &Model, id: NodeId, way: &[NodeId], size: u64, shrink: bool) -> Result<()> {
    let name = &model.node(id).name;
    let showing = all_showing(model, way);
    if let Some(j) = showing.iter().find_map(|n| model.node(*n).job.as_ref()) {
        let text = format!("node '{name}' is being copied by job '{}' and keeps its size", j.job);
        return Err(Error::new(ErrorKind::InUse, text));
    }
    let follower = model.backends().find(|(_, b)| {
        let on = model.edge(b.root).target;
        b.follow == Follow::Node && b.client.is_some() && on.is_some_and(|n| showing.contains(&n))
    });
    if let Some((_, b)) = follower {
        let who = model.parent_name(model.edge(b.root));
        let text = format!("{who} follows node '{name}', which keeps its size for that");
        return Err(Error::new(ErrorKind::InUse, text));
    }
    let now = model.node(id).live.size();
    if size < now && !shrink {
        return Err(Error::invalid(format!(
            "node '{name}' has {now} bytes: with {size} it would lose its end; say shrink=true if \
             that is meant"
        )));
    }
    Ok(())
}

/// The edges by which others write to what the nodes in `way` show.
fn writers(model: &Model, way: &[NodeId]) -> Vec<Arc<Child>> {
    let ends = way.iter().flat_map(|n| model.node(*n).parents.iter()).map(|e| model.edge(*e));
    let outer = ends.filter(|e| match e.parent {
        Parent::Node(p) => !way.contains(&p),
        Parent::Backend(_) => true,
    });
    outer.filter(|e| e.perms.writes()).map(|e| e.live.clone()).collect()
}

async fn drain(edges: &[Arc<Child>]) -> Vec<Drained<'_, Option<Arc<Node>>>> {
    let drains = edges.iter().map(|e| Box::pin(e.drain()) as Pin<Box<dyn Future<Output = _>>>);
    join(drains.collect()).await
}

impl Graph {
    /// Changes the size of the node or backend called `name`, in bytes. Who writes there waits
    /// meanwhile; filters and clients then show the new size. With `shrink` it may become smaller,
    /// and what lay past the new end is lost.
    pub async fn block_resize(self: &Rc<Self>, name: &str, size: u64, shrink: bool) -> Result<()> {
        let mut model = self.state.lock().await;
        let id = model.find_disk(name)?;
        let way = way_down(&model, id);
        check(&model, id, &way, size, shrink)?;
        let edges = writers(&model, &way);
        // The right to do it is had as a client has it, and checked against those of all others.
        let options = BackendOptions { resize: true, ..BackendOptions::default() };
        let (own, medium) = (model.auto_name("resize"), Some(NewMedium::Node(id)));
        let made = self.new_backend(&mut model, own, options, medium, Some("block_resize"));
        let (backend, _) = made.await?;
        let live = model.node(id).live.clone();
        let resized = {
            let _held = drain(&edges).await;
            live.driver().resize(size).await.at(|| format!("node '{}'", live.name()))
        };
        // What is taken back below is the right to write, so all is written by then. Its failure
        // changes nothing any more.
        if let Err(e) = live.driver().flush().await {
            eprintln!("gipfel: flushing node '{}' after its change of size: {e}", live.name());
        }
        self.transact(&mut model, |draft| draft.remove_backend(backend)).await?;
        resized
    }
}

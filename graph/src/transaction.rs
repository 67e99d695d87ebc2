//! One change of the graph, all or nothing (mutators.md, rule 7).
//!
//! Edit and check the draft (pure; may refuse) → flush nodes that lose their writers, or begin to
//! (decision 0007) → take permissions outside the process (may refuse) → drain the re-pointed
//! edges → swap → resume → end the flushes, give up permissions, close what was removed. Nothing
//! of the change itself can fail after the swap.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use gipfel_base::units::MIB;
use gipfel_base::{Result, ResultExt};
use gipfel_io::{Drained, Task, spawn_local};
use gipfel_node::node::Owed;
use gipfel_node::{Child, CopySet, Node, Perm, Perms};

use crate::copies::copies;
use crate::graph::Graph;
use crate::model::{Draft, EdgeId, Model, NodeId, Parent};
use crate::{perms, picture};

/// An edge that gets a new end.
struct Swap {
    edge: Arc<Child>,
    from: Option<(NodeId, Arc<Node>)>,
    to: Option<Arc<Node>>,
    /// Whether what it led to still stands on what it leads to now: then a flush of the new node
    /// is part of a flush of the old one, and cannot wait for it.
    onto_lower: bool,
    rank: usize,
}

/// A node that gets children or loses some. Where some come, the set is drained before the edges
/// that begin at the node, and after those above it. Where some only go, nobody waits.
struct Resettled {
    node: Arc<Node>,
    set: CopySet,
    grows: bool,
    rank: usize,
}

/// A node whose parents need or allow something else than before.
struct Change {
    id: NodeId,
    node: Arc<Node>,
    old: Perms,
    new: Perms,
}

/// What a checked draft comes down to.
struct Plan {
    swaps: Vec<Swap>,
    resettled: Vec<Resettled>,
    /// Children that were dropped: they owe a flush, which nobody who is left waits for.
    dropped: Vec<(NodeId, Arc<Node>)>,
    changes: Vec<Change>,
    removed: Vec<Arc<Node>>,
    grants: Vec<Grant>,
}

/// A flush owed by a node that loses its writers.
struct Debt {
    node: Arc<Node>,
    /// The nodes whose next flush waits for it.
    to: Vec<Arc<Node>>,
    owed: Arc<Owed>,
    /// Writing back, begun before the change.
    begun: Option<Task<()>>,
}

/// A node with more unflushed bytes than this is not flushed before the change, but only begins.
const FLUSHED_FIRST: u64 = 4 * MIB;

impl Debt {
    /// What is quickly flushed is flushed now, and if that fails the change is refused. Where much
    /// is unflushed, the flush would be felt: then writing back begins, and the rest is done after
    /// the change.
    async fn begin(node: Arc<Node>, to: Vec<Arc<Node>>) -> Result<Debt> {
        let below = Node::all_below(node.clone());
        let owed = Arc::new(Owed::default());
        let unflushed: u64 = below.iter().map(|n| n.driver().unflushed()).sum();
        let begun = if unflushed <= FLUSHED_FIRST {
            let at = || format!("flushing node '{}' before it loses its writers", node.name());
            node.driver().flush().await.at(at)?;
            None
        } else {
            let hurry = owed.clone();
            Some(spawn_local(async move {
                for n in below {
                    n.driver().write_back(&|| hurry.wanted()).await;
                }
            }))
        };
        Ok(Debt { node, to, owed, begun })
    }

    /// A node that is no part of any new path: its flush may fail without harm to what is left.
    fn of_dropped(node: Arc<Node>) -> Debt {
        Debt { node, to: Vec::new(), owed: Arc::new(Owed::default()), begun: None }
    }

    /// Lets the next flushes through the new path wait for this one.
    fn announce(&self) {
        self.to.iter().for_each(|n| n.owe(self.owed.clone()));
    }

    async fn settle(self) {
        if let Some(begun) = self.begun {
            begun.await;
        }
        let name = self.node.name();
        let at = || format!("flushing node '{name}' after it lost its writers");
        let outcome = self.node.driver().flush().await.at(at);
        if let (true, Err(e)) = (self.to.is_empty(), &outcome) {
            eprintln!("gipfel: {e}");
        }
        self.owed.settle(outcome);
    }
}

/// An edge that may do something else than before.
struct Grant {
    edge: Arc<Child>,
    old: Perm,
    new: Perm,
}

impl Plan {
    fn of(draft: &Draft<'_>) -> Plan {
        let mut swaps = Vec::new();
        let mut grants = Vec::new();
        for (id, before) in &draft.before.edges {
            let Some(now) = draft.get_edge(*id) else {
                // A client that goes: its last requests end before anything is taken from it.
                if let Some(b) = before.as_ref().filter(|b| matches!(b.parent, Parent::Backend(_)))
                {
                    let edge = b.live.clone();
                    swaps.push(Swap { edge, from: None, to: None, onto_lower: false, rank: 0 });
                }
                continue;
            };
            let old = before.as_ref().map_or(Perm::NONE, |b| b.perms.used);
            if old != now.perms.used {
                grants.push(Grant { edge: now.live.clone(), old, new: now.perms.used });
            }
            let from = before.as_ref().and_then(|b| b.target);
            if before.is_some() && from == now.target {
                continue;
            }
            let was = from.map(|n| (n, before_node(draft, n)));
            let to = now.target.map(|n| draft.node(n).live.clone());
            let onto_lower = match (from, now.target) {
                (Some(f), Some(t)) => draft.get_node(f).is_some() && draft.reaches(f, t),
                _ => false,
            };
            let (edge, rank) = (now.live.clone(), draft.rank_before(*id));
            swaps.push(Swap { edge, from: was, to, onto_lower, rank });
        }
        let stays = |id: &&EdgeId| match draft.before.edges.get(*id) {
            Some(Some(b)) => b.target == draft.edge(**id).target,
            _ => true,
        };
        swaps.extend(draft.drained.iter().filter(stays).map(|id| {
            let now = draft.edge(*id);
            let to = now.target.map(|n| draft.node(n).live.clone());
            let (edge, rank) = (now.live.clone(), draft.rank_before(*id));
            Swap { edge, from: None, to, onto_lower: false, rank }
        }));
        swaps.sort_by_key(|s| s.rank);
        let (resettled, dropped) = resettled(draft);
        let mut changes = Vec::new();
        let mut removed = Vec::new();
        for (id, before) in &draft.before.nodes {
            let old = before.as_ref().map(|b| b.above);
            match (draft.get_node(*id), before) {
                (Some(now), _) if old != Some(now.above) => changes.push(Change {
                    id: *id,
                    node: now.live.clone(),
                    old: old.unwrap_or(now.above),
                    new: now.above,
                }),
                (None, Some(b)) => removed.push(b.live.clone()),
                _ => {}
            }
        }
        Plan { swaps, resettled, dropped, changes, removed, grants }
    }

    /// Nodes that lose their writers to others, with those others.
    fn losers(&self) -> Vec<(Arc<Node>, Vec<Arc<Node>>)> {
        let mut found: BTreeMap<NodeId, (Arc<Node>, Vec<Arc<Node>>)> = BTreeMap::new();
        for s in &self.swaps {
            let Some((id, node)) = &s.from else { continue };
            let lost = |c: &Change| c.id == *id && c.old.writes() && !c.new.writes();
            if self.changes.iter().any(lost) {
                let entry = found.entry(*id).or_insert_with(|| (node.clone(), Vec::new()));
                entry.1.extend(s.to.clone().filter(|_| !s.onto_lower));
            }
        }
        found.into_values().collect()
    }
}

/// The nodes whose copies change, topmost first, and the copies that they lose and that stay
/// in the graph.
fn resettled(draft: &Draft<'_>) -> (Vec<Resettled>, Vec<(NodeId, Arc<Node>)>) {
    let (mut found, mut dropped) = (Vec::new(), Vec::new());
    for (id, before) in &draft.before.nodes {
        let (Some(before), Some(now)) = (before, draft.get_node(*id)) else { continue };
        if before.children == now.children || now.live.driver().copies().is_none() {
            continue;
        }
        let gone = before.children.iter().filter(|e| draft.get_edge(**e).is_none());
        let targets = gone.filter_map(|e| draft.before.edges.get(e)?.as_ref()?.target);
        let kept = targets.filter_map(|t| Some((t, draft.get_node(t)?.live.clone())));
        dropped.extend(kept);
        let set = copies(draft, *id).map(|(_, e)| e.live.clone()).collect();
        let rank = before.children.first().map_or(0, |e| draft.rank_before(*e));
        let grows = now.children.iter().any(|e| !before.children.contains(e));
        found.push(Resettled { node: now.live.clone(), set, grows, rank });
    }
    found.sort_by_key(|r| r.rank);
    (found, dropped)
}

fn before_node(draft: &Draft<'_>, id: NodeId) -> Arc<Node> {
    match draft.before.nodes.get(&id) {
        Some(Some(n)) => n.live.clone(),
        _ => draft.node(id).live.clone(),
    }
}

impl Graph {
    /// Carries out `edit` as one transaction. Gives what it gave, and the model after it.
    pub(crate) async fn transact<'m, T>(
        self: &Rc<Self>,
        model: &'m mut Model,
        edit: impl FnOnce(&mut Draft<'_>) -> Result<T>,
    ) -> Result<(T, &'m Model)> {
        let mut draft = Draft::new(model);
        let value = edit(&mut draft)?;
        draft.sweep()?;
        perms::settle(&mut draft)?;
        if let Some(end) = &self.rehearsal {
            *end.borrow_mut() = Some(picture::picture(&draft));
            return Err(picture::rehearsed());
        }
        let plan = Plan::of(&draft);
        let losers = plan.losers();
        let mut debts = Vec::with_capacity(losers.len());
        for (node, to) in losers {
            debts.push(Debt::begin(node, to).await?);
        }
        let lost = |n: &NodeId| {
            plan.changes.iter().any(|c| c.id == *n && c.old.writes() && !c.new.writes())
        };
        let dropped = plan.dropped.iter().filter(|(id, _)| lost(id));
        debts.extend(dropped.map(|(_, n)| Debt::of_dropped(n.clone())));
        acquire(&plan.changes).await?;
        draft.keep();
        // What is lost is lost before anything is given up, what is gained is gained at its end.
        plan.grants.iter().for_each(|g| g.edge.grant(g.old & g.new));
        swap(plan.swaps, plan.resettled).await;
        plan.grants.iter().for_each(|g| g.edge.grant(g.new));
        if debts.is_empty() {
            release(plan.changes.iter().map(|c| (&c.node, c.new))).await;
        } else {
            debts.iter().for_each(Debt::announce);
            self.clone().settle_later(debts, plan.changes.iter().map(|c| c.id).collect());
        }
        let mut removed = plan.removed;
        topmost_first(&mut removed, |n| n);
        for n in removed {
            if let Err(e) = n.driver().close().await {
                eprintln!("gipfel: closing node '{}': {e}", n.name());
            }
        }
        Ok((value, model))
    }

    /// Flushes nodes that lost their writers, tells whoever waits for it, and then gives up what
    /// is no longer needed, such as write locks (mutators.md, rule 9).
    fn settle_later(self: Rc<Self>, debts: Vec<Debt>, nodes: Vec<NodeId>) {
        spawn_local(async move {
            for debt in debts {
                debt.settle().await;
            }
            let model = self.state.lock().await;
            let known = nodes.iter().filter_map(|n| model.get_node(*n));
            release(known.map(|n| (&n.live, n.above))).await;
        })
        .detach();
    }
}

/// Takes what the old and the new state need together; on failure gives it back.
async fn acquire(changes: &[Change]) -> Result<()> {
    for (i, c) in changes.iter().enumerate() {
        let at = || format!("node '{}'", c.node.name());
        if let Err(e) = c.node.driver().set_perms(c.old.join(c.new)).await.at(at) {
            release(changes[..=i].iter().map(|c| (&c.node, c.old))).await;
            return Err(e);
        }
    }
    Ok(())
}

/// Parents before their children.
fn topmost_first<T>(list: &mut [T], node: impl Fn(&T) -> &Arc<Node>) {
    list.sort_by_cached_key(|n| Reverse(Node::all_below(node(n).clone()).len()));
}

/// A node gives up before its children do: it may have something to tidy up below.
async fn release(nodes: impl Iterator<Item = (&Arc<Node>, Perms)>) {
    let mut nodes: Vec<_> = nodes.collect();
    topmost_first(&mut nodes, |(n, _)| *n);
    for (node, perms) in nodes {
        if let Err(e) = node.driver().set_perms(perms).await {
            eprintln!("gipfel: node '{}': giving up permissions: {e}", node.name());
        }
    }
}

/// Something that is drained, and what it gets.
enum Held<'a> {
    Edge(Drained<'a, Option<Arc<Node>>>, Option<Arc<Node>>),
    Set(Drained<'a, CopySet>, CopySet),
}

impl Held<'_> {
    fn replace(&mut self) {
        match self {
            Held::Edge(d, to) => drop(d.replace(to.take())),
            Held::Set(d, to) => drop(d.replace(to.clone())),
        }
    }
}

/// Drains edges and sets of children from the clients downwards, swaps all of them, and lets
/// requests go on.
async fn swap(swaps: Vec<Swap>, resettled: Vec<Resettled>) {
    let with_copies = || resettled.iter().filter_map(|r| Some((r, r.node.driver().copies()?)));
    for (r, copies) in with_copies().filter(|(r, _)| !r.grows) {
        copies.shrink(r.set.clone()).await;
    }
    let mut held: Vec<Held<'_>> = Vec::new();
    let mut waiting = with_copies().filter(|(r, _)| r.grows);
    let mut next = waiting.next();
    for level in swaps.chunk_by(|a, b| a.rank == b.rank) {
        while let Some((r, copies)) = next.filter(|(r, _)| r.rank <= level[0].rank) {
            held.push(Held::Set(copies.drain().await, r.set.clone()));
            next = waiting.next();
        }
        let closing =
            level.iter().map(|s| Box::pin(s.edge.drain()) as Pin<Box<dyn Future<Output = _>>>);
        let drained = join(closing.collect()).await;
        held.extend(drained.into_iter().zip(level).map(|(d, s)| Held::Edge(d, s.to.clone())));
    }
    while let Some((r, copies)) = next {
        held.push(Held::Set(copies.drain().await, r.set.clone()));
        next = waiting.next();
    }
    held.iter_mut().for_each(Held::replace);
    // From the bottom up: who gets in again finds all below open.
    while held.pop().is_some() {}
}

/// The outcomes of all futures, which run side by side.
pub(crate) async fn join<T>(futures: Vec<Pin<Box<dyn Future<Output = T> + '_>>>) -> Vec<T> {
    let mut futures: Vec<_> = futures.into_iter().map(|f| (Some(f), None)).collect();
    std::future::poll_fn(move |cx| {
        for (f, out) in &mut futures {
            if let Some(p) = f
                && let Poll::Ready(v) = p.as_mut().poll(cx)
            {
                (*f, *out) = (None, Some(v));
            }
        }
        if futures.iter().any(|(f, _)| f.is_some()) {
            return Poll::Pending;
        }
        Poll::Ready(futures.iter_mut().filter_map(|(_, v)| v.take()).collect())
    })
    .await
}

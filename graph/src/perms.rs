//! Who needs what of whom in the next graph: computed top down from the backends, checked node by
//! node. Pure: it reads and writes the draft only.

use std::collections::BTreeSet;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::{Perm, Perms, Role};

use crate::model::{Draft, EdgeId, Model, NodeId, Parent};

/// Computes the permissions below everything the draft has touched and checks them.
pub(crate) fn settle(draft: &mut Draft<'_>) -> Result<()> {
    let mut open: BTreeSet<NodeId> = draft.before.nodes.keys().copied().collect();
    for (id, before) in &draft.before.edges {
        open.extend(before.as_ref().and_then(|e| e.target));
        let now = draft.get_edge(*id);
        open.extend(now.and_then(|e| e.target));
        open.extend(now.and_then(|e| match e.parent {
            Parent::Node(n) => Some(n),
            Parent::Backend(_) => None,
        }));
    }
    add_filters_above(draft, &mut open);
    let mut settled = BTreeSet::new();
    while let Some(n) = open.pop_last() {
        if draft.get_node(n).is_none() {
            continue;
        }
        settled.insert(n);
        let above = above(draft, n);
        if draft.node(n).above != above {
            draft.node_mut(n).above = above;
        }
        let info = draft.node(n);
        let live = info.live.clone();
        let writable = is_writable(draft, n);
        for (i, e) in info.children.clone().into_iter().enumerate() {
            let edge = draft.edge(e);
            let perms = live.driver().child_perms(i, edge.role, above, writable);
            if perms != edge.perms {
                draft.edge_mut(e).perms = perms;
                open.extend(draft.edge(e).target);
            }
        }
    }
    // Only the state at the end counts, never one in between.
    settled.into_iter().try_for_each(|n| check(draft, n))
}

/// Adds the filters that stand on the nodes in `open`: what they may do below changes with those.
fn add_filters_above(model: &Model, open: &mut BTreeSet<NodeId>) {
    let mut next: Vec<NodeId> = open.iter().copied().collect();
    while let Some(n) = next.pop() {
        let Some(info) = model.get_node(n) else { continue };
        for e in info.parents.iter().map(|e| model.edge(*e)).filter(|e| e.role == Role::Filtered) {
            if let Parent::Node(p) = e.parent
                && open.insert(p)
            {
                next.push(p);
            }
        }
    }
}

/// Whether a node may be written to; a filter, whether what it stands on may. Nothing is written
/// to a filter that stands on nothing.
fn is_writable(model: &Model, n: NodeId) -> bool {
    let mut at = Some(n);
    while let Some(info) = at.map(|n| model.node(n)) {
        if info.read_only {
            return false;
        }
        let filtered =
            info.children.iter().map(|e| model.edge(*e)).find(|e| e.role == Role::Filtered);
        match filtered {
            Some(e) => at = e.target,
            None => return true,
        }
    }
    false
}

fn above(model: &Model, n: NodeId) -> Perms {
    model.node(n).parents.iter().map(|e| model.edge(*e).perms).fold(Perms::IDLE, Perms::join)
}

/// Fails where one edge of `n` uses what another does not allow, or someone would write to a node
/// that is read-only.
fn check(model: &Model, n: NodeId) -> Result<()> {
    let node = model.node(n);
    for p in [Perm::CONSISTENT_READ, Perm::WRITE, Perm::WRITE_UNCHANGED, Perm::RESIZE] {
        let uses = |e: &&EdgeId| model.edge(**e).perms.used.contains(p);
        let forbids = |e: &&EdgeId| !model.edge(**e).perms.shared.contains(p);
        let name = p.names().next().unwrap_or_default();
        if matches!(p, Perm::WRITE | Perm::RESIZE)
            && node.read_only
            && let Some(e) = node.parents.iter().find(uses)
        {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!(
                    "node '{}' is read-only, and '{}' ({}) needs permission '{name}' on it",
                    node.name,
                    model.edge(*e).label,
                    model.parent_name(model.edge(*e)),
                ),
            ));
        }
        // One edge may forbid to others what it uses itself; two different ones conflict.
        let Some(forbidding) = node.parents.iter().find(forbids) else { continue };
        let using = node
            .parents
            .iter()
            .filter(uses)
            .find(|u| *u != forbidding)
            .map(|u| (*u, *forbidding))
            .or_else(|| {
                let user = node.parents.iter().find(uses)?;
                let other = node.parents.iter().filter(forbids).find(|f| *f != user)?;
                Some((*user, *other))
            });
        if let Some((u, f)) = using {
            let (u, f) = (model.edge(u), model.edge(f));
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "conflict on node '{}': '{}' ({}) needs permission '{name}', \
                     which '{}' ({}) does not allow others",
                    node.name,
                    u.label,
                    model.parent_name(u),
                    f.label,
                    model.parent_name(f),
                ),
            ));
        }
    }
    Ok(())
}

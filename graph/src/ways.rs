//! Ways through the graph: what is reached from where, and how far it is.

use std::collections::{BTreeSet, HashMap};

use gipfel_base::limits::MAX_CHAIN_DEPTH;

use crate::model::{Draft, EdgeId, Model, NodeId, Parent};

impl Model {
    /// Whether `to` is `from` or can be reached from it.
    pub fn reaches(&self, from: NodeId, to: NodeId) -> bool {
        let mut seen = BTreeSet::new();
        let mut open = vec![from];
        while let Some(n) = open.pop() {
            if n == to {
                return true;
            }
            if seen.insert(n) {
                open.extend(self.node(n).children.iter().filter_map(|e| self.edge(*e).target));
            }
        }
        false
    }

    /// The number of nodes on the longest way down from `n`, `n` included.
    pub(crate) fn depth_below(&self, n: NodeId, known: &mut HashMap<NodeId, usize>) -> usize {
        // An explicit stack: chains are deep and the process stack is not the place for them.
        let mut open = vec![(n, false)];
        while let Some((x, children_known)) = open.pop() {
            if known.contains_key(&x) {
                continue;
            }
            let below = || self.node(x).children.iter().filter_map(|e| self.edge(*e).target);
            if children_known {
                let d = below().map(|c| known.get(&c).copied().unwrap_or(0)).max().unwrap_or(0);
                known.insert(x, d + 1);
            } else {
                open.push((x, true));
                open.extend(below().map(|c| (c, false)));
            }
        }
        known[&n]
    }

    /// The number of nodes on the longest way up from `n`, `n` not included.
    pub(crate) fn depth_above(&self, n: NodeId) -> usize {
        let mut depth = 0;
        let mut level: BTreeSet<NodeId> = [n].into();
        loop {
            level = level
                .iter()
                .flat_map(|x| self.node(*x).parents.iter())
                .filter_map(|e| match self.edge(*e).parent {
                    Parent::Node(p) => Some(p),
                    Parent::Backend(_) => None,
                })
                .collect();
            if level.is_empty() || depth > MAX_CHAIN_DEPTH {
                return depth;
            }
            depth += 1;
        }
    }
}

impl Draft<'_> {
    /// How far from the clients an edge was before the draft: the longest way down to it. Requests
    /// in flight are on those ways, whatever the draft makes of them.
    pub(crate) fn rank_before(&self, e: EdgeId) -> usize {
        let parent = |e: &EdgeId| match self.before.edges.get(e) {
            Some(before) => before.as_ref().map(|b| b.parent),
            None => Some(self.edge(*e).parent),
        };
        let parents = |n: NodeId| match self.before.nodes.get(&n) {
            Some(before) => before.as_ref().map(|b| b.parents.clone()).unwrap_or_default(),
            None => self.node(n).parents.clone(),
        };
        let mut rank = 0;
        let mut level: BTreeSet<EdgeId> = [e].into();
        loop {
            level = level
                .iter()
                .filter_map(|e| match parent(e)? {
                    Parent::Node(p) => Some(p),
                    Parent::Backend(_) => None,
                })
                .flat_map(parents)
                .collect();
            if level.is_empty() {
                return rank;
            }
            rank += 1;
        }
    }
}

//! What must come out, computed from sketches alone: who may do what on each edge, which edges a
//! change touches. Written from the rules of the graph's design, not from its code.

use std::collections::{BTreeMap, BTreeSet};

use gipfel_node::{Perm, Perms};

use super::notation::{Sketch, split};

/// Why something is refused: each is a list of words that the error must contain; one of the
/// lists must fit.
pub type Refused = Vec<Vec<String>>;

/// One reason.
pub fn because<S: Into<String>>(says: impl IntoIterator<Item = S>) -> Refused {
    vec![says.into_iter().map(Into::into).collect()]
}

struct Flat<'a> {
    sketch: &'a Sketch,
    edges: BTreeMap<String, Option<String>>,
    known: BTreeMap<String, Perms>,
}

const READ: Perm = Perm::CONSISTENT_READ;

impl Flat<'_> {
    fn edges_to(&self, node: &str) -> Vec<String> {
        let all = self.edges.iter();
        all.filter(|(_, t)| t.as_deref() == Some(node)).map(|(l, _)| l.clone()).collect()
    }

    fn above(&mut self, node: &str) -> Perms {
        let edges = self.edges_to(node);
        edges.iter().map(|e| self.perms(e)).fold(Perms::IDLE, Perms::join)
    }

    /// Whether anything may be written to a node: with filters, to what they stand on.
    fn writable(&self, node: &str) -> bool {
        let below = |edge: &str| self.edges[edge].as_ref().is_some_and(|t| self.writable(t));
        match self.sketch.nodes.get(node) {
            None => below(&format!("{node}.file")),
            Some(n) if n.read_only => false,
            Some(n) if n.driver == "pass" => below(&format!("{node}.file")),
            Some(_) => true,
        }
    }

    fn perms(&mut self, edge: &str) -> Perms {
        if let Some(p) = self.known.get(edge) {
            return *p;
        }
        let (parent, child) = split(edge);
        let p = match self.sketch.doors.get(parent) {
            Some(d) if !d.client => Perms::IDLE,
            Some(d) if d.resizes => Perms { used: READ | Perm::RESIZE, shared: Perm::ALL },
            Some(d) => {
                let used = if d.writes { READ | Perm::WRITE } else { READ };
                Perms { used, shared: Perm::ALL }
            }
            // What a job reads through.
            None if parent.starts_with('~') => Perms { used: READ, shared: Perm::ALL },
            None => self.passed_on(parent, child),
        };
        self.known.insert(edge.to_owned(), p);
        p
    }

    /// What the node `parent` needs of `child`.
    fn passed_on(&mut self, parent: &str, child: &str) -> Perms {
        let above = self.above(parent);
        let quiet = READ | Perm::WRITE_UNCHANGED;
        let driver = self.sketch.nodes.get(parent).map(|n| n.driver.as_str());
        match (driver, child) {
            (None, _) if parent.ends_with("/cor") => {
                if !self.writable(parent) || !above.used.contains(READ) {
                    return above;
                }
                Perms {
                    used: above.used | Perm::WRITE_UNCHANGED,
                    shared: above.shared & !Perm::WRITE,
                }
            }
            (None, "target") => Perms { used: Perm::WRITE, shared: quiet },
            (None, _) if parent.ends_with("/job") => {
                Perms { used: above.used | READ, shared: above.shared & !Perm::WRITE }
            }
            (None | Some("pass"), _) => above,
            // The same is written to all copies, and by nobody else.
            (Some("fan"), _) => {
                let writes = Perm::WRITE | Perm::WRITE_UNCHANGED;
                let passed = if self.writable(parent) { READ | writes } else { READ };
                Perms { used: above.used & passed, shared: quiet }
            }
            // Who does not read the overlay does not care what becomes of the bytes below.
            (_, "backing") if !above.used.contains(READ) => Perms::IDLE,
            (_, "backing") => Perms { used: READ, shared: quiet },
            _ => {
                let writes = self.writable(parent) && above.writes();
                let more = if writes { Perm::WRITE | Perm::RESIZE } else { Perm::NONE };
                Perms { used: READ | more, shared: quiet }
            }
        }
    }

    /// Where edges do not get along, or write to what is read-only.
    fn conflicts(&mut self) -> Refused {
        let nodes: BTreeSet<String> = self.edges.values().flatten().cloned().collect();
        let mut found = Refused::new();
        for n in nodes {
            let edges: Vec<_> =
                self.edges_to(&n).into_iter().map(|e| (self.perms(&e), e)).collect();
            let ro = self.sketch.nodes.get(&n).is_some_and(|n| n.read_only);
            let changes = Perm::WRITE | Perm::RESIZE;
            if ro && edges.iter().any(|(p, _)| !(p.used & changes).is_empty()) {
                found.push(vec![n.clone(), "is read-only".into()]);
            }
            for (u, using) in &edges {
                for (f, forbidding) in edges.iter().filter(|f| f.1 != *using) {
                    for name in (u.used & !f.shared).names() {
                        // Edges of filters have numbers in their names.
                        let mut says = vec![format!("permission '{name}'")];
                        let plain = [using, forbidding].into_iter().chain([&n]);
                        says.extend(plain.filter(|x| !x.contains(['/', '~'])).cloned());
                        says.retain(|s| !s.contains(".file."));
                        found.push(says);
                    }
                }
            }
        }
        found
    }
}

/// The permissions of every edge, or the conflicts.
pub fn permissions(sketch: &Sketch) -> Result<BTreeMap<String, Perms>, Refused> {
    let edges = sketch.edges();
    let labels: Vec<_> = edges.keys().cloned().collect();
    let mut flat = Flat { sketch, edges, known: BTreeMap::new() };
    let conflicts = flat.conflicts();
    if !conflicts.is_empty() {
        return Err(conflicts);
    }
    Ok(labels.into_iter().map(|l| (l.clone(), flat.perms(&l))).collect())
}

/// Whether anyone may change the bytes that are read at `node`: by writing to it or below.
pub fn may_change(sketch: &Sketch, node: &str) -> bool {
    let edges = sketch.edges();
    let mut flat = Flat { sketch, edges, known: BTreeMap::new() };
    let mut open = vec![node.to_owned()];
    while let Some(n) = open.pop() {
        if flat.above(&n).used.contains(Perm::WRITE) {
            return true;
        }
        let children = &sketch.nodes[&n].children;
        // What an overlay stores in its file changes with the overlay itself only.
        open.extend(children.iter().filter(|c| c.0 != "file").filter_map(|c| c.1.clone()));
        if sketch.nodes[&n].driver == "pass" {
            open.extend(sketch.nodes[&n].child("file").cloned());
        }
    }
    false
}

/// Where the edges of each node and filter lead.
fn below(sketch: &Sketch) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (label, to) in sketch.edges() {
        all.entry(split(&label).0.to_owned()).or_default().extend(to);
    }
    all
}

/// Whether `to` is `from` or below it, filters and what they lead to included.
pub fn reaches(sketch: &Sketch, from: &str, to: &str) -> bool {
    let below = below(sketch);
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(n) = open.pop() {
        if n == to {
            return true;
        }
        if seen.insert(n) {
            open.extend(below.get(n).into_iter().flatten().map(String::as_str));
        }
    }
    false
}

/// The node whose data `node` shows, explicit filters looked through.
pub fn data_of<'a>(sketch: &'a Sketch, node: &'a str) -> &'a str {
    match &sketch.nodes[node] {
        n if n.driver == "pass" => n.child("file").map_or(node, |t| data_of(sketch, t)),
        _ => node,
    }
}

/// Whether zeros that the client of `door` writes as bytes reach storage as a write of zeros.
pub fn finds_zeroes(sketch: &Sketch, door: &str) -> bool {
    let d = &sketch.doors[door];
    let mut at = d.to.as_ref();
    while let Some(n) = at.map(|n| &sketch.nodes[n]) {
        if n.zeroes {
            return true;
        }
        // What reaches the first copy of several is looked at.
        at = n.child("file").or(n.children.first().and_then(|c| c.1.as_ref()));
    }
    d.filters.iter().any(|f| f == "dz")
}

/// Whether something stands on itself.
pub fn has_cycle(sketch: &Sketch) -> bool {
    fn circles<'a>(
        all: &'a BTreeMap<String, Vec<String>>,
        n: &'a str,
        path: &mut Vec<&'a str>,
        done: &mut BTreeSet<&'a str>,
    ) -> bool {
        if path.contains(&n) {
            return true;
        }
        if !done.insert(n) {
            return false;
        }
        path.push(n);
        let found = all.get(n).into_iter().flatten().any(|t| circles(all, t, path, done));
        path.pop();
        found
    }
    let all = below(sketch);
    let mut done = BTreeSet::new();
    all.keys().any(|n| circles(&all, n, &mut Vec::new(), &mut done))
}

/// The nodes that show what `disk` shows, from there downwards: through filters and copies.
pub fn showing_below(sketch: &Sketch, disk: &str) -> BTreeSet<String> {
    let mut open = vec![disk.to_owned()];
    let mut found = BTreeSet::new();
    while let Some(n) = open.pop() {
        if found.insert(n.clone()) && ["pass", "fan"].contains(&&*sketch.nodes[&n].driver) {
            open.extend(sketch.nodes[&n].children.iter().filter_map(|c| c.1.clone()));
        }
    }
    found
}

/// The edges by which others write to what `node` shows, filters looked through.
pub fn writers(sketch: &Sketch, node: &str) -> Vec<String> {
    let (edges, perms) = (sketch.edges(), permissions(sketch).expect("this graph is there"));
    let mut way = Vec::new();
    let mut at = Some(node);
    while let Some(n) = at {
        way.extend(sketch.side(n));
        at = match &sketch.nodes[n] {
            n if n.driver == "pass" => n.child("file").map(String::as_str),
            _ => None,
        };
    }
    let ends = |to: &Option<String>| to.as_ref().is_some_and(|t| way.contains(t));
    let outer =
        edges.into_iter().filter(|(l, to)| ends(to) && !way.iter().any(|w| w == split(l).0));
    outer.map(|(l, _)| l).filter(|l| perms[l].writes()).collect()
}

/// The edges that a change from one graph to the other re-points, new ones left out: what has to
/// be quiesced, and nothing else.
pub fn moved(before: &Sketch, after: &Sketch) -> BTreeSet<String> {
    let (old, new) = (before.edges(), after.edges());
    let changed = new.into_iter().filter(|(l, t)| old.get(l).is_some_and(|o| o != t));
    changed.map(|(l, _)| l).collect()
}

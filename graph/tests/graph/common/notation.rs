//! Graphs as text, so that whole graphs are written down, built, and compared.
//!
//! ```text
//! b0 (thr cor dz) > f > [dz] n > file
//! b1:ro > [dz] n
//! n.file > g > file
//! ```
//! `x > y` reads "x stands on y", `(...)` are client-side filters, `[...]` node-side ones. The way
//! down goes through `backing` where a node has one, else through its first child; `file` is a
//! plain file without a name, left out where a node has one beside its way down. Other children
//! have lines of their own, `NODE.CHILD > ...`. What was written out once is only named again.
//!
//! The first letter of a name says what it is: `b` backend, `f` and `g` explicit filters, `m`
//! memory, any other an overlay. After a name: `:ro` read-only, `:node` follows the node, `:along`
//! made along with its client, `:idle` without a client. The throttle is written as its
//! group, `thr` or `lim`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::Result;
use gipfel_graph::model::{Model, Owner, Parent};
use gipfel_graph::{Backend, BackendId, BackendOptions, Follow, Graph, NodeId, ZeroDetection};
use gipfel_node::Perms;
use serde_json::{Value, json};

use super::map;

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSketch {
    /// Its driver.
    pub driver: String,
    /// Whether it has a node-side detect-zeroes.
    pub zeroes: bool,
    /// Whether it is read-only.
    pub read_only: bool,
    /// Its edges to children, by name: to a node with whatever stands on that node's side.
    pub children: Vec<(String, Option<String>)>,
}

/// A backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Door {
    /// Its client-side filters, topmost first.
    pub filters: Vec<String>,
    /// Its node.
    pub to: Option<String>,
    /// Whether its client may write.
    pub writes: bool,
    /// Whether it follows the node, not the disk.
    pub follows_node: bool,
    /// Whether it was made along with its client.
    pub along: bool,
    /// Whether it has a client.
    pub client: bool,
}

/// A graph.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sketch {
    /// The backends.
    pub doors: BTreeMap<String, Door>,
    /// The nodes; those without a name of their own are called after the edge that leads there.
    pub nodes: BTreeMap<String, NodeSketch>,
}

fn driver_of(name: &str) -> &'static str {
    match name.as_bytes()[0] {
        b'f' | b'g' => "pass",
        b'm' => "mem",
        _ => "overlay",
    }
}

impl NodeSketch {
    /// The node `name` as blockdev-add would make it of its name alone.
    pub fn new(name: &str) -> NodeSketch {
        let driver = driver_of(name);
        let children = match driver {
            "pass" => vec![("file".to_owned(), None)],
            "overlay" => {
                vec![
                    ("file".to_owned(), Some(format!("{name}.file"))),
                    ("backing".to_owned(), None),
                ]
            }
            _ => Vec::new(),
        };
        let driver = driver.to_owned();
        NodeSketch { driver, zeroes: false, read_only: false, children }
    }

    /// A file without a name.
    pub fn file() -> NodeSketch {
        NodeSketch::new("m")
    }

    /// Where child `name` leads.
    pub fn child(&self, name: &str) -> Option<&String> {
        self.children.iter().find(|c| c.0 == name)?.1.as_ref()
    }

    /// The edge called `name`.
    pub fn edge(&mut self, name: &str) -> Option<&mut Option<String>> {
        self.children.iter_mut().find(|c| c.0 == name).map(|c| &mut c.1)
    }
}

impl Sketch {
    /// The graph that `text` describes (lines may also be separated by `;`).
    pub fn parse(text: &str) -> Sketch {
        let mut s = Sketch::default();
        for line in text.split(['\n', ';']).map(str::trim).filter(|l| !l.is_empty()) {
            let mut from: Option<(String, String)> = None;
            for (i, part) in line.split(" > ").enumerate() {
                from = s.parse_part(part.trim(), i == 0, from);
            }
        }
        let anonymous: Vec<_> =
            s.nodes.values().flat_map(|n| n.children.iter()).filter_map(|c| c.1.clone()).collect();
        for a in anonymous.into_iter().filter(|a| Self::is_anonymous(a)) {
            let read_only = s.nodes[a.trim_end_matches(".file")].read_only;
            s.nodes.insert(a, NodeSketch { read_only, ..NodeSketch::file() });
        }
        s
    }

    /// Reads one part of a line; gives the edge that leads on from there.
    fn parse_part(
        &mut self,
        part: &str,
        first: bool,
        from: Option<(String, String)>,
    ) -> Option<(String, String)> {
        if first && part.contains('.') {
            return part.split_once('.').map(|(p, c)| (p.to_owned(), c.to_owned()));
        }
        if first && part.starts_with('b') {
            let (name, filters) = part.split_once(" (").unwrap_or((part, ""));
            let mut words = name.split(':');
            let name = words.next().unwrap_or_default().to_owned();
            let flags: Vec<_> = words.collect();
            let door = Door {
                filters: filters.trim_end_matches(')').split(' ').map(str::to_owned).collect(),
                to: None,
                writes: !flags.contains(&"ro"),
                follows_node: flags.contains(&"node"),
                along: flags.contains(&"along"),
                client: !flags.contains(&"idle"),
            };
            let door = Door {
                filters: door.filters.into_iter().filter(|f| !f.is_empty()).collect(),
                ..door
            };
            self.doors.insert(name.clone(), door);
            return Some((name, "root".into()));
        }
        let (zeroes, name) = match part.strip_prefix("[dz] ") {
            Some(n) => (true, n),
            None => (false, part),
        };
        let (name, read_only) = match name.strip_suffix(":ro") {
            Some(n) => (n, true),
            None => (name, false),
        };
        let name = match (name, &from) {
            ("file", Some((parent, _))) => format!("{parent}.file"),
            _ => {
                let node =
                    self.nodes.entry(name.to_owned()).or_insert_with(|| NodeSketch::new(name));
                node.zeroes |= zeroes;
                node.read_only |= read_only;
                name.to_owned()
            }
        };
        if let Some((parent, edge)) = from {
            self.point(&format!("{parent}.{edge}"), Some(&name));
        }
        let next = match driver_of(&name) {
            "overlay" => "backing",
            _ => "file",
        };
        Some((name, next.into()))
    }

    /// Points the edge `label` at a node. A plain file goes where its name says.
    pub fn point(&mut self, label: &str, to: Option<&str>) {
        let (parent, child) = label.rsplit_once('.').expect("PARENT.CHILD");
        let to = to.map(str::to_owned);
        if let Some(d) = self.doors.get_mut(parent) {
            d.to = to;
            return;
        }
        let child = match &to {
            Some(t) if *t == format!("{parent}.file") => "file",
            _ => child,
        };
        let node = self.nodes.entry(parent.to_owned()).or_insert_with(|| NodeSketch::new(parent));
        *node.edge(child).unwrap_or_else(|| panic!("'{parent}' has no child '{child}'")) = to;
    }

    /// All edges at the cut, `PARENT.CHILD`, with where they lead.
    pub fn links(&self) -> Vec<(String, Option<String>)> {
        let doors = self.doors.iter().map(|(n, d)| (format!("{n}.root"), d.to.clone()));
        let nodes = self.nodes.iter().flat_map(|(n, s)| {
            s.children.iter().map(move |(c, t)| (format!("{n}.{c}"), t.clone()))
        });
        doors.chain(nodes).collect()
    }

    /// The edges at the cut that lead to `node`.
    pub fn users(&self, node: &str) -> Vec<String> {
        let all = self.links().into_iter();
        all.filter(|(_, t)| t.as_deref() == Some(node)).map(|(l, _)| l).collect()
    }

    /// Whether a node has no name of its own.
    pub fn is_anonymous(name: &str) -> bool {
        name.contains('.')
    }

    /// Removes what has no name and nobody stands on.
    pub fn sweep(&mut self) {
        let dead: Vec<_> = self
            .nodes
            .keys()
            .filter(|n| Self::is_anonymous(n) && self.users(n).is_empty())
            .cloned()
            .collect();
        for d in dead {
            self.nodes.remove(&d);
        }
    }

    /// Every edge with every filter: `b0.root`, `b0/thr.file`, `n/dz.file`, `n.backing`.
    pub fn edges(&self) -> BTreeMap<String, Option<String>> {
        let top = |n: &String| if self.nodes[n].zeroes { format!("{n}/dz") } else { n.clone() };
        let mut all = BTreeMap::new();
        for (name, d) in &self.doors {
            let mut edge = format!("{name}.root");
            for f in &d.filters {
                all.insert(edge, Some(format!("{name}/{f}")));
                edge = format!("{name}/{f}.file");
            }
            all.insert(edge, d.to.as_ref().map(top));
        }
        for (name, n) in &self.nodes {
            if n.zeroes {
                all.insert(format!("{name}/dz.file"), Some(name.clone()));
            }
            for (c, t) in &n.children {
                all.insert(format!("{name}.{c}"), t.as_ref().map(top));
            }
        }
        all
    }

    fn write_node(&self, name: &str) -> String {
        let n = &self.nodes[name];
        let side = if n.zeroes { "[dz] " } else { "" };
        // A file without a name is opened as its parent is.
        let parent = self.nodes.get(name.trim_end_matches(".file"));
        let told = Self::is_anonymous(name) && parent.is_some_and(|p| p.read_only);
        let ro = if n.read_only && !told { ":ro" } else { "" };
        let name = if name.ends_with(".file") { "file" } else { name };
        format!("{side}{name}{ro}")
    }

    /// The line that begins with `head` and goes on at `to`, and the lines of what it leaves out.
    fn write_line(
        &self,
        head: Option<String>,
        to: Option<&str>,
        seen: &mut BTreeSet<String>,
        lines: &mut Vec<String>,
    ) {
        let mut parts: Vec<String> = head.into_iter().collect();
        let mut aside = Vec::new();
        let mut at = to;
        while let Some(name) = at {
            parts.push(self.write_node(name));
            if !seen.insert(name.to_owned()) {
                break;
            }
            let n = &self.nodes[name];
            let way = n.child("backing").or_else(|| n.children.iter().find_map(|c| c.1.as_ref()));
            for (c, t) in &n.children {
                let plain = |t: &str| t == format!("{name}.{c}") && !self.nodes[t].zeroes;
                let Some(t) = t else { continue };
                if Some(t) != way && plain(t) {
                    seen.insert(t.clone());
                } else if n.driver == "overlay" && c == "file" && !plain(t) || Some(t) != way {
                    aside.push((format!("{name}.{c}"), t.clone()));
                }
            }
            let named_file = n.driver == "overlay"
                && way == n.child("file")
                && way.is_some_and(|w| *w != format!("{name}.file"));
            at = way.map(String::as_str).filter(|_| !named_file);
        }
        lines.push(parts.join(" > "));
        for (head, to) in aside {
            self.write_line(Some(head), Some(&to), seen, lines);
        }
    }
}

impl fmt::Display for Sketch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut seen, mut lines) = (BTreeSet::new(), Vec::new());
        for (name, d) in &self.doors {
            let mut head = name.clone();
            for (on, flag) in [
                (!d.writes, ":ro"),
                (d.follows_node, ":node"),
                (d.along, ":along"),
                (!d.client, ":idle"),
            ] {
                head += if on { flag } else { "" };
            }
            if !d.filters.is_empty() {
                head += &format!(" ({})", d.filters.join(" "));
            }
            self.write_line(Some(head), d.to.as_deref(), &mut seen, &mut lines);
        }
        for n in self.nodes.keys() {
            if self.users(n).is_empty() {
                self.write_line(None, Some(n), &mut seen, &mut lines);
            }
        }
        f.write_str(&lines.join("\n"))
    }
}

/// A backend's handle.
pub type Handle = (BackendId, Arc<Backend>);

/// Options of blockdev-add for the node `name` of a sketch. Files without a name take `file`.
pub fn add_options(name: &str, n: &NodeSketch, file: &Value) -> Value {
    let mut o = json!({ "driver": n.driver, "node-name": name });
    if n.driver == "mem" {
        o = file.clone();
        o["node-name"] = json!(name);
    }
    for (c, t) in &n.children {
        o[c] = match t {
            Some(t) if Sketch::is_anonymous(t) => file.clone(),
            t => json!(t),
        };
    }
    if n.zeroes {
        o["detect-zeroes"] = json!("on");
    }
    if n.read_only {
        o["read-only"] = json!(true);
    }
    o
}

/// How a backend like `d` is made under the name `name`.
pub fn door_options(name: &str, d: &Door) -> BackendOptions {
    let has = |f: &str| d.filters.iter().any(|x| x == f);
    BackendOptions {
        name: Some(name.to_owned()),
        writable: d.writes,
        follow: if d.follows_node { Follow::Node } else { Follow::Disk },
        throttle: ["thr", "lim"].into_iter().find(|g| has(g)).map(str::to_owned),
        copy_on_read: has("cor"),
        detect_zeroes: if has("dz") { ZeroDetection::On } else { ZeroDetection::Off },
        ..Default::default()
    }
}

/// Makes a backend like `d`, and a client of it if it has one.
pub async fn add_door(g: &Rc<Graph>, name: &str, d: &Door) -> Result<Option<Handle>> {
    let client = format!("client '{name}'");
    if d.along {
        let to = d.to.as_deref().unwrap_or_default();
        return g.attach(to, &client, door_options(name, d)).await.map(Some);
    }
    g.backend_add(door_options(name, d), d.to.as_deref()).await?;
    if !d.client {
        return Ok(None);
    }
    g.attach(name, &client, door_options(name, d)).await.map(Some)
}

impl Sketch {
    /// Makes this graph of an empty one; `file` are the options of files without a name.
    pub async fn build(&self, g: &Rc<Graph>, file: &Value) -> BTreeMap<String, Handle> {
        let mut made = BTreeSet::new();
        let mut open: Vec<&String> = self.nodes.keys().collect();
        while let Some(name) = open.pop() {
            if Self::is_anonymous(name) || made.contains(name) {
                continue;
            }
            let n = &self.nodes[name];
            let named = n.children.iter().filter_map(|c| c.1.as_ref());
            let missing: Vec<_> =
                named.filter(|t| !Self::is_anonymous(t) && !made.contains(*t)).collect();
            if missing.is_empty() {
                made.insert(name.clone());
                g.blockdev_add(map(add_options(name, n, file))).await.unwrap();
            } else {
                open.push(name);
                open.extend(missing);
            }
        }
        let mut doors = BTreeMap::new();
        for (name, d) in &self.doors {
            if let Some(h) = add_door(g, name, d).await.unwrap() {
                doors.insert(name.clone(), h);
            }
        }
        doors
    }
}

/// What a graph looks like: the sketch, and each edge with where it leads and what it may.
pub struct View {
    /// The graph.
    pub sketch: Sketch,
    /// Each edge under the name it has in [`Sketch::edges`].
    pub edges: BTreeMap<String, Perms>,
    /// How often each edge was drained.
    pub drains: BTreeMap<String, u32>,
    /// What the parents of each node use and allow, under the node's own name.
    pub above: BTreeMap<String, Perms>,
}

struct Names<'a>(&'a Model);

impl Names<'_> {
    fn filter(&self, node: NodeId, backend: Option<BackendId>) -> String {
        let driver = self.0.node(node).live.def().name;
        match (driver, backend) {
            ("throttle", Some(b)) => self.0.backend(b).throttle.clone().unwrap_or("?".into()),
            ("copy-on-read", Some(_)) => "cor".into(),
            ("detect-zeroes", _) => "dz".into(),
            (other, _) => format!("?{other}"),
        }
    }

    fn node(&self, id: NodeId) -> String {
        let n = self.0.node(id);
        match n.implicit {
            Some(Owner::Backend(b)) => match self.0.get_backend(b) {
                Some(owner) => format!("{}/{}", owner.name, self.filter(id, Some(b))),
                None => format!("?{}", n.name),
            },
            Some(Owner::Node(b)) => match self.0.get_node(b) {
                Some(_) => format!("{}/{}", self.node(b), self.filter(id, None)),
                None => format!("?{}", n.name),
            },
            None if n.name.starts_with('#') => {
                // Called after the way there, its own filters left out.
                let top = n.side_top.unwrap_or(id);
                match self.0.node(top).parents.iter().next() {
                    Some(e) => self.edge(self.0.edge(*e)),
                    None => format!("?{}", n.name),
                }
            }
            None => n.name.clone(),
        }
    }

    fn edge(&self, e: &gipfel_graph::model::EdgeInfo) -> String {
        let parent = match e.parent {
            Parent::Node(n) => self.node(n),
            Parent::Backend(b) => self.0.backend(b).name.clone(),
        };
        format!("{parent}.{}", e.name)
    }
}

/// Reads the graph, after checking that the model agrees with itself and with the running edges.
pub fn view(m: &impl Deref<Target = Model>) -> View {
    let names = Names(m);
    let mut sketch = Sketch::default();
    let mut links = BTreeMap::new();
    let (mut edges, mut drains, mut above) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (id, e) in m.edges() {
        let label = names.edge(e);
        if let Some(t) = e.target {
            let back = m.get_node(t).is_some_and(|n| n.parents.contains(&id));
            assert!(back, "edge '{label}' is not among its node's parents");
        }
        let live = e.live.try_enter().expect("no edge stays drained").clone();
        let same = match (&live, e.target) {
            (Some(l), Some(t)) => Arc::ptr_eq(l, &m.node(t).live),
            (None, None) => true,
            _ => false,
        };
        assert!(same, "the running edge '{label}' leads elsewhere than the model says");
        assert_eq!(e.live.granted(), e.perms.used, "edge '{label}': granted and settled differ");
        assert!(e.frozen.is_none(), "edge '{label}' is frozen");
        edges.insert(label.clone(), e.perms);
        drains.insert(label.clone(), e.live.drains());
        links.insert(label, e.target.map(|t| names.node(t)));
    }
    for (id, n) in m.nodes() {
        for e in &n.parents {
            let there = m.get_edge(*e).is_some_and(|e| e.target == Some(id));
            assert!(there, "node '{}' has a parent that leads elsewhere", n.name);
        }
        above.insert(n.name.clone(), n.above);
        if n.implicit.is_some() {
            continue;
        }
        let under = |t: NodeId| match m.node(t).implicit {
            Some(Owner::Node(x)) => names.node(x),
            _ => names.node(t),
        };
        let children = n.children.iter().map(|e| m.edge(*e));
        let children = children.map(|e| (e.name.to_string(), e.target.map(under))).collect();
        let node = NodeSketch {
            driver: n.live.def().name.to_owned(),
            zeroes: n.detect_zeroes != ZeroDetection::Off,
            read_only: n.read_only,
            children,
        };
        sketch.nodes.insert(names.node(id), node);
    }
    for (id, b) in m.backends() {
        let mut at = m.edge(b.root).target;
        let mut filters = Vec::new();
        while let Some(n) = at
            && m.node(n).implicit == Some(Owner::Backend(id))
        {
            assert_eq!(b.stack.get(filters.len()), Some(&n), "the stack of '{}'", b.name);
            filters.push(names.filter(n, Some(id)));
            at = m.edge(m.node(n).children[0]).target;
        }
        assert_eq!(b.stack.len(), filters.len(), "the stack of '{}'", b.name);
        let under = |t: NodeId| match m.node(t).implicit {
            Some(Owner::Node(x)) => names.node(x),
            _ => names.node(t),
        };
        let door = Door {
            filters,
            to: at.map(under),
            writes: b.options.writable,
            follows_node: b.follow == Follow::Node,
            along: b.made_along,
            client: b.client.is_some(),
        };
        sketch.doors.insert(b.name.clone(), door);
    }
    assert_eq!(links, sketch.edges(), "filters are not where they belong:\n{sketch}");
    View { sketch, edges, drains, above }
}

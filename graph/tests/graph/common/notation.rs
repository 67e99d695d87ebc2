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
//! memory, `q` a node whose children come and go, any other an overlay. After a name: `:ro`
//! read-only, `:node` follows the node, `:along` made along with its client, `:idle` without a
//! client, `:cd` with a medium that can be taken out. The throttle is written as its group, `thr`
//! or `lim`; filters of jobs, which are only written and never read, as `[m0=mirror dz]`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::Result;
use gipfel_graph::model::{EdgeInfo, Model, Owner, Parent};
use gipfel_graph::{Backend, BackendId, BackendOptions, Follow, Graph, NodeId, ZeroDetection};
use gipfel_node::{Binding, Perms};
use serde_json::{Value, json};

use super::lab::SIZE;
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
    /// The jobs that have filters on its side, the oldest first.
    pub jobs: Vec<JobSketch>,
    /// Its size in bytes; 0 for filters, which show that of what they stand on.
    pub size: u64,
    /// The number of the next child, where they come and go.
    pub next: usize,
}

/// A job with a filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobSketch {
    /// Its id.
    pub id: String,
    /// Whether it mirrors; else it is a backup.
    pub mirror: bool,
    /// The node it copies to.
    pub target: String,
    /// The edges that it rests on.
    pub frozen: BTreeSet<String>,
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
    /// Whether its tray is open, if it has one.
    pub tray: Option<bool>,
    /// Whether its client changes sizes, and does nothing else.
    pub resizes: bool,
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
        b'q' => "fan",
        _ => "overlay",
    }
}

/// The parent and the child's name of an edge. Names of children may have dots.
pub fn split(label: &str) -> (&str, &str) {
    match label.split_once(".children.") {
        Some((parent, _)) => (parent, &label[parent.len() + 1..]),
        None => label.rsplit_once('.').expect("PARENT.CHILD"),
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
        let size = if driver == "pass" { 0 } else { SIZE };
        NodeSketch {
            driver: driver.to_owned(),
            zeroes: false,
            read_only: false,
            children,
            jobs: Vec::new(),
            size,
            next: 0,
        }
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
        // A tray with a medium in it is closed, to begin with.
        for d in s.doors.values_mut() {
            d.tray = d.tray.map(|_| d.to.is_none());
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
                tray: flags.contains(&"cd").then_some(true),
                resizes: false,
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
            "fan" => "children.0",
            _ => "file",
        };
        Some((name, next.into()))
    }

    /// Points the edge `label` at a node. A plain file goes where its name says.
    pub fn point(&mut self, label: &str, to: Option<&str>) {
        let (parent, child) = split(label);
        let to = to.map(str::to_owned);
        if let Some(d) = self.doors.get_mut(parent) {
            d.to = to;
            return;
        }
        if let Some(id) = parent.strip_suffix("/job") {
            let job = self.jobs_mut().find(|j| j.id == id).expect("the job is there");
            job.target = to.expect("a job has a target");
            return;
        }
        let child = match &to {
            Some(t) if *t == format!("{parent}.file") => "file",
            _ => child,
        };
        let node = self.nodes.entry(parent.to_owned()).or_insert_with(|| NodeSketch::new(parent));
        if let (Some(n), None) = (child.strip_prefix("children."), node.child(child)) {
            node.children.push((child.to_owned(), None));
            node.next = 1 + n.parse::<usize>().expect("a number");
        }
        *node.edge(child).unwrap_or_else(|| panic!("'{parent}' has no child '{child}'")) = to;
    }

    /// All jobs.
    pub fn jobs(&self) -> impl Iterator<Item = &JobSketch> {
        self.nodes.values().flat_map(|n| &n.jobs)
    }

    fn jobs_mut(&mut self) -> impl Iterator<Item = &mut JobSketch> {
        self.nodes.values_mut().flat_map(|n| &mut n.jobs)
    }

    /// The size that a node shows, in bytes.
    pub fn size(&self, node: &str) -> u64 {
        match &self.nodes[node] {
            n if n.driver == "pass" => n.child("file").map_or(0, |t| self.size(t)),
            n => n.size,
        }
    }

    /// All edges at the cut, `PARENT.CHILD`, with where they lead. Those of jobs are called
    /// `~JOB.root` (where it reads) and `JOB/job.target`.
    pub fn links(&self) -> Vec<(String, Option<String>)> {
        let jobs = self.nodes.iter().flat_map(|(n, s)| {
            s.jobs.iter().flat_map(move |j| {
                let (source, target) = (format!("~{}.root", j.id), format!("{}/job.target", j.id));
                [(source, Some(n.clone())), (target, Some(j.target.clone()))]
            })
        });
        let doors = self.doors.iter().map(|(n, d)| (format!("{n}.root"), d.to.clone()));
        let nodes = self.nodes.iter().flat_map(|(n, s)| {
            s.children.iter().map(move |(c, t)| (format!("{n}.{c}"), t.clone()))
        });
        doors.chain(nodes).chain(jobs).collect()
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
        let dead = |s: &Self| {
            let mut nodes = s.nodes.keys();
            nodes.find(|n| Self::is_anonymous(n) && s.users(n).is_empty()).cloned()
        };
        while let Some(d) = dead(self) {
            self.nodes.remove(&d);
        }
    }

    /// The filters on a node's side, the topmost first, and the node.
    pub fn side(&self, node: &str) -> Vec<String> {
        let n = &self.nodes[node];
        let jobs = n.jobs.iter().rev().map(|j| format!("{}/job", j.id));
        jobs.chain(n.zeroes.then(|| format!("{node}/dz"))).chain([node.to_owned()]).collect()
    }

    /// Every edge with every filter: `b0.root`, `b0/thr.file`, `n/dz.file`, `n.backing`.
    pub fn edges(&self) -> BTreeMap<String, Option<String>> {
        let top = |n: &String| self.side(n).swap_remove(0);
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
            for pair in self.side(name).windows(2) {
                all.insert(format!("{}.file", pair[0]), Some(pair[1].clone()));
            }
            for j in &n.jobs {
                all.insert(format!("~{}.root", j.id), Some(format!("{}/job", j.id)));
                all.insert(format!("{}/job.target", j.id), Some(top(&j.target)));
            }
            for (c, t) in &n.children {
                all.insert(format!("{name}.{c}"), t.as_ref().map(top));
            }
        }
        all
    }

    fn write_node(&self, name: &str) -> String {
        let n = &self.nodes[name];
        let job = |j: &JobSketch| {
            format!("{}={}->{}", j.id, if j.mirror { "mirror" } else { "cbw" }, j.target)
        };
        let side = n.jobs.iter().rev().map(job).chain(n.zeroes.then(|| "dz".to_owned()));
        let side: Vec<_> = side.collect();
        let side = if side.is_empty() { String::new() } else { format!("[{}] ", side.join(" ")) };
        // A file without a name is opened as its parent is.
        let parent = self.nodes.get(name.trim_end_matches(".file"));
        let told = Self::is_anonymous(name) && parent.is_some_and(|p| p.read_only);
        let ro = if n.read_only && !told { ":ro" } else { "" };
        let size = match n.size {
            0 | SIZE => String::new(),
            other => format!("({other})"),
        };
        let name = if name.ends_with(".file") { "file" } else { name };
        format!("{side}{name}{ro}{size}")
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
                (d.tray.is_some(), ":cd"),
                (d.tray.is_some_and(|open| open == d.to.is_some()), ":moved"),
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

/// Children that a node of [`FAN`](super::fan::FAN) keeps at least.
pub const LEAST: usize = 2;

/// A backend's handle.
pub type Handle = (BackendId, Arc<Backend>);

/// Options of blockdev-add for the node `name` of a sketch. Files without a name take `file`.
pub fn add_options(name: &str, n: &NodeSketch, file: &Value) -> Value {
    let mut o = json!({ "driver": n.driver, "node-name": name });
    if n.driver == "mem" {
        o = file.clone();
        o["node-name"] = json!(name);
    }
    if n.driver == "fan" {
        o["children"] = n.children.iter().filter_map(|c| c.1.as_deref()).collect();
        o["least"] = json!(LEAST);
    }
    for (c, t) in n.children.iter().filter(|_| n.driver != "fan") {
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
        removable: d.tray.is_some(),
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
    /// The job whose source a backend is.
    fn job(&self, backend: BackendId) -> Option<&str> {
        let client = self.0.backend(backend).client.as_deref()?;
        client.strip_prefix("job '")?.strip_suffix('\'')
    }

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
        if let Some(j) = &n.job {
            return format!("{}/job", j.job);
        }
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
                match self.0.node(top).parents.iter().next().map(|e| self.0.edge(*e)) {
                    Some(EdgeInfo { parent: Parent::Node(p), .. })
                        if let Some(Owner::Backend(b)) = self.0.node(*p).implicit =>
                    {
                        format!("{}.root", self.0.backend(b).name)
                    }
                    Some(e) => self.edge(e),
                    None => format!("?{}", n.name),
                }
            }
            None => n.name.clone(),
        }
    }

    fn edge(&self, e: &EdgeInfo) -> String {
        let parent = match e.parent {
            Parent::Node(n) => self.node(n),
            Parent::Backend(b) => match self.job(b) {
                Some(j) => format!("~{j}"),
                None => self.0.backend(b).name.clone(),
            },
        };
        format!("{parent}.{}", e.name)
    }

    /// The node that an edge means which leads to `t`, maybe a filter on that node's side.
    fn meant(&self, t: NodeId) -> String {
        match self.0.node(t).implicit {
            Some(Owner::Node(x)) => self.node(x),
            _ => self.node(t),
        }
    }

    /// The jobs on the side of a node, and the edges that rest for them.
    fn jobs(&self, id: NodeId) -> Vec<JobSketch> {
        let mut jobs = Vec::new();
        let mut at = self.0.node(id).side_top;
        while let Some(n) = at.filter(|n| *n != id).map(|n| self.0.node(n)) {
            let edge = |i: usize| self.0.edge(n.children[i]).target;
            if let Some(j) = &n.job {
                let who = format!("job '{}'", j.job);
                let rests = |e: &EdgeInfo| e.frozen.as_ref() == Some(&who);
                let frozen = self.0.edges().filter(|(_, e)| rests(e)).map(|(_, e)| self.edge(e));
                jobs.push(JobSketch {
                    id: j.job.clone(),
                    mirror: j.binding == Binding::Position,
                    target: edge(1).map(|t| self.meant(t)).unwrap_or_default(),
                    frozen: frozen.filter(|l| *l != format!("~{}.root", j.job)).collect(),
                });
            }
            at = edge(0);
        }
        jobs.reverse();
        jobs
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
        let edges = n.children.iter().map(|e| m.edge(*e));
        if let Some(copies) = n.live.driver().copies() {
            let set = copies.try_enter().expect("no set stays drained").clone();
            let same = set.iter().map(|c| c.label()).eq(edges.clone().map(|e| &*e.label));
            assert!(same, "the running children of '{}' differ from the model's", n.name);
        }
        let driver = n.live.def().name.to_owned();
        let node = NodeSketch {
            zeroes: n.detect_zeroes != ZeroDetection::Off,
            read_only: n.read_only,
            children: edges
                .map(|e| (e.name.to_string(), e.target.map(|t| names.meant(t))))
                .collect(),
            jobs: names.jobs(id),
            size: if driver == "pass" { 0 } else { n.live.size() },
            next: n.live.driver().copies().map_or(0, |c| c.next_number()),
            driver,
        };
        sketch.nodes.insert(names.node(id), node);
    }
    for (id, b) in m.backends().filter(|(id, _)| names.job(*id).is_none()) {
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
        let door = Door {
            filters,
            to: at.map(|t| names.meant(t)),
            writes: b.options.writable,
            follows_node: b.follow == Follow::Node,
            along: b.made_along,
            client: b.client.is_some(),
            tray: b.tray.map(|t| t.open),
            resizes: false,
        };
        sketch.doors.insert(b.name.clone(), door);
    }
    assert_eq!(links, sketch.edges(), "filters are not where they belong:\n{sketch}");
    // A job's filter has the size that its disk had when the job began.
    for (_, b) in m.backends().filter(|_| sketch.jobs().next().is_none()) {
        let d = &sketch.doors[&b.name];
        let shown = d.to.as_ref().filter(|_| d.tray != Some(true)).map_or(0, |t| sketch.size(t));
        assert_eq!(b.live.size(), shown, "the size that backend '{}' shows of\n{sketch}", b.name);
    }
    View { sketch, edges, drains, above }
}

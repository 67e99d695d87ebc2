//! The mutators, each as the row of the design's table says: what the next graph is, and when it
//! is refused. To add one: a struct with [`Mutator`], and a line in the matrix or the histories.

mod children;
mod jobs;
mod media;

pub use children::{ChangeChild, Resize};
pub use jobs::{JobComplete, JobEnd, JobStart};
pub use media::{Media, Tray};

use std::future::Future;
use std::pin::Pin;

use gipfel_base::Result;
use gipfel_graph::{ReplaceEdges, SnapshotSync};
use serde_json::{Value, json};

use crate::common::map;
use crate::common::notation::{
    Door, NodeSketch, Sketch, add_door, add_options, door_options, split,
};
use crate::common::oracle::{Refused, because, data_of, has_cycle, reaches};
use crate::common::stage::Stage;

/// The outcome of a mutator.
pub type Done<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// A change of the graph.
pub trait Mutator: std::fmt::Debug {
    /// Turns `s` into the graph that comes next, or says why it is refused. Permissions and what
    /// has no name any more are seen to by the caller.
    fn next(&self, s: &mut Sketch) -> Result<(), Refused>;

    /// Does it.
    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a>;

    /// Edges that are quiesced although they lead where they led.
    fn quiesces(&self, before: &Sketch) -> Vec<String> {
        let _ = before;
        Vec::new()
    }

    /// The backend whose client goes, and stops before.
    fn leaves(&self) -> Option<&str> {
        None
    }

    /// The backend whose client sees another medium, or none.
    fn swaps_medium(&self) -> Option<&str> {
        None
    }
}

/// Who an edge belongs to, as errors say it.
fn user(label: &str) -> String {
    let parent = split(label).0;
    match parent.strip_prefix('~').or(parent.strip_suffix("/job")) {
        Some(job) => format!("job '{job}'"),
        None => parent.to_owned(),
    }
}

/// The node that a device or node name means.
fn disk(s: &Sketch, name: &str) -> Result<String, Refused> {
    match s.doors.get(name) {
        Some(d) => d.to.clone().ok_or_else(|| because([name, "has no medium"])),
        None => node(s, name).map(|_| name.to_owned()),
    }
}

fn node<'a>(s: &'a Sketch, name: &str) -> Result<&'a NodeSketch, Refused> {
    s.nodes.get(name).ok_or_else(|| because([format!("no node '{name}'")]))
}

fn is_free(s: &Sketch, name: &str) -> Result<(), Refused> {
    if s.nodes.contains_key(name) {
        return Err(because([format!("there is a node '{name}' already")]));
    }
    if s.doors.contains_key(name) {
        return Err(because([format!("there is a backend '{name}' already")]));
    }
    Ok(())
}

/// Whether the edge `label` means "the disk that is here".
fn is_position(s: &Sketch, label: &str) -> bool {
    match split(label) {
        (p, "root") => s.doors.get(p).is_some_and(|d| !d.follows_node),
        (_, child) => child != "backing",
    }
}

/// blockdev-snapshot, blockdev-snapshot-sync.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The node or backend to be overlaid.
    pub disk: String,
    /// What is put over it.
    pub overlay: String,
    /// Whether the overlay is made along, in this file.
    pub sync: Option<String>,
}

impl Snapshot {
    fn check(&self, s: &Sketch, n: &str) -> Refused {
        let o = self.overlay.as_str();
        let mut why = Refused::new();
        let mut refuse = |on: bool, says: &[&str]| {
            if on {
                why.extend(because(says.iter().copied()));
            }
        };
        let overlay = &s.nodes[o];
        let users = s.users(o);
        refuse(n == o, &[o, "is the node to be overlaid"]);
        refuse(overlay.driver != "overlay", &[o, "cannot have a backing node"]);
        if let Some(b) = overlay.child("backing") {
            let base = if Sketch::is_anonymous(b) { "" } else { b };
            refuse(true, &[o, "has a backing node already", base]);
        }
        for u in &users {
            let user = user(u);
            refuse(!Sketch::is_anonymous(&user), &[o, "is in use by", &user]);
        }
        refuse(n != o && reaches(s, o, n), &[o, "stands on node", n, "already"]);
        refuse(s.size(o) < s.size(n), &[o, "is smaller", n]);
        let writes =
            |d: &&Door| d.follows_node && d.writes && d.client && d.to.as_deref() == Some(n);
        let follower = s.doors.values().any(|d| writes(&d));
        refuse(follower, &["writes to node", n, "follows the node"]);
        why
    }
}

impl Mutator for Snapshot {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        let n = disk(s, &self.disk)?;
        if self.sync.is_some() {
            is_free(s, &self.overlay)?;
            s.nodes.insert(self.overlay.clone(), NodeSketch::new(&self.overlay));
            s.nodes.insert(format!("{}.file", self.overlay), NodeSketch::file());
        }
        node(s, &self.overlay)?;
        let why = self.check(s, &n);
        if !why.is_empty() {
            return Err(why);
        }
        let users = s.users(&n);
        let position: Vec<_> = users.iter().filter(|u| is_position(s, u)).cloned().collect();
        for e in if position.is_empty() { users } else { position } {
            if !e.ends_with(".root") || is_position(s, &e) {
                s.point(&e, Some(&self.overlay));
            }
        }
        s.point(&format!("{}.backing", self.overlay), Some(&n));
        // A mirror goes up with the disk, a backup stays with the bytes.
        let jobs = std::mem::take(&mut s.nodes.get_mut(&n).unwrap().jobs);
        let (up, stay): (Vec<_>, Vec<_>) = jobs.into_iter().partition(|j| j.mirror);
        s.nodes.get_mut(&n).unwrap().jobs = stay;
        s.nodes.get_mut(&self.overlay).unwrap().jobs.extend(up);
        Ok(())
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(async move {
            match &self.sync {
                None => stage.graph.blockdev_snapshot(&self.disk, &self.overlay).await,
                Some(file) => {
                    let sync = SnapshotSync {
                        disk: self.disk.clone(),
                        file: file.clone(),
                        node_name: Some(self.overlay.clone()),
                        format: "overlay".into(),
                        existing: false,
                    };
                    stage.graph.blockdev_snapshot_sync(&sync).await
                }
            }
        })
    }
}

/// blockdev-replace.
#[derive(Clone, Debug)]
pub struct Replace {
    /// Which edges.
    pub edges: ReplaceEdges,
    /// Where they are to lead.
    pub with: String,
}

impl Mutator for Replace {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        node(s, &self.with)?;
        let labels = match &self.edges {
            ReplaceEdges::Named(e) => match s.links().into_iter().find(|(l, _)| l == e) {
                Some(_) => vec![e.clone()],
                None => return Err(because(["there is no edge", e])),
            },
            ReplaceEdges::AllOf(n) | ReplaceEdges::OnlyOf(n) => {
                node(s, n)?;
                let own = |l: &String| reaches(s, &self.with, split(l).0);
                let users = s.users(n).into_iter();
                users.filter(|l| is_position(s, l) && !own(l)).collect()
            }
        };
        if matches!(self.edges, ReplaceEdges::OnlyOf(_)) && labels.len() > 1 {
            return Err(because(["has several such edges"]));
        }
        let links = s.links();
        for l in labels {
            let to = links.iter().find(|x| x.0 == l).and_then(|x| x.1.clone());
            let Some(to) = to else { return Err(because(["leads to no node"])) };
            if data_of(s, &to) != data_of(s, &self.with) {
                return Err(because([self.with.as_str(), "a change of medium"]));
            }
            s.point(&l, Some(&self.with));
            if has_cycle(s) {
                return Err(because(["a cycle"]));
            }
        }
        Ok(())
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(stage.graph.blockdev_replace(&self.edges, &self.with))
    }
}

/// blockdev-reopen.
#[derive(Clone, Debug)]
pub struct Reopen(pub Vec<ReopenOne>);

/// What one node is to become.
#[derive(Clone, Debug)]
pub struct ReopenOne {
    /// The node.
    pub node: String,
    /// Node option detect-zeroes.
    pub zeroes: bool,
    /// Children that are to lead elsewhere.
    pub children: Vec<(String, Option<String>)>,
}

impl Mutator for Reopen {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        for (i, r) in self.0.iter().enumerate() {
            node(s, &r.node)?;
            for t in r.children.iter().filter_map(|c| c.1.as_ref()) {
                node(s, t)?;
            }
            if self.0[..i].iter().any(|x| x.node == r.node) {
                return Err(because(["is in the list twice"]));
            }
            let n = s.nodes.get_mut(&r.node).unwrap();
            n.zeroes = r.zeroes;
            for (c, t) in &r.children {
                *n.edge(c).unwrap() = t.clone();
            }
        }
        if has_cycle(s) { Err(because(["a cycle"])) } else { Ok(()) }
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(async move {
            let now = stage.sketch().await;
            let list = self.0.iter().map(|r| {
                let Some(old) = now.nodes.get(&r.node) else {
                    return map(json!({ "driver": "overlay", "node-name": r.node }));
                };
                let mut n = NodeSketch { zeroes: r.zeroes, ..old.clone() };
                for (c, t) in &r.children {
                    *n.edge(c).unwrap() = t.clone();
                }
                let mut o = add_options(&r.node, &n, &stage.file);
                for (c, t) in &n.children {
                    // What has no name stays as it is.
                    if t.as_deref().is_some_and(Sketch::is_anonymous) {
                        o.as_object_mut().unwrap().remove(c);
                    }
                }
                map(o)
            });
            let list = list.collect();
            stage.graph.blockdev_reopen(list).await
        })
    }
}

/// block_set_io_throttle.
#[derive(Clone, Debug)]
pub struct Throttle {
    /// The backend.
    pub door: String,
    /// Its new group.
    pub group: Option<&'static str>,
}

impl Mutator for Throttle {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        if s.nodes.contains_key(&self.door) {
            return Err(because([self.door.as_str(), "throttle node"]));
        }
        let Some(d) = s.doors.get_mut(&self.door) else {
            return Err(because(["there is no backend"]));
        };
        d.filters.retain(|f| f == "cor" || f == "dz");
        match self.group {
            Some("none") => return Err(because(["no group 'none'"])),
            Some(g) => d.filters.insert(0, g.into()),
            None => {}
        }
        Ok(())
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(async move {
            let id = stage.graph.throttled_backend(&self.door).await?;
            stage.graph.set_throttle(id, self.group).await
        })
    }
}

/// blockdev-add.
#[derive(Clone, Debug)]
pub struct Add {
    /// Its name, which says its driver.
    pub name: String,
    /// The node it stands on, if any.
    pub on: Option<String>,
    /// Node option detect-zeroes.
    pub zeroes: bool,
    /// Option read-only.
    pub read_only: bool,
}

impl Add {
    fn sketch(&self) -> NodeSketch {
        let mut n = NodeSketch::new(&self.name);
        (n.zeroes, n.read_only) = (self.zeroes, self.read_only);
        let way = if n.driver == "overlay" { "backing" } else { "file" };
        if n.driver == "fan" {
            n.children = vec![("children.0".to_owned(), self.on.clone())];
            n.next = 1;
        }
        match (n.edge(way), &self.on) {
            (Some(e), Some(on)) => *e = Some(on.clone()),
            (Some(e), None) if way == "file" => *e = Some(format!("{}.file", self.name)),
            _ => {}
        }
        n
    }
}

impl Mutator for Add {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        is_free(s, &self.name)?;
        let mut n = self.sketch();
        for (_, t) in &n.children {
            match t {
                Some(t) if Sketch::is_anonymous(t) => {
                    // What a node opens itself it opens as it was opened itself.
                    let file = NodeSketch { read_only: n.read_only, ..NodeSketch::file() };
                    s.nodes.insert(t.clone(), file);
                }
                Some(t) => drop(node(s, t)?),
                None => {}
            }
        }
        if let ("fan", Some(on)) = (n.driver.as_str(), &self.on) {
            n.size = s.size(on);
        }
        s.nodes.insert(self.name.clone(), n);
        Ok(())
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        let o = add_options(&self.name, &self.sketch(), &stage.file);
        Box::pin(stage.graph.blockdev_add(map(o)))
    }
}

/// blockdev-del.
#[derive(Clone, Debug)]
pub struct Del(pub String);

impl Mutator for Del {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        node(s, &self.0)?;
        let users = s.users(&self.0);
        if !users.is_empty() {
            let names = users.iter().map(|u| user(u));
            let names = names.filter(|n| !Sketch::is_anonymous(n));
            return Err(because(names.chain(["is in use by".into()])));
        }
        s.nodes.remove(&self.0);
        Ok(())
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(stage.graph.blockdev_del(&self.0))
    }
}

/// A new backend: made along with its client, or made first and without one.
#[derive(Clone, Debug)]
pub struct AddDoor(pub String, pub Door);

impl Mutator for AddDoor {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        is_free(s, &self.0)?;
        if let Some(to) = &self.1.to {
            node(s, to)?;
        }
        s.doors.insert(self.0.clone(), self.1.clone());
        Ok(())
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(async move {
            if let Some(h) = add_door(&stage.graph, &self.0, &self.1).await? {
                stage.arrived(&self.0, h);
            }
            Ok(())
        })
    }
}

/// backend-del.
#[derive(Clone, Debug)]
pub struct DelDoor(pub String);

impl Mutator for DelDoor {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        match s.doors.get(&self.0) {
            None => Err(because(["there is no backend"])),
            Some(d) if d.client => Err(because([self.0.as_str(), "is in use by"])),
            Some(_) => {
                s.doors.remove(&self.0);
                Ok(())
            }
        }
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(stage.graph.backend_del(&self.0))
    }
}

/// A client (export, device) comes to a backend that is there.
#[derive(Clone, Debug)]
pub struct Attach(pub String);

impl Mutator for Attach {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        match s.doors.get_mut(&self.0) {
            None => Err(because([format!("no backend and no node '{}'", self.0)])),
            Some(d) if d.client => {
                let client = format!("client '{}'", self.0);
                Err(because(["has a client already".into(), client]))
            }
            Some(d) => {
                d.client = true;
                Ok(())
            }
        }
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        Box::pin(async move {
            let writes = stage.sketch().await.doors.get(&self.0).is_some_and(|d| d.writes);
            let d = Door { writes, ..NO_DOOR };
            let client = format!("client '{}'", self.0);
            let h = stage.graph.attach(&self.0, &client, door_options(&self.0, &d)).await?;
            stage.arrived(&self.0, h);
            Ok(())
        })
    }
}

/// A backend without anything.
pub const NO_DOOR: Door = Door {
    filters: Vec::new(),
    to: None,
    writes: false,
    follows_node: false,
    along: false,
    client: true,
    tray: None,
    resizes: false,
};

/// A client goes.
#[derive(Clone, Debug)]
pub struct Detach(pub String);

impl Mutator for Detach {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        let d = s.doors.get_mut(&self.0).unwrap();
        d.client = false;
        if d.along {
            s.doors.remove(&self.0);
        }
        Ok(())
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        let id = stage.id(&self.0);
        Box::pin(stage.graph.detach(id))
    }

    fn quiesces(&self, before: &Sketch) -> Vec<String> {
        let stays = before.doors.get(&self.0).is_some_and(|d| !d.along);
        if stays { vec![format!("{}.root", self.0)] } else { Vec::new() }
    }

    fn leaves(&self) -> Option<&str> {
        Some(&self.0)
    }
}

/// Options of files without a name.
pub fn file_options(unflushed: bool) -> Value {
    json!({ "driver": "mem", "unflushed": if unflushed { 5u64 << 20 } else { 0 } })
}

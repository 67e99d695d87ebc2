//! A graph as it is drawn: points in a fixed order, what stands on what, what differs.

use std::collections::{BTreeMap, BTreeSet};

use gipfel_base::{Error, Result};
use serde::Deserialize;
use serde_json::Value;

/// A point: a backend, a node or an implicit filter.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Point {
    id: u64,
    /// BlockGraphKind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its driver.
    pub driver: Option<String>,
    #[serde(default)]
    read_only: bool,
    client: Option<String>,
    /// Whose filter it is.
    pub owner: Option<String>,
}

/// An edge between two points.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Edge {
    /// The upper point; an index into the picture's points once read.
    pub parent: usize,
    /// The lower point.
    pub child: usize,
    /// The child's name.
    pub name: String,
    /// `PARENT.CHILD`.
    pub label: String,
    binding: String,
    perm: Vec<String>,
    /// Who rests on it.
    pub frozen: Option<String>,
}

#[derive(Deserialize)]
struct Raw {
    nodes: Vec<Point>,
    edges: Vec<Edge>,
}

/// A graph to be drawn.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Backends first, then nodes, in the order in which they were made.
    pub points: Vec<Point>,
    /// All edges, between places in `points`.
    pub edges: Vec<Edge>,
}

impl Point {
    /// Whether it is a backend.
    pub fn is_backend(&self) -> bool {
        self.kind == "backend"
    }

    /// Whether it is an implicit filter.
    pub fn is_implicit(&self) -> bool {
        self.kind.ends_with("-filter")
    }

    /// What is written in its box: a backend's client and name, or a node's name and driver.
    pub fn title(&self) -> String {
        if self.is_backend() {
            return match &self.client {
                // A backend made along with its client has no name that says anything.
                Some(c) if self.name.starts_with('#') => c.clone(),
                Some(c) => format!("{}: {c}", self.name),
                None => self.name.clone(),
            };
        }
        let driver = self.driver.as_deref().unwrap_or("?");
        if self.is_implicit() {
            return driver.to_owned();
        }
        let ro = if self.read_only { ", ro" } else { "" };
        format!("{} ({driver}{ro})", self.name)
    }
}

impl Edge {
    /// What the parent may do: r, w, u, s.
    pub fn rights(&self) -> String {
        let letter = |p: &String| match p.as_str() {
            "consistent-read" => 'r',
            "write" => 'w',
            "write-unchanged" => 'u',
            _ => 's',
        };
        self.perm.iter().map(letter).collect()
    }

    /// The child's name and all that is to be said of the edge.
    pub fn text(&self) -> String {
        let mut t = self.name.clone();
        let rights = self.rights();
        if !rights.is_empty() {
            t.push(' ');
            t.push_str(&rights);
        }
        // That a backing file is meant as these very bytes goes without saying.
        if self.binding == "content" && self.name != "backing" {
            t.push_str(" content");
        }
        if let Some(who) = &self.frozen {
            t.push_str(&format!(" frozen by {who}"));
        }
        t
    }
}

impl Picture {
    /// Reads a BlockGraph.
    pub fn read(v: &Value) -> Result<Picture> {
        let raw: Raw = serde_json::from_value(v.clone())
            .map_err(|e| Error::invalid(format!("the daemon's graph cannot be read: {e}")))?;
        let mut points = raw.nodes;
        points.sort_by_key(|p| (!p.is_backend(), p.id));
        let places: BTreeMap<u64, usize> =
            points.iter().enumerate().map(|(i, p)| (p.id, i)).collect();
        let place = |id: usize| places.get(&(id as u64)).copied();
        let mut edges = Vec::new();
        for mut e in raw.edges {
            let (Some(parent), Some(child)) = (place(e.parent), place(e.child)) else { continue };
            (e.parent, e.child) = (parent, child);
            edges.push(e);
        }
        // The image itself before what it stands on.
        edges.sort_by_key(|e| (e.parent, e.name == "backing"));
        Ok(Picture { points, edges })
    }

    /// The edges below a point.
    pub fn below(&self, at: usize) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |e| e.parent == at)
    }

    /// The points that nothing stands on.
    pub fn roots(&self) -> Vec<usize> {
        let held: BTreeSet<usize> = self.edges.iter().map(|e| e.child).collect();
        (0..self.points.len()).filter(|p| !held.contains(p)).collect()
    }

    /// The edges as `PARENT.CHILD -> NODE`.
    pub fn lines(&self) -> BTreeSet<String> {
        self.edges.iter().map(|e| self.line(e)).collect()
    }

    /// One edge as in [`Picture::lines`].
    pub fn line(&self, e: &Edge) -> String {
        let (parent, child) = (&self.points[e.parent], &self.points[e.child]);
        match parent.is_backend() && parent.name.starts_with('#') {
            // A backend made along with its client has no name that says anything.
            true => format!("{}.{} -> {}", parent.title(), e.name, child.name),
            false => format!("{} -> {}", e.label, child.name),
        }
    }

    /// The names of all points.
    pub fn names(&self) -> BTreeSet<&str> {
        self.points.iter().map(|p| p.name.as_str()).collect()
    }
}

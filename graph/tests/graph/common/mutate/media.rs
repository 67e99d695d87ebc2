//! Trays and media of backends.

use std::path::Path;

use gipfel_graph::{Medium, ReadOnlyMode};
use gipfel_io::{File, OpenOptions};

use super::{Done, Mutator, node};
use crate::common::notation::{NodeSketch, Sketch};
use crate::common::oracle::{Refused, because};
use crate::common::stage::Stage;

/// What is done with a tray.
#[derive(Clone, Debug)]
pub enum Tray {
    /// blockdev-open-tray.
    Open,
    /// blockdev-close-tray.
    Close,
    /// blockdev-insert-medium.
    Insert(String),
    /// blockdev-remove-medium.
    Remove,
    /// eject.
    Eject,
    /// blockdev-change-medium, to this file, which is there unless it is called missing.
    Change(String),
}

/// A change of a backend's medium.
#[derive(Clone, Debug)]
pub struct Media {
    /// The backend.
    pub door: String,
    /// The change.
    pub what: Tray,
}

impl Media {
    /// The new medium of blockdev-change-medium, in the graph but not yet in the tray.
    fn opened(&self, s: &mut Sketch) -> String {
        let d = &s.doors[&self.door];
        let read_only = d.to.as_ref().map_or(!d.writes, |n| s.nodes[n].read_only);
        let new = format!("{}.root", self.door);
        let file = format!("{new}.file");
        let children = vec![("file".into(), Some(file.clone())), ("backing".into(), None)];
        let overlay = NodeSketch { read_only, children, ..NodeSketch::new("o") };
        s.nodes.insert(new.clone(), overlay);
        s.nodes.insert(file, NodeSketch { read_only, ..NodeSketch::file() });
        new
    }
}

impl Mutator for Media {
    fn next(&self, s: &mut Sketch) -> Result<(), Refused> {
        let name = self.door.as_str();
        let Some(d) = s.doors.get(name) else {
            let known = s.nodes.contains_key(name);
            let says = if known { "is a node" } else { "there is no backend" };
            return Err(because([name, says]));
        };
        let Some(open) = d.tray else { return Err(because([name, "cannot be taken out"])) };
        let (open, to) = match &self.what {
            Tray::Open => (true, d.to.clone()),
            Tray::Close => (false, d.to.clone()),
            Tray::Insert(_) | Tray::Remove if !open => {
                return Err(because([name, "the tray of backend", "is closed"]));
            }
            Tray::Insert(_) if d.to.is_some() => {
                return Err(because([name, "has a medium already"]));
            }
            Tray::Insert(n) => {
                node(s, n)?;
                (true, Some(n.clone()))
            }
            Tray::Remove | Tray::Eject => (true, None),
            Tray::Change(file) if file.starts_with("missing") => {
                return Err(because([file.as_str(), "new medium", "no such file"]));
            }
            Tray::Change(_) => (false, Some(self.opened(s))),
        };
        let d = s.doors.get_mut(name).unwrap();
        (d.tray, d.to) = (Some(open), to);
        Ok(())
    }

    fn run<'a>(&'a self, stage: &'a Stage) -> Done<'a> {
        let g = &stage.graph;
        Box::pin(async move {
            let id = g.backend_called(&self.door).await?;
            match &self.what {
                Tray::Open => g.open_tray(id, false).await.map(drop),
                Tray::Close => g.close_tray(id).await.map(drop),
                Tray::Insert(n) => g.insert_medium(id, n).await,
                Tray::Remove => g.remove_medium(id).await,
                Tray::Eject => g.eject(id, false).await.map(drop),
                Tray::Change(file) => {
                    let (filename, format) = (file.clone(), Some("overlay".to_owned()));
                    if !file.starts_with("missing") {
                        let new =
                            OpenOptions { write: true, create_new: true, ..Default::default() };
                        File::open(Path::new(file), new).await?;
                    }
                    let medium = Medium { filename, format, read_only: ReadOnlyMode::Retain };
                    g.change_medium(id, &medium, false).await.map(drop)
                }
            }
        })
    }

    fn quiesces(&self, before: &Sketch) -> Vec<String> {
        let opens = matches!(self.what, Tray::Open | Tray::Eject);
        let closed = before.doors[&self.door].tray == Some(false);
        if opens && closed { vec![format!("{}.root", self.door)] } else { Vec::new() }
    }

    fn swaps_medium(&self) -> Option<&str> {
        Some(&self.door)
    }
}

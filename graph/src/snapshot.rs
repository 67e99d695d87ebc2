//! blockdev-snapshot and blockdev-snapshot-sync (mutators.md, section 3).

use std::path::Path;
use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_node::{Binding, Role};
use serde_json::{Map, Value, json};

use crate::backend::Follow;
use crate::filename;
use crate::graph::Graph;
use crate::job_filter;
use crate::model::{BackendId, Draft, EdgeId, Model, NodeId, Owner, Parent};
use crate::query::is_encrypted;
use crate::replace::data_of;

/// What blockdev-snapshot-sync is told.
#[derive(Clone, Debug)]
pub struct SnapshotSync {
    /// The backend or node to be overlaid.
    pub disk: String,
    /// The overlay's file.
    pub file: String,
    /// The overlay's node-name.
    pub node_name: Option<String>,
    /// The overlay's format.
    pub format: String,
    /// Use the file that is there instead of making one.
    pub existing: bool,
}

/// The edge of `overlay` that will lead to the node it is put on, after all checks that concern
/// the two nodes alone.
fn check(model: &Model, disk: NodeId, overlay: NodeId) -> Result<EdgeId> {
    let (n, o) = (model.node(disk), model.node(overlay));
    let refuse = |kind, why: String| Err(Error::new(kind, format!("overlay '{}' {why}", o.name)));
    if disk == overlay {
        return refuse(ErrorKind::InvalidInput, "is the node to be overlaid".into());
    }
    let children = o.live.def().children;
    let Some(at) = children.iter().position(|c| c.role == Role::Backing) else {
        let driver = o.live.def().name;
        return refuse(ErrorKind::InvalidInput, format!("({driver}) cannot have a backing node"));
    };
    let edge = o.children[at];
    if let Some(b) = model.edge(edge).target {
        let base = &model.node(model.under_side(b)).name;
        return refuse(ErrorKind::InUse, format!("has a backing node already: '{base}'"));
    }
    if let Some(e) = model.outer_parents(overlay).first() {
        let user = model.parent_name(model.edge(*e));
        return refuse(ErrorKind::InUse, format!("is in use by {user}"));
    }
    if model.reaches(overlay, disk) {
        return refuse(ErrorKind::InvalidInput, format!("stands on node '{}' already", n.name));
    }
    if o.live.size() < n.live.size() {
        return refuse(
            ErrorKind::InvalidInput,
            format!(
                "is smaller ({} bytes) than node '{}' ({} bytes)",
                o.live.size(),
                n.name,
                n.live.size()
            ),
        );
    }
    Ok(edge)
}

/// The edit: position-bound edges of `disk` move to `overlay`, which gets `disk` (with its
/// node-side filters) as its backing node.
pub(crate) fn overlay_edit(draft: &mut Draft<'_>, disk: NodeId, overlay: NodeId) -> Result<()> {
    let backing = check(draft, disk, overlay)?;
    let outer = draft.outer_parents(disk);
    for e in &outer {
        let client = backend_of(draft, *e).map(|b| draft.backend(b));
        if client.is_some_and(|b| b.follow == Follow::Node && b.live.is_writable()) {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "{} writes to node '{}' and follows the node, not the disk",
                    draft.parent_name(draft.edge(*e)),
                    draft.node(disk).name
                ),
            ));
        }
    }
    let position = |d: &Draft<'_>, e: &EdgeId| is_position(d, *e);
    let mut moving: Vec<_> = outer.iter().copied().filter(|e| position(draft, e)).collect();
    if moving.is_empty() {
        // Only overlays stand there: they move too, for an empty overlay shows the same bytes.
        moving = outer.into_iter().filter(|e| draft.edge(*e).role == Role::Backing).collect();
    }
    job_filter::lift(draft, disk, overlay)?;
    let (top, below) = (draft.top_of(overlay), draft.top_of(disk));
    for e in moving {
        draft.repoint(e, Some(top))?;
    }
    draft.repoint(backing, Some(below))
}

/// The backend that an edge belongs to: as its own, or as that of one of its client-side filters.
fn backend_of(model: &Model, e: EdgeId) -> Option<BackendId> {
    match model.edge(e).parent {
        Parent::Backend(b) => Some(b),
        Parent::Node(p) => match model.node(p).implicit {
            Some(Owner::Backend(b)) => Some(b),
            _ => None,
        },
    }
}

/// Whether an edge moves along when its node is overlaid or replaced. The edge of a client-side
/// filter moves as its backend does.
pub(crate) fn is_position(model: &Model, e: EdgeId) -> bool {
    match backend_of(model, e) {
        Some(b) => model.backend(b).follow == Follow::Disk,
        None => model.edge(e).binding == Binding::Position,
    }
}

impl Graph {
    /// Puts the node `overlay` over the node or backend `disk`.
    pub async fn blockdev_snapshot(self: &Rc<Self>, disk: &str, overlay: &str) -> Result<()> {
        let mut model = self.state.lock().await;
        let n = model.find_disk(disk)?;
        let o = model.find_node(overlay)?;
        self.transact(&mut model, |d| overlay_edit(d, n, o)).await?;
        warn_of_clear_data(&model, n, o).await;
        Ok(())
    }

    /// The options of the overlay that `s` describes and the path of its file, which is made unless
    /// it is to exist.
    pub(crate) async fn overlay_options(
        self: &Rc<Self>,
        model: &mut Model,
        disk: NodeId,
        s: &SnapshotSync,
    ) -> Result<(Map<String, Value>, String)> {
        if let Some(n) = &s.node_name {
            model.check_node_name(n)?;
        }
        let path = match filename::options(&s.file, self.registry.file_protocol)?.remove("filename")
        {
            Some(Value::String(p)) => p,
            _ => return Err(Error::invalid(format!("'{}' is no plain file name", s.file))),
        };
        if !s.existing {
            self.create_overlay(model, disk, s, &path).await?;
        }
        let mut options = Map::new();
        options.insert("driver".into(), json!(s.format));
        if let Some(n) = &s.node_name {
            options.insert("node-name".into(), json!(n));
        }
        let protocol = json!({ "driver": self.registry.file_protocol, "filename": path });
        options.insert("file".into(), protocol);
        options.insert("backing".into(), Value::Null);
        Ok((options, path))
    }

    async fn create_overlay(
        self: &Rc<Self>,
        model: &mut Model,
        disk: NodeId,
        s: &SnapshotSync,
        path: &str,
    ) -> Result<()> {
        let size = model.node(disk).live.size();
        // Filters are not in files: what is named is the image whose data they show.
        let image = data_of(model, disk);
        let base_format = model.node(image).live.def().name;
        let base = image_of(model, image).await;
        let mut options = json!({ "driver": s.format, "size": size });
        if let Some(b) = base {
            // The name must hold wherever the process stands later.
            options["backing-file"] = json!(absolute(&b));
            options["backing-fmt"] = json!(base_format);
        }
        self.create_file(model, path, options).await.at(|| format!("overlay '{path}'"))
    }
}

/// A plain overlay on an encrypted disk works, and what is new is stored in the clear (mutators.md,
/// section 1).
pub(crate) async fn warn_of_clear_data(model: &Model, disk: NodeId, overlay: NodeId) {
    if is_encrypted(model, disk).await && !is_encrypted(model, overlay).await {
        let (n, o) = (&model.node(disk).name, &model.node(overlay).name);
        eprintln!(
            "gipfel: warning: node '{n}' is encrypted and its overlay '{o}' is not: new data lie \
             in the clear"
        );
    }
}

/// The file name of the image of a node, if it has one.
async fn image_of(model: &Model, node: NodeId) -> Option<String> {
    let mut at = model.node(node).live.clone();
    loop {
        if let Some(f) = at.driver().info().await.ok()?.filename {
            return Some(f);
        }
        let next = at.driver().children().first()?.node().await?;
        at = next;
    }
}

fn absolute(path: &str) -> String {
    match std::path::absolute(Path::new(path)) {
        Ok(p) => p.to_string_lossy().into_owned(),
        Err(_) => path.to_owned(),
    }
}

pub(crate) async fn remove_file(path: &str) {
    if let Err(e) = gipfel_io::file::remove(Path::new(path)).await {
        eprintln!("gipfel: removing '{path}', which could not be used: {e}");
    }
}

//! Media of backends: trays, inserting, removing, changing (mutators.md, section 3).

use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use serde_json::json;

use crate::backends::Tray;
use crate::graph::Graph;
use crate::model::{BackendId, Draft, Model, NodeId};

/// Whether a new medium may be written to (BlockdevChangeReadOnlyMode).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReadOnlyMode {
    /// As the one before it; without one, as the backend was made.
    #[default]
    Retain,
    /// Not.
    ReadOnly,
    /// It may.
    ReadWrite,
}

/// What blockdev-change-medium puts in.
#[derive(Clone, Debug)]
pub struct Medium {
    /// Its file name.
    pub filename: String,
    /// Its format; by default it is found by looking.
    pub format: Option<String>,
    /// Whether it may be written to.
    pub read_only: ReadOnlyMode,
}

fn tray(model: &Model, id: BackendId) -> Result<Tray> {
    let Some(b) = model.get_backend(id) else {
        return Err(Error::new(ErrorKind::NotFound, "the backend is gone"));
    };
    b.tray.ok_or_else(|| {
        Error::unsupported(format!(
            "the medium of backend '{}' cannot be taken out: make it with backend-add and \
             removable=true for that",
            b.name
        ))
    })
}

fn check_unlocked(model: &Model, id: BackendId, tray: Tray, force: bool) -> Result<()> {
    let b = model.backend(id);
    match &b.client {
        Some(c) if tray.locked && !force => Err(Error::new(
            ErrorKind::InUse,
            format!("the medium of backend '{}' is locked by {c}; 'force' opens it anyway", b.name),
        )),
        _ => Ok(()),
    }
}

fn check_open(model: &Model, id: BackendId, tray: Tray) -> Result<()> {
    if tray.open {
        return Ok(());
    }
    let text = format!(
        "the tray of backend '{}' is closed: open it with blockdev-open-tray",
        model.backend(id).name
    );
    Err(Error::new(ErrorKind::InUse, text))
}

/// The node that a backend's medium is.
fn medium(model: &Model, id: BackendId) -> Option<NodeId> {
    model.below_stack(model.backend(id)).map(|n| model.under_side(n))
}

/// Points a backend, under its client-side filters, at the top of a node's node-side ones, or at
/// nothing. A medium that nobody holds any more goes.
pub(crate) fn put(draft: &mut Draft<'_>, id: BackendId, node: Option<NodeId>) -> Result<()> {
    let edge = draft.cut_edge(draft.backend(id));
    let old = draft.edge(edge).target;
    let top = node.map(|n| draft.top_of(n));
    draft.repoint(edge, top)?;
    match old {
        Some(o) if Some(o) != top => draft.remove_orphan(o),
        _ => Ok(()),
    }
}

fn set_open(draft: &mut Draft<'_>, id: BackendId, open: bool) {
    if let Some(t) = &mut draft.backend_mut(id).tray {
        t.open = open;
    }
}

impl Graph {
    /// blockdev-open-tray: the client sees no medium any more, and what it had in flight is done.
    /// Says whether the tray moved.
    pub async fn open_tray(self: &Rc<Self>, id: BackendId, force: bool) -> Result<bool> {
        let mut model = self.state.lock().await;
        let tray = tray(&model, id)?;
        if tray.open {
            return Ok(false);
        }
        check_unlocked(&model, id, tray, force)?;
        let mut draft = Draft::new(&mut model);
        set_open(&mut draft, id, true);
        draft.keep();
        let live = model.backend(id).live.clone();
        live.hide(true);
        drop(live.root().drain().await);
        Ok(true)
    }

    /// blockdev-close-tray. Says whether the tray moved.
    pub async fn close_tray(self: &Rc<Self>, id: BackendId) -> Result<bool> {
        let mut model = self.state.lock().await;
        if !tray(&model, id)?.open {
            return Ok(false);
        }
        let mut draft = Draft::new(&mut model);
        set_open(&mut draft, id, false);
        draft.keep();
        model.backend(id).live.hide(false);
        Ok(true)
    }

    /// blockdev-remove-medium; without a medium there is nothing to do.
    pub async fn remove_medium(self: &Rc<Self>, id: BackendId) -> Result<()> {
        let mut model = self.state.lock().await;
        let tray = tray(&model, id)?;
        check_open(&model, id, tray)?;
        self.transact(&mut model, |draft| put(draft, id, None)).await.map(drop)
    }

    /// blockdev-insert-medium: the node becomes the medium; the client sees it once the tray is
    /// closed.
    pub async fn insert_medium(self: &Rc<Self>, id: BackendId, node: &str) -> Result<()> {
        let mut model = self.state.lock().await;
        let tray = tray(&model, id)?;
        check_open(&model, id, tray)?;
        if let Some(n) = medium(&model, id) {
            let text = format!(
                "backend '{}' has a medium already: '{}'",
                model.backend(id).name,
                model.node(n).name
            );
            return Err(Error::new(ErrorKind::InUse, text));
        }
        let node = model.find_node(node)?;
        self.transact(&mut model, |draft| put(draft, id, Some(node))).await.map(drop)
    }

    /// eject: opens the tray and removes the medium. Says whether the tray moved.
    pub async fn eject(self: &Rc<Self>, id: BackendId, force: bool) -> Result<bool> {
        let mut model = self.state.lock().await;
        let tray = tray(&model, id)?;
        if !tray.open {
            check_unlocked(&model, id, tray, force)?;
        }
        let live = model.backend(id).live.clone();
        // Later requests find no medium, earlier ones end on it.
        live.hide(true);
        let edit = |draft: &mut Draft<'_>| {
            set_open(draft, id, true);
            if !tray.open {
                draft.drain(draft.backend(id).root);
            }
            put(draft, id, None)
        };
        let done = self.transact(&mut model, edit).await.map(drop);
        live.hide(done.is_ok() || tray.open);
        done.map(|()| !tray.open)
    }

    /// blockdev-change-medium: opens the new image and puts it in the old one's place, all or
    /// nothing; then the tray is closed. Says whether the tray was open before.
    pub async fn change_medium(
        self: &Rc<Self>,
        id: BackendId,
        new: &Medium,
        force: bool,
    ) -> Result<bool> {
        let (mut options, _) = self.image_options(&new.filename, new.format.as_deref()).await?;
        let mut model = self.state.lock().await;
        let tray = tray(&model, id)?;
        check_unlocked(&model, id, tray, force)?;
        let read_only = match new.read_only {
            ReadOnlyMode::ReadOnly => true,
            ReadOnlyMode::ReadWrite => false,
            ReadOnlyMode::Retain => match medium(&model, id) {
                Some(n) => model.node(n).read_only,
                None => !model.backend(id).options.writable,
            },
        };
        options.insert("read-only".into(), json!(read_only));
        let at = || format!("new medium '{}'", new.filename);
        let tree = self.open_tree(&mut model, options).await.at(at)?;
        let mut filters = self.side_filters(&mut model, &tree);
        self.transact(&mut model, |draft| {
            let node = self.add_tree(draft, tree, &mut filters, false)?;
            put(draft, id, Some(node))?;
            set_open(draft, id, false);
            Ok(())
        })
        .await?;
        model.backend(id).live.hide(false);
        Ok(tray.open)
    }
}

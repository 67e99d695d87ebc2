//! transaction: several changes as one, at one point in time (mutators.md, rule 7 and the last row
//! of section 3).

use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result, ResultExt};

use crate::graph::Graph;
use crate::model::{Draft, Model, NodeId};
use crate::open::Tree;
use crate::snapshot::{SnapshotSync, overlay_edit, remove_file, warn_of_clear_data};

/// One change of a transaction.
#[derive(Clone, Debug)]
pub enum Action {
    /// blockdev-snapshot.
    Snapshot {
        /// The backend or node to be overlaid.
        disk: String,
        /// The overlay.
        overlay: String,
    },
    /// blockdev-snapshot-sync.
    SnapshotSync(SnapshotSync),
    /// Refuses the whole.
    Abort,
}

impl Action {
    /// Its name in the QMP reference.
    pub fn name(&self) -> &'static str {
        match self {
            Action::Snapshot { .. } => "blockdev-snapshot",
            Action::SnapshotSync(_) => "blockdev-snapshot-sync",
            Action::Abort => "abort",
        }
    }
}

/// An action with all that is slow about it done.
enum Ready {
    Snapshot { disk: NodeId, overlay: NodeId },
    SnapshotSync { disk: NodeId, overlay: Tree },
    Abort,
}

impl Ready {
    /// The disk and the name of the node that is put over it.
    fn put_over(&self, model: &Model) -> Option<(NodeId, String)> {
        match self {
            Ready::Snapshot { disk, overlay } => Some((*disk, model.node(*overlay).name.clone())),
            Ready::SnapshotSync { disk, overlay } => Some((*disk, overlay.name().to_owned())),
            Ready::Abort => None,
        }
    }
}

impl Graph {
    /// Carries out all actions or none, on one next graph that is checked once, at its end. An
    /// error says which action it is about.
    pub async fn transaction(self: &Rc<Self>, actions: Vec<Action>) -> Result<()> {
        let label = |i: usize, name: &str| format!("action {} ({name})", i + 1);
        let named = actions.into_iter().enumerate().map(|(i, a)| (label(i, a.name()), a));
        self.as_one(named.collect()).await
    }

    /// Makes (or takes) an image file, opens it and puts it over a disk. A file that it made is
    /// removed if a later step fails.
    pub async fn blockdev_snapshot_sync(self: &Rc<Self>, s: &SnapshotSync) -> Result<()> {
        let at = format!("overlay of '{}'", s.disk);
        self.as_one(vec![(at, Action::SnapshotSync(s.clone()))]).await
    }

    async fn as_one(self: &Rc<Self>, actions: Vec<(String, Action)>) -> Result<()> {
        let mut model = self.state.lock().await;
        let mut made = Vec::new();
        let done = self.carry_out(&mut model, actions, &mut made).await;
        if done.is_err() {
            for path in made {
                remove_file(&path).await;
            }
        }
        done
    }

    /// `made` are the files that were created on the way.
    async fn carry_out(
        self: &Rc<Self>,
        model: &mut Model,
        actions: Vec<(String, Action)>,
        made: &mut Vec<String>,
    ) -> Result<()> {
        let mut ready = Vec::new();
        for (at, a) in actions {
            let r = self.get_ready(model, a, made).await.at(|| at.clone())?;
            ready.push((at, r));
        }
        let overlays: Vec<_> = ready.iter().filter_map(|(_, r)| r.put_over(model)).collect();
        self.transact(model, |draft| {
            ready.into_iter().try_for_each(|(at, r)| self.edit(draft, r).at(|| at))
        })
        .await?;
        for (disk, overlay) in overlays {
            warn_of_clear_data(model, disk, model.find_node(&overlay)?).await;
        }
        Ok(())
    }

    async fn get_ready(
        self: &Rc<Self>,
        model: &mut Model,
        action: Action,
        made: &mut Vec<String>,
    ) -> Result<Ready> {
        match action {
            Action::Snapshot { disk, overlay } => Ok(Ready::Snapshot {
                disk: model.find_disk(&disk)?,
                overlay: model.find_node(&overlay)?,
            }),
            Action::SnapshotSync(s) => {
                let disk = model.find_disk(&s.disk)?;
                let (options, path) = self.overlay_options(model, disk, &s).await?;
                if !s.existing {
                    made.push(path);
                }
                Ok(Ready::SnapshotSync { disk, overlay: self.open_tree(model, options).await? })
            }
            Action::Abort => Ok(Ready::Abort),
        }
    }

    fn edit(self: &Rc<Self>, draft: &mut Draft<'_>, ready: Ready) -> Result<()> {
        match ready {
            Ready::Snapshot { disk, overlay } => overlay_edit(draft, disk, overlay),
            Ready::SnapshotSync { disk, overlay } => {
                if draft.lookup(overlay.name()).is_some() {
                    let text = format!("there is a node '{}' already", overlay.name());
                    return Err(Error::new(ErrorKind::Exists, text));
                }
                let o = self.add_tree(draft, overlay, &mut Vec::new(), true)?;
                overlay_edit(draft, disk, o)
            }
            Ready::Abort => Err(Error::new(
                ErrorKind::Cancelled,
                "the transaction asked for its own failure; nothing was changed",
            )),
        }
    }
}

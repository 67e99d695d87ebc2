//! The implicit throttle of a backend: made, moved to another group, removed
//! (block_set_io_throttle).

use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result};

use crate::graph::{Graph, owner_name};
use crate::model::{BackendId, Draft, Named, Owner};

impl Graph {
    /// The backend called `name`, for its throttle.
    ///
    /// # Errors
    /// A node of that name (limits of nodes are a throttle node's), or nothing of that name.
    pub async fn throttled_backend(&self, name: &str) -> Result<BackendId> {
        let model = self.state.lock().await;
        match model.lookup(name) {
            Some(Named::Backend(id)) => Ok(id),
            Some(Named::Node(_)) => Err(Error::invalid(format!(
                "'{name}' is a node, and limits like these belong to a client: to limit a node, \
                 add a throttle node over it with blockdev-add and put it in place with \
                 blockdev-replace"
            ))),
            None => Err(Error::new(ErrorKind::NotFound, format!("there is no backend '{name}'"))),
        }
    }

    /// The throttle group of a backend and the name that a group of its own would have.
    pub async fn throttle_of(&self, id: BackendId) -> Result<(Option<String>, String)> {
        let model = self.state.lock().await;
        let b = model.get_backend(id).ok_or_else(gone)?;
        Ok((b.throttle.clone(), b.name.clone()))
    }

    /// Makes a backend a member of the throttle group `group`, or of none. Its edge is drained
    /// only if that changes its filters; requests that wait in the old throttle go on in their
    /// order.
    pub async fn set_throttle(self: &Rc<Self>, id: BackendId, group: Option<&str>) -> Result<()> {
        let mut model = self.state.lock().await;
        let b = model.get_backend(id).ok_or_else(gone)?;
        if b.throttle.as_deref() == group {
            return Ok(());
        }
        let owner = owner_name(&b.name, b.client.as_deref().filter(|_| b.made_along));
        let filter = group.map(|g| self.throttle_filter(&mut model, g, &owner)).transpose()?;
        self.transact(&mut model, |draft| {
            let b = draft.backend(id);
            let root = b.root;
            let old = b.throttle.is_some().then(|| b.stack[0]);
            let below = match old {
                Some(o) => draft.edge(draft.node(o).children[0]).target,
                None => draft.edge(root).target,
            };
            let new = filter.map(|f| f.add(draft, Owner::Backend(id), below)).transpose()?;
            draft.repoint(root, new.or(below))?;
            put_on_top(draft, id, old.is_some(), new);
            draft.backend_mut(id).throttle = group.map(str::to_owned);
            old.map_or(Ok(()), |o| draft.remove_node(o))
        })
        .await
        .map(drop)
    }
}

fn put_on_top(
    draft: &mut Draft<'_>,
    id: BackendId,
    drop_first: bool,
    new: Option<crate::model::NodeId>,
) {
    let stack = &mut draft.backend_mut(id).stack;
    if drop_first {
        stack.remove(0);
    }
    if let Some(n) = new {
        stack.insert(0, n);
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::NotFound, "the backend is gone")
}

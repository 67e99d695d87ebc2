//! blockdev-add, blockdev-del.

use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result};
use serde_json::{Map, Value};

use crate::graph::Graph;
use crate::model::Model;

impl Graph {
    /// Adds the node that `options` describe, with its inline children (BlockdevOptions).
    pub async fn blockdev_add(self: &Rc<Self>, options: Map<String, Value>) -> Result<()> {
        if !options.contains_key("node-name") {
            return Err(Error::invalid(
                "option 'node-name' is missing: a node that is added must have a name",
            ));
        }
        let mut model = self.state.lock().await;
        self.add(&mut model, options, true).await.map(drop)
    }

    /// Opens and adds a node; gives its name.
    pub(crate) async fn add(
        self: &Rc<Self>,
        model: &mut Model,
        options: Map<String, Value>,
        by_user: bool,
    ) -> Result<String> {
        let tree = self.open_tree(model, options).await?;
        let name = tree.name().to_owned();
        let mut filters = self.side_filters(model, &tree);
        self.transact(model, |draft| self.add_tree(draft, tree, &mut filters, by_user).map(drop))
            .await?;
        Ok(name)
    }

    /// Removes the node called `name` and what only it held.
    pub async fn blockdev_del(self: &Rc<Self>, name: &str) -> Result<()> {
        let mut model = self.state.lock().await;
        let id = model.find_node(name)?;
        let users: Vec<String> =
            model.outer_parents(id).into_iter().map(|e| model.parent_name(model.edge(e))).collect();
        if !users.is_empty() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("node '{name}' is in use by {}", users.join(", ")),
            ));
        }
        if !model.node(id).added_by_user {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("node '{name}' was not added by blockdev-add"),
            ));
        }
        // What is unflushed goes out now, while a failure can still be told.
        model.node(id).live.clone().driver().flush().await?;
        self.transact(&mut model, |draft| {
            let top = draft.top_of(id);
            draft.node_mut(id).added_by_user = false;
            draft.remove_node(top)
        })
        .await
        .map(drop)
    }

    /// Flushes and removes everything: the end of the process.
    pub async fn close_all(self: &Rc<Self>) -> Result<()> {
        let mut model = self.state.lock().await;
        let backends: Vec<_> = model.backends().map(|(i, _)| i).collect();
        self.transact(&mut model, |draft| {
            backends.into_iter().try_for_each(|b| draft.remove_backend(b))
        })
        .await?;
        loop {
            let roots: Vec<_> =
                model.nodes().filter(|(_, n)| n.parents.is_empty()).map(|(i, _)| i).collect();
            if roots.is_empty() {
                return Ok(());
            }
            self.transact(&mut model, |draft| {
                for r in roots {
                    if draft.get_node(r).is_some() {
                        draft.remove_node(r)?;
                    }
                }
                Ok(())
            })
            .await?;
        }
    }
}

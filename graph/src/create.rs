//! Making new images: blockdev-create, and the overlay of blockdev-snapshot-sync.

use std::rc::Rc;

use gipfel_base::{Error, Result};
use gipfel_node::{Child, Common, CreateArgs, Kind, Perm, Perms};
use serde_json::{Map, Value, json};

use crate::graph::{BackendOptions, Graph};
use crate::model::Model;
use crate::snapshot::remove_file;

impl Graph {
    /// Makes the image that `options` (BlockdevCreateOptions) describe. Node references must name
    /// nodes that nobody else writes. `client` is the job's name for messages.
    pub async fn blockdev_create(
        self: &Rc<Self>,
        options: Map<String, Value>,
        client: &str,
    ) -> Result<()> {
        let mut o = options;
        let driver = o.remove("driver");
        let driver = driver.as_ref().and_then(Value::as_str).unwrap_or_default();
        let def = self.registry.get(driver)?;
        let create = def
            .create
            .ok_or_else(|| Error::unsupported(format!("driver '{driver}' cannot create images")))?;
        let mut children = Vec::new();
        let mut clients = Vec::new();
        let mut outcome = Ok(());
        for spec in def.children {
            let reference = match o.remove(spec.name) {
                Some(Value::String(n)) => n,
                Some(Value::Object(_)) => {
                    outcome = Err(Error::unsupported(format!(
                        "'{}' must be the name of a node: add it with blockdev-add first",
                        spec.name
                    )));
                    break;
                }
                _ => continue,
            };
            let want = BackendOptions { writable: true, resize: true, ..Default::default() };
            match self.attach(&reference, client, want).await {
                Ok((id, b)) => {
                    children.push((spec.name.to_owned(), b.root().clone()));
                    clients.push(id);
                }
                Err(e) => {
                    outcome = Err(e.context(format!("'{}'", spec.name)));
                    break;
                }
            }
        }
        if outcome.is_ok() {
            outcome = create(CreateArgs { options: Value::Object(o), children }).await;
        }
        for c in clients {
            self.detach(c).await?;
        }
        outcome
    }

    /// Makes the file `path` and in it an image as `options` (with `driver`) describe. Nothing is
    /// left of it on failure.
    pub(crate) async fn create_file(
        self: &Rc<Self>,
        model: &mut Model,
        path: &str,
        options: Value,
    ) -> Result<()> {
        let Value::Object(mut o) = options else {
            return Err(Error::invalid("create options must be an object"));
        };
        let driver = o.remove("driver");
        let def = self.registry.get(driver.as_ref().and_then(Value::as_str).unwrap_or_default())?;
        let protocol = self.registry.get(self.registry.file_protocol)?;
        let (Some(create), Some(create_file)) = (def.create, protocol.create) else {
            return Err(Error::unsupported(format!("format '{}' cannot be created", def.name)));
        };
        let file = json!({ "filename": path, "size": 0 });
        create_file(CreateArgs { options: file, children: Vec::new() }).await?;
        let made = async {
            if def.kind != Kind::Format {
                return Err(Error::invalid(format!("'{}' is no image format", def.name)));
            }
            let mut node = Map::new();
            node.insert("driver".into(), json!(protocol.name));
            node.insert("filename".into(), json!(path));
            let tree = self.open_tree(model, node).await?;
            let used = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
            let driver = tree.live().driver();
            driver.set_perms(Perms { used, shared: Perm::CONSISTENT_READ }).await?;
            let edge = Child::new("create.file", Some(tree.live().clone()));
            let children = vec![("file".to_owned(), edge)];
            create(CreateArgs { options: Value::Object(o), children }).await?;
            driver.close().await
        };
        let made = made.await;
        if made.is_err() {
            remove_file(path).await;
        }
        made
    }
}

/// The common options as they are written in options.
pub(crate) fn cache_value(c: &Common) -> Value {
    json!({ "writeback": true, "direct": c.direct, "no-flush": c.no_flush })
}

//! Images by file name, as command-line tools handle them: making one, checking one, telling what
//! one is. Nothing here keeps a node in the graph.

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_io::{File, OpenOptions};
use gipfel_node::{
    CheckArgs, CheckReport, Child, CreateArgs, DriverDef, Fix, IoFuture, Kind, Perm, Perms, Role,
};
use serde_json::{Map, Value, json};

use crate::graph::Graph;
use crate::model::{Model, NodeId};
use crate::open::Tree;
use crate::query::image_info;
use crate::snapshot::remove_file;

/// The common options that an image's file takes over from the image.
const INHERITED: [&str; 3] = ["read-only", "cache", "force-share"];

/// The members of ImageInfo, in the order in which the reference tools print them.
const ORDER: [&str; 12] = [
    "children",
    "backing-filename-format",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "actual-size",
    "format-specific",
    "full-backing-filename",
    "backing-filename",
    "encrypted",
    "dirty-flag",
];

impl Graph {
    /// Makes the image that the file name `name` means. `options` are those of
    /// BlockdevCreateOptions, `driver` and `size` included and the child `file` left out; the name
    /// of another child (`data-file`) is that of a file, which is made too. `hints` are further
    /// ones for making the file itself.
    ///
    /// An image that is there already is overwritten, unless it is in use. What was made new is
    /// removed again where the image cannot be made.
    pub async fn create_image(
        self: &Rc<Self>,
        name: &str,
        options: Map<String, Value>,
        hints: Map<String, Value>,
    ) -> Result<()> {
        let mut options = options;
        let driver = options.remove("driver");
        let def = self.registry.get(driver.as_ref().and_then(Value::as_str).unwrap_or_default())?;
        let node = self.name_means(name).await?.options;
        let protocol = node.get("driver").and_then(Value::as_str).unwrap_or_default();
        let protocol = self.registry.get(protocol)?;
        let path = node.get("filename").and_then(Value::as_str).unwrap_or_default().to_owned();
        if def.kind == Kind::Protocol {
            let create = creator(def)?;
            options.insert("filename".into(), json!(path));
            options.extend(hints);
            return create(CreateArgs { options: Value::Object(options), children: Vec::new() })
                .await;
        }
        if def.kind == Kind::Filter {
            return Err(Error::invalid(format!("'{}' is a filter, no image format", def.name)));
        }
        let (create, create_file) = (creator(def)?, creator(protocol)?);
        let mut files = vec![("file", path, node)];
        for spec in def.children.iter().filter(|c| c.name != "file") {
            let Some(v) = options.remove(spec.name) else { continue };
            let name = v.as_str().unwrap_or_default();
            let node = self.name_means(name).await?.options;
            let path = node.get("filename").and_then(Value::as_str).unwrap_or_default().to_owned();
            if node.get("driver").and_then(Value::as_str) != Some(protocol.name) {
                let text = format!("'{}' must be a file: '{name}' is none", spec.name);
                return Err(Error::unsupported(text));
            }
            files.push((spec.name, path, node));
        }
        let mut new = Vec::new();
        let made = async {
            for (_, path, _) in &files {
                if make_file(create_file, path, &hints).await? {
                    new.push(path.clone());
                }
            }
            let (mut trees, mut children) = (Vec::new(), Vec::new());
            for (child, _, mut node) in files {
                node.insert("discard".into(), json!("unmap"));
                let (tree, edge) = self.open_alone(node, true).await?;
                trees.push(tree);
                children.push((child.to_owned(), edge));
            }
            let mut made = create(CreateArgs { options: Value::Object(options), children }).await;
            for tree in trees {
                made = made.and(tree.live().driver().close().await);
            }
            made
        };
        let made = made.await;
        if made.is_err() {
            for path in new {
                remove_file(&path).await;
            }
        }
        made
    }

    /// Checks the metadata of the image that `options` (BlockdevOptions with the child `file`
    /// inline) describe. `None` where its format has no check.
    pub async fn check_image(
        self: &Rc<Self>,
        options: &Map<String, Value>,
        fix: Fix,
    ) -> Result<Option<CheckReport>> {
        let driver = options.get("driver").and_then(Value::as_str).unwrap_or_default();
        let Some(check) = self.registry.get(driver)?.check else {
            return Ok(None);
        };
        let Some(Value::Object(file)) = options.get("file") else {
            return Err(Error::invalid(format!(
                "child 'file' is missing: a check of format '{driver}' needs the image's file"
            )));
        };
        let mut file = file.clone();
        for key in INHERITED {
            if let Some(v) = options.get(key)
                && !file.contains_key(key)
            {
                file.insert(key.into(), v.clone());
            }
        }
        file.insert("discard".into(), json!("unmap"));
        let (tree, edge) = self.open_alone(file, fix != Fix::Nothing).await?;
        let report = check(CheckArgs { file: edge, fix }).await;
        // What was mended is written back even where the check could not end.
        let closed = tree.live().driver().close().await;
        let report = report?;
        closed.map(|()| Some(report))
    }

    /// Opens a node that stays out of the graph, for one user who shares it with readers only.
    async fn open_alone(
        self: &Rc<Self>,
        options: Map<String, Value>,
        writes: bool,
    ) -> Result<(Tree, Arc<Child>)> {
        let tree = self.open_tree(&mut Model::default(), options).await?;
        let mut used = Perm::CONSISTENT_READ;
        if writes {
            used = used | Perm::WRITE | Perm::RESIZE;
        }
        let perms = Perms { used, shared: Perm::CONSISTENT_READ };
        tree.live().driver().set_perms(perms).await?;
        let edge = Child::new("image.file", Some(tree.live().clone()));
        Ok((tree, edge))
    }

    /// ImageInfo of the node called `name`, with its children but without its backing image.
    pub async fn image_info(self: &Rc<Self>, name: &str) -> Result<Value> {
        let model = self.state.lock().await;
        let id = model.find_node(name)?;
        with_children(&model, id).await
    }

    /// The file in which each image of the chain under node `name` lies, the image itself first.
    pub async fn chain_files(self: &Rc<Self>, name: &str) -> Result<Vec<String>> {
        let model = self.state.lock().await;
        let mut at = Some(model.find_node(name)?);
        let mut files = Vec::new();
        while let Some(id) = at {
            let info = with_children(&model, id).await?;
            let file = info.pointer("/children/0/info/filename").or(info.get("filename"));
            files.push(file.and_then(Value::as_str).unwrap_or_default().to_owned());
            at = children(&model, id).find(|(_, role, _)| *role == Role::Backing).map(|c| c.2);
        }
        Ok(files)
    }
}

/// Makes the file `path`, unless it is there; says whether it was made.
async fn make_file(create: Create, path: &str, hints: &Map<String, Value>) -> Result<bool> {
    match File::open(Path::new(path), OpenOptions::default()).await {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        f => return f.map(|_| false),
    }
    let mut file = hints.clone();
    file.insert("filename".into(), json!(path));
    file.insert("size".into(), json!(0));
    create(CreateArgs { options: Value::Object(file), children: Vec::new() }).await?;
    Ok(true)
}

type Create = fn(CreateArgs) -> IoFuture<'static>;

fn creator(def: &DriverDef) -> Result<Create> {
    def.create
        .ok_or_else(|| Error::unsupported(format!("driver '{}' cannot create images", def.name)))
}

/// Names, roles and targets of a node's children, node-side filters looked through.
fn children(model: &Model, id: NodeId) -> impl Iterator<Item = (&str, Role, NodeId)> {
    let edges = model.node(id).children.iter().map(|e| model.edge(*e));
    edges.filter_map(|e| Some((&*e.name, e.role, model.under_side(e.target?))))
}

fn with_children(model: &Model, id: NodeId) -> IoFuture<'_, Value> {
    Box::pin(async move {
        let (mut info, _) = image_info(model, id).await.at(|| "looking at the image")?;
        let mut list = Vec::new();
        for (name, role, child) in children(model, id) {
            if role != Role::Backing {
                list.push(json!({ "name": name, "info": with_children(model, child).await? }));
            }
        }
        info.insert("children".into(), Value::Array(list));
        info.entry("dirty-flag").or_insert(json!(false));
        let mut ordered: Map<String, Value> =
            ORDER.iter().filter_map(|k| Some(((*k).to_owned(), info.remove(*k)?))).collect();
        ordered.extend(info);
        Ok(Value::Object(ordered))
    })
}

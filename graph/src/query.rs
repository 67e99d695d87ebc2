//! What the graph tells about itself, in the shapes of the QMP reference.

use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::{DriverInfo, Role};
use serde_json::{Map, Value, json};

use crate::backends::status_name;
use crate::copies::copies;
use crate::create::cache_value;
use crate::graph::Graph;
use crate::model::{Model, NodeId, Parent};

impl Graph {
    /// query-named-block-nodes (BlockDeviceInfo). Implicit filters are left out; with `flat` the
    /// backing images are not repeated inside each image.
    pub async fn query_nodes(self: &Rc<Self>, flat: bool) -> Result<Value> {
        let model = self.state.lock().await;
        let mut list = Vec::new();
        // Newest first, as the reference answers.
        let ids: Vec<_> = model.nodes().map(|(i, _)| i).collect();
        for id in ids.into_iter().rev() {
            let node = model.node(id);
            // A job's filter shows if the user gave it a name.
            if node.implicit.is_none() || node.job.is_some() && !node.name.starts_with('#') {
                list.push(node_info(&model, id, flat).await?);
            }
        }
        Ok(Value::Array(list))
    }

    /// query-block (BlockInfo): the backends that were made by name.
    pub async fn query_block(self: &Rc<Self>) -> Result<Value> {
        let model = self.state.lock().await;
        let mut list = Vec::new();
        let named: Vec<_> = model.backends().filter(|(_, b)| !b.made_along).collect();
        for (_, b) in named {
            let mut v = json!({
                "device": b.name,
                "type": "unknown",
                "removable": b.tray.is_some(),
                "locked": b.tray.is_some_and(|t| t.locked),
                "io-status": status_name(b.live.faults().status()),
            });
            if let Some(t) = b.tray {
                v["tray_open"] = json!(t.open);
            }
            if let Some(n) = model.below_stack(b) {
                v["inserted"] = node_info(&model, model.under_side(n), false).await?;
                if let Some(group) = &b.throttle {
                    v["inserted"]["group"] = json!(group);
                }
            }
            list.push(v);
        }
        Ok(Value::Array(list))
    }

    /// x-debug-query-block-graph (XDbgBlockGraph), implicit filters included.
    pub async fn query_graph(self: &Rc<Self>) -> Value {
        let model = self.state.lock().await;
        let node_ids: Vec<_> = model.nodes().map(|(i, _)| i).collect();
        let backend_ids: Vec<_> = model.backends().map(|(i, _)| i).collect();
        // Both lists ascend.
        let number = |p: Parent| match p {
            Parent::Node(n) => node_ids.binary_search(&n).unwrap_or(0) + 1,
            Parent::Backend(b) => node_ids.len() + backend_ids.binary_search(&b).unwrap_or(0) + 1,
        };
        let nodes = model.nodes().map(|(i, n)| {
            json!({ "id": number(Parent::Node(i)), "type": "block-driver", "name": n.name })
        });
        let backends = model.backends().map(|(i, b)| {
            let name = b.client.clone().unwrap_or_else(|| b.name.clone());
            json!({ "id": number(Parent::Backend(i)), "type": "block-backend", "name": name })
        });
        let nodes: Vec<_> = nodes.chain(backends).collect();
        let edges: Vec<_> = model
            .edges()
            .filter_map(|(_, e)| {
                let child = number(Parent::Node(e.target?));
                Some(json!({
                    "parent": number(e.parent),
                    "child": child,
                    "name": e.name,
                    "perm": e.perms.used.names().collect::<Vec<_>>(),
                    "shared-perm": e.perms.shared.names().collect::<Vec<_>>(),
                }))
            })
            .collect();
        nodes_and_edges(nodes, edges)
    }
}

/// The shape of both pictures of the graph. (`json!` would copy the lists, and they are long.)
pub(crate) fn nodes_and_edges(nodes: Vec<Value>, edges: Vec<Value>) -> Value {
    let lists = [("nodes", nodes), ("edges", edges)];
    lists.into_iter().map(|(name, list)| (name.to_owned(), Value::Array(list))).collect()
}

/// The node below child `role` of a node, node-side filters looked through.
fn child(model: &Model, id: NodeId, role: Role) -> Option<NodeId> {
    let edges = model.node(id).children.iter().map(|e| model.edge(*e));
    let target = edges.filter(|e| e.role == role).find_map(|e| e.target)?;
    Some(model.under_side(target))
}

/// The children in which a node's image lies, the likelier first.
const STORAGE: [Role; 3] = [Role::Image, Role::Filtered, Role::Data];

/// Options that say how an image is used, not which one it is.
const UNNAMED: [&str; 7] = [
    "node-name",
    "read-only",
    "auto-read-only",
    "cache",
    "discard",
    "detect-zeroes",
    "force-share",
];

/// The file name of a node's image: its own, or that of what lies below.
async fn filename(model: &Model, id: NodeId, info: &DriverInfo) -> String {
    if let Some(f) = &info.filename {
        return f.clone();
    }
    // A window of an image (options of format raw) is not that image.
    let window = |n| ["offset", "size"].iter().any(|k| model.node(n).options.contains_key(*k));
    let mut at = id;
    while !window(at)
        && let Some(next) = STORAGE.iter().find_map(|r| child(model, at, *r))
    {
        let below = model.node(next).live.clone();
        if let Ok(DriverInfo { filename: Some(f), .. }) = below.driver().info().await {
            return f;
        }
        at = next;
    }
    format!("json:{}", Value::Object(described(model, id)))
}

/// The options that mean a node's image. Children that come and go are those there are now, with
/// their own images in full.
fn described(model: &Model, id: NodeId) -> Map<String, Value> {
    let mut options = model.node(id).options.clone();
    for key in UNNAMED {
        options.remove(key);
    }
    for spec in model.node(id).live.def().children.iter().filter(|s| s.role == Role::Copy) {
        let targets = copies(model, id).filter_map(|(_, e)| e.target);
        let list = targets.map(|t| Value::Object(inlined(model, model.under_side(t))));
        options.insert(spec.name.into(), list.collect());
    }
    options
}

/// [`described`], with the children that are named in the options described in their place.
fn inlined(model: &Model, id: NodeId) -> Map<String, Value> {
    let mut options = described(model, id);
    for e in model.node(id).children.iter().map(|e| model.edge(*e)) {
        if let (Some(o), Some(t)) = (options.get_mut(&*e.name), e.target) {
            *o = Value::Object(inlined(model, model.under_side(t)));
        }
    }
    options
}

/// Whether what a node itself stores lies encrypted on storage, by itself or by a node that its
/// image lies in.
pub(crate) async fn is_encrypted(model: &Model, id: NodeId) -> bool {
    let mut at = Some(id);
    while let Some(n) = at {
        if model.node(n).live.driver().info().await.is_ok_and(|i| i.encrypted) {
            return true;
        }
        at = STORAGE.iter().find_map(|r| child(model, n, *r));
    }
    false
}

/// ImageInfo of one node, its backing image left out.
pub(crate) async fn image_info(
    model: &Model,
    id: NodeId,
) -> Result<(Map<String, Value>, DriverInfo)> {
    let node = model.node(id);
    let info = node.live.driver().info().await?;
    let mut m = Map::new();
    m.insert("filename".into(), filename(model, id, &info).await.into());
    m.insert("format".into(), node.live.def().name.into());
    m.insert("virtual-size".into(), node.live.size().into());
    let mut allocated = info.allocated;
    if allocated.is_none()
        && let Some(c) = STORAGE.iter().find_map(|r| child(model, id, *r))
    {
        allocated = model.node(c).live.clone().driver().info().await?.allocated;
    }
    if let Some(a) = allocated {
        m.insert("actual-size".into(), a.into());
    }
    if let Some(c) = info.cluster_size {
        m.insert("cluster-size".into(), c.into());
    }
    if let Some(d) = info.dirty {
        m.insert("dirty-flag".into(), d.into());
    }
    if let Some((name, format)) = &info.backing {
        m.insert("backing-filename".into(), name.clone().into());
        m.insert("full-backing-filename".into(), {
            let own = m["filename"].as_str().map(str::to_owned);
            crate::filename::relative_to(own.as_deref(), name).into()
        });
        if let Some(f) = format {
            m.insert("backing-filename-format".into(), f.clone().into());
        }
    }
    if let Some(s) = &info.specific {
        m.insert("format-specific".into(), s.clone());
    }
    if info.encrypted {
        m.insert("encrypted".into(), true.into());
    }
    Ok((m, info))
}

async fn node_info(model: &Model, id: NodeId, flat: bool) -> Result<Value> {
    let node = model.node(id);
    let (image, info) = image_info(model, id).await?;
    let mut chain = vec![id];
    while let Some(b) = chain.last().and_then(|n| child(model, *n, Role::Backing)) {
        if chain.contains(&b) {
            return Err(Error::new(ErrorKind::Corrupt, "the backing chain is a circle"));
        }
        chain.push(b);
    }
    let mut image = Value::Object(image);
    if !flat {
        let mut inner = None;
        for n in chain.iter().skip(1).rev() {
            let (mut m, _) = image_info(model, *n).await?;
            if let Some(i) = inner.take() {
                m.insert("backing-image".into(), i);
            }
            inner = Some(Value::Object(m));
        }
        if let Some(i) = inner {
            image["backing-image"] = i;
        }
    }
    let mut v = json!({
        "node-name": node.name,
        "drv": node.live.def().name,
        "file": image["filename"],
        "ro": node.read_only,
        "encrypted": info.encrypted,
        "active": true,
        "cache": cache_value(&node.common),
        "detect_zeroes": node.detect_zeroes.name(),
        "write_threshold": 0,
        "backing_file_depth": chain.len() - 1,
    });
    v["image"] = image;
    for limit in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
        v[limit] = json!(0);
    }
    if let Some(b) = v["image"].get("full-backing-filename").cloned() {
        v["backing_file"] = b;
    }
    Ok(v)
}

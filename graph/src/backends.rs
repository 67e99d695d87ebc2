//! Backends that are made before their client comes: backend-add, backend-del, query-backends, and
//! how clients take them and leave them.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use serde_json::{Map, Value, json};

use crate::backend::{Backend, Follow};
use crate::faults::IoStatus;
use crate::graph::{BackendOptions, Graph, NewMedium, client_perms};
use crate::model::{BackendId, BackendInfo, Draft, Model, Named};

/// What holds a medium that can be taken out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tray {
    /// The medium can be changed, and the client sees none.
    pub open: bool,
    /// The client wants to keep its medium.
    pub locked: bool,
}

impl Graph {
    /// Makes a backend without a client, on the node or the medium of the backend called `node`,
    /// or without a medium. A tray without a medium begins open.
    pub async fn backend_add(
        self: &Rc<Self>,
        options: BackendOptions,
        node: Option<&str>,
    ) -> Result<BackendId> {
        let name = options.name.clone().unwrap_or_default();
        let mut model = self.state.lock().await;
        model.check_backend_name(&name)?;
        let medium = node.map(|n| model.find_disk(n)).transpose()?.map(NewMedium::Node);
        let (id, live) = self.new_backend(&mut model, name, options, medium, None).await?;
        // One that has no medium and no tray either never gets any.
        live.hide(model.backend(id).tray.map_or(node.is_none(), |t| t.open));
        Ok(id)
    }

    /// Makes a backend without a client together with its medium, the node that `node`
    /// (BlockdevOptions) describes: all of it or nothing. The node goes with its last holder.
    pub async fn drive_add(
        self: &Rc<Self>,
        options: BackendOptions,
        node: Map<String, Value>,
    ) -> Result<BackendId> {
        let name = options.name.clone().unwrap_or_default();
        let mut model = self.state.lock().await;
        model.check_backend_name(&name)?;
        let tree = self.open_tree(&mut model, node).await?;
        let filters = self.side_filters(&mut model, &tree);
        let medium = Some(NewMedium::Tree(Box::new(tree), filters));
        Ok(self.new_backend(&mut model, name, options, medium, None).await?.0)
    }

    /// Removes a backend that has no client.
    pub async fn backend_del(self: &Rc<Self>, name: &str) -> Result<()> {
        let mut model = self.state.lock().await;
        let id = model.find_backend(name)?;
        if let Some(c) = &model.backend(id).client {
            return Err(Error::new(ErrorKind::InUse, format!("backend '{name}' is in use by {c}")));
        }
        self.transact(&mut model, |d| d.remove_backend(id))
            .await
            .map(drop)
            .at(|| format!("backend '{name}'"))
    }

    /// The backend called `name`.
    pub async fn backend_called(&self, name: &str) -> Result<BackendId> {
        self.state.lock().await.find_backend(name)
    }

    /// Gives a backend that is there already to a client that wants `options`.
    pub(crate) async fn take_backend(
        self: &Rc<Self>,
        model: &mut Model,
        id: BackendId,
        client: &str,
        options: &BackendOptions,
    ) -> Result<Arc<Backend>> {
        let b = model.backend(id);
        let name = &b.name;
        if let Some(c) = &b.client {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("backend '{name}' has a client already: {c}"),
            ));
        }
        if options.writable && !b.options.writable {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                format!("backend '{name}' was made read-only"),
            ));
        }
        let (live, made) = (b.live.clone(), b.options.clone());
        let perms = client_perms(options);
        self.transact(model, |draft| {
            let b = draft.backend_mut(id);
            (b.client, b.perms) = (Some(client.to_owned()), perms);
            let root = b.root;
            draft.edge_mut(root).perms = perms;
            Ok(())
        })
        .await?;
        live.set_writable(options.writable);
        live.set_write_through(options.write_through || made.write_through);
        live.faults().set_policies(made.on_read_error, made.on_write_error)?;
        Ok(live)
    }

    /// Lets a backend's client go with all that it holds; the backend stays.
    pub(crate) fn leave_backend(draft: &mut Draft<'_>, id: BackendId) {
        let b = draft.backend_mut(id);
        (b.client, b.perms) = (None, gipfel_node::Perms::IDLE);
        b.live.set_writable(false);
        if let Some(t) = &mut b.tray {
            t.locked = false;
        }
        let root = b.root;
        draft.edge_mut(root).perms = gipfel_node::Perms::IDLE;
    }

    /// query-backends: all backends, those that were made along with their clients included.
    pub async fn query_backends(&self) -> Value {
        let model = self.state.lock().await;
        model.backends().map(|(_, b)| describe(&model, b)).collect()
    }
}

fn describe(model: &Model, b: &BackendInfo) -> Value {
    let mut v = Map::new();
    let mut put = |k: &str, value: Value| drop(v.insert(k.to_owned(), value));
    put("name", json!(b.name));
    put("made-along", json!(b.made_along));
    if let Some(c) = &b.client {
        put("client", json!(c));
    }
    if let Some(n) = model.below_stack(b) {
        put("node-name", json!(model.node(model.under_side(n)).name));
    }
    put("size", json!(b.live.size()));
    put("writable", json!(b.options.writable));
    put("follow", json!(if b.follow == Follow::Node { "node" } else { "disk" }));
    put("removable", json!(b.tray.is_some()));
    if let Some(t) = b.tray {
        put("tray-open", json!(t.open));
        put("locked", json!(t.locked));
    }
    put("writethrough", json!(b.live.is_write_through() || b.options.write_through));
    put("rerror", json!(b.options.on_read_error.name()));
    put("werror", json!(b.options.on_write_error.name()));
    put("io-status", json!(status_name(b.live.faults().status())));
    if let Some(g) = &b.throttle {
        put("throttle-group", json!(g));
    }
    put("copy-on-read", json!(b.options.copy_on_read));
    put("detect-zeroes", json!(b.options.detect_zeroes.name()));
    let a = b.live.accounting();
    let [reads, writes, flushes] = [0, 1, 2].map(|i| a.requests[i].load(Ordering::Relaxed));
    let [read, written] = [0, 1].map(|i| a.bytes[i].load(Ordering::Relaxed));
    put(
        "accounting",
        json!({
            "read-operations": reads,
            "write-operations": writes,
            "flush-operations": flushes,
            "read-bytes": read,
            "written-bytes": written,
        }),
    );
    if let Some(d) = &b.options.drive {
        put("drive", Value::Object(d.clone()));
    }
    Value::Object(v)
}

/// Its name in the QMP reference (BlockDeviceIoStatus).
pub(crate) fn status_name(s: IoStatus) -> &'static str {
    match s {
        IoStatus::Ok => "ok",
        IoStatus::Failed => "failed",
        IoStatus::NoSpace => "nospace",
    }
}

impl Model {
    /// The backend of that name.
    pub fn find_backend(&self, name: &str) -> Result<BackendId> {
        match self.lookup(name) {
            Some(Named::Backend(id)) => Ok(id),
            Some(Named::Node(_)) => Err(Error::invalid(format!(
                "'{name}' is a node, no backend: a backend is what backend-add or --drive made"
            ))),
            None => Err(Error::new(ErrorKind::NotFound, format!("there is no backend '{name}'"))),
        }
    }
}

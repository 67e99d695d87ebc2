//! Opening, closing and reopening the image that commands work on.

use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::{Error, Result, ResultExt};
use gipfel_graph::{Backend, BackendId, BackendOptions, Graph, Model, NodeId};
use gipfel_node::{Node, Role};
use gipfel_qmp::keyval::{Style, parse};
use serde_json::{Map, Value, json};

use super::medium::Medium;
use super::words::Call;
use crate::img::open::{self, Cache, Named};
use crate::overlay;

/// What is to be opened.
#[derive(Debug, Default)]
pub struct Opening {
    /// Its file name, or option text.
    pub name: Option<String>,
    /// Whether `name` is option text.
    pub is_options: bool,
    /// Its format, if it was said.
    pub format: Option<String>,
    /// Option text beside the name.
    pub options: Vec<String>,
    /// For reading only.
    pub read_only: bool,
    /// Writes go to a temporary overlay.
    pub snapshot: bool,
    /// What is read from a backing image is kept.
    pub copy_on_read: bool,
    /// Although others use it.
    pub share: bool,
    /// Past the host's page cache, unless `cache` says otherwise.
    pub no_cache: bool,
    /// A cache mode.
    pub cache: Option<String>,
    /// What discards do.
    pub discard: Option<String>,
    /// As `aio` = native.
    pub native_aio: bool,
    /// An interface of the kernel.
    pub aio: Option<String>,
}

impl Opening {
    /// What the command `open` asks for.
    pub fn from_call(call: &Call<'_>) -> Result<Opening> {
        let owned = |letter| call.value(letter).map(str::to_owned);
        let o = Opening {
            name: call.args.first().map(|n| (*n).to_owned()),
            options: call.values('o').map(str::to_owned).collect(),
            read_only: call.has('r'),
            snapshot: call.has('s'),
            copy_on_read: call.has('C'),
            share: call.has('U'),
            no_cache: call.has('n'),
            cache: owned('t'),
            discard: owned('d'),
            native_aio: call.has('k'),
            aio: owned('i'),
            ..Opening::default()
        };
        if o.name.is_none() && o.options.is_empty() {
            return Err(call.def.usage_error("say what to open: a path, or -o options"));
        }
        Ok(o)
    }

    fn cache(&self) -> Result<Cache> {
        let usual = if self.no_cache { "none" } else { "writeback" };
        Cache::parse(self.cache.as_deref().unwrap_or(usual))
    }

    fn discard(&self) -> Result<&'static str> {
        match self.discard.as_deref() {
            None | Some("unmap" | "on") => Ok("unmap"),
            Some("ignore" | "off") => Ok("ignore"),
            Some(d) => Err(Error::invalid(format!("discard is 'unmap' or 'ignore', not '{d}'"))),
        }
    }

    fn aio(&self) -> Result<Option<&str>> {
        match self.aio.as_deref() {
            None => Ok(self.native_aio.then_some("native")),
            Some(a @ ("threads" | "native" | "io_uring")) => Ok(Some(a)),
            Some(a) => {
                Err(Error::invalid(format!("aio is 'threads', 'native' or 'io_uring', not '{a}'")))
            }
        }
    }
}

/// The open image.
pub struct Image {
    graph: Rc<Graph>,
    /// Its backend's name.
    pub name: String,
    id: BackendId,
    /// Its disk.
    pub medium: Medium,
    writable: bool,
    cache: Cache,
}

const CLIENT: &str = "this command";

impl Image {
    /// Opens an image under a backend called `name`.
    pub async fn open(graph: &Rc<Graph>, name: String, o: &Opening) -> Result<Image> {
        let (cache, discard, aio) = (o.cache()?, o.discard()?, o.aio()?);
        if o.copy_on_read && o.read_only {
            return Err(Error::invalid("copy-on-read writes to the image: leave read-only out"));
        }
        let all = o.options.join(",");
        let (file, options) = match &o.name {
            Some(file) => (file.as_str(), &*all),
            None => (&*all, ""),
        };
        let named = Named {
            name: file,
            format: o.format.as_deref(),
            is_options: o.is_options || o.name.is_none(),
            cache,
            share: o.share,
            // An image under a temporary overlay is only read.
            writable: !o.read_only && !o.snapshot,
            discard: Some(discard),
            options,
            ..Named::default()
        };
        let at = || format!("cannot open '{file}'");
        let found = open::find(graph, named).await.at(at)?;
        let guessed = found.warn_of_guess(graph, file);
        let mut node = found.options;
        open::guard_guess(&mut node, guessed && named.writable);
        if let Some(aio) = aio {
            set_aio(&mut node, graph.registry().file_protocol, aio);
        }
        let made = BackendOptions {
            name: Some(name.clone()),
            writable: true,
            copy_on_read: o.copy_on_read,
            ..BackendOptions::default()
        };
        graph.drive_add(made, node).await.at(at)?;
        let attached = async {
            if o.snapshot {
                overlay::add(graph, &name).await?;
            }
            attach(graph, &name, !o.read_only, cache).await
        };
        match attached.await {
            Ok((id, backend)) => Ok(Image {
                medium: Medium::new(backend),
                graph: graph.clone(),
                name,
                id,
                writable: !o.read_only,
                cache,
            }),
            Err(e) => {
                graph.backend_del(&name).await?;
                Err(e.context(at()))
            }
        }
    }

    /// Whether commands may write to it.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Its node.
    pub async fn node(&self) -> Result<Arc<Node>> {
        let model = self.graph.model().await;
        Ok(model.node(model.find_disk(&self.name)?).live.clone())
    }

    /// Writes back what is only in memory, and closes it.
    pub async fn close(self) -> Result<()> {
        self.graph.detach(self.id).await?;
        self.graph.backend_del(&self.name).await
    }

    /// Changes its options as the command `reopen` says. No request is under way.
    pub async fn reopen(&mut self, call: &Call<'_>) -> Result<()> {
        let refuse = |text: &str| Err(call.def.usage_error(text));
        if call.values('r').chain(call.values('w')).count() > 1 {
            return refuse("give one of -r and -w, once");
        }
        let text = call.values('o').collect::<Vec<_>>().join(",");
        let Value::Object(mut changes) = parse(&text, Style::default())? else {
            return refuse("-o takes key=value pairs");
        };
        let read_only = match (call.has('r') || call.has('w'), changes.remove("read-only")) {
            (true, Some(_)) => return refuse("-r and -w exclude the option read-only"),
            (true, None) => call.has('r'),
            (false, Some(v)) => is_on(&v)?,
            (false, None) => !self.writable,
        };
        let mut cache = self.cache;
        if let Some(mode) = call.value('c') {
            if changes.contains_key("cache") {
                return refuse("-c excludes the options cache.*");
            }
            cache = Cache::parse(mode)?;
            let part = json!({ "direct": cache.direct, "no-flush": cache.no_flush });
            changes.insert("cache".into(), part);
        }
        // The client lets go of its permissions, so that the nodes may become read-only.
        self.graph.detach(self.id).await?;
        let done = self.change(changes, read_only).await;
        if done.is_ok() {
            (self.writable, self.cache) = (!read_only, cache);
        }
        let (id, backend) = attach(&self.graph, &self.name, self.writable, self.cache).await?;
        self.id = id;
        self.medium = Medium::new(backend);
        done
    }

    async fn change(&self, changes: Map<String, Value>, read_only: bool) -> Result<()> {
        let mut list = Vec::new();
        {
            let model = self.graph.model().await;
            let top = model.find_disk(&self.name)?;
            options_below(&model, top, changes, read_only, &mut list)?;
        }
        self.graph.blockdev_reopen(list).await
    }
}

async fn attach(
    graph: &Rc<Graph>,
    name: &str,
    writable: bool,
    cache: Cache,
) -> Result<(BackendId, Arc<Backend>)> {
    let want = BackendOptions {
        writable,
        resize: writable,
        write_through: cache.write_through,
        ..BackendOptions::default()
    };
    graph.attach(name, CLIENT, want).await
}

/// Sets the option `aio` of the files in a node's options.
fn set_aio(options: &mut Map<String, Value>, protocol: &str, aio: &str) {
    if options.get("driver").and_then(Value::as_str) == Some(protocol) {
        options.entry("aio").or_insert_with(|| aio.into());
    }
    for child in options.values_mut().filter_map(Value::as_object_mut) {
        set_aio(child, protocol, aio);
    }
}

fn is_on(v: &Value) -> Result<bool> {
    match v.as_str() {
        Some("on") => Ok(true),
        Some("off") => Ok(false),
        _ => Err(Error::invalid(format!("read-only is 'on' or 'off', not {v}"))),
    }
}

/// The options for a reopen of `node` and of what it stores its image in, with the changes; its
/// children stay who they are.
fn options_below(
    model: &Model,
    node: NodeId,
    mut changes: Map<String, Value>,
    read_only: bool,
    list: &mut Vec<Map<String, Value>>,
) -> Result<()> {
    let info = model.node(node);
    let mut options = info.options.clone();
    // No option of a user; the format keeps it.
    options.remove(open::GUESSED);
    let mut none = Vec::new();
    let mut below = Vec::new();
    let mut named = |key: &str, v: Value| drop(options.insert(key.to_owned(), v));
    for edge in info.children.iter().map(|e| model.edge(*e)).filter(|e| e.role != Role::Copy) {
        let Some(target) = edge.target.map(|t| model.under_side(t)) else {
            none.push(edge.name.to_string());
            continue;
        };
        named(&edge.name, model.node(target).name.clone().into());
        let changes = match changes.remove(&*edge.name) {
            Some(Value::Object(m)) => m,
            Some(other) => {
                named(&edge.name, other);
                continue;
            }
            None => Map::new(),
        };
        if edge.role != Role::Backing {
            below.push((target, changes, read_only));
        } else if !changes.is_empty() {
            below.push((target, changes, true));
        }
    }
    named("driver", info.live.def().name.into());
    named("read-only", read_only.into());
    match changes.remove("node-name") {
        Some(n) if n != info.name.as_str() => {
            return Err(Error::invalid(format!("node '{}' keeps its name", info.name)));
        }
        _ => named("node-name", info.name.clone().into()),
    }
    options.extend(changes);
    none.iter().for_each(|n| drop(options.remove(n)));
    let mut options = open::typed(options)?;
    options.extend(none.into_iter().filter(|n| n == "backing").map(|n| (n, Value::Null)));
    list.push(options);
    below.into_iter().try_for_each(|(n, c, ro)| options_below(model, n, c, ro, list))
}

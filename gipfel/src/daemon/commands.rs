//! What each QMP command does: arguments to calls of the graph, the exports, the jobs.

use std::future::{Future, ready};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_exports::NewExport;
use gipfel_exports::nbd::{Removal, ServerOptions};
use gipfel_graph::{Action, BackendOptions, ChildChange, Graph, ReplaceEdges, SnapshotSync};
use gipfel_qmp::Registry;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::{Daemon, address, backends};

pub type Args = Map<String, Value>;

/// Registers every command.
pub fn register(r: &mut Registry<Rc<Daemon>>) {
    graph(r);
    queries(r);
    exports(r);
    jobs(r);
    super::objects::register(r);
    super::throttle::register(r);
    backends::register(r);
    r.add("quit", |d: Rc<Daemon>, _: Args| async move {
        d.quit("host-qmp-quit");
        Ok(())
    });
}

/// Either of the two ways to name a disk.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Disk {
    device: Option<String>,
    node_name: Option<String>,
}

impl Disk {
    fn name(self) -> Result<String> {
        match (self.device, self.node_name) {
            (Some(n), None) | (None, Some(n)) => Ok(n),
            _ => Err(Error::invalid("give either 'device' or 'node-name'")),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sync {
    #[serde(flatten)]
    disk: Disk,
    snapshot_file: String,
    snapshot_node_name: Option<String>,
    format: Option<String>,
    mode: Option<String>,
}

impl Sync {
    fn snapshot(self) -> Result<SnapshotSync> {
        Ok(SnapshotSync {
            disk: self.disk.name()?,
            file: self.snapshot_file,
            node_name: self.snapshot_node_name,
            format: self.format.unwrap_or_else(|| "qcow2".into()),
            existing: self.mode.as_deref() == Some("existing"),
        })
    }
}

/// One TransactionAction.
fn action(v: Value) -> Result<Action> {
    let data = v.get("data").cloned().unwrap_or_default();
    let wrong = |e: serde_json::Error| Error::invalid(e.to_string());
    match v["type"].as_str().unwrap_or_default() {
        "abort" => Ok(Action::Abort),
        "blockdev-snapshot" => {
            let Snapshot { node, overlay } = serde_json::from_value(data).map_err(wrong)?;
            Ok(Action::Snapshot { disk: node, overlay })
        }
        "blockdev-snapshot-sync" => {
            let s: Sync = serde_json::from_value(data).map_err(wrong)?;
            Ok(Action::SnapshotSync(s.snapshot()?))
        }
        other => Err(Error::unsupported(format!("a transaction has no action '{other}'"))),
    }
}

#[derive(Deserialize)]
struct Resize {
    #[serde(flatten)]
    disk: Disk,
    size: u64,
    #[serde(default)]
    shrink: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Del {
    node_name: String,
}

#[derive(Deserialize)]
struct ReopenList {
    options: Vec<Args>,
}

#[derive(Deserialize)]
struct Snapshot {
    node: String,
    overlay: String,
}

#[derive(Deserialize)]
struct Replace {
    edge: Option<String>,
    node: Option<String>,
    #[serde(default)]
    all: bool,
    with: String,
}

impl Replace {
    fn edges(self) -> Result<ReplaceEdges> {
        match (self.edge, self.node) {
            (Some(e), None) => Ok(ReplaceEdges::Named(e)),
            (None, Some(n)) if self.all => Ok(ReplaceEdges::AllOf(n)),
            (None, Some(n)) => Ok(ReplaceEdges::OnlyOf(n)),
            _ => Err(Error::invalid("give either 'edge' or 'node'")),
        }
    }
}

#[derive(Deserialize)]
struct ChangeChild {
    parent: String,
    node: Option<String>,
    child: Option<String>,
}

impl ChangeChild {
    fn change(self) -> Result<ChildChange> {
        match (self.node, self.child) {
            (Some(n), None) => Ok(ChildChange::Add(n)),
            (None, Some(c)) => Ok(ChildChange::Remove(c)),
            _ => Err(Error::invalid(
                "give either 'node', which becomes a child, or 'child', which goes",
            )),
        }
    }
}

/// A change of a graph under way.
pub type Change = Pin<Box<dyn Future<Output = Result<()>>>>;

/// A command that changes the graph and nothing else, so that it can be rehearsed: its name, and
/// what carries it out on a graph.
pub type Mutator = (&'static str, fn(Rc<Daemon>, Rc<Graph>, Args) -> Change);

/// Reads the arguments and does `f` with them.
pub fn with<T: DeserializeOwned, F: Future<Output = Result<()>> + 'static>(
    a: Args,
    f: impl FnOnce(T) -> F,
) -> Change {
    match serde_json::from_value(Value::Object(a)) {
        Ok(a) => Box::pin(f(a)),
        Err(e) => Box::pin(ready(Err(Error::invalid(e.to_string())))),
    }
}

/// The mutators that name nodes.
const MUTATORS: [Mutator; 6] = [
    ("blockdev-add", |_, g, a| Box::pin(async move { g.blockdev_add(a).await })),
    ("blockdev-del", |_, g, a| with(a, |a: Del| async move { g.blockdev_del(&a.node_name).await })),
    ("blockdev-reopen", |_, g, a| {
        with(a, |a: ReopenList| async move { g.blockdev_reopen(a.options).await })
    }),
    ("blockdev-snapshot", |_, g, a| {
        with(a, |a: Snapshot| async move { g.blockdev_snapshot(&a.node, &a.overlay).await })
    }),
    ("blockdev-replace", |_, g, a| {
        with(a, |a: Replace| async move {
            let new = a.with.clone();
            g.blockdev_replace(&a.edges()?, &new).await
        })
    }),
    ("x-blockdev-change", |_, g, a| {
        with(a, |a: ChangeChild| async move {
            let parent = a.parent.clone();
            g.blockdev_change(&parent, &a.change()?).await
        })
    }),
];

/// All commands that can be rehearsed.
fn mutators() -> impl Iterator<Item = Mutator> {
    MUTATORS.into_iter().chain(backends::MUTATORS)
}

async fn rehearse(d: Rc<Daemon>, a: Args) -> Result<Value> {
    let command = a.get("execute").and_then(Value::as_str).unwrap_or_default();
    let (_, mutate) = mutators().find(|(name, _)| *name == command).ok_or_else(|| {
        Error::unsupported(format!(
            "'{command}' cannot be rehearsed: only commands that change the graph and nothing \
             else can"
        ))
    })?;
    let mut arguments = a.get("arguments").cloned().unwrap_or_else(|| json!({}));
    if let Some(c) = d.schema.command(command) {
        d.schema.check_arguments(c, &mut arguments)?;
    }
    let Value::Object(arguments) = arguments else {
        return Err(Error::invalid("'arguments' must be an object"));
    };
    let change = |g| mutate(d.clone(), g, arguments);
    let (before, after) = d.graph.rehearse(change).await?;
    Ok(json!({ "before": before, "after": after }))
}

fn graph(r: &mut Registry<Rc<Daemon>>) {
    for (name, mutate) in mutators() {
        r.add(name, move |d: Rc<Daemon>, a: Args| {
            let g = d.graph.clone();
            mutate(d, g, a)
        });
    }
    r.add("graph-rehearse", rehearse);
    r.add("query-graph", |d: Rc<Daemon>, _: Args| async move { Ok(d.graph.query_picture().await) });
    r.add("blockdev-snapshot-sync", |d: Rc<Daemon>, a: Sync| async move {
        d.graph.blockdev_snapshot_sync(&a.snapshot()?).await
    });
    r.add("transaction", |d: Rc<Daemon>, a: Args| async move {
        let list = match a.get("actions") {
            Some(Value::Array(l)) => l.clone(),
            _ => Vec::new(),
        };
        let actions: Result<Vec<Action>> = list.into_iter().map(action).collect();
        d.graph.transaction(actions?).await
    });
    r.add("block_resize", |d: Rc<Daemon>, a: Resize| async move {
        d.graph.block_resize(&a.disk.name()?, a.size, a.shrink).await
    });
}

fn queries(r: &mut Registry<Rc<Daemon>>) {
    r.add("query-named-block-nodes", |d: Rc<Daemon>, a: Args| async move {
        let flat = a.get("flat").and_then(Value::as_bool).unwrap_or(false);
        d.graph.query_nodes(flat).await
    });
    r.add("x-debug-query-block-graph", |d: Rc<Daemon>, _: Args| async move {
        Ok(d.graph.query_graph().await)
    });
}

fn exports(r: &mut Registry<Rc<Daemon>>) {
    r.add(
        "nbd-server-start",
        |d: Rc<Daemon>, a: Args| async move { nbd_server_start(&d, a).await },
    );
    r.add("nbd-server-stop", |d: Rc<Daemon>, _: Args| async move { d.exports.stop_nbd().await });
    r.add("nbd-server-add", |d: Rc<Daemon>, mut a: Args| async move {
        let node = a.remove("device").unwrap_or_default();
        let name = a.get("name").cloned().unwrap_or_else(|| node.clone());
        a.insert("node-name".into(), node);
        // The old command has no ids; the export's name serves as one.
        a.insert("id".into(), name);
        a.insert("type".into(), "nbd".into());
        export_add(&d, a).await
    });
    r.add("nbd-server-remove", |d: Rc<Daemon>, a: Args| async move {
        let name = a.get("name").and_then(Value::as_str).unwrap_or_default();
        let id = d.exports.id_of(name).ok_or_else(|| {
            let text = format!("the NBD server has no export named '{name}'");
            Error::new(ErrorKind::NotFound, text)
        })?;
        d.exports.remove(&id, removal(&a))
    });
    r.add("block-export-add", |d: Rc<Daemon>, a: Args| async move { export_add(&d, a).await });
    r.add("block-export-del", |d: Rc<Daemon>, a: Args| async move {
        let id = a.get("id").and_then(Value::as_str).unwrap_or_default();
        d.exports.remove(id, removal(&a))
    });
    r.add("query-block-exports", |d: Rc<Daemon>, _: Args| async move {
        let list = d.exports.list().into_iter().map(|e| {
            json!({
                "id": e.id,
                "type": "nbd",
                "node-name": e.node,
                "shutting-down": e.shutting_down,
            })
        });
        Ok(list.collect::<Value>())
    });
}

fn removal(a: &Args) -> Removal {
    match a.get("mode").and_then(Value::as_str) {
        Some("hard") => Removal::Hard,
        _ => Removal::Soft,
    }
}

/// nbd-server-start and --nbd-server.
pub async fn nbd_server_start(d: &Rc<Daemon>, mut a: Args) -> Result<()> {
    for key in ["tls-creds", "tls-authz"] {
        if a.contains_key(key) {
            return Err(Error::unsupported(format!("'{key}': this version has no TLS")));
        }
    }
    let addr = match a.remove("addr") {
        Some(Value::Object(m)) => address::read(m).await?,
        _ => return Err(Error::invalid("'addr' is missing: say where to listen")),
    };
    let mut options = ServerOptions::default();
    if let Some(n) = a.get("max-connections").and_then(Value::as_u64) {
        options.max_connections = n as usize;
    }
    if let Some(s) = a.get("handshake-max-seconds").and_then(Value::as_u64) {
        options.handshake_limit = Duration::from_secs(s);
    }
    d.exports.start_nbd(&addr, options).await.map(drop)
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Export {
    id: String,
    node_name: String,
    name: Option<String>,
    description: Option<String>,
    #[serde(default)]
    writable: bool,
    #[serde(default)]
    writethrough: bool,
    iothread: Option<Value>,
    #[serde(default)]
    fixed_iothread: bool,
    #[serde(default)]
    bitmaps: Vec<Value>,
    #[serde(default)]
    allocation_depth: bool,
    bitmap: Option<Value>,
    follow: Option<String>,
}

/// block-export-add and --export.
pub async fn export_add(d: &Rc<Daemon>, a: Args) -> Result<()> {
    let e: Export = serde_json::from_value(Value::Object(a))
        .map_err(|e| Error::invalid(format!("export options: {e}")))?;
    if !e.bitmaps.is_empty() || e.bitmap.is_some() {
        return Err(Error::unsupported("'bitmaps': this version shows no dirty bitmaps"));
    }
    if e.allocation_depth {
        return Err(Error::unsupported("'allocation-depth': not offered by this version"));
    }
    if let Some(Value::String(t)) = &e.iothread {
        // Any I/O thread serves any node; the name only has to exist.
        d.objects.check_iothread(t)?;
    } else if e.fixed_iothread {
        return Err(Error::invalid("'fixed-iothread' needs 'iothread'"));
    }
    let follow = backends::follow(e.follow.as_deref());
    let new = NewExport {
        id: e.id,
        node: e.node_name,
        name: e.name,
        description: e.description,
        writable: e.writable,
        writethrough: e.writethrough,
        backend: BackendOptions { follow, ..BackendOptions::default() },
    };
    d.exports.add(new).await
}

fn jobs(r: &mut Registry<Rc<Daemon>>) {
    r.add("blockdev-create", |d: Rc<Daemon>, mut a: Args| async move {
        let id = match a.remove("job-id") {
            Some(Value::String(s)) => s,
            _ => String::new(),
        };
        let options = match a.remove("options") {
            Some(Value::Object(m)) => m,
            _ => Map::new(),
        };
        let (graph, client) = (d.graph.clone(), format!("job '{id}'"));
        let work = async move { graph.blockdev_create(options, &client).await };
        d.jobs.start(&id, gipfel_jobs::Kind::Create, work)
    });
    r.add("query-jobs", |d: Rc<Daemon>, _: Args| async move {
        let list = d.jobs.query().into_iter().map(|j| {
            let mut v = json!({
                "id": j.id,
                "type": j.kind.name(),
                "status": j.status.name(),
                "current-progress": j.current,
                "total-progress": j.total,
            });
            if let Some(e) = j.error {
                v["error"] = json!(e);
            }
            v
        });
        Ok(list.collect::<Value>())
    });
    r.add("job-dismiss", |d: Rc<Daemon>, a: Args| async move {
        d.jobs.dismiss(a.get("id").and_then(Value::as_str).unwrap_or_default())
    });
}

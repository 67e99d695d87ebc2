//! The storage daemon: the graph, its exports, jobs and objects, and the monitors that command it.

mod address;
mod chardev;
pub mod cli;
mod commands;
mod events;
mod monitor;
pub mod objects;
mod throttle;

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;

use event_listener::Event;
use gipfel_base::{Error, Result, ResultExt};
use gipfel_exports::Exports;
use gipfel_graph::Graph;
use gipfel_io::signals::Signals;
use gipfel_io::{Runtime, spawn_local};
use gipfel_jobs::Jobs;
use gipfel_qmp::keyval::Style;
use gipfel_qmp::{Registry, Schema, Version};
use serde_json::{Map, Value, json};

use crate::drivers;
use events::Events;
use objects::Objects;

/// The version of the protocol that is spoken: that of the reference it is compared with.
fn version() -> Version {
    let package = format!("gipfel {}", env!("CARGO_PKG_VERSION"));
    Version { major: 10, minor: 0, micro: 2, package }
}

/// What all parts of a running daemon share. Lives on the control thread.
pub struct Daemon {
    /// The graph.
    pub graph: Rc<Graph>,
    /// What is served.
    pub exports: Rc<Exports>,
    /// Jobs.
    pub jobs: Rc<Jobs>,
    /// Objects beside the graph.
    pub objects: Objects,
    events: Rc<Events>,
    commands: Registry<Rc<Daemon>>,
    schema: &'static Schema,
    chardevs: chardev::Chardevs,
    end: Cell<Option<&'static str>>,
    ended: Event,
}

/// One option of the command line, in the order of its appearance.
#[derive(Clone, Debug)]
pub enum Setup {
    /// `--object`
    Object(String),
    /// `--blockdev`
    Blockdev(String),
    /// `--nbd-server`
    NbdServer(String),
    /// `--export`
    Export(String),
    /// `--chardev`
    Chardev(String),
    /// `--monitor`
    Monitor(String),
}

/// How a daemon is started.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Options in order.
    pub setup: Vec<Setup>,
    /// Where the process id is written.
    pub pidfile: Option<PathBuf>,
    /// Number of I/O threads.
    pub io_threads: usize,
}

impl Daemon {
    /// A daemon with nothing in it, whose connections live on the threads of `runtime`.
    pub fn new(runtime: &Runtime) -> Result<Rc<Daemon>> {
        let schema = Schema::builtin()?;
        let objects = Objects::default();
        let graph = Graph::new(drivers::registry(&objects));
        let events = Events::new(schema);
        let (on_deleted, on_change) = (events.clone(), events.clone());
        let exports = Exports::new(
            graph.clone(),
            runtime.io_threads(),
            Box::new(move |id| on_deleted.emit("BLOCK_EXPORT_DELETED", json!({ "id": id }))),
        );
        let jobs = Jobs::new(Box::new(move |id, s| {
            on_change.emit("JOB_STATUS_CHANGE", json!({ "id": id, "status": s.name() }));
        }));
        let mut commands = Registry::new(schema, version());
        commands::register(&mut commands);
        commands.check()?;
        Ok(Rc::new(Daemon {
            graph,
            exports,
            jobs,
            objects,
            events,
            commands,
            schema,
            chardevs: chardev::Chardevs::default(),
            end: Cell::new(None),
            ended: Event::new(),
        }))
    }

    /// Carries out one option of the command line.
    pub async fn set_up(self: &Rc<Self>, s: &Setup) -> Result<()> {
        let read = |ty, text: &str, implied| self.option(ty, text, implied);
        match s {
            Setup::Object(t) => {
                let v = read("ObjectOptions", t, Some("qom-type")).at(|| "--object")?;
                self.objects.add(v).at(|| "--object")
            }
            Setup::Blockdev(t) => {
                let v = read("BlockdevOptions", t, Some("driver")).at(|| "--blockdev")?;
                self.graph.blockdev_add(v).await.at(|| "--blockdev")
            }
            Setup::NbdServer(t) => {
                let v = read("NbdServerOptions", t, None).at(|| "--nbd-server")?;
                commands::nbd_server_start(self, v).await.at(|| "--nbd-server")
            }
            Setup::Export(t) => {
                let v = read("BlockExportOptions", t, Some("type")).at(|| "--export")?;
                commands::export_add(self, v).await.at(|| "--export")
            }
            Setup::Chardev(t) => {
                let style = Style { implied: Some("backend"), switches: true };
                let v = self.schema.read_option("ChardevOptions", t, style);
                self.chardevs.add(v.at(|| "--chardev")?).at(|| "--chardev")
            }
            Setup::Monitor(t) => {
                let v = read("MonitorOptions", t, Some("chardev")).at(|| "--monitor")?;
                self.add_monitor(v).await.at(|| "--monitor")
            }
        }
    }

    fn option(
        &self,
        ty: &str,
        text: &str,
        implied: Option<&'static str>,
    ) -> Result<Map<String, Value>> {
        let style = Style { implied, switches: false };
        match self.schema.read_option(ty, text, style)? {
            Value::Object(m) => Ok(m),
            _ => Err(Error::invalid("options must be key=value pairs or a JSON object")),
        }
    }

    async fn add_monitor(self: &Rc<Self>, v: Map<String, Value>) -> Result<()> {
        let chardev = v.get("chardev").and_then(Value::as_str).unwrap_or_default();
        let pretty = v.get("pretty").and_then(Value::as_bool).unwrap_or(false);
        self.chardevs.start(self, chardev, pretty).await
    }

    /// Asks the daemon to end; `reason` is a ShutdownCause.
    pub fn quit(&self, reason: &'static str) {
        if self.end.get().is_none() {
            self.end.set(Some(reason));
            self.ended.notify(usize::MAX);
        }
    }

    async fn quit_asked(&self) -> &'static str {
        loop {
            let l = self.ended.listen();
            if let Some(r) = self.end.get() {
                return r;
            }
            l.await;
        }
    }

    /// Ends all clients and writes back everything.
    pub async fn close(self: &Rc<Self>) -> Result<()> {
        let exports = self.exports.close().await;
        let graph = self.graph.close_all().await;
        exports.and(graph)
    }
}

/// Runs a daemon to its end. `ready` is called when everything is set up.
pub fn run(config: &Config, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    let signals = Signals::take(&gipfel_io::signals::TERMINATION)?;
    let runtime = Runtime::new(config.io_threads.max(1))?;
    runtime.block_on(async {
        let daemon = Daemon::new(&runtime)?;
        for s in &config.setup {
            if let Err(e) = daemon.set_up(s).await {
                // What was set up before is written back as at any other end.
                return match daemon.close().await {
                    Ok(()) => Err(e),
                    Err(c) => Err(e.context(format!("at the end: {c}"))),
                };
            }
        }
        let pidfile = config.pidfile.as_deref().map(PidFile::write).transpose()?;
        ready()?;
        let by_signal = daemon.clone();
        let watch = spawn_local(async move {
            if signals.next().await.is_ok() {
                by_signal.quit("host-signal");
            }
        });
        let reason = daemon.quit_asked().await;
        watch.cancel().await;
        let shutdown = json!({ "guest": false, "reason": reason });
        daemon.events.emit("SHUTDOWN", shutdown);
        daemon.events.drained().await;
        let closed = daemon.close().await;
        drop(pidfile);
        closed
    })?
}

/// A file with the process id, removed at the end.
struct PidFile(PathBuf);

impl PidFile {
    fn write(path: &std::path::Path) -> Result<PidFile> {
        let at = || format!("pid file '{}'", path.display());
        std::fs::write(path, format!("{}\n", std::process::id())).at(at)?;
        Ok(PidFile(path.to_owned()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = std::fs::remove_file(&self.0);
    }
}

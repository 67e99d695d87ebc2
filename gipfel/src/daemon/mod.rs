//! The storage daemon: the graph, its exports, jobs and objects, and the monitors that command it.

mod address;
pub mod backends;
mod chardev;
pub mod cli;
mod commands;
pub mod drive;
mod events;
mod monitor;
pub mod objects;
mod reports;
mod secret;
mod throttle;

use std::cell::Cell;
use std::future::Future;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use event_listener::Event;
use gipfel_base::{Error, Result, ResultExt};
use gipfel_exports::Exports;
use gipfel_graph::Graph;
use gipfel_io::process::{Background, PidFile, raise_descriptor_limit};
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
    ready: Cell<bool>,
    got_ready: Event,
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
    /// `--drive`
    Drive(String),
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
    /// Whether the daemon goes to the background once it is set up.
    pub daemonize: bool,
    /// Number of I/O threads.
    pub io_threads: usize,
}

impl Daemon {
    /// A daemon with nothing in it, whose connections live on the threads of `runtime`.
    pub fn new(runtime: &Runtime) -> Result<Rc<Daemon>> {
        let schema = Schema::builtin()?;
        let objects = Objects::default();
        let reports = Arc::default();
        let graph = Graph::new(drivers::registry(&objects, &reports));
        let events = Events::new(schema);
        graph.tell(reports.clone());
        reports::pass_on(events.clone(), reports);
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
            ready: Cell::new(true),
            got_ready: Event::new(),
            end: Cell::new(None),
            ended: Event::new(),
        }))
    }

    /// Carries out one option of the command line.
    pub async fn set_up(self: &Rc<Self>, s: &Setup) -> Result<()> {
        let (name, ty, implied, text) = s.parts();
        let at = || name;
        let style = Style { implied, switches: matches!(s, Setup::Chardev(_)) };
        let v = match self.schema.read_option(ty, text, style).at(at)? {
            Value::Object(m) => m,
            _ => return Err(Error::invalid("give key=value pairs or a JSON object").context(name)),
        };
        match s {
            Setup::Object(_) => self.objects.add(v).at(at),
            Setup::Blockdev(_) => self.graph.blockdev_add(v).await.at(at),
            Setup::Drive(_) => drive::add(self, v).await.at(at),
            Setup::NbdServer(_) => commands::nbd_server_start(self, v).await.at(at),
            Setup::Export(_) => commands::export_add(self, v).await.at(at),
            Setup::Chardev(_) => self.chardevs.add(Value::Object(v)).at(at),
            Setup::Monitor(_) => self.add_monitor(v).await.at(at),
        }
    }

    async fn add_monitor(self: &Rc<Self>, v: Map<String, Value>) -> Result<()> {
        let chardev = v.get("chardev").and_then(Value::as_str).unwrap_or_default();
        let pretty = v.get("pretty").and_then(Value::as_bool).unwrap_or(false);
        self.chardevs.start(self, chardev, pretty).await
    }

    /// Lets clients of all kinds wait until [`Daemon::let_in`].
    fn hold(&self) {
        self.ready.set(false);
        self.exports.hold();
    }

    /// Everything is set up: lets clients in.
    fn let_in(&self) {
        self.ready.set(true);
        self.got_ready.notify(usize::MAX);
        self.exports.let_in();
    }

    /// Waits until everything is set up.
    async fn is_ready(&self) {
        while !self.ready.get() {
            let l = self.got_ready.listen();
            if self.ready.get() {
                return;
            }
            l.await;
        }
    }

    /// Asks the daemon to end; `reason` is a ShutdownCause.
    pub fn quit(&self, reason: &'static str) {
        if self.end.get().is_none() {
            self.end.set(Some(reason));
            self.ended.notify(usize::MAX);
        }
    }

    /// Waits until the daemon is asked to end; gives the reason, a ShutdownCause.
    pub async fn quit_asked(&self) -> &'static str {
        loop {
            let l = self.ended.listen();
            if let Some(r) = self.end.get() {
                return r;
            }
            l.await;
        }
    }

    /// The outcome of `f`, unless the daemon is asked to end before.
    pub async fn unless_ended<T>(&self, f: impl Future<Output = T>) -> Option<T> {
        let (mut f, mut end) = (pin!(f), pin!(self.quit_asked()));
        std::future::poll_fn(|cx| match f.as_mut().poll(cx) {
            Poll::Ready(v) => Poll::Ready(Some(v)),
            Poll::Pending => end.as_mut().poll(cx).map(|_| None),
        })
        .await
    }

    /// Ends all clients and writes back everything.
    pub async fn close(self: &Rc<Self>) -> Result<()> {
        self.chardevs.close().await;
        let exports = self.exports.close().await;
        let graph = self.graph.close_all().await;
        exports.and(graph)
    }
}

impl Setup {
    /// The name of the option, the type of its value, the key of a bare first value, the value.
    fn parts(&self) -> (&'static str, &'static str, Option<&'static str>, &str) {
        match self {
            Setup::Object(t) => ("--object", "ObjectOptions", Some("qom-type"), t),
            Setup::Blockdev(t) => ("--blockdev", "BlockdevOptions", Some("driver"), t),
            Setup::Drive(t) => ("--drive", "DriveOptions", None, t),
            Setup::NbdServer(t) => ("--nbd-server", "NbdServerOptions", None, t),
            Setup::Export(t) => ("--export", "BlockExportOptions", Some("type"), t),
            Setup::Chardev(t) => ("--chardev", "ChardevOptions", Some("backend"), t),
            Setup::Monitor(t) => ("--monitor", "MonitorOptions", Some("chardev"), t),
        }
    }

    /// The help that this option asks for, if it does.
    fn help(&self) -> Result<Option<String>> {
        let (name, ty, _, text) = self.parts();
        Schema::builtin()?.option_help(ty, text).at(|| name)
    }
}

/// Runs a daemon to its end.
pub fn run(config: &Config) -> Result<()> {
    for s in &config.setup {
        if let Some(text) = s.help()? {
            print!("{text}");
            return Ok(());
        }
    }
    // Before anything that a child would not have: threads, locks, rings.
    let background = config.daemonize.then(Background::start).transpose()?;
    let signals = Signals::take(&gipfel_io::signals::TERMINATION)?;
    raise_descriptor_limit();
    let runtime = Runtime::new(config.io_threads.max(1))?;
    runtime.block_on(async {
        let daemon = Daemon::new(&runtime)?;
        daemon.chardevs.set_background(config.daemonize);
        daemon.hold();
        let by_signal = daemon.clone();
        let watch = spawn_local(async move {
            if signals.next().await.is_ok() {
                by_signal.quit("host-signal");
            }
        });
        let set_up = async {
            for s in &config.setup {
                daemon.set_up(s).await?;
                if daemon.end.get().is_some() {
                    return Ok(None);
                }
            }
            let pidfile = config.pidfile.as_deref().map(PidFile::write).transpose()?;
            background.map(Background::ready).transpose()?;
            daemon.let_in();
            Ok(pidfile)
        };
        let pidfile = match set_up.await {
            Ok(p) => p,
            // What was set up before is written back as at any other end.
            Err(e) => match daemon.close().await {
                Ok(()) => return Err(e),
                Err(c) => return Err(Error::context(e, format!("at the end: {c}"))),
            },
        };
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

//! Character devices: what a monitor speaks over.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_io::net::{Listener, Stream};
use gipfel_io::time::sleep;
use gipfel_io::{Task, spawn_local};
use serde::Deserialize;
use serde_json::Value;

use super::{Daemon, address, monitor};

/// Connections to one character device at once.
const MAX_CLIENTS: usize = 64;
/// How long accepting pauses after the system refused.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Options {
    backend: String,
    id: String,
    path: Option<PathBuf>,
    r#abstract: Option<bool>,
    host: Option<String>,
    port: Option<String>,
    server: Option<bool>,
    wait: Option<bool>,
    fd: Option<String>,
}

/// The character devices of a daemon, and who uses them.
#[derive(Default)]
pub struct Chardevs {
    known: RefCell<BTreeMap<String, (Options, bool)>>,
    tasks: RefCell<Vec<Task<()>>>,
}

impl Chardevs {
    /// Notes a character device (ChardevOptions). It is opened when a monitor uses it.
    pub fn add(&self, options: Value) -> Result<()> {
        let o: Options =
            serde_json::from_value(options).map_err(|e| Error::invalid(e.to_string()))?;
        if o.fd.is_some() || o.r#abstract == Some(true) {
            return Err(Error::unsupported(
                "inherited descriptors and abstract sockets are not offered by this version",
            ));
        }
        let mut known = self.known.borrow_mut();
        if known.contains_key(&o.id) {
            let text = format!("there is a character device '{}' already", o.id);
            return Err(Error::new(ErrorKind::Exists, text));
        }
        known.insert(o.id.clone(), (o, false));
        Ok(())
    }

    /// Runs a monitor on the character device `id`.
    pub async fn start(&self, daemon: &Rc<Daemon>, id: &str, pretty: bool) -> Result<()> {
        let options = {
            let mut known = self.known.borrow_mut();
            let (options, used) = known.get_mut(id).ok_or_else(|| {
                let text = format!("there is no character device '{id}': add --chardev before");
                Error::new(ErrorKind::NotFound, text)
            })?;
            if std::mem::replace(used, true) {
                let text = format!("character device '{id}' has a monitor already");
                return Err(Error::new(ErrorKind::InUse, text));
            }
            options.clone()
        };
        if options.backend == "stdio" {
            let stream = Stream::stdio()?;
            let d = daemon.clone();
            let task = spawn_local(async move {
                monitor::serve(d.clone(), stream, pretty).await;
            });
            self.tasks.borrow_mut().push(task);
            return Ok(());
        }
        if options.server == Some(true) {
            let listener = listen(&options).await?;
            if options.wait != Some(false) {
                let first = listener.accept().await?;
                spawn_local(monitor::serve(daemon.clone(), first, pretty)).detach();
            }
            let task = spawn_local(accept(daemon.clone(), listener, pretty));
            self.tasks.borrow_mut().push(task);
            return Ok(());
        }
        let stream = connect(&options).await?;
        spawn_local(monitor::serve(daemon.clone(), stream, pretty)).detach();
        Ok(())
    }
}

async fn accept(daemon: Rc<Daemon>, listener: Listener, pretty: bool) {
    let clients = Rc::new(());
    loop {
        match listener.accept().await {
            Ok(stream) if Rc::strong_count(&clients) <= MAX_CLIENTS => {
                let (d, counted) = (daemon.clone(), clients.clone());
                spawn_local(async move {
                    monitor::serve(d, stream, pretty).await;
                    drop(counted);
                })
                .detach();
            }
            Ok(refused) => refused.shutdown(),
            Err(_) => sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn listen(o: &Options) -> Result<Listener> {
    match (&o.path, &o.host, &o.port) {
        (Some(p), None, None) => Listener::unix(p).await,
        (None, host, Some(port)) => {
            let host = host.as_deref().unwrap_or_default();
            address::listen(&gipfel_io::net::resolve(host, port).await?).await
        }
        _ => Err(both_or_neither()),
    }
}

async fn connect(o: &Options) -> Result<Stream> {
    match (&o.path, &o.host, &o.port) {
        (Some(p), None, None) => Stream::connect_unix(p).await,
        (None, host, Some(port)) => {
            let host = host.as_deref().unwrap_or("localhost");
            let mut last = Err(Error::invalid(format!("'{host}' has no address")));
            for a in gipfel_io::net::resolve(host, port).await? {
                last = Stream::connect_tcp(a).await;
                if last.is_ok() {
                    break;
                }
            }
            last
        }
        _ => Err(both_or_neither()),
    }
}

fn both_or_neither() -> Error {
    Error::invalid("a socket needs either 'path' or 'port' (and 'host')")
}

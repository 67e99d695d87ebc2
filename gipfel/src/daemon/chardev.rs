//! Character devices: what a monitor speaks over.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_io::net::{Listener, Stream};
use gipfel_io::time::sleep;
use gipfel_io::{Task, spawn_local};
use serde::Deserialize;
use serde_json::Value;

use super::address::Members;
use super::{Daemon, monitor};

/// Connections to one character device at once.
const MAX_CLIENTS: usize = 64;
/// How long accepting pauses after the system refused.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Clone, Debug, Deserialize)]
struct Options {
    backend: String,
    id: String,
    server: Option<bool>,
    wait: Option<bool>,
    #[serde(flatten)]
    socket: Members,
}

/// The character devices of a daemon, and who uses them.
#[derive(Default)]
pub struct Chardevs {
    background: Cell<bool>,
    known: RefCell<BTreeMap<String, (Options, bool)>>,
    tasks: RefCell<Vec<Task<()>>>,
}

impl Chardevs {
    /// Says whether the daemon is going to leave its terminal.
    pub fn set_background(&self, yes: bool) {
        self.background.set(yes);
    }

    /// Notes a character device (ChardevOptions). It is opened when a monitor uses it.
    pub fn add(&self, options: Value) -> Result<()> {
        let o: Options =
            serde_json::from_value(options).map_err(|e| Error::invalid(e.to_string()))?;
        if o.backend == "stdio" && self.background.get() {
            return Err(Error::invalid(
                "standard input and output do not go to the background: use a socket, or leave \
                 --daemonize out",
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

    /// Takes no clients any more.
    pub async fn close(&self) {
        let tasks = self.tasks.take();
        for t in tasks {
            t.cancel().await;
        }
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
            let task = spawn_local(monitor::serve(daemon.clone(), stream, pretty));
            self.tasks.borrow_mut().push(task);
            return Ok(());
        }
        if options.server == Some(true) {
            let listener = Listener::bind(&options.socket.address("").await?).await?;
            if options.wait != Some(false) {
                let Some(first) = daemon.unless_ended(listener.accept()).await else {
                    return Ok(());
                };
                spawn_local(monitor::serve(daemon.clone(), first?, pretty)).detach();
            }
            let task = spawn_local(accept(daemon.clone(), listener, pretty));
            self.tasks.borrow_mut().push(task);
            return Ok(());
        }
        let stream = Stream::connect(&options.socket.address("localhost").await?).await?;
        spawn_local(monitor::serve(daemon.clone(), stream, pretty)).detach();
        Ok(())
    }
}

async fn accept(daemon: Rc<Daemon>, listener: Listener, pretty: bool) {
    let clients = Rc::new(());
    daemon.is_ready().await;
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

//! The exports of a process by id, and the one NBD server they are served by.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_graph::{Backend, BackendId, BackendOptions, Graph};
use gipfel_io::address::Address;
use gipfel_io::net::Listener;
use gipfel_io::{Handle, spawn_local};

use crate::nbd::{ExportOptions, Removal, Server, ServerOptions};

/// How an export is made (BlockExportOptions).
#[derive(Clone, Debug, Default)]
pub struct NewExport {
    /// Its id.
    pub id: String,
    /// The node or backend to serve.
    pub node: String,
    /// The NBD export's name; by default the node's.
    pub name: Option<String>,
    /// Text for people.
    pub description: Option<String>,
    /// Clients may write.
    pub writable: bool,
    /// Every write is made durable before it completes.
    pub writethrough: bool,
    /// Filters and binding of the backend that is made along.
    pub backend: BackendOptions,
}

/// What is known of an export.
#[derive(Clone, Debug)]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// The node (or backend) it was told to serve.
    pub node: String,
    /// Whether it is being removed.
    pub shutting_down: bool,
}

struct Export {
    id: String,
    node: String,
    name: String,
    backend: BackendId,
    live: Arc<Backend>,
    shutting_down: Cell<bool>,
}

/// What is told about exports: `deleted` with the id.
pub type OnDeleted = Box<dyn Fn(&str)>;

/// All exports. Lives on the control thread.
pub struct Exports {
    graph: Rc<Graph>,
    threads: Vec<Handle>,
    server: RefCell<Option<Rc<Server<Backend>>>>,
    /// Whether clients have to wait, and the listener whose clients do.
    held: Cell<bool>,
    waiting: RefCell<Option<Listener>>,
    list: RefCell<Vec<Rc<Export>>>,
    on_deleted: OnDeleted,
}

impl Exports {
    /// No exports yet; connections will live on `threads`.
    pub fn new(graph: Rc<Graph>, threads: Vec<Handle>, on_deleted: OnDeleted) -> Rc<Exports> {
        Rc::new(Exports {
            graph,
            threads,
            server: RefCell::default(),
            held: Cell::new(false),
            waiting: RefCell::default(),
            list: RefCell::default(),
            on_deleted,
        })
    }

    fn server(&self) -> Result<Rc<Server<Backend>>> {
        self.server.borrow().clone().ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                "no NBD server runs: start one with nbd-server-start or --nbd-server",
            )
        })
    }

    /// Starts the NBD server. There is one at a time. Gives the TCP address, if it is one.
    pub async fn start_nbd(
        &self,
        address: &Address,
        options: ServerOptions,
    ) -> Result<Option<SocketAddr>> {
        let running =
            || Err(Error::new(ErrorKind::InUse, "the NBD server runs already: stop it first"));
        if self.server.borrow().is_some() {
            return running();
        }
        let listener = Listener::bind(address).await?;
        if self.server.borrow().is_some() {
            return running();
        }
        let tcp = listener.tcp_address();
        let server = Server::new(self.threads.clone(), options);
        if self.held.get() {
            *self.waiting.borrow_mut() = Some(listener);
        } else {
            server.listen(listener);
        }
        *self.server.borrow_mut() = Some(Rc::new(server));
        Ok(tcp)
    }

    /// Lets clients wait in the queues of listeners until [`Exports::let_in`]: whoever comes while
    /// things are being set up finds all of them.
    pub fn hold(&self) {
        self.held.set(true);
    }

    /// Lets clients in.
    pub fn let_in(&self) {
        self.held.set(false);
        let waiting = self.waiting.take();
        if let (Some(l), Some(s)) = (waiting, &*self.server.borrow()) {
            s.listen(l);
        }
    }

    /// Stops the NBD server, its clients and all exports.
    pub async fn stop_nbd(&self) -> Result<()> {
        let server = self.server()?;
        self.waiting.take();
        *self.server.borrow_mut() = None;
        let exports = std::mem::take(&mut *self.list.borrow_mut());
        exports.iter().for_each(|e| e.live.faults().give_up());
        server.stop().await;
        for e in exports {
            self.graph.detach(e.backend).await?;
            (self.on_deleted)(&e.id);
        }
        Ok(())
    }

    /// Serves a node or backend.
    pub async fn add(&self, new: NewExport) -> Result<()> {
        let server = self.server()?;
        if self.list.borrow().iter().any(|e| e.id == new.id) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("there is an export with id '{}' already", new.id),
            ));
        }
        let client = format!("export '{}'", new.id);
        let options = BackendOptions {
            writable: new.writable,
            write_through: new.writethrough,
            // A client learns the size when it comes, and the protocol cannot tell it another.
            fixed_size: true,
            ..new.backend
        };
        let (id, backend) = self.graph.attach(&new.node, &client, options).await?;
        let name = new.name.unwrap_or_else(|| new.node.clone());
        let shown = ExportOptions {
            name: name.clone(),
            description: new.description,
            writable: new.writable,
        };
        let taken = self.list.borrow().iter().any(|e| e.id == new.id);
        let added = if taken {
            Err(Error::new(
                ErrorKind::Exists,
                format!("there is an export with id '{}' already", new.id),
            ))
        } else {
            server.add(shown, backend.clone())
        };
        if let Err(e) = added {
            self.graph.detach(id).await?;
            return Err(e);
        }
        self.list.borrow_mut().push(Rc::new(Export {
            id: new.id,
            node: new.node,
            name,
            backend: id,
            live: backend,
            shutting_down: Cell::new(false),
        }));
        Ok(())
    }

    fn find(&self, id: &str) -> Result<Rc<Export>> {
        self.list.borrow().iter().find(|e| e.id == id).cloned().ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("there is no export with id '{id}'"))
        })
    }

    /// Begins to remove an export: softly only if no client uses it. Its end is told to
    /// `on_deleted`, after which the id is free again.
    pub fn remove(self: &Rc<Self>, id: &str, mode: Removal) -> Result<()> {
        let export = self.find(id)?;
        if export.shutting_down.get() {
            return Err(Error::new(
                ErrorKind::InUse,
                format!("export '{id}' is being removed already"),
            ));
        }
        let server = self.server()?;
        let users = server.users(&export.name).unwrap_or(0);
        if mode == Removal::Soft && users > 0 {
            return Err(Error::new(
                ErrorKind::InUse,
                format!(
                    "export '{id}' has {users} connected client(s); use mode hard to cut them off"
                ),
            ));
        }
        export.shutting_down.set(true);
        export.live.faults().give_up();
        let me = self.clone();
        spawn_local(async move {
            // Between the look above and now a client may have come: then it is cut off.
            let gone = server.remove(&export.name, Removal::Hard).await;
            if gone.is_ok() {
                me.list.borrow_mut().retain(|e| !Rc::ptr_eq(e, &export));
                if let Err(e) = me.graph.detach(export.backend).await {
                    eprintln!("gipfel: export '{}': {e}", export.id);
                }
                (me.on_deleted)(&export.id);
            }
        })
        .detach();
        Ok(())
    }

    /// The id of the NBD export of that name.
    pub fn id_of(&self, name: &str) -> Option<String> {
        self.list.borrow().iter().find(|e| e.name == name).map(|e| e.id.clone())
    }

    /// The backend of an export, for commands that name a client by its id.
    pub fn backend_of(&self, id: &str) -> Option<BackendId> {
        self.list.borrow().iter().find(|e| e.id == id).map(|e| e.backend)
    }

    /// All exports, the newest first.
    pub fn list(&self) -> Vec<ExportInfo> {
        let list = self.list.borrow();
        list.iter()
            .rev()
            .map(|e| ExportInfo {
                id: e.id.clone(),
                node: e.node.clone(),
                shutting_down: e.shutting_down.get(),
            })
            .collect()
    }

    /// Stops everything: the end of the process.
    pub async fn close(&self) -> Result<()> {
        match self.server() {
            Ok(_) => self.stop_nbd().await,
            Err(_) => Ok(()),
        }
    }
}

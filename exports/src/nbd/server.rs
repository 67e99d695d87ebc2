//! The NBD server: listeners, the exports by name, the connections, and how they end.
//!
//! A [`Server`] lives on the control thread. Each connection is given to one of the I/O threads in
//! turn. It knows nothing of QMP or of export ids: those belong to who adds and removes exports.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_listener::{Event, listener};
use gipfel_base::{Error, ErrorKind, Result};
use gipfel_io::net::{Listener, Stream};
use gipfel_io::time::{sleep, timeout};
use gipfel_io::{Handle, Task, spawn_local};
use slab::Slab;

use super::connection;
use super::disk::Disk;
use super::proto::consts::{MAX_STRING, allocation, export_flag};
use super::proto::{ExportInfo, ExportList};

/// Limit: how long a handshake may take where nothing else is said.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Limit: connections at once where nothing else is said.
pub const MAX_CONNECTIONS: usize = 100;
/// How long accepting pauses after the system refused (no descriptors, no memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What holds for all connections.
#[derive(Clone, Copy, Debug)]
pub struct ServerOptions {
    /// Connections at once; further clients wait in the listener's queue. 0: no limit. 1: exports
    /// do not offer several connections.
    pub max_connections: usize,
    /// How long a handshake may take; zero: without limit.
    pub handshake_limit: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { max_connections: MAX_CONNECTIONS, handshake_limit: HANDSHAKE_LIMIT }
    }
}

/// How an export is shown.
#[derive(Clone, Debug, Default)]
pub struct ExportOptions {
    /// Name that clients ask for; empty: the default export.
    pub name: String,
    /// Text for people.
    pub description: Option<String>,
    /// Clients may write.
    pub writable: bool,
}

/// How an export is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Only where no client uses it.
    Soft,
    /// Its clients are disconnected.
    Hard,
}

struct Export<D> {
    options: ExportOptions,
    disk: Arc<D>,
    multi_conn: bool,
    users: AtomicUsize,
    left: Event,
}

impl<D: Disk> Export<D> {
    fn info(&self) -> ExportInfo {
        let mut flags = export_flag::SEND_FLUSH | export_flag::SEND_CACHE;
        flags |= match self.options.writable {
            false => export_flag::READ_ONLY,
            true => {
                export_flag::SEND_FUA
                    | export_flag::SEND_TRIM
                    | export_flag::SEND_WRITE_ZEROES
                    | export_flag::SEND_FAST_ZERO
            }
        };
        if self.multi_conn {
            flags |= export_flag::CAN_MULTI_CONN;
        }
        let min_block = self.disk.min_block();
        ExportInfo {
            name: self.options.name.clone(),
            description: self.options.description.clone(),
            size: self.disk.size(),
            has_medium: self.disk.has_medium(),
            flags,
            min_block,
            preferred_block: self.disk.preferred_block().max(min_block).max(512),
            // Clients that know nothing of block sizes use multiples of 512 ("Size constraints").
            require_block_size: min_block > 512,
            contexts: vec![allocation::NAME.to_owned()],
        }
    }
}

/// A client of an export, counted while this lives.
struct User<D>(Arc<Export<D>>);

impl<D> Drop for User<D> {
    fn drop(&mut self) {
        if self.0.users.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.left.notify(usize::MAX);
        }
    }
}

struct Connection<D> {
    stream: Stream,
    export: Option<Arc<Export<D>>>,
}

struct Tables<D> {
    exports: Vec<Arc<Export<D>>>,
    connections: Slab<Connection<D>>,
    stopping: bool,
}

struct Shared<D> {
    options: ServerOptions,
    tables: Mutex<Tables<D>>,
    /// A connection has ended.
    left: Event,
    /// Clients have used an export.
    used: AtomicBool,
}

impl<D> Shared<D> {
    fn tables(&self) -> MutexGuard<'_, Tables<D>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Disk> ExportList for Shared<D> {
    fn for_each(&self, each: &mut dyn FnMut(&ExportInfo)) {
        let exports = self.tables().exports.clone();
        exports.iter().for_each(|e| each(&e.info()));
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        let export = self.tables().exports.iter().find(|e| e.options.name == name).cloned();
        export.map(|e| e.info())
    }
}

/// A connection's entry in the tables; gone when dropped.
struct Seat<D> {
    shared: Arc<Shared<D>>,
    key: usize,
}

impl<D> Seat<D> {
    /// Makes the connection a user of the export of this name, if it still exists.
    fn claim(&self, name: &str) -> Option<User<D>> {
        let mut t = self.shared.tables();
        let export = t.exports.iter().find(|e| e.options.name == name)?.clone();
        export.users.fetch_add(1, Ordering::SeqCst);
        t.connections[self.key].export = Some(export.clone());
        Some(User(export))
    }
}

impl<D> Drop for Seat<D> {
    fn drop(&mut self) {
        self.shared.tables().connections.remove(self.key);
        self.shared.left.notify(usize::MAX);
    }
}

/// The server. Dropping it without [`Server::stop`] stops listening and leaves connections alone.
pub struct Server<D> {
    shared: Arc<Shared<D>>,
    threads: Vec<Handle>,
    next_thread: Arc<AtomicUsize>,
    listeners: RefCell<Vec<Task<()>>>,
}

impl<D: Disk> Server<D> {
    /// A server without exports or listeners whose connections live on `threads` (at least one).
    pub fn new(threads: Vec<Handle>, options: ServerOptions) -> Self {
        assert!(!threads.is_empty(), "a server needs a thread for its connections");
        let tables = Tables { exports: Vec::new(), connections: Slab::new(), stopping: false };
        let (tables, left, used) = (Mutex::new(tables), Event::new(), AtomicBool::new(false));
        Self {
            shared: Arc::new(Shared { options, tables, left, used }),
            threads,
            next_thread: Arc::default(),
            listeners: RefCell::default(),
        }
    }

    /// Accepts connections on `listener` from now on, on the thread of the caller.
    pub fn listen(&self, listener: Listener) {
        let shared = self.shared.clone();
        let (threads, next) = (self.threads.clone(), self.next_thread.clone());
        let task = spawn_local(async move {
            loop {
                room(&shared).await;
                match listener.accept().await {
                    Ok(stream) => serve(&shared, &threads, &next, stream),
                    // The client gave up before we came to it, or the system is short of
                    // something: others wait in the queue meanwhile.
                    Err(_) => sleep(ACCEPT_PAUSE).await,
                }
            }
        });
        self.listeners.borrow_mut().push(task);
    }

    /// Serves one connection that was made elsewhere.
    pub fn serve(&self, stream: Stream) {
        serve(&self.shared, &self.threads, &self.next_thread, stream);
    }

    /// Shows `disk` to clients. [`ErrorKind::Exists`] where the name is taken.
    pub fn add(&self, options: ExportOptions, disk: Arc<D>) -> Result<()> {
        check_string("export name", &options.name)?;
        check_string("export description", options.description.as_deref().unwrap_or(""))?;
        let mut t = self.shared.tables();
        if t.exports.iter().any(|e| e.options.name == options.name) {
            let text = format!("the NBD server has an export named '{}' already", options.name);
            return Err(Error::new(ErrorKind::Exists, text));
        }
        t.exports.push(Arc::new(Export {
            options,
            disk,
            multi_conn: self.shared.options.max_connections != 1,
            users: AtomicUsize::new(0),
            left: Event::new(),
        }));
        Ok(())
    }

    /// Stops showing the export `name`; returns when no request of it is in flight any more.
    /// [`ErrorKind::InUse`] where clients use it and `mode` is soft.
    pub async fn remove(&self, name: &str, mode: Removal) -> Result<()> {
        let export = self.unlist(name, mode)?;
        while export.users.load(Ordering::SeqCst) > 0 {
            listener!(export.left => left);
            if export.users.load(Ordering::SeqCst) > 0 {
                left.await;
            }
        }
        Ok(())
    }

    /// Takes the export off the list and disconnects its clients.
    fn unlist(&self, name: &str, mode: Removal) -> Result<Arc<Export<D>>> {
        let mut t = self.shared.tables();
        let Some(i) = t.exports.iter().position(|e| e.options.name == name) else {
            let text = format!("the NBD server has no export named '{name}'");
            return Err(Error::new(ErrorKind::NotFound, text));
        };
        let users = t.exports[i].users.load(Ordering::SeqCst);
        if mode == Removal::Soft && users > 0 {
            let text = format!(
                "export '{name}' has {users} connected client{}; disconnect them or remove it hard",
                if users == 1 { "" } else { "s" }
            );
            return Err(Error::new(ErrorKind::InUse, text));
        }
        let export = t.exports.remove(i);
        for (_, c) in &t.connections {
            if c.export.as_ref().is_some_and(|e| Arc::ptr_eq(e, &export)) {
                c.stream.shutdown();
            }
        }
        Ok(export)
    }

    /// Number of clients of the export `name`, if it exists.
    pub fn users(&self, name: &str) -> Option<usize> {
        let t = self.shared.tables();
        let export = t.exports.iter().find(|e| e.options.name == name)?;
        Some(export.users.load(Ordering::SeqCst))
    }

    /// Names of the exports in the order they were added.
    pub fn names(&self) -> Vec<String> {
        self.shared.tables().exports.iter().map(|e| e.options.name.clone()).collect()
    }

    /// Number of connections, those in the handshake included.
    pub fn connections(&self) -> usize {
        self.shared.tables().connections.len()
    }

    /// Returns once a client has used an export and no connection is left.
    pub async fn deserted(&self) {
        loop {
            listener!(self.shared.left => left);
            if self.shared.used.load(Ordering::SeqCst) && self.connections() == 0 {
                return;
            }
            left.await;
        }
    }

    /// Stops listening, drops all exports, disconnects all clients; returns when no request is in
    /// flight any more. What was acknowledged before is done; what was not may be.
    pub async fn stop(&self) {
        let listeners = self.listeners.take();
        for l in listeners {
            l.cancel().await;
        }
        {
            let mut t = self.shared.tables();
            t.stopping = true;
            t.exports.clear();
            t.connections.iter().for_each(|(_, c)| c.stream.shutdown());
        }
        loop {
            listener!(self.shared.left => left);
            if self.connections() == 0 {
                return;
            }
            left.await;
        }
    }
}

fn check_string(what: &str, s: &str) -> Result<()> {
    // "Conventions": strings of the protocol.
    if s.len() > MAX_STRING || s.contains('\0') {
        let text = format!("{what} must be at most {MAX_STRING} bytes long and hold no NUL");
        return Err(Error::invalid(text));
    }
    Ok(())
}

/// Waits until one more connection is allowed.
async fn room<D>(shared: &Shared<D>) {
    let max = shared.options.max_connections;
    loop {
        listener!(shared.left => left);
        if max == 0 || shared.tables().connections.len() < max {
            return;
        }
        left.await;
    }
}

/// Gives a connection to the thread whose turn it is.
fn serve<D: Disk>(shared: &Arc<Shared<D>>, threads: &[Handle], next: &AtomicUsize, stream: Stream) {
    let key = {
        let mut t = shared.tables();
        if t.stopping {
            return;
        }
        t.connections.insert(Connection { stream: stream.clone(), export: None })
    };
    let seat = Seat { shared: shared.clone(), key };
    let thread = &threads[next.fetch_add(1, Ordering::Relaxed) % threads.len()];
    // Nobody waits for the outcome: the seat's end is what others look for.
    drop(thread.spawn(move || run(seat, stream)));
}

async fn run<D: Disk>(seat: Seat<D>, stream: Stream) {
    let limit = seat.shared.options.handshake_limit;
    let shake = connection::handshake(&stream, &*seat.shared, |name| seat.claim(name));
    let opened = if limit.is_zero() { Some(shake.await) } else { timeout(limit, shake).await };
    if let Some(Ok(Some(opened))) = opened {
        seat.shared.used.store(true, Ordering::SeqCst);
        let disk = opened.export.0.disk.clone();
        connection::transmission(&stream, disk, &opened).await;
    }
    stream.shutdown();
}

//! The running graph: the model, the lock that serialises changes, backends and their clients.

use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::Arc;

use async_lock::{Mutex, MutexGuard};
use gipfel_base::Result;
use gipfel_node::{Child, Driver, DriverDef, Node, Perm, Perms, Reports, Role};
use serde_json::{Map, Value};

use crate::backend::{Backend, Follow};
use crate::backends::Tray;
use crate::faults::{Faults, OnError};
use crate::medium;
use crate::model::{
    BackendId, BackendInfo, Draft, EdgeInfo, Model, Named, NodeId, NodeInfo, Owner, Parent,
};
use crate::open::Tree;
use crate::picture::Rehearsal;
use crate::registry::{Registry, ZeroDetection};

/// How a backend is made.
#[derive(Clone, Debug, Default)]
pub struct BackendOptions {
    /// Its name; without one it is named after its client.
    pub name: Option<String>,
    /// Whether its client may write.
    pub writable: bool,
    /// Whether its client may change the size.
    pub resize: bool,
    /// Whether nobody else may write meanwhile.
    pub alone: bool,
    /// Whether nobody may change the size meanwhile: its client is told of one size only.
    pub fixed_size: bool,
    /// What it holds on to.
    pub follow: Follow,
    /// The implicit filter throttle: the name of the throttle group that it shares.
    pub throttle: Option<String>,
    /// The implicit filter copy-on-read.
    pub copy_on_read: bool,
    /// The implicit filter detect-zeroes.
    pub detect_zeroes: ZeroDetection,
    /// Whether every write is made durable before it completes.
    pub write_through: bool,
    /// Whether its medium can be taken out. Only for backends that are made before their client.
    pub removable: bool,
    /// What becomes of reads that fail.
    pub on_read_error: OnError,
    /// What becomes of other requests that fail.
    pub on_write_error: OnError,
    /// DriveInfo: what `--drive` said of the device.
    pub drive: Option<Map<String, Value>>,
}

/// What a new backend stands on.
pub(crate) enum NewMedium {
    /// A node that is there.
    Node(NodeId),
    /// Nodes that were opened for it, with their node-side filters.
    Tree(Box<Tree>, Vec<(String, Filter)>),
}

/// The running graph. Lives on the control thread; requests never come here.
pub struct Graph {
    pub(crate) state: Rc<Mutex<Model>>,
    pub(crate) registry: Rc<Registry>,
    reports: Rc<OnceCell<Arc<Reports>>>,
    /// Changes end here instead of being carried out.
    pub(crate) rehearsal: Option<Rehearsal>,
}

impl Graph {
    /// An empty graph over these drivers.
    pub fn new(registry: Registry) -> Rc<Graph> {
        Rc::new(Graph {
            state: Rc::default(),
            registry: Rc::new(registry),
            reports: Rc::default(),
            rehearsal: None,
        })
    }

    /// Failed requests of backends that are made by name from now on are told to `reports`.
    pub fn tell(&self, reports: Arc<Reports>) {
        // Who asks first is told.
        let _ = self.reports.set(reports);
    }

    /// The same graph, whose changes end in `rehearsal`.
    pub(crate) fn with_rehearsal(&self, rehearsal: Rehearsal) -> Graph {
        Graph {
            state: self.state.clone(),
            registry: self.registry.clone(),
            reports: self.reports.clone(),
            rehearsal: Some(rehearsal),
        }
    }

    /// The drivers it knows.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The present model. Changes wait while this is held.
    pub async fn model(&self) -> MutexGuard<'_, Model> {
        self.state.lock().await
    }

    /// A backend for `client` on the node or backend called `name`: a backend of that name is
    /// taken if it has no client, for a node a backend is made along.
    pub async fn attach(
        self: &Rc<Self>,
        name: &str,
        client: &str,
        options: BackendOptions,
    ) -> Result<(BackendId, Arc<Backend>)> {
        let mut model = self.state.lock().await;
        if let Some(Named::Backend(id)) = model.lookup(name) {
            let live = self.take_backend(&mut model, id, client, &options).await?;
            return Ok((id, live));
        }
        let node = model.find_disk(name)?;
        let backend_name = match &options.name {
            Some(n) => {
                model.check_backend_name(n)?;
                n.clone()
            }
            None => model.auto_name("backend"),
        };
        let medium = Some(NewMedium::Node(node));
        self.new_backend(&mut model, backend_name, options, medium, Some(client)).await
    }

    /// Makes a backend with its client-side filters, with or without a medium.
    pub(crate) async fn new_backend(
        self: &Rc<Self>,
        model: &mut Model,
        name: String,
        options: BackendOptions,
        medium: Option<NewMedium>,
        client: Option<&str>,
    ) -> Result<(BackendId, Arc<Backend>)> {
        let reports = self.reports.get().filter(|_| options.name.is_some()).cloned();
        let faults = Faults::new(reports);
        faults.set_policies(options.on_read_error, options.on_write_error)?;
        let owner = owner_name(&name, client.filter(|_| options.name.is_none()));
        let filters = self.make_stack(model, &options, &owner)?;
        let edit = |draft: &mut Draft<'_>| {
            let id = add_backend(draft, name, &options, faults, filters, client)?;
            let node = match medium {
                None => None,
                Some(NewMedium::Node(n)) => Some(n),
                Some(NewMedium::Tree(t, mut f)) => Some(self.add_tree(draft, *t, &mut f, false)?),
            };
            if node.is_some() {
                medium::put(draft, id, node)?;
                if let Some(t) = &mut draft.backend_mut(id).tray {
                    t.open = false;
                }
            }
            Ok(id)
        };
        let (id, model) = self.transact(model, edit).await?;
        let live = model.backend(id).live.clone();
        live.set_writable(client.is_some() && model.backend(id).options.writable);
        live.set_write_through(model.backend(id).options.write_through);
        Ok((id, live))
    }

    /// Lets go of a client's backend: one made along goes, a pre-made one stays.
    pub async fn detach(self: &Rc<Self>, id: BackendId) -> Result<()> {
        let mut model = self.state.lock().await;
        let Some(b) = model.get_backend(id) else { return Ok(()) };
        if b.made_along {
            return self.transact(&mut model, |draft| draft.remove_backend(id)).await.map(drop);
        }
        // The client's last requests end before another one comes.
        drop(b.live.root().drain().await);
        self.transact(&mut model, |draft| {
            Self::leave_backend(draft, id);
            Ok(())
        })
        .await
        .map(drop)
    }

    fn make_stack(
        &self,
        model: &mut Model,
        options: &BackendOptions,
        owner: &str,
    ) -> Result<Vec<Filter>> {
        // Top to bottom: throttle, copy-on-read, detect-zeroes.
        let mut stack = Vec::new();
        if let Some(group) = &options.throttle {
            stack.push(self.throttle_filter(model, group, owner)?);
        }
        if options.copy_on_read {
            let (def, make) = self.registry.implicit.copy_on_read;
            stack.push(Filter::new(model.auto_name("copy-on-read"), def, |c| make(c, ())));
        }
        if let Some(f) = self.zero_filter(model, options.detect_zeroes) {
            stack.push(f);
        }
        Ok(stack)
    }

    /// The implicit throttle of `owner` in a throttle group, not yet in the graph.
    pub(crate) fn throttle_filter(
        &self,
        model: &mut Model,
        group: &str,
        owner: &str,
    ) -> Result<Filter> {
        let (def, make) = self.registry.throttle()?;
        Filter::try_new(model.auto_name("throttle"), def, |c| make(c, group, owner))
    }

    /// The implicit filter for a detect-zeroes option, not yet in the graph.
    pub(crate) fn zero_filter(&self, model: &mut Model, mode: ZeroDetection) -> Option<Filter> {
        let (def, make) = self.registry.implicit.detect_zeroes;
        let unmap = match mode {
            ZeroDetection::Off => return None,
            ZeroDetection::On => false,
            ZeroDetection::Unmap => true,
        };
        Some(Filter::new(model.auto_name("detect-zeroes"), def, |c| make(c, unmap)))
    }
}

/// An implicit filter that waits to be put into the graph.
pub(crate) struct Filter {
    name: String,
    live: Arc<Node>,
    edge: Arc<Child>,
}

impl Filter {
    fn new(
        name: String,
        def: &'static DriverDef,
        make: impl FnOnce(Arc<Child>) -> Box<dyn Driver>,
    ) -> Filter {
        let edge = Child::new(format!("{name}.{}", def.children[0].name), None);
        let live = Node::new(name.clone(), def, make(edge.clone()));
        Filter { name, live, edge }
    }

    fn try_new(
        name: String,
        def: &'static DriverDef,
        make: impl FnOnce(Arc<Child>) -> Result<Box<dyn Driver>>,
    ) -> Result<Filter> {
        let edge = Child::new(format!("{name}.{}", def.children[0].name), None);
        let driver = make(edge.clone())?;
        Ok(Filter { live: Node::new(name.clone(), def, driver), name, edge })
    }

    /// Adds it to the draft for `owner`, over `below`.
    pub(crate) fn add(
        self,
        draft: &mut Draft<'_>,
        owner: Owner,
        below: Option<NodeId>,
    ) -> Result<NodeId> {
        let spec = self.live.def().children[0];
        let id = draft.add_node(NodeInfo {
            name: self.name,
            live: self.live,
            children: Vec::new(),
            parents: Default::default(),
            implicit: Some(owner),
            job: None,
            added_by_user: false,
            read_only: false,
            options: Map::new(),
            common: Default::default(),
            detect_zeroes: ZeroDetection::Off,
            side_top: None,
            above: Perms::IDLE,
        });
        draft.add_edge(
            EdgeInfo {
                label: self.edge.label().to_owned(),
                parent: Parent::Node(id),
                name: spec.name.into(),
                role: Role::Filtered,
                binding: spec.binding,
                target: None,
                perms: Perms::IDLE,
                frozen: None,
                live: self.edge,
            },
            below,
        )?;
        Ok(id)
    }
}

/// How the owner of a client-side filter is called in messages: by its client where the backend
/// was made along with that and has no name of its own.
pub(crate) fn owner_name(backend: &str, client: Option<&str>) -> String {
    client.map_or_else(|| format!("backend '{backend}'"), str::to_owned)
}

/// What a client that wants these options needs and allows.
pub(crate) fn client_perms(options: &BackendOptions) -> Perms {
    let mut used = Perm::CONSISTENT_READ;
    if options.writable {
        used = used | Perm::WRITE;
    }
    if options.resize {
        used = used | Perm::RESIZE;
    }
    let mut shared =
        if options.alone { Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED } else { Perm::ALL };
    if options.fixed_size {
        shared = shared & !Perm::RESIZE;
    }
    Perms { used, shared }
}

pub(crate) fn add_backend(
    draft: &mut Draft<'_>,
    name: String,
    options: &BackendOptions,
    faults: Faults,
    filters: Vec<Filter>,
    client: Option<&str>,
) -> Result<BackendId> {
    // Nothing is held for a client that is not there.
    let perms = if client.is_some() { client_perms(options) } else { Perms::IDLE };
    let id = draft.add_backend(|root| {
        let edge = Child::new(format!("{name}.root"), None);
        let live = Backend::new(name.clone(), edge.clone(), faults);
        let info = BackendInfo {
            name,
            root,
            stack: Vec::new(),
            throttle: options.throttle.clone(),
            made_along: client.is_some(),
            options: options.clone(),
            tray: options.removable.then_some(Tray { open: true, locked: false }),
            client: client.map(str::to_owned),
            perms,
            follow: options.follow,
            live,
        };
        (info, edge)
    });
    // From the bottom up, so that each stands on the one below it.
    let mut below = None;
    let mut stack = Vec::new();
    for f in filters.into_iter().rev() {
        let n = f.add(draft, Owner::Backend(id), below)?;
        stack.insert(0, n);
        below = Some(n);
    }
    let root = draft.backend(id).root;
    draft.repoint(root, below)?;
    draft.backend_mut(id).stack = stack;
    Ok(id)
}

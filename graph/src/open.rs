//! Opening nodes from options: children inline or by reference, to any depth, and the images that
//! an image names itself. Everything slow happens here, before the graph is touched.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use gipfel_base::limits::MAX_CHAIN_DEPTH;
use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_io::Buf;
use gipfel_node::perm::child_perms;
use gipfel_node::{
    Child, ChildSpec, Common, Discard, DriverDef, Implicit, IoFuture, Kind, Node, OpenArgs, Perm,
    Perms, Role,
};
use serde_json::{Map, Value};

use crate::copies::copy_name;
use crate::filename::{self, NameMeans, over};
use crate::graph::{Filter, Graph};
use crate::model::{Draft, EdgeInfo, Model, NodeId, NodeInfo, Owner, Parent};
use crate::registry::ZeroDetection;

/// Bytes at the start of an image that formats are recognised by.
const PROBE: u64 = 2048;

/// Opened nodes that are not in the graph yet.
pub(crate) struct Tree {
    name: String,
    live: Arc<Node>,
    children: Vec<(&'static ChildSpec, Arc<Child>, Target)>,
    options: Map<String, Value>,
    common: Common,
    detect_zeroes: ZeroDetection,
}

impl Tree {
    /// The topmost node's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The topmost node.
    pub(crate) fn live(&self) -> &Arc<Node> {
        &self.live
    }
}

enum Target {
    None,
    Existing(NodeId),
    New(Box<Tree>),
}

/// What a node takes over from its parent unless its options say otherwise.
#[derive(Clone, Default)]
struct Inherit {
    common: Common,
    /// The image files above, to notice a chain that bites its own tail.
    chain: Vec<String>,
}

/// The common options, taken out of a node's options.
pub(crate) fn take_common(
    o: &mut Map<String, Value>,
    base: Common,
) -> Result<(Common, ZeroDetection)> {
    let mut c = base;
    let flag = |v: Value, key: &str| {
        v.as_bool().ok_or_else(|| Error::invalid(format!("option '{key}' must be true or false")))
    };
    if let Some(v) = o.remove("read-only") {
        c.read_only = flag(v, "read-only")?;
    }
    if let Some(v) = o.remove("auto-read-only") {
        c.auto_read_only = flag(v, "auto-read-only")?;
    }
    if let Some(v) = o.remove("force-share") {
        c.force_share = flag(v, "force-share")?;
        if c.force_share && !c.read_only {
            return Err(Error::invalid("force-share=on needs read-only=on"));
        }
    }
    match o.remove("discard").as_ref().and_then(Value::as_str) {
        Some("unmap" | "on") => c.discard = Discard::Unmap,
        Some(_) => c.discard = Discard::Ignore,
        None => {}
    }
    if let Some(Value::Object(mut cache)) = o.remove("cache") {
        if let Some(v) = cache.remove("direct") {
            c.direct = flag(v, "cache.direct")?;
        }
        if let Some(v) = cache.remove("no-flush") {
            c.no_flush = flag(v, "cache.no-flush")?;
        }
    }
    let zeroes = match o.remove("detect-zeroes").as_ref().and_then(Value::as_str) {
        Some("on") => ZeroDetection::On,
        Some("unmap") if c.discard == Discard::Ignore => {
            return Err(Error::invalid("detect-zeroes=unmap needs discard=unmap"));
        }
        Some("unmap") => ZeroDetection::Unmap,
        _ => ZeroDetection::Off,
    };
    Ok((c, zeroes))
}

impl Graph {
    /// Opens what `options` describe. Nothing in the graph changes.
    pub(crate) async fn open_tree(
        self: &Rc<Self>,
        model: &mut Model,
        options: Map<String, Value>,
    ) -> Result<Tree> {
        let mut names = BTreeSet::new();
        self.open_node(model, &mut names, options, Inherit::default()).await
    }

    fn open_node<'a>(
        self: &'a Rc<Self>,
        model: &'a mut Model,
        names: &'a mut BTreeSet<String>,
        given: Map<String, Value>,
        inherit: Inherit,
    ) -> IoFuture<'a, Tree> {
        Box::pin(async move {
            let mut o = given.clone();
            let driver = o.remove("driver");
            let driver = driver.as_ref().and_then(Value::as_str).ok_or_else(|| {
                Error::invalid("option 'driver' is missing: it says what kind of node this is")
            })?;
            let def = self.registry.get(driver)?;
            let name = match o.remove("node-name") {
                Some(Value::String(n)) => {
                    model.check_node_name(&n)?;
                    if !names.insert(n.clone()) {
                        return Err(Error::new(
                            ErrorKind::Exists,
                            format!("node-name '{n}' is given twice"),
                        ));
                    }
                    n
                }
                _ => model.auto_name("block"),
            };
            let (common, detect_zeroes) =
                take_common(&mut o, inherit.common).at(|| format!("node '{name}'"))?;
            if inherit.chain.len() >= MAX_CHAIN_DEPTH {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("the chain is longer than {MAX_CHAIN_DEPTH} nodes"),
                ));
            }
            let below = Inherit { common: inherit_common(def, common), ..inherit.clone() };
            let mut children = Vec::new();
            for (spec, child, option) in
                child_options(def, &mut o).at(|| format!("node '{name}'"))?
            {
                let is_given = option.is_some();
                let target = self
                    .open_child(model, names, spec, option, below.clone())
                    .await
                    .at(|| format!("node '{name}'"))?;
                let node = match &target {
                    Target::None => None,
                    Target::Existing(n) => Some(model.node(model.top_of(*n)).live.clone()),
                    Target::New(t) => Some(t.live.clone()),
                };
                let edge = Child::new(format!("{name}.{child}"), node);
                if let (Target::New(t), Role::Image | Role::Data) = (&target, spec.role) {
                    // The image is locked before its header is read.
                    let perms = expected(spec.role, !common.read_only);
                    t.live.driver().set_perms(perms).await.at(|| format!("node '{}'", t.name))?;
                }
                children.push((spec, edge, target, is_given));
            }
            let args = OpenArgs {
                node_name: name.clone(),
                options: Value::Object(o),
                common,
                children: children.iter().map(|c| c.1.clone()).collect(),
            };
            let opened = self.registry.open(def, args).await.at(|| format!("node '{name}'"))?;
            for i in opened.implicit {
                let Some(at) = children.iter().position(|c| c.0.name == i.child && !c.3) else {
                    continue;
                };
                let image = image_name(children.first().map(|c| &c.1)).await.ok();
                let mut below = below.clone();
                below.chain.extend(image.clone());
                let tree = self
                    .open_implicit(model, names, (&i, children[at].0.role), image.as_deref(), below)
                    .await
                    .at(|| format!("{} of node '{name}'", i.child))?;
                children[at].1.drain().await.replace(Some(tree.live.clone()));
                children[at].2 = Target::New(Box::new(tree));
            }
            let live = Node::new(name.clone(), def, opened.driver);
            let children = children.into_iter().map(|(s, e, t, _)| (s, e, t)).collect();
            Ok(Tree { name, live, children, options: given, common, detect_zeroes })
        })
    }

    async fn open_child(
        self: &Rc<Self>,
        model: &mut Model,
        names: &mut BTreeSet<String>,
        spec: &'static ChildSpec,
        option: Option<Value>,
        mut below: Inherit,
    ) -> Result<Target> {
        if spec.role == Role::Backing {
            below.common = Common { read_only: true, auto_read_only: false, ..below.common };
        }
        match option {
            Some(Value::String(name)) if !name.is_empty() => {
                Ok(Target::Existing(model.find_node(&name).at(|| format!("'{}'", spec.name))?))
            }
            Some(Value::Object(o)) => {
                let tree = self.open_node(model, names, o, below).await?;
                Ok(Target::New(Box::new(tree)))
            }
            None | Some(Value::Null | Value::String(_)) if !spec.required => Ok(Target::None),
            _ => Err(Error::invalid(format!(
                "child '{}' is missing: give a node-name or the options of a node",
                spec.name
            ))),
        }
    }

    /// The one gate for images that an image names (design.md, invariant 2).
    async fn open_implicit(
        self: &Rc<Self>,
        model: &mut Model,
        names: &mut BTreeSet<String>,
        (i, role): (&Implicit, Role),
        image: Option<&str>,
        mut below: Inherit,
    ) -> Result<Tree> {
        if role == Role::Data {
            // Plain bytes, never looked at for a format; a name is relative to where the process
            // is, as the reference has it.
            let options = filename::options(&i.filename, self.registry.file_protocol)?;
            return self.open_node(model, names, options, below).await;
        }
        let name = filename::relative_to(image, &i.filename);
        if below.chain.contains(&name) {
            return Err(Error::corrupt(format!(
                "'{name}' is in its own backing chain; \
                 mend the chain by writing another backing file name into one of its images"
            )));
        }
        below.common = Common { read_only: true, auto_read_only: false, ..below.common };
        let NameMeans { options: protocol, is_image } = self.name_means(&name).await?;
        let options = match &i.format {
            _ if is_image => protocol,
            Some(f) if self.registry.get(f)?.kind == Kind::Protocol => protocol,
            Some(f) => over(f, protocol),
            None => {
                let format = self.probe(protocol.clone()).await?;
                over(format, protocol)
            }
        };
        self.open_node(model, names, options, below).await
    }

    /// The options of the image that a file name means (a path, `file:PATH` or `json:{...}`), and
    /// whether its format was found by looking at it, because `format` did not say it.
    pub async fn image_options(
        self: &Rc<Self>,
        name: &str,
        format: Option<&str>,
    ) -> Result<(Map<String, Value>, bool)> {
        let NameMeans { options: protocol, is_image } = self.name_means(name).await?;
        if is_image {
            return Ok((protocol, false));
        }
        if let Some(f) = format {
            let named = protocol.get("driver").and_then(Value::as_str);
            let whole = named == Some(f) || self.registry.get(f)?.kind == Kind::Protocol;
            return Ok((if whole { protocol } else { over(f, protocol) }, false));
        }
        let found = self.probe(protocol.clone()).await?;
        Ok((over(found, protocol), true))
    }

    /// The format of the image that these protocol options describe.
    pub(crate) async fn probe(
        self: &Rc<Self>,
        protocol: Map<String, Value>,
    ) -> Result<&'static str> {
        let mut scratch = Model::default();
        let common = Common { read_only: true, ..Common::default() };
        let inherit = Inherit { common, ..Inherit::default() };
        let tree = self.open_node(&mut scratch, &mut BTreeSet::new(), protocol, inherit).await?;
        let edge = Child::new("probe", Some(tree.live.clone()));
        let n = tree.live.size().min(PROBE);
        let first = Buf::new(n as usize);
        edge.read(0, first.clone()).await?;
        let found = self.registry.probe(&first.to_vec());
        tree.live.driver().close().await?;
        Ok(found.map_or(self.registry.raw_format, |d| d.name))
    }

    /// Puts opened nodes into the draft; the topmost one's id is given back.
    pub(crate) fn add_tree(
        self: &Rc<Self>,
        draft: &mut Draft<'_>,
        tree: Tree,
        filters: &mut Vec<(String, Filter)>,
        by_user: bool,
    ) -> Result<NodeId> {
        let Tree { name, live, children, options, common, detect_zeroes } = tree;
        let mut targets = Vec::new();
        for (spec, edge, target) in children {
            let id = match target {
                Target::None => None,
                Target::Existing(n) => Some(draft.top_of(n)),
                Target::New(t) => {
                    let n = self.add_tree(draft, *t, filters, false)?;
                    Some(draft.top_of(n))
                }
            };
            targets.push((spec, edge, id));
        }
        let id = draft.add_node(NodeInfo {
            name: name.clone(),
            live,
            children: Vec::new(),
            parents: BTreeSet::new(),
            implicit: None,
            job: None,
            added_by_user: by_user,
            read_only: common.read_only,
            options,
            common,
            detect_zeroes,
            side_top: None,
            above: Perms::IDLE,
        });
        for (spec, edge, target) in targets {
            let info = EdgeInfo {
                label: edge.label().to_owned(),
                parent: Parent::Node(id),
                name: edge.label()[name.len() + 1..].to_owned().into(),
                role: spec.role,
                binding: spec.binding,
                target: None,
                perms: Perms::IDLE,
                frozen: None,
                live: edge,
            };
            draft.add_edge(info, target)?;
        }
        if let Some(at) = filters.iter().position(|(n, _)| *n == name) {
            let filter = filters.swap_remove(at).1;
            let top = filter.add(draft, Owner::Node(id), Some(id))?;
            draft.node_mut(id).side_top = Some(top);
        }
        Ok(id)
    }

    /// The node-side filters that the options of opened nodes ask for.
    pub(crate) fn side_filters(&self, model: &mut Model, tree: &Tree) -> Vec<(String, Filter)> {
        let mut found = Vec::new();
        let mut open = vec![tree];
        while let Some(t) = open.pop() {
            found.extend(self.zero_filter(model, t.detect_zeroes).map(|f| (t.name.clone(), f)));
            open.extend(t.children.iter().filter_map(|(_, _, c)| match c {
                Target::New(t) => Some(&**t),
                _ => None,
            }));
        }
        found
    }
}

/// The children that a driver's options speak of, each with its name and its option, which are
/// taken out: one for each [`ChildSpec`], and for [`Role::Copy`] as many as its list has.
fn child_options(
    def: &'static DriverDef,
    o: &mut Map<String, Value>,
) -> Result<Vec<(&'static ChildSpec, String, Option<Value>)>> {
    let mut found = Vec::new();
    for spec in def.children {
        match (spec.role, o.remove(spec.name)) {
            (Role::Copy, Some(Value::Array(list))) => {
                let numbered = list.into_iter().enumerate();
                found.extend(numbered.map(|(i, v)| (spec, copy_name(spec, i), Some(v))));
            }
            (Role::Copy, _) => {
                return Err(Error::invalid(format!(
                    "option '{}' is missing: list the node-names or the options of the children",
                    spec.name
                )));
            }
            (_, option) => found.push((spec, spec.name.to_owned(), option)),
        }
    }
    Ok(found)
}

/// What children of a node with these common options begin with.
fn inherit_common(def: &DriverDef, c: Common) -> Common {
    match def.kind {
        // A format asks for what it means: its children do not second-guess it.
        Kind::Format => Common { discard: Discard::Unmap, ..c },
        _ => c,
    }
}

/// The file name of the image below an edge, as far as it has one.
fn image_name(edge: Option<&Arc<Child>>) -> IoFuture<'_, String> {
    Box::pin(async move {
        let none = || Error::new(ErrorKind::NotFound, "the image has no file name");
        let node = edge.ok_or_else(none)?.node().await.ok_or_else(none)?;
        match node.driver().info().await?.filename {
            Some(f) => Ok(f),
            None => image_name(node.driver().children().first()).await,
        }
    })
}

/// What a parent in this role will need once it is in use. Whether it changes the size of plain
/// data is seen then: a file of these may be opened a second time before its first use ends.
fn expected(role: Role, writable: bool) -> Perms {
    let mut used = Perm::CONSISTENT_READ;
    if writable {
        used = used | Perm::WRITE;
    }
    let p = child_perms(role, Perms { used, shared: Perm::ALL }, writable);
    if role == Role::Data { Perms { used: p.used & !Perm::RESIZE, ..p } } else { p }
}

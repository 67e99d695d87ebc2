//! blockdev-reopen: new options and new children for nodes in use, all nodes or none.

use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_node::{Common, Discard, Reopen, Role};
use serde_json::{Map, Value};

use crate::copies::copies;
use crate::graph::{Filter, Graph};
use crate::model::{Draft, EdgeId, EdgeInfo, Model, NodeId, Owner};
use crate::open::take_common;
use crate::registry::ZeroDetection;

/// What one node of the list comes down to.
struct Change {
    id: NodeId,
    options: Map<String, Value>,
    common: Common,
    detect_zeroes: ZeroDetection,
    filter: Option<Filter>,
    children: Vec<(EdgeId, Option<NodeId>)>,
    driver: Option<Box<dyn Reopen>>,
}

impl Graph {
    /// Gives the nodes named in `list` (BlockdevOptions each) these options; an option left out
    /// returns to its default.
    pub async fn blockdev_reopen(self: &Rc<Self>, list: Vec<Map<String, Value>>) -> Result<()> {
        let mut model = self.state.lock().await;
        let mut changes: Vec<Change> = Vec::new();
        for o in list {
            let c = self.prepare_reopen(&mut model, o).await?;
            if changes.iter().any(|x| x.id == c.id) {
                let name = &model.node(c.id).name;
                return Err(Error::invalid(format!("node '{name}' is in the list twice")));
            }
            changes.push(c);
        }
        let mut commits = Vec::new();
        self.transact(&mut model, |draft| {
            // All let go first: what stands between the old and the new state makes no cycle.
            for (edge, _) in changes.iter().flat_map(|c| &c.children) {
                draft.repoint(*edge, None)?;
            }
            for c in changes {
                commits.extend(c.driver);
                for (edge, target) in c.children {
                    let top = target.map(|t| draft.top_of(t));
                    draft.repoint(edge, top)?;
                }
                let info = draft.node_mut(c.id);
                info.options = c.options;
                info.common = c.common;
                info.read_only = c.common.read_only;
                if info.detect_zeroes != c.detect_zeroes {
                    info.detect_zeroes = c.detect_zeroes;
                    change_side_filter(draft, c.id, c.filter)?;
                }
            }
            Ok(())
        })
        .await?;
        for c in commits {
            c.commit();
        }
        Ok(())
    }

    async fn prepare_reopen(
        self: &Rc<Self>,
        model: &mut Model,
        given: Map<String, Value>,
    ) -> Result<Change> {
        let mut o = given.clone();
        let name = match o.remove("node-name") {
            Some(Value::String(n)) => n,
            _ => return Err(Error::invalid("option 'node-name' is missing: which node?")),
        };
        let id = model.find_node(&name)?;
        let at = || format!("node '{name}'");
        let live = model.node(id).live.clone();
        match o.remove("driver") {
            Some(Value::String(d)) if d == live.def().name => {}
            _ => {
                return Err(Error::invalid(format!(
                    "option 'driver' must stay '{}'",
                    live.def().name
                ))
                .context(at()));
            }
        }
        let old = model.node(id);
        // What a node took over from its parents stays; what it was told itself is told anew.
        let base = Common {
            read_only: false,
            discard: Discard::Ignore,
            direct: false,
            no_flush: false,
            ..old.common
        };
        let base = if old.added_by_user { base } else { old.common };
        let (common, detect_zeroes) = take_common(&mut o, base).at(at)?;
        if (common.direct, common.no_flush, common.force_share)
            != (old.common.direct, old.common.no_flush, old.common.force_share)
        {
            return Err(Error::unsupported(
                "options 'cache' and 'force-share' cannot be changed while the node is open",
            )
            .context(at()));
        }
        let children = children(model, id, &mut o).at(at)?;
        let old = model.node(id);
        let same = own_options(&old.options) == own_options(&given)
            && (old.common.read_only, old.common.discard == common.discard)
                == (common.read_only, true);
        let driver = if same {
            None
        } else {
            let options = with_common(o, &common);
            Some(live.driver().reopen(options, common.read_only).await.at(at)?)
        };
        let filter = self.zero_filter(model, detect_zeroes);
        Ok(Change { id, options: given, common, detect_zeroes, filter, children, driver })
    }
}

/// The driver's own options with the common ones that drivers act on, as `reopen` takes them.
fn with_common(mut o: Map<String, Value>, c: &Common) -> Value {
    let discard = if c.discard == Discard::Unmap { "unmap" } else { "ignore" };
    o.insert("discard".into(), discard.into());
    Value::Object(o)
}

/// The options that concern the driver alone.
fn own_options(o: &Map<String, Value>) -> Map<String, Value> {
    const OTHERS: [&str; 12] = [
        "driver",
        "node-name",
        "read-only",
        "auto-read-only",
        "force-share",
        "discard",
        "cache",
        "detect-zeroes",
        "file",
        "backing",
        "data-file",
        "children",
    ];
    o.iter()
        .filter(|(k, _)| !OTHERS.contains(&k.as_str()))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}

/// Where the options say that the children should lead, where that is not where they lead now.
fn children(
    model: &Model,
    id: NodeId,
    o: &mut Map<String, Value>,
) -> Result<Vec<(EdgeId, Option<NodeId>)>> {
    let mut found = Vec::new();
    let node = model.node(id);
    let specs = node.live.def().children;
    let fixed = node.children.iter().filter(|e| model.edge(**e).role != Role::Copy);
    for spec in specs.iter().filter(|s| s.role == Role::Copy) {
        same_copies(model, id, o.remove(spec.name))?;
    }
    for (spec, edge) in specs.iter().filter(|s| s.role != Role::Copy).zip(fixed) {
        let now = model.edge(*edge).target.map(|t| model.under_side(t));
        let target = match o.remove(spec.name) {
            Some(Value::String(n)) => Some(model.find_node(&n).at(|| format!("'{}'", spec.name))?),
            Some(Value::Null) if !spec.required => None,
            None if now.is_none() || spec.role != Role::Backing => now,
            None => {
                return Err(Error::invalid(format!(
                    "option '{}' is missing: name the node it leads to, or null for none",
                    spec.name
                )));
            }
            Some(Value::Object(m)) => {
                let names_it = now.is_some_and(|n| {
                    let name = m.get("node-name").and_then(Value::as_str);
                    name.is_none_or(|x| x == model.node(n).name)
                });
                if !names_it {
                    return Err(Error::unsupported(format!(
                        "'{}' cannot be opened anew here: add the node with blockdev-add and \
                         name it",
                        spec.name
                    )));
                }
                now
            }
            Some(_) => {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    format!("'{}' cannot be empty", spec.name),
                ));
            }
        };
        if target != now {
            found.push((*edge, target));
        }
    }
    Ok(found)
}

/// Fails where a list of children names others than there are: those come and go by a command of
/// their own.
fn same_copies(model: &Model, id: NodeId, option: Option<Value>) -> Result<()> {
    let names_it = |(v, e): (&Value, &EdgeInfo)| {
        let name = v.as_str().or_else(|| v.get("node-name").and_then(Value::as_str));
        let now = e.target.map(|t| &*model.node(model.under_side(t)).name);
        (name.is_none() && v.is_object()) || (name == now && now.is_some())
    };
    let same = option.as_ref().and_then(Value::as_array).is_some_and(|list| {
        let now: Vec<_> = copies(model, id).map(|(_, e)| e).collect();
        list.len() == now.len() && list.iter().zip(now).all(names_it)
    });
    if same {
        return Ok(());
    }
    Err(Error::unsupported(
        "a reopen does not add or remove children: list those there are, and change them with \
         x-blockdev-change",
    ))
}

/// Puts the node-side filter of `id` in, out, or a new one in the old one's place.
fn change_side_filter(draft: &mut Draft<'_>, id: NodeId, filter: Option<Filter>) -> Result<()> {
    // Jobs' filters stand above it, and stay.
    let old = draft.fixed_filter(id);
    let above = draft.node(old.unwrap_or(id)).parents.clone();
    let new = match filter {
        Some(f) => Some(f.add(draft, Owner::Node(id), Some(id))?),
        None => None,
    };
    for e in above {
        draft.restack(e, Some(new.unwrap_or(id)))?;
    }
    if draft.node(id).side_top == old {
        draft.node_mut(id).side_top = new;
    }
    match old {
        Some(o) => draft.remove_node(o),
        None => Ok(()),
    }
}

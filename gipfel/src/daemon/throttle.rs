//! The limits of clients: block_set_io_throttle, and what query-block shows of them.

use std::rc::Rc;

use gipfel_base::{Error, Result};
use gipfel_filters::Limits;
use gipfel_qmp::Registry;
use serde_json::{Map, Value, json};

use super::{Daemon, backends};

type Args = Map<String, Value>;

/// The names of limits in old commands, and those in ThrottleLimits.
const NAMES: [(&str, &str); 6] = [
    ("bps", "bps-total"),
    ("bps_rd", "bps-read"),
    ("bps_wr", "bps-write"),
    ("iops", "iops-total"),
    ("iops_rd", "iops-read"),
    ("iops_wr", "iops-write"),
];

/// The same for the parts of a limit.
const PARTS: [(&str, &str); 3] = [("", ""), ("_max", "-max"), ("_max_length", "-max-length")];

/// Pairs of an old name and its name in ThrottleLimits.
fn names() -> impl Iterator<Item = (String, String)> {
    let parts = |(old, new)| PARTS.map(|(o, n)| (format!("{old}{o}"), format!("{new}{n}")));
    NAMES.into_iter().flat_map(parts).chain([("iops_size".into(), "iops-size".into())])
}

/// The limits that are given under their old names.
pub fn limits(a: &Args) -> Result<Limits> {
    let mut limits = Limits::default();
    for (old, new) in names() {
        if let Some(v) = a.get(&old).and_then(Value::as_u64) {
            limits.set(&new, v)?;
        }
    }
    limits.check()?;
    Ok(limits)
}

/// block_set_io_throttle: the client's backend becomes a member of a group with these limits, or
/// of none if there are no limits.
async fn set(d: &Rc<Daemon>, a: Args) -> Result<()> {
    let text = |k: &str| a.get(k).and_then(Value::as_str);
    let backend = match (text("device"), text("id")) {
        (Some(name), None) => d.graph.throttled_backend(name).await?,
        (None, Some(id)) => backends::of_client(d, id)?,
        _ => return Err(Error::invalid("give either 'device' or 'id'")),
    };
    let limits = limits(&a)?;
    if limits.is_unlimited() {
        return d.graph.set_throttle(backend, None).await;
    }
    let (now, own) = d.graph.throttle_of(backend).await?;
    // Without a group named, that of now, else one of its own.
    let group = text("group").map(str::to_owned).or(now);
    let group = group.unwrap_or_else(|| text("id").map_or(own, str::to_owned));
    d.graph.set_throttle(backend, Some(&group)).await?;
    d.objects.groups().get(&group)?.set_limits(limits)
}

/// query-block, with the limits of each backend's group.
async fn query_block(d: &Rc<Daemon>) -> Result<Value> {
    let mut list = d.graph.query_block().await?;
    for inserted in list.as_array_mut().into_iter().flatten().filter_map(|b| b.get_mut("inserted"))
    {
        let Some(name) = inserted.get("group").and_then(Value::as_str) else { continue };
        let limits = d.objects.groups().get(name)?.limits();
        for (old, new) in names() {
            inserted[old] = json!(limits.get(&new));
        }
    }
    Ok(list)
}

/// Registers the commands for limits of clients.
pub fn register(r: &mut Registry<Rc<Daemon>>) {
    r.add("block_set_io_throttle", |d: Rc<Daemon>, a: Args| async move { set(&d, a).await });
    r.add("query-block", |d: Rc<Daemon>, _: Args| async move { query_block(&d).await });
}

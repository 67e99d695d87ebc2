//! `--drive`: a backend, its medium, its filters and what is known of its device, in one go
//! (mutators.md, section 5).

use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};

use gipfel_base::{Error, Result, ResultExt};
use gipfel_filters::Limits;
use gipfel_graph::BackendOptions;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::img::open::guard_guess;
use crate::overlay;

use super::{Daemon, backends, throttle};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Drive {
    file: Option<String>,
    id: Option<String>,
    node_name: Option<String>,
    format: Option<String>,
    media: Option<String>,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    snapshot: bool,
    cache: Option<String>,
    aio: Option<String>,
    discard: Option<String>,
    detect_zeroes: Option<String>,
    #[serde(default)]
    copy_on_read: bool,
    werror: Option<String>,
    rerror: Option<String>,
    throttling: Option<Map<String, Value>>,
}

/// What is kept of the device as it was described, under the names of DriveInfo.
const DEVICE: [&str; 5] = ["bus", "unit", "index", "media", "serial"];

/// Carries out one `--drive` option.
pub async fn add(d: &Rc<Daemon>, given: Map<String, Value>) -> Result<()> {
    let o: Drive = serde_json::from_value(Value::Object(given.clone()))
        .map_err(|e| Error::invalid(e.to_string()))?;
    let cdrom = match o.media.as_deref() {
        None | Some("disk") => false,
        Some("cdrom") => true,
        Some(m) => return Err(Error::invalid(format!("media '{m}' is neither disk nor cdrom"))),
    };
    let name = o.id.clone().unwrap_or_else(next_name);
    let at = || format!("drive '{name}'");
    let read_only = cdrom || o.read_only || o.readonly;
    let options = BackendOptions {
        name: Some(name.clone()),
        writable: !read_only,
        copy_on_read: o.copy_on_read,
        detect_zeroes: backends::zeroes(o.detect_zeroes.as_deref()),
        write_through: matches!(o.cache.as_deref(), Some("writethrough" | "directsync")),
        removable: cdrom || o.file.is_none(),
        on_read_error: backends::on_error(o.rerror.as_deref())?,
        on_write_error: backends::on_error(o.werror.as_deref())?,
        drive: Some(drive_info(&given)),
        ..BackendOptions::default()
    };
    if o.copy_on_read && read_only {
        return Err(
            Error::invalid("copy-on-read writes to the image: leave read-only off").context(at())
        );
    }
    let limits = limits(&given, o.throttling.as_ref()).at(at)?;
    let group = match o.throttling.as_ref().and_then(|t| t.get("group")).and_then(Value::as_str) {
        Some(g) => Some(g.to_owned()),
        None if limits.is_unlimited() => None,
        None => Some(name.clone()),
    };
    let options = BackendOptions { throttle: group.clone(), ..options };
    match &o.file {
        Some(file) => {
            let node = node_options(d, &o, file, read_only).await.at(at)?;
            d.graph.drive_add(options, node).await.at(at)?;
        }
        None if o.snapshot => {
            return Err(Error::invalid("'snapshot' needs 'file': the image to be overlaid"));
        }
        None => drop(d.graph.backend_add(options, None).await.at(at)?),
    }
    let rest = async {
        if let Some(g) = group.filter(|_| !limits.is_unlimited()) {
            d.objects.groups().get(&g)?.set_limits(limits)?;
        }
        if o.snapshot { overlay::add(&d.graph, &name).await } else { Ok(()) }
    };
    let done = rest.await;
    if done.is_err() {
        d.graph.backend_del(&name).await?;
    }
    done.at(at)
}

fn next_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("drive{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn drive_info(given: &Map<String, Value>) -> Map<String, Value> {
    let interface = given.get("if").cloned().unwrap_or_else(|| json!("none"));
    let mut info = Map::from_iter([("interface".to_owned(), interface)]);
    info.extend(DEVICE.iter().filter_map(|k| Some(((*k).to_owned(), given.get(*k)?.clone()))));
    info.insert("options".into(), Value::Object(given.clone()));
    info
}

/// Limits under their old names, and those in `throttling`.
fn limits(given: &Map<String, Value>, throttling: Option<&Map<String, Value>>) -> Result<Limits> {
    let mut limits = throttle::limits(given)?;
    if let Some(t) = throttling {
        let t = t.iter().filter(|(k, _)| *k != "group").map(|(k, v)| (k.clone(), v.clone()));
        limits.update(&t.collect())?;
    }
    limits.check()?;
    Ok(limits)
}

/// The options of the node that is the drive's medium.
async fn node_options(
    d: &Daemon,
    o: &Drive,
    file: &str,
    read_only: bool,
) -> Result<Map<String, Value>> {
    let (mut node, guessed) = d.graph.image_options(file, o.format.as_deref()).await?;
    guard_guess(&mut node, guessed && !read_only && !o.snapshot);
    let cache = o.cache.as_deref().unwrap_or("writeback");
    let direct = matches!(cache, "none" | "directsync");
    node.insert("cache".into(), json!({ "direct": direct, "no-flush": cache == "unsafe" }));
    // An image under a temporary overlay is only read.
    node.insert("read-only".into(), json!(read_only || o.snapshot));
    if let Some(discard) = &o.discard {
        node.insert("discard".into(), json!(discard));
    }
    if let Some(name) = &o.node_name {
        node.insert("node-name".into(), json!(name));
    }
    if let (Some(aio), Some(Value::Object(f))) = (&o.aio, node.get_mut("file")) {
        f.insert("aio".into(), json!(aio));
    }
    Ok(node)
}

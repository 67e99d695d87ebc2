//! Backends by command: made before their client, their media and trays, let go on after a failure.

use std::rc::Rc;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_filters::Limits;
use gipfel_graph::{
    BackendId, BackendOptions, Follow, Graph, Medium, OnError, ReadOnlyMode, ZeroDetection,
};
use gipfel_qmp::Registry;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Daemon;
use super::commands::{Mutator, with};

#[derive(Deserialize)]
struct Name {
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Add {
    name: String,
    node_name: Option<String>,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    removable: bool,
    follow: Option<String>,
    #[serde(default)]
    writethrough: bool,
    rerror: Option<String>,
    werror: Option<String>,
    throttle_group: Option<String>,
    limits: Option<Map<String, Value>>,
    #[serde(default)]
    copy_on_read: bool,
    detect_zeroes: Option<String>,
}

/// A backend, by its name or by its client's id.
#[derive(Deserialize)]
struct Which {
    device: Option<String>,
    id: Option<String>,
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Insert {
    #[serde(flatten)]
    which: Which,
    node_name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Change {
    #[serde(flatten)]
    which: Which,
    filename: String,
    format: Option<String>,
    read_only_mode: Option<String>,
}

/// What a backend holds on to, by its name in the protocol.
pub fn follow(name: Option<&str>) -> Follow {
    match name {
        Some("node") => Follow::Node,
        _ => Follow::Disk,
    }
}

/// A policy for failed requests, by its name in the protocol.
pub fn on_error(name: Option<&str>) -> Result<OnError> {
    name.map_or(Ok(OnError::Report), OnError::parse)
}

/// A filter detect-zeroes, by its name in the protocol.
pub fn zeroes(name: Option<&str>) -> ZeroDetection {
    match name {
        Some("on") => ZeroDetection::On,
        Some("unmap") => ZeroDetection::Unmap,
        _ => ZeroDetection::Off,
    }
}

/// The mutators that name backends.
pub const MUTATORS: [Mutator; 4] = [
    ("backend-add", |d, g, a| with(a, |a| async move { backend_add(&d, &g, a).await })),
    ("backend-del", |_, g, a| with(a, |a: Name| async move { g.backend_del(&a.name).await })),
    ("blockdev-insert-medium", |d, g, a| {
        with(a, |a: Insert| async move {
            g.insert_medium(find(&d, &a.which).await?.0, &a.node_name).await
        })
    }),
    ("blockdev-remove-medium", |d, g, a| {
        with(a, |w: Which| async move { g.remove_medium(find(&d, &w).await?.0).await })
    }),
];

async fn backend_add(d: &Daemon, g: &Rc<Graph>, a: Add) -> Result<()> {
    let limits = match (a.limits, &a.throttle_group) {
        (None, _) => None,
        (Some(_), Some(_)) => {
            return Err(Error::invalid("give either 'limits' or 'throttle-group'"));
        }
        (Some(m), None) => {
            let mut limits = Limits::default();
            limits.update(&m)?;
            limits.check()?;
            Some((a.name.clone(), limits))
        }
    };
    let group = limits.as_ref().map(|(group, _)| group.clone());
    let options = BackendOptions {
        name: Some(a.name),
        writable: !a.read_only,
        follow: follow(a.follow.as_deref()),
        throttle: a.throttle_group.or(group),
        copy_on_read: a.copy_on_read,
        detect_zeroes: zeroes(a.detect_zeroes.as_deref()),
        write_through: a.writethrough,
        removable: a.removable,
        on_read_error: on_error(a.rerror.as_deref())?,
        on_write_error: on_error(a.werror.as_deref())?,
        ..BackendOptions::default()
    };
    g.backend_add(options, a.node_name.as_deref()).await?;
    match limits {
        Some((group, limits)) => d.objects.groups().get(&group)?.set_limits(limits),
        None => Ok(()),
    }
}

/// The backend of the device or export with this id.
pub fn of_client(d: &Daemon, id: &str) -> Result<BackendId> {
    d.exports.backend_of(id).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("there is no device or export '{id}'"))
    })
}

/// The backend that is meant and how it is called in events.
async fn find(d: &Daemon, w: &Which) -> Result<(BackendId, String, String)> {
    match (&w.device, &w.id) {
        (Some(name), None) => {
            Ok((d.graph.backend_called(name).await?, name.clone(), String::new()))
        }
        (None, Some(id)) => Ok((of_client(d, id)?, String::new(), id.clone())),
        _ => Err(Error::invalid("give either 'device' or 'id'")),
    }
}

fn tray_moved(d: &Daemon, device: &str, id: &str, open: bool) {
    d.events.emit("DEVICE_TRAY_MOVED", json!({ "device": device, "id": id, "tray-open": open }));
}

async fn change_medium(d: Rc<Daemon>, a: Change) -> Result<()> {
    let (backend, device, id) = find(&d, &a.which).await?;
    let medium = Medium {
        filename: a.filename,
        format: a.format,
        read_only: match a.read_only_mode.as_deref() {
            Some("read-only") => ReadOnlyMode::ReadOnly,
            Some("read-write") => ReadOnlyMode::ReadWrite,
            _ => ReadOnlyMode::Retain,
        },
    };
    let was_open = d.graph.change_medium(backend, &medium, a.which.force).await?;
    if !was_open {
        tray_moved(&d, &device, &id, true);
    }
    tray_moved(&d, &device, &id, false);
    Ok(())
}

/// Registers the commands for backends.
pub fn register(r: &mut Registry<Rc<Daemon>>) {
    r.add("backend-resume", |d: Rc<Daemon>, a: Name| async move {
        let id = d.graph.backend_called(&a.name).await?;
        d.graph.model().await.backend(id).live.faults().resume();
        Ok(())
    });
    r.add("query-backends", |d: Rc<Daemon>, _: Map<String, Value>| async move {
        Ok(d.graph.query_backends().await)
    });
    r.add("blockdev-open-tray", |d: Rc<Daemon>, w: Which| async move {
        let (backend, device, id) = find(&d, &w).await?;
        if d.graph.open_tray(backend, w.force).await? {
            tray_moved(&d, &device, &id, true);
        }
        Ok(())
    });
    r.add("blockdev-close-tray", |d: Rc<Daemon>, w: Which| async move {
        let (backend, device, id) = find(&d, &w).await?;
        if d.graph.close_tray(backend).await? {
            tray_moved(&d, &device, &id, false);
        }
        Ok(())
    });
    r.add("blockdev-change-medium", change_medium);
    r.add("eject", |d: Rc<Daemon>, w: Which| async move {
        let (backend, device, id) = find(&d, &w).await?;
        if d.graph.eject(backend, w.force).await? {
            tray_moved(&d, &device, &id, true);
        }
        Ok(())
    });
}

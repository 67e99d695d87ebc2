//! Socket addresses as options give them.

use std::net::SocketAddr;

use gipfel_base::{Error, Result};
use gipfel_exports::Address;
use gipfel_io::net::Listener;
use serde_json::{Map, Value};

/// A SocketAddress, flat (`{"type": "unix", "path": ...}`) or legacy (members under `data`).
pub async fn read(mut v: Map<String, Value>) -> Result<Address> {
    let kind = v.remove("type");
    if let Some(Value::Object(data)) = v.remove("data") {
        v = data;
    }
    let text = |key: &str| v.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    if v.get("abstract") == Some(&Value::Bool(true)) {
        return Err(Error::unsupported("abstract unix sockets are not offered by this version"));
    }
    match kind.as_ref().and_then(Value::as_str) {
        Some("unix") => Ok(Address::Unix(text("path").into())),
        Some("inet") => {
            let mut found = gipfel_io::net::resolve(&text("host"), &text("port")).await?;
            let wants = |key| v.get(key).and_then(Value::as_bool);
            if wants("ipv4") == Some(false) || wants("ipv6") == Some(true) {
                found.retain(SocketAddr::is_ipv6);
            }
            if wants("ipv6") == Some(false) || wants("ipv4") == Some(true) {
                found.retain(SocketAddr::is_ipv4);
            }
            let last = v.get("to").and_then(Value::as_u64).unwrap_or(0);
            let more: Vec<_> = found
                .iter()
                .flat_map(|a| {
                    (u64::from(a.port()) + 1..=last)
                        .map(|p| SocketAddr::new(a.ip(), u16::try_from(p).unwrap_or(u16::MAX)))
                })
                .collect();
            found.extend(more);
            Ok(Address::Tcp(found))
        }
        other => Err(Error::unsupported(format!(
            "sockets of type '{}' are not offered by this version: use unix or inet",
            other.unwrap_or_default()
        ))),
    }
}

/// Listens on the first of these addresses that works.
pub async fn listen(list: &[SocketAddr]) -> Result<Listener> {
    let mut last = Err(Error::invalid("the address names no host"));
    for a in list {
        last = Listener::tcp(*a).await;
        if last.is_ok() {
            break;
        }
    }
    last
}

//! Socket addresses as options give them.

use std::net::SocketAddr;

use gipfel_base::{Error, Result};
use gipfel_io::address::{Address, resolve};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The members of all kinds of addresses, and of character devices on sockets.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Members {
    path: Option<String>,
    r#abstract: bool,
    tight: Option<bool>,
    host: Option<String>,
    port: Option<String>,
    to: Option<u16>,
    ipv4: Option<bool>,
    ipv6: Option<bool>,
    numeric: bool,
    keep_alive: bool,
    mptcp: bool,
    #[serde(alias = "str")]
    fd: Option<String>,
}

impl Members {
    /// The address that they describe. `host` stands for an empty or missing one.
    pub async fn address(&self, host: &str) -> Result<Address> {
        match (&self.path, &self.port, &self.fd) {
            (Some(p), None, None) if self.r#abstract => {
                Address::abstract_name(p.as_bytes(), self.tight.unwrap_or(true))
            }
            (Some(p), None, None) => Ok(Address::Unix(p.into())),
            (None, Some(port), None) => {
                let host = self.host.as_deref().filter(|h| !h.is_empty()).unwrap_or(host);
                self.tcp(host, port).await
            }
            (None, None, Some(fd)) => {
                let number = fd.parse().map_err(|_| {
                    Error::invalid(format!(
                        "'{fd}' is no descriptor: give the number of one that this program was \
                         started with"
                    ))
                })?;
                Ok(Address::Passed(number))
            }
            _ => Err(Error::invalid("a socket needs one of 'path', 'port' (with 'host') and 'fd'")),
        }
    }

    async fn tcp(&self, host: &str, port: &str) -> Result<Address> {
        if self.mptcp {
            return Err(Error::unsupported("mptcp=on is not offered by this version"));
        }
        let mut list = resolve(host, port, self.numeric).await?;
        // Without a host the sockets of IPv6 take clients of both kinds, unless one is named.
        if host.is_empty() && self.ipv4 == Some(true) && self.ipv6 != Some(true) {
            list = resolve("0.0.0.0", port, true).await?;
        }
        if self.ipv4 == Some(false) || self.ipv6 == Some(true) {
            list.retain(SocketAddr::is_ipv6);
        }
        if self.ipv6 == Some(false) || self.ipv4 == Some(true) {
            list.retain(SocketAddr::is_ipv4);
        }
        if let Some(last) = self.to {
            let more = |a: &SocketAddr| {
                let ip = a.ip();
                (a.port().saturating_add(1)..=last).map(move |p| SocketAddr::new(ip, p))
            };
            let further: Vec<_> = list.iter().flat_map(more).collect();
            list.extend(further);
        }
        Ok(Address::Tcp { list, keep_alive: self.keep_alive })
    }
}

/// A SocketAddress, flat (`{"type": "unix", "path": ...}`) or legacy (members under `data`).
pub async fn read(mut v: Map<String, Value>) -> Result<Address> {
    // What each kind may have was checked by the schema.
    v.remove("type");
    if let Some(Value::Object(data)) = v.remove("data") {
        v = data;
    }
    let members: Members = serde_json::from_value(Value::Object(v))
        .map_err(|e| Error::invalid(format!("socket address: {e}")))?;
    members.address("").await
}

//! Opening an image: options, header, and the search for a slot that the passphrase opens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_io::{Buf, RangeLock};
use gipfel_node::{Child, Discard, OpenArgs, Opened, Secret, Secrets};
use serde::Deserialize;
use serde_json::Value;
use zeroize::Zeroizing;

use super::data::{Partial, payload_size};
use super::header::{self, Header};
use super::unlock::{self, Key};
use super::{Luks, told};

/// What may be said of a node beside its children (BlockdevOptionsLUKS).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Options {
    key_secret: Option<String>,
}

impl Options {
    pub(super) fn parse(options: Value) -> Result<Options> {
        serde_json::from_value(options)
            .map_err(|e| Error::invalid(format!("options of format 'luks': {e}")))
    }
}

/// Opens an image with the passphrase that the option `key-secret` names among `secrets`.
pub(super) async fn open(args: OpenArgs, secrets: &Secrets) -> Result<Opened> {
    let options = Options::parse(args.options)?;
    let id = options.key_secret.as_deref().ok_or_else(|| {
        Error::invalid(
            "the image is encrypted: give the id of the secret object that holds its passphrase as \
             'key-secret'",
        )
    })?;
    let secret = secrets.get(id)?;
    let children = <[Arc<Child>; 2]>::try_from(args.children)
        .map_err(|_| Error::invalid("format 'luks' has two children, 'file' and 'header'"))?;
    let detached = children[1].node().await.is_some();
    let from = &children[usize::from(detached)];
    let header = Arc::new(read_header(from, detached).await.at(|| format!("'{}'", from.label()))?);
    let below = children[0].size().await?;
    let size = payload_size(header.payload, below)?;
    let master = unlock(from, &header, &secret).await.at(|| format!("secret '{id}'"))?;
    let driver = Luks {
        told: told(&header, detached),
        cipher: header.spec.keyed(&master)?,
        payload: header.payload,
        seen: AtomicU64::new(size),
        unmap: Arc::new(AtomicBool::new(args.common.discard == Discard::Unmap)),
        writes: RangeLock::new(),
        partial: Partial::default(),
        children,
        options,
    };
    Ok(Opened { driver: Box::new(driver), implicit: Vec::new() })
}

async fn read_header(child: &Child, detached: bool) -> Result<Header> {
    let first = Buf::new(child.size().await?.min(header::LEN as u64) as usize);
    child.read(0, first.clone()).await?;
    Header::parse(&first.to_vec(), detached)
}

/// The master key, from the first slot that the passphrase opens.
async fn unlock(child: &Child, header: &Arc<Header>, secret: &Arc<Secret>) -> Result<Key> {
    let end = child.size().await?;
    let mut tried = 0;
    for (i, slot) in header.slots.iter().enumerate().filter(|(_, s)| s.active) {
        let range = header.material(slot);
        if range.end() > end {
            return Err(Error::corrupt(format!(
                "key material of slot {i} ends at {:#x}, past the end of the image at {end:#x}",
                range.end()
            )));
        }
        let buf = Buf::new(range.len() as usize);
        child.read(range.start(), buf.clone()).await?;
        let material = Zeroizing::new(buf.to_vec());
        let (header, slot, secret) = (header.clone(), slot.clone(), secret.clone());
        // Seconds of work by intent: not on the thread that serves everybody.
        let found =
            gipfel_io::compute(move || unlock::try_slot(&header, &slot, secret.bytes(), material));
        if let Some(key) = found.await? {
            return Ok(key);
        }
        tried += 1;
    }
    let why = match tried {
        0 => "the image has no active key slot: no passphrase opens it any more".to_owned(),
        n => format!("its passphrase opens none of the image's {n} active key slots"),
    };
    Err(Error::new(ErrorKind::PermissionDenied, why))
}

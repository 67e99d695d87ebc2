//! The options of driver `file` (QMP reference, BlockdevOptionsFile).

use gipfel_base::{Error, Result};
use gipfel_node::Common;
use serde::Deserialize;
use serde_json::Value;

use super::lock::Use;

/// Which interface of the kernel the user asks for. All are accepted for the sake of existing
/// command lines; requests always go through io_uring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Aio {
    #[default]
    Threads,
    Native,
    IoUring,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) struct Options {
    pub(super) filename: String,
    #[serde(default)]
    pub(super) locking: Use,
    #[serde(default)]
    pub(super) aio: Aio,
    /// Requests that are handed over at once; the ring has no such bound.
    #[serde(default)]
    aio_max_batch: u64,
    pr_manager: Option<String>,
    /// What happens to the page cache when an image is handed over to another host. Images are
    /// not handed over yet, so this and the next one have no effect.
    drop_cache: Option<bool>,
    x_check_cache_dropped: Option<bool>,
}

impl Options {
    /// Reads and checks the options.
    pub(super) fn parse(options: Value, common: &Common) -> Result<Options> {
        let o: Options = serde_json::from_value(options)
            .map_err(|e| Error::invalid(format!("options of driver 'file': {e}")))?;
        if o.filename.is_empty() {
            return Err(Error::invalid("option 'filename' is empty"));
        }
        if o.filename.starts_with("/dev/fdset/") {
            return Err(Error::unsupported(format!(
                "'{}': sets of passed descriptors are not offered by this version; \
                 give the file's own name",
                o.filename
            )));
        }
        if let Some(p) = &o.pr_manager {
            return Err(Error::unsupported(format!(
                "option 'pr-manager' ('{p}'): persistent reservations are not offered by this \
                 version; leave the option out"
            )));
        }
        if o.aio == Aio::Native && !common.direct {
            return Err(Error::invalid("option aio=native needs cache.direct=on"));
        }
        if common.force_share && !common.read_only {
            return Err(Error::invalid("option force-share=on needs read-only=on"));
        }
        Ok(o)
    }
}

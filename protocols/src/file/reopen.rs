//! New options for an open file: read-only and discard can change, the rest must stay.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gipfel_base::{Error, Result};
use gipfel_node::{Common, Reopen};
use serde_json::Value;

use super::FileDriver;
use super::options::Options;

/// What a reopen can change.
#[derive(Default)]
pub(super) struct Flags {
    /// Whether requests may write now.
    pub(super) writable: AtomicBool,
    /// Whether options allow writing.
    pub(super) may_write: AtomicBool,
    /// Whether discard gives space back.
    pub(super) unmap: AtomicBool,
}

struct Prepared {
    flags: Arc<Flags>,
    read_only: bool,
    unmap: bool,
}

impl Reopen for Prepared {
    fn commit(self: Box<Self>) {
        self.flags.unmap.store(self.unmap, Ordering::Release);
        self.flags.may_write.store(!self.read_only, Ordering::Release);
        self.flags.writable.store(!self.read_only, Ordering::Release);
    }
}

impl FileDriver {
    pub(super) async fn prepare_reopen(
        &self,
        mut options: Value,
        read_only: bool,
    ) -> Result<Box<dyn Reopen>> {
        let unmap = match options.as_object_mut().and_then(|o| o.remove("discard")) {
            Some(Value::String(s)) => s == "unmap",
            _ => false,
        };
        let common = Common { direct: self.direct_io, read_only, ..Common::default() };
        let new = Options::parse(options, &common)?;
        for (name, same) in [
            ("filename", new.filename == self.options.filename),
            ("locking", new.locking == self.options.locking),
        ] {
            if !same {
                return Err(Error::unsupported(format!(
                    "option '{name}' of {} cannot be changed while it is open",
                    self.at()
                )));
            }
        }
        if !read_only {
            self.open_for_writing().await?;
        }
        Ok(Box::new(Prepared { flags: self.flags.clone(), read_only, unmap }))
    }
}

//! How a driver is announced, opened and created: plain values and functions, gathered into a
//! registry by the binary.

use std::sync::Arc;

use gipfel_base::Result;
use serde_json::{Map, Value};

use crate::check::{CheckArgs, CheckReport};
use crate::child::Child;
use crate::driver::{Driver, IoFuture};
use crate::perm::{Binding, Role};

/// Which of the three kinds a driver is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reaches storage, has no children.
    Protocol,
    /// Gives structure to its children's bytes.
    Format,
    /// Shows exactly the data of its one filtered child.
    Filter,
}

/// A child that a driver can have.
#[derive(Clone, Copy, Debug)]
pub struct ChildSpec {
    /// The option and edge name, such as `file`.
    pub name: &'static str,
    /// What it is to the node.
    pub role: Role,
    /// What happens to the edge when the child is overlaid.
    pub binding: Binding,
    /// Whether the node cannot be without it.
    pub required: bool,
}

/// What happens to discard requests of the clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// They are ignored.
    #[default]
    Ignore,
    /// They give space back.
    Unmap,
}

/// The options that every driver has.
#[derive(Clone, Copy, Debug, Default)]
pub struct Common {
    /// No write is allowed.
    pub read_only: bool,
    /// Read-only is fine where writing is not possible.
    pub auto_read_only: bool,
    /// What discard does.
    pub discard: Discard,
    /// Past the host's page cache.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
    /// No locks against other processes.
    pub force_share: bool,
}

/// What a driver is opened with.
pub struct OpenArgs {
    /// The node's name.
    pub node_name: String,
    /// The driver's own options, without children and common ones, valid by the schema.
    pub options: Value,
    /// The common options.
    pub common: Common,
    /// One edge for each [`ChildSpec`] of the driver, in that order; those not given are empty. Of
    /// [`Role::Copy`] there are as many as were given.
    pub children: Vec<Arc<Child>>,
}

/// A child that an image names itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Implicit {
    /// Which child.
    pub child: &'static str,
    /// The file name as the image has it (relative to the image).
    pub filename: String,
    /// The format, where the image says it.
    pub format: Option<String>,
}

/// An opened driver.
pub struct Opened {
    /// The instance.
    pub driver: Box<dyn Driver>,
    /// Children named by the image, to be opened by policy unless given by the user. A driver
    /// opens nothing itself.
    pub implicit: Vec<Implicit>,
}

/// What an image is created with.
pub struct CreateArgs {
    /// The options of `blockdev-create` without `driver` and without node references.
    pub options: Value,
    /// The edges to the nodes that are given as `file`, `data-file`.
    pub children: Vec<(String, Arc<Child>)>,
}

/// What a file name is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameFor {
    /// Storage: no format is looked for in it.
    Storage,
    /// An image: its format is looked for.
    Image,
}

/// What a file name of the form `DRIVER:REST` says.
#[derive(Clone, Debug, Default)]
pub struct FromName {
    /// The driver's own options.
    pub options: Map<String, Value>,
    /// Its children, by further file names.
    pub children: Vec<(&'static str, String, NameFor)>,
}

/// Reads the `REST` of a file name `DRIVER:REST`.
pub type ReadName = fn(&str) -> Result<FromName>;

/// A driver as the registry holds it.
pub struct DriverDef {
    /// Its name in options.
    pub name: &'static str,
    /// Its kind.
    pub kind: Kind,
    /// Its children.
    pub children: &'static [ChildSpec],
    /// Opens an instance.
    pub open: fn(OpenArgs) -> IoFuture<'static, Opened>,
    /// Makes a new image (`blockdev-create`).
    pub create: Option<fn(CreateArgs) -> IoFuture<'static>>,
    /// How sure (0 to 100) the driver is that an image that begins with these bytes is its own.
    pub probe: Option<fn(&[u8]) -> u8>,
    /// Checks an image's metadata without opening it as a node.
    pub check: Option<fn(CheckArgs) -> IoFuture<'static, CheckReport>>,
}

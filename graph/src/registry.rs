//! The drivers that a process knows. Filled by the binary; this crate names none.

use std::collections::BTreeMap;
use std::sync::Arc;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::{Child, Driver, DriverDef, IoFuture, OpenArgs, Opened, ReadName};

/// What happens to writes of zeros that a client sends as data (option detect-zeroes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroDetection {
    /// They are written.
    #[default]
    Off,
    /// They become a write of zeros.
    On,
    /// They become a write of zeros that gives space back.
    Unmap,
}

impl ZeroDetection {
    /// Its name in the QMP reference (BlockdevDetectZeroesOptions).
    pub fn name(self) -> &'static str {
        match self {
            ZeroDetection::Off => "off",
            ZeroDetection::On => "on",
            ZeroDetection::Unmap => "unmap",
        }
    }
}

/// An implicit filter: its definition and how to make one.
pub type MakeFilter<T> = (&'static DriverDef, fn(Arc<Child>, T) -> Box<dyn Driver>);

/// The filters that options put into the graph.
#[derive(Clone, Copy)]
pub struct ImplicitFilters {
    /// For the option detect-zeroes; made with whether space is given back.
    pub detect_zeroes: MakeFilter<bool>,
    /// For the option copy-on-read.
    pub copy_on_read: MakeFilter<()>,
}

/// Opens a driver that needs more than its options, such as objects of the process.
pub type Opener = Box<dyn Fn(OpenArgs) -> IoFuture<'static, Opened>>;

/// Makes the implicit throttle over an edge: for the throttle group of that name and the owner of
/// that name. Fails where there is no such group and none can be made.
pub type MakeThrottle = Box<dyn Fn(Arc<Child>, &str, &str) -> Result<Box<dyn Driver>>>;

/// All drivers, by name.
pub struct Registry {
    drivers: BTreeMap<&'static str, &'static DriverDef>,
    openers: BTreeMap<&'static str, Opener>,
    names: BTreeMap<&'static str, ReadName>,
    throttle: Option<(&'static DriverDef, MakeThrottle)>,
    /// The filters that options put into the graph.
    pub implicit: ImplicitFilters,
    /// The driver that a plain file name means.
    pub file_protocol: &'static str,
    /// The format of an image in which no other format is found.
    pub raw_format: &'static str,
}

impl Registry {
    /// A registry of these drivers.
    pub fn new(
        drivers: &[&'static DriverDef],
        implicit: ImplicitFilters,
        file_protocol: &'static str,
        raw_format: &'static str,
    ) -> Registry {
        let drivers = drivers.iter().map(|d| (d.name, *d)).collect();
        let (openers, names, throttle) = (BTreeMap::new(), BTreeMap::new(), None);
        Registry { drivers, openers, names, throttle, implicit, file_protocol, raw_format }
    }

    /// Lets `opener` open the driver `name` in place of the driver's own function.
    #[must_use]
    pub fn with_opener(mut self, name: &'static str, opener: Opener) -> Registry {
        self.openers.insert(name, opener);
        self
    }

    /// Lets file names `NAME:REST` mean the driver `name`.
    #[must_use]
    pub fn with_file_names(mut self, name: &'static str, read: ReadName) -> Registry {
        self.names.insert(name, read);
        self
    }

    /// What reads the rest of the file names that begin with `prefix` and a colon.
    pub(crate) fn file_names(&self, prefix: &str) -> Option<(&'static str, ReadName)> {
        self.names.get_key_value(prefix).map(|(name, read)| (*name, *read))
    }

    /// Gives backends an implicit throttle: its definition and how to make one.
    #[must_use]
    pub fn with_throttle(mut self, def: &'static DriverDef, make: MakeThrottle) -> Registry {
        self.throttle = Some((def, make));
        self
    }

    /// Opens an instance of `def`.
    pub(crate) fn open(&self, def: &DriverDef, args: OpenArgs) -> IoFuture<'static, Opened> {
        match self.openers.get(def.name) {
            Some(opener) => opener(args),
            None => (def.open)(args),
        }
    }

    pub(crate) fn throttle(&self) -> Result<&(&'static DriverDef, MakeThrottle)> {
        self.throttle
            .as_ref()
            .ok_or_else(|| Error::unsupported("there are no throttle groups in this process"))
    }

    /// The driver of that name.
    pub fn get(&self, name: &str) -> Result<&'static DriverDef> {
        self.drivers.get(name).copied().ok_or_else(|| {
            let known: Vec<_> = self.drivers.keys().copied().collect();
            Error::new(
                ErrorKind::NotFound,
                format!("there is no driver '{name}'; drivers are {}", known.join(", ")),
            )
        })
    }

    /// All drivers.
    pub fn drivers(&self) -> impl Iterator<Item = &'static DriverDef> {
        self.drivers.values().copied()
    }

    /// The driver that recognises an image by its first bytes, if one does.
    pub fn probe(&self, first: &[u8]) -> Option<&'static DriverDef> {
        self.drivers()
            .filter_map(|d| d.probe.map(|p| (p(first), d)))
            .filter(|(sure, _)| *sure > 0)
            .max_by_key(|(sure, _)| *sure)
            .map(|(_, d)| d)
    }
}

//! The concrete drivers: the one place where they are named together.

use gipfel_graph::{ImplicitFilters, Registry};
use gipfel_node::DriverDef;

use crate::daemon::objects::Objects;

/// All drivers.
const DRIVERS: [&DriverDef; 5] = [
    &gipfel_protocols::FILE,
    &gipfel_protocols::NULL_CO,
    &gipfel_protocols::NULL_AIO,
    &gipfel_formats::RAW,
    &gipfel_formats::QCOW2,
];

/// The registry of a process whose objects are these.
pub fn registry(_: &Objects) -> Registry {
    let implicit = ImplicitFilters {
        detect_zeroes: (&gipfel_formats::RAW, |_, _| unreachable!()),
        copy_on_read: (&gipfel_formats::RAW, |_, ()| unreachable!()),
    };
    Registry::new(&DRIVERS, implicit, "file", "raw")
}

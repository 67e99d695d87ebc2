//! The concrete drivers: the one place where they are named together.

use std::sync::Arc;

use gipfel_filters::{
    BLKDEBUG, BLKLOGWRITES, BLKVERIFY, COMPRESS, COPY_BEFORE_WRITE, COPY_ON_READ, DETECT_ZEROES,
    PREALLOCATE, QUORUM, SNAPSHOT_ACCESS, THROTTLE, copy_on_read, detect_zeroes, quorum,
};
use gipfel_formats::{LUKS, luks};
use gipfel_graph::{ImplicitFilters, Registry};
use gipfel_node::{DriverDef, Reports};

use crate::daemon::objects::Objects;

/// All drivers that can be named.
const DRIVERS: [&DriverDef; 16] = [
    &gipfel_protocols::FILE,
    &gipfel_protocols::NULL_CO,
    &gipfel_protocols::NULL_AIO,
    &gipfel_formats::RAW,
    &gipfel_formats::QCOW2,
    &LUKS,
    &BLKDEBUG,
    &BLKLOGWRITES,
    &BLKVERIFY,
    &COMPRESS,
    &COPY_BEFORE_WRITE,
    &COPY_ON_READ,
    &PREALLOCATE,
    &QUORUM,
    &SNAPSHOT_ACCESS,
    &THROTTLE,
];

/// The registry of a process whose objects are these and whose drivers report to `reports`.
pub fn registry(objects: &Objects, reports: &Arc<Reports>) -> Registry {
    let implicit = ImplicitFilters {
        detect_zeroes: (&DETECT_ZEROES, detect_zeroes::make),
        copy_on_read: (&COPY_ON_READ, |child, ()| copy_on_read::make(child)),
    };
    let reports = reports.clone();
    let (opening, making) = (objects.groups().clone(), objects.groups().clone());
    let secrets = objects.secrets().clone();
    Registry::new(&DRIVERS, implicit, "file", "raw")
        .with_opener(THROTTLE.name, Box::new(move |args| opening.open(args)))
        .with_opener(
            QUORUM.name,
            Box::new(move |args| quorum::open_reporting(args, reports.clone())),
        )
        .with_opener(LUKS.name, Box::new(move |args| luks::open(args, secrets.clone())))
        .with_throttle(
            &THROTTLE,
            Box::new(move |child, group, owner| making.make(child, group, owner)),
        )
}

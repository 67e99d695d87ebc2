//! The concrete drivers: the one place where they are named together.

use std::sync::Arc;

use gipfel_base::{Error, Result};
use gipfel_filters::{
    BLKDEBUG, BLKLOGWRITES, BLKVERIFY, COMPRESS, COPY_BEFORE_WRITE, COPY_ON_READ, DETECT_ZEROES,
    PREALLOCATE, QUORUM, SNAPSHOT_ACCESS, THROTTLE, blkdebug, blkverify, copy_on_read,
    detect_zeroes, quorum,
};
use gipfel_formats::{LUKS, luks, qcow2, raw};
use gipfel_graph::{ImplicitFilters, Registry};
use gipfel_node::{DriverDef, ImageSize, Reports};
use gipfel_protocols::null;
use serde_json::Value;

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

/// Fails unless there is a driver of that name.
pub fn check_name(name: &str) -> Result<()> {
    match DRIVERS.iter().any(|d| d.name == name) {
        true => Ok(()),
        false => Err(Error::invalid(format!("there is no driver '{name}'"))),
    }
}

/// Tells how large an image becomes that is made with these options (BlockdevCreateOptions of its
/// format without `driver`).
pub type Measure = fn(Value) -> Result<ImageSize>;

/// What measures images of `format`, where that is known.
pub fn measure(format: &str) -> Option<Measure> {
    match format {
        "raw" => Some(raw::measure),
        "qcow2" => Some(qcow2::measure),
        _ => None,
    }
}

/// Whether images of `format` can hold bitmaps.
pub fn keeps_bitmaps(format: &str) -> bool {
    format == qcow2::QCOW2.name
}

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
        .with_file_names(BLKDEBUG.name, blkdebug::read_name)
        .with_file_names(BLKVERIFY.name, blkverify::read_name)
        .with_file_names(gipfel_protocols::NULL_CO.name, null::read_name)
        .with_file_names(gipfel_protocols::NULL_AIO.name, null::read_name)
        .with_throttle(
            &THROTTLE,
            Box::new(move |child, group, owner| making.make(child, group, owner)),
        )
}

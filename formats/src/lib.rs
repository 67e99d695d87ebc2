//! Format drivers: raw, qcow2 and luks.

pub mod luks;
pub mod qcow2;
pub mod raw;

pub use luks::LUKS;
pub use qcow2::QCOW2;
pub use raw::RAW;

use gipfel_node::DriverDef;

/// All formats. Any bytes are a raw image; the others know their own by their first bytes.
pub static FORMATS: [&DriverDef; 3] = [&RAW, &QCOW2, &LUKS];

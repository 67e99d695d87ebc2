//! Format drivers: raw, qcow2 and luks.

pub mod luks;
pub mod qcow2;
pub mod raw;

pub use luks::LUKS;
pub use qcow2::QCOW2;
pub use raw::RAW;

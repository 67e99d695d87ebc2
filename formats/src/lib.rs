//! Format drivers: raw and qcow2.

pub mod qcow2;
pub mod raw;

pub use qcow2::QCOW2;
pub use raw::RAW;

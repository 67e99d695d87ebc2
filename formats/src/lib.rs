//! Format drivers: raw and qcow2.

pub mod qcow2;
pub mod raw;

pub use raw::RAW;

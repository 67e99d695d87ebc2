//! Format `qcow2`, versions 2 and 3 (qcow2 spec; BlockdevOptionsQcow2 of the QMP reference).

pub mod check;
pub mod entry;
pub mod geometry;
pub mod header;

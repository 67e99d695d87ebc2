//! Format drivers: raw and qcow2.

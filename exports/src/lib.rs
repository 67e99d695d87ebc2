//! Exports: servers that show graph backends to clients outside. So far: NBD.
//!
//! An export knows a backend handle and nothing of nodes, drivers, formats or jobs.

pub mod nbd;

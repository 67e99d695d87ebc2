//! Exports: the NBD server. Exports know graph backends only: no driver, no job, no command.

mod disk;
pub mod nbd;
pub mod table;

pub use table::{ExportInfo, Exports, NewExport};

//! Compares our protocol with the reference daemon, where it is installed.
//!
//! What is compared: the declarations, which JSON is accepted, which arguments and which option
//! text pass the checks. Where we differ on purpose, the test says so.

mod daemon;
mod declared;
mod messages;
mod options;

//! The tests of the graph, in the simulated world: rows of mutators.md one by one, all of them in
//! all settings (`matrix`), and at random (`histories`).
#![allow(missing_docs)]

mod common;
mod copies;
mod histories;
mod job_filters;
mod matrix;
mod media;
mod mutators;
mod refusals;
mod throttle;

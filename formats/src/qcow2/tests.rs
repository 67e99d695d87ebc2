//! The driver in the simulated world: a model beside it, and the loss of power at every I/O.

mod crash;
mod disk;
mod events;
mod model;
mod sizes;

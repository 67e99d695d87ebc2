//! The driver in the simulated world: a model beside it, and the loss of power at every I/O.

mod crash;
mod disk;
mod events;
mod judged;
mod model;
mod sizes;
mod subclusters;

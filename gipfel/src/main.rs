//! The gipfel binary: daemon, image tools, demo.

fn main() {}

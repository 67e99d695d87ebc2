//! Steps that several tests of the graph share.

use std::rc::Rc;

use gipfel_base::{ErrorKind, Result};
use gipfel_graph::{Backend, BackendOptions, Graph};
use gipfel_io::Buf;
use gipfel_io::sim::World;

use super::{BLOCK, graph, picture};

pub fn sim<F: Future>(seed: u64, f: impl FnOnce(Rc<Graph>) -> F) -> F::Output {
    World::new(seed).run(async move { f(graph()).await })
}

pub fn writer() -> BackendOptions {
    BackendOptions { writable: true, ..Default::default() }
}

pub fn reader() -> BackendOptions {
    BackendOptions::default()
}

pub async fn read_byte(b: &Backend, at: u64) -> u8 {
    let buf = Buf::new(BLOCK as usize);
    b.read(at, buf.clone()).await.unwrap();
    buf.to_vec()[0]
}

pub async fn write_byte(b: &Backend, at: u64, byte: u8) {
    b.write(at, Buf::from_slice(&[byte; BLOCK as usize]), false).await.unwrap();
}

pub async fn refused<T>(
    g: &Rc<Graph>,
    before: &[String],
    r: Result<T>,
    kind: ErrorKind,
    says: &str,
) {
    let e = r.err().unwrap_or_else(|| panic!("this had to be refused: {says}"));
    assert_eq!(e.kind(), kind, "{e}");
    assert!(e.to_string().contains(says), "'{e}' does not say '{says}'");
    assert_eq!(picture(g).await, before, "a refused change changes nothing");
}

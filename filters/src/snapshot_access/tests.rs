//! What snapshot-access shows and refuses; that the moment itself stays is tested with
//! copy-before-write.

use std::sync::Arc;

use gipfel_base::{ByteRange, ErrorKind};
use gipfel_io::Buf;
use gipfel_io::sim::World;
use gipfel_node::{
    Child, Common, Discard, DriverDef, Node, OpenArgs, Perm, Perms, Role, WriteFlags, ZeroFlags,
};
use serde_json::json;

use super::SNAPSHOT_ACCESS;
use crate::copy_before_write::COPY_BEFORE_WRITE;
use crate::testing::overlay;

const SIZE: u64 = 4 << 16;
const GRANULE: u64 = 1 << 16;

async fn open(
    def: &'static DriverDef,
    name: &str,
    below: &[&Arc<Node>],
    discard: Discard,
) -> gipfel_base::Result<Arc<Node>> {
    let children = below.iter().zip(def.children);
    let children: Vec<_> = children
        .map(|(n, spec)| Child::new(format!("{name}.{}", spec.name), Some((*n).clone())))
        .collect();
    let common = Common { discard, ..Common::default() };
    let args = OpenArgs { node_name: name.into(), options: json!({}), common, children };
    Ok(Node::new(name.into(), def, (def.open)(args).await?.driver))
}

#[test]
fn it_shows_the_moment_and_takes_no_writes() {
    World::new(1).run(async {
        let (disk, _) = overlay("disk", SIZE, None, 0);
        let (target, _) = overlay("target", SIZE, None, 0);
        let cbw = open(&COPY_BEFORE_WRITE, "cbw", &[&disk, &target], Discard::Ignore).await;
        let cbw = cbw.unwrap();
        let guest = Child::new("guest", Some(cbw.clone()));
        for discard in [Discard::Ignore, Discard::Unmap] {
            let node = open(&SNAPSHOT_ACCESS, "snap", &[&cbw], discard).await.unwrap();
            assert_eq!(node.size(), SIZE);
            let snap = Child::new("reader", Some(node.clone()));
            let bytes = Buf::from_slice(&[5; 512]);
            guest.write(0, bytes.clone(), WriteFlags::default()).await.unwrap();
            let seen = Buf::from_slice(&[1; 512]);
            snap.read(0, seen.clone()).await.unwrap();
            assert!(seen.is_zero());
            let e = snap.write(0, bytes, WriteFlags::default()).await.unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Unsupported);
            let zero = snap.write_zeroes(ByteRange::new(0, 512), ZeroFlags::default()).await;
            assert_eq!(zero.unwrap_err().kind(), ErrorKind::Unsupported);
            snap.discard(ByteRange::new(GRANULE, GRANULE)).await.unwrap();
            let there = snap.read(GRANULE, seen).await.is_ok();
            assert_eq!(there, discard == Discard::Ignore, "discards are heeded as the option says");
            let reader = Perms { used: Perm::CONSISTENT_READ | Perm::WRITE, shared: Perm::ALL };
            let p = node.driver().child_perms(0, Role::Data, reader, true);
            assert_eq!(p, Perms { used: Perm::CONSISTENT_READ, shared: Perm::ALL });
        }
    });
}

#[test]
fn it_stands_on_copy_before_write_only() {
    World::new(2).run(async {
        let (disk, _) = overlay("disk", SIZE, None, 0);
        let e = open(&SNAPSHOT_ACCESS, "snap", &[&disk], Discard::Ignore).await.err().unwrap();
        assert!(e.to_string().contains("must lead to a copy-before-write node"), "{e}");
        // The edge may be re-pointed later on: to a disk, or to the moment of a smaller one.
        let (target, _) = overlay("target", SIZE, None, 0);
        let (small, _) = overlay("small", SIZE / 2, None, 0);
        let cbw = open(&COPY_BEFORE_WRITE, "c", &[&disk, &target], Discard::Ignore).await.unwrap();
        let less =
            open(&COPY_BEFORE_WRITE, "l", &[&small, &target], Discard::Ignore).await.unwrap();
        let node = open(&SNAPSHOT_ACCESS, "snap", &[&cbw], Discard::Unmap).await.unwrap();
        let snap = Child::new("reader", Some(node.clone()));
        for (other, says) in [(disk, "keeps no snapshot"), (less, "ends at 0x20000")] {
            let edge = node.driver().children()[0].clone();
            edge.drain().await.replace(Some(other));
            let all = ByteRange::new(SIZE - 512, 512);
            for e in [
                snap.read(SIZE - 512, Buf::new(512)).await.unwrap_err(),
                snap.discard(all).await.unwrap_err(),
                snap.status(all).await.unwrap_err(),
            ] {
                assert!(e.to_string().contains(says), "{e}");
            }
        }
    });
}

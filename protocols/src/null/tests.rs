//! Drivers `null-co` and `null-aio`: sizes, zeros, latency, refusals.

use std::sync::Arc;
use std::time::Duration;

use gipfel_base::{ByteRange, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_io::sim::World;
use gipfel_io::time::Instant;
use gipfel_node::{Child, Common, Node, OpenArgs, WriteFlags, ZeroFlags};
use serde_json::{Value, json};

use super::{NULL_AIO, NULL_CO};

async fn open(options: Value) -> Result<(Arc<Node>, Arc<Child>)> {
    let common = Common::default();
    let args = OpenArgs { node_name: "n".into(), options, common, children: Vec::new() };
    let opened = (NULL_CO.open)(args).await?;
    let node = Node::new("n".into(), &NULL_CO, opened.driver);
    Ok((node.clone(), Child::new("test.null", Some(node))))
}

#[test]
fn reads_give_zeros_and_never_what_memory_held() {
    World::new(1).run(async {
        for options in [json!({}), json!({ "read-zeroes": true }), json!({ "latency-ns": 5 })] {
            let (node, edge) = open(options).await.unwrap();
            assert_eq!(node.size(), 1 << 30);
            let b = Buf::new(4096);
            b.fill(0xee);
            edge.write(512, b.clone(), WriteFlags { fua: true, ..WriteFlags::default() })
                .await
                .unwrap();
            edge.read(512, b.clone()).await.unwrap();
            assert!(b.is_zero());
            edge.write_zeroes(ByteRange::new(0, 1 << 30), ZeroFlags::default()).await.unwrap();
            edge.discard(ByteRange::new(1, 9)).await.unwrap();
            edge.flush().await.unwrap();
            let past = edge.read((1 << 30) - 1, Buf::new(2)).await.unwrap_err();
            assert_eq!(past.kind(), ErrorKind::InvalidInput);
            let past = edge.write(1 << 30, b, WriteFlags::default()).await.unwrap_err();
            assert_eq!(past.kind(), ErrorKind::InvalidInput);
        }
    });
}

#[test]
fn only_read_zeroes_promises_zeros() {
    World::new(2).run(async {
        for promised in [false, true] {
            let options = json!({ "size": 5000, "read-zeroes": promised });
            let (node, edge) = open(options).await.unwrap();
            let s = edge.status(ByteRange::new(100, 10_000)).await.unwrap();
            assert_eq!((s.len, s.allocated, s.data, s.zero), (4900, true, true, promised));
            assert_eq!(node.driver().reads_zero_when_new(), promised);
            assert_eq!(node.driver().info().await.unwrap().allocated, Some(0));
        }
    });
}

#[test]
fn every_request_takes_the_latency() {
    World::new(3).run(async {
        let (_, edge) = open(json!({ "latency-ns": 1_000_000 })).await.unwrap();
        let start = Instant::now();
        edge.read(0, Buf::new(512)).await.unwrap();
        edge.write(0, Buf::new(512), WriteFlags::default()).await.unwrap();
        edge.write_zeroes(ByteRange::new(0, 512), ZeroFlags::default()).await.unwrap();
        edge.discard(ByteRange::new(0, 512)).await.unwrap();
        edge.flush().await.unwrap();
        assert_eq!(Instant::now().since(start), Duration::from_millis(5));
    });
}

#[test]
fn wrong_options_are_refused() {
    World::new(4).run(async {
        for (options, says) in [
            (json!({ "size": 1u64 << 63 }), "more than"),
            (json!({ "size": -1 }), "invalid value"),
            (json!({ "size": "1G" }), "invalid type"),
            (json!({ "sise": 1 }), "unknown field `sise`"),
        ] {
            let e = open(options).await.err().unwrap();
            assert_eq!(e.kind(), ErrorKind::InvalidInput);
            assert!(e.to_string().contains(says), "{e}");
        }
        let (node, edge) = open(json!({ "size": i64::MAX })).await.unwrap();
        edge.read(node.size() - 512, Buf::new(512)).await.unwrap();
    });
    assert_eq!(NULL_AIO.name, "null-aio");
}

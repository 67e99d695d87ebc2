//! The length above and below, over plain bytes in memory.

use std::sync::Arc;

use gipfel_base::{ByteRange, Result};
use gipfel_io::Buf;
use gipfel_io::sim::World;
use gipfel_node::{
    Child, Common, DriverDef, Kind, Node, OpenArgs, Perm, Perms, WriteFlags, ZeroFlags,
};
use serde_json::{Value, json};

use super::PREALLOCATE;
use crate::testing::{Bytes, unopened};

static BYTES: DriverDef = unopened("bytes", Kind::Protocol, &[]);

async fn open(options: Value) -> Result<(Arc<Child>, Arc<Child>)> {
    let below = Child::new("p.file", Some(Node::new("b".into(), &BYTES, Box::<Bytes>::default())));
    let args = OpenArgs {
        node_name: "p".into(),
        options,
        common: Common::default(),
        children: vec![below.clone()],
    };
    let node = Node::new("p".into(), &PREALLOCATE, (PREALLOCATE.open)(args).await?.driver);
    Ok((Child::new("client.root", Some(node)), below))
}

#[test]
fn the_file_grows_ahead_of_its_data_and_is_cut_back() {
    World::new(1).run(async {
        let options = json!({ "prealloc-align": 4096, "prealloc-size": 10_000 });
        let (root, below) = open(options).await.unwrap();
        let lengths = || (root.size_now(), below.size_now());
        let write = async |at, len| {
            let data = Buf::from_slice(&vec![7; len]);
            root.write(at, data, WriteFlags::default()).await.unwrap();
        };
        write(0, 100).await;
        assert_eq!(lengths(), (100, 12_288));
        write(5000, 100).await;
        assert_eq!(lengths(), (5100, 12_288), "there was room");
        let gap = Buf::new(5100);
        root.read(0, gap.clone()).await.unwrap();
        let gap = gap.to_vec();
        assert!(gap[..100] == [7; 100] && gap[100..5000] == [0; 4900] && gap[5000..] == [7; 100]);
        // Zeros behind the data are there already.
        let zero = ByteRange::between(5050, 6000);
        root.write_zeroes(zero, ZeroFlags::default()).await.unwrap();
        assert_eq!(lengths(), (6000, 12_288));
        let end = Buf::new(1000);
        root.read(5000, end.clone()).await.unwrap();
        assert!(end.to_vec()[..50] == [7; 50] && end.to_vec()[50..] == [0; 950]);
        write(12_000, 1000).await;
        assert_eq!(lengths(), (13_000, 24_576));
        let driver = root.node().await.unwrap();
        let driver = driver.driver();
        driver.resize(13_100).await.unwrap();
        assert_eq!(lengths(), (13_100, 24_576));
        let perms = |used| Perms { used, shared: Perm::ALL };
        driver.set_perms(perms(Perm::WRITE)).await.unwrap();
        assert_eq!(lengths(), (13_100, 24_576));
        driver.set_perms(perms(Perm::CONSISTENT_READ)).await.unwrap();
        assert_eq!(lengths(), (13_100, 13_100), "nobody writes");
        write(13_100, 1).await;
        assert_eq!(lengths(), (13_101, 24_576));
        driver.resize(50).await.unwrap();
        assert_eq!(lengths(), (50, 50));
        let other = json!({ "prealloc-align": 512, "prealloc-size": 0 });
        driver.reopen(other, false).await.unwrap().commit();
        write(50, 1).await;
        assert_eq!(lengths(), (51, 512));
        driver.close().await.unwrap();
        assert_eq!(lengths(), (51, 51));
        assert!(open(json!({ "prealloc-align": 1000 })).await.is_err());
        assert!(driver.reopen(json!({ "prealloc-align": 1 }), false).await.is_err());
    });
}

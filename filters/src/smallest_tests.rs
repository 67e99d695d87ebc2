//! The example of docs/writing-a-filter.md does what it says, and the page shows it as it is.

use gipfel_base::{ByteRange, ErrorKind};
use gipfel_io::Buf;
use gipfel_io::sim::World;
use gipfel_node::{Common, OpenArgs, WriteFlags, ZeroFlags};
use serde_json::json;

use crate::smallest::GUARD;
use crate::testing::{BLOCK, overlay, stack};

#[test]
fn the_page_shows_the_filter() {
    let page = include_str!("../../docs/writing-a-filter.md");
    let code = page.split("```rust\n").nth(1).unwrap().split("```").next().unwrap();
    let file = include_str!("smallest.rs");
    assert_eq!(code, file, "copy filters/src/smallest.rs into the page");
    assert!(file.lines().count() < 60);
}

#[test]
fn the_first_block_is_guarded_and_nothing_else_changes() {
    World::new(1).run(async {
        let (disk, _) = overlay("disk", 64 * BLOCK, None, 100);
        let edge = gipfel_node::Child::new("filter.file", Some(disk));
        let args = OpenArgs {
            node_name: "filter".into(),
            options: json!({}),
            common: Common::default(),
            children: vec![edge],
        };
        let opened = (GUARD.open)(args).await.unwrap();
        let (root, _) = stack(&GUARD, None, |_| opened.driver);
        assert_eq!(root.size().await.unwrap(), 64 * BLOCK);
        let block = || Buf::from_slice(&[7; BLOCK as usize]);
        let flags = WriteFlags::default();
        let e = root.write(0, block(), flags).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ReadOnly);
        root.discard(ByteRange::new(0, BLOCK)).await.unwrap_err();
        root.write_zeroes(ByteRange::new(0, BLOCK), ZeroFlags::default()).await.unwrap_err();
        root.write(4096, block(), flags).await.unwrap();
        root.flush().await.unwrap();
        let all = Buf::new(4096 + BLOCK as usize);
        root.read(0, all.clone()).await.unwrap();
        let all = all.to_vec();
        assert!(all[..4096].iter().all(|b| *b == 0) && all[4096..].iter().all(|b| *b == 7));
    });
}

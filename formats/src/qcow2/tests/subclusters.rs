//! Extended L2 entries: what is allocated, copied and given back in parts of a cluster.

use gipfel_base::ByteRange;
use gipfel_io::Buf;
use gipfel_io::sim::World;
use gipfel_node::{Child, WriteFlags, ZeroFlags};
use serde_json::json;

use super::disk;

const CLUSTER: u64 = 65536;
const PART: u64 = CLUSTER / 32;

/// The runs of a range: how long each is, and a letter for what it is: `d`ata, `z`eros,
/// `u`nallocated, `c`ompressed.
async fn runs(image: &Child, range: ByteRange) -> Vec<(u64, char)> {
    let (mut left, mut runs) = (range, Vec::new());
    while !left.is_empty() {
        let s = image.status(left).await.unwrap();
        let what = match (s.allocated, s.zero, s.compressed) {
            (.., true) => 'c',
            (false, ..) => 'u',
            (_, true, _) => 'z',
            _ => 'd',
        };
        runs.push((s.len / PART, what));
        left = left.skip(s.len);
    }
    runs
}

async fn write(image: &Child, at: u64, len: u64, value: u8) {
    let buf = Buf::from_slice(&vec![value; len as usize]);
    image.write(at, buf, WriteFlags::default()).await.unwrap();
}

async fn read(image: &Child, at: u64, len: u64) -> Vec<u8> {
    let buf = Buf::new(len as usize);
    image.read(at, buf.clone()).await.unwrap();
    buf.to_vec()
}

/// The last L2 entry that is not empty, and how many there are.
fn last_entry(world: &World) -> (u64, u64, usize) {
    let file = world.file("image").unwrap();
    let word = |at: u64| {
        let b = file.get(at as usize..at as usize + 8).unwrap_or(&[0; 8]);
        u64::from_be_bytes(b.try_into().unwrap())
    };
    let table = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    let entries: Vec<_> = (0..CLUSTER / 16)
        .map(|i| (word(table + 16 * i), word(table + 16 * i + 8)))
        .filter(|e| *e != (0, 0))
        .collect();
    let last = entries.last().copied().unwrap_or_default();
    (last.0, last.1, entries.len())
}

#[test]
fn a_write_takes_the_subclusters_that_it_touches() {
    let world = World::new(1);
    world.put_file("base", vec![3; 4 * CLUSTER as usize]);
    world.run(async {
        let options = json!({ "size": 4 * CLUSTER, "cluster-size": CLUSTER, "extended-l2": true });
        disk::create("image", options).await;
        let image = disk::open("image", Some("base"), json!({})).await.unwrap();
        let first = ByteRange::new(0, CLUSTER);

        write(&image, 3000, 4096, 1).await;
        assert_eq!(runs(&image, first).await, [(1, 'u'), (3, 'd'), (28, 'u')]);
        let want = [vec![3; 3000], vec![1; 4096], vec![3; 2000]].concat();
        assert!(read(&image, 0, 9096).await == want, "what is around comes from below");
        write(&image, 10 * PART, PART, 2).await;
        image.flush().await.unwrap();
        assert_eq!(last_entry(&world).1, 0b100_0000_1110);

        // Zeros in part, and data there again, in the same cluster.
        let zeros = ByteRange::between(2 * PART, 5 * PART + 7);
        image.write_zeroes(zeros, ZeroFlags::default()).await.unwrap();
        let want = [(1, 'u'), (1, 'd'), (3, 'z'), (1, 'd'), (4, 'u'), (1, 'd'), (21, 'u')];
        assert_eq!(runs(&image, first).await, want);
        assert_eq!(read(&image, 5 * PART, 8).await, [0, 0, 0, 0, 0, 0, 0, 3]);
        write(&image, 3 * PART + 5, 1, 9).await;
        image.flush().await.unwrap();
        let (word, bitmap, n) = last_entry(&world);
        assert_eq!((bitmap, n), (0b1_0100 << 32 | 0b100_0010_1010, 1));
        assert_eq!(read(&image, 3 * PART, 8).await, [0, 0, 0, 0, 0, 9, 0, 0]);

        // Where nothing is left, the cluster goes, unless it is to be kept.
        image.write_zeroes(first, ZeroFlags::default()).await.unwrap();
        image.flush().await.unwrap();
        assert_eq!(last_entry(&world), (word, (u32::MAX as u64) << 32, 1));
        let unmap = ZeroFlags { unmap: true, ..ZeroFlags::default() };
        image.write_zeroes(ByteRange::new(0, 31 * PART), unmap).await.unwrap();
        image.write_zeroes(ByteRange::new(CLUSTER, 3 * PART), unmap).await.unwrap();
        image.flush().await.unwrap();
        assert_eq!(last_entry(&world), (0, 7 << 32, 2));
        assert_eq!(runs(&image, ByteRange::new(CLUSTER, CLUSTER)).await, [(3, 'z'), (29, 'u')]);

        // Parts of a cluster are not given back by a discard, the whole one is.
        write(&image, 2 * CLUSTER, PART, 4).await;
        image.discard(ByteRange::new(2 * CLUSTER, PART)).await.unwrap();
        assert_eq!(read(&image, 2 * CLUSTER, 1).await, [4]);
        image.discard(ByteRange::new(2 * CLUSTER, CLUSTER)).await.unwrap();
        assert_eq!(runs(&image, ByteRange::new(2 * CLUSTER, CLUSTER)).await, [(32, 'z')]);
        disk::close(&image).await.unwrap();
        let found = disk::check("image").await.unwrap();
        assert_eq!((found.corruptions, found.leaks), (0, 0), "{:?}", found.findings);
    });
}

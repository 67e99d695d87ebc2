//! Which writes become zeros, in the simulated world.

use gipfel_base::ByteRange;
use gipfel_io::Buf;
use gipfel_io::sim::{Rng, World};
use gipfel_node::WriteFlags;

use super::{DETECT_ZEROES, make};
use crate::testing::{BLOCK, overlay, stack};

fn block(byte: u8) -> Buf {
    Buf::from_slice(&[byte; BLOCK as usize])
}

#[test]
fn whole_zero_requests_become_zeros_and_no_others() {
    World::new(1).run(async {
        for unmap in [false, true] {
            let (disk, seen) = overlay("disk", 64 * BLOCK, None, 100);
            let (root, _) = stack(&DETECT_ZEROES, Some(disk), |c| make(c, unmap));
            root.write(0, block(0), WriteFlags::default()).await.unwrap();
            root.write(BLOCK, block(7), WriteFlags::default()).await.unwrap();
            let almost = Buf::zeroed(2 * BLOCK as usize);
            almost.copy_from(2 * BLOCK as usize - 1, &[1]);
            root.write(2 * BLOCK, almost, WriteFlags::default()).await.unwrap();
            assert_eq!((seen.count(|s| &s.zeroes), seen.count(|s| &s.writes)), (1, 2));
            assert_eq!(seen.last_zero.lock().unwrap().unwrap().unmap, unmap);
            let all = Buf::new(4 * BLOCK as usize);
            root.read(0, all.clone()).await.unwrap();
            let all = all.to_vec();
            assert_eq!((all[0], all[BLOCK as usize], all[4 * BLOCK as usize - 1]), (0, 7, 1));
        }
    });
}

#[test]
fn where_zeros_cannot_be_written_well_the_bytes_are() {
    World::new(2).run(async {
        let (disk, seen) = overlay("disk", 64 * BLOCK, None, 100);
        seen.no_zeroes.store(true, std::sync::atomic::Ordering::SeqCst);
        let (root, _) = stack(&DETECT_ZEROES, Some(disk), |c| make(c, true));
        root.write(0, block(0), WriteFlags::default()).await.unwrap();
        assert_eq!((seen.count(|s| &s.zeroes), seen.count(|s| &s.writes)), (1, 1));
        let s = root.status(ByteRange::new(0, BLOCK)).await.unwrap();
        assert!(s.allocated && s.data);
    });
}

#[test]
fn any_single_byte_counts() {
    let mut rng = Rng::new(3);
    for _ in 0..2000 {
        let len = 1 + rng.below(5000) as usize;
        let whole = Buf::zeroed(len + 64);
        let start = rng.below(64) as usize;
        whole.copy_from(0, &[1; 64][..start]);
        let buf = whole.slice(start..start + len);
        assert!(buf.is_zero());
        buf.copy_from(rng.below(len as u64) as usize, &[1 << rng.below(8)]);
        assert!(!buf.is_zero());
    }
}

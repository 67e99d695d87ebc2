//! The sizes that follow from an image's header: clusters, tables, refcount blocks.

use gipfel_base::{Error, Result};

/// Smallest cluster, in bits (qcow2 spec, Header: cluster_bits).
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster, in bits: 2 MiB, the limit of all known implementations.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Smallest cluster with extended L2 entries, in bits (the same place).
pub const MIN_EXTENDED_BITS: u32 = 14;
/// Largest L1 table, in bytes (the same note in the spec).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table, in bytes.
pub const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Host offsets have 56 bits (spec, L1 and L2 table entries).
pub const MAX_HOST_OFFSET: u64 = 1 << 56;

/// Subclusters of a cluster, with extended L2 entries, as a power of two (spec, Extended L2
/// Entries).
const SUBCLUSTER_BITS: u32 = 5;

/// The sizes of an image. Plain arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cluster size, as a power of two.
    pub cluster_bits: u32,
    /// Width of a refcount in bits, as a power of two (0 to 6).
    pub refcount_order: u32,
    /// Whether L2 entries are extended by a bitmap of subclusters.
    pub extended_l2: bool,
    /// Whether data lie in a file of their own, each cluster where the disk has it.
    pub data_file: bool,
}

impl Geometry {
    /// Sizes with standard L2 entries and without a data file.
    pub const fn new(cluster_bits: u32, refcount_order: u32) -> Geometry {
        Geometry { cluster_bits, refcount_order, extended_l2: false, data_file: false }
    }

    /// Cluster size in bytes.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// `offset` rounded down to a cluster's start.
    pub fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// The place of `offset` in its cluster.
    pub fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Number of clusters that `bytes` take.
    pub fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Words of 64 bits in a cluster.
    pub fn cluster_words(self) -> u64 {
        self.cluster_size() / 8
    }

    /// Words of 64 bits in an L2 entry.
    pub fn entry_words(self) -> usize {
        1 << u32::from(self.extended_l2)
    }

    /// Entries of an L2 table.
    pub fn l2_entries(self) -> u64 {
        self.cluster_words() / self.entry_words() as u64
    }

    /// Size of what is allocated on its own within a cluster, as a power of two: a subcluster, or
    /// the cluster where L2 entries are not extended.
    pub fn subcluster_bits(self) -> u32 {
        self.cluster_bits - if self.extended_l2 { SUBCLUSTER_BITS } else { 0 }
    }

    /// The same size in bytes.
    pub fn subcluster_size(self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Bytes of the disk that one L1 entry stands for.
    pub fn l1_reach(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l1_reach())
    }

    /// Largest disk that the largest L1 table reaches, in bytes.
    pub fn max_size(self) -> u64 {
        (MAX_L1_BYTES / 8).saturating_mul(self.l1_reach()).min(i64::MAX as u64 & !511)
    }

    /// Refcounts in one refcount block.
    pub fn block_entries(self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// The largest refcount that fits.
    pub fn max_refcount(self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// Fails unless a disk of `size` bytes can be.
    pub fn check_size(self, size: u64) -> Result<()> {
        if size > self.max_size() {
            return Err(Error::invalid(format!(
                "a disk of {size} bytes does not fit: with clusters of {} bytes at most {} do; \
                 larger clusters reach further",
                self.cluster_size(),
                self.max_size()
            )));
        }
        Ok(())
    }

    /// Reads refcount `index` of a block's bytes (spec, Refcount block entry: for widths below a
    /// byte the first entry is in the least significant bits).
    pub fn refcount(self, block: &[u8], index: u64) -> u64 {
        match self.refcount_order {
            o @ 0..=2 => {
                let per_byte = 8 >> o;
                let byte = block[(index / per_byte) as usize];
                let bits = 1u64 << o;
                u64::from(byte) >> (index % per_byte * bits) & ((1 << bits) - 1)
            }
            o => {
                let width = 1 << (o - 3);
                let at = index as usize * width;
                block[at..at + width].iter().fold(0, |v, b| v << 8 | u64::from(*b))
            }
        }
    }

    /// Writes refcount `index` of a block's bytes. `value` fits.
    pub fn set_refcount(self, block: &mut [u8], index: u64, value: u64) {
        debug_assert!(value <= self.max_refcount(), "a refcount fits its width");
        match self.refcount_order {
            o @ 0..=2 => {
                let per_byte = 8 >> o;
                let bits = 1u64 << o;
                let shift = index % per_byte * bits;
                let byte = &mut block[(index / per_byte) as usize];
                let mask = ((1u64 << bits) - 1) << shift;
                *byte = (u64::from(*byte) & !mask | value << shift) as u8;
            }
            o => {
                let width = 1 << (o - 3);
                let at = index as usize * width;
                block[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width() {
        for order in 0..=6 {
            let g = Geometry::new(9, order);
            let mut block = vec![0; 512];
            for i in 0..g.block_entries() {
                g.set_refcount(&mut block, i, i.wrapping_mul(0x9e37_79b9) & g.max_refcount());
            }
            for i in 0..g.block_entries() {
                let want = i.wrapping_mul(0x9e37_79b9) & g.max_refcount();
                assert_eq!(g.refcount(&block, i), want, "order {order}, entry {i}");
            }
        }
        let one_bit = Geometry::new(16, 0);
        let mut block = [0; 2];
        one_bit.set_refcount(&mut block, 9, 1);
        assert_eq!(block, [0, 2]);
    }

    #[test]
    fn sizes() {
        let g = Geometry::new(16, 4);
        assert_eq!((g.l2_entries(), g.l1_reach(), g.block_entries()), (8192, 512 << 20, 32768));
        assert_eq!(g.l1_entries((512 << 20) + 1), 2);
        assert!(g.check_size(1 << 50).is_ok() && g.check_size(1 << 60).is_err());
        let small = Geometry::new(9, 4);
        assert_eq!(small.max_size(), 128 << 30);
        let extended = Geometry { extended_l2: true, ..g };
        assert_eq!((extended.l2_entries(), extended.subcluster_size()), (4096, 2048));
        assert_eq!(extended.max_size(), g.max_size() / 2);
    }
}

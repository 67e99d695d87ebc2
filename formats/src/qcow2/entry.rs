//! Entries of L1 and L2 tables (qcow2 spec, Cluster mapping).

use super::geometry::Geometry;

/// The offset in an L1 entry or a standard L2 entry: bits 9 to 55.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Refcount is exactly one: may be overwritten in place.
pub const COPIED: u64 = 1 << 63;
/// An L2 entry of a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// An L2 entry whose cluster reads as zeros (version 3).
pub const ZERO: u64 = 1;

/// What an L2 entry says of its guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// The backing image decides; without one it reads as zeros.
    Unallocated,
    /// Reads as zeros; `host` is the cluster kept for it, if one is.
    Zero {
        /// Host offset in bytes, and whether it may be overwritten in place.
        host: Option<(u64, bool)>,
    },
    /// Plain data.
    Data {
        /// Host offset in bytes.
        host: u64,
        /// Whether the refcount is one: it may be overwritten in place.
        copied: bool,
    },
    /// A compressed stream.
    Compressed {
        /// Host offset in bytes where it begins; of any alignment.
        host: u64,
        /// Bytes in which it ends somewhere: up to the end of its last sector.
        len: u64,
    },
    /// The entry contradicts the specification.
    Bad,
}

impl Cluster {
    /// Reads an entry (in the machine's byte order). `version` is the header's.
    pub fn decode(entry: u64, g: Geometry, version: u32) -> Cluster {
        if entry & COMPRESSED != 0 {
            // Spec, Compressed Clusters Descriptor: x = 62 - (cluster_bits - 8).
            let x = 62 - (g.cluster_bits - 8);
            let host = entry & ((1 << x) - 1);
            let sectors = entry >> x & ((1 << (62 - x)) - 1);
            if host == 0 || entry & COPIED != 0 {
                return Cluster::Bad;
            }
            return Cluster::Compressed { host, len: (sectors + 1) * 512 - host % 512 };
        }
        let host = entry & OFFSET_MASK;
        let copied = entry & COPIED != 0;
        if g.in_cluster(host) != 0 {
            return Cluster::Bad;
        }
        match (entry & ZERO != 0 && version >= 3, host) {
            (true, 0) => Cluster::Zero { host: None },
            (true, _) => Cluster::Zero { host: Some((host, copied)) },
            (false, 0) => Cluster::Unallocated,
            (false, _) => Cluster::Data { host, copied },
        }
    }
}

/// The L2 entry of a compressed stream of `len` bytes at `host`, if one can say that (spec,
/// Compressed Clusters Descriptor).
pub fn compressed_entry(host: u64, len: u64, g: Geometry) -> Option<u64> {
    let x = 62 - (g.cluster_bits - 8);
    let more = (host + len - 1) / 512 - host / 512;
    let fits = host < 1 << x && more < 1 << (62 - x);
    fits.then_some(COMPRESSED | more << x | host)
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Geometry = Geometry { cluster_bits: 16, refcount_order: 4 };

    #[test]
    fn standard_entries() {
        let d = |e| Cluster::decode(e, G, 3);
        assert_eq!(d(0), Cluster::Unallocated);
        assert_eq!(d(1), Cluster::Zero { host: None });
        assert_eq!(d(COPIED | 0x50001), Cluster::Zero { host: Some((0x50000, true)) });
        assert_eq!(d(0x50000), Cluster::Data { host: 0x50000, copied: false });
        assert_eq!(d(COPIED | 0x50200), Cluster::Bad);
        assert_eq!(Cluster::decode(1, G, 2), Cluster::Unallocated);
    }

    #[test]
    fn compressed_entries() {
        // 64 KiB clusters: the offset has 54 bits, the sector count 8.
        let e = COMPRESSED | 2 << 54 | 0x12345;
        let want = Cluster::Compressed { host: 0x12345, len: 3 * 512 - 0x145 };
        assert_eq!(Cluster::decode(e, G, 3), want);
        assert_eq!(compressed_entry(0x12345, 3 * 512 - 0x145, G), Some(e));
        assert_eq!(compressed_entry(0x12345, 2 * 512 - 0x145 + 1, G), Some(e));
        assert_eq!(compressed_entry(1 << 54, 512, G), None);
        assert_eq!(Cluster::decode(COMPRESSED, G, 3), Cluster::Bad);
    }
}

//! What is wrong with a table entry, what it should be, and what it uses: pure functions.
//!
//! A mended entry keeps as much as can be kept. Bits that must be zero are cleared, which is right
//! wherever only they were damaged. What a reader could not have got any more (it lies past the
//! end of the file, or where metadata lies) reads as zeros afterwards; version 2 has no entry for
//! zeros, there the cluster becomes unallocated.

use crate::qcow2::entry::{COMPRESSED, COPIED, Cluster, OFFSET_MASK, ZERO};
use crate::qcow2::geometry::{Geometry, MAX_HOST_OFFSET};

/// Bits of an L1 entry that must be zero (spec, L1 table entry).
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Bits of a standard L2 entry that must be zero (spec, Standard Cluster Descriptor). Bit 0 is
/// one more in version 2, but it is ignored there, as known implementations do.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Unit of the length of a compressed cluster, in bytes.
const SECTOR: u64 = 512;

/// What an entry is held against.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    /// The image's sizes.
    pub g: Geometry,
    /// The header's version.
    pub version: u32,
    /// Length of the file in bytes.
    pub len: u64,
}

impl Bounds {
    /// Whether `len` bytes at `offset` lie in the file. The last cluster may be cut short: a
    /// file need not have the bytes that nobody wrote.
    pub(super) fn fit(&self, offset: u64, len: u64) -> bool {
        offset < MAX_HOST_OFFSET
            && offset
                .checked_add(len)
                .is_some_and(|end| end < self.len.saturating_add(self.g.cluster_size()))
    }
}

/// What is thought of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Judged {
    /// The entry as it should be.
    pub entry: u64,
    /// What is wrong with it, in words.
    pub fault: Option<&'static str>,
    /// Whether the entry, as it is, does not say for sure which clusters it uses.
    pub hides: bool,
    /// Clusters that the entry as it should be uses: the first and how many.
    pub uses: Option<(u64, u64)>,
}

impl Judged {
    fn nothing(entry: u64) -> Judged {
        Judged { entry, fault: None, hides: false, uses: None }
    }

    fn lost(entry: u64, fault: &'static str) -> Judged {
        Judged { entry, fault: Some(fault), hides: true, uses: None }
    }
}

const RESERVED: &str = "reserved bits are set";
const UNALIGNED: &str = "the offset is not aligned to clusters";
const PAST_END: &str = "it points past the end of the file";
const ON_METADATA: &str = "it points to other metadata";

/// Judges an entry of an L1 table. `hard` says which clusters hold metadata other than L2 tables.
pub(super) fn l1_entry(entry: u64, b: Bounds, hard: impl Fn(u64) -> bool) -> Judged {
    let aligned = OFFSET_MASK & !(b.g.cluster_size() - 1);
    let mut j = Judged::nothing(entry & !L1_RESERVED);
    if j.entry != entry {
        j.fault = Some(RESERVED);
    }
    if j.entry & OFFSET_MASK & !aligned != 0 {
        (j.fault, j.hides) = (Some(UNALIGNED), true);
        j.entry &= aligned | COPIED;
    }
    let host = j.entry & aligned;
    if host == 0 {
        // With the flag alone it would lead to the header, for whoever looks at the whole entry.
        return match j.entry {
            0 if !j.hides => j,
            _ => Judged::lost(0, ON_METADATA),
        };
    }
    if !b.fit(host, b.g.cluster_size()) {
        return Judged::lost(0, PAST_END);
    }
    let cluster = host >> b.g.cluster_bits;
    if hard(cluster) {
        return Judged::lost(0, ON_METADATA);
    }
    Judged { uses: Some((cluster, 1)), ..j }
}

/// Judges an entry of an L2 table.
pub(super) fn l2_entry(entry: u64, b: Bounds, hard: impl Fn(u64) -> bool) -> Judged {
    if entry & COMPRESSED != 0 {
        return compressed(entry, b, hard);
    }
    let lost = if b.version >= 3 { ZERO } else { 0 };
    let aligned = OFFSET_MASK & !(b.g.cluster_size() - 1);
    let mut j = Judged::nothing(entry & !L2_RESERVED);
    if j.entry != entry {
        j.fault = Some(RESERVED);
    }
    if j.entry & OFFSET_MASK & !aligned != 0 {
        if j.entry & lost != 0 {
            // It reads as zeros wherever it lies.
            return Judged::lost(lost, UNALIGNED);
        }
        (j.fault, j.hides) = (Some(UNALIGNED), true);
        j.entry &= aligned | COPIED | ZERO;
    }
    let host = j.entry & aligned;
    if host == 0 {
        return if j.hides { Judged::lost(lost, UNALIGNED) } else { j };
    }
    if !b.fit(host, b.g.cluster_size()) {
        return Judged::lost(lost, PAST_END);
    }
    let cluster = host >> b.g.cluster_bits;
    if hard(cluster) {
        return Judged::lost(lost, ON_METADATA);
    }
    Judged { uses: Some((cluster, 1)), ..j }
}

fn compressed(entry: u64, b: Bounds, hard: impl Fn(u64) -> bool) -> Judged {
    let lost = if b.version >= 3 { ZERO } else { 0 };
    let mut j = Judged::nothing(entry & !COPIED);
    if j.entry != entry {
        j.fault = Some("a compressed cluster is marked as one to be overwritten in place");
    }
    let Cluster::Compressed { host, len } = Cluster::decode(j.entry, b.g, b.version) else {
        return Judged::lost(lost, ON_METADATA);
    };
    let cluster = |at: u64| at >> b.g.cluster_bits;
    let first = cluster(host);
    if !b.fit(host, 1) || host >= b.len {
        return Judged::lost(lost, PAST_END);
    }
    // The length only bounds the stream, so a length that says too much is cut to what is there.
    let metadata = (first..=cluster(host + len - 1)).find(|&c| hard(c));
    let room = match metadata {
        Some(c) if c == first => return Judged::lost(lost, ON_METADATA),
        Some(c) => c << b.g.cluster_bits,
        None if b.fit(host, len) => host + len,
        None => b.len.next_multiple_of(SECTOR),
    };
    let len = if room < host + len {
        let x = 62 - (b.g.cluster_bits - 8);
        let sectors = room.div_ceil(SECTOR) - host / SECTOR - 1;
        j.entry = j.entry & ((1 << x) - 1) | COMPRESSED | sectors << x;
        j.fault = Some("the compressed data reach past the file's end or into metadata");
        j.hides = true;
        room - host
    } else {
        len
    };
    let clusters = cluster(host + len - 1) - first + 1;
    Judged { uses: Some((first, clusters)), ..j }
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: Bounds = Bounds {
        g: Geometry { cluster_bits: 16, refcount_order: 4 },
        version: 3,
        len: 0x10_0000 - 100,
    };

    fn judge(entry: u64) -> Judged {
        l2_entry(entry, B, |c| c == 1)
    }

    fn is(entry: u64, want: u64, uses: Option<(u64, u64)>) {
        let j = judge(entry);
        assert_eq!((j.entry, j.uses, j.fault.is_some()), (want, uses, entry != want), "{entry:#x}");
        assert_eq!(judge(j.entry), Judged { fault: None, hides: false, ..j }, "mended once");
    }

    #[test]
    fn standard_entries() {
        is(0, 0, None);
        is(ZERO, ZERO, None);
        is(COPIED | 0x5_0000, COPIED | 0x5_0000, Some((5, 1)));
        is(COPIED | 0xf_0000, COPIED | 0xf_0000, Some((15, 1)));
        is(COPIED | 0x5_0002, COPIED | 0x5_0000, Some((5, 1)));
        is(COPIED | 0x5_0200, COPIED | 0x5_0000, Some((5, 1)));
        is(COPIED | 0x5_0201, ZERO, None);
        is(0x200, ZERO, None);
        is(COPIED | 0x10_0000, ZERO, None);
        is(COPIED | 0x1_0000, ZERO, None);
        let v2 = l2_entry(0x10_0000, Bounds { version: 2, ..B }, |_| false);
        assert_eq!((v2.entry, v2.uses), (0, None));
    }

    #[test]
    fn compressed_entries() {
        let c = |host: u64, sectors: u64| COMPRESSED | sectors << 54 | host;
        is(c(0x5_fe10, 1), c(0x5_fe10, 1), Some((5, 2)));
        is(c(0x5_fe10, 0), c(0x5_fe10, 0), Some((5, 1)));
        is(c(0x5_fe10, 1) | COPIED, c(0x5_fe10, 1), Some((5, 2)));
        is(c(0, 0), ZERO, None);
        is(c(0x1_0001, 0), ZERO, None);
        is(c(0xf_0001, 255), c(0xf_0001, 127), Some((15, 1)));
        is(c(0xf_ffff, 0), ZERO, None);
        is(c(0x0_fe00, 3), c(0x0_fe00, 0), Some((0, 1)));
        let below = l2_entry(c(0x4_fe00, 3), B, |c| c == 5);
        assert_eq!((below.entry, below.uses), (c(0x4_fe00, 0), Some((4, 1))));
    }

    #[test]
    fn l1_entries() {
        let is = |entry: u64, want: u64, uses| {
            let j = l1_entry(entry, B, |c| c == 1);
            assert_eq!((j.entry, j.uses, j.fault.is_some()), (want, uses, entry != want));
        };
        is(0, 0, None);
        is(COPIED | 0x4_0000, COPIED | 0x4_0000, Some((4, 1)));
        is(COPIED | 0x4_0002, COPIED | 0x4_0000, Some((4, 1)));
        is(COPIED | 0x4_0200, COPIED | 0x4_0000, Some((4, 1)));
        is(COPIED | 0x200, 0, None);
        is(COPIED, 0, None);
        is(0x1_0000, 0, None);
        is(1 << 55, 0, None);
    }
}

//! What is wrong with a table entry, what it should be, and what it uses: pure functions.
//!
//! A mended entry keeps as much as can be kept. Bits that must be zero are cleared, which is right
//! wherever only they were damaged. What a reader could not have got any more (it lies past the
//! end of the file, or where metadata lies) reads as zeros afterwards; version 2 has no entry for
//! zeros, there the cluster becomes unallocated.

use crate::qcow2::entry::{COMPRESSED, COPIED, Cluster, Entry, OFFSET_MASK, Parts, ZERO};
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
    pub entry: Entry,
    /// What is wrong with it, in words.
    pub fault: Option<&'static str>,
    /// Whether the entry, as it is, does not say for sure which clusters it uses.
    pub hides: bool,
    /// Clusters that the entry as it should be uses, in the file where data lie: the first and how
    /// many.
    pub uses: Option<(u64, u64)>,
}

impl Judged {
    fn nothing(entry: Entry) -> Judged {
        Judged { entry, fault: None, hides: false, uses: None }
    }

    fn lost(entry: Entry, fault: &'static str) -> Judged {
        Judged { entry, fault: Some(fault), hides: true, uses: None }
    }
}

const RESERVED: &str = "reserved bits are set";
const UNALIGNED: &str = "the offset is not aligned to clusters";
const PAST_END: &str = "it points past the end of the file";
const ON_METADATA: &str = "it points to other metadata";
const MOVED: &str = "its place in the data file is not that on the disk";
const IN_DATA_FILE: &str = "a compressed cluster in an image with a data file";
const NO_PLACE: &str = "subclusters hold data, but there is no cluster for them";
const CONTRADICTION: &str = "a subcluster both holds data and reads as zeros";

/// Judges an entry of an L1 table. `hard` says which clusters hold metadata other than L2 tables.
pub(super) fn l1_entry(entry: u64, b: Bounds, hard: impl Fn(u64) -> bool) -> Judged {
    let aligned = OFFSET_MASK & !(b.g.cluster_size() - 1);
    let mut j = Judged::nothing(Entry { word: entry & !L1_RESERVED, bitmap: 0 });
    if j.entry.word != entry {
        j.fault = Some(RESERVED);
    }
    if j.entry.word & OFFSET_MASK & !aligned != 0 {
        (j.fault, j.hides) = (Some(UNALIGNED), true);
        j.entry.word &= aligned | COPIED;
    }
    let none = Entry::default();
    let host = j.entry.word & aligned;
    if host == 0 {
        // With the flag alone it would lead to the header, for whoever looks at the whole entry.
        return match j.entry.word {
            0 if !j.hides => j,
            _ => Judged::lost(none, ON_METADATA),
        };
    }
    if !b.fit(host, b.g.cluster_size()) {
        return Judged::lost(none, PAST_END);
    }
    let cluster = host >> b.g.cluster_bits;
    if hard(cluster) {
        return Judged::lost(none, ON_METADATA);
    }
    Judged { uses: Some((cluster, 1)), ..j }
}

/// The entry in place of one whose data cannot be got at.
fn lost(entry: Entry, b: Bounds) -> Entry {
    if !b.g.extended_l2 {
        return Entry { word: if b.version >= 3 { ZERO } else { 0 }, bitmap: 0 };
    }
    let parts = match entry.word & COMPRESSED {
        0 => entry.parts(),
        _ => Parts::DATA,
    };
    Entry::of(b.g, None, parts.with_zero(parts.data))
}

/// Judges an entry of an L2 table, which speaks of the disk's bytes at `guest`.
pub(super) fn l2_entry(entry: Entry, b: Bounds, guest: u64, hard: impl Fn(u64) -> bool) -> Judged {
    if entry.word & COMPRESSED != 0 {
        return compressed(entry, b, hard);
    }
    // Spec, Standard Cluster Descriptor: no flag for zeros with extended entries.
    let reserved = L2_RESERVED | if b.g.extended_l2 { ZERO } else { 0 };
    let aligned = OFFSET_MASK & !(b.g.cluster_size() - 1);
    let mut j = Judged::nothing(Entry { word: entry.word & !reserved, ..entry });
    if j.entry != entry {
        j.fault = Some(RESERVED);
    }
    let parts = entry.parts();
    if b.g.extended_l2 && parts.data & parts.zero != 0 {
        // What was written is kept.
        j.fault = Some(CONTRADICTION);
        j.entry = Entry { word: j.entry.word, ..Entry::of(b.g, None, parts.with_data(parts.data)) };
    }
    if b.g.data_file {
        return in_data_file(j, b, guest);
    }
    let lost = lost(j.entry, b);
    if j.entry.word & OFFSET_MASK & !aligned != 0 {
        let unread = if b.g.extended_l2 { parts.data == 0 } else { j.entry.word & lost.word != 0 };
        if unread {
            // It reads as it does wherever it lies.
            return Judged::lost(lost, UNALIGNED);
        }
        (j.fault, j.hides) = (Some(UNALIGNED), true);
        j.entry.word &= aligned | COPIED | ZERO;
    }
    let host = j.entry.word & aligned;
    if host == 0 {
        return match j.hides {
            true => Judged::lost(lost, UNALIGNED),
            false if b.g.extended_l2 && parts.data != 0 => Judged::lost(lost, NO_PLACE),
            false => j,
        };
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

/// Judges the rest of an entry whose data lie in a file of their own: there they have no refcount,
/// and one place.
fn in_data_file(mut j: Judged, b: Bounds, guest: u64) -> Judged {
    let placed = |e: Entry| Cluster::decode(e, b.g, b.version).host();
    let host = j.entry.word & OFFSET_MASK;
    let empty = host == 0 && j.entry.word & COPIED == 0;
    if !empty && host != guest {
        j.fault = Some(MOVED);
        j.entry.word = j.entry.word & !OFFSET_MASK | guest | COPIED;
    } else if empty && b.g.extended_l2 && j.entry.parts().data != 0 {
        return Judged::lost(lost(j.entry, b), NO_PLACE);
    }
    Judged { uses: placed(j.entry).map(|h| (h.0 >> b.g.cluster_bits, 1)), ..j }
}

fn compressed(entry: Entry, b: Bounds, hard: impl Fn(u64) -> bool) -> Judged {
    let lost = lost(entry, b);
    if b.g.data_file {
        return Judged::lost(lost, IN_DATA_FILE);
    }
    let mut j = Judged::nothing(Entry { word: entry.word & !COPIED, bitmap: 0 });
    if j.entry.word != entry.word {
        j.fault = Some("a compressed cluster is marked as one to be overwritten in place");
    }
    if entry.bitmap != 0 {
        // Spec, Extended L2 Entries: the bitmap of a compressed cluster is 0.
        j.fault = Some("a compressed cluster has subclusters");
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
        j.entry.word = j.entry.word & ((1 << x) - 1) | COMPRESSED | sectors << x;
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

    const B: Bounds = Bounds { g: Geometry::new(16, 4), version: 3, len: 0x10_0000 - 100 };

    fn judge(entry: Entry, b: Bounds, want: Entry, uses: Option<(u64, u64)>) {
        let judge = |e| l2_entry(e, b, 0x5_0000, |c| c == 1);
        let j = judge(entry);
        assert_eq!((j.entry, j.uses, j.fault.is_some()), (want, uses, entry != want), "{entry:x?}");
        assert_eq!(judge(j.entry), Judged { fault: None, hides: false, ..j }, "mended once");
    }

    #[test]
    fn compressed_clusters_have_no_subclusters() {
        let b = Bounds { g: Geometry { extended_l2: true, ..B.g }, ..B };
        let at = COMPRESSED | 0x2_0000;
        judge(Entry { word: at, bitmap: 5 }, b, word(at), Some((2, 1)));
    }

    fn word(word: u64) -> Entry {
        Entry { word, bitmap: 0 }
    }

    fn is(entry: u64, want: u64, uses: Option<(u64, u64)>) {
        judge(word(entry), B, word(want), uses);
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
        let v2 = l2_entry(word(0x10_0000), Bounds { version: 2, ..B }, 0, |_| false);
        assert_eq!((v2.entry, v2.uses), (word(0), None));
    }

    #[test]
    fn extended_entries() {
        let b = Bounds { g: Geometry { extended_l2: true, ..B.g }, ..B };
        let is = |entry: (u64, u64), want: (u64, u64), uses| {
            let e = |(word, bitmap)| Entry { word, bitmap };
            judge(e(entry), b, e(want), uses);
        };
        let at = COPIED | 0x5_0000;
        for bitmap in [0, 1, 3, 1 << 32, 1 << 33 | 1, u64::from(u32::MAX), u64::MAX << 32] {
            is((at, bitmap), (at, bitmap), Some((5, 1)));
        }
        is((0, 5 << 32), (0, 5 << 32), None);
        is((at, 3 << 32 | 6), (at, 1 << 32 | 6), Some((5, 1)));
        is((at | ZERO, 6), (at, 6), Some((5, 1)));
        is((0, 1 << 34 | 3), (0, 7 << 32), None);
        is((COPIED | 0x10_0000, 1 << 34 | 3), (0, 7 << 32), None);
        is((COPIED | 0x1_0000, 2), (0, 2 << 32), None);
        is((COPIED | 0x5_0200, 1 << 32), (0, 1 << 32), None);
        is((COPIED | 0x5_0200, 1), (at, 1), Some((5, 1)));
        is((COMPRESSED, 0), (0, u64::MAX << 32), None);
        is((COMPRESSED | 0x5_0010, 0), (COMPRESSED | 0x5_0010, 0), Some((5, 1)));
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
        let below = l2_entry(word(c(0x4_fe00, 3)), B, 0, |c| c == 5);
        assert_eq!((below.entry, below.uses), (word(c(0x4_fe00, 0)), Some((4, 1))));
    }

    #[test]
    fn entries_with_a_data_file() {
        let b = Bounds { g: Geometry { data_file: true, ..B.g }, ..B };
        let is = |entry, want, uses| judge(word(entry), b, word(want), uses);
        // These speak of the disk's bytes at 0x5_0000.
        is(0, 0, None);
        is(ZERO, ZERO, None);
        is(COPIED | 0x5_0000, COPIED | 0x5_0000, Some((5, 1)));
        is(COPIED | 0x1_0000, COPIED | 0x5_0000, Some((5, 1)));
        is(COPIED | 0x5_0201, COPIED | 0x5_0001, Some((5, 1)));
        is(COPIED, COPIED | 0x5_0000, Some((5, 1)));
        is(COMPRESSED | 0x5_0000, ZERO, None);
    }

    #[test]
    fn l1_entries() {
        let is = |entry: u64, want: u64, uses| {
            let j = l1_entry(entry, B, |c| c == 1);
            assert_eq!((j.entry, j.uses, j.fault.is_some()), (word(want), uses, entry != want));
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

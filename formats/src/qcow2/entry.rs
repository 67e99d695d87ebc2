//! Entries of L1 and L2 tables (qcow2 spec, Cluster mapping and Extended L2 Entries).

use super::geometry::Geometry;

/// The offset in an L1 entry or a standard L2 entry: bits 9 to 55.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Refcount is exactly one: may be overwritten in place.
pub const COPIED: u64 = 1 << 63;
/// An L2 entry of a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// An L2 entry whose cluster reads as zeros (version 3, without subclusters).
pub const ZERO: u64 = 1;

/// An L2 entry as it stands in a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The cluster descriptor and its flags.
    pub word: u64,
    /// The subcluster allocation bitmap, 0 where entries are not extended.
    pub bitmap: u64,
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.word)?;
        if self.bitmap != 0 { write!(f, ", bitmap {:#x}", self.bitmap) } else { Ok(()) }
    }
}

impl Entry {
    /// The entries in words of a table.
    pub fn list(g: Geometry, words: &[u64]) -> impl Iterator<Item = Entry> {
        let entry = |w: &[u64]| Entry { word: w[0], bitmap: w.get(1).copied().unwrap_or(0) };
        words.chunks_exact(g.entry_words()).map(entry)
    }

    /// The words of a table that holds these entries.
    pub fn words(g: Geometry, entries: &[Entry]) -> Vec<u64> {
        entries.iter().flat_map(|e| [e.word, e.bitmap].into_iter().take(g.entry_words())).collect()
    }

    /// What its bitmap says, whether it can be or not.
    pub fn parts(self) -> Parts {
        Parts { data: self.bitmap as u32, zero: (self.bitmap >> 32) as u32 }
    }

    /// An entry whose subclusters are `parts`, in the cluster at `host`, with whether that may be
    /// overwritten in place. Without subclusters, `parts` is one of [`Parts::DATA`],
    /// [`Parts::ZERO`] (version 3) and [`Parts::NONE`], and with the last one there is no `host`.
    pub fn of(g: Geometry, host: Option<(u64, bool)>, parts: Parts) -> Entry {
        let word = host.map_or(0, |(h, copied)| h | if copied { COPIED } else { 0 });
        if g.extended_l2 {
            return Entry { word, bitmap: parts.bitmap() };
        }
        debug_assert!([Parts::DATA, Parts::ZERO, Parts::NONE].contains(&parts), "{parts:?}");
        Entry { word: word | u64::from(parts == Parts::ZERO), bitmap: 0 }
    }
}

/// What the subclusters of a cluster are: one bit for each, the first in bit 0. Without
/// subclusters all bits are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// They hold data.
    pub data: u32,
    /// They read as zeros; no bit is in both.
    pub zero: u32,
}

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The backing image decides.
    Unallocated,
    /// It reads as zeros.
    Zero,
    /// It holds data.
    Data,
}

impl Parts {
    /// Data everywhere.
    pub const DATA: Parts = Parts { data: u32::MAX, zero: 0 };
    /// Zeros everywhere.
    pub const ZERO: Parts = Parts { data: 0, zero: u32::MAX };
    /// Nothing allocated.
    pub const NONE: Parts = Parts { data: 0, zero: 0 };

    fn bitmap(self) -> u64 {
        u64::from(self.zero) << 32 | u64::from(self.data)
    }

    /// The same with data in `mask`.
    pub fn with_data(self, mask: u32) -> Parts {
        Parts { data: self.data | mask, zero: self.zero & !mask }
    }

    /// The same with zeros in `mask`.
    pub fn with_zero(self, mask: u32) -> Parts {
        Parts { data: self.data & !mask, zero: self.zero | mask }
    }

    /// What subcluster `first` is, and how many from there on are so.
    pub fn run(self, first: u32) -> (Part, u32) {
        let (data, zero) = (self.data >> first, self.zero >> first);
        let (part, others) = match (data & 1, zero & 1) {
            (1, _) => (Part::Data, !data),
            (_, 1) => (Part::Zero, !zero),
            _ => (Part::Unallocated, data | zero),
        };
        (part, others.trailing_zeros().min(u32::BITS - first))
    }
}

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
    /// Subclusters that differ, or none of which is allocated while a cluster is kept for them.
    Mixed {
        /// Host offset in bytes, and whether it may be overwritten in place.
        host: Option<(u64, bool)>,
        /// The subclusters; those with data lie in `host`.
        parts: Parts,
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
    pub fn decode(entry: Entry, g: Geometry, version: u32) -> Cluster {
        let word = entry.word;
        if word & COMPRESSED != 0 {
            // Spec, Compressed Clusters Descriptor: x = 62 - (cluster_bits - 8).
            let x = 62 - (g.cluster_bits - 8);
            let host = word & ((1 << x) - 1);
            let sectors = word >> x & ((1 << (62 - x)) - 1);
            if host == 0 || word & COPIED != 0 || g.data_file {
                return Cluster::Bad;
            }
            return Cluster::Compressed { host, len: (sectors + 1) * 512 - host % 512 };
        }
        let host = word & OFFSET_MASK;
        // Spec, L2 table entry: in an external data file offset 0 is one, if the flag says so, and
        // clusters have no refcount but one.
        let is_place = host != 0 || g.data_file && word & COPIED != 0;
        let copied = word & COPIED != 0 || g.data_file;
        if g.in_cluster(host) != 0 {
            return Cluster::Bad;
        }
        let kept = is_place.then_some((host, copied));
        let parts = match g.extended_l2 {
            true => entry.parts(),
            false if word & ZERO != 0 && version >= 3 => Parts::ZERO,
            false if is_place => Parts::DATA,
            false => Parts::NONE,
        };
        match (parts, kept) {
            // Spec, Subcluster Allocation Bitmap: never both, and data need a place.
            (Parts { data, zero }, _) if data & zero != 0 => Cluster::Bad,
            (Parts { data, .. }, None) if data != 0 => Cluster::Bad,
            (Parts::DATA, Some((host, copied))) => Cluster::Data { host, copied },
            (Parts::ZERO, host) => Cluster::Zero { host },
            (Parts::NONE, None) => Cluster::Unallocated,
            (parts, host) => Cluster::Mixed { host, parts },
        }
    }

    /// What its subclusters are. A compressed cluster counts as data.
    pub fn parts(self) -> Parts {
        match self {
            Cluster::Data { .. } | Cluster::Compressed { .. } => Parts::DATA,
            Cluster::Zero { .. } => Parts::ZERO,
            Cluster::Mixed { parts, .. } => parts,
            Cluster::Unallocated | Cluster::Bad => Parts::NONE,
        }
    }

    /// The host cluster that is its own for all of its subclusters, whether they hold data or
    /// not, and whether it may be overwritten in place.
    pub fn host(self) -> Option<(u64, bool)> {
        match self {
            Cluster::Data { host, copied } => Some((host, copied)),
            Cluster::Zero { host } | Cluster::Mixed { host, .. } => host,
            Cluster::Compressed { .. } | Cluster::Unallocated | Cluster::Bad => None,
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

    const G: Geometry = Geometry::new(16, 4);

    fn word(word: u64) -> Entry {
        Entry { word, bitmap: 0 }
    }

    #[test]
    fn standard_entries() {
        let d = |e| Cluster::decode(word(e), G, 3);
        assert_eq!(d(0), Cluster::Unallocated);
        assert_eq!(d(1), Cluster::Zero { host: None });
        assert_eq!(d(COPIED | 0x50001), Cluster::Zero { host: Some((0x50000, true)) });
        assert_eq!(d(0x50000), Cluster::Data { host: 0x50000, copied: false });
        assert_eq!(d(COPIED | 0x50200), Cluster::Bad);
        assert_eq!(Cluster::decode(word(1), G, 2), Cluster::Unallocated);
        assert_eq!(Entry::of(G, Some((0x50000, true)), Parts::ZERO), word(COPIED | 0x50001));
        assert_eq!(Entry::of(G, Some((0x50000, false)), Parts::DATA), word(0x50000));
    }

    #[test]
    fn compressed_entries() {
        // 64 KiB clusters: the offset has 54 bits, the sector count 8.
        let e = COMPRESSED | 2 << 54 | 0x12345;
        let want = Cluster::Compressed { host: 0x12345, len: 3 * 512 - 0x145 };
        assert_eq!(Cluster::decode(word(e), G, 3), want);
        assert_eq!(Cluster::decode(word(COMPRESSED), G, 3), Cluster::Bad);
        assert_eq!(compressed_entry(0x12345, 3 * 512 - 0x145, G), Some(e));
        assert_eq!(compressed_entry(0x12345, 2 * 512 - 0x145 + 1, G), Some(e));
        assert_eq!(compressed_entry(1 << 54, 512, G), None);
        let extended = Geometry { extended_l2: true, ..G };
        let e = Entry { word: e, bitmap: u64::MAX };
        assert_eq!(Cluster::decode(e, extended, 3), want, "its bitmap is not used");
    }

    #[test]
    fn extended_entries() {
        let g = Geometry { extended_l2: true, ..G };
        let d = |word, bitmap| Cluster::decode(Entry { word, bitmap }, g, 3);
        let host = Some((0x50000, true));
        let at = COPIED | 0x50000;
        assert_eq!(d(0, 0), Cluster::Unallocated);
        assert_eq!(d(at, u64::from(u32::MAX)), Cluster::Data { host: 0x50000, copied: true });
        assert_eq!(d(at, u64::from(u32::MAX) << 32), Cluster::Zero { host });
        assert_eq!(d(0, u64::from(u32::MAX) << 32), Cluster::Zero { host: None });
        assert_eq!(d(at, 0), Cluster::Mixed { host, parts: Parts::NONE });
        let parts = Parts { data: 6, zero: 1 };
        assert_eq!(d(at, 1 << 32 | 6), Cluster::Mixed { host, parts });
        assert_eq!(d(at, 4 << 32 | 6), Cluster::Bad, "data and zeros at once");
        assert_eq!(d(0, 1), Cluster::Bad, "data without a place");
        assert_eq!(d(0x50200, 0), Cluster::Bad);
        assert_eq!(Entry::of(g, host, parts), Entry { word: at, bitmap: 1 << 32 | 6 });
    }

    #[test]
    fn entries_with_a_data_file() {
        let g = Geometry { data_file: true, ..G };
        let d = |e| Cluster::decode(word(e), g, 3);
        assert_eq!(d(0), Cluster::Unallocated);
        assert_eq!(d(COPIED), Cluster::Data { host: 0, copied: true });
        assert_eq!(d(COPIED | ZERO), Cluster::Zero { host: Some((0, true)) });
        assert_eq!(d(0x50000), Cluster::Data { host: 0x50000, copied: true });
        assert_eq!(d(COMPRESSED | 0x50000), Cluster::Bad);
    }

    #[test]
    fn runs_of_subclusters() {
        let p = Parts { data: 0x8000_0006, zero: 0x0000_0019 };
        let mut at = 0;
        let mut runs = Vec::new();
        while at < 32 {
            let (part, n) = p.run(at);
            runs.push((at, part, n));
            at += n;
        }
        use Part::*;
        let want = [(0, Zero, 1), (1, Data, 2), (3, Zero, 2), (5, Unallocated, 26), (31, Data, 1)];
        assert_eq!(runs, want);
        assert_eq!(Parts::DATA.run(3), (Data, 29));
        assert_eq!(Parts::NONE.run(0), (Unallocated, 32));
        assert_eq!(p.with_zero(2).with_data(1), Parts { data: 0x8000_0005, zero: 0x0000_001a });
    }
}

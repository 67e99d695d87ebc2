//! The header and its extensions (qcow2 spec, Header and Header extensions): read, checked,
//! written. Pure functions on bytes.

use gipfel_base::{Error, Result};

use super::geometry::{
    Geometry, MAX_CLUSTER_BITS, MAX_HOST_OFFSET, MAX_L1_BYTES, MAX_REFTABLE_BYTES,
    MIN_CLUSTER_BITS, MIN_EXTENDED_BITS,
};

/// The first four bytes of an image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Length of the header of version 2, in bytes.
pub const V2_LENGTH: usize = 72;
/// Shortest header of version 3, in bytes.
pub const V3_LENGTH: usize = 104;
/// Header of version 3 with a compression type, in bytes.
const V3_COMPRESSION_LENGTH: usize = 112;
/// Longest name of a backing file, in bytes (spec, backing_file_size).
pub const MAX_BACKING_NAME: usize = 1023;
/// Header extensions that are looked at.
const MAX_EXTENSIONS: usize = 128;
/// Most internal snapshots.
const MAX_SNAPSHOTS: u32 = 65_536;

/// Incompatible feature: refcounts may be wrong.
pub const DIRTY: u64 = 1;
/// Incompatible feature: structures may be wrong; not to be written.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible feature: data lie in another file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: another compression than deflate.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries with subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Autoclear feature: the bitmaps extension is consistent.
pub const BITMAPS: u64 = 1;
/// Autoclear feature: the external data file is a raw image by itself.
pub const RAW_DATA_FILE: u64 = 2;
/// Compatible feature: refcounts are updated late, under the dirty bit.
pub const LAZY_REFCOUNTS: u64 = 1;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate streams.
    Zlib,
    /// zstd frames.
    Zstd,
}

impl Compression {
    /// Its name in options and queries.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        }
    }
}

/// A header extension that is kept as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its data.
    pub data: Vec<u8>,
}

/// A valid header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size and refcount width.
    pub geometry: Geometry,
    /// Visible size in bytes.
    pub size: u64,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where it lies, in bytes.
    pub l1_offset: u64,
    /// Where the refcount table lies, in bytes.
    pub reftable_offset: u64,
    /// Clusters that it takes.
    pub reftable_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where their table lies, in bytes.
    pub snapshots_offset: u64,
    /// Incompatible feature bits.
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// How clusters are compressed.
    pub compression: Compression,
    /// The backing file's name.
    pub backing: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// The external data file's name.
    pub data_file: Option<String>,
    /// Other extensions, in order.
    pub extensions: Vec<Extension>,
    /// Fields behind those we know, kept as they are.
    pub unknown_fields: Vec<u8>,
}

fn be32(b: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(b[at..at + 4].try_into().expect("four bytes"))
}

fn be64(b: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(b[at..at + 8].try_into().expect("eight bytes"))
}

fn bad(what: impl Into<String>) -> Error {
    Error::corrupt(what)
}

fn text(bytes: &[u8], what: &str) -> Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| bad(format!("{what} is not valid UTF-8")))
}

/// The cluster size that the first bytes of an image speak of: how much [`Header::parse`] needs.
pub fn cluster_size(first: &[u8]) -> Result<u64> {
    if first.len() < V2_LENGTH || first[..4] != MAGIC {
        return Err(Error::invalid("it is not a qcow2 image: the magic bytes are missing"));
    }
    let bits = be32(first, 20);
    if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
        return Err(bad(format!(
            "header field cluster_bits is {bits}, but must be \
             {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}"
        )));
    }
    Ok(1 << bits)
}

impl Header {
    /// Reads the header from the first cluster of an image (or the whole file, if that is
    /// shorter). Features that this version does not offer are refused by
    /// [`Header::check_offered`], not here.
    pub fn parse(first: &[u8]) -> Result<Header> {
        let cluster_size = cluster_size(first)?;
        let version = be32(first, 4);
        if version != 2 && version != 3 {
            return Err(Error::unsupported(format!(
                "header field version is {version}; versions 2 and 3 are known"
            )));
        }
        let mut h = Header {
            version,
            geometry: Geometry::new(be32(first, 20), 4),
            size: be64(first, 24),
            l1_size: be32(first, 36),
            l1_offset: be64(first, 40),
            reftable_offset: be64(first, 48),
            reftable_clusters: be32(first, 56),
            snapshots: be32(first, 60),
            snapshots_offset: be64(first, 64),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: Compression::Zlib,
            backing: None,
            backing_format: None,
            data_file: None,
            extensions: Vec::new(),
            unknown_fields: Vec::new(),
        };
        let encryption = be32(first, 32);
        let mut length = V2_LENGTH;
        if version >= 3 {
            length = h.parse_v3(first)?;
        }
        h.parse_extensions(first, length)?;
        h.parse_backing(first, cluster_size)?;
        h.check_fields()?;
        match encryption {
            0 => Ok(h),
            1 | 2 => Err(Error::unsupported("encrypted images are not offered by this version")),
            n => Err(bad(format!("header field crypt_method is {n}, but must be 0, 1 or 2"))),
        }
    }

    fn parse_v3(&mut self, first: &[u8]) -> Result<usize> {
        if first.len() < V3_LENGTH {
            return Err(bad("the file ends inside its header"));
        }
        self.incompatible = be64(first, 72);
        self.compatible = be64(first, 80);
        self.autoclear = be64(first, 88);
        self.geometry.refcount_order = be32(first, 96);
        self.geometry.extended_l2 = self.incompatible & EXTENDED_L2 != 0;
        self.geometry.data_file = self.incompatible & DATA_FILE != 0;
        let length = be32(first, 100) as usize;
        if length < V3_LENGTH || !length.is_multiple_of(8) || length > first.len() {
            return Err(bad(format!(
                "header field header_length is {length}, but must be a multiple of 8 from \
                 {V3_LENGTH} to the end of the first cluster"
            )));
        }
        if self.geometry.refcount_order > 6 {
            return Err(bad(format!(
                "header field refcount_order is {}, but must be at most 6",
                self.geometry.refcount_order
            )));
        }
        let kind = if length > V3_LENGTH { first[104] } else { 0 };
        self.compression = match (self.incompatible & COMPRESSION != 0, kind) {
            (false, 0) => Compression::Zlib,
            (true, 1) => Compression::Zstd,
            (set, n) => {
                return Err(bad(format!(
                    "header field compression_type is {n} and its feature bit is {}: \
                     they do not agree, or the type is unknown",
                    u8::from(set)
                )));
            }
        };
        if length > V3_COMPRESSION_LENGTH {
            self.unknown_fields = first[V3_COMPRESSION_LENGTH..length].to_vec();
        }
        Ok(length)
    }

    fn parse_extensions(&mut self, first: &[u8], from: usize) -> Result<()> {
        // They end before the backing file's name, if that lies in the first cluster.
        let backing = be64(first, 8);
        let end = if backing > 0 { backing.min(first.len() as u64) as usize } else { first.len() };
        let mut at = from;
        for _ in 0..MAX_EXTENSIONS {
            if at + 8 > end {
                return Ok(());
            }
            let (kind, len) = (be32(first, at), be32(first, at + 4) as usize);
            if kind == EXT_END {
                return Ok(());
            }
            at += 8;
            if len > end.saturating_sub(at) {
                return Err(bad(format!(
                    "header extension {kind:#010x} of {len} bytes at {at:#x} does not fit \
                     in the header"
                )));
            }
            let data = &first[at..at + len];
            match kind {
                EXT_BACKING_FORMAT => {
                    self.backing_format = Some(text(data, "the backing file's format")?);
                }
                EXT_DATA_FILE => self.data_file = Some(text(data, "the data file's name")?),
                EXT_FEATURE_NAMES => {}
                _ => self.extensions.push(Extension { kind, data: data.to_vec() }),
            }
            at += len.next_multiple_of(8);
        }
        Err(bad(format!("there are more than {MAX_EXTENSIONS} header extensions")))
    }

    fn parse_backing(&mut self, first: &[u8], cluster_size: u64) -> Result<()> {
        let (offset, len) = (be64(first, 8), be32(first, 16) as usize);
        if offset == 0 {
            return Ok(());
        }
        if len > MAX_BACKING_NAME {
            return Err(bad(format!(
                "the backing file's name has {len} bytes, but at most {MAX_BACKING_NAME} are \
                 allowed"
            )));
        }
        let end = offset.checked_add(len as u64);
        if end.is_none_or(|e| e > cluster_size.min(first.len() as u64)) {
            return Err(bad(format!(
                "the backing file's name at {offset:#x} does not lie in the first cluster"
            )));
        }
        if len == 0 {
            return Ok(());
        }
        let name = &first[offset as usize..offset as usize + len];
        self.backing = Some(text(name, "the backing file's name")?);
        Ok(())
    }

    /// Whether the fields agree with each other and with the limits.
    fn check_fields(&self) -> Result<()> {
        let g = self.geometry;
        g.check_size(self.size).map_err(|e| bad(format!("header field size: {e}")))?;
        let table = |what: &str, offset: u64, bytes: u64, most: u64| {
            if bytes > most {
                return Err(bad(format!("{what} has {bytes} bytes, but at most {most} can be")));
            }
            if g.in_cluster(offset) != 0 {
                return Err(bad(format!(
                    "{what} at {offset:#x} is not aligned to clusters of {} bytes",
                    g.cluster_size()
                )));
            }
            if offset >= MAX_HOST_OFFSET - bytes {
                return Err(bad(format!("{what} at {offset:#x} lies past 2^56 bytes")));
            }
            Ok(())
        };
        table("the L1 table", self.l1_offset, u64::from(self.l1_size) * 8, MAX_L1_BYTES)?;
        let reftable = u64::from(self.reftable_clusters) << g.cluster_bits;
        table("the refcount table", self.reftable_offset, reftable, MAX_REFTABLE_BYTES)?;
        if self.reftable_clusters == 0 || self.reftable_offset == 0 {
            return Err(bad("there is no refcount table"));
        }
        if g.extended_l2 && g.cluster_bits < MIN_EXTENDED_BITS {
            return Err(bad(format!(
                "extended L2 entries need clusters of at least {} bytes, but they have {}",
                1 << MIN_EXTENDED_BITS,
                g.cluster_size()
            )));
        }
        let need = g.l1_entries(self.size);
        if u64::from(self.l1_size) < need {
            return Err(bad(format!(
                "the L1 table has {} entries, but a disk of {} bytes needs {need}",
                self.l1_size, self.size
            )));
        }
        if self.l1_size > 0 && self.l1_offset == 0 {
            return Err(bad("the L1 table lies at offset 0, where the header is"));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(bad(format!(
                "there are {} internal snapshots, but at most {MAX_SNAPSHOTS} can be",
                self.snapshots
            )));
        }
        if self.snapshots > 0 {
            table("the snapshot table", self.snapshots_offset, 0, 0)?;
        }
        Ok(())
    }

    /// Fails for features that are not known here.
    pub fn check_offered(&self) -> Result<()> {
        let known = DIRTY | CORRUPT | COMPRESSION | EXTENDED_L2 | DATA_FILE;
        let unknown = self.incompatible & !known;
        if unknown != 0 {
            return Err(Error::unsupported(format!(
                "the image uses incompatible features that are unknown here (bits {unknown:#x})"
            )));
        }
        Ok(())
    }

    /// The bytes of the header, its extensions and the backing file's name: what the first
    /// cluster begins with. Fails where they do not fit into it.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let room = self.geometry.cluster_size();
        let bytes = self.encode_with(self.version >= 3)?;
        // The names of features are for people: small clusters do without.
        let bytes = if bytes.len() as u64 > room { self.encode_with(false)? } else { bytes };
        if bytes.len() as u64 > room {
            return Err(Error::invalid(format!(
                "the header needs {} bytes, but a cluster has {room}: use larger clusters or a \
                 shorter name of the backing file",
                bytes.len()
            )));
        }
        Ok(bytes)
    }

    /// The same without what is for people only: as short as can be.
    pub(super) fn encode_alone(&self) -> Result<Vec<u8>> {
        self.encode_with(false)
    }

    fn encode_with(&self, feature_names_too: bool) -> Result<Vec<u8>> {
        let mut b = Vec::new();
        b.extend(MAGIC);
        b.extend(self.version.to_be_bytes());
        // Where the backing file's name lies is known at the end.
        b.extend([0; 12]);
        b.extend(self.geometry.cluster_bits.to_be_bytes());
        b.extend(self.size.to_be_bytes());
        b.extend(0u32.to_be_bytes());
        b.extend(self.l1_size.to_be_bytes());
        b.extend(self.l1_offset.to_be_bytes());
        b.extend(self.reftable_offset.to_be_bytes());
        b.extend(self.reftable_clusters.to_be_bytes());
        b.extend(self.snapshots.to_be_bytes());
        b.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            b.extend(self.incompatible.to_be_bytes());
            b.extend(self.compatible.to_be_bytes());
            b.extend(self.autoclear.to_be_bytes());
            b.extend(self.geometry.refcount_order.to_be_bytes());
            let length = V3_COMPRESSION_LENGTH + self.unknown_fields.len();
            b.extend((length as u32).to_be_bytes());
            b.extend([u8::from(self.compression == Compression::Zstd), 0, 0, 0, 0, 0, 0, 0]);
            b.extend(&self.unknown_fields);
        }
        let mut extension = |kind: u32, data: &[u8]| {
            b.extend(kind.to_be_bytes());
            b.extend((data.len() as u32).to_be_bytes());
            b.extend(data);
            b.resize(b.len().next_multiple_of(8), 0);
        };
        if let Some(f) = &self.backing_format {
            extension(EXT_BACKING_FORMAT, f.as_bytes());
        }
        if let Some(name) = &self.data_file {
            extension(EXT_DATA_FILE, name.as_bytes());
        }
        if feature_names_too {
            extension(EXT_FEATURE_NAMES, &feature_names());
        }
        for e in &self.extensions {
            extension(e.kind, &e.data);
        }
        extension(EXT_END, &[]);
        if let Some(name) = &self.backing {
            if name.len() > MAX_BACKING_NAME {
                return Err(Error::invalid(format!(
                    "the backing file's name has {} bytes; at most {MAX_BACKING_NAME} fit",
                    name.len()
                )));
            }
            let at = b.len() as u64;
            b[8..16].copy_from_slice(&at.to_be_bytes());
            b[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            b.extend(name.as_bytes());
        }
        Ok(b)
    }
}

/// The feature name table (spec, Feature name table): names for whoever does not know a feature.
fn feature_names() -> Vec<u8> {
    const NAMES: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut b = Vec::with_capacity(NAMES.len() * 48);
    for (kind, bit, name) in NAMES {
        b.extend([kind, bit]);
        b.extend(name.as_bytes());
        b.resize(b.len().next_multiple_of(48), 0);
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header {
            version: 3,
            geometry: Geometry::new(16, 4),
            size: 1 << 30,
            l1_size: 2,
            l1_offset: 3 << 16,
            reftable_offset: 1 << 16,
            reftable_clusters: 1,
            snapshots: 0,
            snapshots_offset: 0,
            incompatible: COMPRESSION,
            compatible: LAZY_REFCOUNTS,
            autoclear: 0,
            compression: Compression::Zstd,
            backing: Some("base.img".into()),
            backing_format: Some("raw".into()),
            data_file: Some("data.img".into()),
            extensions: vec![Extension { kind: 0x1234_5678, data: vec![1, 2, 3] }],
            unknown_fields: vec![7; 8],
        }
    }

    fn padded(mut b: Vec<u8>) -> Vec<u8> {
        b.resize(1 << 16, 0);
        b
    }

    #[test]
    fn what_is_written_is_read() {
        let h = sample();
        assert_eq!(Header::parse(&padded(h.encode().unwrap())).unwrap(), h);
        let v2 = Header {
            version: 2,
            incompatible: 0,
            compatible: 0,
            compression: Compression::Zlib,
            unknown_fields: Vec::new(),
            ..sample()
        };
        assert_eq!(Header::parse(&padded(v2.encode().unwrap())).unwrap(), v2);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let good = padded(sample().encode().unwrap());
        for at in 0..200 {
            for value in [0, 1, 9, 0x7f, 0x80, 0xff] {
                let mut b = good.clone();
                b[at] = value;
                let _ = Header::parse(&b);
                let _ = Header::parse(&b[..at]);
            }
        }
    }

    #[test]
    fn fields_out_of_range_are_named() {
        let good = padded(sample().encode().unwrap());
        let with = |at: usize, bytes: &[u8]| {
            let mut b = good.clone();
            b[at..at + bytes.len()].copy_from_slice(bytes);
            Header::parse(&b).unwrap_err().to_string()
        };
        assert!(with(4, &[0, 0, 0, 4]).contains("version is 4"));
        assert!(with(20, &[0, 0, 0, 8]).contains("cluster_bits is 8"));
        assert!(with(20, &[0, 0, 0, 63]).contains("cluster_bits is 63"));
        assert!(with(24, &[0x7f]).contains("size"));
        assert!(with(36, &[0, 0, 0, 1]).contains("L1 table has 1 entries"));
        assert!(with(36, &[0xff]).contains("L1 table"));
        assert!(with(47, &[1]).contains("L1 table at 0x30001 is not aligned"));
        assert!(with(55, &[9]).contains("refcount table"));
        assert!(with(56, &[0xff]).contains("refcount table"));
        assert!(with(60, &[0xff]).contains("snapshots"));
        assert!(with(99, &[7]).contains("refcount_order is 7"));
        assert!(with(103, &[3]).contains("header_length"));
        assert!(with(104, &[9]).contains("compression_type is 9"));
        assert!(with(35, &[2]).contains("encrypted"));
        assert!(with(16, &[0xff]).contains("backing"));
        assert!(with(0, b"QEMU").contains("not a qcow2"));
    }
}

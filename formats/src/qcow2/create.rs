//! Making an image (BlockdevCreateOptionsQcow2 of the QMP reference).
//!
//! A new image is header, refcount table, refcount blocks and an L1 table, one after the other;
//! the header is written last, so that a half-made image is none.

use std::sync::Arc;

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_node::{Child, CreateArgs, ImageSize, Preallocation, WriteFlags, ZeroFlags};
use serde::Deserialize;
use serde_json::Value;

use super::geometry::{Geometry, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS, MIN_EXTENDED_BITS};
use super::header::{
    COMPRESSION, Compression, DATA_FILE, EXTENDED_L2, Header, LAZY_REFCOUNTS, RAW_DATA_FILE,
};

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    size: u64,
    version: Option<String>,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
    #[serde(default = "default_cluster")]
    cluster_size: u64,
    #[serde(default = "default_refcount")]
    refcount_bits: u64,
    #[serde(default)]
    lazy_refcounts: bool,
    compression_type: Option<String>,
    preallocation: Option<String>,
    #[serde(default)]
    extended_l2: bool,
    #[serde(default)]
    data_file_raw: bool,
    encrypt: Option<Value>,
}

fn default_cluster() -> u64 {
    65536
}

fn default_refcount() -> u64 {
    16
}

/// Where the parts of a new image lie, in clusters.
#[derive(Debug, PartialEq, Eq)]
struct Layout {
    reftable: u64,
    blocks: u64,
    l1: u64,
}

impl Layout {
    /// The smallest layout for `l1_entries`.
    fn new(g: Geometry, l1_entries: u64) -> Layout {
        Layout::with(g, g.clusters(l1_entries * 8), 0)
    }

    /// The smallest one in which `others` clusters more are counted.
    fn with(g: Geometry, l1: u64, others: u64) -> Layout {
        let mut l = Layout { reftable: 1, blocks: 1, l1 };
        loop {
            let blocks = (l.total() + others).div_ceil(g.block_entries());
            let reftable = g.clusters(blocks * 8);
            if (l.blocks, l.reftable) == (blocks, reftable) {
                return l;
            }
            (l.blocks, l.reftable) = (blocks, reftable);
        }
    }

    /// All clusters, the header's included.
    fn total(&self) -> u64 {
        1 + self.reftable + self.blocks + self.l1
    }
}

impl Options {
    fn geometry(&self, data_file: bool) -> Result<Geometry> {
        let bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two()
            || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits)
        {
            return Err(Error::invalid(format!(
                "cluster size {} must be a power of two from {} to {}",
                self.cluster_size,
                1 << MIN_CLUSTER_BITS,
                1 << MAX_CLUSTER_BITS
            )));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(Error::invalid(format!(
                "refcount width {} must be a power of two from 1 to 64 bits",
                self.refcount_bits
            )));
        }
        if self.extended_l2 && bits < MIN_EXTENDED_BITS {
            return Err(Error::invalid(format!(
                "extended L2 entries need clusters of at least {} bytes, not {}",
                1 << MIN_EXTENDED_BITS,
                self.cluster_size
            )));
        }
        let refcount_order = self.refcount_bits.trailing_zeros();
        let g = Geometry::new(bits, refcount_order);
        Ok(Geometry { extended_l2: self.extended_l2, data_file, ..g })
    }

    fn check(&self, g: Geometry) -> Result<u32> {
        if self.data_file_raw && !g.data_file {
            return Err(Error::invalid("'data-file-raw' is given without 'data-file'"));
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return Err(Error::invalid(
                "a data file that is raw by itself cannot show a backing file: leave one out",
            ));
        }
        let version = match self.version.as_deref() {
            None | Some("v3") => 3,
            Some("v2") => 2,
            Some(v) => {
                return Err(Error::invalid(format!("version '{v}' must be 'v2' or 'v3'")));
            }
        };
        let refuse = |what: &str, set: bool| match set {
            true => {
                Err(Error::unsupported(format!("{what} is not offered by this version of gipfel")))
            }
            false => Ok(()),
        };
        refuse("option 'encrypt'", self.encrypt.is_some())?;
        if !self.size.is_multiple_of(512) {
            return Err(Error::invalid(format!("size {} is not a multiple of 512", self.size)));
        }
        if version == 2 {
            let needs_v3 = [
                ("lazy refcounts", self.lazy_refcounts),
                ("a refcount width other than 16", g.refcount_order != 4),
                ("extended L2 entries", g.extended_l2),
                ("an external data file", g.data_file),
                ("another compression than zlib", self.compression()? != Compression::Zlib),
            ];
            if let Some((what, _)) = needs_v3.iter().find(|n| n.1) {
                return Err(Error::invalid(format!("{what} needs version v3 (compat=1.1)")));
            }
        }
        if self.backing_fmt.is_some() && self.backing_file.is_none() {
            return Err(Error::invalid("'backing-fmt' is given without 'backing-file'"));
        }
        // Subclusters show the backing file while none of a cluster is allocated.
        let hides = self.preallocation()?.is_some() && !g.extended_l2;
        if self.backing_file.is_some() && hides {
            return Err(Error::invalid(
                "a preallocated image would hide its backing file: leave one of them out, or use \
                 extended L2 entries",
            ));
        }
        g.check_size(self.size)?;
        Ok(version)
    }

    fn compression(&self) -> Result<Compression> {
        match self.compression_type.as_deref() {
            None | Some("zlib") => Ok(Compression::Zlib),
            Some("zstd") => Ok(Compression::Zstd),
            Some(c) => Err(Error::invalid(format!("compression '{c}' must be 'zlib' or 'zstd'"))),
        }
    }

    fn preallocation(&self) -> Result<Option<Preallocation>> {
        match self.preallocation.as_deref() {
            // Whoever reads a raw data file alone sees what is not allocated too.
            None | Some("off") if self.data_file_raw => Ok(Some(Preallocation::Metadata)),
            None | Some("off") => Ok(None),
            Some("metadata") => Ok(Some(Preallocation::Metadata)),
            Some("falloc") => Ok(Some(Preallocation::Falloc)),
            Some("full") => Ok(Some(Preallocation::Full)),
            Some(p) => Err(Error::invalid(format!(
                "preallocation '{p}' must be 'off', 'metadata', 'falloc' or 'full'"
            ))),
        }
    }
}

pub(super) async fn create(args: CreateArgs) -> Result<()> {
    let o: Options = serde_json::from_value(args.options)
        .map_err(|e| Error::invalid(format!("options to create a qcow2 image: {e}")))?;
    let (mut file, mut data) = (None, None);
    for (name, child) in args.children {
        match name.as_str() {
            "file" => file = Some(child),
            "data-file" => data = Some(child),
            _ => return Err(Error::invalid(format!("a new image has no child '{name}'"))),
        }
    }
    let file = file.ok_or_else(|| Error::invalid("option 'file' is missing"))?;
    let g = o.geometry(data.is_some())?;
    let version = o.check(g)?;
    let data_name = match &data {
        Some(d) => make_data_file(d, o.size).await?,
        None => None,
    };
    let prealloc = o.preallocation()?;
    let compression = o.compression()?;
    let l1_entries = g.l1_entries(o.size);
    let layout = Layout::new(g, l1_entries);
    let at = |cluster: u64| cluster << g.cluster_bits;
    let header = Header {
        version,
        geometry: g,
        size: o.size,
        l1_size: l1_entries as u32,
        l1_offset: at(1 + layout.reftable + layout.blocks),
        reftable_offset: at(1),
        reftable_clusters: layout.reftable as u32,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: if compression == Compression::Zstd { COMPRESSION } else { 0 }
            | if g.extended_l2 { EXTENDED_L2 } else { 0 }
            | if g.data_file { DATA_FILE } else { 0 },
        compatible: if o.lazy_refcounts { LAZY_REFCOUNTS } else { 0 },
        autoclear: if o.data_file_raw { RAW_DATA_FILE } else { 0 },
        compression,
        backing: o.backing_file,
        backing_format: o.backing_fmt,
        data_file: data_name,
        extensions: Vec::new(),
        unknown_fields: Vec::new(),
    };
    let first = header.encode()?;
    write_tables(&file, g, &layout).await?;
    file.flush().await?;
    file.write(0, Buf::from_slice(&first), WriteFlags::default()).await?;
    file.flush().await?;
    match prealloc {
        None => Ok(()),
        Some(how) => {
            let data = data.unwrap_or_else(|| Child::new("new.data-file", None));
            preallocate(file, data, o.size, how).await
        }
    }
}

/// How large the file of an image that is made with these options becomes.
pub fn measure(options: Value) -> Result<ImageSize> {
    let o: Options = serde_json::from_value(options)
        .map_err(|e| Error::invalid(format!("options to create a qcow2 image: {e}")))?;
    let g = o.geometry(false)?;
    o.check(g)?;
    let data = g.clusters(o.size);
    let tables = data.div_ceil(g.l2_entries());
    let overhead = Layout::with(g, g.clusters(g.l1_entries(o.size) * 8), tables + data).total();
    let ready = matches!(o.preallocation()?, Some(Preallocation::Falloc | Preallocation::Full));
    Ok(ImageSize {
        disk: o.size,
        overhead: (overhead + tables) << g.cluster_bits,
        unit: g.cluster_size(),
        whole: ready,
    })
}

/// Empties the data file and gives it its length; gives its name for the header.
async fn make_data_file(data: &Child, size: u64) -> Result<Option<String>> {
    let none = || Error::new(ErrorKind::NoMedium, "'data-file' has no node");
    let node = data.node().await.ok_or_else(none)?;
    node.driver().resize(0).await?;
    node.driver().resize(size).await?;
    if !node.driver().reads_zero_when_new() && size > 0 {
        data.write_zeroes(ByteRange::new(0, size), ZeroFlags::default()).await?;
    }
    Ok(node.driver().info().await?.filename)
}

/// Empties the file and writes all but the header.
async fn write_tables(file: &Arc<Child>, g: Geometry, layout: &Layout) -> Result<()> {
    let none = || Error::new(ErrorKind::NoMedium, "'file' has no node");
    let node = file.node().await.ok_or_else(none)?;
    let total = layout.total() << g.cluster_bits;
    node.driver().resize(0).await?;
    node.driver().resize(total).await?;
    if !node.driver().reads_zero_when_new() {
        file.write_zeroes(ByteRange::new(0, total), ZeroFlags::default()).await?;
    }
    let blocks_at = 1 + layout.reftable;
    let offsets: Vec<u8> = (0..layout.blocks)
        .flat_map(|b| ((blocks_at + b) << g.cluster_bits).to_be_bytes())
        .collect();
    file.write(g.cluster_size(), Buf::from_slice(&offsets), WriteFlags::default()).await?;
    for b in 0..layout.blocks {
        let mut block = vec![0; g.cluster_size() as usize];
        let used = layout.total() - b * g.block_entries();
        for i in 0..used.min(g.block_entries()) {
            g.set_refcount(&mut block, i, 1);
        }
        let at = (blocks_at + b) << g.cluster_bits;
        file.write(at, Buf::from_slice(&block), WriteFlags::default()).await?;
    }
    Ok(())
}

/// Gives every guest cluster of the new image its host cluster.
async fn preallocate(
    file: Arc<Child>,
    data: Arc<Child>,
    size: u64,
    how: Preallocation,
) -> Result<()> {
    let image = super::open::open_new(file, data).await?;
    image.preallocate(ByteRange::new(0, size), how).await?;
    image.close_image().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_count_themselves() {
        let g = Geometry::new(16, 4);
        assert_eq!(Layout::new(g, 2), Layout { reftable: 1, blocks: 1, l1: 1 });
        for (cluster_bits, refcount_order, entries) in
            [(9, 6, 4 << 20), (9, 0, 100_000), (21, 6, 1)]
        {
            let g = Geometry::new(cluster_bits, refcount_order);
            let l = Layout::new(g, entries);
            assert!(l.blocks * g.block_entries() >= l.total());
            assert!(l.reftable * g.cluster_words() >= l.blocks);
        }
    }
}

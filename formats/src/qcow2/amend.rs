//! Changes of what the header says: the backing file's name, version, feature bits.
//!
//! Sectors of 512 bytes are what storage writes whole or not at all, and a header with its
//! extensions and names may be longer. So the first sector is written such that the header is
//! right before and after, whatever of the rest has been written.

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_node::{BackingName, WriteFlags};
use serde::Deserialize;
use serde_json::Value;

use super::Qcow2;
use super::entry::{Cluster, Entry};
use super::header::{Compression, Header, LAZY_REFCOUNTS};
use super::lookup::What;

const SECTOR: usize = 512;
/// Zeros are looked for and written in pieces of this size, in bytes.
const PIECE: u64 = 1 << 20;

/// The options of BlockdevCreateOptionsQcow2 that can be changed later.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Changes {
    size: Option<u64>,
    version: Option<String>,
    lazy_refcounts: Option<bool>,
    refcount_bits: Option<u64>,
    backing_file: Option<String>,
    backing_fmt: Option<String>,
}

impl Changes {
    /// The header as it is to be. Fails where that cannot be.
    fn apply(&self, old: &Header) -> Result<Header> {
        let mut new = old.clone();
        if self.backing_file.is_some() || self.backing_fmt.is_some() {
            return Err(Error::invalid(
                "the backing file is not changed in this way, for the disk would show something \
                 else: use 'gipfel img rebase'",
            ));
        }
        let bits = 1u64 << old.geometry.refcount_order;
        if let Some(n) = self.refcount_bits.filter(|n| *n != bits) {
            return Err(Error::unsupported(format!(
                "the image counts with {bits} bits, and changing that to {n} is not offered by \
                 this version of gipfel: 'gipfel img convert -o refcount_bits={n}' makes such an \
                 image"
            )));
        }
        new.version = match self.version.as_deref() {
            None => old.version,
            Some("v2") => 2,
            Some("v3") => 3,
            Some(v) => {
                return Err(Error::invalid(format!("version '{v}' must be 'v2' or 'v3'")));
            }
        };
        match self.lazy_refcounts {
            Some(true) => new.compatible |= LAZY_REFCOUNTS,
            Some(false) => new.compatible &= !LAZY_REFCOUNTS,
            None if new.version < 3 => new.compatible &= !LAZY_REFCOUNTS,
            None => {}
        }
        if new.version < 3 {
            check_v2(&mut new)?;
        }
        Ok(new)
    }
}

/// Fails for what version 2 cannot say, and leaves out what it does without.
fn check_v2(h: &mut Header) -> Result<()> {
    let needs_v3 = [
        ("lazy refcounts", h.compatible & LAZY_REFCOUNTS != 0),
        ("a refcount width other than 16", h.geometry.refcount_order != 4),
        ("another compression than zlib", h.compression != Compression::Zlib),
        ("what its header says of incompatible features", h.incompatible != 0),
    ];
    if let Some((what, _)) = needs_v3.iter().find(|n| n.1) {
        return Err(Error::invalid(format!("{what} needs version v3 (compat=1.1)")));
    }
    (h.compatible, h.autoclear) = (0, 0);
    h.unknown_fields = Vec::new();
    Ok(())
}

impl Qcow2 {
    /// Lets the image name another backing file, or none.
    pub(super) async fn change_backing(&self, backing: Option<BackingName>) -> Result<()> {
        if backing.is_some() && self.is_raw() {
            return Err(Error::invalid(
                "the data file is a raw image by itself, which cannot show a backing file",
            ));
        }
        // A flush may move tables, of which the header tells.
        self.flush_all().await?;
        let mut new = self.header().clone();
        (new.backing, new.backing_format) = match backing {
            Some(b) => (Some(b.file), b.format),
            None => (None, None),
        };
        self.put_header(new).await
    }

    /// Carries out an amend; `progress` hears of bytes of the disk done and of all.
    pub(super) async fn change_options(
        &self,
        options: Value,
        progress: &dyn Fn(u64, u64),
    ) -> Result<()> {
        let changes: Changes = serde_json::from_value(options)
            .map_err(|e| Error::invalid(format!("options that a qcow2 image can change: {e}")))?;
        let old = self.header().clone();
        let version = changes.apply(&old)?.version;
        if let Some(size) = changes.size {
            self.resize_to(size).await?;
        }
        if version < old.version {
            if old.snapshots > 0 {
                return Err(Error::unsupported(
                    "an image with internal snapshots keeps its version: \
                     this version of gipfel does not rewrite their tables",
                ));
            }
            self.write_out_zeros(old.backing.is_some(), progress).await?;
        }
        self.flush_all().await?;
        let now = self.header().clone();
        let new = changes.apply(&now)?;
        if new == now { Ok(()) } else { self.put_header(new).await }
    }

    /// Lets no entry have the zero flag, which version 2 does not know.
    async fn write_out_zeros(&self, has_backing: bool, progress: &dyn Fn(u64, u64)) -> Result<()> {
        let size = self.header().size;
        if !has_backing {
            let all = ByteRange::new(0, size);
            let unflagged = |old| (old == Cluster::Zero { host: None }).then_some(Entry::default());
            self.each_piece(all, false, unflagged).await?;
        }
        let mut left = ByteRange::new(0, size);
        while !left.is_empty() {
            let run = self.lookup(left.take(PIECE), true);
            match run.what {
                What::Uncached => {
                    self.load_l2(left.start()).await?;
                    continue;
                }
                What::Zero => self.write_zeros(left.take(run.len)).await?,
                What::Bad { entry } => return Err(self.bad_entry(left.start(), entry)),
                _ => {}
            }
            left = left.skip(run.len);
            progress(size - left.len(), size);
        }
        Ok(())
    }

    /// Writes another header in place of the present one. A loss of power leaves one of the two.
    async fn put_header(&self, new: Header) -> Result<()> {
        let bytes = new.encode()?;
        let (first, rest) = bytes.split_at(bytes.len().min(SECTOR));
        if !rest.is_empty() {
            // The header that is there must not need what is about to be overwritten.
            let alone = self.header().encode_alone()?;
            if alone.len() <= SECTOR {
                self.put_first_sector(&alone).await?;
            }
            let rest = Buf::from_slice(rest);
            self.file().write(SECTOR as u64, rest, WriteFlags::default()).await?;
            self.file().flush().await?;
        }
        self.put_first_sector(first).await?;
        *self.header() = new;
        Ok(())
    }

    async fn put_first_sector(&self, bytes: &[u8]) -> Result<()> {
        let mut sector = bytes.to_vec();
        sector.resize(SECTOR, 0);
        self.file().write(0, Buf::from_slice(&sector), WriteFlags::default()).await?;
        self.file().flush().await
    }
}

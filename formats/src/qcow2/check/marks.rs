//! What the header leads to apart from cluster mapping and refcounts: where the L1 tables lie,
//! the snapshot table, the bitmaps.

use gipfel_base::Result;

use super::Check;
use super::image::PIECE;
use super::tables::L1;
use crate::qcow2::geometry::{MAX_HOST_OFFSET, MAX_L1_BYTES};
use crate::qcow2::header::{BITMAPS, Extension, RAW_DATA_FILE};

/// Bytes of a snapshot table entry before its variable part (spec, Snapshot table entry).
const SNAPSHOT_ENTRY: u64 = 40;
/// Extra data that an entry must have in version 3, in bytes.
const SNAPSHOT_EXTRA: u64 = 16;
/// Extra data that an entry may have, in bytes.
const MAX_SNAPSHOT_EXTRA: u64 = 1024;
/// Largest snapshot table, in bytes.
const MAX_SNAPSHOT_TABLE: u64 = 64 << 20;
/// L1 tables of all snapshots together, in bytes.
const MAX_SNAPSHOT_L1: u64 = 1 << 30;

/// The bitmaps extension's type.
const EXT_BITMAPS: u32 = 0x2385_2875;
/// Where the header says where the snapshot table lies, in bytes.
const SNAPSHOTS_AT: u64 = 64;
/// Where the header's autoclear features lie, in bytes.
const AUTOCLEAR_AT: u64 = 88;
/// Bytes of a bitmap directory entry before its variable part.
const BITMAP_ENTRY: u64 = 24;
/// Most bitmaps in an image (spec, the note to nb_bitmaps).
const MAX_BITMAPS: u64 = 65_535;
/// Largest bitmap directory, in bytes.
const MAX_BITMAP_DIRECTORY: u64 = 64 << 20;
/// Tables of all bitmaps together, in bytes.
const MAX_BITMAP_TABLES: u64 = 1 << 30;
/// The offset in a bitmap table entry.
const BITMAP_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn be(b: &[u8], at: usize, len: usize) -> u64 {
    b[at..at + len].iter().fold(0, |v, x| v << 8 | u64::from(*x))
}

impl Check {
    /// Looks at what header fields say of things that the image does not have.
    pub(super) fn check_header(&mut self) {
        let h = &self.image.header;
        let mut faults = Vec::new();
        let (start, g) = (h.snapshots_offset, h.geometry);
        if h.snapshots == 0 && (g.in_cluster(start) != 0 || start >= MAX_HOST_OFFSET) {
            faults.push(format!("header field snapshots_offset is {start:#x}, which is no place"));
        }
        if h.autoclear & RAW_DATA_FILE != 0 && !g.data_file {
            faults.push("the header speaks of a raw external data file, but there is none".into());
        }
        if h.autoclear & BITMAPS != 0 && self.bitmaps_extension().is_none() {
            faults.push("the header says that bitmaps are consistent, but there is none".into());
        }
        for f in faults {
            self.needs.header = true;
            self.fault(self.plan.entries, f);
        }
    }

    /// Readies the header for a repair: `fields` are mended, and features that are not known are
    /// cleared (spec, autoclear_features: whoever writes does so).
    pub(super) async fn mend_header(&self, fields: bool) -> Result<()> {
        let h = &self.image.header;
        let mut known = BITMAPS | RAW_DATA_FILE;
        if fields {
            known = if self.bitmaps_extension().is_some() { BITMAPS } else { 0 }
                | if h.geometry.data_file { RAW_DATA_FILE } else { 0 };
            if h.snapshots == 0 && h.snapshots_offset != 0 {
                self.image.write(SNAPSHOTS_AT, &[0; 8]).await?;
            }
        }
        if h.autoclear & !known != 0 {
            self.image.write(AUTOCLEAR_AT, &(h.autoclear & known).to_be_bytes()).await?;
        }
        Ok(())
    }

    fn bitmaps_extension(&self) -> Option<&Extension> {
        self.image.header.extensions.iter().find(|e| e.kind == EXT_BITMAPS)
    }

    pub(super) fn mark_active_l1(&mut self) -> Result<()> {
        let (offset, entries) = (self.image.header.l1_offset, self.image.header.l1_size);
        let l1 = L1 { offset, entries: u64::from(entries), active: true };
        if entries > 0 && self.claim(offset, l1.entries * 8, "the L1 table")? {
            self.l1.push(l1);
        }
        Ok(())
    }

    /// Goes through the snapshot table (spec, Snapshots).
    pub(super) async fn mark_snapshots(&mut self) -> Result<()> {
        let (count, start) = (self.image.header.snapshots, self.image.header.snapshots_offset);
        let b = self.image.bounds;
        let mut at = 0;
        let mut tables = Vec::new();
        for i in 0..count {
            let what = || format!("entry {i} of the snapshot table at {start:#x}");
            let read = self.image.read(start + at, SNAPSHOT_ENTRY).await;
            let Some(e) = self.readable(read, what) else { return Ok(()) };
            let (names, extra) = (be(&e, 12, 2) + be(&e, 14, 2), be(&e, 36, 4));
            let end = (at + SNAPSHOT_ENTRY + extra + names).next_multiple_of(8);
            if extra > MAX_SNAPSHOT_EXTRA || end > MAX_SNAPSHOT_TABLE || !b.fit(start, end) {
                self.hidden(format!(
                    "{}: with {extra} bytes of extra data it would end {end} bytes from the \
                     table's start, which is past the file's end or past the limits",
                    what()
                ));
                break;
            }
            if self.image.header.version >= 3 && extra < SNAPSHOT_EXTRA {
                self.fault(false, format!("{}: its extra data are missing", what()));
            }
            at = end;
            tables.push((be(&e, 0, 8), be(&e, 8, 4)));
        }
        if count == 0 {
            return Ok(());
        }
        self.claim(start, at, "the snapshot table")?;
        let mut sum = 0;
        for (i, (offset, entries)) in tables.into_iter().enumerate() {
            let what = format!("the L1 table of snapshot {i}");
            sum += entries * 8;
            if entries * 8 > MAX_L1_BYTES || sum > MAX_SNAPSHOT_L1 {
                self.hidden(format!("{what} has {entries} entries, which is too many"));
            } else if self.claim(offset, entries * 8, &what)? {
                self.l1.push(L1 { offset, entries, active: false });
            }
        }
        Ok(())
    }

    /// Goes through the bitmap directory, if it is said to be consistent (spec, Bitmaps).
    pub(super) async fn mark_bitmaps(&mut self) -> Result<()> {
        let consistent = self.image.header.autoclear & BITMAPS != 0;
        let Some(ext) = self.bitmaps_extension().filter(|_| consistent) else { return Ok(()) };
        let data = &ext.data;
        if data.len() != 24 {
            self.hidden(format!("the bitmaps extension has {} bytes, not 24", data.len()));
            return Ok(());
        }
        let (count, size, offset) = (be(data, 0, 4), be(data, 8, 8), be(data, 16, 8));
        if count == 0 || count > MAX_BITMAPS || size > MAX_BITMAP_DIRECTORY {
            self.hidden(format!("the bitmap directory has {count} entries in {size} bytes"));
            return Ok(());
        }
        if !self.claim(offset, size, "the bitmap directory")? {
            return Ok(());
        }
        let (mut at, mut sum) = (0, 0);
        for i in 0..count {
            let what = || format!("bitmap {i} of the directory at {offset:#x}");
            let read = self.image.read(offset + at, BITMAP_ENTRY).await;
            let Some(e) = self.readable(read, what) else { return Ok(()) };
            let (name, extra) = (be(&e, 18, 2), be(&e, 20, 4));
            at = (at + BITMAP_ENTRY + name + extra).next_multiple_of(8);
            if at > size || name == 0 {
                self.hidden(format!("{} does not end in the directory", what()));
                return Ok(());
            }
            let (table, entries) = (be(&e, 0, 8), be(&e, 8, 4));
            sum += entries * 8;
            if sum > MAX_BITMAP_TABLES {
                self.hidden(format!("{} has a table of {entries} entries", what()));
                return Ok(());
            }
            if self.claim(table, entries * 8, &format!("the table of bitmap {i}"))? {
                self.mark_bitmap(table, entries).await?;
            }
        }
        Ok(())
    }

    /// Counts the clusters of one bitmap's data.
    async fn mark_bitmap(&mut self, table: u64, entries: u64) -> Result<()> {
        let cluster = self.image.bounds.g.cluster_size();
        for first in (0..entries).step_by(PIECE as usize / 8) {
            let at = table + first * 8;
            let read = self.image.table(at, (entries - first).min(PIECE / 8)).await;
            let what = || format!("the bitmap table at {table:#x}");
            let Some(piece) = self.readable(read, what) else { return Ok(()) };
            for (i, entry) in piece.into_iter().flatten().enumerate() {
                let offset = entry & BITMAP_OFFSET;
                if entry & !BITMAP_OFFSET & !1 != 0 || offset != 0 && entry & 1 != 0 {
                    self.fault(false, format!("{}, entry {i}: reserved bits are set", what()));
                }
                if offset != 0 {
                    self.claim(offset, cluster, "a cluster of a bitmap")?;
                }
            }
        }
        Ok(())
    }
}

//! Refcount structures written anew, behind everything that is in use.

use std::collections::BTreeSet;

use gipfel_base::{Error, ErrorKind, Result};

use super::Check;
use crate::qcow2::geometry::{Geometry, MAX_REFTABLE_BYTES};

/// Where the header says where the refcount table lies, in bytes.
const REFTABLE_AT: u64 = 48;

/// Where the new structures lie, in clusters: the table, then its blocks without a gap.
struct Place {
    start: u64,
    table: u64,
    /// The indices of the blocks that are needed, in order.
    blocks: BTreeSet<u64>,
}

impl Place {
    /// Finds out how much is needed from cluster `start` on for refcounts of the blocks `needed`
    /// and of the structures themselves.
    fn find(g: Geometry, start: u64, needed: BTreeSet<u64>) -> Result<Place> {
        let mut p = Place { start, table: 0, blocks: needed };
        loop {
            let size = p.table + p.blocks.len() as u64;
            let last = start + size.max(1) - 1;
            let own = start / g.block_entries()..=last / g.block_entries();
            p.blocks.extend(own);
            let entries = p.blocks.last().map_or(0, |b| b + 1);
            if entries * 8 > MAX_REFTABLE_BYTES {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!(
                        "new refcount structures would need a table of {entries} entries, but at \
                         most {} can be; copy the image with 'gipfel img convert'",
                        MAX_REFTABLE_BYTES / 8
                    ),
                ));
            }
            p.table = g.clusters(entries * 8).max(1);
            if p.table + p.blocks.len() as u64 == size {
                return Ok(p);
            }
        }
    }

    fn end(&self) -> u64 {
        self.start + self.table + self.blocks.len() as u64
    }
}

impl Check {
    /// Writes a new refcount table and blocks and puts them into use. The old ones are free then.
    pub(super) async fn rebuild(&mut self) -> Result<()> {
        let g = self.image.bounds.g;
        let start = self.end.max(self.used.end()).max(1);
        self.release_refcounts();
        let mut needed = BTreeSet::new();
        let mut from = 0;
        while let Some((c, _)) = self.used.next(from, u64::MAX) {
            self.used.charge(size_of::<u64>() as u64)?;
            needed.insert(c / g.block_entries());
            from = (c / g.block_entries() + 1) * g.block_entries();
        }
        let place = Place::find(g, start, needed)?;
        for c in place.start..place.end() {
            self.used.add(c, 1)?;
        }
        let mut table = vec![0; (place.table << g.cluster_bits) as usize];
        for (n, &index) in place.blocks.iter().enumerate() {
            let at = (place.start + place.table + n as u64) << g.cluster_bits;
            self.image.write(at, &self.refcount_block(index)).await?;
            let entry = index as usize * 8;
            table[entry..entry + 8].copy_from_slice(&at.to_be_bytes());
        }
        self.image.write(place.start << g.cluster_bits, &table).await?;
        self.image.flush().await?;
        let mut field = (place.start << g.cluster_bits).to_be_bytes().to_vec();
        field.extend((place.table as u32).to_be_bytes());
        self.image.write(REFTABLE_AT, &field).await?;
        self.image.flush().await
    }

    /// Takes back the uses of the old structures.
    fn release_refcounts(&mut self) {
        let bits = self.image.bounds.g.cluster_bits;
        for at in self.blocks.iter().filter(|at| **at != 0) {
            self.used.remove(at >> bits);
        }
        if self.reftable_claimed {
            let first = self.image.header.reftable_offset >> bits;
            for c in first..first + u64::from(self.image.header.reftable_clusters) {
                self.used.remove(c);
            }
        }
    }

    /// The bytes of block `index`, as the uses want it.
    fn refcount_block(&self, index: u64) -> Vec<u8> {
        let g = self.image.bounds.g;
        let mut block = vec![0; g.cluster_size() as usize];
        let first = index * g.block_entries();
        let (mut from, end) = (first, first + g.block_entries());
        while let Some((c, used)) = self.used.next(from, end) {
            g.set_refcount(&mut block, c - first, used.min(g.max_refcount()));
            from = c + 1;
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_new_structures_count_themselves() {
        // 64 refcounts in a block, 64 entries in a cluster of the table.
        let g = Geometry::new(9, 6);
        for start in [1, 62, 63, 64, 65, 4095, 4096, 64 * 64 * 64, 64 * 64 * 64 + 63] {
            let p = Place::find(g, start, BTreeSet::from([0])).unwrap();
            let own = start / 64..=(p.end() - 1) / 64;
            assert!(p.blocks.contains(&0) && own.clone().all(|b| p.blocks.contains(&b)), "{start}");
            assert_eq!(p.blocks.iter().filter(|b| **b != 0 && !own.contains(b)).count(), 0);
            assert!(p.table * 64 > *p.blocks.last().unwrap(), "{start}");
        }
        let e = Place::find(g, 1 << 40, BTreeSet::new()).err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Limit);
    }
}

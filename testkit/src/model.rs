//! What a disk should hold: sparse memory in blocks of 4 KiB, compared with what was read.

use crate::rng::Rng;
use std::collections::HashMap;

const BLOCK: u64 = 4096;

/// The model. Bytes never written are zero.
#[derive(Clone, Debug, Default)]
pub struct DiskModel {
    size: u64,
    blocks: HashMap<u64, Box<[u8; BLOCK as usize]>>,
}

impl DiskModel {
    /// A disk of `size` zero bytes.
    pub fn new(size: u64) -> Self {
        Self { size, blocks: HashMap::new() }
    }

    /// A disk that holds `data`.
    pub fn of(data: &[u8]) -> Self {
        let mut m = Self::new(data.len() as u64);
        m.write(0, data);
        m
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Changes the size; what is cut off is zero where the disk grows again.
    pub fn resize(&mut self, size: u64) {
        if size < self.size {
            self.zero(size, self.size - size);
        }
        self.size = size;
    }

    /// Writes `data` at `offset`.
    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.check(offset, data.len() as u64);
        each_block(offset, data.len() as u64, |block, within, at, n| {
            let b = self.blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK as usize]));
            b[within..within + n].copy_from_slice(&data[at..at + n]);
        });
    }

    /// Makes `len` bytes at `offset` zero.
    #[track_caller]
    pub fn zero(&mut self, offset: u64, len: u64) {
        self.check(offset, len);
        each_block(offset, len, |block, within, _, n| {
            if n == BLOCK as usize {
                self.blocks.remove(&block);
            } else if let Some(b) = self.blocks.get_mut(&block) {
                b[within..within + n].fill(0);
            }
        });
    }

    /// The `len` bytes at `offset`.
    #[track_caller]
    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        self.check(offset, len);
        let mut out = vec![0; len as usize];
        each_block(offset, len, |block, within, at, n| {
            if let Some(b) = self.blocks.get(&block) {
                out[at..at + n].copy_from_slice(&b[within..within + n]);
            }
        });
        out
    }

    /// Panics, with the first wrong byte, unless `got` is what the disk holds at `offset`.
    #[track_caller]
    pub fn expect(&self, offset: u64, got: &[u8]) {
        let want = self.read(offset, got.len() as u64);
        if let Some(i) = want.iter().zip(got).position(|(w, g)| w != g) {
            let wrong = want.iter().zip(got).filter(|(w, g)| w != g).count();
            panic!(
                "byte {:#x} (in a read of {:#x}+{:#x}) is {:#04x}, should be {:#04x}; \
                 {wrong} bytes of it are wrong",
                offset + i as u64,
                offset,
                got.len(),
                got[i],
                want[i],
            );
        }
    }

    /// Fills whole blocks at random places with random bytes: `share` of 100 of them.
    pub fn randomize(&mut self, rng: &mut Rng, share: u64) {
        for block in 0..self.size / BLOCK {
            if rng.below(100) < share {
                self.write(block * BLOCK, &rng.bytes(BLOCK as usize));
            }
        }
    }

    /// The whole disk, for small ones.
    pub fn to_vec(&self) -> Vec<u8> {
        self.read(0, self.size)
    }

    /// Writes the disk as a sparse raw file.
    pub fn save(&self, path: &str) {
        use std::os::unix::fs::FileExt;
        let save = || -> std::io::Result<()> {
            let file = std::fs::File::create(path)?;
            file.set_len(self.size)?;
            for (block, data) in &self.blocks {
                let n = (self.size - block * BLOCK).min(BLOCK) as usize;
                file.write_all_at(&data[..n], block * BLOCK)?;
            }
            Ok(())
        };
        save().unwrap_or_else(|e| panic!("cannot save the model in {path}: {e}"));
    }

    #[track_caller]
    fn check(&self, offset: u64, len: u64) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|e| e <= self.size),
            "{offset:#x}+{len:#x} lies outside a disk of {:#x} bytes",
            self.size
        );
    }
}

/// Calls `f(block, first byte within it, index in the data, length)` for each block touched.
fn each_block(offset: u64, len: u64, mut f: impl FnMut(u64, usize, usize, usize)) {
    let mut at = offset;
    while at < offset + len {
        let n = (BLOCK - at % BLOCK).min(offset + len - at);
        f(at / BLOCK, (at % BLOCK) as usize, (at - offset) as usize, n as usize);
        at += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_agrees_with_a_plain_vector() {
        let mut rng = Rng::from_env();
        const SIZE: u64 = 50_000;
        let mut plain = vec![0u8; SIZE as usize];
        let mut model = DiskModel::new(SIZE);
        for _ in 0..500 {
            let offset = rng.below(SIZE);
            let len = rng.between(0, (SIZE - offset).min(10_000));
            let span = offset as usize..(offset + len) as usize;
            if rng.one_in(3) {
                model.zero(offset, len);
                plain[span].fill(0);
            } else {
                let data = rng.bytes(len as usize);
                model.write(offset, &data);
                plain[span].copy_from_slice(&data);
            }
        }
        assert!(model.to_vec() == plain);
        model.expect(17, &plain[17..]);
        let wrong = std::panic::catch_unwind(|| model.expect(5, &[plain[5] ^ 1])).unwrap_err();
        assert!(wrong.downcast_ref::<String>().unwrap().contains("byte 0x5 "));
    }
}

//! Ciphers, how they are chained within a sector, and where a sector's initialization vector
//! comes from: what the header calls cipher name and cipher mode (LUKS1 spec, chapter "Cipher and
//! Hash specification registry"; XTS: IEEE 1619). Pure functions on whole sectors.

use aes::cipher::consts::U16;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use aes::{Aes128, Aes192, Aes256};
use gipfel_base::{Error, Result};
use serpent::Serpent;
use twofish::Twofish;

use super::hash::Hash;
use super::header::SECTOR;

/// One block of a cipher: all that are offered have the same size.
type Block = Array<u8, U16>;

const BLOCK: usize = 16;
/// Blocks of a sector.
const BLOCKS: usize = SECTOR as usize / BLOCK;
/// Sectors that are worked on together, so that the cipher has enough blocks at once.
const BATCH: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Algorithm {
    Aes,
    Serpent,
    Twofish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chaining {
    Xts,
    Cbc,
    Ecb,
}

/// Where initialization vectors come from (QCryptoIVGenAlgo).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IvSource {
    /// The number of the sector, 32 bits.
    Plain,
    /// The number of the sector, 64 bits.
    Plain64,
    /// That, encrypted with the hash of the key.
    Essiv(Hash),
}

const ALGORITHMS: [(&str, Algorithm); 3] =
    [("aes", Algorithm::Aes), ("serpent", Algorithm::Serpent), ("twofish", Algorithm::Twofish)];
const CHAININGS: [(&str, Chaining); 3] =
    [("xts", Chaining::Xts), ("cbc", Chaining::Cbc), ("ecb", Chaining::Ecb)];

/// What a header says about encryption: something that is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    algorithm: Algorithm,
    chaining: Chaining,
    iv: IvSource,
    /// In bytes.
    key_len: usize,
}

/// Names of a cipher's parts as QMP has them (QCryptoBlockInfoLUKS).
pub(super) struct Names {
    pub cipher: String,
    pub mode: &'static str,
    pub iv: &'static str,
    pub iv_hash: Option<&'static str>,
}

fn lookup<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table.iter().find(|(n, _)| *n == name).map(|(_, t)| *t)
}

impl Spec {
    /// The cipher `name` in `mode` (such as `xts-plain64`) with keys of `key_len` bytes.
    pub(super) fn parse(name: &str, mode: &str, key_len: u32) -> Result<Spec> {
        let refused = |why: &str| {
            Err(Error::unsupported(format!(
                "cipher '{name}' in mode '{mode}' with a key of {key_len} bytes {why}; this \
                 version of gipfel has aes, serpent and twofish with 128, 192 or 256 bits, in the \
                 modes xts, cbc and ecb, with plain, plain64 or essiv:HASH"
            )))
        };
        let Some(algorithm) = lookup(&ALGORITHMS, name) else {
            return refused("is not offered");
        };
        let (chain, iv) = mode.split_once('-').unwrap_or((mode, ""));
        let Some(chaining) = lookup(&CHAININGS, chain) else {
            return refused("is not offered");
        };
        // Some write a hash behind sources that need none.
        let (source, hash) = iv.split_once(':').unwrap_or((iv, ""));
        let iv = match source {
            "plain" => IvSource::Plain,
            "plain64" => IvSource::Plain64,
            "essiv" => IvSource::Essiv(Hash::parse(hash)?),
            "" if chaining == Chaining::Ecb => IvSource::Plain64,
            _ => return refused("is not offered"),
        };
        let key_len = key_len as usize;
        let spec = Spec { algorithm, chaining, iv, key_len };
        let own = if chaining == Chaining::Xts { key_len / 2 } else { key_len };
        if !matches!(own, 16 | 24 | 32) || chaining == Chaining::Xts && key_len % 2 == 1 {
            return refused("does not exist");
        }
        if let IvSource::Essiv(h) = iv
            && !matches!(h.digest(&[]).len(), 16 | 24 | 32)
        {
            return refused("does not exist: that hash is no key of the cipher");
        }
        Ok(spec)
    }

    /// Length of the whole key, in bytes.
    pub(super) fn key_len(&self) -> usize {
        self.key_len
    }

    pub(super) fn names(&self) -> Names {
        let name = |i: Option<&'static str>| i.unwrap_or_default();
        let algorithm = ALGORITHMS.iter().find(|(_, a)| *a == self.algorithm).map(|(n, _)| *n);
        let own = if self.chaining == Chaining::Xts { self.key_len / 2 } else { self.key_len };
        let (iv, iv_hash) = match self.iv {
            IvSource::Plain => ("plain", None),
            IvSource::Plain64 => ("plain64", None),
            IvSource::Essiv(h) => ("essiv", Some(h.name())),
        };
        Names {
            cipher: format!("{}-{}", name(algorithm), own * 8),
            mode: name(CHAININGS.iter().find(|(_, c)| *c == self.chaining).map(|(n, _)| *n)),
            iv,
            iv_hash,
        }
    }

    /// The cipher with `key`, which has [`Spec::key_len`] bytes.
    pub(super) fn keyed(&self, key: &[u8]) -> Result<Box<dyn Sectors>> {
        let own = if self.chaining == Chaining::Xts { key.len() / 2 } else { key.len() };
        match (self.algorithm, own) {
            (Algorithm::Aes, 16) => self.build::<Aes128>(key),
            (Algorithm::Aes, 24) => self.build::<Aes192>(key),
            (Algorithm::Aes, _) => self.build::<Aes256>(key),
            (Algorithm::Serpent, _) => self.build::<Serpent>(key),
            (Algorithm::Twofish, _) => self.build::<Twofish>(key),
        }
    }

    fn build<C: Cipher>(&self, key: &[u8]) -> Result<Box<dyn Sectors>> {
        let iv = match self.iv {
            IvSource::Plain => Iv::Plain,
            IvSource::Plain64 => Iv::Plain64,
            IvSource::Essiv(hash) => Iv::Essiv(self.block_cipher(&hash.digest(key))?),
        };
        Ok(match self.chaining {
            Chaining::Xts => {
                let (data, tweak) = key.split_at(key.len() / 2);
                Box::new(Xts { data: cipher::<C>(data)?, tweak: cipher::<C>(tweak)?, iv })
            }
            Chaining::Cbc => Box::new(Cbc { cipher: cipher::<C>(key)?, iv }),
            Chaining::Ecb => Box::new(Ecb { cipher: cipher::<C>(key)? }),
        })
    }

    fn block_cipher(&self, key: &[u8]) -> Result<Box<dyn EncryptBlock>> {
        Ok(match (self.algorithm, key.len()) {
            (Algorithm::Aes, 16) => Box::new(cipher::<Aes128>(key)?),
            (Algorithm::Aes, 24) => Box::new(cipher::<Aes192>(key)?),
            (Algorithm::Aes, _) => Box::new(cipher::<Aes256>(key)?),
            (Algorithm::Serpent, _) => Box::new(cipher::<Serpent>(key)?),
            (Algorithm::Twofish, _) => Box::new(cipher::<Twofish>(key)?),
        })
    }
}

fn cipher<C: Cipher>(key: &[u8]) -> Result<C> {
    C::new_from_slice(key)
        .map_err(|_| Error::invalid(format!("a key of {} bytes does not fit", key.len())))
}

/// What all block ciphers here can do.
trait Cipher:
    BlockCipherEncrypt<BlockSize = U16> + BlockCipherDecrypt + KeyInit + Send + Sync + 'static
{
}

impl<C> Cipher for C where
    C: BlockCipherEncrypt
        + BlockCipherDecrypt
        + BlockSizeUser<BlockSize = U16>
        + KeyInit
        + Send
        + Sync
        + 'static
{
}

/// A cipher of any kind that only encrypts single blocks.
trait EncryptBlock: Send + Sync {
    fn encrypt(&self, block: &mut Block);
}

impl<C: Cipher> EncryptBlock for C {
    fn encrypt(&self, block: &mut Block) {
        self.encrypt_block(block);
    }
}

enum Iv {
    Plain,
    Plain64,
    Essiv(Box<dyn EncryptBlock>),
}

impl Iv {
    fn of(&self, sector: u64) -> Block {
        let mut block = Block::default();
        match self {
            // Only 32 bits: they begin again at 2 TiB.
            Iv::Plain => block[..4].copy_from_slice(&(sector as u32).to_le_bytes()),
            Iv::Plain64 => block[..8].copy_from_slice(&sector.to_le_bytes()),
            Iv::Essiv(cipher) => {
                block[..8].copy_from_slice(&sector.to_le_bytes());
                cipher.encrypt(&mut block);
            }
        }
        block
    }
}

/// A cipher with its key, for whole sectors of [`SECTOR`] bytes of which the first has number
/// `sector`. Bytes after the last whole sector are left alone.
pub(super) trait Sectors: Send + Sync {
    /// Encrypts in place.
    fn encrypt(&self, sector: u64, data: &mut [u8]);
    /// Decrypts in place.
    fn decrypt(&self, sector: u64, data: &mut [u8]);
}

/// The sectors of `data`, each as blocks, with their numbers.
fn sectors(first: u64, data: &mut [u8]) -> impl Iterator<Item = (u64, &mut [Block])> {
    let sectors = data.chunks_exact_mut(SECTOR as usize).enumerate();
    sectors.map(move |(i, s)| (first + i as u64, Block::slice_as_chunks_mut(s).0))
}

fn xor(to: &mut Block, with: &Block) {
    to.iter_mut().zip(with).for_each(|(t, w)| *t ^= w);
}

/// XTS with whole blocks only: a sector has no remainder to steal from.
struct Xts<C> {
    data: C,
    tweak: C,
    iv: Iv,
}

impl<C: Cipher> Xts<C> {
    /// Runs `work` on all blocks between two times their tweaks.
    fn run(&self, first: u64, data: &mut [u8], work: impl Fn(&C, &mut [Block])) {
        let whole = data.len() / SECTOR as usize * SECTOR as usize;
        let batches = data[..whole].chunks_mut(BATCH * SECTOR as usize).enumerate();
        let mut tweaks = [Block::default(); BATCH * BLOCKS];
        for (i, batch) in batches {
            let count = batch.len() / SECTOR as usize;
            let sector = first + (i * BATCH) as u64;
            self.tweaks(sector, &mut tweaks[..count * BLOCKS]);
            let blocks = Block::slice_as_chunks_mut(batch).0;
            blocks.iter_mut().zip(&tweaks).for_each(|(b, t)| xor(b, t));
            work(&self.data, blocks);
            blocks.iter_mut().zip(&tweaks).for_each(|(b, t)| xor(b, t));
        }
    }

    /// The tweaks of whole sectors: each sector's first one is its encrypted initialization
    /// vector, the next ones are products with the primitive element of GF(2^128).
    fn tweaks(&self, first: u64, tweaks: &mut [Block]) {
        let mut starts = [Block::default(); BATCH];
        let count = tweaks.len() / BLOCKS;
        for (i, s) in starts[..count].iter_mut().enumerate() {
            *s = self.iv.of(first + i as u64);
        }
        self.tweak.encrypt_blocks(&mut starts[..count]);
        for (sector, start) in tweaks.chunks_exact_mut(BLOCKS).zip(&starts) {
            let mut t = u128::from_le_bytes((*start).into());
            for tweak in sector {
                *tweak = t.to_le_bytes().into();
                t = (t << 1) ^ ((t >> 127) * 0x87);
            }
        }
    }
}

impl<C: Cipher> Sectors for Xts<C> {
    fn encrypt(&self, sector: u64, data: &mut [u8]) {
        self.run(sector, data, |c, blocks| c.encrypt_blocks(blocks));
    }

    fn decrypt(&self, sector: u64, data: &mut [u8]) {
        self.run(sector, data, |c, blocks| c.decrypt_blocks(blocks));
    }
}

struct Cbc<C> {
    cipher: C,
    iv: Iv,
}

impl<C: Cipher> Sectors for Cbc<C> {
    fn encrypt(&self, sector: u64, data: &mut [u8]) {
        for (n, blocks) in sectors(sector, data) {
            let mut last = self.iv.of(n);
            for b in blocks {
                xor(b, &last);
                self.cipher.encrypt_block(b);
                last = *b;
            }
        }
    }

    fn decrypt(&self, sector: u64, data: &mut [u8]) {
        let mut before = [Block::default(); BLOCKS];
        for (n, blocks) in sectors(sector, data) {
            before[0] = self.iv.of(n);
            before[1..].copy_from_slice(&blocks[..BLOCKS - 1]);
            self.cipher.decrypt_blocks(blocks);
            blocks.iter_mut().zip(&before).for_each(|(b, last)| xor(b, last));
        }
    }
}

struct Ecb<C> {
    cipher: C,
}

impl<C: Cipher> Sectors for Ecb<C> {
    fn encrypt(&self, sector: u64, data: &mut [u8]) {
        sectors(sector, data).for_each(|(_, blocks)| self.cipher.encrypt_blocks(blocks));
    }

    fn decrypt(&self, sector: u64, data: &mut [u8]) {
        sectors(sector, data).for_each(|(_, blocks)| self.cipher.decrypt_blocks(blocks));
    }
}

#[cfg(test)]
mod tests;

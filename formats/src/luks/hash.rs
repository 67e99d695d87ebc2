//! The hashes of LUKS1 and what it makes of them: PBKDF2 (RFC 8018, 5.2) and the anti-forensic
//! splitter (LUKS1 spec, chapter 2.4 "AF splitter"). Pure functions.

use gipfel_base::{Error, Result};
use pbkdf2::pbkdf2_hmac;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use zeroize::Zeroizing;

/// A hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

const NAMES: [(&str, Hash); 6] = [
    ("sha1", Hash::Sha1),
    ("sha224", Hash::Sha224),
    ("sha256", Hash::Sha256),
    ("sha384", Hash::Sha384),
    ("sha512", Hash::Sha512),
    ("ripemd160", Hash::Ripemd160),
];

/// Calls a generic function for the hash that a value stands for.
macro_rules! with_hash {
    ($hash:expr, $f:ident ( $($arg:expr),* )) => {
        match $hash {
            Hash::Sha1 => $f::<Sha1>($($arg),*),
            Hash::Sha224 => $f::<Sha224>($($arg),*),
            Hash::Sha256 => $f::<Sha256>($($arg),*),
            Hash::Sha384 => $f::<Sha384>($($arg),*),
            Hash::Sha512 => $f::<Sha512>($($arg),*),
            Hash::Ripemd160 => $f::<Ripemd160>($($arg),*),
        }
    };
}

impl Hash {
    /// The hash of that name, as headers write it.
    pub(super) fn parse(name: &str) -> Result<Hash> {
        NAMES.iter().find(|(n, _)| *n == name).map(|(_, h)| *h).ok_or_else(|| {
            let known = NAMES.map(|(n, _)| n).join(", ");
            Error::unsupported(format!(
                "hash '{name}' is not offered by this version of gipfel; it has {known}"
            ))
        })
    }

    /// Its name in headers and in QMP (QCryptoHashAlgo).
    pub(super) fn name(self) -> &'static str {
        NAMES.iter().find(|(_, h)| *h == self).map_or("", |(n, _)| *n)
    }

    /// The hash of `bytes`.
    pub(super) fn digest(self, bytes: &[u8]) -> Zeroizing<Vec<u8>> {
        with_hash!(self, digest(bytes))
    }

    /// Fills `out` with PBKDF2 of a passphrase, HMAC with this hash as its function.
    pub(super) fn pbkdf2(self, passphrase: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) {
        with_hash!(self, pbkdf2_hmac(passphrase, salt, iterations, out));
    }

    /// Spreads the information of `block` over all of it: each piece of the hash's length is
    /// replaced by the hash of its number and itself.
    pub(super) fn diffuse(self, block: &mut [u8]) {
        with_hash!(self, diffuse(block));
    }

    /// Puts a key of `len` bytes together from its stripes, which lie one after the other.
    pub(super) fn merge(self, split: &[u8], len: usize) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(vec![0; len]);
        let mut stripes = split.chunks_exact(len).peekable();
        while let Some(stripe) = stripes.next() {
            key.iter_mut().zip(stripe).for_each(|(k, s)| *k ^= s);
            if stripes.peek().is_some() {
                self.diffuse(&mut key);
            }
        }
        key
    }
}

fn digest<D: Digest>(bytes: &[u8]) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(D::digest(bytes).to_vec())
}

fn diffuse<D: Digest>(block: &mut [u8]) {
    for (i, piece) in block.chunks_mut(<D as Digest>::output_size()).enumerate() {
        let mut d = D::new();
        d.update((i as u32).to_be_bytes());
        d.update(&*piece);
        let mut out = d.finalize();
        piece.copy_from_slice(&out[..piece.len()]);
        zeroize::Zeroize::zeroize(out.as_mut_slice());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gipfel_testkit::Rng;

    #[test]
    fn every_hash_has_its_name_and_length() {
        let lengths = [20, 28, 32, 48, 64, 20];
        for ((name, hash), len) in NAMES.into_iter().zip(lengths) {
            assert_eq!((Hash::parse(name).unwrap(), hash.name()), (hash, name));
            assert_eq!(hash.digest(b"x").len(), len);
        }
        assert!(Hash::parse("md5").unwrap_err().to_string().contains("'md5'"));
    }

    #[test]
    fn pbkdf2_as_in_rfc_6070() {
        let mut out = [0; 20];
        Hash::Sha1.pbkdf2(b"password", b"salt", 4096, &mut out);
        let wanted = [
            0x4b, 0x00, 0x79, 0x01, 0xb7, 0x65, 0x48, 0x9a, 0xbe, 0xad, 0x49, 0xd9, 0x26, 0xf7,
            0x21, 0xd0, 0x65, 0xa4, 0x29, 0xc1,
        ];
        assert_eq!(out, wanted);
    }

    #[test]
    fn what_is_split_can_be_merged() {
        let mut rng = Rng::new(7);
        for (_, hash) in NAMES {
            for len in [16, 32, 48, 64] {
                let key = rng.bytes(len);
                let split = hash.split(&key, 6, &mut rng);
                assert_eq!(*hash.merge(&split, len), key, "{hash:?}, {len} bytes");
            }
        }
    }
}

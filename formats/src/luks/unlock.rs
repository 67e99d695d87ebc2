//! From a passphrase to the cipher of the data: derive a slot's key, decrypt and merge its key
//! material, recognise the master key by its digest (LUKS1 spec, chapter 4.2 "Master key
//! recovery"). Pure functions; they take as long as the header's iterations demand.

use gipfel_base::Result;
use zeroize::Zeroizing;

use super::header::{DIGEST, Header, Slot};

/// A key, zeroed when it is dropped.
pub(super) type Key = Zeroizing<Vec<u8>>;

/// The master key, if `passphrase` opens `slot`, whose key material as it is stored is
/// `material`.
pub(super) fn try_slot(
    header: &Header,
    slot: &Slot,
    passphrase: &[u8],
    mut material: Key,
) -> Result<Option<Key>> {
    let len = header.spec.key_len();
    let mut key = Zeroizing::new(vec![0; len]);
    header.hash.pbkdf2(passphrase, &slot.salt, slot.iterations, &mut key);
    // Key material is encrypted as a disk of its own, from sector 0 on.
    header.spec.keyed(&key)?.decrypt(0, &mut material);
    let split = material.get(..header.split_len()).unwrap_or_default();
    let master = header.hash.merge(split, len);
    Ok(is_master(header, &master).then_some(master))
}

/// Whether the digest in the header is that of `key`.
fn is_master(header: &Header, key: &[u8]) -> bool {
    let mut digest = [0; DIGEST];
    header.hash.pbkdf2(key, &header.digest_salt, header.digest_iterations, &mut digest);
    digest == header.digest
}

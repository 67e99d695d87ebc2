//! The header of a LUKS1 image: parsed and checked, nothing else (LUKS1 spec 1.2.3, chapter 2,
//! "Overview" and the tables "PHDR layout" and "key slot layout"; all numbers big-endian).

use gipfel_base::{ByteRange, Error, ErrorKind, Result};

use super::cipher::Spec;
use super::hash::Hash;

/// The first bytes of an image, and of a LUKS2 image too.
pub(super) const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
/// Length of the header, in bytes.
pub(super) const LEN: usize = 592;
/// The unit of all offsets, and of encryption, in bytes.
pub(super) const SECTOR: u64 = 512;
/// Key slots of an image.
pub(super) const SLOTS: usize = 8;
/// Length of salts, in bytes.
const SALT: usize = 32;
/// Length of the digest of the master key, in bytes.
pub(super) const DIGEST: usize = 20;
/// Into how many stripes key material is split (LUKS_STRIPES): no other number is ever written.
pub(super) const STRIPES: u32 = 4000;

/// Most rounds of PBKDF2 that are taken on to try a passphrase on all slots: a minute's work. Tools
/// give a slot what takes them two seconds, which is ten million with a quick hash and machine.
const MAX_ROUNDS: u64 = 100_000_000;

const ACTIVE: u32 = 0x00ac_71f3;
const INACTIVE: u32 = 0x0000_dead;

/// A LUKS1 header whose fields do not contradict each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// How data and key material are encrypted.
    pub spec: Spec,
    /// The hash of key derivation, digest and splitter.
    pub hash: Hash,
    /// Where the encrypted data begin, in bytes; 0 only where the header is detached.
    pub payload: u64,
    /// What the master key is recognised by.
    pub digest: [u8; DIGEST],
    /// Salt of the digest.
    pub digest_salt: [u8; SALT],
    /// Iterations of the digest.
    pub digest_iterations: u32,
    /// The image's UUID, as it is written there.
    pub uuid: String,
    /// The key slots.
    pub slots: [Slot; SLOTS],
}

/// A key slot: the master key, encrypted under one passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    /// Whether there is a key in it.
    pub active: bool,
    /// Iterations of the derivation of its key from the passphrase.
    pub iterations: u32,
    /// Salt of that derivation.
    pub salt: [u8; SALT],
    /// Where its key material begins, in bytes.
    pub material: u64,
}

/// A reader of fields, one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>().ok_or_else(|| {
            bad(format!("the image ends within its header, which has {LEN} bytes"))
        })?;
        self.0 = rest;
        Ok(*first)
    }

    fn u32(&mut self) -> Result<u32> {
        self.bytes().map(u32::from_be_bytes)
    }

    /// A text that ends with a zero byte.
    fn text<const N: usize>(&mut self, what: &str) -> Result<String> {
        let field = self.bytes::<N>()?;
        let text = field.split(|b| *b == 0).next().unwrap_or_default();
        let printable = text.iter().all(|b| b.is_ascii_graphic());
        if text.len() == N || !printable {
            return Err(bad(format!("its {what} is no text that ends with a zero byte")));
        }
        Ok(String::from_utf8_lossy(text).into_owned())
    }
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::corrupt(format!("damaged LUKS header: {what}"))
}

impl Header {
    /// Reads the header at the start of `bytes`. With `detached`, the data lie elsewhere and
    /// nothing need follow the key material.
    pub(super) fn parse(bytes: &[u8], detached: bool) -> Result<Header> {
        let mut f = Fields(bytes);
        if f.bytes()? != MAGIC {
            return Err(Error::invalid("this is no LUKS image: it does not begin as one does"));
        }
        match u16::from_be_bytes(f.bytes()?) {
            1 => {}
            2 => {
                return Err(Error::unsupported(
                    "LUKS version 2 is not offered by this version of gipfel, only version 1 is",
                ));
            }
            v => return Err(bad(format!("there is no version {v}"))),
        }
        let (name, mode) = (f.text::<32>("cipher name")?, f.text::<32>("cipher mode")?);
        let hash = Hash::parse(&f.text::<32>("hash name")?)?;
        let payload = u64::from(f.u32()?) * SECTOR;
        let spec = Spec::parse(&name, &mode, f.u32()?)?;
        let (digest, digest_salt, digest_iterations) = (f.bytes()?, f.bytes()?, f.u32()?);
        let uuid = f.text::<40>("UUID")?;
        let slots = (0..SLOTS).map(|i| Slot::parse(&mut f, i)).collect::<Result<Vec<_>>>()?;
        let slots = slots.try_into().unwrap_or_else(|_| unreachable!("there are {SLOTS} slots"));
        let header =
            Header { spec, hash, payload, digest, digest_salt, digest_iterations, uuid, slots };
        header.check(detached)?;
        Ok(header)
    }

    /// The key material of a slot, in bytes: whole sectors.
    pub(super) fn material(&self, slot: &Slot) -> ByteRange {
        let len = self.split_len() as u64;
        ByteRange::new(slot.material, len.next_multiple_of(SECTOR))
    }

    /// Length of the split master key, in bytes.
    pub(super) fn split_len(&self) -> usize {
        self.spec.key_len() * STRIPES as usize
    }

    /// Fails where a wrong passphrase, which is tried on every slot, would keep its user (and the
    /// graph, which is not changed meanwhile) waiting for minutes.
    fn check_work(&self) -> Result<()> {
        let rounds = |len: usize| len.div_ceil(self.hash.digest(b"").len()) as u64;
        let digest = u64::from(self.digest_iterations) * rounds(DIGEST);
        let slot = |s: &Slot| u64::from(s.iterations) * rounds(self.spec.key_len()) + digest;
        let all: u64 = self.slots.iter().filter(|s| s.active).map(slot).sum();
        if all <= MAX_ROUNDS {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Limit,
            format!(
                "trying a passphrase on all its key slots takes {all} rounds of the hash, more \
                 than the {MAX_ROUNDS} that are taken on: give its keys fewer iterations \
                 (cryptsetup luksChangeKey --pbkdf-force-iterations)"
            ),
        ))
    }

    fn check(&self, detached: bool) -> Result<()> {
        if self.digest_iterations == 0 {
            return Err(bad("the digest of its master key has no iterations"));
        }
        self.check_work()?;
        let head = ByteRange::new(0, (LEN as u64).next_multiple_of(SECTOR));
        if !detached && self.payload < head.end() {
            return Err(bad(if self.payload == 0 {
                "it says that the data lie elsewhere (detached header): give their node as 'file' \
                 and this one as 'header'"
                    .to_owned()
            } else {
                format!("the data begin at {:#x}, within the header", self.payload)
            }));
        }
        for (i, slot) in self.slots.iter().enumerate() {
            let own = self.material(slot);
            if own.overlaps(head) {
                return Err(bad(format!("key material of slot {i} lies within the header")));
            }
            if !detached && own.end() > self.payload {
                return Err(bad(format!(
                    "key material of slot {i} ends at {:#x}, behind the start of the data at {:#x}",
                    own.end(),
                    self.payload
                )));
            }
            let earlier = self.slots[..i].iter().position(|s| self.material(s).overlaps(own));
            if let Some(other) = earlier {
                return Err(bad(format!("key material of slots {other} and {i} overlaps")));
            }
        }
        Ok(())
    }
}

impl Slot {
    fn parse(f: &mut Fields<'_>, index: usize) -> Result<Slot> {
        let active = match f.u32()? {
            ACTIVE => true,
            INACTIVE => false,
            state => {
                return Err(bad(format!(
                    "key slot {index} is neither active nor inactive: its state is {state:#x}"
                )));
            }
        };
        let (iterations, salt) = (f.u32()?, f.bytes()?);
        let material = u64::from(f.u32()?) * SECTOR;
        let stripes = f.u32()?;
        if active && iterations == 0 {
            return Err(bad(format!("key slot {index} has no iterations")));
        }
        if stripes != STRIPES {
            return Err(bad(format!(
                "key slot {index} has {stripes} stripes, and it must be {STRIPES}"
            )));
        }
        Ok(Slot { active, iterations, salt, material })
    }
}

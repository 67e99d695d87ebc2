//! Images made by the tests themselves, field by field, and a node in memory to keep them in.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::sim::Rng as SimRng;
use gipfel_io::{Buf, time};
use gipfel_node::{
    Child, Common, Discard, Driver, DriverDef, IoFuture, Kind, Node, OpenArgs, Opened, Secret,
    Secrets, Status, WriteFlags,
};
use gipfel_testkit::Rng;
use serde_json::{Value, json};

use super::super::cipher::Spec;
use super::super::hash::Hash;
use super::super::{LUKS, open};

/// What an image is made with.
#[derive(Clone)]
pub struct Recipe {
    pub cipher: &'static str,
    pub mode: &'static str,
    pub key_len: usize,
    pub hash: &'static str,
    /// Key slot and passphrase.
    pub slots: Vec<(usize, &'static str)>,
    /// Bytes of data.
    pub size: usize,
}

impl Default for Recipe {
    fn default() -> Recipe {
        Recipe {
            cipher: "aes",
            mode: "xts-plain64",
            key_len: 64,
            hash: "sha256",
            slots: vec![(0, "open sesame")],
            size: 64 << 10,
        }
    }
}

/// Where fields stand in a header.
pub const PAYLOAD: usize = 104;
pub const SLOT: usize = 208;
const SLOT_LEN: usize = 48;
/// Where the data of an image begin that is not detached, in sectors.
const DATA_START: u32 = 4096;

/// Where slot `i` stands.
pub fn slot_at(i: usize) -> usize {
    SLOT + i * SLOT_LEN
}

impl Recipe {
    /// The image, its data all zeros as they are stored. With `detached`, only its header and key
    /// material.
    pub fn image(&self, detached: bool) -> Vec<u8> {
        let mut rng = Rng::new(42);
        let hash = Hash::parse(self.hash).unwrap();
        let spec = Spec::parse(self.cipher, self.mode, self.key_len as u32).unwrap();
        let master = rng.bytes(self.key_len);
        let mut image = vec![0; DATA_START as usize * 512 + self.size];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"LUKS\xba\xbe\0\x01");
        put(8, self.cipher.as_bytes());
        put(40, self.mode.as_bytes());
        put(72, self.hash.as_bytes());
        put(PAYLOAD, &if detached { 0 } else { DATA_START }.to_be_bytes());
        put(108, &(self.key_len as u32).to_be_bytes());
        let salt = rng.bytes(32);
        let mut digest = [0; 20];
        hash.pbkdf2(&master, &salt, 7, &mut digest);
        put(112, &digest);
        put(132, &salt);
        put(164, &7u32.to_be_bytes());
        put(168, b"12345678-1234-1234-1234-123456789abc");
        for i in 0..8usize {
            let (at, material) = (slot_at(i), 8 + i as u32 * 508);
            put(at, &0xdeadu32.to_be_bytes());
            put(at + 40, &material.to_be_bytes());
            put(at + 44, &4000u32.to_be_bytes());
            let Some((_, passphrase)) = self.slots.iter().find(|(s, _)| *s == i) else { continue };
            let salt = rng.bytes(32);
            put(at, &0x00ac_71f3u32.to_be_bytes());
            put(at + 4, &11u32.to_be_bytes());
            put(at + 8, &salt);
            let mut key = vec![0; self.key_len];
            hash.pbkdf2(passphrase.as_bytes(), &salt, 11, &mut key);
            let mut split = hash.split(&master, 4000, &mut rng);
            split.resize(split.len().next_multiple_of(512), 0);
            spec.keyed(&key).unwrap().encrypt(0, &mut split);
            put(material as usize * 512, &split);
        }
        image.truncate(if detached { DATA_START as usize * 512 } else { image.len() });
        image
    }
}

impl Hash {
    /// A key as `stripes` stripes: all but the last are random, and that one makes up for them.
    pub fn split(self, key: &[u8], stripes: usize, rng: &mut Rng) -> Vec<u8> {
        let mut split = rng.bytes(key.len() * (stripes - 1));
        let mut last = vec![0; key.len()];
        for stripe in split.chunks(key.len()) {
            last.iter_mut().zip(stripe).for_each(|(l, s)| *l ^= s);
            self.diffuse(&mut last);
        }
        split.extend(last.iter().zip(key).map(|(l, k)| l ^ k));
        split
    }
}

/// Bytes in memory. With `slowest`, each half of a request takes up to so many nanoseconds, so
/// that requests meet each other half done.
pub struct Memory {
    bytes: Mutex<Vec<u8>>,
    rng: Mutex<SimRng>,
    slowest: u64,
    pub discarded: Mutex<Vec<ByteRange>>,
    /// Longest single write.
    pub longest: Mutex<usize>,
}

impl Memory {
    pub fn new(bytes: Vec<u8>, slowest: u64) -> Arc<Memory> {
        Arc::new(Memory {
            bytes: Mutex::new(bytes),
            rng: Mutex::new(SimRng::new(slowest)),
            slowest,
            discarded: Mutex::default(),
            longest: Mutex::default(),
        })
    }

    pub fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    async fn pause(&self) {
        if self.slowest > 0 {
            let nanos = self.rng.lock().unwrap().below(self.slowest);
            time::sleep(Duration::from_nanos(nanos)).await;
        }
    }
}

struct Shared(Arc<Memory>);

impl Driver for Shared {
    fn size(&self) -> u64 {
        self.0.bytes().len() as u64
    }

    fn read<'a>(&'a self, at: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            let half = buf.len() / 2;
            for (from, to) in [(0, half), (half, buf.len())] {
                self.0.pause().await;
                let at = at as usize;
                buf.copy_from(from, &self.0.bytes()[at + from..at + to]);
            }
            Ok(())
        })
    }

    fn write<'a>(&'a self, at: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            assert!(!flags.fua, "FUA is the runner's business");
            let bytes = buf.to_vec();
            let half = bytes.len() / 2;
            for (from, to) in [(0, half), (half, bytes.len())] {
                self.0.pause().await;
                let at = at as usize;
                self.0.bytes()[at + from..at + to].copy_from_slice(&bytes[from..to]);
            }
            let mut longest = self.0.longest.lock().unwrap();
            *longest = bytes.len().max(*longest);
            Ok(())
        })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        self.0.discarded.lock().unwrap().push(range);
        Box::pin(async { Ok(()) })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async { Ok(()) })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move { Ok(Status::hole(range.len())) })
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        self.0.bytes().resize(size as usize, 0);
        Box::pin(async { Ok(()) })
    }
}

static MEMORY: DriverDef = DriverDef {
    name: "memory",
    kind: Kind::Protocol,
    children: &[],
    open: |_| Box::pin(async { Err::<Opened, _>(Error::unsupported("tests only")) }),
    create: None,
    probe: None,
    check: None,
};

fn edge(label: &str, memory: Option<&Arc<Memory>>) -> Arc<Child> {
    let node = memory
        .map(|m| Node::new(label.into(), &MEMORY, Box::new(Shared(m.clone())) as Box<dyn Driver>));
    Child::new(label, node)
}

/// The options that name the passphrase.
pub fn options() -> Value {
    json!({ "key-secret": "pass" })
}

/// Opens the image in `file` with a passphrase.
pub async fn open_with(
    file: &Arc<Memory>,
    header: Option<&Arc<Memory>>,
    passphrase: &str,
    options: Value,
) -> Result<Arc<Child>> {
    let secrets = Arc::new(Secrets::default());
    secrets.insert("pass", Secret::new(passphrase.as_bytes().to_vec().into()));
    let args = OpenArgs {
        node_name: "luks".into(),
        options,
        common: Common { discard: Discard::Unmap, ..Common::default() },
        children: vec![edge("luks.file", Some(file)), edge("luks.header", header)],
    };
    let driver = open(args, secrets).await?.driver;
    Ok(Child::new("client.root", Some(Node::new("luks".into(), &LUKS, driver))))
}

/// Opens an image of a [`Recipe`] that changed nothing about the passphrase.
pub async fn open_plain(file: &Arc<Memory>) -> Arc<Child> {
    open_with(file, None, "open sesame", options()).await.unwrap()
}

/// Why an image cannot be opened.
pub async fn refusal(bytes: Vec<u8>) -> (ErrorKind, String) {
    match open_with(&Memory::new(bytes, 0), None, "open sesame", options()).await {
        Ok(_) => panic!("it was opened"),
        Err(e) => (e.kind(), e.to_string()),
    }
}

//! Opening, refusals, and data through images that the tests make themselves; what the reference
//! says of them is in `judged`.

mod image;
mod judged;

use gipfel_base::{ByteRange, ErrorKind};
use gipfel_io::sim::World;
use gipfel_io::{Buf, spawn_local};
use gipfel_node::{Ability, Access, Child, Mapping, Perm, Perms, Role, WriteFlags, ZeroFlags};
use gipfel_testkit::{DiskModel, Rng};
use serde_json::json;

use super::{LUKS, header};
use image::{Memory, PAYLOAD, Recipe, SLOT, open_plain, open_with, options, refusal, slot_at};

async fn read(disk: &Child, at: u64, len: usize) -> Vec<u8> {
    let buf = Buf::new(len);
    disk.read(at, buf.clone()).await.unwrap();
    buf.to_vec()
}

async fn write(disk: &Child, at: u64, data: &[u8]) {
    disk.write(at, Buf::from_slice(data), WriteFlags::default()).await.unwrap();
}

fn run<T>(future: impl Future<Output = T>) -> T {
    World::new(1).run(future)
}

#[test]
fn random_requests_match_a_model() {
    let mut rng = Rng::from_env();
    for (cipher, mode, key_len) in [
        ("aes", "xts-plain64", 64),
        ("aes", "cbc-essiv:sha256", 16),
        ("serpent", "ecb", 24),
        ("twofish", "cbc-plain", 32),
    ] {
        let recipe = Recipe { cipher, mode, key_len, ..Recipe::default() };
        let memory = Memory::new(recipe.image(false), 0);
        run(async {
            let disk = open_plain(&memory).await;
            let size = disk.size().await.unwrap();
            assert_eq!(size, 64 << 10);
            let mut model = DiskModel::of(&read(&disk, 0, size as usize).await);
            for _ in 0..300 {
                let at = rng.below(size);
                let most = if rng.one_in(4) { size } else { 2000 };
                let len = rng.between(1, (size - at).min(most));
                match rng.below(3) {
                    0 => {
                        let data = rng.bytes(len as usize);
                        let buf = Buf::from_slice(&data);
                        disk.write(at, buf.clone(), WriteFlags::default()).await.unwrap();
                        assert!(buf.to_vec() == data, "the client's buffer was changed");
                        model.write(at, &data);
                    }
                    1 if rng.one_in(4) => {
                        let range = ByteRange::new(at, len);
                        disk.write_zeroes(range, ZeroFlags::default()).await.unwrap();
                        model.zero(at, len);
                    }
                    _ => model.expect(at, &read(&disk, at, len as usize).await),
                }
            }
            // Nothing of it is in memory alone.
            let again = open_plain(&memory).await;
            model.expect(0, &read(&again, 0, size as usize).await);
        });
    }
}

#[test]
fn neighbours_in_one_sector_do_not_hurt_each_other() {
    let seed = Rng::from_env().seed();
    for (round, slowest) in [(0, 50), (1, 1000), (2, 20)] {
        // In CBC, a change of one byte changes all that follows in its sector.
        let recipe =
            Recipe { mode: "cbc-plain64", key_len: 32, size: 8 << 10, ..Recipe::default() };
        let memory = Memory::new(recipe.image(false), slowest);
        World::new(seed ^ round).run(async {
            let disk = open_plain(&memory).await;
            // Client c owns bytes 100 * c and on, and reads and writes nothing else.
            let clients: Vec<_> = (0..20u64)
                .map(|c| {
                    let disk = disk.clone();
                    let mut rng = Rng::new(seed ^ (round << 32 | c));
                    spawn_local(async move {
                        let (start, end) = (c * 100, c * 100 + 100);
                        let mut own = vec![0; 100];
                        write(&disk, start, &own).await;
                        for _ in 0..60 {
                            let at = rng.between(start, end - 1);
                            let len = rng.between(1, end - at) as usize;
                            let from = (at - start) as usize;
                            let mine = from..from + len;
                            if rng.one_in(2) {
                                let data = rng.bytes(len);
                                write(&disk, at, &data).await;
                                own[mine].copy_from_slice(&data);
                            } else {
                                let got = read(&disk, at, len).await;
                                assert!(got == own[mine], "client {c} at {at}, seed {seed}");
                            }
                        }
                    })
                })
                .collect();
            for c in clients {
                c.await;
            }
        });
    }
}

#[test]
fn long_requests_go_in_pieces() {
    let recipe = Recipe { size: 5 << 20, ..Recipe::default() };
    let memory = Memory::new(recipe.image(false), 0);
    run(async {
        let disk = open_plain(&memory).await;
        let data = Rng::new(3).bytes((5 << 20) - 1000);
        write(&disk, 700, &data).await;
        assert!(read(&disk, 700, data.len()).await == data);
        assert_eq!(*memory.longest.lock().unwrap(), 1 << 20);
    });
}

#[test]
fn a_passphrase_in_any_slot_opens() {
    let slots = vec![(1, "one"), (6, "six"), (7, "")];
    let memory = Memory::new(Recipe { slots, ..Recipe::default() }.image(false), 0);
    run(async {
        for passphrase in ["one", "six", ""] {
            let disk = open_with(&memory, None, passphrase, options()).await.unwrap();
            assert_eq!(disk.size().await.unwrap(), 64 << 10);
        }
        let e = open_with(&memory, None, "two", options()).await.err().unwrap();
        assert_eq!(e.kind(), ErrorKind::PermissionDenied);
        assert!(e.to_string().contains("none of the image's 3 active key slots"), "{e}");
        let e = open_with(&memory, None, "one", json!({})).await.err().unwrap();
        assert!(e.to_string().contains("'key-secret'"), "{e}");
        let e = open_with(&memory, None, "one", json!({ "key-secret": "x" })).await.err().unwrap();
        assert!(e.kind() == ErrorKind::NotFound && e.to_string().contains("'x'"), "{e}");
        let nobody = Recipe { slots: vec![], ..Recipe::default() }.image(false);
        let (kind, text) = refusal(nobody).await;
        assert!(kind == ErrorKind::PermissionDenied && text.contains("no active key slot"));
    });
}

#[test]
fn each_hash_derives_keys() {
    for hash in ["sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160"] {
        let recipe = Recipe { hash, key_len: 32, mode: "cbc-plain64", ..Recipe::default() };
        run(async { open_plain(&Memory::new(recipe.image(false), 0)).await });
    }
}

#[test]
fn a_header_may_stand_elsewhere() {
    let recipe = Recipe::default();
    let header = Memory::new(recipe.image(true), 0);
    let data = Memory::new(vec![0; 10_000], 0);
    run(async {
        let disk = open_with(&data, Some(&header), "open sesame", options()).await.unwrap();
        assert_eq!(disk.size().await.unwrap(), 9728, "whole sectors");
        write(&disk, 0, b"behind").await;
        assert_eq!(read(&disk, 0, 6).await, b"behind");
        // The same as in an image in one piece.
        let mut whole = recipe.image(false);
        let start = whole.len() - (64 << 10);
        whole[start..start + 9728].copy_from_slice(&data.bytes()[..9728]);
        let whole = open_plain(&Memory::new(whole, 0)).await;
        assert_eq!(read(&whole, 0, 6).await, b"behind");
        let info = disk.node().await.unwrap().driver().info().await.unwrap().specific.unwrap();
        assert_eq!(info["data"]["detached-header"], true);
        // Without its data it says what to do.
        let alone = header.bytes().clone();
        let (_, text) = refusal(alone).await;
        assert!(text.contains("'header'"), "{text}");
    });
}

/// Bytes put over a good header, and what is said about it.
fn damages() -> Vec<(usize, Vec<u8>, &'static str)> {
    let n = |v: u32| v.to_be_bytes().to_vec();
    vec![
        (0, b"LUXS".to_vec(), "no LUKS image"),
        (6, vec![0, 0], "no version 0"),
        (6, vec![0, 2], "LUKS version 2"),
        (8, b"aesop\0".to_vec(), "'aesop'"),
        (8, vec![b'x'; 32], "cipher name"),
        (8, b"\xff\xff\0".to_vec(), "cipher name"),
        (40, b"xts-plain128\0".to_vec(), "'xts-plain128'"),
        (40, vec![b'y'; 32], "cipher mode"),
        (72, b"md5\0".to_vec(), "'md5'"),
        (72, vec![b'z'; 32], "hash name"),
        (PAYLOAD, n(0), "'header'"),
        (PAYLOAD, n(1), "within the header"),
        (PAYLOAD, n(4000), "slot 7 ends"),
        (PAYLOAD, n(u32::MAX), "past the end of the image"),
        (108, n(0), "a key of 0 bytes"),
        (108, n(u32::MAX), "does not exist"),
        (108, n(32), "none of the image's 1"),
        (112, n(0), "none of the image's 1"),
        (132, n(0), "none of the image's 1"),
        (164, n(0), "no iterations"),
        (164, n(100_000_000), "rounds of the hash"),
        (164, n(8), "none of the image's 1"),
        (168, vec![b'u'; 40], "UUID"),
        (SLOT, n(1), "its state is 0x1"),
        (SLOT + 4, n(0), "no iterations"),
        (SLOT + 4, n(u32::MAX), "rounds of the hash"),
        (SLOT + 4, n(12), "none of the image's 1"),
        (SLOT + 8, n(0), "none of the image's 1"),
        (SLOT + 40, n(0), "slot 0 lies within the header"),
        (SLOT + 40, n(u32::MAX), "behind the start of the data"),
        (SLOT + 44, n(1), "1 stripes"),
        (SLOT + 44, n(u32::MAX), "4294967295 stripes"),
        (slot_at(3) + 40, n(9), "slots 0 and 3 overlaps"),
        (slot_at(7) + 44, n(0), "slot 7 has 0 stripes"),
    ]
}

#[test]
fn damage_of_each_field_is_told() {
    let good = Recipe::default().image(false);
    run(async {
        for (at, bytes, says) in damages() {
            let mut bad = good.clone();
            bad[at..at + bytes.len()].copy_from_slice(&bytes);
            let (_, text) = refusal(bad).await;
            assert!(text.contains(says), "at {at}: {text}");
        }
        for len in [0, 1, 6, 208, 591, 592, 4096, 4096 + 255_999] {
            let (kind, text) = refusal(good[..len].to_vec()).await;
            let told = text.contains("ends within its header") || text.contains("past the end");
            assert!(kind == ErrorKind::Corrupt && told, "{len}: {text}");
        }
    });
}

#[test]
fn random_damage_never_panics() {
    let mut rng = Rng::from_env();
    let good = Recipe::default().image(false);
    let mut refused = 0;
    for _ in 0..20_000 {
        let mut bad = good[..header::LEN].to_vec();
        for _ in 0..rng.between(1, 3) {
            let at = rng.below(bad.len() as u64) as usize;
            bad[at] = *rng.pick(&[0, 1, 0x7f, 0xff, bad[at] ^ 0x80]);
        }
        refused += u32::from(header::Header::parse(&bad, rng.one_in(2)).is_err());
    }
    assert!((5_000..20_000).contains(&refused), "{refused} were refused");
}

#[test]
fn what_a_node_does_with_the_rest() {
    let memory = Memory::new(Recipe::default().image(false), 0);
    run(async {
        let disk = open_plain(&memory).await;
        let node = disk.node().await.unwrap();
        let driver = node.driver();
        let all = ByteRange::new(0, 64 << 10);
        let s = driver.status(all).await.unwrap();
        assert!(s.data && s.allocated && !s.zero && s.at.is_none() && s.len == all.len());
        assert!(!driver.grows() && !driver.reads_zero_when_new());
        assert_eq!((driver.zero_ability(), driver.limits().align), (Ability::Emulated, 512));
        assert!(matches!(driver.map(Access::Read, all), Mapping::Work { len } if len == all.len()));
        // Discards go down as whole sectors, while the options say so.
        disk.discard(ByteRange::new(100, 2000)).await.unwrap();
        disk.discard(ByteRange::new(100, 600)).await.unwrap();
        let start = memory.bytes().len() as u64 - all.len();
        let seen = || std::mem::take(&mut *memory.discarded.lock().unwrap());
        assert_eq!(seen(), [ByteRange::new(start + 512, 1536)]);
        let ignore = json!({ "key-secret": "pass", "discard": "ignore" });
        driver.reopen(ignore, false).await.unwrap().commit();
        disk.discard(all).await.unwrap();
        assert!(seen().is_empty());
        assert!(driver.reopen(json!({ "key-secret": "other" }), false).await.is_err());
        // The file follows a new size.
        driver.resize(1 << 20).await.unwrap();
        assert_eq!(memory.bytes().len() as u64, start + (1 << 20));
        assert_eq!(disk.size().await.unwrap(), 1 << 20);
        for bad in [1000, u64::MAX - 511] {
            assert!(driver.resize(bad).await.is_err());
        }
        let flags = ZeroFlags { no_fallback: true, ..ZeroFlags::default() };
        let e = disk.write_zeroes(all, flags).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Unsupported);
        // The header is never written.
        let above = Perms { used: Perm::CONSISTENT_READ | Perm::WRITE, shared: Perm::ALL };
        let used = |i| driver.child_perms(i, Role::Image, above, true).used;
        assert!(used(0).contains(Perm::WRITE) && !used(1).contains(Perm::WRITE));
    });
}

#[test]
fn an_image_is_recognised() {
    let sure = |image: &[u8]| (LUKS.probe.unwrap())(image);
    let mut image = Recipe::default().image(false);
    assert_eq!((sure(&image), sure(&image[..7]), sure(&[0; 512])), (100, 0, 0));
    image[7] = 2;
    assert_eq!(sure(&image), 0);
}

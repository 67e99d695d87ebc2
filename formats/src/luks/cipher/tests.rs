//! Modes and ciphers against published vectors and against themselves.

use gipfel_testkit::Rng;

use super::*;

fn hex(s: &str) -> Vec<u8> {
    let digits: Vec<u8> = s.bytes().map(|c| char::from(c).to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|d| d[0] << 4 | d[1]).collect()
}

/// Everything that is offered.
fn all() -> Vec<(String, String, u32)> {
    let mut found = Vec::new();
    for (name, _) in ALGORITHMS {
        for (chain, _) in CHAININGS {
            for iv in ["plain", "plain64", "plain64:sha256", "essiv:sha256"] {
                for bits in [128, 192, 256] {
                    let keys = if chain == "xts" { 2 } else { 1 };
                    found.push((name.into(), format!("{chain}-{iv}"), bits / 8 * keys));
                }
            }
        }
    }
    found
}

#[test]
fn xts_as_in_ieee_1619() {
    // Vector 4: data unit 0, bytes that count up.
    let key = hex("2718281828459045235360287471352631415926535897932384626433832795");
    let mut data: Vec<u8> = (0..512).map(|i| i as u8).collect();
    let clear = data.clone();
    let spec = Spec::parse("aes", "xts-plain64", 32).unwrap();
    let cipher = spec.keyed(&key).unwrap();
    cipher.encrypt(0, &mut data);
    let wanted = hex("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c\
         c78cf7f5e543445f8333d8fa7f56000005279fa5d8b5e4ad40e736ddb4d35412");
    assert_eq!(data[..64], wanted);
    cipher.decrypt(0, &mut data);
    assert_eq!(data, clear);
}

#[test]
fn cbc_as_in_nist_sp_800_38a() {
    // F.2.5: its vector is no sector's number, but the first block shows it: encrypting
    // (block xor vector) with vector 0 is the same.
    let key = hex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4");
    let mut data = vec![0; 512];
    data[..32]
        .copy_from_slice(&hex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"));
    data[..16].iter_mut().enumerate().for_each(|(i, b)| *b ^= i as u8);
    let cipher = Spec::parse("aes", "cbc-plain", 32).unwrap().keyed(&key).unwrap();
    cipher.encrypt(0, &mut data);
    let wanted = hex("f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d");
    assert_eq!(data[..32], wanted);
}

#[test]
fn whole_disks_and_single_sectors_agree() {
    let mut rng = Rng::from_env();
    for (name, mode, len) in all() {
        let spec = Spec::parse(&name, &mode, len).unwrap();
        let cipher = spec.keyed(&rng.bytes(len as usize)).unwrap();
        // Across the end of 32 bits, and with bytes that are no whole sector.
        let first = (1 << 32) - 3;
        let clear = rng.bytes(19 * 512 + 100);
        let mut data = clear.clone();
        cipher.encrypt(first, &mut data);
        let mut single = clear.clone();
        for (i, s) in single.chunks_mut(512).enumerate() {
            cipher.encrypt(first + i as u64, s);
        }
        assert!(data == single, "{name}-{mode}");
        assert_eq!(data[19 * 512..], clear[19 * 512..]);
        assert!(data[..19 * 512].chunks(512).zip(clear.chunks(512)).all(|(a, b)| a != b));
        cipher.decrypt(first, &mut data);
        assert!(data == clear, "{name}-{mode}");
        // What stands in a sector depends on where it is, but for ecb; and plain wraps.
        let (mut a, mut b) = (clear[..512].to_vec(), clear[..512].to_vec());
        cipher.encrypt(1, &mut a);
        cipher.encrypt((1 << 32) + 1, &mut b);
        let wraps = mode.starts_with("ecb") || mode.ends_with("plain");
        assert_eq!(a == b, wraps, "{name}-{mode}");
    }
}

#[test]
fn what_is_not_offered_is_named() {
    for (name, mode, len) in [
        ("cast5", "cbc-plain64", 16),
        ("aes", "ctr-plain64", 32),
        ("aes", "xts", 64),
        ("aes", "xts-benbi", 64),
        ("aes", "xts-plain64", 0),
        ("aes", "xts-plain64", 33),
        ("aes", "xts-plain64", 512),
        ("aes", "cbc-plain64", 64),
        ("aes", "cbc-plain64", u32::MAX),
        ("aes", "cbc-essiv:sha1", 32),
        ("aes", "cbc-essiv", 32),
        ("aes", "cbc-essiv:md5", 32),
        ("", "", 16),
    ] {
        let e = Spec::parse(name, mode, len).unwrap_err().to_string();
        let named = e.contains(&format!("'{name}' in mode '{mode}'")) || e.contains("hash '");
        assert!(named, "{e}");
    }
    assert!(Spec::parse("aes", "ecb", 32).is_ok());
}

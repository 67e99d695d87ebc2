//! Units of size, in bytes, and how people write and read them.

use crate::{Error, Result};

/// 1024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1024 KiB.
pub const MIB: u64 = 1 << 20;
/// 1024 MiB.
pub const GIB: u64 = 1 << 30;
/// 1024 GiB.
pub const TIB: u64 = 1 << 40;
/// The unit of old interfaces: 512 bytes.
pub const SECTOR: u64 = 512;

/// Reads a size as the image tools write it: a number, with an optional fraction, and an optional
/// suffix `b k K M G T P E` (powers of 1024); hexadecimal with `0x` and no suffix.
///
/// ```
/// use gipfel_base::units::parse_size;
/// assert_eq!(parse_size("64k").unwrap(), 65536);
/// assert_eq!(parse_size("1.5G").unwrap(), 3 << 29);
/// assert!(parse_size("-1").is_err());
/// ```
pub fn parse_size(text: &str) -> Result<u64> {
    let bad = || {
        Error::invalid(format!(
            "'{text}' is not a size: write a number of bytes, \
             or one with a suffix k, M, G, T, P or E"
        ))
    };
    let large =
        || Error::invalid(format!("size '{text}' is too large: sizes end at 2^64 - 1 bytes"));
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        return u64::from_str_radix(hex, 16).map_err(|_| large());
    }
    let (number, shift) = match text.bytes().last().ok_or_else(bad)? {
        b'b' | b'B' => (&text[..text.len() - 1], 0),
        b'k' | b'K' => (&text[..text.len() - 1], 10),
        b'm' | b'M' => (&text[..text.len() - 1], 20),
        b'g' | b'G' => (&text[..text.len() - 1], 30),
        b't' | b'T' => (&text[..text.len() - 1], 40),
        b'p' | b'P' => (&text[..text.len() - 1], 50),
        b'e' | b'E' => (&text[..text.len() - 1], 60),
        _ => (text, 0),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || fraction.len() > 18 {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| large())?;
    let mut bytes = (whole as u128) << shift;
    if !fraction.is_empty() {
        if shift == 0 {
            return Err(bad());
        }
        let f: u128 = fraction.parse().map_err(|_| bad())?;
        bytes += (f << shift) / 10u128.pow(fraction.len() as u32);
    }
    u64::try_from(bytes).map_err(|_| large())
}

/// Writes a size for people: `512 B`, `1.5 GiB`, three significant digits.
pub fn human_size(bytes: u64) -> String {
    const NAMES: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut v = bytes as f64;
    let mut i = 0;
    while v >= 1000.0 && i < NAMES.len() - 1 {
        v /= 1024.0;
        i += 1;
    }
    if i == 0 {
        return format!("{bytes} B");
    }
    let decimals = if v >= 100.0 {
        0
    } else if v >= 10.0 {
        1
    } else if v >= 1.0 {
        2
    } else {
        3
    };
    let s = format!("{v:.decimals$}");
    let s = if s.contains('.') { s.trim_end_matches('0').trim_end_matches('.') } else { &s };
    format!("{s} {}", NAMES[i])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("0").unwrap(), 0);
        assert_eq!(parse_size("0x1f").unwrap(), 31);
        assert!(parse_size("16E").unwrap_err().to_string().contains("too large"));
        for bad in ["", "k", "1.5", "1kk", "0x", "1e3", " 1", "+1", ".5G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(human_size(1 << 30), "1 GiB");
        assert_eq!(human_size(3 << 29), "1.5 GiB");
        assert_eq!(human_size(511), "511 B");
        assert_eq!(human_size(1000), "0.977 KiB");
    }
}

//! Objects of type `secret` (SecretProperties of the QMP reference): passphrases and keys, given
//! as they are or encrypted under another secret.
//!
//! What a secret says is known to [`Secrets`] alone; here is what may be told of it.

use std::fs::File;
use std::io::Read;

use aes::Aes256;
use aes::cipher::{Array, BlockCipherDecrypt, KeyInit};
use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_node::{Secret, Secrets};
use serde_json::{Map, Value, json};
use zeroize::Zeroizing;

type Bytes = Zeroizing<Vec<u8>>;

/// Longest secret, as it is given, in bytes.
const MAX_SECRET: u64 = 1 << 20;
/// Block of the cipher, in bytes.
const BLOCK: usize = 16;
/// Key of the cipher, in bytes.
const KEY: usize = 32;

/// How a secret is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Raw,
    Base64,
}

/// What may be told of a secret.
pub struct Facts {
    format: Format,
    file: Option<String>,
    key_id: Option<String>,
    iv: Option<String>,
}

impl Facts {
    /// The properties and their types.
    pub const TYPES: [(&str, &str); 5] = [
        ("iv", "string"),
        ("keyid", "string"),
        ("format", "QCryptoSecretFormat"),
        ("file", "string"),
        ("data", "string"),
    ];

    /// The value of a property.
    pub fn get(&self, property: &str) -> Result<Value> {
        let text = |s: &Option<String>| Ok(json!(s.as_deref().unwrap_or_default()));
        match property {
            "iv" => text(&self.iv),
            "keyid" => text(&self.key_id),
            "file" => text(&self.file),
            "format" if self.format == Format::Raw => Ok(json!("raw")),
            "format" => Ok(json!("base64")),
            "data" => {
                let text = "what a secret says is told to nobody";
                Err(Error::new(ErrorKind::PermissionDenied, text))
            }
            _ => Err(Error::invalid(format!("there is no property '{property}'"))),
        }
    }
}

/// Makes a secret of its properties; one that is encrypted, with the key that is among `known`.
pub fn make(mut options: Map<String, Value>, known: &Secrets) -> Result<(Facts, Secret)> {
    let mut take = |key: &str| match options.remove(key) {
        Some(Value::String(s)) => Some(s),
        _ => None,
    };
    let format = match take("format").as_deref() {
        Some("base64") => Format::Base64,
        _ => Format::Raw,
    };
    let (data, file) = (take("data").map(String::into_bytes).map(Zeroizing::new), take("file"));
    let (key_id, iv) = (take("keyid"), take("iv"));
    let given = match (data, &file) {
        (Some(d), None) => d,
        (None, Some(f)) => read(f).at(|| format!("file '{f}'"))?,
        _ => return Err(Error::invalid("give either 'data' or 'file'")),
    };
    if given.len() as u64 > MAX_SECRET {
        let text = format!("it is longer than {MAX_SECRET} bytes");
        return Err(Error::new(ErrorKind::Limit, text));
    }
    let decode = |bytes: &[u8]| match format {
        Format::Raw => Ok(Zeroizing::new(bytes.to_vec())),
        Format::Base64 => base64(bytes).ok_or_else(|| Error::invalid("it is not valid base64")),
    };
    let bytes = match (&key_id, &iv) {
        (None, _) => decode(&given)?,
        (Some(id), Some(iv)) => {
            let key = known.get(id).at(|| "property 'keyid'")?;
            let iv = base64(iv.as_bytes())
                .ok_or_else(|| Error::invalid("property 'iv' is not valid base64"))?;
            decrypt(key.bytes(), &iv, decode(&given)?)?
        }
        (Some(_), None) => {
            return Err(Error::invalid("with 'keyid' goes 'iv', the initialization vector"));
        }
    };
    Ok((Facts { format, file, key_id, iv }, Secret::new(bytes)))
}

fn read(path: &str) -> Result<Bytes> {
    let file = File::open(path)?;
    let size = file.metadata()?.len().min(MAX_SECRET) as usize;
    let mut bytes = Zeroizing::new(Vec::with_capacity(size + 1));
    file.take(MAX_SECRET + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The bytes that base64 stands for (RFC 4648, section 4). Ends of lines are passed over, and
/// padding may be missing.
fn base64(text: &[u8]) -> Option<Bytes> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len() / 4 * 3 + 3));
    let (mut word, mut bits, mut padding) = (0u32, 0, 0);
    for c in text.iter().filter(|c| !matches!(c, b'\n' | b'\r')) {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' if padding < 2 => {
                padding += 1;
                continue;
            }
            _ => return None,
        };
        if padding > 0 {
            return None;
        }
        word = word << 6 | u32::from(value);
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((word >> bits) as u8);
        }
    }
    // Six bits that are left over belong to no byte.
    (bits < 6).then_some(bytes)
}

/// AES-256-CBC, padded as PKCS #7 has it (RFC 5652, 6.3).
fn decrypt(key: &[u8], iv: &[u8], mut bytes: Bytes) -> Result<Bytes> {
    if key.len() != KEY {
        let n = key.len();
        let text = format!("the secret that 'keyid' names has {n} bytes, and a key has {KEY}");
        return Err(Error::invalid(text));
    }
    let cipher = Aes256::new_from_slice(key).map_err(|e| Error::invalid(e.to_string()))?;
    let Ok(mut last) = <[u8; BLOCK]>::try_from(iv) else {
        let text = format!("'iv' has {} bytes, and it must have {BLOCK}", iv.len());
        return Err(Error::invalid(text));
    };
    if !bytes.len().is_multiple_of(BLOCK) {
        let text = format!("{} encrypted bytes are no whole blocks of {BLOCK}", bytes.len());
        return Err(Error::invalid(text));
    }
    for block in Array::slice_as_chunks_mut(&mut bytes).0 {
        let stored: [u8; BLOCK] = (*block).into();
        cipher.decrypt_block(block);
        block.iter_mut().zip(last).for_each(|(b, l)| *b ^= l);
        last = stored;
    }
    let Some(padding) = bytes.last().map(|b| usize::from(*b)) else { return Ok(bytes) };
    let data = bytes.len() - padding.min(bytes.len());
    let right =
        (1..=BLOCK).contains(&padding) && bytes[data..].iter().all(|b| usize::from(*b) == padding);
    if !right {
        let text = "decrypted with the secret that 'keyid' names, it does not end in padding: key, \
                    'iv' or data are wrong";
        return Err(Error::invalid(text));
    }
    bytes.truncate(data);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn properties(v: Value) -> Map<String, Value> {
        v.as_object().unwrap().clone()
    }

    fn text(v: Value, known: &Secrets) -> Result<Vec<u8>> {
        make(properties(v), known).map(|(_, s)| s.bytes().to_vec())
    }

    #[test]
    fn base64_as_it_is_written() {
        for (code, bytes) in [
            ("", Some(&b""[..])),
            ("aGVsbG8=", Some(b"hello")),
            ("aGVs\nbG8=\n", Some(b"hello")),
            ("aGVsbG8", Some(b"hello")),
            ("+/+/", Some(&[0xfb, 0xff, 0xbf])),
            ("aGVs bG8=", None),
            ("aGVsbG8=a", None),
            ("aGVsb", None),
            ("aG==\u{e4}", None),
        ] {
            let found = base64(code.as_bytes());
            assert_eq!(found.as_ref().map(|b| &b[..]), bytes, "'{code}'");
        }
    }

    #[test]
    fn a_secret_under_another_one() {
        let known = Secrets::default();
        let key = b"01234567890123456789012345678901".to_vec();
        known.insert("key", Secret::new(key.into()));
        known.insert("short", Secret::new(b"short".to_vec().into()));
        // openssl enc -aes-256-cbc -K 3031...31 -iv 00..0f -base64, of 'letmein'.
        let good = json!({
            "data": ENCRYPTED, "format": "base64", "keyid": "key",
            "iv": "AAECAwQFBgcICQoLDA0ODw==",
        });
        assert_eq!(text(good.clone(), &known).unwrap(), b"letmein");
        for (member, value, says) in [
            ("iv", "AAECAwQFBgcICQoLDA0ODg==", ""),
            ("iv", "AAEC", "3 bytes"),
            ("iv", "?", "'iv'"),
            ("keyid", "nobody", "'nobody'"),
            ("keyid", "short", "5 bytes"),
            ("data", "AAAA", "3 encrypted bytes"),
            ("data", "AAAAAAAAAAAAAAAAAAAAAA==", "padding"),
        ] {
            let mut bad = good.clone();
            bad[member] = json!(value);
            match text(bad, &known) {
                // Another vector gives other bytes of the first block.
                Ok(b) => assert!(says.is_empty() && b != b"letmein"),
                Err(e) => assert!(e.to_string().contains(says), "{e}"),
            }
        }
        let mut no_iv = properties(good);
        no_iv.remove("iv");
        assert!(make(no_iv, &known).err().unwrap().to_string().contains("'iv'"));
    }

    #[test]
    fn where_a_secret_comes_from() {
        let known = Secrets::default();
        assert_eq!(text(json!({ "data": "abc\n" }), &known).unwrap(), b"abc\n");
        assert_eq!(text(json!({ "data": "" }), &known).unwrap(), b"");
        for neither in [json!({}), json!({ "data": "a", "file": "b" })] {
            assert!(text(neither, &known).unwrap_err().to_string().contains("either"));
        }
        let gone = text(json!({ "file": "/nowhere/at/all" }), &known).unwrap_err();
        assert!(gone.to_string().contains("'/nowhere/at/all'"), "{gone}");
        let endless = text(json!({ "file": "/dev/zero" }), &known).unwrap_err();
        assert_eq!(endless.kind(), ErrorKind::Limit);
        let (facts, _) = make(properties(json!({ "data": "abc" })), &known).unwrap();
        assert!(facts.get("data").is_err());
        assert_eq!(facts.get("format").unwrap(), "raw");
    }

    const ENCRYPTED: &str = "n70WYuIs6wBHMMpROF+Omg==";
}

//! JSON as the monitor reads and writes it: strict about what a message means, lenient in quotes.
//!
//! Reading accepts RFC 8259 and, as the reference daemon does, strings in single quotes. Beyond
//! `serde_json` it refuses an object that has a key twice and nesting past [`MAX_DEPTH`].
//! Writing puts one space after `,` and `:` and keeps to ASCII (RFC 8259 section 8.1 would allow
//! UTF-8), since scripts for the reference daemon compare lines as text.

use std::fmt;
use std::io::{self, Write};

use gipfel_base::{Error, Result};
use serde::Serialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::ser::{Formatter, PrettyFormatter};
use serde_json::{Map, Number, Value};

use crate::lexer::{Frame, Lexer};
use crate::limits::MAX_DEPTH;

/// Reads exactly one JSON value, with the monitor's rules.
///
/// # Errors
/// The text is not one JSON value, has a key twice, or passes a limit.
pub fn parse(text: &str) -> Result<Value> {
    let mut lexer = Lexer::new();
    let mut input = text.as_bytes();
    let first = match lexer.next_frame(&mut input) {
        Some(frame) => frame,
        None => lexer.finish().ok_or_else(|| Error::invalid("the JSON text is empty"))?,
    };
    let message = match first {
        Frame::Message(bytes) => bytes,
        Frame::Broken(why) => return Err(Error::invalid(why)),
    };
    let value = parse_frame(&message)?;
    if lexer.next_frame(&mut input).is_some() || lexer.finish().is_some() {
        return Err(Error::invalid("more text follows the JSON value: give one value only"));
    }
    Ok(value)
}

/// Reads one framed message whose quotes are normalised.
pub(crate) fn parse_frame(bytes: &[u8]) -> Result<Value> {
    let mut de = serde_json::Deserializer::from_slice(bytes);
    de.disable_recursion_limit();
    let parsed = Seed { depth: 0 }.deserialize(&mut de).and_then(|v| de.end().map(|()| v));
    parsed.map_err(|e| Error::invalid(format!("this is not valid JSON: {e}")))
}

/// Writes a value on one line, in ASCII.
pub fn to_line(value: &Value) -> String {
    write(value, Spaced)
}

/// Writes a value over several lines for people, in ASCII; the lines end in CR LF.
pub fn to_pretty(value: &Value) -> String {
    // A line end inside a string is escaped, so every other one is the formatter's.
    write(value, Indented(PrettyFormatter::with_indent(b"    "))).replace('\n', "\r\n")
}

fn write(value: &Value, formatter: impl Formatter) -> String {
    let mut out = Vec::with_capacity(128);
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    // Writing a Value to a Vec has no way to fail; an empty line would be the visible sign.
    if value.serialize(&mut serializer).is_err() {
        out.clear();
    }
    String::from_utf8(out).unwrap_or_default()
}

/// Builds a [`Value`] while watching depth and duplicate keys.
#[derive(Clone, Copy)]
struct Seed {
    depth: usize,
}

impl Seed {
    fn deeper<E: serde::de::Error>(self) -> std::result::Result<Seed, E> {
        if self.depth == MAX_DEPTH {
            return Err(E::custom(format!("nesting is deeper than {MAX_DEPTH} levels")));
        }
        Ok(Seed { depth: self.depth + 1 })
    }
}

impl<'de> DeserializeSeed<'de> for Seed {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_bool<E>(self, v: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }
    fn visit_u64<E>(self, v: u64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }
    fn visit_f64<E: serde::de::Error>(self, v: f64) -> std::result::Result<Value, E> {
        // "-0" arrives here as a float; it is the integer 0 to everyone else.
        if v == 0.0 && v.is_sign_negative() {
            return Ok(0.into());
        }
        Number::from_f64(v).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }
    fn visit_str<E>(self, v: &str) -> std::result::Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }
    fn visit_string<E>(self, v: String) -> std::result::Result<Value, E> {
        Ok(Value::String(v))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let seed = self.deeper()?;
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(seed)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let seed = self.deeper()?;
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format!("key '{key}' stands twice in one object")));
            }
            let value = map.next_value_seed(seed)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// One line, a space after `,` and `:`, everything beyond ASCII as `\uXXXX`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
    fn write_string_fragment<W: ?Sized + Write>(&mut self, w: &mut W, s: &str) -> io::Result<()> {
        ascii(w, s)
    }
}

/// Indented, everything beyond ASCII as `\uXXXX`.
struct Indented(PrettyFormatter<'static>);

impl Formatter for Indented {
    fn begin_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_array(w)
    }
    fn end_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        // As if there had been one: an empty list takes two lines in the reference, too.
        self.0.end_array_value(w)?;
        self.0.end_array(w)
    }
    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(w, first)
    }
    fn end_array_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_array_value(w)
    }
    fn begin_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object(w)
    }
    fn end_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object_value(w)?;
        self.0.end_object(w)
    }
    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(w, first)
    }
    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object_value(w)
    }
    fn end_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object_value(w)
    }
    fn write_string_fragment<W: ?Sized + Write>(&mut self, w: &mut W, s: &str) -> io::Result<()> {
        ascii(w, s)
    }
}

fn ascii<W: ?Sized + Write>(w: &mut W, s: &str) -> io::Result<()> {
    if s.is_ascii() {
        return w.write_all(s.as_bytes());
    }
    let mut units = [0u16; 2];
    for c in s.chars() {
        if c.is_ascii() {
            w.write_all(&[c as u8])?;
        } else {
            for unit in c.encode_utf16(&mut units) {
                write!(w, "\\u{unit:04X}")?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_what_the_protocol_allows() {
        let ok = [
            ("{'a':'b'}", json!({"a": "b"})),
            (r#"'a"b\'c'"#, json!("a\"b'c")),
            (r#""it\'s""#, json!("it's")),
            (" [1, -0, 1e2, 18446744073709551615] ", json!([1, 0, 100.0, u64::MAX])),
            ("18446744073709551616", json!(18446744073709551616f64)),
            (r#""\ud83d\ude00\u0000\/""#, json!("\u{1F600}\0/")),
            ("null", json!(null)),
        ];
        for (text, want) in ok {
            assert_eq!(parse(text).unwrap(), want, "{text}");
        }
    }

    #[test]
    fn refuses_what_it_should() {
        let cases = [
            ("", "empty"),
            ("{'a':1,'a':2}", "'a' stands twice"),
            ("{} {}", "more text"),
            ("{} x", "more text"),
            ("[1,]", "not valid JSON"),
            ("01", "not valid JSON"),
            ("1e400", "out of range"),
            (r#""\ud83d""#, "not valid JSON"),
            (r#""\x""#, "not valid JSON"),
            ("\"a\tb\"", "control character"),
            ("nul", "not valid JSON"),
            ("{", "ends before"),
            ("'a", "ends before"),
        ];
        for (text, want) in cases {
            let e = parse(text).unwrap_err().to_string();
            assert!(e.contains(want), "{text}: {e}");
        }
        let deep = |n| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(parse(&deep(MAX_DEPTH)).is_ok());
        assert!(parse(&deep(MAX_DEPTH + 1)).unwrap_err().to_string().contains("1024"));
        assert!(parse_frame(deep(MAX_DEPTH + 1).as_bytes()).is_err());
    }

    #[test]
    fn writes_ascii_lines() {
        let v = json!({"a": [1, "\u{e9}\u{1F600}\n\"", {}], "b": []});
        assert_eq!(to_line(&v), r#"{"a": [1, "\u00E9\uD83D\uDE00\n\"", {}], "b": []}"#);
        assert_eq!(parse(&to_line(&v)).unwrap(), v);
        assert_eq!(
            to_pretty(&json!({"\u{e9}": [1]})),
            "{\r\n    \"\\u00E9\": [\r\n        1\r\n    ]\r\n}"
        );
        assert_eq!(to_pretty(&json!([{}, []])).lines().collect::<Vec<_>>().join("|"), {
            "[|    {|    },|    [|    ]|]"
        });
        assert_eq!(parse(&to_pretty(&v)).unwrap(), v);
    }
}

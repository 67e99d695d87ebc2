//! The words of a command: its name, its options as getopt(3) takes them, its numbers.

use gipfel_base::units::parse_size;
use gipfel_base::{Error, Result};

use super::commands::{self, Def};

/// A command as it was written.
pub struct Call<'a> {
    /// Which one it is.
    pub def: &'static Def,
    options: Vec<(char, &'a str)>,
    /// What is no option.
    pub args: Vec<&'a str>,
}

impl<'a> Call<'a> {
    /// Reads a line; `None` where it is empty. Words are separated by spaces, nothing is quoted.
    pub fn read(line: &'a str) -> Result<Option<Call<'a>>> {
        let mut words = line.split(' ').filter(|w| !w.is_empty());
        let Some(name) = words.next() else { return Ok(None) };
        let def = commands::find(name)?;
        let mut call = Call { def, options: Vec::new(), args: Vec::new() };
        let (least, most) = def.count;
        let mut ended = def.options.is_empty();
        while let Some(word) = words.next() {
            match word.strip_prefix('-').filter(|letters| !ended && !letters.is_empty()) {
                Some("-") => ended = true,
                Some(letters) => call.options(letters, &mut words)?,
                None => call.args.push(word),
            }
            if call.args.len() > most {
                return Err(def.usage_error("there are too many arguments"));
            }
        }
        if call.args.len() < least {
            return Err(def.usage_error("an argument is missing"));
        }
        Ok(Some(call))
    }

    /// Takes a word of option letters apart; `rest` has the value of the last one, if it needs one.
    fn options(
        &mut self,
        letters: &'a str,
        rest: &mut impl Iterator<Item = &'a str>,
    ) -> Result<()> {
        for (at, letter) in letters.char_indices() {
            let known = self.def.options.iter().find(|o| o.letter == letter);
            let option = known
                .ok_or_else(|| self.def.usage_error(&format!("there is no option -{letter}")))?;
            if option.value.is_none() {
                self.options.push((letter, ""));
                continue;
            }
            let value = match &letters[at + letter.len_utf8()..] {
                "" => rest.next().ok_or_else(|| {
                    self.def.usage_error(&format!("option -{letter} needs a value"))
                })?,
                value => value,
            };
            self.options.push((letter, value));
            return Ok(());
        }
        Ok(())
    }

    /// Whether an option was given.
    pub fn has(&self, letter: char) -> bool {
        self.options.iter().any(|o| o.0 == letter)
    }

    /// The value of an option; the last one counts.
    pub fn value(&self, letter: char) -> Option<&'a str> {
        self.options.iter().rev().find(|o| o.0 == letter).map(|o| o.1)
    }

    /// All values of an option.
    pub fn values(&self, letter: char) -> impl Iterator<Item = &'a str> {
        self.options.iter().filter(move |o| o.0 == letter).map(|o| o.1)
    }
}

/// An offset or length in bytes, as [`parse_size`] reads them; a sign and a bare fraction are
/// allowed too.
pub fn bytes(text: &str) -> Result<u64> {
    let plain = text.strip_prefix('+').unwrap_or(text);
    let size = match plain.starts_with('.') {
        true => parse_size(&format!("0{plain}")),
        false => parse_size(plain),
    };
    let size = size.map_err(|_| {
        Error::invalid(format!(
            "'{text}' is no number of bytes: write one such as 512, 64k, 1.5M or 0x200"
        ))
    })?;
    match size <= i64::MAX as u64 {
        true => Ok(size),
        false => Err(Error::invalid(format!("'{text}' is more than any disk has: 2^63 - 1 bytes"))),
    }
}

/// A plain number: decimal, hexadecimal after `0x`, octal after `0`.
pub fn number(text: &str) -> Result<u64> {
    let lower = text.to_ascii_lowercase();
    let (digits, radix) = match lower.strip_prefix("0x") {
        Some(hex) => (hex, 16),
        None if lower.starts_with('0') && lower.len() > 1 => (&lower[1..], 8),
        None => (&*lower, 10),
    };
    let plain = Some(digits).filter(|d| d.starts_with(|c: char| c.is_digit(radix)));
    plain
        .and_then(|d| u64::from_str_radix(d, radix).ok())
        .ok_or_else(|| Error::invalid(format!("'{text}' is not a number")))
}

/// A byte that buffers are filled with or compared with.
pub fn pattern(text: &str) -> Result<u8> {
    let byte = number(text).ok().and_then(|n| u8::try_from(n).ok());
    byte.ok_or_else(|| Error::invalid(format!("pattern '{text}' is not a byte: 0 to 255, or 0xff")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(line: &str) -> Call<'_> {
        Call::read(line).unwrap().unwrap()
    }

    #[test]
    fn options_stand_anywhere_and_together() {
        let c = call("read -qvP 0x1f 1k  512 -C");
        assert!(c.has('q') && c.has('v') && c.has('C') && !c.has('b'));
        assert_eq!((c.value('P'), &c.args[..]), (Some("0x1f"), &["1k", "512"][..]));
        assert_eq!(call("r -P7 -P8 0 1").value('P'), Some("8"));
        assert_eq!(call("open -o a -o b").values('o').collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(call("read -- -1 5").args, ["-1", "5"]);
        // A command without options takes its words as they are.
        assert_eq!(call("alloc -1").args, ["-1"]);
        assert!(Call::read("   ").unwrap().is_none());
    }

    #[test]
    fn mistakes_are_told() {
        for (line, told) in [
            ("reed 0 1", "did you mean 'read'"),
            ("xyzzy", "no command 'xyzzy'"),
            ("read 0", "an argument is missing"),
            ("read 0 1 2", "too many arguments"),
            ("read -x 0 1", "no option -x"),
            ("read 0 1 -P", "option -P needs a value"),
        ] {
            let e = Call::read(line).err().expect(line).to_string();
            assert!(e.contains(told), "{line}: {e}");
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(bytes("1.5k").unwrap(), 1536);
        assert_eq!(bytes(".5k").unwrap(), 512);
        assert_eq!(bytes("+0x10").unwrap(), 16);
        assert!(bytes("-1").is_err() && bytes("8E").is_err() && bytes("").is_err());
        assert_eq!(number("010").unwrap(), 8);
        assert_eq!(number("0").unwrap(), 0);
        assert!(number("0x").is_err() && number("08").is_err() && number("0x+1").is_err());
        assert_eq!(pattern("0xFF").unwrap(), 255);
        assert!(pattern("256").is_err() && pattern("-1").is_err());
    }
}

//! The file of rules (docs/devel/testing/blkdebug of QEMU's documentation): sections
//! `[inject-error]` and `[set-state]`, a rule each, with lines `key = "value"`. Lines that begin
//! with `#` are comments. Pure: from text to rules.

use gipfel_base::{Error, Result, ResultExt};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::rules::{InjectError, SetState};

/// The rules of a file.
#[derive(Default)]
pub(super) struct Config {
    pub(super) injects: Vec<InjectError>,
    pub(super) changes: Vec<SetState>,
}

/// A section while it is being read.
struct Section {
    line: usize,
    name: &'static str,
    members: Map<String, Value>,
}

impl Section {
    fn new(line: usize, head: &str) -> Result<Section> {
        // A name may follow the word; the reference takes one and does nothing with it.
        let word = head.split_whitespace().next().unwrap_or_default();
        let name =
            ["inject-error", "set-state"].into_iter().find(|n| *n == word).ok_or_else(|| {
                Error::invalid(format!(
                    "section '{head}' is neither 'inject-error' nor 'set-state'"
                ))
            })?;
        Ok(Section { line, name, members: Map::new() })
    }

    fn add(&mut self, key: &str, text: &str) -> Result<()> {
        let value = match (self.name, key) {
            (_, "event") | ("inject-error", "iotype") => text.into(),
            (_, "state") | ("inject-error", "errno" | "sector") | ("set-state", "new_state") => {
                number(text).at(|| format!("'{key}'"))?.into()
            }
            ("inject-error", "once" | "immediately") => {
                switch(text).at(|| format!("'{key}'"))?.into()
            }
            _ => {
                let text = format!("there is no '{key}' in section '{}'", self.name);
                return Err(Error::invalid(text));
            }
        };
        // The last one counts.
        self.members.insert(key.to_owned(), value);
        Ok(())
    }

    fn rule<T: DeserializeOwned>(members: Map<String, Value>) -> Result<T> {
        serde_json::from_value(Value::Object(members)).map_err(|e| Error::invalid(e.to_string()))
    }

    /// Adds the rule to `all`.
    fn end(self, all: &mut Config) -> Result<()> {
        if self.name == "inject-error" {
            let rule: InjectError = Self::rule(self.members)?;
            rule.check()?;
            all.injects.push(rule);
        } else {
            let rule: SetState = Self::rule(self.members)?;
            rule.check()?;
            all.changes.push(rule);
        }
        Ok(())
    }
}

fn number(text: &str) -> Result<i64> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => i64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| Error::invalid(format!("'{text}' is not a number")))
}

fn switch(text: &str) -> Result<bool> {
    match text {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err(Error::invalid(format!("'{text}' is neither 'on' nor 'off'"))),
    }
}

/// A line `key = "value"`.
fn member(line: &str) -> Result<(&str, &str)> {
    let malformed = || {
        Error::invalid(format!(
            "cannot make sense of '{line}': expected [section], key = \"value\" or a # comment"
        ))
    };
    let (key, value) = line.split_once('=').ok_or_else(malformed)?;
    let value = value.trim().strip_prefix('"').and_then(|v| v.strip_suffix('"'));
    let value = value.filter(|v| !v.contains('"')).ok_or_else(malformed)?;
    Ok((key.trim_end(), value))
}

/// The rules in `text`, the contents of the file `name`; errors give its name and the line.
pub(super) fn parse(name: &str, text: &str) -> Result<Config> {
    let mut all = Config::default();
    let mut open: Option<Section> = None;
    let close = |s: Section, all: &mut Config| {
        let line = s.line;
        s.end(all).at(|| format!("{name}:{line}"))
    };
    for (i, line) in text.lines().enumerate() {
        let at = || format!("{name}:{}", i + 1);
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(head) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
            if let Some(s) = open.take() {
                close(s, &mut all)?;
            }
            open = Some(Section::new(i + 1, head).at(at)?);
            continue;
        }
        let (key, value) = member(line).at(at)?;
        let none = || Error::invalid(format!("'{key}' stands before the first [section]"));
        open.as_mut().ok_or_else(none).at(at)?.add(key, value).at(at)?;
    }
    if let Some(s) = open {
        close(s, &mut all)?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read() {
        let text = "# a\n[inject-error]\nevent = \"read_aio\"\nerrno = \"0x1c\"\nonce=\"on\"\n\n\
                    [set-state \"x\"]\nevent = \"write_aio\"\n state = \"1\"\n new_state = \"2\"\n";
        let c = parse("c", text).unwrap();
        assert_eq!((c.injects.len(), c.changes.len()), (1, 1));
        assert!(format!("{:?}", c.injects).contains("errno: Some(28)"));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, wrong) in [
            ("event = \"none\"", "c:1: 'event' stands before"),
            ("[inject]", "c:1: section 'inject'"),
            ("[inject-error]\nevent = none", "c:2: cannot make sense"),
            ("[inject-error]\nevent = \"none\" # x", "c:2: cannot make sense"),
            ("[inject-error]\nevent", "c:2: cannot make sense"),
            ("[inject-error]\nfoo = \"1\"", "c:2: there is no 'foo'"),
            ("[inject-error]\nnew_state = \"1\"", "c:2: there is no 'new_state'"),
            ("[set-state]\nerrno = \"1\"", "c:2: there is no 'errno'"),
            ("\n[inject-error]\nerrno = \"1\"", "c:2: missing field `event`"),
            ("[set-state]\nevent = \"none\"", "c:1: missing field `new_state`"),
            ("[inject-error]\nevent = \"foo\"\n[set-state]", "c:1: there is no event 'foo'"),
            ("[inject-error]\nevent = \"none\"\niotype=\"x\"", "c:1: unknown variant `x`"),
            ("[inject-error]\nerrno = \"x\"", "c:2: 'errno': 'x' is not a number"),
            ("[inject-error]\nonce = \"1\"", "c:2: 'once': '1' is neither"),
            ("[inject-error]\nevent = \"none\"\nerrno=\"0\"", "c:1: errno 0"),
            ("[inject-error]\nevent = \"none\"\nerrno=\"4096\"", "c:1: errno 4096"),
            ("[inject-error]\nevent = \"none\"\nsector=\"-2\"", "c:1: sector -2"),
            (
                "[inject-error]\nevent = \"none\"\nsector=\"9223372036854775807\"",
                "c:1: sector 9223372036854775807",
            ),
            ("[inject-error]\nevent = \"none\"\nstate=\"-1\"", "c:1: state -1"),
        ] {
            let e = parse("c", text).err().expect(text).to_string();
            assert!(e.starts_with(wrong), "{text:?}: {e}");
        }
    }
}

//! Option text of command lines: `key=value` lists with dotted keys, or JSON.
//!
//! The rules are those of the reference tools' manuals, checked by trials on them:
//! - `,` separates, `,,` stands for a comma in a value; the last of several equal keys wins;
//! - `a.b=v` is member `b` of object `a`; `l.0=v,l.1=w` is a list, without gaps;
//! - the first item may be a bare value of an implied key (`null-co,node-name=d`);
//! - text that begins with `{` is JSON and typed as such.
//!
//! This only builds values; [`Schema::check_type`](crate::Schema::check_type) gives them types.

use std::collections::BTreeMap;

use gipfel_base::{Error, ErrorKind, Result};
use serde_json::{Map, Value};

use crate::limits::{MAX_DEPTH, MAX_OPTION_LIST, MAX_OPTION_TEXT};
use crate::schema::{Form, Schema};

/// How an option's text is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct Style {
    /// The key of a bare first value.
    pub implied: Option<&'static str>,
    /// A bare later word is a switch: `server` means `server=on`, `noserver` `server=off`
    /// (old option groups such as `--chardev` allow that).
    pub switches: bool,
}

impl Style {
    /// A style with this implied key and no switches.
    pub const fn implied(key: &'static str) -> Self {
        Style { implied: Some(key), switches: false }
    }
}

impl Schema {
    /// Reads option text as a value of the type called `type_name`.
    ///
    /// ```
    /// use gipfel_qmp::{Schema, keyval::Style};
    /// let schema = Schema::builtin()?;
    /// let text = "raw,node-name=d,file.driver=null-co,file.size=1048576";
    /// let value = schema.read_option("BlockdevOptions", text, Style::implied("driver"))?;
    /// assert_eq!(value["file"]["size"], 1 << 20);
    /// # Ok::<(), gipfel_base::Error>(())
    /// ```
    ///
    /// # Errors
    /// The text is malformed, or its value does not fit the type.
    pub fn read_option(&self, type_name: &str, text: &str, style: Style) -> Result<Value> {
        let (mut value, form) = if text.starts_with('{') {
            (crate::json::parse(text)?, Form::Json)
        } else {
            (parse(text, style)?, Form::Text)
        };
        self.check_type(type_name, &mut value, form, "")?;
        Ok(value)
    }
}

/// What stands under one key while the list is read.
enum Node {
    Leaf(String),
    Inner(Children),
}

/// Children in the order of their first appearance, found by name.
#[derive(Default)]
struct Children {
    index: BTreeMap<String, usize>,
    children: Vec<(String, Node)>,
}

/// Reads a `key=value,...` list; all leaves of the result are strings.
///
/// # Errors
/// Names the key that is malformed or used in two ways.
pub fn parse(text: &str, style: Style) -> Result<Value> {
    if text.len() > MAX_OPTION_TEXT {
        let what = format!("the option text is longer than {MAX_OPTION_TEXT} bytes");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    let mut root = Children::default();
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        let (key, value, after) = item(rest, style, first)?;
        put(&mut root, &key, value)?;
        rest = after;
        first = false;
    }
    to_object(root)
}

/// Cuts the first item off: key, value, what follows the comma.
fn item(text: &str, style: Style, first: bool) -> Result<(String, String, &str)> {
    let end = text.find(['=', ',']).unwrap_or(text.len());
    let word = &text[..end];
    if text[end..].starts_with('=') {
        let (value, rest) = unescape(&text[end + 1..]);
        return Ok((word.to_owned(), value, rest));
    }
    let rest = text.get(end + 1..).unwrap_or("");
    match style.implied {
        Some(key) if first && !word.is_empty() => {
            // Old option groups let it hold a doubled comma; in others it ends at any comma.
            let (value, rest) =
                if style.switches { unescape(text) } else { (word.to_owned(), rest) };
            return Ok((key.to_owned(), value, rest));
        }
        _ => {}
    }
    if style.switches && !word.is_empty() {
        return Ok(match word.strip_prefix("no") {
            Some(off) if !off.is_empty() => (off.to_owned(), "off".into(), rest),
            _ => (word.to_owned(), "on".into(), rest),
        });
    }
    Err(if word.is_empty() {
        Error::invalid(
            "an option begins with ',': write key=value, and ',,' for a comma in a value",
        )
    } else {
        Error::invalid(format!("'{word}' has no value: write {word}=..."))
    })
}

/// The value up to the next single comma, with `,,` read as `,`; and what follows that comma.
fn unescape(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, rest),
        }
    }
}

fn put(root: &mut Children, key: &str, value: String) -> Result<()> {
    let steps: Vec<&str> = key.split('.').collect();
    if let Some(bad) = steps.iter().find(|s| !is_key(s)) {
        return Err(Error::invalid(format!(
            "'{key}' is no option name: '{bad}' must be letters, digits, '-' and '_'"
        )));
    }
    if steps.len() > MAX_DEPTH {
        let what = format!("an option name has more than {MAX_DEPTH} parts");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    let mixed = |n: usize| {
        let name = steps[..=n].join(".");
        Error::invalid(format!("'{name}' is given both a value and members: choose one"))
    };
    let (last, inner) = steps.split_last().unwrap_or((&"", &[]));
    let mut at = root;
    for (n, step) in inner.iter().enumerate() {
        let make = || Node::Inner(Children::default());
        at = match at.entry(step, make) {
            Node::Inner(children) => children,
            Node::Leaf(_) => return Err(mixed(n)),
        };
    }
    match at.entry(last, || Node::Leaf(String::new())) {
        Node::Leaf(old) => *old = value,
        Node::Inner(_) => return Err(mixed(inner.len())),
    }
    Ok(())
}

fn is_key(step: &str) -> bool {
    !step.is_empty() && step.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

impl Children {
    fn entry(&mut self, key: &str, make: impl FnOnce() -> Node) -> &mut Node {
        let at = *self.index.entry(key.to_owned()).or_insert_with(|| {
            self.children.push((key.to_owned(), make()));
            self.children.len() - 1
        });
        &mut self.children[at].1
    }
}

fn to_object(node: Children) -> Result<Value> {
    let mut map = Map::new();
    for (key, child) in node.children {
        let value = to_value(child).map_err(|e| e.context(format!("'{key}'")))?;
        map.insert(key, value);
    }
    Ok(Value::Object(map))
}

fn to_value(node: Node) -> Result<Value> {
    let inner = match node {
        Node::Leaf(text) => return Ok(Value::String(text)),
        Node::Inner(inner) => inner,
    };
    let is_index = |k: &str| k.bytes().all(|b| b.is_ascii_digit());
    if !inner.children.iter().any(|(k, _)| is_index(k)) {
        return to_object(inner);
    }
    if let Some((name, _)) = inner.children.iter().find(|(k, _)| !is_index(k)) {
        return Err(Error::invalid(format!(
            "has list indices and the member '{name}': choose one"
        )));
    }
    let len = inner.children.len();
    if len > MAX_OPTION_LIST {
        let what = format!("has more than {MAX_OPTION_LIST} elements");
        return Err(Error::new(ErrorKind::Limit, what));
    }
    let mut slots: Vec<Option<Value>> = Vec::new();
    slots.resize_with(len, || None);
    for (key, child) in inner.children {
        let slot = key.parse::<usize>().ok().and_then(|i| slots.get_mut(i));
        let value = to_value(child).map_err(|e| e.context(format!("'{key}'")))?;
        match slot {
            Some(slot @ None) => *slot = Some(value),
            Some(Some(_)) => return Err(Error::invalid(format!("index {key} stands twice"))),
            None => return Err(Error::invalid(format!("index {key} leaves a gap before it"))),
        }
    }
    // As many values as slots, none twice: every slot is filled.
    Ok(slots.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests;

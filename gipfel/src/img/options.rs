//! The options with which an image is created (`-o`): their old names, their types, their help.

use gipfel_base::units::parse_size;
use gipfel_base::{Error, Result, ResultExt};
use serde_json::{Map, Value, json};

/// What an option's value is.
#[derive(Clone, Copy, Debug)]
enum Type {
    Size,
    Bool,
    Number,
    Text,
    /// One of these; with what is written for it where that differs.
    Choice(&'static [(&'static str, &'static str)]),
    /// Known, but not offered by this version.
    Missing,
}

/// To whom an option goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    /// The format.
    Format,
    /// The file that the image lies in.
    File,
}

/// One option.
#[derive(Debug)]
pub struct CreateOption {
    /// As it is written after `-o`.
    name: &'static str,
    /// The member of BlockdevCreateOptions.
    key: &'static str,
    ty: Type,
    to: To,
    /// Shown by the message of a creation where it was not given.
    default: Option<&'static str>,
    help: &'static str,
}

const fn option(
    name: &'static str,
    key: &'static str,
    ty: Type,
    default: Option<&'static str>,
    help: &'static str,
) -> CreateOption {
    CreateOption { name, key, ty, to: To::Format, default, help }
}

const PREALLOCATION: Type = Type::Choice(&[("off", "off"), ("falloc", "falloc"), ("full", "full")]);

const QCOW2_PREALLOCATION: Type = Type::Choice(&[
    ("off", "off"),
    ("metadata", "metadata"),
    ("falloc", "falloc"),
    ("full", "full"),
]);

const COMPAT: Type = Type::Choice(&[("0.10", "v2"), ("v2", "v2"), ("1.1", "v3"), ("v3", "v3")]);

/// Formats with options of their own, in the order in which a creation's message shows them.
const FORMATS: &[(&str, &[CreateOption])] = &[
    (
        "qcow2",
        &[
            option("cluster_size", "cluster-size", Type::Size, Some("65536"), "Cluster size"),
            option("extended_l2", "extended-l2", Type::Bool, Some("off"), "Parts of clusters"),
            option(
                "preallocation",
                "preallocation",
                QCOW2_PREALLOCATION,
                None,
                "Space made ready in advance (off, metadata, falloc, full)",
            ),
            option(
                "compression_type",
                "compression-type",
                Type::Choice(&[("zlib", "zlib"), ("zstd", "zstd")]),
                Some("zlib"),
                "How clusters are compressed (zlib, zstd)",
            ),
            option("size", "size", Type::Size, None, "Size of the disk"),
            option("compat", "version", COMPAT, None, "Version of the format (v2, v3; 0.10, 1.1)"),
            option("backing_file", "backing-file", Type::Text, None, "File name of the base image"),
            option("backing_fmt", "backing-fmt", Type::Text, None, "Format of the base image"),
            option("data_file", "data-file", Type::Text, None, "File name of the data file"),
            option(
                "data_file_raw",
                "data-file-raw",
                Type::Bool,
                None,
                "Let the data file be a raw image by itself",
            ),
            option(
                "lazy_refcounts",
                "lazy-refcounts",
                Type::Bool,
                Some("off"),
                "Let reference counts lag behind",
            ),
            option(
                "refcount_bits",
                "refcount-bits",
                Type::Number,
                Some("16"),
                "Width of a reference count in bits",
            ),
            option("encryption", "", Type::Missing, None, "Old encryption"),
            option("encrypt.format", "", Type::Missing, None, "Encryption"),
            option("encrypt.key-secret", "", Type::Missing, None, "Password of the encryption"),
        ],
    ),
    (
        "raw",
        &[
            option("size", "size", Type::Size, None, "Size of the disk"),
            option(
                "preallocation",
                "preallocation",
                PREALLOCATION,
                None,
                "Space made ready in advance (off, falloc, full)",
            ),
        ],
    ),
    (
        "file",
        &[
            option("size", "size", Type::Size, None, "Size of the file"),
            option(
                "preallocation",
                "preallocation",
                PREALLOCATION,
                None,
                "Space made ready in advance (off, falloc, full)",
            ),
        ],
    ),
];

/// Options of the file that an image lies in.
const FILE: &[CreateOption] = &[
    CreateOption {
        to: To::File,
        ..option("nocow", "nocow", Type::Bool, None, "Hint: no copy-on-write by the file system")
    },
    CreateOption {
        to: To::File,
        ..option("extent_size_hint", "extent-size-hint", Type::Size, None, "Hint: size of extents")
    },
];

/// A format without options of its own.
const OTHER: &[CreateOption] = &[option("size", "size", Type::Size, None, "Size of the disk")];

/// Options that can be changed after an image was made.
const AMENDABLE: &[(&str, &[&str])] = &[(
    "qcow2",
    &["backing_file", "backing_fmt", "compat", "lazy_refcounts", "refcount_bits", "size"],
)];

fn amendable(format: &str) -> Result<&'static [&'static str]> {
    AMENDABLE.iter().find(|(f, _)| *f == format).map(|(_, o)| *o).ok_or_else(|| {
        Error::unsupported(format!("images of format '{format}' have no option that can change"))
    })
}

/// Whether new images of `format` have a kind of compression.
pub fn compresses(format: &str) -> bool {
    all(format).any(|o| o.name == "compression_type")
}

fn all(format: &str) -> impl Iterator<Item = &'static CreateOption> {
    let own = FORMATS.iter().find(|(f, _)| *f == format).map_or(OTHER, |(_, o)| o);
    own.iter().chain(FILE)
}

/// Options as given, by name.
#[derive(Debug, Default)]
pub struct Given {
    list: Vec<(&'static CreateOption, String)>,
}

/// What `-o` texts ask for.
pub enum Asked {
    /// That the options are listed.
    Help,
    /// Options.
    Options(Given),
}

/// Reads the texts of all `-o` options for `format`.
pub fn read<'a>(format: &str, texts: impl Iterator<Item = &'a str>) -> Result<Asked> {
    let mut given = Given::default();
    for t in texts {
        if asks_for_help(&[t]) {
            return Ok(Asked::Help);
        }
        for (name, value) in split(t) {
            given.set(format, &name, value.as_deref())?;
        }
    }
    Ok(Asked::Options(given))
}

/// Whether the texts of `-o` options ask for a list of them.
pub fn asks_for_help(texts: &[&str]) -> bool {
    let is_help = |(name, value): (String, Option<String>)| {
        value.is_none() && matches!(name.as_str(), "help" | "?")
    };
    texts.iter().flat_map(|t| split(t)).any(is_help)
}

/// Reads the texts of all `-o` options of a change to an image of `format`.
pub fn read_amend<'a>(format: &str, texts: impl Iterator<Item = &'a str>) -> Result<Asked> {
    let names = amendable(format)?;
    let asked = read(format, texts)?;
    if let Asked::Options(given) = &asked
        && let Some((o, _)) = given.list.iter().find(|(o, _)| !names.contains(&o.name))
    {
        return Err(Error::invalid(format!(
            "option '{}' of format '{format}' is for new images only; those that can change are \
             {}",
            o.name,
            names.join(", ")
        )));
    }
    Ok(asked)
}

/// `a=b,c` as names with values; `,,` stands for a comma.
fn split(text: &str) -> Vec<(String, Option<String>)> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let last = parts.len() - 1;
        match c {
            ',' if chars.peek() == Some(&',') => {
                chars.next();
                parts[last].push(',');
            }
            ',' => parts.push(String::new()),
            c => parts[last].push(c),
        }
    }
    let named = parts.into_iter().filter(|p| !p.is_empty());
    named
        .map(|p| match p.split_once('=') {
            Some((n, v)) => (n.to_owned(), Some(v.to_owned())),
            None => (p, None),
        })
        .collect()
}

impl Given {
    /// Sets an option; `None` switches it on.
    pub fn set(&mut self, format: &str, name: &str, value: Option<&str>) -> Result<()> {
        let option = all(format).find(|o| o.name == name).ok_or_else(|| {
            let names: Vec<_> =
                all(format).filter(|o| !matches!(o.ty, Type::Missing)).map(|o| o.name).collect();
            let near = match nearest(name, &names) {
                Some(n) => format!("; did you mean '{n}'?"),
                None => format!("; it has {}", names.join(", ")),
            };
            Error::invalid(format!("format '{format}' has no option '{name}'{near}"))
        })?;
        if matches!(option.ty, Type::Missing) {
            return Err(Error::unsupported(format!(
                "option '{name}' of format '{format}' is not offered by this version"
            )));
        }
        let value = match (value, option.ty) {
            (Some(v), _) => v,
            (None, Type::Bool) => "on",
            (None, _) => return Err(Error::invalid(format!("option '{name}' needs a value"))),
        };
        option.value(value)?;
        self.list.retain(|(o, _)| o.name != name);
        self.list.push((option, value.to_owned()));
        Ok(())
    }

    /// The value of an option, if it was given.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.list.iter().find(|(o, _)| o.name == name).map(|(_, v)| v.as_str())
    }

    /// BlockdevCreateOptions of `format`, and what of them goes to the file.
    pub fn values(&self, format: &str) -> Result<(Map<String, Value>, Map<String, Value>)> {
        let mut image = Map::new();
        let mut file = Map::new();
        image.insert("driver".into(), format.into());
        for (o, v) in &self.list {
            let to = if o.to == To::Format { &mut image } else { &mut file };
            to.insert(o.key.into(), o.value(v)?);
        }
        Ok((image, file))
    }

    /// The options as one line, defaults included.
    pub fn line(&self, format: &str) -> Result<String> {
        let mut parts = Vec::new();
        for o in all(format) {
            let Some(v) = self.get(o.name).or(o.default) else { continue };
            let v = match o.ty {
                Type::Size => parse_size(v)?.to_string(),
                Type::Bool => if is_on(v)? { "on" } else { "off" }.to_owned(),
                _ => v.to_owned(),
            };
            parts.push(format!("{}={v}", o.name));
        }
        Ok(parts.join(" "))
    }
}

impl CreateOption {
    fn value(&self, text: &str) -> Result<Value> {
        let at = || format!("option '{}'", self.name);
        match self.ty {
            Type::Size => Ok(json!(parse_size(text).at(at)?)),
            Type::Bool => Ok(json!(is_on(text).at(at)?)),
            Type::Number => match text.parse::<u64>() {
                Ok(n) => Ok(json!(n)),
                Err(_) => Err(Error::invalid(format!("'{text}' is not a number")).context(at())),
            },
            Type::Text | Type::Missing => Ok(json!(text)),
            Type::Choice(list) => match list.iter().find(|(n, _)| *n == text) {
                Some((_, v)) => Ok(json!(v)),
                None => {
                    let names: Vec<_> = list.iter().map(|(n, _)| *n).collect();
                    let text = format!("'{text}' is none of {}", names.join(", "));
                    Err(Error::invalid(text).context(at()))
                }
            },
        }
    }

    fn type_name(&self) -> &'static str {
        match self.ty {
            Type::Size => "<size>",
            Type::Bool => "<bool (on/off)>",
            Type::Number => "<num>",
            Type::Text | Type::Choice(_) | Type::Missing => "<str>",
        }
    }
}

fn is_on(text: &str) -> Result<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Error::invalid(format!("'{text}' is neither on nor off"))),
    }
}

/// The list of a format's options, for `-o help`.
pub fn help(format: &str) -> String {
    format!("Supported options:\n{}", list(format, |_| true))
}

/// The list of those that can be changed later.
pub fn amend_help(format: &str) -> Result<String> {
    let names = amendable(format)?;
    let list = list(format, |o| names.contains(&o.name));
    Ok(format!("Amend options for '{format}':\n{list}"))
}

fn list(format: &str, shown: impl Fn(&CreateOption) -> bool) -> String {
    let mut lines: Vec<_> = all(format)
        .filter(|o| !matches!(o.ty, Type::Missing) && shown(o))
        .map(|o| format!("  {:<22} - {}\n", format!("{}={}", o.name, o.type_name()), o.help))
        .collect();
    lines.sort();
    lines.concat()
}

/// The one of `names` that `name` is most like, if it is like one.
pub fn nearest<'a>(name: &str, names: &[&'a str]) -> Option<&'a str> {
    let best = names.iter().map(|n| (distance(name, n), *n)).min()?;
    (best.0 <= (name.len() / 3).max(1)).then_some(best.1)
}

/// How many letters must be put in, taken out or changed to make `b` of `a`.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(format: &str, text: &str) -> Result<Given> {
        match read(format, [text].into_iter())? {
            Asked::Options(g) => Ok(g),
            Asked::Help => panic!("no help was asked for"),
        }
    }

    #[test]
    fn options_become_values() {
        let g = given("qcow2", "cluster_size=4k,compat=0.10,lazy_refcounts,nocow=on").unwrap();
        let (image, file) = g.values("qcow2").unwrap();
        let want = json!({
            "driver": "qcow2", "cluster-size": 4096, "version": "v2", "lazy-refcounts": true
        });
        assert_eq!(Value::Object(image), want);
        assert_eq!(Value::Object(file), json!({ "nocow": true }));
        let g = given("qcow2", "backing_file=a,,b=c").unwrap();
        assert_eq!(g.get("backing_file"), Some("a,b=c"));
        assert!(matches!(read("raw", ["size=1,help"].into_iter()), Ok(Asked::Help)));
    }

    #[test]
    fn mistakes_are_told_with_what_was_meant() {
        let told = |f, t| given(f, t).unwrap_err().to_string();
        assert!(told("qcow2", "clustersize=1").contains("did you mean 'cluster_size'"));
        assert!(told("raw", "bogus=1").contains("it has size, preallocation"));
        assert!(told("raw", "preallocation=metadata").contains("off, falloc, full"));
        assert!(told("qcow2", "encryption=on").contains("not offered"));
        assert!(told("raw", "size").contains("needs a value"));
        assert!(told("raw", "size=x").contains("'x'"));
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}

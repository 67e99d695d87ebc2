//! File names as images and people write them: plain paths, `file:` paths, `json:` options, and
//! `DRIVER:REST` where a driver reads such names.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use gipfel_base::limits::MAX_CHAIN_DEPTH;
use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_node::{IoFuture, Kind, NameFor};
use serde_json::{Map, Value, json};

use crate::graph::Graph;

/// What a file name means.
pub struct NameMeans {
    /// The options of the node that it names.
    pub options: Map<String, Value>,
    /// Whether that is a whole image, so that no format is looked for in it.
    pub is_image: bool,
}

impl Graph {
    /// What the file name `name` means.
    pub async fn name_means(self: &Rc<Self>, name: &str) -> Result<NameMeans> {
        self.name_at(name, 0).await
    }

    fn name_at<'a>(self: &'a Rc<Self>, name: &'a str, depth: usize) -> IoFuture<'a, NameMeans> {
        Box::pin(async move {
            let registry = self.registry();
            let prefix = name.split_once(':');
            let Some((read, rest)) =
                prefix.and_then(|(p, rest)| Some((registry.file_names(p)?, rest)))
            else {
                let options = options(name, registry.file_protocol)?;
                let driver = options.get("driver").and_then(Value::as_str).unwrap_or_default();
                let is_json = name.starts_with("json:");
                let is_image = is_json && registry.get(driver)?.kind != Kind::Protocol;
                return Ok(NameMeans { options, is_image });
            };
            if depth > MAX_CHAIN_DEPTH {
                let text = format!("a file name stands for more than {MAX_CHAIN_DEPTH} nodes");
                return Err(Error::new(ErrorKind::Limit, text));
            }
            let (driver, read) = read;
            let said = read(rest).at(|| format!("'{name}'"))?;
            let mut options = said.options;
            options.insert("driver".into(), driver.into());
            for (child, name, taken_for) in said.children {
                let mut means = self.name_at(&name, depth + 1).await?;
                if taken_for == NameFor::Image && !means.is_image {
                    let format = self.probe(means.options.clone()).await?;
                    means.options = over(format, means.options);
                }
                options.insert(child.into(), Value::Object(means.options));
            }
            Ok(NameMeans { options, is_image: false })
        })
    }
}

/// The options of a node of driver `format` over an inline protocol node.
pub(crate) fn over(format: &str, protocol: Map<String, Value>) -> Map<String, Value> {
    Map::from_iter([("driver".to_owned(), json!(format)), ("file".to_owned(), protocol.into())])
}

/// What a file name means: the options of the protocol node (or of a whole node) it names.
pub(crate) fn options(name: &str, file_protocol: &str) -> Result<Map<String, Value>> {
    if let Some(json) = name.strip_prefix("json:") {
        return match serde_json::from_str(json) {
            Ok(Value::Object(m)) => Ok(nest(m)),
            Ok(_) => Err(Error::invalid(format!("'{name}': what follows json: is no object"))),
            Err(e) => Err(Error::invalid(format!("'{name}': {e}"))),
        };
    }
    let path = name.strip_prefix("file:").unwrap_or(name);
    if path.is_empty() {
        return Err(Error::invalid("a file name is empty"));
    }
    if let Some(scheme) = scheme(name)
        && scheme != "file"
    {
        return Err(Error::unsupported(format!(
            "'{name}': protocol '{scheme}' is not offered by this version; \
             for a file of that name write './{name}'"
        )));
    }
    let mut m = Map::new();
    m.insert("driver".into(), file_protocol.into());
    m.insert("filename".into(), path.into());
    Ok(m)
}

/// The part before the first colon, if it looks like a protocol's name.
fn scheme(name: &str) -> Option<&str> {
    let (s, _) = name.split_once(':')?;
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
    (!s.is_empty() && s.starts_with(|c: char| c.is_ascii_alphabetic()) && s.chars().all(ok))
        .then_some(s)
}

/// Makes `{"file.filename": x}` into `{"file": {"filename": x}}`, as json: names may be written.
pub fn nest(flat: Map<String, Value>) -> Map<String, Value> {
    let mut out = Map::new();
    for (k, v) in flat {
        let v = match v {
            Value::Object(m) => Value::Object(nest(m)),
            v => v,
        };
        match k.split_once('.') {
            Some((head, rest)) => {
                let inner = out.entry(head).or_insert_with(|| Value::Object(Map::new()));
                if let Value::Object(inner) = inner {
                    inner.insert(rest.to_owned(), v);
                    let again = nest(std::mem::take(inner));
                    *inner = again;
                }
            }
            None => match (out.get_mut(&k), v) {
                (Some(Value::Object(old)), Value::Object(new)) => old.extend(new),
                (_, v) => drop(out.insert(k, v)),
            },
        }
    }
    out
}

/// The file that `name`, written in an image at `image`, means: relative names start at the
/// image's folder.
pub fn relative_to(image: Option<&str>, name: &str) -> String {
    if name.starts_with("json:") || scheme(name).is_some_and(|s| s != "file") {
        return name.to_owned();
    }
    let path = Path::new(name.strip_prefix("file:").unwrap_or(name));
    let folder = image.and_then(|i| Path::new(i).parent());
    let joined = match folder {
        Some(f) if path.is_relative() => f.join(path),
        _ => PathBuf::from(path),
    };
    let text = joined.to_string_lossy().into_owned();
    // A relative name with a colon would be taken for a protocol.
    if scheme(&text).is_some() { format!("./{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(relative_to(Some("/a/b.qcow2"), "c.img"), "/a/c.img");
        assert_eq!(relative_to(Some("b.qcow2"), "c.img"), "c.img");
        assert_eq!(relative_to(Some("/a/b"), "/x"), "/x");
        assert_eq!(options("file:a:b", "file").unwrap()["filename"], "a:b");
        assert!(options("ssh://x/y", "file").unwrap_err().to_string().contains("protocol 'ssh'"));
        let m = options("json:{\"driver\":\"x\",\"file.filename\":\"y\"}", "file").unwrap();
        assert_eq!(m["file"]["filename"], "y");
        assert!(options("json:[]", "file").is_err());
        assert!(options("", "file").is_err());
    }
}

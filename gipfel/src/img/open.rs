//! Opening an image for a tool: from a file name or from option text to a backend.

use std::rc::Rc;
use std::sync::Arc;

use clap::ArgMatches;
use gipfel_base::{Error, Result, ResultExt};
use gipfel_graph::{Backend, BackendOptions, Graph, Registry, nest};
use gipfel_node::{Kind, Node, Role};
use gipfel_qmp::keyval::{Style, parse};
use gipfel_qmp::{Form, Schema};
use serde_json::{Map, Value, json};

/// An image as the command line names it.
#[derive(Clone, Copy, Default)]
pub struct Named<'a> {
    /// File name, or option text.
    pub name: &'a str,
    /// Its format, if it was said.
    pub format: Option<&'a str>,
    /// Whether `name` is option text (`--image-opts`).
    pub is_options: bool,
    /// How the host's page cache is used.
    pub cache: Cache,
    /// Whether others may use the image meanwhile, whatever they do (`-U`).
    pub share: bool,
    /// Whether it is going to be written.
    pub writable: bool,
    /// Whether its size is going to be changed.
    pub resize: bool,
    /// Whether its backing image is left out.
    pub alone: bool,
    /// What discards do where it is written (default: unmap).
    pub discard: Option<&'a str>,
    /// Options of its node beside the name, as option text; they may say the format.
    pub options: &'a str,
}

/// A cache mode of the command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cache {
    /// Past the host's page cache.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
    /// Every write is made durable before it completes.
    pub write_through: bool,
}

impl Cache {
    /// Reads a mode as `-t` and `-T` take it.
    pub fn parse(mode: &str) -> Result<Cache> {
        let (direct, no_flush, write_through) = match mode {
            "writeback" => (false, false, false),
            "writethrough" => (false, false, true),
            "none" | "off" => (true, false, false),
            "directsync" => (true, false, true),
            "unsafe" => (false, true, false),
            _ => {
                return Err(Error::invalid(format!(
                    "there is no cache mode '{mode}'; \
                     modes are writeback, writethrough, none, directsync and unsafe"
                )));
            }
        };
        Ok(Cache { direct, no_flush, write_through })
    }
}

/// What an image is opened with.
pub struct Found {
    /// BlockdevOptions, `node-name` left out unless the user gave one.
    pub options: Map<String, Value>,
    /// Whether its format was guessed from its first bytes.
    pub guessed: bool,
}

impl Found {
    /// Its driver.
    pub fn driver(&self) -> &str {
        self.options.get("driver").and_then(Value::as_str).unwrap_or_default()
    }

    /// Warns where a raw image that is going to be written was only guessed to be one.
    pub fn warn_of_guess(&self, graph: &Graph, name: &str) -> bool {
        let raw = graph.registry().raw_format;
        let risky = self.guessed && self.driver() == raw;
        if risky {
            eprintln!(
                "warning: no format was given for '{name}', and none was recognised: it is taken \
                 for {raw}, and nothing that looks like another format's header is written to \
                 its first sector; give the format to lift that"
            );
        }
        risky
    }
}

/// An open image.
pub struct Image {
    /// The way to its bytes.
    pub backend: Arc<Backend>,
    /// Its node.
    pub node: Arc<Node>,
    /// Whether it is a raw image that was only guessed to be one.
    pub guessed_raw: bool,
}

/// The option by which the format `raw` is told so.
pub const GUESSED: &str = "guessed";

/// Has the format `raw` refuse, where it was `guessed` and is going to be written, what would make
/// another format's image of it.
pub fn guard_guess(options: &mut Map<String, Value>, guessed: bool) {
    if guessed && options.get("driver").and_then(Value::as_str) == Some("raw") {
        options.insert(GUESSED.into(), json!(true));
    }
}

/// The `-f` and `--image-opts` of a command's image.
pub fn named<'a>(m: &'a ArgMatches, name: &'a str) -> Result<Named<'a>> {
    named_as(m, name, "format")
}

/// The same for an image whose format is said by the argument `format`.
pub fn named_as<'a>(m: &'a ArgMatches, name: &'a str, format: &str) -> Result<Named<'a>> {
    let (format, is_options) = (super::text(m, format), m.get_flag("image-opts"));
    if is_options && format.is_some() {
        return Err(Error::invalid(
            "--image-opts says the format in its options: leave --format (-f) out",
        ));
    }
    Ok(Named { name, format, is_options, share: shares(m), ..Named::default() })
}

/// Whether `-U` is given, to a command that has it.
fn shares(m: &ArgMatches) -> bool {
    m.try_get_one("force-share").ok().flatten().copied().unwrap_or(false)
}

/// The arguments that [`named`] reads.
pub fn args() -> [clap::Arg; 3] {
    let [format, options] = writer_args();
    [
        format,
        options,
        super::flag("force-share", Some('U'), "Look at an image that others may be writing"),
    ]
}

/// Those of them for a command that writes to the image and cannot share it.
pub fn writer_args() -> [clap::Arg; 2] {
    [
        super::value("format", Some('f'), "FORMAT", "The image's format (default: looked at)"),
        super::flag("image-opts", None, "The image is given as options: driver=...,file.filename="),
    ]
}

/// The node options that `n` means.
pub async fn find(graph: &Rc<Graph>, n: Named<'_>) -> Result<Found> {
    let (mut options, guessed) = if n.is_options {
        let Value::Object(m) = parse(n.name, Style::default())? else {
            return Err(Error::invalid("image options are key=value pairs"));
        };
        complete(graph, n, m, Form::Sizes).await?
    } else if !n.options.is_empty() {
        beside_name(graph, n).await?
    } else if let Some(text) = n.name.strip_prefix("json:") {
        let Value::Object(m) = gipfel_qmp::json::parse(text)? else {
            return Err(Error::invalid("what follows 'json:' is no object"));
        };
        complete(graph, n, nest(m), Form::Json).await?
    } else {
        graph.image_options(n.name, n.format).await?
    };
    let def = graph.registry().get(options.get("driver").and_then(Value::as_str).unwrap_or(""))?;
    let mut set = |key: &str, v: Value| {
        options.entry(key).or_insert(v);
    };
    set("read-only", json!(!n.writable));
    set("cache", json!({ "direct": n.cache.direct, "no-flush": n.cache.no_flush }));
    if n.writable {
        set("discard", json!(n.discard.unwrap_or("unmap")));
    }
    if n.share {
        set("force-share", json!(true));
    }
    // What the image names itself is left where it is.
    for c in def.children.iter().filter(|c| n.alone && !c.required) {
        if matches!(c.role, Role::Backing | Role::Data) {
            set(c.name, Value::Null);
        }
    }
    Ok(Found { options, guessed })
}

/// Makes node options of a file name and of the options beside it.
async fn beside_name(graph: &Rc<Graph>, n: Named<'_>) -> Result<(Map<String, Value>, bool)> {
    let Value::Object(mut given) = parse(n.options, Style::default())? else {
        return Err(Error::invalid("image options are key=value pairs"));
    };
    let driver = given.remove("driver");
    let format = driver.as_ref().and_then(Value::as_str).or(n.format);
    let (mut options, guessed) = graph.image_options(n.name, format).await?;
    put_over(graph.registry(), &mut options, given)?;
    Ok((typed(options)?, guessed))
}

/// Puts options over others, member by member. A format put over a protocol stands on it.
fn put_over(
    registry: &Registry,
    options: &mut Map<String, Value>,
    given: Map<String, Value>,
) -> Result<()> {
    let kind = |m: &Map<String, Value>| match m.get("driver").and_then(Value::as_str) {
        Some(driver) => registry.get(driver).map(|d| Some(d.kind)),
        None => Ok(None),
    };
    if kind(&given)? == Some(Kind::Format) && kind(options)? == Some(Kind::Protocol) {
        let file = std::mem::take(options);
        options.insert("file".into(), file.into());
    }
    for (key, v) in given {
        match (options.get_mut(&key), v) {
            (Some(Value::Object(old)), Value::Object(new)) => put_over(registry, old, new)?,
            (_, v) => drop(options.insert(key, v)),
        }
    }
    Ok(())
}

/// Makes node options of what the user wrote: drivers that are left out are found, types checked.
async fn complete(
    graph: &Rc<Graph>,
    n: Named<'_>,
    mut m: Map<String, Value>,
    form: Form,
) -> Result<(Map<String, Value>, bool)> {
    name_files(&mut m, graph.registry().file_protocol);
    if let Some(f) = n.format {
        let said = m.get("driver").and_then(Value::as_str);
        let kind = |d| graph.registry().get(d).map(|d| d.kind);
        if let Some(d) = said
            && kind(d)? == Kind::Protocol
            && kind(f)? != Kind::Protocol
        {
            m = Map::from_iter([("file".to_owned(), Value::Object(m))]);
        }
        m.insert("driver".into(), f.into());
    }
    let mut guessed = false;
    if !m.contains_key("driver") {
        let Some(Value::Object(file)) = m.get("file") else {
            return Err(Error::invalid("neither 'driver' nor 'file' is given: say what to open"));
        };
        let file = checked(file.clone(), form)?;
        let (found, _) =
            graph.image_options(&format!("json:{}", Value::Object(file)), None).await?;
        m.insert("driver".into(), found.get("driver").cloned().unwrap_or_default());
        guessed = true;
    }
    Ok((checked(m, form)?, guessed))
}

/// Children of which only a file name is given are files.
fn name_files(m: &mut Map<String, Value>, protocol: &str) {
    for v in m.values_mut() {
        if let Value::Object(child) = v {
            name_files(child, protocol);
            if child.contains_key("filename") && !child.contains_key("driver") {
                child.insert("driver".into(), protocol.into());
            }
        }
    }
}

/// The options with the types of the schema. In JSON, texts are taken for what they say too:
/// images that a tool named from option text hold such names.
fn checked(m: Map<String, Value>, form: Form) -> Result<Map<String, Value>> {
    let schema = Schema::builtin()?;
    let check = |mut v: Value, form| {
        schema.check_type("BlockdevOptions", &mut v, form, "").map(|()| match v {
            Value::Object(m) => m,
            _ => Map::new(),
        })
    };
    let first = check(Value::Object(m.clone()), form);
    if form == Form::Json && first.is_err() {
        return check(as_text(Value::Object(m)), Form::Sizes).or(first);
    }
    first
}

/// The options with the types of the schema, whether they have types or are texts.
pub fn typed(m: Map<String, Value>) -> Result<Map<String, Value>> {
    match as_text(Value::Object(m)) {
        Value::Object(m) => checked(m, Form::Sizes),
        _ => Ok(Map::new()),
    }
}

fn as_text(v: Value) -> Value {
    match v {
        Value::Object(m) => m.into_iter().map(|(k, v)| (k, as_text(v))).collect(),
        Value::Array(l) => l.into_iter().map(as_text).collect(),
        Value::Bool(b) => if b { "on" } else { "off" }.into(),
        Value::Number(n) => n.to_string().into(),
        Value::Null => "".into(),
        text => text,
    }
}

/// Opens `n` for `client`, as the node called `name` unless its options name it.
pub async fn open(graph: &Rc<Graph>, n: Named<'_>, name: &str) -> Result<Image> {
    let at = || format!("cannot open '{}'", n.name);
    let found = find(graph, n).await.at(at)?;
    open_found(graph, n, found, name).await.at(at)
}

async fn open_found(graph: &Rc<Graph>, n: Named<'_>, found: Found, name: &str) -> Result<Image> {
    let guessed_raw = n.writable && found.warn_of_guess(graph, n.name);
    let mut options = found.options;
    guard_guess(&mut options, guessed_raw);
    let name = match options.get("node-name").and_then(Value::as_str) {
        Some(given) => given.to_owned(),
        None => {
            options.insert("node-name".into(), name.into());
            name.to_owned()
        }
    };
    graph.blockdev_add(options).await?;
    let want = BackendOptions {
        writable: n.writable,
        resize: n.resize,
        alone: !n.share,
        ..BackendOptions::default()
    };
    let (_, backend) = graph.attach(&name, "this command", want).await?;
    backend.set_write_through(n.cache.write_through);
    let model = graph.model().await;
    let node = model.node(model.find_node(&name)?).live.clone();
    Ok(Image { backend, node, guessed_raw })
}

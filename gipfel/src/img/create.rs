//! `img create`: new images. `img convert` makes its target here too.

use std::os::unix::fs::MetadataExt;
use std::process::ExitCode;
use std::rc::Rc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::units::parse_size;
use gipfel_base::{Error, Result, ResultExt};
use gipfel_graph::{Graph, relative_to};
use serde_json::json;

use super::open::{Image, Named, find, open};
use super::options::{self, Asked, Given};

const EXAMPLES: &str = "\
Examples:
  gipfel img create disk.raw 10G
  gipfel img create -f qcow2 -o cluster_size=128k,lazy_refcounts=on disk.qcow2 1T
  gipfel img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  gipfel img create -f qcow2 -o help

An image of that name is overwritten, unless it is in use. Sizes are bytes, or have a suffix
k, M, G, T, P or E (powers of 1024).";

/// Largest size of an image, in bytes.
const MAX_SIZE: u64 = i64::MAX as u64;

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("create", "Make a new image", EXAMPLES)
        .arg(super::value("format", Some('f'), "FORMAT", "Format of the new image (default: raw)"))
        .arg(super::value("backing", Some('b'), "FILE", "Image that the new one stands on"))
        .arg(super::value("backing-format", Some('F'), "FORMAT", "Format of that image"))
        .arg(super::flag("backing-unsafe", Some('u'), "Do not look whether that image is there"))
        .arg(options_arg("options"))
        .arg(super::flag("quiet", Some('q'), "Print nothing but errors"))
        .arg(Arg::new("filename").value_name("FILENAME").help("The new image"))
        .arg(
            Arg::new("size")
                .value_name("SIZE")
                .allow_negative_numbers(true)
                .help("Its size; without one it is that of the image given with -b"),
        )
}

/// `-o`, under this long name.
pub fn options_arg(name: &'static str) -> Arg {
    super::value(name, Some('o'), "OPTIONS", "Options of the format, name=value,... or help")
        .action(clap::ArgAction::Append)
}

/// A new image.
pub struct New<'a> {
    /// Its file name.
    pub name: &'a str,
    /// Its format.
    pub format: &'a str,
    /// Its options; the size may be missing where it stands on another image.
    pub options: Given,
    /// Whether the image it stands on need not be there.
    pub unchecked: bool,
    /// Whether nothing is printed.
    pub quiet: bool,
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let format = super::text(m, "format").unwrap_or("raw");
    super::on_graph(m, "the new image is incomplete and of no use", async |graph| {
        graph.registry().get(format)?;
        let mut given = match options::read(format, super::texts(m, "options"))? {
            Asked::Help => {
                super::print(&options::help(format))?;
                return Ok(ExitCode::SUCCESS);
            }
            Asked::Options(given) => given,
        };
        let name = super::text(m, "filename")
            .ok_or_else(|| Error::invalid("the file name of the new image is missing"))?;
        set_backing(&mut given, format, m)?;
        if let Some(size) = super::text(m, "size") {
            if given.get("size").is_some() {
                return Err(Error::invalid("the size is given twice, once with -o"));
            }
            given.set(format, "size", Some(size)).at(|| "SIZE")?;
        }
        let new = New {
            name,
            format,
            options: given,
            unchecked: m.get_flag("backing-unsafe"),
            quiet: m.get_flag("quiet"),
        };
        create(&graph, new).await.at(|| format!("cannot create '{name}'"))?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Takes `-b` and `-F` into the options.
pub fn set_backing(given: &mut Given, format: &str, m: &ArgMatches) -> Result<()> {
    for (arg, option) in [("backing", "backing_file"), ("backing-format", "backing_fmt")] {
        if let Some(v) = super::text(m, arg) {
            given.set(format, option, Some(v)).map_err(|_| {
                Error::unsupported(format!("images of format '{format}' stand on no other image"))
            })?;
        }
    }
    match (given.get("backing_file"), given.get("backing_fmt")) {
        (Some(""), _) => Err(Error::invalid("the name of the backing file is empty")),
        (None, Some(_)) => Err(Error::invalid("a backing format is given without a backing file")),
        _ => Ok(()),
    }
}

/// Makes an image.
pub async fn create(graph: &Rc<Graph>, new: New<'_>) -> Result<()> {
    let New { name, format, mut options, unchecked, quiet } = new;
    let path = name.strip_prefix("file:").unwrap_or(name).to_owned();
    if let Some(backing) = options.get("backing_file").map(str::to_owned) {
        let full = relative_to(Some(&path), &backing);
        if same_file(&full, &path) {
            return Err(Error::invalid("an image cannot stand on itself"));
        }
        let backing_format = options.get("backing_fmt").map(str::to_owned);
        let size = match backing_format {
            Some(_) if unchecked => None,
            Some(f) => Some(size_of(graph, &full, &f).await.at(|| "backing image")?),
            None => return Err(no_backing_format(graph, &full).await),
        };
        if let Some(size) = size
            && options.get("size").is_none()
        {
            options.set(format, "size", Some(&size.to_string()))?;
        }
    }
    let Some(size) = options.get("size") else {
        return Err(Error::invalid("its size is missing"));
    };
    let size = super::whole_sectors(parse_size(size)?);
    if size > MAX_SIZE {
        return Err(Error::invalid(format!("size {size} is too large: {MAX_SIZE} is the most")));
    }
    if !quiet {
        let line = options.line(format)?;
        super::print(&format!("Formatting '{name}', fmt={format} {line}\n"))?;
    }
    let (mut image, file) = options.values(format)?;
    image.insert("size".into(), json!(size));
    graph.create_image(name, image, file).await
}

/// Whether two paths lead to one file.
pub fn same_file(a: &str, b: &str) -> bool {
    let identity = |p: &str| std::fs::metadata(p).map(|m| (m.dev(), m.ino())).ok();
    a == b || identity(a).is_some_and(|a| identity(b) == Some(a))
}

/// Locks keep an image that is going to be made from being one that is read; where they are left
/// out (-U), this does.
pub async fn refuse_same_file(
    graph: &Rc<Graph>,
    source: &Image,
    name: &str,
    target: &str,
) -> Result<()> {
    let path = target.strip_prefix("file:").unwrap_or(target);
    let files = graph.chain_files(source.node.name()).await?;
    if files.iter().any(|f| same_file(f, path)) {
        return Err(Error::invalid(format!("'{path}' is what '{name}' is read from")));
    }
    Ok(())
}

/// The size of an image, its whole chain looked at.
async fn size_of(graph: &Rc<Graph>, name: &str, format: &str) -> Result<u64> {
    let named = Named { name, format: Some(format), share: true, ..Named::default() };
    let image = open(graph, named, "backing").await?;
    Ok(image.node.size())
}

/// Why the image `name` must have its format said where another one is to stand on it.
pub async fn no_backing_format(graph: &Rc<Graph>, name: &str) -> Error {
    let named = Named { name, share: true, ..Named::default() };
    let seems = match find(graph, named).await {
        Ok(found) => format!("; '{name}' looks like {}", found.driver()),
        Err(_) => String::new(),
    };
    Error::invalid(format!(
        "a backing file needs its format said (-F), for a guest could write any format's header \
         into a raw image{seems}"
    ))
}

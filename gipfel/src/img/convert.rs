//! `img convert`: images copied into a new one (or, with -n, into one that is there).

use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::units::parse_size;
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_graph::Graph;
use gipfel_io::{Buf, Handle};
use gipfel_node::{Node, Role};

use super::copy::{Copy, MAX_WORKERS, Options, Salvage, Source, WORKERS};
use super::create::{self, New};
use super::open::{self, Cache, Named};
use super::options::{self, Asked, Given};
use super::progress::Progress;
use super::{text, texts, whole_sectors};
use crate::daemon::cli::default_io_threads;

const EXAMPLES: &str = "\
Examples:
  gipfel img convert -p -O raw disk.qcow2 disk.raw
  gipfel img convert -f raw -O qcow2 -o cluster_size=128k disk.raw disk.qcow2
  gipfel img convert -O qcow2 -B base.qcow2 -F qcow2 old.qcow2 new.qcow2
  gipfel img convert -c -O qcow2 -o compression_type=zstd disk.raw small.qcow2
  gipfel img convert -n -W disk.qcow2 /dev/vg/volume

The target is overwritten, unless it is in use. A copy that fails or is interrupted leaves a
target that holds part of the disk only.";

/// Shortest run of zeros that is left out, unless -S says otherwise, in bytes.
const SHORTEST_HOLE: u64 = 4096;
/// The most that -S takes, in bytes.
const MAX_SHORTEST_HOLE: u64 = 16 << 20;
/// Bytes by which formats are recognised.
const PROBED: u64 = 2048;

/// Options that are known and not offered, with what they would do.
const MISSING: [(&str, Option<char>, bool, &str); 3] = [
    ("source-snapshot", Some('l'), true, "copying an internal snapshot"),
    ("bitmaps", None, false, "copying bitmaps"),
    ("skip-broken-bitmaps", None, false, "copying bitmaps"),
];

/// The definition of the command line.
pub fn command() -> Command {
    let mut c = super::subcommand("convert", "Copy images into a new one", EXAMPLES)
        .arg(
            super::value(
                "format",
                Some('f'),
                "FORMAT",
                "Format of the sources (default: looked at)",
            )
            .visible_alias("source-format"),
        )
        .arg(
            super::flag("image-opts", None, "Sources are given as options: driver=...")
                .visible_alias("source-image-opts"),
        )
        .arg(super::flag("force-share", Some('U'), "Read sources that others may be writing"))
        .arg(super::value(
            "target-format",
            Some('O'),
            "FORMAT",
            "Format of the target (default: raw)",
        ))
        .arg(super::flag("target-image-opts", None, "The target is given as options; needs -n"))
        .arg(create::options_arg("target-options"))
        .arg(super::value("backing", Some('B'), "FILE", "Image that the target stands on"))
        .arg(super::value("backing-format", Some('F'), "FORMAT", "Format of that image"))
        .arg(super::flag("no-create", Some('n'), "Write into a target that is there"))
        .arg(super::flag("target-is-zero", None, "The target reads as zeros; needs -n"))
        .arg(super::value("target-cache", Some('t'), "MODE", "Cache mode (default: unsafe)"))
        .arg(super::value("source-cache", Some('T'), "MODE", "Cache mode (default: writeback)"))
        .arg(super::value(
            "sparse-size",
            Some('S'),
            "SIZE",
            "Shortest run of zeros that is left out (default: 4k); 0 writes everything",
        ))
        .arg(super::value("parallel", Some('m'), "N", "Pieces under way at once (default: 8)"))
        .arg(super::flag("oob-writes", Some('W'), "Writes may begin in any order"))
        .arg(super::value("rate", Some('r'), "RATE", "Bytes a second at most"))
        .arg(super::flag(
            "copy-range-offloading",
            Some('C'),
            "Do not search data for zeros (and copy as always)",
        ))
        .arg(super::flag("salvage", None, "Take what cannot be read for zeros, and go on"))
        .args(super::progress_args())
        .arg(super::flag("compress", Some('c'), "Store data compressed, if the format can"))
        .arg(
            Arg::new("files")
                .value_name("SOURCE... TARGET")
                .num_args(0..)
                .help("The sources, one after the other, and the target"),
        );
    for (name, short, takes_value, what) in MISSING {
        let a = if takes_value {
            super::value(name, short, "VALUE", what)
        } else {
            super::flag(name, short, what)
        };
        c = c.arg(a.hide(true));
    }
    c
}

/// What the command line asks for.
struct Asking<'a> {
    sources: Vec<Named<'a>>,
    target: Named<'a>,
    format: &'a str,
    new: Option<Given>,
    on_backing: bool,
    is_zero: bool,
    shortest_hole: u64,
    search: bool,
    workers: usize,
    any_order: bool,
    rate: Option<u64>,
    salvage: Option<Salvage>,
    compress: bool,
    progress: bool,
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    for (name, _, takes_value, what) in MISSING {
        if if takes_value { text(m, name).is_some() } else { m.get_flag(name) } {
            return Err(Error::unsupported(format!("--{name}: {what} is not offered yet")));
        }
    }
    let format = text(m, "target-format").unwrap_or("raw");
    let given = match options::read(format, texts(m, "target-options"))? {
        Asked::Help => {
            crate::drivers::check_name(format)?;
            super::print(&options::help(format))?;
            return Ok(ExitCode::SUCCESS);
        }
        Asked::Options(given) => given,
    };
    let asking = asking(m, format, given)?;
    let target = asking.target.name;
    let objects = super::objects(m)?;
    let left = format!("'{target}' holds a part of the disk only");
    let progress = Progress::new();
    super::watched(&objects, &left, default_io_threads(), &progress, async |graph, threads| {
        convert(&graph, asking, &threads, &progress).await?;
        Ok(ExitCode::SUCCESS)
    })
}

fn asking<'a>(m: &'a ArgMatches, format: &'a str, mut given: Given) -> Result<Asking<'a>> {
    let mut files: Vec<&str> = texts(m, "files").collect();
    let target = match files.pop() {
        Some(t) if !files.is_empty() => t,
        _ => return Err(Error::invalid("give the image to copy and the name of the new one")),
    };
    let flag = |name: &str| m.get_flag(name);
    let exists = flag("no-create");
    let needs = |option: &str| Error::invalid(format!("{option} needs -n (--no-create)"));
    if flag("target-image-opts") && text(m, "target-format").is_some() {
        return Err(Error::invalid(
            "--target-image-opts says the format in its options: leave --target-format (-O) out",
        ));
    }
    if flag("target-image-opts") && !exists {
        return Err(needs("--target-image-opts"));
    }
    if flag("target-is-zero") && !exists {
        return Err(needs("--target-is-zero"));
    }
    if exists && m.contains_id("target-options") {
        return Err(Error::invalid("-o tells how the target is made, and -n that it is not"));
    }
    if flag("copy-range-offloading") && text(m, "sparse-size").is_some() {
        return Err(Error::invalid("-C searches no data for zeros, and -S tells how: give one"));
    }
    if flag("copy-range-offloading") && flag("salvage") {
        return Err(Error::invalid("-C and --salvage cannot be given together"));
    }
    if flag("compress") && given.get("preallocation").is_some_and(|p| p != "off") {
        return Err(Error::invalid(
            "-c lets data take less space, and preallocation takes all of it: give one",
        ));
    }
    if !flag("target-image-opts") {
        create::set_backing(&mut given, format, m)?;
    }
    let on_backing = given.get("backing_file").is_some() || text(m, "backing").is_some();
    if on_backing && files.len() > 1 {
        return Err(Error::invalid("a target on a backing image takes one source, not several"));
    }
    if on_backing && flag("target-is-zero") {
        return Err(Error::invalid("a target on a backing image is not all zeros"));
    }
    let source_cache = Cache::parse(text(m, "source-cache").unwrap_or("writeback"));
    let target_cache = Cache::parse(text(m, "target-cache").unwrap_or("unsafe"));
    let source = Named { cache: source_cache.at(|| "-T")?, ..open::named(m, "")? };
    let target_options = flag("target-image-opts");
    Ok(Asking {
        sources: files.into_iter().map(|name| Named { name, ..source }).collect(),
        target: Named {
            name: target,
            format: (!target_options).then_some(format),
            is_options: target_options,
            cache: target_cache.at(|| "-t")?,
            writable: true,
            ..Named::default()
        },
        format,
        new: (!exists).then_some(given),
        on_backing,
        is_zero: flag("target-is-zero"),
        shortest_hole: shortest_hole(text(m, "sparse-size"))?,
        search: !flag("copy-range-offloading"),
        workers: workers(text(m, "parallel"))?,
        any_order: flag("oob-writes"),
        rate: super::rate(m)?,
        salvage: flag("salvage").then_some(Salvage { quiet: flag("quiet") }),
        progress: super::shows(m),
        compress: flag("compress"),
    })
}

fn shortest_hole(given: Option<&str>) -> Result<u64> {
    let Some(text) = given else { return Ok(SHORTEST_HOLE) };
    let n = parse_size(text).at(|| "-S")?;
    if n > MAX_SHORTEST_HOLE || !n.is_multiple_of(gipfel_base::units::SECTOR) {
        return Err(Error::invalid(format!(
            "-S {text}: take a multiple of 512 up to {MAX_SHORTEST_HOLE}, or 0 to write everything"
        )));
    }
    Ok(n)
}

fn workers(given: Option<&str>) -> Result<usize> {
    let Some(text) = given else { return Ok(WORKERS) };
    match text.parse() {
        Ok(n) if (1..=MAX_WORKERS).contains(&n) => Ok(n),
        _ => Err(Error::invalid(format!("-m {text}: take a number from 1 to {MAX_WORKERS}"))),
    }
}

async fn convert(
    graph: &Rc<Graph>,
    a: Asking<'_>,
    threads: &[Handle],
    progress: &Arc<Progress>,
) -> Result<()> {
    if !a.target.is_options {
        graph.registry().get(a.format)?;
    }
    let mut sources = Vec::new();
    let (mut at, mut end) = (0u64, 0);
    for (i, n) in a.sources.iter().enumerate() {
        let image = open::open(graph, *n, &format!("source{i}")).await?;
        create::refuse_same_file(graph, &image, n.name, a.target.name).await?;
        let size = image.node.size();
        end = at + size;
        sources.push(Source {
            has_backing: has_backing(&image.node).await,
            backend: image.backend,
            name: n.name.to_owned(),
            range: ByteRange::new(at, size),
        });
        at = at.checked_add(whole_sectors(size)).ok_or_else(|| {
            Error::invalid("the sources together are longer than an image can be")
        })?;
    }
    let is_new = a.new.is_some();
    if a.compress && is_new && !options::compresses(a.format) {
        return Err(no_compression(a.target.name, a.format));
    }
    if let Some(mut options) = a.new {
        options.set(a.format, "size", Some(&at.to_string()))?;
        let new =
            New { name: a.target.name, format: a.format, options, unchecked: false, quiet: true };
        let made = create::create(graph, new).await;
        made.at(|| format!("cannot create '{}'", a.target.name))?;
    }
    let target = open::open(graph, a.target, "target").await?;
    if target.node.size() < end {
        return Err(Error::invalid(format!(
            "'{}' has {} bytes, too few for {end}",
            a.target.name,
            target.node.size()
        )));
    }
    if target.guessed_raw {
        refuse_header(graph, &sources[0], a.target.name).await?;
    }
    let compressed = match a.compress {
        true => Some(unit_of(&target, a.target.name).await?),
        false => None,
    };
    let fresh = is_new && target.node.driver().reads_zero_when_new();
    let options = Options {
        len: at.min(target.node.size()),
        is_zero: a.is_zero || fresh && !has_backing(&target.node).await,
        sources,
        layered: false,
        target: target.backend.clone(),
        target_name: a.target.name.to_owned(),
        on_backing: a.on_backing,
        shortest_hole: a.shortest_hole,
        search: a.search,
        any_order: a.any_order,
        rate: a.rate,
        salvage: a.salvage,
        compressed,
    };
    let copy = Copy::new(options, progress);
    progress.shown_whole(a.progress, copy.run(threads, a.workers)).await?;
    target.backend.flush().await.at(|| format!("writing '{}'", a.target.name))
}

/// The unit in which the target stores compressed data, in bytes.
async fn unit_of(target: &open::Image, name: &str) -> Result<u64> {
    let unit = target.backend.compresses().await?;
    unit.map(u64::from).ok_or_else(|| no_compression(name, target.node.def().name))
}

fn no_compression(name: &str, format: &str) -> Error {
    Error::unsupported(format!(
        "-c: '{name}' is of format {format}, which cannot store data compressed: take one that \
         can, such as qcow2"
    ))
}

async fn has_backing(node: &Node) -> bool {
    let i = node.def().children.iter().position(|c| c.role == Role::Backing);
    match i.and_then(|i| node.driver().children().get(i)) {
        Some(child) => child.node().await.is_some(),
        None => false,
    }
}

/// A raw image that was only guessed to be one does not get another format's header, which would
/// be believed when it is opened the next time.
async fn refuse_header(graph: &Graph, source: &Source, target: &str) -> Result<()> {
    let first = Buf::new(source.backend.size().min(PROBED) as usize);
    source.backend.read(0, first.clone()).await.at(|| source.name.clone())?;
    match graph.registry().probe(&first.to_vec()) {
        Some(d) if d.name != graph.registry().raw_format => Err(Error::invalid(format!(
            "'{}' begins like an image of format {}, and '{target}' was only guessed to be {}: \
             give its format",
            source.name,
            d.name,
            graph.registry().raw_format
        ))),
        _ => Ok(()),
    }
}

//! `img commit`: what an image holds, written into an image that it stands on.

use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_graph::{Graph, relative_to};
use gipfel_io::Handle;
use serde_json::Value;

use super::copy::{Copy, Options, Source, WORKERS};
use super::open::{self, Cache, Image, Named};
use super::progress::Progress;
use super::{create, info, text};
use crate::daemon::cli::default_io_threads;

const EXAMPLES: &str = "\
Examples:
  gipfel img commit overlay.qcow2
  gipfel img commit -d overlay.qcow2           leaves the overlay as it is
  gipfel img commit -b base.qcow2 overlay.qcow2

Afterwards the overlay is empty, unless -d or -b is given. With -b, the images between the two
show wrong data, and so does all else that stands on the base.";

/// Zeros of at least this many bytes would be left out, if data were searched for them.
const SHORTEST_HOLE: u64 = 4096;

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("commit", "Write an overlay into the image it stands on", EXAMPLES)
        .args(open::writer_args())
        .arg(super::value("cache", Some('t'), "MODE", "Cache mode (default: writeback)"))
        .arg(super::value(
            "base",
            Some('b'),
            "FILE",
            "The image of the chain that is written to (default: the next one)",
        ))
        .arg(super::flag("drop", Some('d'), "Do not empty the overlay"))
        .arg(super::value("rate", Some('r'), "RATE", "Bytes a second at most"))
        .args(super::progress_args())
        .arg(Arg::new("filename").value_name("FILENAME").required(true).help("The overlay"))
}

/// What is committed, and how.
struct Commit<'a> {
    top: Named<'a>,
    base: Option<&'a str>,
    keeps: bool,
    rate: Option<u64>,
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let cache = Cache::parse(text(m, "cache").unwrap_or("writeback")).at(|| "-t")?;
    let name = text(m, "filename").unwrap_or_default();
    let base = text(m, "base");
    let commit = Commit {
        top: Named { cache, alone: true, ..open::named(m, name)? },
        base,
        keeps: m.get_flag("drop") || base.is_some(),
        rate: super::rate(m)?,
    };
    let objects = super::objects(m)?;
    let (progress, show) = (Progress::new(), super::shows(m));
    let left = "the overlay shows what it did; commit it again to end this";
    super::watched(&objects, left, default_io_threads(), &progress, async |graph, threads| {
        let work = commit.carry_out(&graph, &threads, &progress);
        progress.shown_whole(show, work).await.at(|| format!("cannot commit '{name}'"))?;
        if !m.get_flag("quiet") {
            super::print("Image committed.\n")?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

impl Commit<'_> {
    async fn carry_out(
        &self,
        graph: &Rc<Graph>,
        threads: &[Handle],
        progress: &Arc<Progress>,
    ) -> Result<()> {
        let chain = info::chain(graph, self.top, true).await?;
        let below = self.find_base(&chain)?;
        let (name, format) = backing_of(&chain[below - 1]);
        let base = Named {
            name,
            format,
            cache: self.top.cache,
            writable: true,
            resize: true,
            ..Named::default()
        };
        let base = open::open(graph, base, "base").await?;
        let mut layers = Vec::new();
        for i in 0..below {
            let named = match i {
                0 => Named { writable: !self.keeps, ..self.top },
                _ => {
                    let (name, format) = backing_of(&chain[i - 1]);
                    Named { name, format, is_options: false, ..self.top }
                }
            };
            layers.push(open::open(graph, named, &format!("layer{i}")).await?);
        }
        let size = layers[0].node.size();
        if base.node.size() < size {
            let resized = base.node.driver().resize(size).await;
            resized.at(|| format!("making '{name}' as long as the overlay"))?;
        }
        let options = self.options(&layers, &base, name, size);
        Copy::new(options, progress).run(threads, WORKERS).await?;
        base.backend.flush().await.at(|| format!("writing '{name}'"))?;
        match layers[0].node.driver().image_format() {
            Some(format) if !self.keeps => format.make_empty().await.at(|| "emptying the overlay"),
            _ => Ok(()),
        }
    }

    fn options(&self, layers: &[Image], base: &Image, base_name: &str, size: u64) -> Options {
        let source = |l: &Image| Source {
            backend: l.backend.clone(),
            name: l.node.name().to_owned(),
            range: ByteRange::new(0, l.node.size()),
            has_backing: false,
        };
        Options {
            sources: layers.iter().map(source).collect(),
            layered: true,
            target: base.backend.clone(),
            target_name: base_name.to_owned(),
            len: size,
            is_zero: false,
            on_backing: false,
            shortest_hole: SHORTEST_HOLE,
            search: false,
            any_order: false,
            rate: self.rate,
            salvage: None,
            compressed: None,
        }
    }

    /// Which image of the chain is the base.
    fn find_base(&self, chain: &[Value]) -> Result<usize> {
        if chain.len() < 2 {
            return Err(Error::invalid("it stands on no other image"));
        }
        let Some(base) = self.base else { return Ok(1) };
        // As a backing file's name: relative to the image that names it, or to the overlay.
        let is_it = |above: &Value| {
            let name = text_of(above, "full-backing-filename").unwrap_or_default();
            [above, &chain[0]]
                .iter()
                .any(|i| create::same_file(name, &relative_to(text_of(i, "filename"), base)))
        };
        let above = chain[..chain.len() - 1].iter().position(is_it);
        above.map(|i| i + 1).ok_or_else(|| {
            Error::invalid(format!("'{base}' is not in the chain of images that it stands on"))
        })
    }
}

fn text_of<'a>(info: &'a Value, key: &str) -> Option<&'a str> {
    info.get(key).and_then(Value::as_str)
}

/// Name and format of the image below one.
fn backing_of(info: &Value) -> (&str, Option<&str>) {
    let name = text_of(info, "full-backing-filename").unwrap_or_default();
    (name, text_of(info, "backing-filename-format"))
}

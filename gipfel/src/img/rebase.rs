//! `img rebase`: another image for one to stand on.
//!
//! The safe way keeps what the image shows: where the old and the new chain below it differ, it
//! gets the old chain's data before its header is changed. So an interruption at any point leaves
//! an image that shows the same.

use std::process::ExitCode;
use std::rc::Rc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::units::MIB;
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_graph::{Graph, relative_to};
use gipfel_io::Buf;
use gipfel_node::{BackingName, ImageFormat};
use serde_json::Value;

use super::open::{self, Cache, Image, Named};
use super::progress::Progress;
use super::view::{self, both};
use super::{create, info, text};

const EXAMPLES: &str = "\
Examples:
  gipfel img rebase -b base.qcow2 -F qcow2 disk.qcow2
  gipfel img rebase -b '' disk.qcow2                     stands on its own
  gipfel img rebase -u -b moved.raw -F raw disk.qcow2    only writes the name

Without -u the disk shows what it did before.";

/// Data are compared in pieces of this size, in bytes (but at least a cluster).
const PIECE: u64 = 2 * MIB;

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("rebase", "Let an image stand on another one", EXAMPLES)
        .args(open::args())
        .arg(super::value("cache", Some('t'), "MODE", "Cache mode (default: writeback)"))
        .arg(super::value("backing", Some('b'), "FILE", "What it is to stand on; '' for nothing"))
        .arg(super::value("backing-format", Some('F'), "FORMAT", "Format of that image"))
        .arg(super::value("backing-cache", Some('T'), "MODE", "Its cache mode (writeback)"))
        .arg(super::flag("backing-unsafe", Some('u'), "Only write the name, whatever it shows"))
        .arg(super::flag("compress", Some('c'), "Compress what is copied").hide(true))
        .args(super::progress_args())
        .arg(Arg::new("filename").value_name("FILENAME").required(true).help("The image"))
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let cache = |name, option: &'static str| {
        Cache::parse(text(m, name).unwrap_or("writeback")).at(|| option)
    };
    let (cache, below) = (cache("cache", "-t")?, cache("backing-cache", "-T")?);
    let name = text(m, "filename").unwrap_or_default();
    let named = open::named(m, name)?;
    let is_unsafe = m.get_flag("backing-unsafe");
    if text(m, "backing").is_none() && !is_unsafe {
        return Err(Error::invalid("say what it is to stand on (-b), or -u for nothing at once"));
    }
    if m.get_flag("compress") && !is_unsafe {
        return Err(Error::unsupported("--compress: writing compressed data is not offered yet"));
    }
    let rebase = Rebase {
        // What is shared are the images below: this one is written.
        top: Named { cache, writable: true, alone: true, share: false, ..named },
        below: Named { cache: below, share: named.share, ..Named::default() },
        new: text(m, "backing").filter(|b| !b.is_empty()),
        format: text(m, "backing-format"),
        is_unsafe,
    };
    let objects = super::objects(m)?;
    let (progress, show) = (Progress::new(), super::shows(m));
    let left = "the image shows what it did; begin again to end this";
    super::watched(&objects, left, 0, &progress, async |graph, _| {
        let work = rebase.carry_out(&graph, &progress);
        progress.shown_whole(show, work).await.at(|| format!("cannot rebase '{name}'"))?;
        Ok(ExitCode::SUCCESS)
    })
}

struct Rebase<'a> {
    top: Named<'a>,
    /// How the images below are opened.
    below: Named<'a>,
    new: Option<&'a str>,
    format: Option<&'a str>,
    is_unsafe: bool,
}

/// The image, and the chains that it stands on and is to stand on.
struct Three {
    top: Image,
    old: Option<Image>,
    new: Option<Image>,
    cluster: u64,
}

impl Rebase<'_> {
    async fn carry_out(&self, graph: &Rc<Graph>, progress: &Progress) -> Result<()> {
        if let Some(f) = self.format {
            graph.registry().get(f)?;
        }
        let reader = Named { writable: false, ..self.top };
        let seen = info::chain(graph, reader, false).await?.remove(0);
        let own = seen.get("filename").and_then(Value::as_str);
        if let (Some(new), None) = (self.new, self.format) {
            return Err(create::no_backing_format(graph, &relative_to(own, new)).await);
        }
        let top = open::open(graph, self.top, "image").await?;
        let node = top.node.clone();
        let format = node.driver().image_format().ok_or_else(|| {
            let name = node.def().name;
            Error::unsupported(format!("images of format '{name}' stand on no other image"))
        })?;
        if !self.is_unsafe {
            let [old, new] = self.chains(graph, &seen, own).await?;
            let cluster = seen.get("cluster-size").and_then(Value::as_u64).unwrap_or(512);
            let three = Three { top, old, new, cluster };
            three.keep_contents(progress).await?;
        }
        self.put_name(format).await
    }

    async fn put_name(&self, format: &dyn ImageFormat) -> Result<()> {
        let name = self.new.map(|file| BackingName {
            file: file.to_owned(),
            format: self.format.map(str::to_owned),
        });
        format.set_backing(name).await
    }

    /// The old and the new chain.
    async fn chains(
        &self,
        graph: &Rc<Graph>,
        seen: &Value,
        own: Option<&str>,
    ) -> Result<[Option<Image>; 2]> {
        let text = |key: &str| seen.get(key).and_then(Value::as_str);
        let old = match text("full-backing-filename") {
            Some(name) => {
                let format = text("backing-filename-format");
                let named = Named { name, format, ..self.below };
                Some(open::open(graph, named, "old").await.at(|| "its present backing image")?)
            }
            None => None,
        };
        let new = match self.new {
            Some(name) => {
                let name = relative_to(own, name);
                let named = Named { name: &name, format: self.format, ..self.below };
                Some(open::open(graph, named, "new").await.at(|| "its new backing image")?)
            }
            None => None,
        };
        Ok([old, new])
    }
}

impl Three {
    /// Lets the image hold itself what the chains show differently.
    async fn keep_contents(&self, progress: &Progress) -> Result<()> {
        let all = ByteRange::new(0, self.top.node.size());
        progress.set_total(all.len());
        let mut left = all;
        while !left.is_empty() {
            let (s, _) = view::status(&self.top, left).await?;
            let mut part = left.take(s.len);
            if !s.allocated {
                part = self.alike(part).await?;
                if !part.is_empty() {
                    left = left.skip(part.len());
                    progress.set_done(all.len() - left.len());
                    continue;
                }
                let piece = PIECE.max(self.cluster);
                part = left.take(s.len).take(piece - left.start() % piece);
                self.keep(part).await?;
            }
            left = left.skip(part.len());
            progress.set_done(all.len() - left.len());
        }
        self.top.backend.flush().await
    }

    /// How much from the start of `range` on both chains are known to show as zeros, in clusters.
    async fn alike(&self, range: ByteRange) -> Result<ByteRange> {
        let (old, new) = both(zeros(&self.old, range), zeros(&self.new, range)).await?;
        let n = old.min(new);
        let whole = if n == range.len() { n } else { n - (range.start() + n) % self.cluster };
        // A cluster that is zeros in part only is looked at.
        Ok(range.take(if n < self.cluster { 0 } else { whole }))
    }

    /// Writes what the old chain shows in the clusters of `range` in which the new one shows
    /// something else.
    async fn keep(&self, range: ByteRange) -> Result<()> {
        let (old, new) = both(read(&self.old, range), read(&self.new, range)).await?;
        let mut at = 0;
        while at < old.len() {
            let differs = |from: usize| {
                let to = (from + self.cluster as usize).min(old.len());
                (to, old.slice(from..to).first_difference(&new.slice(from..to)).is_some())
            };
            let (mut end, differ) = differs(at);
            while differ && end < old.len() {
                let (next, more) = differs(end);
                if !more {
                    break;
                }
                end = next;
            }
            if differ {
                // Zeros too as data: the format knows nothing of the new chain, and would leave out
                // those that the old one shows by itself.
                let part = old.slice(at..end);
                self.top.backend.write(range.start() + at as u64, part, false).await?;
            }
            at = end;
        }
        Ok(())
    }
}

/// For how many bytes from the start of `range` on a chain is known to show zeros.
async fn zeros(image: &Option<Image>, range: ByteRange) -> Result<u64> {
    let Some(image) = image else { return Ok(range.len()) };
    let mut left = range;
    while !left.is_empty() {
        let (s, _) = view::status(image, left).await?;
        if !s.zero {
            break;
        }
        left = left.skip(s.len);
    }
    Ok(range.len() - left.len())
}

async fn read(image: &Option<Image>, range: ByteRange) -> Result<Buf> {
    let buf = Buf::new(range.len() as usize);
    match image {
        Some(i) => view::read(i, range.start(), buf.clone()).await?,
        None => buf.fill(0),
    }
    Ok(buf)
}

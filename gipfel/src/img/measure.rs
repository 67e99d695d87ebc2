//! `img measure`: how large the file of a new image becomes.

use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_node::ImageSize;
use serde_json::{Map, json};

use super::open::{self, Image};
use super::options::{self, Asked, Given};
use super::{Output, view};
use crate::drivers;

const EXAMPLES: &str = "\
Examples:
  gipfel img measure -O qcow2 --size 20G
  gipfel img measure -O qcow2 -o cluster_size=128k disk.raw
  gipfel img measure -O raw --output=json disk.qcow2

The required size holds what the image begins with, the fully allocated size all that can be
written to it.";

/// Largest size of a disk, in bytes.
const MAX_SIZE: u64 = i64::MAX as u64;

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("measure", "Tell how large a new image becomes", EXAMPLES)
        .args(open::args())
        .arg(super::value("target-format", Some('O'), "FORMAT", "Its format (default: raw)"))
        .arg(super::create::options_arg("options"))
        .arg(super::value("size", None, "SIZE", "It is made empty with this size"))
        .arg(super::value("snapshot", Some('l'), "SNAPSHOT", "Of an internal snapshot").hide(true))
        .arg(super::output_arg())
        .arg(
            Arg::new("filename")
                .value_name("FILENAME")
                .num_args(0..)
                .help("It is made by converting this image"),
        )
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let output = super::output(m)?;
    let size = super::number(m, "size", 0, MAX_SIZE)?;
    let mut names = super::texts(m, "filename");
    let name = names.next();
    match (name, size) {
        _ if names.next().is_some() => {
            return Err(Error::invalid("give one image, not several"));
        }
        (Some(_), Some(_)) => {
            return Err(Error::invalid("give the size of a new image (--size) or one to convert"));
        }
        (None, None) => {
            return Err(Error::invalid("say of what: give --size, or an image to convert"));
        }
        (None, Some(_)) if of_image(m) => {
            return Err(Error::invalid("--image-opts, -f and -l go with an image to convert"));
        }
        _ => {}
    }
    if super::text(m, "snapshot").is_some() {
        return Err(Error::unsupported("--snapshot: internal snapshots are not offered yet"));
    }
    let format = super::text(m, "target-format").unwrap_or("raw");
    super::on_graph(m, "nothing was changed", async |graph| {
        let mut report = Map::new();
        let (size, units) = match name {
            None => (measure(m, format, size.unwrap_or_default())?.0, 0),
            Some(name) => {
                let image = open::open(&graph, open::named(m, name)?, "image").await?;
                let (mut size, given) = measure(m, format, view::size(&image))?;
                // Over a backing image zeros are stored too, for it would show there.
                size.whole |= given.get("backing_file").is_some();
                let at = || format!("looking at '{name}'");
                if has_bitmaps(&image, format, &given).await.at(at)? {
                    report.insert("bitmaps".into(), json!(0));
                }
                let units = if size.whole { 0 } else { units(&image, size.unit).await.at(at)? };
                (size, units)
            }
        };
        report.insert("required".into(), json!(size.required(units)));
        report.insert("fully-allocated".into(), json!(size.full()));
        super::print(&match output {
            Output::Json => super::to_json(&report.into()),
            Output::Human => {
                let label = |k, name| report.get(k).map(|v| format!("{name} size: {v}\n"));
                [
                    label("required", "required"),
                    label("fully-allocated", "fully allocated"),
                    label("bitmaps", "bitmaps"),
                ]
                .into_iter()
                .flatten()
                .collect()
            }
        })?;
        Ok(ExitCode::SUCCESS)
    })
}

fn of_image(m: &ArgMatches) -> bool {
    m.get_flag("image-opts")
        || super::text(m, "format").is_some()
        || super::text(m, "snapshot").is_some()
}

/// What an image of this format and size takes, and the options that it is made with.
fn measure(m: &ArgMatches, format: &str, size: u64) -> Result<(ImageSize, Given)> {
    let measure = drivers::measure(format).ok_or_else(|| {
        Error::unsupported(format!("how large images of format '{format}' become is not known"))
    })?;
    let Asked::Options(mut given) = options::read(format, super::texts(m, "options"))? else {
        return Err(Error::invalid(format!(
            "options are listed by 'create': gipfel img create -f {format} -o help"
        )));
    };
    given.set(format, "size", Some(&super::whole_sectors(size).to_string()))?;
    let (mut image, _) = given.values(format)?;
    image.remove("driver");
    Ok((measure(image.into())?, given))
}

/// Whether both the image and the new one could have bitmaps. (None are copied, for this version
/// does not read them.)
async fn has_bitmaps(image: &Image, new: &str, given: &Given) -> Result<bool> {
    let is_old = |compat: Option<&str>| matches!(compat, Some("0.10" | "v2"));
    let info = image.node.driver().info().await?.specific.unwrap_or_default();
    let compat = info.pointer("/data/compat").and_then(|c| c.as_str());
    let keeps = drivers::keeps_bitmaps;
    Ok(keeps(new)
        && !is_old(given.get("compat"))
        && keeps(image.node.def().name)
        && !is_old(compat))
}

/// How many pieces of `unit` bytes hold data.
async fn units(image: &Image, unit: u64) -> Result<u64> {
    let mut left = ByteRange::new(0, view::size(image));
    // The first piece that is not counted yet.
    let (mut count, mut next) = (0, 0);
    while !left.is_empty() {
        let (s, _) = view::status(image, left).await?;
        let part = left.take(s.len);
        if !s.zero {
            let first = (part.start() / unit).max(next);
            next = part.end().div_ceil(unit);
            count += next - first.min(next);
        }
        left = left.skip(part.len());
    }
    Ok(count)
}

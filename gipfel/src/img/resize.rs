//! `img resize`: a disk made longer or shorter.

use std::process::ExitCode;
use std::rc::Rc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::units::{MIB, parse_size};
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_graph::{Backend, Graph};
use gipfel_io::Buf;
use gipfel_node::{Node, Preallocation, ZeroFlags};

use super::open::{self, Named};
use super::options::{self, Asked};

const EXAMPLES: &str = "\
Examples:
  gipfel img resize disk.qcow2 20G
  gipfel img resize -f raw disk.raw +1G
  gipfel img resize --preallocation=falloc disk.qcow2 +10G
  gipfel img resize --shrink disk.qcow2 -1G

What is new reads as zeros. Making a disk shorter loses what lies behind its new end: shrink the
file systems and partitions in it first.";

/// Zeros are written in pieces of this size, in bytes.
const PIECE: u64 = MIB;

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("resize", "Make a disk longer or shorter", EXAMPLES)
        .args(open::writer_args())
        .arg(super::value(
            "preallocation",
            None,
            "MODE",
            "Space made ready for what is new: off, metadata, falloc, full",
        ))
        .arg(super::flag("shrink", None, "The disk may become shorter, and lose what is cut off"))
        .arg(super::flag("quiet", Some('q'), "Print nothing but errors"))
        .arg(Arg::new("filename").value_name("FILENAME").required(true).help("The image"))
        .arg(
            Arg::new("size")
                .value_name("[+|-]SIZE")
                .required(true)
                .allow_hyphen_values(true)
                .help("Its new size, or how much longer or shorter it becomes"),
        )
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let name = super::text(m, "filename").unwrap_or_default();
    let named = Named { writable: true, resize: true, ..open::named(m, name)? };
    let size = Size::parse(super::text(m, "size").unwrap_or_default())?;
    let mode = super::text(m, "preallocation").unwrap_or("off");
    super::on_graph(m, "the image may have either size", async |graph| {
        resize(&graph, named, size, mode, m.get_flag("shrink")).await?;
        if !m.get_flag("quiet") {
            super::print("Image resized.\n")?;
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// A size as the command line gives it, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    To(u64),
    Longer(u64),
    Shorter(u64),
}

impl Size {
    fn parse(text: &str) -> Result<Size> {
        let number = |t: &str| parse_size(t.trim_start()).at(|| "SIZE");
        if let Some(t) = text.strip_prefix('+') {
            return number(t).map(Size::Longer);
        }
        if let Some(t) = text.strip_prefix('-') {
            return number(t).map(Size::Shorter);
        }
        number(text).map(Size::To)
    }

    /// The size that it makes of `old`.
    fn of(self, old: u64) -> Result<u64> {
        let new = match self {
            Size::To(n) => Some(n),
            Size::Longer(n) => old.checked_add(n),
            Size::Shorter(n) => old.checked_sub(n),
        };
        new.filter(|n| (1..=i64::MAX as u64).contains(n))
            .ok_or_else(|| Error::invalid(format!("it has {old} bytes, and can get 1 to 2^63 - 1")))
    }
}

async fn resize(
    graph: &Rc<Graph>,
    named: Named<'_>,
    size: Size,
    mode: &str,
    may_shrink: bool,
) -> Result<()> {
    let image = open::open(graph, named, "image").await?;
    let at = || format!("cannot resize '{}'", named.name);
    let old = super::view::size(&image);
    let new = size.of(old).at(at)?;
    let how = preallocation(image.node.def().name, mode).at(at)?;
    if new < old && how.is_some() {
        return Err(Error::invalid("space is made ready (--preallocation) for longer disks only"));
    }
    if new < old && !may_shrink {
        return Err(Error::invalid(format!(
            "'{}' would lose the last {} of its {old} bytes: give --shrink if no data lie there \
             that are needed",
            named.name,
            old - new
        )));
    }
    image.node.driver().resize(new).await.at(at)?;
    if let Some(how) = how.filter(|_| new > old) {
        let range = ByteRange::between(old, new);
        preallocate(&image.node, &image.backend, range, how).await.at(at)?;
    }
    image.backend.flush().await.at(at)
}

/// Reads a mode, which must be one that images of `format` can be made with.
pub fn preallocation(format: &str, mode: &str) -> Result<Option<Preallocation>> {
    let how = match mode {
        "off" => return Ok(None),
        "metadata" => Preallocation::Metadata,
        "falloc" => Preallocation::Falloc,
        "full" => Preallocation::Full,
        _ => {
            return Err(Error::invalid(format!(
                "--preallocation is off, metadata, falloc or full, not '{mode}'"
            )));
        }
    };
    match options::read(format, [format!("preallocation={mode}").as_str()].into_iter())? {
        Asked::Options(_) | Asked::Help => Ok(Some(how)),
    }
}

/// Gives `range`, which is new, its space.
pub async fn preallocate(
    node: &Node,
    backend: &Backend,
    range: ByteRange,
    how: Preallocation,
) -> Result<()> {
    if let Some(format) = node.driver().image_format() {
        return format.preallocate(range, how).await;
    }
    if how == Preallocation::Falloc {
        return backend.write_zeroes(range, ZeroFlags::default()).await;
    }
    let zeros = Buf::zeroed(PIECE.min(range.len()) as usize);
    let mut left = range;
    while !left.is_empty() {
        let part = zeros.slice(0..left.take(PIECE).len() as usize);
        backend.write(left.start(), part, false).await?;
        left = left.skip(PIECE);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_absolute_or_relative() {
        let of = |t: &str, old: u64| Size::parse(t).and_then(|s| s.of(old)).ok();
        assert_eq!(of("2M", 7), Some(2 << 20));
        assert_eq!(of("+1k", 512), Some(1536));
        assert_eq!(of("-1k", 4096), Some(3072));
        assert_eq!(of("-0", 4096), Some(4096));
        for bad in ["0", "-4k", "-8k", "9E", "+9E", "x", "+", "-", "", "--1"] {
            assert_eq!(of(bad, 4096), None, "{bad}");
        }
    }
}

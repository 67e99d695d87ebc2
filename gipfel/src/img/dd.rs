//! `img dd`: a part of an image as a new one, with the operands of dd(1).

use std::process::ExitCode;
use std::rc::Rc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::units::{MIB, parse_size};
use gipfel_base::{Error, Result, ResultExt};
use gipfel_graph::Graph;
use gipfel_io::Buf;

use super::create::{self, New};
use super::open::{self, Image, Named};
use super::options::{self, Asked};
use super::view::{self, both};

const EXAMPLES: &str = "\
Examples:
  gipfel img dd bs=1M count=16 if=disk.raw of=start.raw
  gipfel img dd -f qcow2 -O raw bs=1M skip=1 if=disk.qcow2 of=rest.raw

Operands: if=INPUT, of=OUTPUT, bs=SIZE of a block (512), count=BLOCKS at which the input ends,
skip=BLOCKS of the input that are left out at its start. The output is overwritten.";

/// Data are copied in pieces of this size, in bytes.
const PIECE: u64 = MIB;

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("dd", "Copy a part of an image", EXAMPLES)
        .args(open::args())
        .arg(super::value("output-format", Some('O'), "FORMAT", "Of the output (default: raw)"))
        .arg(
            Arg::new("operands").value_name("OPERAND").num_args(0..).help("if=INPUT of=OUTPUT ..."),
        )
}

/// What the operands say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Operands {
    input: Option<String>,
    output: Option<String>,
    block: Option<u64>,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse<'a>(texts: impl Iterator<Item = &'a str>) -> Result<Operands> {
        let mut o = Operands::default();
        for text in texts {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            let at = || format!("operand '{text}'");
            match name {
                "if" => o.input = Some(value.to_owned()),
                "of" => o.output = Some(value.to_owned()),
                "bs" => {
                    let n = parse_size(value).at(at)?;
                    if !(1..=i32::MAX as u64).contains(&n) {
                        return Err(Error::invalid("take 1 to 2147483647 bytes")).at(at);
                    }
                    o.block = Some(n);
                }
                "count" => o.count = Some(blocks(value).at(at)?),
                "skip" => o.skip = blocks(value).at(at)?,
                _ => {
                    return Err(Error::invalid(format!(
                        "there is no operand '{text}': they are if=, of=, bs=, count=, skip="
                    )));
                }
            }
        }
        Ok(o)
    }

    /// Where in an input of `size` bytes the copy begins and ends; none where nothing is left.
    fn part(&self, size: u64) -> Option<(u64, u64)> {
        let block = self.block.unwrap_or(512);
        let end = match self.count {
            Some(n) => size.min(n.saturating_mul(block)),
            None => size,
        };
        let start = self.skip.checked_mul(block)?;
        (start <= end).then_some((start, end))
    }
}

fn blocks(text: &str) -> Result<u64> {
    match text.parse::<u64>() {
        Ok(n) if n <= i64::MAX as u64 => Ok(n),
        _ => Err(Error::invalid("take a number of blocks")),
    }
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let operands = Operands::parse(super::texts(m, "operands"))?;
    let (Some(input), Some(output)) = (&operands.input, &operands.output) else {
        return Err(Error::invalid("both are needed: if=INPUT and of=OUTPUT"));
    };
    let source = open::named(m, input)?;
    let format = super::text(m, "output-format").unwrap_or("raw");
    super::on_graph(m, "the output is incomplete", async |graph| {
        let source = open::open(&graph, source, "source").await?;
        create::refuse_same_file(&graph, &source, input, output).await?;
        let (start, end) = operands.part(view::size(&source)).unwrap_or_else(|| {
            eprintln!("warning: '{input}' ends before the blocks that are to be skipped");
            (0, 0)
        });
        let target = make(&graph, output, format, end - start).await?;
        copy(&source, start, end, &target).await.at(|| format!("copying to '{output}'"))?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Makes the output and opens it.
async fn make(graph: &Rc<Graph>, name: &str, format: &str, size: u64) -> Result<Image> {
    graph.registry().get(format)?;
    let Asked::Options(mut given) = options::read(format, std::iter::empty())? else {
        unreachable!("no option asks for help");
    };
    given.set(format, "size", Some(&size.to_string()))?;
    let new = New { name, format, options: given, unchecked: false, quiet: true };
    create::create(graph, new).await.at(|| format!("cannot create '{name}'"))?;
    let named = Named { name, format: Some(format), writable: true, ..Named::default() };
    open::open(graph, named, "target").await
}

/// Copies the bytes from `start` to `end`, each piece read while the one before is written.
async fn copy(source: &Image, start: u64, end: u64, target: &Image) -> Result<()> {
    let read = async |at: u64| {
        let buf = Buf::new(PIECE.min(end - at) as usize);
        view::read(source, at, buf.clone()).await.map(|()| buf)
    };
    let mut at = start;
    let mut next = if at < end { Some(read(at).await?) } else { None };
    while let Some(buf) = next {
        let after = at + buf.len() as u64;
        let write = target.backend.write(at - start, buf, false);
        let ahead = async { if after < end { read(after).await.map(Some) } else { Ok(None) } };
        ((), next) = both(write, ahead).await?;
        at = after;
    }
    target.backend.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_name_a_part() {
        let part = |texts: &[&str]| Operands::parse(texts.iter().copied()).map(|o| o.part(10_240));
        assert_eq!(part(&[]).unwrap(), Some((0, 10_240)));
        assert_eq!(part(&["bs=4k", "skip=2", "count=5"]).unwrap(), Some((8192, 10_240)));
        assert_eq!(part(&["skip=20"]).unwrap(), Some((10_240, 10_240)));
        assert_eq!(part(&["skip=21"]).unwrap(), None);
        assert_eq!(part(&["skip=1", "count=3"]).unwrap(), Some((512, 1536)));
        assert_eq!(part(&["skip=9223372036854775807"]).unwrap(), None);
        for bad in ["bs=0", "bs=2G", "bs=x", "count=-1", "count=1k", "skip=", "seek=1", "foo"] {
            assert!(part(&[bad]).is_err(), "{bad}");
        }
    }
}

//! `img map`: which parts of a disk hold data, and where they lie.

use std::io::Write;
use std::process::ExitCode;
use std::rc::Rc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::units::parse_size;
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_graph::Graph;

use super::Output;
use super::open::{self, Image, Named};

const EXAMPLES: &str = "\
Examples:
  gipfel img map disk.qcow2
  gipfel img map --output=json --start-offset=1G --max-length=16M disk.raw

The table lists what lies as it is in some file. JSON lists everything, zeros and compressed
parts included.";

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("map", "Tell where the parts of a disk lie", EXAMPLES)
        .args(open::args())
        .arg(super::output_arg())
        .arg(super::value("start-offset", Some('s'), "OFFSET", "Where on the disk to begin"))
        .arg(super::value("max-length", Some('l'), "LENGTH", "How far to go from there"))
        .arg(Arg::new("filename").value_name("FILENAME").required(true).help("The image"))
}

/// A part of the disk of which the same is known throughout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Extent {
    start: u64,
    len: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
}

impl Extent {
    /// Takes `next` in, if it only goes on with the same.
    fn join(&mut self, next: &Extent) -> bool {
        let offset = match (self.offset, next.offset) {
            (Some(a), Some(b)) => a + self.len == b,
            (None, None) => true,
            _ => false,
        };
        let goes_on = Extent { start: self.start, len: self.len, offset: self.offset, ..*next };
        let same = offset && self.start + self.len == next.start && *self == goes_on;
        if same {
            self.len += next.len;
        }
        same
    }
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let output = super::output(m)?;
    let number = |name: &str| {
        super::text(m, name).map(|t| parse_size(t).at(|| format!("--{name}"))).transpose()
    };
    let (start, most) = (number("start-offset")?.unwrap_or(0), number("max-length")?);
    let name = super::text(m, "filename").unwrap_or_default();
    let named = open::named(m, name)?;
    super::on_graph(m, "nothing was changed", async |graph| {
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        let told = map(&graph, named, start, most, output, &mut out).await;
        match told.and_then(|()| Ok(out.flush()?)) {
            // Nobody reads on.
            Err(e) if e.errno() == EPIPE => Ok(ExitCode::SUCCESS),
            r => r.map(|()| ExitCode::SUCCESS),
        }
    })
}

const EPIPE: i32 = 32;

async fn map(
    graph: &Rc<Graph>,
    named: Named<'_>,
    start: u64,
    most: Option<u64>,
    output: Output,
    out: &mut impl Write,
) -> Result<()> {
    let image = open::open(graph, named, "image").await?;
    let files = graph.chain_files(image.node.name()).await?;
    let mut table = Table { output, files, first: true, out };
    let size = super::whole_sectors(image.node.size());
    let end = start.saturating_add(most.unwrap_or(u64::MAX)).min(size);
    table.head()?;
    let mut at = start;
    let mut open = Extent { start, ..Extent::default() };
    while at < end {
        let next = look(&image, at, end).await?;
        at += next.len;
        if open.len == 0 {
            open = next;
        } else if !open.join(&next) {
            table.row(&open)?;
            open = next;
        }
    }
    table.row(&open)?;
    table.tail()
}

/// What is known of the disk from `at` on, at most up to `end`.
async fn look(image: &Image, at: u64, end: u64) -> Result<Extent> {
    let size = image.node.size();
    if at >= size {
        // The rest of a last sector that the image does not fill: it reads as zeros.
        let last = image.backend.status(ByteRange::new(size.saturating_sub(1), 1)).await?;
        let offset = last.0.at.map(|o| o + 1);
        let present = last.0.allocated;
        let len = end - at;
        return Ok(Extent { start: at, len, present, zero: true, offset, ..Extent::default() });
    }
    let (s, depth) = image.backend.status(ByteRange::between(at, end.min(size))).await?;
    Ok(Extent {
        start: at,
        len: s.len,
        depth,
        present: s.allocated,
        zero: s.zero,
        data: s.data,
        compressed: s.compressed,
        offset: s.at,
    })
}

struct Table<'a, W> {
    output: Output,
    /// The file of each image of the chain.
    files: Vec<String>,
    first: bool,
    out: &'a mut W,
}

impl<W: Write> Table<'_, W> {
    fn head(&mut self) -> Result<()> {
        match self.output {
            Output::Human => {
                writeln!(self.out, "{:<15} {:<15} {:<15} File", "Offset", "Length", "Mapped to")?;
            }
            Output::Json => write!(self.out, "[")?,
        }
        Ok(())
    }

    fn row(&mut self, e: &Extent) -> Result<()> {
        match self.output {
            Output::Json => {
                let comma = if std::mem::take(&mut self.first) { "" } else { ",\n" };
                write!(
                    self.out,
                    "{comma}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \
                     \"zero\": {}, \"data\": {}, \"compressed\": {}",
                    e.start, e.len, e.depth, e.present, e.zero, e.data, e.compressed
                )?;
                if let Some(o) = e.offset {
                    write!(self.out, ", \"offset\": {o}")?;
                }
                write!(self.out, "}}")?;
            }
            Output::Human if e.data && !e.zero => {
                let Some(o) = e.offset.filter(|_| !e.compressed) else {
                    return Err(Error::unsupported(format!(
                        "the {} bytes at {:#x} lie in no file as they are \
                         (they are compressed, say): use --output=json",
                        e.len, e.start
                    )));
                };
                let file = self.files.get(e.depth as usize).map_or("", String::as_str);
                let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
                let (start, len, at) = (hex(e.start), hex(e.len), hex(o));
                writeln!(self.out, "{start:<15} {len:<15} {at:<15} {file}")?;
            }
            Output::Human => {}
        }
        Ok(())
    }

    fn tail(&mut self) -> Result<()> {
        if self.output == Output::Json {
            writeln!(self.out, "]")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Extent;

    #[test]
    fn extents_join_where_nothing_changes() {
        let a = Extent { start: 0, len: 512, data: true, offset: Some(0), ..Extent::default() };
        let b = Extent { start: 512, offset: Some(512), ..a };
        let mut joined = a;
        assert!(joined.join(&b) && joined.len == 1024);
        assert!(!joined.join(&b));
        let mut apart = a;
        assert!(!apart.join(&Extent { offset: Some(4096), ..b }));
        assert!(!apart.join(&Extent { zero: true, ..b }));
        assert!(!apart.join(&Extent { offset: None, ..b }));
    }
}

//! `img compare`: whether two images show the same.

use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::units::{MIB, SECTOR};
use gipfel_base::{ByteRange, Error, Result, ResultExt};
use gipfel_io::Buf;
use gipfel_node::Status;

use super::open::{self, Cache, Image, Named};
use super::progress::Progress;
use super::view::{self, both};

const EXAMPLES: &str = "\
Examples:
  gipfel img compare disk.raw disk.qcow2
  gipfel img compare -s -f qcow2 -F qcow2 a.qcow2 b.qcow2

Zeros are zeros, stored or not, also past the end of the shorter image; with -s the size and
what is stored count too. Exit status: 0 the same, 1 different, 2 an image could not be opened,
3 what is stored could not be found out, 4 data could not be read.";

const DIFFERENT: u8 = 1;
const NOT_OPENED: u8 = 2;
const NO_STATUS: u8 = 3;
const NOT_READ: u8 = 4;

/// Data are compared in pieces of this size, in bytes.
const PIECE: u64 = 2 * MIB;

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("compare", "Tell whether two images show the same", EXAMPLES)
        .args(open::args())
        .mut_arg("format", |a| a.visible_alias("a-format"))
        .arg(super::value("b-format", Some('F'), "FORMAT", "The second image's format"))
        .arg(super::value("cache", Some('T'), "MODE", "Cache mode (default: writeback)"))
        .arg(super::flag("strict", Some('s'), "Compare size and what is stored, too"))
        .args(super::progress_args())
        .args(["first", "second"].map(|name| {
            Arg::new(name).value_name("FILENAME").required(true).help("One of the two images")
        }))
}

/// Why a comparison ended early.
enum End {
    /// A difference was found: the message.
    Differ(String),
    /// This went wrong; the command's exit status.
    Failed(u8, Error),
}

impl From<Error> for End {
    fn from(e: Error) -> End {
        End::Failed(NOT_READ, e)
    }
}

fn or<T>(code: u8, r: Result<T>) -> Result<T, End> {
    r.map_err(|e| End::Failed(code, e))
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let prepared = super::objects(m).and_then(|o| Ok((o, images(m)?)));
    let (objects, [first, second]) = match prepared {
        Ok(p) => p,
        Err(e) => return Ok(failed(NOT_OPENED, &e)),
    };
    let (strict, quiet, show) = (m.get_flag("strict"), m.get_flag("quiet"), super::shows(m));
    let progress = Progress::new();
    super::watched(&objects, "nothing was changed", 0, &progress, async |graph, _| {
        let mut same = String::new();
        let done = progress.shown(show, async {
            let a = or(NOT_OPENED, open::open(&graph, first, "first").await)?;
            let b = or(NOT_OPENED, open::open(&graph, second, "second").await)?;
            let pair = Pair { a, b, names: [first.name, second.name], strict };
            pair.compare(quiet, &progress).await
        });
        let (text, code) = match done.await {
            Ok(()) => ("Images are identical.".to_owned(), ExitCode::SUCCESS),
            Err(End::Differ(text)) => (text, ExitCode::from(DIFFERENT)),
            Err(End::Failed(code, e)) => (String::new(), failed(code, &e)),
        };
        if !quiet && !text.is_empty() {
            same = format!("{text}\n");
        }
        if show {
            same.push('\n');
        }
        super::print(&same)?;
        Ok(code)
    })
}

fn failed(code: u8, e: &Error) -> ExitCode {
    crate::complain(e);
    ExitCode::from(code)
}

fn images(m: &ArgMatches) -> Result<[Named<'_>; 2]> {
    let cache = Cache::parse(super::text(m, "cache").unwrap_or("writeback")).at(|| "-T")?;
    let named = |name: &str, format: &str| {
        let name = super::text(m, name).unwrap_or_default();
        open::named_as(m, name, format).map(|n| Named { cache, ..n })
    };
    Ok([named("first", "format")?, named("second", "b-format")?])
}

/// The two images.
struct Pair<'a> {
    a: Image,
    b: Image,
    names: [&'a str; 2],
    strict: bool,
}

impl Pair<'_> {
    async fn compare(&self, quiet: bool, progress: &Progress) -> Result<(), End> {
        let sizes = [view::size(&self.a), view::size(&self.b)];
        let (shorter, longer) = (sizes[0].min(sizes[1]), sizes[0].max(sizes[1]));
        if self.strict && shorter < longer {
            return Err(End::Differ("Strict mode: Image size mismatch!".into()));
        }
        progress.set_total(longer);
        let mut left = ByteRange::new(0, shorter);
        let mut doubtful = None;
        while !left.is_empty() {
            let n = self.compare_some(left, &mut doubtful).await?;
            left = left.skip(n);
            progress.set_done(shorter - left.len());
        }
        if shorter == longer {
            return Ok(());
        }
        if !quiet {
            super::print("Warning: Image size mismatch!\n")?;
        }
        let i = usize::from(sizes[1] > sizes[0]);
        let image = if i == 0 { &self.a } else { &self.b };
        let mut left = ByteRange::between(shorter, longer);
        while !left.is_empty() {
            let known = view::status(image, left).await.at(|| self.names[i].to_owned());
            let (s, _) = or(NO_STATUS, known)?;
            let part = left.take(s.len);
            let part = if s.zero { part } else { part.take(PIECE) };
            if !s.zero {
                let buf = self.read(i, part).await?;
                differ(&buf, &Buf::zeroed(buf.len()), part)?;
            }
            left = left.skip(part.len());
            progress.set_done(longer - left.len());
        }
        Ok(())
    }

    /// Compares the first bytes of `range`; gives how many. `doubtful` is the first place from
    /// which one image, but not the other, is said to be the same up to the end.
    async fn compare_some(&self, range: ByteRange, doubtful: &mut Option<u64>) -> Result<u64, End> {
        let known = |i: usize| {
            let image = if i == 0 { &self.a } else { &self.b };
            async move { view::status(image, range).await.at(|| self.names[i].to_owned()) }
        };
        let ((a, _), (b, _)) = or(NO_STATUS, both(known(0), known(1)).await)?;
        let part = range.take(a.len.min(b.len));
        if self.strict {
            let ends = |s: &Status| s.len == range.len();
            let at = match ends(&a) == ends(&b) {
                true => part.start(),
                false => doubtful.unwrap_or(part.start()),
            };
            *doubtful = (ends(&a) != ends(&b)).then_some(at);
            if kind(&a) != kind(&b) {
                return Err(End::Differ(format!(
                    "Strict mode: Offset {at} block status mismatch!"
                )));
            }
        }
        if a.zero && b.zero {
            return Ok(part.len());
        }
        let part = part.take(PIECE);
        let zeros = async || Ok(Buf::zeroed(part.len() as usize));
        let (x, y) = match (a.zero, b.zero) {
            (true, _) => both(zeros(), self.read(1, part)).await?,
            (_, true) => both(self.read(0, part), zeros()).await?,
            _ => both(self.read(0, part), self.read(1, part)).await?,
        };
        differ(&x, &y, part)?;
        Ok(part.len())
    }

    async fn read(&self, i: usize, range: ByteRange) -> Result<Buf> {
        let buf = Buf::new(range.len() as usize);
        let image = if i == 0 { &self.a } else { &self.b };
        view::read(image, range.start(), buf.clone()).await.at(|| self.names[i].to_owned())?;
        Ok(buf)
    }
}

/// What strict comparison looks at.
fn kind(s: &Status) -> (bool, bool, bool, bool, bool) {
    (s.allocated, s.data, s.zero, s.compressed, s.at.is_some())
}

/// Fails with the first sector in which two buffers, which lie at `range`, differ.
fn differ(a: &Buf, b: &Buf, range: ByteRange) -> Result<(), End> {
    match a.first_difference(b) {
        None => Ok(()),
        Some(i) => {
            let at = range.start() + i as u64 / SECTOR * SECTOR;
            Err(End::Differ(format!("Content mismatch at offset {at}!")))
        }
    }
}

//! `gipfel img`, also called as `qemu-img`: tools for images that nobody uses at the moment.
//!
//! Options, JSON and exit codes are those of qemu-img(1), so that scripts run unchanged. What of
//! it is not offered yet is refused by name.

mod amend;
mod bench;
mod check;
mod commit;
mod compare;
mod convert;
mod copy;
mod create;
mod dd;
pub mod info;
mod map;
mod measure;
pub mod open;
pub mod options;
mod progress;
mod rebase;
pub mod resize;
mod sparse;
mod view;

use std::future::Future;
use std::io::Write;
use std::pin::pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use clap::{Arg, ArgAction, ArgMatches, Command};
use gipfel_base::units::parse_size;
use gipfel_base::{Error, Result, ResultExt};
use gipfel_graph::Graph;
use gipfel_io::signals::{REPORT, Signals, TERMINATION};
use gipfel_io::{Handle, Runtime};
use gipfel_qmp::Schema;
use gipfel_qmp::keyval::Style;
use serde_json::Value;

use crate::daemon::objects::Objects;
use crate::drivers;
use progress::Progress;

/// A command: its definition and what carries it out.
type Tool = (fn() -> Command, fn(&ArgMatches) -> Result<ExitCode>);

const TOOLS: [Tool; 13] = [
    (create::command, create::run),
    (info::command, info::run),
    (convert::command, convert::run),
    (check::command, check::run),
    (map::command, map::run),
    (compare::command, compare::run),
    (resize::command, resize::run),
    (measure::command, measure::run),
    (dd::command, dd::run),
    (rebase::command, rebase::run),
    (commit::command, commit::run),
    (bench::command, bench::run),
    (amend::command, amend::run),
];

/// Commands of qemu-img(1) that this version does not have.
const MISSING: [&str; 2] = ["bitmap", "snapshot"];

const EXAMPLES: &str = "\
Examples:
  gipfel img create -f qcow2 disk.qcow2 20G
  gipfel img info --output=json disk.qcow2
  gipfel img convert -p -O raw disk.qcow2 disk.raw
  gipfel img check disk.qcow2
  gipfel img map --output=json disk.raw
  gipfel img compare disk.qcow2 disk.raw
  gipfel img resize disk.qcow2 +10G

Called by the name qemu-img it does the same.";

/// The definition of the command line, under the name by which it was called.
pub fn command(name: &'static str) -> Command {
    let mut c = Command::new(name)
        .about("Make, examine and copy disk images")
        .after_help(EXAMPLES)
        // Scripts read the version of the tool that this stands for.
        .version(concat!("version 10.0.2 (gipfel ", env!("CARGO_PKG_VERSION"), ")"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommands(TOOLS.iter().map(|(define, _)| define()));
    for name in MISSING {
        let rest = Arg::new("rest").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true);
        c = c.subcommand(Command::new(name).hide(true).disable_help_flag(true).arg(rest));
    }
    c
}

/// Carries out a command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let Some((name, m)) = m.subcommand() else { unreachable!("clap asks for a command") };
    match TOOLS.iter().find(|(define, _)| define().get_name() == name) {
        Some((_, run)) => run(m),
        None => {
            let names: Vec<_> = TOOLS.iter().map(|(d, _)| d().get_name().to_owned()).collect();
            Err(Error::unsupported(format!(
                "command '{name}' is not offered by this version; it has {}",
                names.join(", ")
            )))
        }
    }
}

/// A command as all of them begin: repeated options are right (the last one counts), long ones
/// may be shortened, as in the tool that this stands for.
fn subcommand(name: &'static str, about: &'static str, examples: &'static str) -> Command {
    Command::new(name)
        .about(about)
        .after_help(examples)
        .args_override_self(true)
        .infer_long_args(true)
        .arg(
            Arg::new("object")
                .long("object")
                .value_name("OBJECT")
                .action(ArgAction::Append)
                .help("Make an object: secret,id=ID,file=PATH holds the passphrase of an image"),
        )
}

pub fn flag(name: &'static str, short: Option<char>, help: &'static str) -> Arg {
    let a = Arg::new(name).long(name).action(ArgAction::SetTrue).help(help);
    match short {
        Some(c) => a.short(c),
        None => a,
    }
}

pub fn value(
    name: &'static str,
    short: Option<char>,
    value: &'static str,
    help: &'static str,
) -> Arg {
    let a = Arg::new(name).long(name).value_name(value).allow_hyphen_values(true).help(help);
    match short {
        Some(c) => a.short(c),
        None => a,
    }
}

pub fn text<'a>(m: &'a ArgMatches, name: &str) -> Option<&'a str> {
    m.get_one::<String>(name).map(String::as_str)
}

pub fn texts<'a>(m: &'a ArgMatches, name: &str) -> impl Iterator<Item = &'a str> {
    m.get_many::<String>(name).into_iter().flatten().map(String::as_str)
}

/// The objects that a command's `--object` options make.
pub fn objects(m: &ArgMatches) -> Result<Objects> {
    let (schema, objects) = (Schema::builtin()?, Objects::default());
    for text in texts(m, "object") {
        let style = Style { implied: Some("qom-type"), switches: false };
        let made = match schema.read_option("ObjectOptions", text, style) {
            Ok(Value::Object(o)) => objects.add(o),
            Ok(_) => Err(Error::invalid("give key=value pairs or a JSON object")),
            Err(e) => Err(e),
        };
        made.at(|| "--object")?;
    }
    Ok(objects)
}

/// How results are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    Human,
    Json,
}

/// `-p` and `-q`.
fn progress_args() -> [Arg; 2] {
    [
        flag("progress", Some('p'), "Show the progress"),
        flag("quiet", Some('q'), "Print nothing but errors"),
    ]
}

/// Whether progress is shown.
fn shows(m: &ArgMatches) -> bool {
    m.get_flag("progress") && !m.get_flag("quiet")
}

/// `-r`: bytes a second at most.
fn rate(m: &ArgMatches) -> Result<Option<u64>> {
    Ok(number(m, "rate", 0, u64::MAX)?.filter(|r| *r > 0))
}

/// A number between `least` and `most`, given as the option `name` in the form of a size.
fn number(m: &ArgMatches, name: &str, least: u64, most: u64) -> Result<Option<u64>> {
    let Some(text) = text(m, name) else { return Ok(None) };
    let n = parse_size(text).at(|| format!("--{name}"))?;
    if !(least..=most).contains(&n) {
        return Err(Error::invalid(format!("--{name} {text}: take {least} to {most}")));
    }
    Ok(Some(n))
}

fn output_arg() -> Arg {
    value("output", None, "human|json", "How the result is shown (default: human)")
}

fn output(m: &ArgMatches) -> Result<Output> {
    match text(m, "output") {
        None | Some("human") => Ok(Output::Human),
        Some("json") => Ok(Output::Json),
        Some(o) => Err(Error::invalid(format!("--output is 'human' or 'json', not '{o}'"))),
    }
}

/// Writes to standard output. That nobody reads it any more is no failure.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        r => r.at(|| "standard output"),
    }
}

fn to_json(v: &Value) -> String {
    gipfel_qmp::json::to_pretty(v).replace("\r\n", "\n") + "\n"
}

/// Rounds a size up to whole sectors, in which the tool that this stands for counts.
pub fn whole_sectors(bytes: u64) -> u64 {
    let sector = gipfel_base::units::SECTOR;
    bytes.checked_next_multiple_of(sector).unwrap_or(bytes)
}

/// Runs a command on a graph of its own, until it is done or a signal asks for the end; `left`
/// says what then becomes of its work.
fn on_graph(
    m: &ArgMatches,
    left: &str,
    command: impl AsyncFnOnce(Rc<Graph>) -> Result<ExitCode>,
) -> Result<ExitCode> {
    let objects = objects(m)?;
    watched(&objects, left, 0, &Progress::new(), async |graph, _| command(graph).await)
}

/// The same for a command that uses `threads` I/O threads, with objects made before. `progress` is
/// told when a signal asks for it.
fn watched(
    objects: &Objects,
    left: &str,
    threads: usize,
    progress: &Progress,
    command: impl AsyncFnOnce(Rc<Graph>, Vec<Handle>) -> Result<ExitCode>,
) -> Result<ExitCode> {
    let mut taken = TERMINATION.to_vec();
    taken.push(REPORT);
    // Before there is another thread.
    let signals = Signals::take(&taken)?;
    let runtime = Runtime::new(threads)?;
    let handles = runtime.io_threads();
    runtime.block_on(async {
        let graph = Graph::new(drivers::registry(objects, &Arc::default()));
        let work = async {
            let done = command(graph.clone(), handles).await;
            let closed = graph.close_all().await;
            done.and_then(|code| closed.map(|()| code))
        };
        let ended = async {
            loop {
                match signals.next().await {
                    Ok(REPORT) => progress.report(),
                    signal => return signal,
                }
            }
        };
        match first_of(work, ended).await {
            Either::Left(done) => done,
            Either::Right(signal) => {
                let signal = signal?;
                eprintln!("ended by signal {signal}: {left}");
                // As shells tell it of a program that a signal ended.
                Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX)))
            }
        }
    })?
}

enum Either<A, B> {
    Left(A),
    Right(B),
}

/// The outcome of whichever ends first; the other one is dropped.
async fn first_of<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> Either<A, B> {
    let (mut a, mut b) = (pin!(a), pin!(b));
    std::future::poll_fn(|cx| {
        if let Poll::Ready(v) = a.as_mut().poll(cx) {
            return Poll::Ready(Either::Left(v));
        }
        b.as_mut().poll(cx).map(Either::Right)
    })
    .await
}

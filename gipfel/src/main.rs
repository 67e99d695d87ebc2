//! The gipfel binary: one program, called by its own name with a subcommand, or by the name of a
//! tool that it stands for.

mod daemon;
mod demo;
mod drivers;
mod exerciser;
mod graph;
mod img;
mod nbd;
mod overlay;
mod serve;

use std::path::Path;
use std::process::ExitCode;

use clap::{ArgMatches, Command};
use gipfel_base::{Error, Result};

/// Bad usage; the tools that we stand for end with it too.
const USAGE: u8 = 1;

fn cli() -> Command {
    Command::new("gipfel")
        .about("Block storage for virtual machines: serve, change and copy disks while in use")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(Command::new("demo").about("Show live snapshots and filters under load"))
        .subcommand(serve::command())
        .subcommand(graph::command())
        .subcommand(img::command("img"))
        .subcommand(exerciser::command("io"))
        .subcommand(nbd::command("nbd"))
        .subcommand(daemon::cli::command("storage-daemon"))
}

/// The name by which the program was called, without its folder.
fn called() -> String {
    let name = std::env::args_os().next();
    let name = name.and_then(|a| Path::new(&a).file_name()?.to_str().map(str::to_owned));
    name.unwrap_or_else(|| "gipfel".to_owned())
}

/// The command line that the program was called with: a command of ours and its options.
fn matches() -> clap::error::Result<(String, ArgMatches)> {
    let args = std::env::args_os();
    let (name, command) = match &*called() {
        "qemu-storage-daemon" => ("storage-daemon", daemon::cli::command("qemu-storage-daemon")),
        "qemu-img" => ("img", img::command("qemu-img")),
        "qemu-io" => ("io", exerciser::command("qemu-io")),
        "qemu-nbd" => ("nbd", nbd::command("qemu-nbd")),
        _ => {
            return cli().try_get_matches_from(args).map(|m| match m.subcommand() {
                Some((name, m)) => (name.to_owned(), m.clone()),
                None => (String::new(), m),
            });
        }
    };
    command.try_get_matches_from(args).map(|m| (name.to_owned(), m))
}

fn main() -> ExitCode {
    let (name, matches) = match matches() {
        Ok(m) => m,
        Err(e) => {
            // Help and version go to standard output and are no failure.
            let _ = e.print();
            return ExitCode::from(if e.use_stderr() { USAGE } else { 0 });
        }
    };
    match run(&name, &matches) {
        Ok(code) => code,
        Err(e) => {
            complain(&e);
            ExitCode::FAILURE
        }
    }
}

/// Tells an error on standard error.
fn complain(e: &Error) {
    eprintln!("{}: {e}", called());
}

fn run(name: &str, m: &ArgMatches) -> Result<ExitCode> {
    match name {
        "demo" => demo::run()?,
        "graph" => graph::run(m)?,
        "img" => return img::run(m),
        "io" => return exerciser::run(m),
        "nbd" => nbd::run(m)?,
        "serve" => serve::run(m)?,
        "storage-daemon" => daemon::run(&daemon::cli::config(m)?)?,
        _ => unreachable!("clap knows the subcommands"),
    }
    Ok(ExitCode::SUCCESS)
}

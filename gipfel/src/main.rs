//! The gipfel binary: one program, called by its own name with a subcommand, or by the name of a
//! tool that it stands for.

mod daemon;
mod demo;
mod drivers;
mod graph;
mod img;
mod nbd;
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
        .subcommand(nbd::command("nbd"))
        .subcommand(daemon::cli::command("storage-daemon"))
}

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    let matches = match called().as_deref() {
        Some("qemu-storage-daemon") => {
            daemon::cli::command("qemu-storage-daemon").try_get_matches_from(args).map(|m| {
                let name = "storage-daemon".to_owned();
                (name, m)
            })
        }
        Some("qemu-img") => {
            img::command("qemu-img").try_get_matches_from(args).map(|m| ("img".to_owned(), m))
        }
        Some("qemu-nbd") => {
            nbd::command("qemu-nbd").try_get_matches_from(args).map(|m| ("nbd".to_owned(), m))
        }
        _ => cli().try_get_matches_from(args).map(|m| match m.subcommand() {
            Some((name, m)) => (name.to_owned(), m.clone()),
            None => (String::new(), m),
        }),
    };
    let (name, matches) = match matches {
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

/// The name by which the program was called.
fn called() -> Option<String> {
    let first = std::env::args_os().next()?;
    Path::new(&first).file_name()?.to_str().map(str::to_owned)
}

/// Tells an error on standard error.
fn complain(e: &Error) {
    eprintln!("{}: {e}", called().as_deref().unwrap_or("gipfel"));
}

fn run(name: &str, m: &ArgMatches) -> Result<ExitCode> {
    match name {
        "demo" => demo::run()?,
        "graph" => graph::run(m)?,
        "img" => return img::run(m),
        "nbd" => nbd::run(m)?,
        "serve" => serve::run(m)?,
        "storage-daemon" => daemon::run(&daemon::cli::config(m)?)?,
        _ => unreachable!("clap knows the subcommands"),
    }
    Ok(ExitCode::SUCCESS)
}

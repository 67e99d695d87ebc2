//! `gipfel serve IMAGE`: one image over NBD, without knowing a daemon's options.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use gipfel_base::{Error, Result, ResultExt};
use gipfel_exports::NewExport;
use gipfel_exports::nbd::ServerOptions;
use gipfel_io::Runtime;
use gipfel_io::address::Address;
use gipfel_io::signals::Signals;
use serde_json::{Value, json};

use crate::daemon::{Daemon, cli::default_io_threads};

const EXAMPLES: &str = "\
Examples:
  gipfel serve disk.qcow2                     on the unix socket disk.qcow2.sock
  gipfel serve disk.qcow2 --socket /run/d.sock --read-only
  gipfel serve disk.raw --format raw --tcp 127.0.0.1:10809

It runs until Ctrl-C (or SIGTERM, SIGHUP), then everything is written back.";

/// The definition of the command line.
pub fn command() -> Command {
    Command::new("serve")
        .about("Serve one image over NBD")
        .after_help(EXAMPLES)
        .arg(Arg::new("image").required(true).value_name("IMAGE").help("The image file"))
        .arg(
            Arg::new("format")
                .long("format")
                .short('f')
                .value_name("FORMAT")
                .help("Its format (raw, qcow2); without it the image is looked at"),
        )
        .arg(
            Arg::new("socket")
                .long("socket")
                .short('k')
                .value_name("PATH")
                .value_parser(value_parser!(PathBuf))
                .conflicts_with("tcp")
                .help("Unix socket to listen on [default: IMAGE.sock]"),
        )
        .arg(
            Arg::new("tcp")
                .long("tcp")
                .value_name("ADDRESS:PORT")
                .value_parser(value_parser!(SocketAddr))
                .help("TCP address to listen on"),
        )
        .arg(
            Arg::new("read-only")
                .long("read-only")
                .short('r')
                .action(ArgAction::SetTrue)
                .help("Clients may not write"),
        )
        .arg(
            Arg::new("name")
                .long("name")
                .short('x')
                .value_name("NAME")
                .default_value("")
                .help("Name of the export; empty is the default export"),
        )
}

/// Serves until a signal asks for the end.
pub fn run(m: &ArgMatches) -> Result<()> {
    let image = m.get_one::<String>("image").map(String::as_str).unwrap_or_default();
    let read_only = m.get_flag("read-only");
    let name = m.get_one::<String>("name").cloned().unwrap_or_default();
    let signals = Signals::take(&gipfel_io::signals::TERMINATION)?;
    let runtime = Runtime::new(default_io_threads())?;
    runtime.block_on(async {
        let daemon = Daemon::new(&runtime)?;
        let format = m.get_one::<String>("format").map(String::as_str);
        let (mut options, found) = daemon.graph.image_options(image, format).await?;
        let driver = options.get("driver").and_then(Value::as_str).unwrap_or_default().to_owned();
        if found && driver == "raw" && !read_only {
            // A guest could write another format's header into a raw disk, and be believed at the
            // next start: what is not said is not guessed where clients write.
            return Err(Error::invalid(format!(
                "no format was recognised in '{image}': if it is a raw disk, say --format raw"
            )));
        }
        options.insert("node-name".into(), json!("disk"));
        options.insert("read-only".into(), json!(read_only));
        options.insert("discard".into(), json!("unmap"));
        daemon.graph.blockdev_add(options).await?;
        let (address, uri) = address(m, image, &name)?;
        daemon.exports.start_nbd(&address, ServerOptions::default()).await?;
        let export = NewExport {
            id: "serve".into(),
            node: "disk".into(),
            name: Some(name),
            writable: !read_only,
            ..NewExport::default()
        };
        daemon.exports.add(export).await?;
        let how = if read_only { " read-only" } else { "" };
        println!("serving '{image}' ({driver}){how} at {uri}");
        println!("Ctrl-C ends it");
        signals.next().await?;
        daemon.close().await.at(|| "at the end")
    })?
}

fn address(m: &ArgMatches, image: &str, name: &str) -> Result<(Address, String)> {
    if let Some(a) = m.get_one::<SocketAddr>("tcp") {
        return Ok((
            Address::Tcp { list: vec![*a], keep_alive: false },
            format!("nbd://{a}/{name}"),
        ));
    }
    let path = match m.get_one::<PathBuf>("socket") {
        Some(p) => p.clone(),
        None if image.starts_with("json:") => {
            return Err(Error::invalid("say --socket PATH or --tcp ADDRESS:PORT"));
        }
        None => PathBuf::from(format!("{image}.sock")),
    };
    let full = std::path::absolute(&path)?;
    let uri = format!("nbd+unix:///{name}?socket={}", full.display());
    Ok((Address::Unix(path), uri))
}

//! `gipfel nbd`, also called by the name qemu-nbd: one image over NBD, for scripts.

use std::path::PathBuf;
use std::rc::Rc;

use clap::builder::PossibleValuesParser;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use gipfel_base::{Error, Result, ResultExt};
use gipfel_exports::NewExport;
use gipfel_exports::nbd::ServerOptions;
use gipfel_graph::BackendOptions;
use gipfel_io::address::{Address, resolve};
use gipfel_io::process::{Background, PidFile, raise_descriptor_limit};
use gipfel_io::signals::{Signals, TERMINATION};
use gipfel_io::{Runtime, spawn_local};
use serde_json::{Map, Value, json};

use crate::daemon::cli::default_io_threads;
use crate::daemon::{Daemon, Setup, backends};
use crate::img::open::{Cache, Named, find, guard_guess};
use crate::overlay;

const EXAMPLES: &str = "\
Examples:
  gipfel nbd -f qcow2 disk.qcow2              until its first client has left, on port 10809
  gipfel nbd --fork -t -e 5 -k /run/disk.sock -r -f qcow2 disk.qcow2
                                              in the background, for up to five readers at once
  gipfel nbd -t -x part -o 1048576 -f raw disk.raw
                                              what lies behind the first MiB, as the export 'part'
  gipfel nbd -t --image-opts driver=raw,offset=1M,size=1M,file.filename=disk.raw

For people who type it by hand, 'gipfel serve IMAGE' says the same with fewer words.";

/// Options of scripts that this version does not carry out: name, letter, whether it takes a
/// value, and what to do instead.
const MISSING: [(&str, Option<char>, bool, &str); 10] = [
    ("connect", Some('c'), true, ATTACH),
    ("disconnect", Some('d'), true, ATTACH),
    ("list", Some('L'), false, "nbdinfo --list URI shows another server's exports"),
    ("allocation-depth", Some('A'), false, "only the context base:allocation is offered"),
    ("bitmap", Some('B'), true, "only the context base:allocation is offered"),
    ("load-snapshot", Some('l'), true, "internal snapshots cannot be served"),
    ("tls-creds", None, true, "TLS is not offered; a unix socket (-k) needs none"),
    ("tls-authz", None, true, "TLS is not offered; a unix socket (-k) needs none"),
    ("selinux-label", None, true, "labels are not set"),
    ("trace", Some('T'), true, "nothing is traced"),
];
const ATTACH: &str = "serve it (-k SOCKET -t), then attach it with nbd-client -unix SOCKET DEVICE";

/// The definition of the command line.
pub fn command(name: &'static str) -> Command {
    let path = || value_parser!(PathBuf);
    let c = Command::new(name)
        .about("Serve one image over NBD, with the options of qemu-nbd")
        .after_help(EXAMPLES)
        .version(env!("CARGO_PKG_VERSION"))
        .disable_version_flag(true)
        .arg(
            Arg::new("version")
                .long("version")
                .short('V')
                .action(ArgAction::Version)
                .help("Print the version"),
        )
        .arg(Arg::new("image").required(true).value_name("IMAGE").help("The image file"))
        .arg(value("object", None, "OBJECT", "Make an object, such as a secret").num_args(1))
        .arg(value("port", Some('p'), "PORT", "TCP port to listen on").default_value("10809"))
        .arg(value("bind", Some('b'), "HOST", "Address to listen on").default_value("0.0.0.0"))
        .arg(
            value("socket", Some('k'), "PATH", "Unix socket to listen on, instead of TCP")
                .value_parser(path()),
        )
        .arg(
            value("shared", Some('e'), "N", "Clients at once; 0: any number")
                .value_parser(value_parser!(u32))
                .default_value("1"),
        )
        .arg(flag("persistent", Some('t'), "Go on after the last client has left"))
        .arg(flag("verbose", Some('v'), "Say where it listens, and on how many connections"))
        .arg(value("export-name", Some('x'), "NAME", "Name of the export").default_value(""))
        .arg(value("description", Some('D'), "TEXT", "Text about the export for people"))
        .arg(
            value("handshake-limit", None, "SECONDS", "How long a handshake may take; 0: any time")
                .value_parser(value_parser!(u32))
                .default_value("10"),
        )
        .arg(
            value("offset", Some('o'), "BYTES", "Serve what lies behind this offset")
                .value_parser(value_parser!(u64)),
        )
        .arg(flag("fork", None, "Go to the background once clients can connect"))
        .arg(value("pid-file", None, "PATH", "Write the process id there").value_parser(path()))
        .arg(value("format", Some('f'), "FORMAT", "The image's format (default: looked at)"))
        .arg(flag("read-only", Some('r'), "Clients may not write"))
        .arg(flag("snapshot", Some('s'), "What is written goes to a file that ends with this"))
        .arg(flag("nocache", Some('n'), "Short for --cache=none").conflicts_with("cache"))
        .arg(value("cache", None, "MODE", "writeback, writethrough, none, directsync or unsafe"))
        .arg(choice("aio", "How I/O is done", &["threads", "native", "io_uring"]))
        .arg(choice("discard", "What becomes of discards", &["ignore", "off", "unmap", "on"]))
        .arg(choice("detect-zeroes", "What becomes of written zeros", &["off", "on", "unmap"]))
        .arg(flag("image-opts", None, "The image is given as options: driver=...,file.filename="));
    MISSING.iter().fold(c, |c, (name, letter, takes, _)| {
        let a = Arg::new(*name).long(*name).hide(true);
        let a = if *takes { a.num_args(1) } else { a.action(ArgAction::SetTrue) };
        c.arg(match letter {
            Some(l) => a.short(*l),
            None => a,
        })
    })
}

fn value(name: &'static str, short: Option<char>, value: &'static str, help: &'static str) -> Arg {
    let a = Arg::new(name).long(name).value_name(value).help(help);
    short.into_iter().fold(a, Arg::short)
}

fn flag(name: &'static str, short: Option<char>, help: &'static str) -> Arg {
    let a = Arg::new(name).long(name).action(ArgAction::SetTrue).help(help);
    short.into_iter().fold(a, Arg::short)
}

fn choice(name: &'static str, help: &'static str, of: &'static [&'static str]) -> Arg {
    value(name, None, "MODE", help).value_parser(PossibleValuesParser::new(of))
}

fn text<'a>(m: &'a ArgMatches, name: &str) -> Option<&'a str> {
    m.get_one::<String>(name).map(String::as_str)
}

/// Serves until a signal, or until the last client has left.
pub fn run(m: &ArgMatches) -> Result<()> {
    for (name, _, takes, instead) in MISSING {
        if if takes { m.contains_id(name) } else { m.get_flag(name) } {
            let missing = format!("--{name} is not offered by this version: {instead}");
            return Err(Error::unsupported(missing));
        }
    }
    // Before anything that a child would not have: threads, locks, rings.
    let background = m.get_flag("fork").then(Background::start).transpose()?;
    let signals = Signals::take(&TERMINATION)?;
    raise_descriptor_limit();
    let runtime = Runtime::new(default_io_threads())?;
    runtime.block_on(async {
        let daemon = Daemon::new(&runtime)?;
        let by_signal = daemon.clone();
        let watch = spawn_local(async move {
            if signals.next().await.is_ok() {
                by_signal.quit("host-signal");
            }
        });
        let served = serve(&daemon, m, background).await;
        watch.cancel().await;
        let closed = daemon.close().await.at(|| "at the end");
        served.and(closed)
    })?
}

async fn serve(d: &Rc<Daemon>, m: &ArgMatches, background: Option<Background>) -> Result<()> {
    for o in m.get_many::<String>("object").into_iter().flatten() {
        d.set_up(&Setup::Object(o.clone())).await?;
    }
    let export = add_disk(d, m).await?;
    let seconds = m.get_one::<u32>("handshake-limit").copied().unwrap_or_default();
    let options = ServerOptions {
        max_connections: m.get_one::<u32>("shared").map_or(1, |n| *n as usize),
        handshake_limit: std::time::Duration::from_secs(seconds.into()),
    };
    let address = address(m).await?;
    d.exports.hold();
    d.exports.start_nbd(&address, options).await?;
    d.exports.add(export).await?;
    let pid_file = text_path(m, "pid-file").map(PidFile::write).transpose()?;
    background.map(Background::ready).transpose()?;
    d.exports.let_in();
    if m.get_flag("verbose") {
        eprintln!("listening on {address:?}, for {} clients at once", options.max_connections);
    }
    match m.get_flag("persistent") {
        true => drop(d.quit_asked().await),
        false => d.unless_ended(d.exports.nbd_deserted()).await.unwrap_or(Ok(()))?,
    }
    drop(pid_file);
    Ok(())
}

fn text_path<'a>(m: &'a ArgMatches, name: &str) -> Option<&'a std::path::Path> {
    m.get_one::<PathBuf>(name).map(PathBuf::as_path)
}

/// The name of the backend that clients reach the disk through.
const BACKEND: &str = "nbd";

/// Opens the image for a backend, and says how to export that.
async fn add_disk(d: &Rc<Daemon>, m: &ArgMatches) -> Result<NewExport> {
    let writable = !m.get_flag("read-only");
    let cache = if m.get_flag("nocache") { Some("none") } else { text(m, "cache") };
    let cache = Cache::parse(cache.unwrap_or("writeback"))?;
    let detect_zeroes = text(m, "detect-zeroes");
    let unmap = matches!(text(m, "discard"), Some("unmap" | "on"));
    if detect_zeroes == Some("unmap") && !unmap {
        return Err(Error::invalid("--detect-zeroes=unmap needs --discard=unmap"));
    }
    let node = node_options(d, m, cache, unmap).await?;
    let options = BackendOptions {
        name: Some(BACKEND.to_owned()),
        writable,
        detect_zeroes: backends::zeroes(detect_zeroes),
        write_through: cache.write_through,
        ..BackendOptions::default()
    };
    d.graph.drive_add(options, node).await?;
    if m.get_flag("snapshot") {
        overlay::add(&d.graph, BACKEND).await?;
    }
    Ok(NewExport {
        id: BACKEND.to_owned(),
        node: BACKEND.to_owned(),
        name: text(m, "export-name").map(str::to_owned),
        description: text(m, "description").map(str::to_owned),
        writable,
        ..NewExport::default()
    })
}

async fn node_options(
    d: &Rc<Daemon>,
    m: &ArgMatches,
    cache: Cache,
    unmap: bool,
) -> Result<Map<String, Value>> {
    let is_options = m.get_flag("image-opts");
    if is_options && m.contains_id("format") {
        return Err(Error::invalid(
            "--image-opts says the format in its options: leave --format (-f) out",
        ));
    }
    // An image under a temporary overlay is only read.
    let writable = !m.get_flag("read-only") && !m.get_flag("snapshot");
    let name = text(m, "image").unwrap_or_default();
    let format = text(m, "format");
    let named = Named { name, format, is_options, cache, writable, ..Named::default() };
    let found = find(&d.graph, named).await.at(|| format!("cannot open '{name}'"))?;
    let risky = writable && found.warn_of_guess(&d.graph, name);
    let mut node = found.options;
    guard_guess(&mut node, risky);
    if !is_options || m.contains_id("discard") {
        node.insert("discard".into(), json!(if unmap { "unmap" } else { "ignore" }));
    }
    if let (Some(aio), Some(Value::Object(file))) = (text(m, "aio"), node.get_mut("file")) {
        file.insert("aio".into(), json!(aio));
    }
    let Some(offset) = m.get_one::<u64>("offset").filter(|o| **o > 0) else { return Ok(node) };
    let common = ["discard", "read-only", "cache"];
    let mut window: Map<String, Value> =
        common.iter().filter_map(|k| Some(((*k).to_owned(), node.get(*k)?.clone()))).collect();
    window.extend([
        ("driver".to_owned(), json!(d.graph.registry().raw_format)),
        ("offset".to_owned(), json!(offset)),
        ("file".to_owned(), Value::Object(node)),
    ]);
    Ok(window)
}

async fn address(m: &ArgMatches) -> Result<Address> {
    match text_path(m, "socket") {
        Some(p) => Ok(Address::Unix(std::path::absolute(p)?)),
        None => {
            let [host, port] = ["bind", "port"].map(|k| text(m, k).unwrap_or_default());
            Ok(Address::Tcp { list: resolve(host, port, false).await?, keep_alive: false })
        }
    }
}

//! The command line of the storage daemon: the options of qemu-storage-daemon(1), in order.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use gipfel_base::{Error, Result};

use super::{Config, Setup};

type Make = fn(String) -> Setup;

/// The options whose order counts: name, value, help, what they become.
const ORDERED: [(&str, &str, &str, Make); 7] = [
    (
        "blockdev",
        "OPTIONS",
        "Add a block node: [driver=]DRIVER,node-name=NAME[,...], or JSON; \
         help, or DRIVER,help, tells more",
        Setup::Blockdev,
    ),
    (
        "chardev",
        "OPTIONS",
        "Add a character device: stdio,id=ID or socket,id=ID,path=PATH,server=on,wait=off",
        Setup::Chardev,
    ),
    (
        "drive",
        "OPTIONS",
        "Make a backend with its image and filters in one go: file=FILE,id=NAME[,format=FORMAT]\
         [,cache=none|writeback|writethrough|unsafe][,bps=N][,copy-on-read=on][,snapshot=on]...; \
         help tells more",
        Setup::Drive,
    ),
    (
        "export",
        "OPTIONS",
        "Serve a backend or node: [type=]nbd,id=ID,node-name=NODE[,name=NAME][,writable=on]",
        Setup::Export,
    ),
    ("monitor", "OPTIONS", "Speak QMP on a character device: [chardev=]ID", Setup::Monitor),
    (
        "nbd-server",
        "OPTIONS",
        "Start the NBD server: addr.type=unix,addr.path=PATH or \
         addr.type=inet,addr.host=HOST,addr.port=PORT or addr.type=fd,addr.str=NUMBER \
         [,max-connections=N]",
        Setup::NbdServer,
    ),
    (
        "object",
        "OPTIONS",
        "Make an object: [qom-type=]throttle-group,id=ID,limits.iops-total=N or iothread,id=ID; \
         help, or TYPE,help, tells more",
        Setup::Object,
    ),
];

const EXAMPLES: &str = "\
Examples:
  Serve a qcow2 image for writing on a unix socket, with a QMP monitor beside it:
    gipfel storage-daemon \\
      --blockdev file,node-name=f,filename=disk.qcow2 \\
      --blockdev qcow2,node-name=disk,file=f \\
      --nbd-server addr.type=unix,addr.path=nbd.sock \\
      --export nbd,id=e0,node-name=disk,writable=on \\
      --chardev socket,id=qmp,path=qmp.sock,server=on,wait=off --monitor qmp

Options are carried out in the order in which they are given. The program runs until the
QMP command quit, SIGTERM, SIGINT or SIGHUP. A socket that the starting program has opened
already is named by its number: --chardev socket,fd=3,server=on,...";

/// The definition of the command line.
pub fn command(name: &'static str) -> Command {
    let mut c = Command::new(name)
        .about("Serve block nodes, commanded by QMP")
        .after_help(EXAMPLES)
        .version(env!("CARGO_PKG_VERSION"))
        .disable_version_flag(true)
        .arg(
            Arg::new("version")
                .long("version")
                .short('V')
                .action(ArgAction::Version)
                .help("Print the version"),
        );
    for (name, value, help, _) in ORDERED {
        c = c.arg(Arg::new(name).long(name).value_name(value).action(ArgAction::Append).help(help));
    }
    c.arg(
        Arg::new("pidfile")
            .long("pidfile")
            .value_name("PATH")
            .value_parser(value_parser!(PathBuf))
            .help(
                "Write the process id there once all is set up; one daemon at a time has the file",
            ),
    )
    .arg(
        Arg::new("daemonize")
            .long("daemonize")
            .action(ArgAction::SetTrue)
            .help("Go to the background, and end the starting process once all is set up"),
    )
    .arg(
        Arg::new("trace")
            .long("trace")
            .short('T')
            .value_name("OPTIONS")
            .action(ArgAction::Append)
            .hide(true),
    )
    .arg(
        Arg::new("io-threads")
            .long("io-threads")
            .value_name("N")
            .value_parser(value_parser!(u16).range(1..=64))
            .help("Number of I/O threads (ours; default: one for each CPU, at most 4)"),
    )
}

/// What the command line asks for.
pub fn config(m: &ArgMatches) -> Result<Config> {
    if m.contains_id("trace") {
        return Err(Error::unsupported("this version traces nothing: leave --trace out"));
    }
    let mut found: Vec<(usize, Setup)> = Vec::new();
    for (name, _, _, make) in ORDERED {
        let at = m.indices_of(name).into_iter().flatten();
        let values = m.get_many::<String>(name).into_iter().flatten();
        found.extend(at.zip(values).map(|(i, v)| (i, make(v.clone()))));
    }
    found.sort_by_key(|(i, _)| *i);
    Ok(Config {
        setup: found.into_iter().map(|(_, s)| s).collect(),
        pidfile: m.get_one::<PathBuf>("pidfile").cloned(),
        daemonize: m.get_flag("daemonize"),
        io_threads: m
            .get_one::<u16>("io-threads")
            .map_or_else(default_io_threads, |n| usize::from(*n)),
    })
}

/// One thread for each CPU, but few: each serves thousands of connections.
pub fn default_io_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(4)
}

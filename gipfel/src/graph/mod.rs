//! `gipfel graph`: the graph as text for a terminal, as DOT or as SVG; of a running daemon, of an
//! image's chain, or as a command would leave it.

mod client;
mod dot;
mod layers;
mod picture;
mod svg;
mod text;

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command, value_parser};
use gipfel_base::{Error, Result, ResultExt};
use gipfel_io::Runtime;
use serde_json::{Value, json};

use crate::daemon::Daemon;
pub use picture::Picture;
pub use text::draw;

const EXAMPLES: &str = "\
Examples:
  gipfel graph --qmp qmp.sock                       the graph of a running daemon
  gipfel graph --qmp qmp.sock --format svg > g.svg  as a picture
  gipfel graph disk.qcow2                           an image and the chain below it
  gipfel graph --qmp qmp.sock --dry-run \\
    '{\"execute\":\"blockdev-snapshot\",\"arguments\":{\"node\":\"disk\",\"overlay\":\"new\"}}'
                                                    what a command would change

In text, [x] is a backend, (x) an implicit filter, r/w/u/s after an edge say that it reads,
writes, writes what is there already, changes the size; 'content' that it stays where the node is
overlaid. In pictures implicit filters are dashed, and what a dry run changes is marked.";

/// The definition of the command line.
pub fn command() -> Command {
    Command::new("graph")
        .about("Show the block graph: clients, backends, filters, nodes and what they may do")
        .after_help(EXAMPLES)
        .arg(
            Arg::new("image")
                .value_name("IMAGE")
                .required_unless_present("qmp")
                .conflicts_with("qmp")
                .help("An image that nobody serves: show its chain"),
        )
        .arg(
            Arg::new("image-format")
                .long("image-format")
                .short('f')
                .value_name("FORMAT")
                .requires("image")
                .help("The image's format; without it the image is looked at"),
        )
        .arg(
            Arg::new("qmp")
                .long("qmp")
                .value_name("SOCKET")
                .value_parser(value_parser!(PathBuf))
                .help("The QMP socket (unix) of a running daemon"),
        )
        .arg(
            Arg::new("format")
                .long("format")
                .short('F')
                .value_name("KIND")
                .value_parser(["text", "dot", "svg", "json"])
                .default_value("text")
                .help("What to print"),
        )
        .arg(
            Arg::new("dry-run")
                .long("dry-run")
                .value_name("COMMAND")
                .requires("qmp")
                .help("A QMP command as JSON: show the graph before and after, and do nothing"),
        )
}

/// Shows a graph.
pub fn run(m: &ArgMatches) -> Result<()> {
    let format = m.get_one::<String>("format").map_or("text", String::as_str);
    let (before, after) = match (m.get_one::<PathBuf>("qmp"), m.get_one::<String>("image")) {
        (Some(socket), _) => {
            let mut qmp = client::Qmp::connect(socket)?;
            match m.get_one::<String>("dry-run") {
                Some(text) => {
                    let mut r = qmp.command("graph-rehearse", rehearsal(text)?)?;
                    (r["before"].take(), Some(r["after"].take()))
                }
                None => (qmp.command("query-graph", json!({}))?, None),
            }
        }
        (None, Some(image)) => {
            let format = m.get_one::<String>("image-format").map(String::as_str);
            (offline(image, format).at(|| format!("'{image}'"))?, None)
        }
        (None, None) => return Err(Error::invalid("name an image, or a daemon with --qmp")),
    };
    print!("{}", show(format, &before, after.as_ref())?);
    Ok(())
}

/// A command as JSON, as the arguments of graph-rehearse.
fn rehearsal(text: &str) -> Result<Value> {
    let v: Value = serde_json::from_str(text)
        .map_err(|e| Error::invalid(format!("--dry-run takes a QMP command as JSON: {e}")))?;
    match v {
        Value::Object(m) if m.contains_key("execute") => Ok(Value::Object(m)),
        _ => Err(Error::invalid(
            "--dry-run takes a QMP command such as \
             {\"execute\":\"blockdev-del\",\"arguments\":{\"node-name\":\"x\"}}",
        )),
    }
}

fn show(format: &str, before: &Value, after: Option<&Value>) -> Result<String> {
    if format == "json" {
        let v = match after {
            Some(a) => json!({ "before": before, "after": a }),
            None => before.clone(),
        };
        return Ok(format!("{v:#}\n"));
    }
    let before = Picture::read(before)?;
    let Some(after) = after else {
        return Ok(match format {
            "dot" => dot::draw(&[("graph", &before, &before)]),
            "svg" => svg::draw(&[("", &before, &before)]),
            _ => draw(&before),
        });
    };
    let after = Picture::read(after)?;
    let both = [("before", &before, &after), ("after", &after, &before)];
    Ok(match format {
        "dot" => dot::draw(&both),
        "svg" => svg::draw(&both),
        _ => text::draw_change(&before, &after),
    })
}

/// The graph of an image that is opened for looking only.
fn offline(image: &str, format: Option<&str>) -> Result<Value> {
    let runtime = Runtime::new(1)?;
    runtime.block_on(async {
        let d = Daemon::new(&runtime)?;
        let (mut options, _) = d.graph.image_options(image, format).await?;
        options.insert("node-name".into(), json!("image"));
        options.insert("read-only".into(), json!(true));
        options.insert("force-share".into(), json!(true));
        let shown = match d.graph.blockdev_add(options).await {
            Ok(()) => Ok(d.graph.query_picture().await),
            Err(e) => Err(e),
        };
        let closed = d.close().await;
        shown.and_then(|v| closed.map(|()| v))
    })?
}

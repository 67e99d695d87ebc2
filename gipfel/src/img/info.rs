//! `img info`: what an image is.

use std::fmt::Write;
use std::process::ExitCode;
use std::rc::Rc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::limits::MAX_CHAIN_DEPTH;
use gipfel_base::units::human_size;
use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_graph::Graph;
use serde_json::{Map, Value, json};

use super::Output;
use super::open::{self, Named, find};

const EXAMPLES: &str = "\
Examples:
  gipfel img info disk.qcow2
  gipfel img info --output=json --backing-chain overlay.qcow2
  gipfel img info -U disk-of-a-running-machine.qcow2
  gipfel img info --image-opts driver=raw,offset=1M,file.filename=disk.raw";

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("info", "Tell what an image is", EXAMPLES)
        .args(open::args())
        .arg(super::output_arg())
        .arg(super::flag("backing-chain", Some('b'), "Go on with the images it stands on"))
        .arg(Arg::new("filename").value_name("FILENAME").required(true).help("The image"))
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let output = super::output(m)?;
    let name = super::text(m, "filename").unwrap_or_default();
    let named = Named { alone: true, ..open::named(m, name)? };
    super::on_graph(m, "nothing was changed", async |graph| {
        let mut list = chain(&graph, named, m.get_flag("backing-chain")).await?;
        super::print(&match output {
            Output::Human => list.iter().map(human).collect::<Vec<_>>().join("\n"),
            Output::Json if m.get_flag("backing-chain") => super::to_json(&Value::Array(list)),
            Output::Json => super::to_json(&list.remove(0)),
        })?;
        Ok(ExitCode::SUCCESS)
    })
}

/// ImageInfo of an image and, if asked for, of the images below it.
pub async fn chain(graph: &Rc<Graph>, top: Named<'_>, whole: bool) -> Result<Vec<Value>> {
    let mut list: Vec<Value> = Vec::new();
    let mut seen = vec![top.name.to_owned()];
    let mut next = look(graph, top).await?;
    loop {
        let text = |key: &str| next.get(key).and_then(Value::as_str).map(str::to_owned);
        let (name, format) = (text("full-backing-filename"), text("backing-filename-format"));
        list.push(next);
        let Some(name) = name.filter(|_| whole) else { return Ok(list) };
        if seen.contains(&name) {
            return Err(Error::corrupt(format!("'{name}' is in its own backing chain")));
        }
        if seen.len() >= MAX_CHAIN_DEPTH {
            let text = format!("the backing chain is longer than {MAX_CHAIN_DEPTH} images");
            return Err(Error::new(ErrorKind::Limit, text));
        }
        let below = Named { name: &name, format: format.as_deref(), is_options: false, ..top };
        next = look(graph, below).await?;
        seen.push(name);
    }
}

async fn look(graph: &Rc<Graph>, n: Named<'_>) -> Result<Value> {
    let look = async {
        let mut options = find(graph, n).await?.options;
        let node = options.entry("node-name").or_insert(json!("image"));
        let node = node.as_str().unwrap_or_default().to_owned();
        graph.blockdev_add(options).await?;
        let info = graph.image_info(&node).await;
        graph.blockdev_del(&node).await?;
        info
    };
    let mut info = look.await.at(|| format!("cannot open '{}'", n.name))?;
    in_sectors(&mut info);
    Ok(info)
}

/// Sizes in whole sectors, down to the last child.
fn in_sectors(info: &mut Value) {
    if let Some(size) = info.get("virtual-size").and_then(Value::as_u64) {
        info["virtual-size"] = json!(super::whole_sectors(size));
    }
    for child in info.get_mut("children").and_then(Value::as_array_mut).into_iter().flatten() {
        in_sectors(&mut child["info"]);
    }
}

/// The text for one image.
fn human(info: &Value) -> String {
    let mut t = String::new();
    line(&mut t, "", "image", info.get("filename"));
    line(&mut t, "", "file format", info.get("format"));
    sizes(&mut t, "", "virtual size", info);
    if info["encrypted"] == json!(true) {
        t.push_str("encrypted: yes\n");
    }
    line(&mut t, "", "cluster_size", info.get("cluster-size"));
    if info["dirty-flag"] == json!(true) {
        t.push_str("cleanly shut down: no\n");
    }
    if let (Some(name), Some(full)) =
        (info.get("backing-filename"), info.get("full-backing-filename"))
    {
        let actual =
            if name == full { String::new() } else { format!(" (actual path: {})", plain(full)) };
        let _ = writeln!(t, "backing file: {}{actual}", plain(name));
    }
    line(&mut t, "", "backing file format", info.get("backing-filename-format"));
    specific(&mut t, "", info);
    children(&mut t, "", info);
    t
}

fn line(t: &mut String, indent: &str, label: &str, value: Option<&Value>) {
    if let Some(v) = value {
        let _ = writeln!(t, "{indent}{label}: {}", plain(v));
    }
}

fn plain(v: &Value) -> String {
    v.as_str().map_or_else(|| v.to_string(), str::to_owned)
}

fn sizes(t: &mut String, indent: &str, label: &str, info: &Value) {
    let size = info["virtual-size"].as_u64().unwrap_or_default();
    let _ = writeln!(t, "{indent}{label}: {} ({size} bytes)", human_size(size));
    if let Some(n) = info.get("actual-size").and_then(Value::as_u64) {
        let _ = writeln!(t, "{indent}disk size: {}", human_size(n));
    }
}

/// What only the format knows, if it is more than nothing.
pub fn specific(t: &mut String, indent: &str, info: &Value) {
    match info.pointer("/format-specific/data") {
        Some(Value::Object(m)) if !m.is_empty() => {
            let _ = writeln!(t, "{indent}Format specific information:");
            members(t, &format!("{indent}    "), m);
        }
        _ => {}
    }
}

fn members(t: &mut String, indent: &str, m: &Map<String, Value>) {
    for (k, v) in m {
        let label = k.replace('-', " ");
        match v {
            Value::Object(inner) => {
                let _ = writeln!(t, "{indent}{label}:");
                members(t, &format!("{indent}    "), inner);
            }
            Value::Array(list) => {
                let _ = writeln!(t, "{indent}{label}:");
                for (i, v) in list.iter().enumerate() {
                    match v {
                        Value::Object(inner) => {
                            let _ = writeln!(t, "{indent}    [{i}]:");
                            members(t, &format!("{indent}        "), inner);
                        }
                        v => line(t, &format!("{indent}    "), &format!("[{i}]"), Some(v)),
                    }
                }
            }
            v => line(t, indent, &label, Some(v)),
        }
    }
}

/// The nodes below, each by its path of child names.
fn children(t: &mut String, path: &str, info: &Value) {
    for child in info["children"].as_array().into_iter().flatten() {
        let path = format!("{path}/{}", plain(&child["name"]));
        let below = &child["info"];
        let _ = writeln!(t, "Child node '{path}':");
        line(t, "    ", "filename", below.get("filename"));
        line(t, "    ", "protocol type", below.get("format"));
        sizes(t, "    ", "file length", below);
        specific(t, "    ", below);
        children(t, &path, below);
    }
}

//! `img check`: whether an image's metadata are sound, and mending them.

use std::fmt::Write;
use std::process::ExitCode;
use std::rc::Rc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_graph::Graph;
use gipfel_node::{CheckReport, Fix};
use serde_json::{Map, Value, json};

use super::Output;
use super::open::{self, Cache, Named, find};

const EXAMPLES: &str = "\
Examples:
  gipfel img check disk.qcow2
  gipfel img check -r leaks disk.qcow2      gives lost space back
  gipfel img check -r all disk.qcow2        mends everything that can be mended

Exit status: 0 sound (now), 1 the check could not be completed, 2 corrupt, 3 space is lost but
no data are wrong, 63 the format has no check.";

/// The check could not look at everything.
const INCOMPLETE: u8 = 1;
/// Contradictions are left.
const CORRUPT: u8 = 2;
/// Only space is lost.
const LEAKS: u8 = 3;
/// The format has no check.
const NO_CHECK: u8 = 63;

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("check", "Check and mend an image's metadata", EXAMPLES)
        .args(open::args())
        .arg(super::output_arg())
        .arg(super::value("repair", Some('r'), "leaks|all", "Mend what is found"))
        .arg(super::value("cache", Some('T'), "MODE", "Cache mode (default: writeback)"))
        .arg(super::flag("quiet", Some('q'), "Print nothing but what is wrong"))
        .arg(Arg::new("filename").value_name("FILENAME").required(true).help("The image"))
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let output = super::output(m)?;
    let fix = match super::text(m, "repair") {
        None => Fix::Nothing,
        Some("leaks") => Fix::Leaks,
        Some("all") => Fix::All,
        Some(r) => return Err(Error::invalid(format!("--repair is 'leaks' or 'all', not '{r}'"))),
    };
    let mends = fix != Fix::Nothing;
    let name = super::text(m, "filename").unwrap_or_default();
    let cache = Cache::parse(super::text(m, "cache").unwrap_or("writeback"))?;
    let named = Named { cache, writable: mends, ..open::named(m, name)? };
    if mends && named.share {
        return Err(Error::invalid(
            "--repair writes to the image, and --force-share (-U) is for looking only",
        ));
    }
    let left = if mends {
        "mending is not complete; check the image again"
    } else {
        "nothing was changed"
    };
    super::on_graph(m, left, async |graph| {
        check(&graph, named, fix, output, m.get_flag("quiet")).await
    })
}

async fn check(
    graph: &Rc<Graph>,
    named: Named<'_>,
    fix: Fix,
    output: Output,
    quiet: bool,
) -> Result<ExitCode> {
    let name = named.name;
    let found = find(graph, named).await.at(|| format!("cannot open '{name}'"))?;
    let at = || format!("cannot check '{name}'");
    let Some(report) = graph.check_image(&found.options, fix).await.at(at)? else {
        eprintln!("images of format '{}' have no metadata that could be checked", found.driver());
        return Ok(ExitCode::from(NO_CHECK));
    };
    tell_findings(&report);
    let mended = report.corruptions_fixed + report.leaks_fixed > 0;
    if mended && !quiet && output == Output::Human {
        super::print(&format!(
            "Found and mended:\n\n    {} leaked clusters\n    {} corruptions\n\n\
             The mended image is checked once more.\n",
            report.leaks_fixed, report.corruptions_fixed
        ))?;
    }
    let mut last = report;
    if mended {
        let (leaks, corruptions) = (last.leaks_fixed, last.corruptions_fixed);
        last =
            graph.check_image(&found.options, Fix::Nothing).await.at(at)?.ok_or_else(|| {
                Error::new(ErrorKind::Unsupported, "the format has lost its check")
            })?;
        tell_findings(&last);
        (last.leaks_fixed, last.corruptions_fixed) = (leaks, corruptions);
    }
    match output {
        Output::Json => super::print(&super::to_json(&json(&last, name, found.driver())))?,
        Output::Human if !quiet => super::print(&human(&last))?,
        Output::Human => {}
    }
    Ok(ExitCode::from(status(&last)))
}

fn tell_findings(r: &CheckReport) {
    for f in &r.findings {
        eprintln!("{f}");
    }
    if r.more_findings > 0 {
        eprintln!("and {} more like these", r.more_findings);
    }
}

fn status(r: &CheckReport) -> u8 {
    if r.check_errors > 0 {
        INCOMPLETE
    } else if r.corruptions > 0 {
        CORRUPT
    } else if r.leaks > 0 {
        LEAKS
    } else {
        0
    }
}

/// ImageCheck of the QMP reference; counts of nothing are left out, as the reference does.
fn json(r: &CheckReport, name: &str, format: &str) -> Value {
    let some = |n: u64| Some(n).filter(|n| *n > 0);
    let mut m = Map::new();
    let mut set = |key: &str, n: Option<u64>| {
        if let Some(n) = n {
            m.insert(key.into(), json!(n));
        }
    };
    set("image-end-offset", r.image_end.and_then(some));
    set("total-clusters", r.total_clusters.and_then(some));
    set("corruptions", some(r.corruptions));
    set("compressed-clusters", r.compressed_clusters.and_then(some));
    set("corruptions-fixed", some(r.corruptions_fixed));
    set("check-errors", Some(r.check_errors));
    set("leaks", some(r.leaks));
    set("fragmented-clusters", r.fragmented_clusters.and_then(some));
    set("leaks-fixed", some(r.leaks_fixed));
    set("allocated-clusters", r.allocated_clusters.and_then(some));
    m.insert("filename".into(), json!(name));
    m.insert("format".into(), json!(format));
    Value::Object(m)
}

fn human(r: &CheckReport) -> String {
    let mut t = String::new();
    if r.corruptions + r.leaks + r.check_errors == 0 {
        t.push_str("No errors were found: the image is sound.\n");
    }
    let mut found = |n: u64, what: &str, means: &str| {
        if n > 0 {
            let _ = writeln!(t, "\n{n} {what} were found on the image.\n{means}");
        }
    };
    found(r.corruptions, "errors", "Data may be wrong, and writing may make it worse.");
    found(r.leaks, "leaked clusters", "They waste space; data are not harmed.");
    found(r.check_errors, "internal errors", "They kept parts of the image from being checked.");
    if let (Some(total), Some(allocated)) = (r.total_clusters, r.allocated_clusters)
        && total > 0
        && allocated > 0
    {
        let share = |n: u64, of: u64| n as f64 * 100.0 / of as f64;
        let _ = writeln!(
            t,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, \
             {:.2}% compressed clusters",
            share(allocated, total),
            share(r.fragmented_clusters.unwrap_or(0), allocated),
            share(r.compressed_clusters.unwrap_or(0), allocated),
        );
    }
    if let Some(end) = r.image_end.filter(|n| *n > 0) {
        let _ = writeln!(t, "Image end offset: {end}");
    }
    t
}

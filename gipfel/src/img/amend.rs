//! `img amend`: options of an image changed after it was made.

use std::process::ExitCode;
use std::rc::Rc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::{Error, Result, ResultExt};
use gipfel_graph::Graph;

use super::open::{self, Cache, Named, find};
use super::options::{self, Asked};
use super::progress::Progress;
use super::{text, texts};

const EXAMPLES: &str = "\
Examples:
  gipfel img amend -o compat=0.10 disk.qcow2
  gipfel img amend -o lazy_refcounts=on,size=20G disk.qcow2
  gipfel img amend -f qcow2 -o help

What an image stands on is changed by 'rebase'.";

/// The definition of the command line.
pub fn command() -> Command {
    super::subcommand("amend", "Change options of an image", EXAMPLES)
        .args(open::writer_args())
        .arg(super::create::options_arg("options"))
        .arg(super::value("cache", Some('t'), "MODE", "Cache mode (default: writeback)"))
        .arg(super::flag("force", None, "Taken; nothing that is offered needs it"))
        .args(super::progress_args())
        .arg(Arg::new("filename").value_name("FILENAME").num_args(0..).help("The image"))
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let given: Vec<&str> = texts(m, "options").collect();
    if given.is_empty() {
        return Err(Error::invalid("say what is to change (-o)"));
    }
    let names: Vec<&str> = texts(m, "filename").collect();
    if let (Some(format), true) = (text(m, "format"), options::asks_for_help(&given)) {
        return help(format);
    }
    let [name] = names[..] else { return Err(Error::invalid("give one image")) };
    let cache = Cache::parse(text(m, "cache").unwrap_or("writeback")).at(|| "-t")?;
    let named = Named { cache, writable: true, resize: true, ..open::named(m, name)? };
    let objects = super::objects(m)?;
    let (progress, show) = (Progress::new(), super::shows(m));
    super::watched(&objects, "the options are as they were, or new", 0, &progress, async |g, _| {
        let at = || format!("cannot amend '{name}'");
        if options::asks_for_help(&given) {
            let format = find(&g, Named { writable: false, ..named }).await.at(at)?;
            return help(format.driver());
        }
        let work = amend(&g, named, &given, &progress);
        progress.shown_whole(show, work).await.at(at)?;
        Ok(ExitCode::SUCCESS)
    })
}

fn help(format: &str) -> Result<ExitCode> {
    super::print(&options::amend_help(format)?)?;
    Ok(ExitCode::SUCCESS)
}

async fn amend(
    graph: &Rc<Graph>,
    named: Named<'_>,
    given: &[&str],
    progress: &Progress,
) -> Result<()> {
    let image = open::open(graph, named, "image").await?;
    let name = image.node.def().name;
    let format = image.node.driver().image_format().ok_or_else(|| {
        Error::unsupported(format!("images of format '{name}' have no option that can change"))
    })?;
    let Asked::Options(given) = options::read_amend(name, given.iter().copied())? else {
        return Err(Error::invalid("'help' is given among other options"));
    };
    let (mut changes, _) = given.values(name)?;
    changes.remove("driver");
    let told = |done, all| {
        progress.set_total(all);
        progress.set_done(done);
    };
    format.amend(changes.into(), &told).await
}

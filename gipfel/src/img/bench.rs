//! `img bench`: how long requests of one kind take.

use std::cell::Cell;
use std::process::ExitCode;
use std::rc::Rc;

use clap::{Arg, ArgMatches, Command};
use gipfel_base::{Error, Result, ResultExt};
use gipfel_io::{Buf, spawn_local, time};

use super::number;
use super::open::{self, Cache, Image, Named};

const EXAMPLES: &str = "\
Examples:
  gipfel img bench disk.qcow2
  gipfel img bench -t none -c 100000 -d 32 -s 64k -f raw disk.raw
  gipfel img bench -w --pattern=65 --flush-interval=1000 scratch.qcow2

-w overwrites data.";

const MOST: u64 = i32::MAX as u64;

/// The definition of the command line.
pub fn command() -> Command {
    let value = super::value;
    super::subcommand("bench", "Measure how long requests take", EXAMPLES)
        .args(open::args())
        .arg(value("cache", Some('t'), "MODE", "Cache mode (default: writeback)"))
        .arg(value("count", Some('c'), "N", "Number of requests (default: 75000)"))
        .arg(value("depth", Some('d'), "N", "Requests under way at once (default: 64)"))
        .arg(value("offset", Some('o'), "OFFSET", "Where the first one goes (default: 0)"))
        .arg(value("buffer-size", Some('s'), "SIZE", "Size of a request (default: 4k)"))
        .arg(value("step-size", Some('S'), "SIZE", "From one to the next (default: their size)"))
        .arg(value("aio", Some('i'), "threads|native|io_uring", "Taken; io_uring is always used"))
        .arg(super::flag("native", Some('n'), "The same as -i native"))
        .arg(super::flag("write", Some('w'), "Write (default: read)"))
        .arg(value("pattern", None, "BYTE", "What is written (default: 0)"))
        .arg(value("flush-interval", None, "N", "Flush after so many writes"))
        .arg(super::flag("no-drain", None, "Do not wait for writes before a flush"))
        .arg(super::flag("quiet", Some('q'), "Taken, and without effect"))
        .arg(Arg::new("filename").value_name("FILENAME").required(true).help("The image"))
}

/// What is measured.
#[derive(Clone, Copy)]
struct Plan {
    count: u64,
    depth: u64,
    offset: u64,
    size: u64,
    step: u64,
    writes: bool,
    pattern: u8,
    /// Writes from one flush to the next; 0 for no flush.
    interval: u64,
    drain: bool,
}

/// Carries out the command.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    let plan = plan(m)?;
    let cache = Cache::parse(super::text(m, "cache").unwrap_or("writeback")).at(|| "-t")?;
    check_aio(m, cache)?;
    let name = super::text(m, "filename").unwrap_or_default();
    let named = Named { cache, writable: plan.writes, ..open::named(m, name)? };
    if plan.writes && named.share {
        return Err(Error::invalid("-w writes to the image, and -U is for looking only"));
    }
    super::on_graph(m, "the image may have been overwritten in part", async |graph| {
        let image = open::open(&graph, named, "image").await?;
        super::print(&plan.head())?;
        let begun = time::Instant::now();
        plan.run(image).await.at(|| "a request has failed")?;
        let took = time::Instant::now().since(begun);
        super::print(&format!("Run completed in {:.3} seconds.\n", took.as_secs_f64()))?;
        Ok(ExitCode::SUCCESS)
    })
}

fn plan(m: &ArgMatches) -> Result<Plan> {
    let size = number(m, "buffer-size", 1, MOST)?.unwrap_or(4096);
    let plan = Plan {
        count: number(m, "count", 1, MOST)?.unwrap_or(75_000),
        depth: number(m, "depth", 1, MOST)?.unwrap_or(64),
        offset: number(m, "offset", 0, i64::MAX as u64)?.unwrap_or(0),
        size,
        step: number(m, "step-size", 0, MOST)?.filter(|n| *n > 0).unwrap_or(size),
        writes: m.get_flag("write"),
        pattern: number(m, "pattern", 0, 255)?.unwrap_or(0) as u8,
        interval: number(m, "flush-interval", 0, MOST)?.unwrap_or(0),
        drain: !m.get_flag("no-drain"),
    };
    if plan.interval > 0 && !plan.writes {
        return Err(Error::invalid("--flush-interval is for writes (-w)"));
    }
    if plan.interval > 0 && plan.interval < plan.depth {
        return Err(Error::invalid(format!(
            "--flush-interval {} is less than the {} requests under way at once (-d)",
            plan.interval, plan.depth
        )));
    }
    Ok(plan)
}

/// All I/O goes through io_uring; what else is asked for must at least make sense.
fn check_aio(m: &ArgMatches, cache: Cache) -> Result<()> {
    let native = match super::text(m, "aio") {
        None | Some("threads" | "io_uring") => m.get_flag("native"),
        Some("native") => true,
        Some(o) => {
            return Err(Error::invalid(format!("--aio is threads, native or io_uring, not '{o}'")));
        }
    };
    if native && !cache.direct {
        return Err(Error::invalid("native AIO needs -t none or -t directsync"));
    }
    Ok(())
}

impl Plan {
    fn head(&self) -> String {
        let mut text = format!(
            "Sending {} {} requests, {} bytes each, {} in parallel \
             (starting at offset {}, step size {})\n",
            self.count,
            if self.writes { "write" } else { "read" },
            self.size,
            self.depth,
            self.offset,
            self.step
        );
        if self.interval > 0 {
            text += &format!("Sending flush every {} requests\n", self.interval);
        }
        text
    }

    async fn run(self, image: Image) -> Result<()> {
        let image = Rc::new(image);
        let data = Buf::new(if self.writes { self.size as usize } else { 0 });
        data.fill(self.pattern);
        let next = Rc::new(Next { at: Cell::new(self.offset), left: Cell::new(self.count) });
        while next.left.get() > 0 {
            // The queue is drained where the number of requests left is a multiple of this.
            let until = match self.interval {
                i if i > 0 && self.drain => (next.left.get() - 1) / i * i,
                _ => 0,
            };
            let workers: Vec<_> = (0..self.depth.min(next.left.get() - until))
                .map(|_| {
                    let (image, next, data) = (image.clone(), next.clone(), data.clone());
                    spawn_local(async move { self.work(&image, &next, until, data).await })
                })
                .collect();
            for w in workers {
                w.await?;
            }
            if self.interval > 0 && self.drain {
                image.backend.flush().await?;
            }
        }
        Ok(())
    }

    /// Sends requests one after the other, until `until` are left.
    async fn work(self, image: &Image, next: &Next, until: u64, data: Buf) -> Result<()> {
        let buf = if self.writes { data } else { Buf::new(self.size as usize) };
        while let Some(at) = next.take(&self, image.node.size(), until) {
            let is_turn = next.left.get().is_multiple_of(self.interval);
            let flushes = self.interval > 0 && !self.drain && is_turn;
            if self.writes {
                image.backend.write(at, buf.clone(), false).await?;
            } else {
                image.backend.read(at, buf.clone()).await?;
            }
            if flushes {
                image.backend.flush().await?;
            }
        }
        Ok(())
    }
}

/// Where the next request goes, and how many are left.
struct Next {
    at: Cell<u64>,
    left: Cell<u64>,
}

impl Next {
    fn take(&self, plan: &Plan, disk: u64, until: u64) -> Option<u64> {
        let left = self.left.get().checked_sub(1).filter(|n| *n >= until)?;
        self.left.set(left);
        let at = self.at.get();
        // Past the end it begins again at the start.
        let after = at.saturating_add(plan.step);
        self.at.set(if after >= disk && disk > 0 { after % disk } else { after });
        Some(at)
    }
}

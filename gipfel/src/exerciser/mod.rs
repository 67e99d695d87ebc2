//! `gipfel io`, also called as `qemu-io`: the disk exerciser. It reads, writes and examines an
//! image request by request, as commands say.
//!
//! Commands, options, what is printed on standard output and exit codes are those of qemu-io, so
//! that scripts run unchanged; complaints go to standard error in words of our own. It stands on a
//! graph of its own, as a client like any other. Signals keep their usual meaning: a crash of this
//! process is something that scripts ask for.

mod breaks;
mod commands;
mod facts;
mod image;
mod medium;
mod report;
mod requests;
mod words;

use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use gipfel_base::{Error, ErrorKind, Result, ResultExt};
use gipfel_graph::Graph;
use gipfel_io::net::Stream;
use gipfel_io::time::sleep;
use gipfel_io::{Buf, Runtime, signals};

use crate::drivers;
use crate::img::{flag, objects, print, text, texts, value};
use commands::{Needs, Verb};
use image::{Image, Opening};
use requests::{InFlight, Request};
use words::{Call, number};

const EXAMPLES: &str = "\
Examples:
  gipfel io -f raw -c 'write -P 0x55 0 64k' -c 'read -P 0x55 0 64k' disk.raw
  gipfel io -r -c map -c 'read -v 0 512' disk.qcow2
  gipfel io -c 'aio_write 0 1M' -c 'aio_read 1M 1M' -c aio_flush disk.qcow2
  gipfel io --image-opts -c length driver=qcow2,file.filename=disk.qcow2
  gipfel io blkdebug:rules.conf:disk.qcow2          asks for commands

Commands come from -c, else from standard input; 'gipfel io -c help' lists them. Exit status: 0 if
all of them went well, 1 if one failed. Called by the name qemu-io it does the same.";

/// What stands before each command on standard input.
const PROMPT: &str = "qemu-io> ";
/// Longest line on standard input, in bytes.
const MAX_LINE: usize = 1 << 20;

/// The definition of the command line, under the name by which it was called.
pub fn command(name: &'static str) -> Command {
    let more = |name, help| value(name, None, "VALUE", help).action(ArgAction::Append);
    Command::new(name)
        .about("Exercise a disk image: single reads, writes and questions")
        .after_help(EXAMPLES)
        // Scripts read the version of the tool that this stands for.
        .version(concat!("version 10.0.2 (gipfel ", env!("CARGO_PKG_VERSION"), ")"))
        .args_override_self(true)
        .infer_long_args(true)
        .arg(more("object", "Make an object: secret,id=ID,data=TEXT or throttle-group,id=ID,..."))
        .arg(flag("image-opts", None, "The image is given as options: driver=...,file.filename="))
        .arg(more("cmd", "Carry out this command; several are carried out in turn").short('c'))
        .arg(value("format", Some('f'), "FORMAT", "The image's format (default: looked at)"))
        .arg(flag("read-only", Some('r'), "Open it for reading only"))
        .arg(flag("snapshot", Some('s'), "Write to a temporary overlay"))
        .arg(flag("nocache", Some('n'), "Past the host's page cache, as -t none"))
        .arg(flag("copy-on-read", Some('C'), "Keep what is read from a backing image"))
        .arg(flag("misalign", Some('m'), "Use buffers that are not aligned"))
        .arg(flag("native-aio", Some('k'), "As -i native"))
        .arg(value("aio", Some('i'), "MODE", "threads, native or io_uring; all work alike here"))
        .arg(value("cache", Some('t'), "MODE", "Cache mode (default: writeback)"))
        .arg(value("discard", Some('d'), "MODE", "What discards do: unmap (default) or ignore"))
        .arg(value("trace", Some('T'), "OPTIONS", "Not offered by this version").hide(true))
        .arg(flag("force-share", Some('U'), "Open it although others use it (needs -r)"))
        .arg(Arg::new("file").value_name("FILE").help("The image"))
}

/// Carries out the commands.
pub fn run(m: &ArgMatches) -> Result<ExitCode> {
    if m.contains_id("trace") {
        return Err(Error::unsupported("this version traces nothing: leave --trace (-T) out"));
    }
    let owned = |name: &str| text(m, name).map(str::to_owned);
    let opening = owned("file").map(|file| Opening {
        name: Some(file),
        is_options: m.get_flag("image-opts"),
        format: owned("format"),
        options: Vec::new(),
        read_only: m.get_flag("read-only"),
        snapshot: m.get_flag("snapshot"),
        copy_on_read: m.get_flag("copy-on-read"),
        share: m.get_flag("force-share"),
        no_cache: m.get_flag("nocache"),
        cache: owned("cache"),
        discard: owned("discard"),
        native_aio: m.get_flag("native-aio"),
        aio: owned("aio"),
    });
    if m.get_flag("image-opts") && m.contains_id("format") {
        return Err(Error::invalid(
            "--image-opts says the format in its options: leave --format (-f) out",
        ));
    }
    let objects = objects(m)?;
    Runtime::new(0)?.block_on(async {
        let mut session = Session {
            graph: Graph::new(drivers::registry(&objects, &Arc::default())),
            image: None,
            opened: 0,
            in_flight: Rc::default(),
            misaligned: m.get_flag("misalign"),
        };
        if let Some(o) = opening {
            session.open(&o).await?;
        }
        let good = match m.contains_id("cmd") {
            true => session.run_all(texts(m, "cmd")).await,
            false => session.run_input().await?,
        };
        session.in_flight.settle().await;
        session.graph.close_all().await?;
        Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    })?
}

/// Prints that something failed in the form that scripts read, and, with `explain`, why where that
/// says more.
fn failed(what: &str, e: &Error, explain: bool) -> Result<bool> {
    let short = Error::os(e.errno(), format!("{what} failed"));
    print(&format!("{short}\n"))?;
    let says_more = !matches!(
        e.kind(),
        ErrorKind::Os(_) | ErrorKind::NoSpace | ErrorKind::NotFound | ErrorKind::PermissionDenied
    );
    if explain && says_more {
        crate::complain(e);
    }
    Ok(false)
}

/// What becomes of the session after a command.
enum Next {
    Well,
    Badly,
    End,
}

impl From<bool> for Next {
    fn from(good: bool) -> Next {
        if good { Next::Well } else { Next::Badly }
    }
}

/// The commands of one run, and what they work on.
struct Session {
    graph: Rc<Graph>,
    image: Option<Image>,
    /// How many images have been opened.
    opened: u64,
    in_flight: Rc<InFlight>,
    misaligned: bool,
}

impl Session {
    /// Carries out commands until one of them is `quit`. Whether all went well.
    async fn run_all<'a>(&mut self, lines: impl Iterator<Item = &'a str>) -> bool {
        let mut good = true;
        for line in lines {
            match self.run(line).await {
                Next::Well => {}
                Next::Badly => good = false,
                Next::End => break,
            }
        }
        good
    }

    /// Carries out the lines of standard input, while requests go on.
    async fn run_input(&mut self) -> Result<bool> {
        let input = Stream::stdio()?;
        let (mut good, mut text) = (true, Vec::new());
        print(PROMPT)?;
        loop {
            let part = Buf::new(4096);
            let n = input.recv(part.clone()).await?;
            text.extend_from_slice(&part.slice(0..n).to_vec());
            if n == 0 && !text.is_empty() {
                text.push(b'\n');
            }
            while let Some(end) = text.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = text.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line[..end]);
                match self.run(&line).await {
                    Next::Well => {}
                    Next::Badly => good = false,
                    Next::End => return Ok(good),
                }
                print(PROMPT)?;
            }
            if n == 0 {
                return Ok(good);
            }
            if text.len() > MAX_LINE {
                let text = format!("a command is longer than {MAX_LINE} bytes");
                return Err(Error::new(ErrorKind::Limit, text));
            }
        }
    }

    async fn run(&mut self, line: &str) -> Next {
        let done = match Call::read(line) {
            Ok(Some(call)) => self.carry_out(&call).await,
            Ok(None) => Ok(Next::Well),
            Err(e) => Err(e),
        };
        done.unwrap_or_else(|e| {
            crate::complain(&e);
            Next::Badly
        })
    }

    async fn carry_out(&mut self, call: &Call<'_>) -> Result<Next> {
        if call.def.needs == Needs::Nothing {
            return self.without_image(call).await;
        }
        let Some(image) = &mut self.image else {
            return Err(Error::new(
                ErrorKind::NoMedium,
                format!("{}: no image is open; 'open FILE' opens one", call.def.name()),
            ));
        };
        if call.def.needs == Needs::WritableImage && !image.is_writable() {
            let text = format!("{}: the image was opened read-only", call.def.name());
            return Err(Error::new(ErrorKind::ReadOnly, text));
        }
        match call.def.verb {
            Verb::AioFlush => self.in_flight.settle().await,
            Verb::AioRead | Verb::AioWrite => {
                let request = Request::new(call, image.medium.clone(), self.misaligned)?;
                self.in_flight.begin(request).await?;
            }
            Verb::Alloc => return Ok(facts::alloc(image, call).await?.into()),
            Verb::Break | Verb::RemoveBreak | Verb::Resume | Verb::WaitBreak => {
                return Ok(breaks::run(image, &self.in_flight, call).await?.into());
            }
            Verb::Close => {
                self.in_flight.settle().await;
                if let Some(image) = self.image.take() {
                    image.close().await?;
                }
            }
            Verb::Flush => image.medium.backend.flush().await.at(|| "flush")?,
            Verb::Info => facts::info(image).await?,
            Verb::Length => facts::length(image)?,
            Verb::Map => facts::map(image).await?,
            Verb::Reopen => {
                self.in_flight.settle().await;
                image.reopen(call).await?;
            }
            Verb::Truncate => facts::truncate(image, call).await?,
            Verb::Zone => {
                let e = Error::unsupported("zoned disks are not offered by this version");
                return Ok(failed(call.def.name(), &e, true)?.into());
            }
            _ => {
                let request = Request::new(call, image.medium.clone(), self.misaligned)?;
                return Ok(request.run().await?.into());
            }
        }
        Ok(Next::Well)
    }

    async fn without_image(&mut self, call: &Call<'_>) -> Result<Next> {
        match call.def.verb {
            Verb::Abort => std::process::abort(),
            Verb::Quit => return Ok(Next::End),
            Verb::Open => self.open(&Opening::from_call(call)?).await?,
            Verb::Sigraise => {
                let signal = number(call.args[0])?;
                let signal = i32::try_from(signal).map_err(|_| Error::invalid("no such signal"))?;
                signals::raise(signal)?;
            }
            Verb::Sleep => sleep(Duration::from_millis(number(call.args[0])?)).await,
            _ => match call.args.first() {
                Some(name) => print(&commands::find(name)?.help())?,
                None => print(&commands::list())?,
            },
        }
        Ok(Next::Well)
    }

    async fn open(&mut self, o: &Opening) -> Result<()> {
        if self.image.is_some() {
            return Err(Error::new(
                ErrorKind::InUse,
                "open: an image is open already; 'close' closes it",
            ));
        }
        let name = format!("image{}", self.opened);
        self.image = Some(Image::open(&self.graph, name, o).await?);
        self.opened += 1;
        Ok(())
    }
}

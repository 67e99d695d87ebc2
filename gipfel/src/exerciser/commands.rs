//! The commands: what they are called, what they take, what they do. One table, from which lines
//! are read and help is written.

use std::fmt::Write;

use gipfel_base::{Error, ErrorKind, Result};

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Abort,
    AioFlush,
    AioRead,
    AioWrite,
    Alloc,
    Break,
    Close,
    Discard,
    Flush,
    Help,
    Info,
    Length,
    Map,
    Open,
    Quit,
    Read,
    Readv,
    RemoveBreak,
    Reopen,
    Resume,
    Sigraise,
    Sleep,
    Truncate,
    WaitBreak,
    Write,
    Writev,
    /// One of the commands for zoned disks.
    Zone,
}

/// What a command needs to be open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    Nothing,
    Image,
    WritableImage,
}

/// An option: one letter, perhaps with a value.
pub struct Opt {
    /// As it is written after `-`.
    pub letter: char,
    /// What its value is called, if it has one.
    pub value: Option<&'static str>,
    help: &'static str,
}

/// A command.
pub struct Def {
    /// What it does.
    pub verb: Verb,
    name: &'static str,
    alias: Option<&'static str>,
    /// The options that it has.
    pub options: &'static [Opt],
    args: &'static str,
    /// The fewest and the most arguments that it takes.
    pub count: (usize, usize),
    /// What must be open.
    pub needs: Needs,
    about: &'static str,
    more: &'static str,
}

const fn flag(letter: char, help: &'static str) -> Opt {
    Opt { letter, value: None, help }
}

const fn opt(letter: char, value: &'static str, help: &'static str) -> Opt {
    Opt { letter, value: Some(value), help }
}

/// Most buffers of one request.
const MAX_BUFFERS: usize = 1024;

const MACHINE: Opt = flag('C', "print the statistics as one line of values");
const QUIET: Opt = flag('q', "print no statistics");
const REGISTERED: Opt = flag('r', "register the buffer; it has no effect here");
const IGNORED: Opt = flag('p', "taken and ignored, for old scripts");
const INVALID: Opt = flag('i', "do nothing: the request counts as an invalid one");
const DUMP: Opt = flag('v', "print the bytes that were read");
const VERIFY: Opt = opt('P', "pattern", "fail unless every byte that was read is this one");
const FILL: Opt = opt('P', "pattern", "write this byte instead of 0xcd");
const FUA: Opt = flag('f', "the write is durable before it completes");
const ZEROES: Opt = flag('z', "write zeros as such, without a buffer");
const UNMAP: Opt = flag('u', "with -z: space may be given back");

const fn command(
    verb: Verb,
    name: &'static str,
    args: &'static str,
    count: (usize, usize),
    about: &'static str,
) -> Def {
    Def { verb, name, alias: None, options: &[], args, count, needs: Needs::Image, about, more: "" }
}

const fn zone(name: &'static str, alias: &'static str, args: &'static str, most: usize) -> Def {
    let about = "a command for zoned disks, which this version does not have";
    Def { alias: Some(alias), ..command(Verb::Zone, name, args, (2, most), about) }
}

static COMMANDS: [Def; 32] = [
    Def {
        needs: Needs::Nothing,
        more: "The process ends as in a crash (SIGABRT): nothing is written back.",
        ..command(Verb::Abort, "abort", "", (0, 0), "end the process as in a crash")
    },
    command(Verb::AioFlush, "aio_flush", "", (0, 0), "wait for all requests that are under way"),
    Def {
        options: &[MACHINE, INVALID, QUIET, REGISTERED, DUMP, VERIFY],
        more: "The next command begins at once. What came of the request is printed when it is \
               done, and fails nothing; aio_flush waits for it.\n\
               Example: aio_read -v 512 1k 1k\n  reads 2 KiB from byte 512 on and prints them",
        ..command(
            Verb::AioRead,
            "aio_read",
            "offset length [length..]",
            (2, MAX_BUFFERS + 1),
            "read, and go on meanwhile",
        )
    },
    Def {
        options: &[MACHINE, FUA, INVALID, QUIET, REGISTERED, UNMAP, ZEROES, FILL],
        needs: Needs::WritableImage,
        more: "The next command begins at once. What came of the request is printed when it is \
               done, and fails nothing; aio_flush waits for it.\n\
               Example: aio_write -P 0x55 512 1k 1k\n  writes 2 KiB from byte 512 on",
        ..command(
            Verb::AioWrite,
            "aio_write",
            "offset length [length..]",
            (2, MAX_BUFFERS + 1),
            "write, and go on meanwhile",
        )
    },
    Def {
        alias: Some("a"),
        more: "What lies in a backing image only is not counted.",
        ..command(
            Verb::Alloc,
            "alloc",
            "offset [length]",
            (1, 2),
            "count the bytes that the image itself holds there (length: 512)",
        )
    },
    Def {
        more: "The image must stand on blkdebug: blkdebug::FILE. Events are those of the QMP \
               reference (BlkdebugEvent), such as write_aio.\n\
               Example: break write_aio A",
        ..command(
            Verb::Break,
            "break",
            "event tag",
            (2, 2),
            "let the next request that comes to an event wait there",
        )
    },
    Def { alias: Some("c"), ..command(Verb::Close, "close", "", (0, 0), "close the image") },
    Def {
        alias: Some("d"),
        options: &[MACHINE, QUIET],
        needs: Needs::WritableImage,
        more: "Example: discard 512 1k",
        ..command(
            Verb::Discard,
            "discard",
            "offset length",
            (2, 2),
            "let go of the bytes of a range",
        )
    },
    Def {
        alias: Some("f"),
        ..command(Verb::Flush, "flush", "", (0, 0), "make durable what was written")
    },
    Def {
        alias: Some("?"),
        needs: Needs::Nothing,
        ..command(Verb::Help, "help", "[command]", (0, 1), "list the commands, or explain one")
    },
    Def {
        alias: Some("i"),
        ..command(Verb::Info, "info", "", (0, 0), "tell the format of the image and its facts")
    },
    Def {
        alias: Some("l"),
        ..command(Verb::Length, "length", "", (0, 0), "tell the size of the disk")
    },
    command(Verb::Map, "map", "", (0, 0), "list what the image itself holds and what not"),
    Def {
        alias: Some("o"),
        needs: Needs::Nothing,
        options: &[
            flag('r', "for reading only"),
            flag('s', "write to a temporary overlay that is gone with the image"),
            flag('C', "keep what is read from a backing image (copy-on-read)"),
            flag('n', "past the host's page cache, as -t none"),
            flag('U', "although others use the image"),
            flag('k', "as -i native"),
            opt('i', "aio", "threads, native or io_uring; all work alike here"),
            opt('t', "cache", "writeback, writethrough, none, directsync or unsafe"),
            opt('d', "discard", "unmap or ignore"),
            opt('o', "options", "options of the node: driver=raw,..."),
        ],
        more: "Without a path the options say all: open -o driver=qcow2,file.filename=disk.qcow2\n\
               Example: open -n -o driver=raw /tmp/data",
        ..command(Verb::Open, "open", "[path]", (0, 1), "open an image")
    },
    Def {
        alias: Some("q"),
        needs: Needs::Nothing,
        ..command(Verb::Quit, "quit", "", (0, 0), "close everything and end")
    },
    Def {
        alias: Some("r"),
        options: &[
            flag('b', "read the state of a virtual machine, not the disk"),
            MACHINE,
            IGNORED,
            QUIET,
            REGISTERED,
            DUMP,
            VERIFY,
            opt('s', "offset", "with -P: the first byte that is looked at"),
            opt('l', "length", "with -P: how many bytes are looked at"),
        ],
        more: "Example: read -v 512 1k\n  reads 1 KiB from byte 512 on and prints it",
        ..command(Verb::Read, "read", "offset length", (2, 2), "read")
    },
    Def {
        options: &[MACHINE, QUIET, REGISTERED, DUMP, VERIFY],
        more: "Example: readv -v 512 1k 1k\n  reads 2 KiB from byte 512 on and prints them",
        ..command(
            Verb::Readv,
            "readv",
            "offset length [length..]",
            (2, MAX_BUFFERS + 1),
            "read into several buffers",
        )
    },
    command(Verb::RemoveBreak, "remove_break", "tag", (1, 1), "remove the breakpoints of a tag"),
    Def {
        options: &[
            flag('r', "for reading only from now on"),
            flag('w', "for writing too from now on"),
            opt('c', "cache", "writeback, writethrough, none, directsync or unsafe"),
            opt('o', "options", "options of the node, and file.OPTION for those of its file"),
        ],
        more: "Example: reopen -r -o discard=ignore",
        ..command(Verb::Reopen, "reopen", "", (0, 0), "change the options of the open image")
    },
    command(Verb::Resume, "resume", "tag", (1, 1), "let a request that waits go on"),
    Def {
        needs: Needs::Nothing,
        more: "Example: sigraise 9\n  ends the process as SIGKILL does",
        ..command(Verb::Sigraise, "sigraise", "signal", (1, 1), "send this process a signal")
    },
    Def {
        needs: Needs::Nothing,
        ..command(Verb::Sleep, "sleep", "milliseconds", (1, 1), "wait that long")
    },
    Def {
        alias: Some("t"),
        options: &[opt('m', "mode", "what is new is made ready: off, falloc, full, metadata")],
        needs: Needs::WritableImage,
        ..command(Verb::Truncate, "truncate", "size", (1, 1), "change the size of the disk")
    },
    command(Verb::WaitBreak, "wait_break", "tag", (1, 1), "wait until a request waits there"),
    Def {
        alias: Some("w"),
        options: &[
            flag('b', "write the state of a virtual machine, not the disk"),
            flag('c', "compress what is written"),
            MACHINE,
            FUA,
            flag('n', "with -z: fail rather than write zeros as data"),
            IGNORED,
            QUIET,
            REGISTERED,
            UNMAP,
            ZEROES,
            FILL,
            opt('s', "file", "write the bytes of a file, again and again"),
        ],
        needs: Needs::WritableImage,
        more: "Example: write -P 0x55 512 1k\n  writes 1 KiB from byte 512 on",
        ..command(Verb::Write, "write", "offset length", (2, 2), "write")
    },
    Def {
        options: &[MACHINE, FUA, QUIET, REGISTERED, FILL],
        needs: Needs::WritableImage,
        more: "Example: writev 512 1k 1k\n  writes 2 KiB from byte 512 on",
        ..command(
            Verb::Writev,
            "writev",
            "offset length [length..]",
            (2, MAX_BUFFERS + 1),
            "write from several buffers",
        )
    },
    zone("zone_append", "zap", "offset length [length..]", MAX_BUFFERS + 1),
    zone("zone_close", "zc", "offset length", 2),
    zone("zone_finish", "zf", "offset length", 2),
    zone("zone_open", "zo", "offset length", 2),
    zone("zone_report", "zrp", "offset number", 2),
    zone("zone_reset", "zrs", "offset length", 2),
];

/// The command of that name or short name.
pub fn find(name: &str) -> Result<&'static Def> {
    COMMANDS.iter().find(|d| d.name == name || d.alias == Some(name)).ok_or_else(|| {
        let names: Vec<_> = COMMANDS.iter().map(|d| d.name).collect();
        let near = match crate::img::options::nearest(name, &names) {
            Some(n) => format!("did you mean '{n}'?"),
            None => "'help' lists them".to_owned(),
        };
        Error::new(ErrorKind::NotFound, format!("there is no command '{name}'; {near}"))
    })
}

/// The list of all commands.
pub fn list() -> String {
    let lines = COMMANDS.iter().map(|d| format!("{} -- {}\n", d.usage(), d.about));
    lines.collect::<String>() + "\n'help COMMAND' tells more about one.\n"
}

impl Def {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    fn usage(&self) -> String {
        let mut text = self.name.to_owned();
        let flags: String =
            self.options.iter().filter(|o| o.value.is_none()).map(|o| o.letter).collect();
        if !flags.is_empty() {
            let _ = write!(text, " [-{flags}]");
        }
        for o in self.options {
            if let Some(value) = o.value {
                let _ = write!(text, " [-{} {value}]", o.letter);
            }
        }
        if !self.args.is_empty() {
            let _ = write!(text, " {}", self.args);
        }
        text
    }

    /// Says that the command was written in a way that it does not take.
    pub fn usage_error(&self, what: &str) -> Error {
        Error::invalid(format!("{}: {what}; it is written '{}'", self.name, self.usage()))
    }

    /// What `help` says of it.
    pub fn help(&self) -> String {
        let mut text = format!("{} -- {}\n", self.usage(), self.about);
        if let Some(alias) = self.alias {
            let _ = writeln!(text, "  in short: {alias}");
        }
        for o in self.options {
            let value = o.value.map_or(String::new(), |v| format!(" {v}"));
            let _ = writeln!(text, "  {:<12} {}", format!("-{}{value}", o.letter), o.help);
        }
        if !self.more.is_empty() {
            let _ = write!(text, "\n{}\n", self.more);
        }
        text
    }
}

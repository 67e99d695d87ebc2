//! The rules: each reads sources and says where they break an invariant.
//!
//! A rule is a pure function from sources to findings; ARCHITECTURE.md says why each exists.
//! Rules are textual. They catch slips, not intent: a rule can be outwitted, a review cannot.

use crate::source::{Source, used_paths, words};

/// One broken rule at one place.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// The file, relative to the root of the repository.
    pub path: String,
    /// The line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// Which rule is broken, and what to do about it.
    pub message: String,
}

fn found(s: &Source, line: usize, message: impl Into<String>) -> Finding {
    Finding { path: s.path.clone(), line, message: message.into() }
}

/// Longest line, in characters (rustfmt leaves strings and comments as they are).
pub const MAX_LINE: usize = 100;
/// Longest Rust file without its tests, in lines; about 600 is what one aims for.
pub const MAX_FILE: usize = 700;

/// Files that may be longer than [`MAX_FILE`], how long, and why.
pub const LONG_FILES: &[(&str, usize, &str)] = &[];

/// The crates whose code never touches the operating system directly.
const ABOVE_IO: &[&str] =
    &["node", "protocols", "formats", "filters", "graph", "jobs", "exports", "qmp"];

/// What the crates above io reach only through io: path prefix, and what to use instead.
const OS_PATHS: &[(&str, &str)] = &[
    ("std::fs", "gipfel_io's files"),
    ("std::net", "gipfel_io's sockets"),
    ("std::os", "gipfel_io's files and sockets"),
    ("std::process", "a report to the binary"),
    ("std::thread", "gipfel_io's executor"),
    ("std::time::Instant", "gipfel_io's clock"),
    ("std::time::SystemTime", "gipfel_io's clock"),
    ("std::time::UNIX_EPOCH", "gipfel_io's clock"),
    ("std::time::self", "gipfel_io's clock, or std::time::Duration by its full path"),
    ("gipfel_base::sync::thread", "gipfel_io's executor"),
    ("libc", "gipfel_io"),
    ("io_uring", "gipfel_io"),
];

/// Plain values that live beside them and do nothing by themselves.
const OS_VALUES: &[&str] = &["std::net::SocketAddr", "std::net::IpAddr"];

/// Which gipfel crates a crate may depend on: what stands above it in ARCHITECTURE.md's list,
/// without the drivers for those that must name none.
pub const MAY_DEPEND_ON: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("io", &["base"]),
    ("node", &["base", "io"]),
    ("protocols", &["base", "io", "node"]),
    ("formats", &["base", "io", "node"]),
    ("filters", &["base", "io", "node"]),
    ("graph", &["base", "io", "node"]),
    ("jobs", &["base", "io", "node", "graph"]),
    ("exports", &["base", "io", "node", "graph"]),
    ("qmp", &["base", "io", "node", "graph", "jobs", "exports"]),
    (
        "gipfel",
        &[
            "base",
            "io",
            "node",
            "protocols",
            "formats",
            "filters",
            "graph",
            "jobs",
            "exports",
            "qmp",
            // For `gipfel demo` alone, which is a client of its own daemon.
            "testkit",
        ],
    ),
    ("testkit", &["base", "io"]),
    ("tidy", &[]),
];

/// `unsafe` stands in io only, and every other crate takes the workspace's lints that deny it.
pub fn unsafe_only_in_io(s: &Source) -> Vec<Finding> {
    if s.top() == "io" {
        return Vec::new();
    }
    if s.path.ends_with("/Cargo.toml") && !toml_section(&s.text, "lints").any(is_inherit) {
        return vec![found(s, 0, "write `[lints] workspace = true`: it is what denies unsafe")];
    }
    if !s.is_rust() {
        return Vec::new();
    }
    s.code
        .lines()
        .enumerate()
        .filter(|(_, l)| words(l).any(|w| w == "unsafe" || w == "unsafe_code"))
        .map(|(i, _)| found(s, i + 1, "unsafe belongs to io: give io a safe function for it"))
        .collect()
}

fn is_inherit((_, line): (usize, &str)) -> bool {
    line.replace(' ', "") == "workspace=true"
}

/// From node up there is no file, socket, thread or clock of the operating system.
pub fn no_os_above_io(s: &Source) -> Vec<Finding> {
    if !s.is_rust() || !ABOVE_IO.contains(&s.top()) {
        return Vec::new();
    }
    let mut out = Vec::new();
    let mut check = |line: usize, path: &str| {
        if OS_VALUES.contains(&path) {
            return;
        }
        for (os, instead) in OS_PATHS {
            let rest = path.strip_prefix(os);
            if rest.is_some_and(|r| r.is_empty() || r.starts_with("::")) {
                out.push(found(s, line, format!("`{os}` above io: use {instead}")));
            }
        }
    };
    for (line, path) in used_paths(s) {
        check(line, path.split(" as ").next().unwrap_or(&path));
    }
    for (line, code) in s.product_code() {
        if code.trim_start().starts_with("use ") || code.trim_start().starts_with("pub use ") {
            continue;
        }
        for path in paths_in(code) {
            check(line, path);
        }
    }
    out.sort();
    out.dedup();
    out
}

/// Paths of at least two parts in a line of code: `a::b::c`.
fn paths_in(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'))
        .filter(|p| p.contains("::"))
        .map(|p| p.trim_matches(':'))
}

/// Names of drivers that no other crate has a reason to write: common words are left out.
const DRIVER_WORDS: &[&str] = &[
    "qcow2",
    "qcow",
    "luks",
    "vmdk",
    "vhdx",
    "null_co",
    "null-co",
    "null_aio",
    "host_device",
    "blkdebug",
    "blkverify",
    "gipfel_protocols",
    "gipfel_formats",
    "gipfel_filters",
];

/// graph and exports name no driver.
pub fn no_driver_named(s: &Source) -> Vec<Finding> {
    if !s.is_rust() || !["graph", "exports"].contains(&s.top()) {
        return Vec::new();
    }
    s.product_code_and_strings()
        .filter_map(|(line, code)| {
            let low = code.to_lowercase();
            let driver = DRIVER_WORDS.iter().find(|d| low.contains(*d))?;
            let message = format!("'{driver}': {} names no driver; ask the node", s.top());
            Some(found(s, line, message))
        })
        .collect()
}

/// Drivers name no graph, export, job or command.
pub fn drivers_name_no_client(s: &Source) -> Vec<Finding> {
    if !s.is_rust() || !["protocols", "formats", "filters"].contains(&s.top()) {
        return Vec::new();
    }
    let clients = ["gipfel_graph", "gipfel_jobs", "gipfel_exports", "gipfel_qmp", "qmp", "Qmp"];
    s.product_code()
        .flat_map(|(line, code)| words(code).map(move |w| (line, w)))
        .filter(|(_, w)| clients.contains(w) || w.starts_with("Qmp") || w.starts_with("qmp_"))
        .map(|(line, w)| found(s, line, format!("'{w}': a driver knows its children only")))
        .collect()
}

/// A crate depends only on the crates that ARCHITECTURE.md puts above it.
pub fn dependency_order(s: &Source) -> Vec<Finding> {
    let Some(folder) = s.path.strip_suffix("/Cargo.toml") else {
        return Vec::new();
    };
    let Some((_, allowed)) = MAY_DEPEND_ON.iter().find(|(c, _)| *c == folder) else {
        let message = "a crate that the tidy check does not know: give it its place there";
        return vec![found(s, 0, message)];
    };
    toml_section(&s.text, "dependencies")
        .filter_map(|(line, text)| Some((line, text.strip_prefix("gipfel-")?)))
        .map(|(line, dep)| (line, dep.split(['.', ' ', '=']).next().unwrap_or(dep)))
        .filter(|(_, dep)| !allowed.contains(dep))
        .map(|(line, dep)| {
            let message = format!("{folder} may not depend on {dep}: see ARCHITECTURE.md, layers");
            found(s, line, message)
        })
        .collect()
}

/// The lines of one section of a TOML file, with their numbers; target tables count as theirs.
fn toml_section<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = (usize, &'a str)> {
    let mut inside = false;
    text.lines().enumerate().filter_map(move |(i, l)| {
        let l = l.trim();
        if l.starts_with('[') {
            let header = l.trim_matches(['[', ']']);
            inside = header == name
                || (header.starts_with("target.") && header.ends_with(&format!(".{name}")));
            return None;
        }
        (inside && !l.is_empty() && !l.starts_with('#')).then_some((i + 1, l))
    })
}

/// Nothing is left for later in the text: what is missing stands in an issue.
pub fn no_leftovers(s: &Source) -> Vec<Finding> {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    s.text
        .lines()
        .enumerate()
        .filter_map(|(i, l)| Some((i + 1, words(l).find(|w| marks.contains(w))?)))
        .map(|(line, w)| found(s, line, format!("{w}: do it, or refuse it with a clear error")))
        .collect()
}

/// No line of source is longer than [`MAX_LINE`].
pub fn line_length(s: &Source) -> Vec<Finding> {
    if ![".rs", ".py", ".sh"].iter().any(|e| s.path.ends_with(e)) {
        return Vec::new();
    }
    s.text
        .lines()
        .enumerate()
        .map(|(i, l)| (i + 1, l.chars().count()))
        .filter(|(_, n)| *n > MAX_LINE)
        .map(|(line, n)| found(s, line, format!("{n} characters in a line, at most {MAX_LINE}")))
        .collect()
}

/// No file is longer than [`MAX_FILE`] without its tests, but for [`LONG_FILES`].
pub fn file_length(s: &Source) -> Vec<Finding> {
    if !s.is_rust() {
        return Vec::new();
    }
    let listed = LONG_FILES.iter().find(|(p, ..)| *p == s.path);
    let limit = listed.map_or(MAX_FILE, |(_, n, _)| *n);
    let n = s.product_code().count();
    if n > limit {
        let message = format!("{n} lines without tests, at most {limit}: split it by purpose");
        return vec![found(s, 0, message)];
    }
    Vec::new()
}

/// Every module says at its head what it is for.
pub fn module_head(s: &Source) -> Vec<Finding> {
    if !s.is_rust() {
        return Vec::new();
    }
    let head = s.text.lines().map(str::trim).find(|l| !l.is_empty() && !l.starts_with("#!["));
    if head.is_some_and(|l| l.starts_with("//!")) {
        return Vec::new();
    }
    vec![found(s, 1, "begin with `//!`: what it is for, what it does not do, whose rule it is")]
}

/// Paths of one person's machine do not belong in the project.
pub fn no_machine_paths(s: &Source) -> Vec<Finding> {
    let places = ["work", "farm", "root", "home"];
    let mut out = Vec::new();
    for (i, line) in s.text.lines().enumerate() {
        for place in places {
            let path = format!("/{place}/");
            let stands_alone = line.match_indices(&path).any(|(at, _)| {
                let before = line[..at].chars().next_back();
                !before.is_some_and(|c| c.is_alphanumeric() || "_.-})$>/".contains(c))
            });
            if stands_alone {
                let message = format!("'{path}': a path of one machine; use a relative one");
                out.push(found(s, i + 1, message));
            }
        }
    }
    out
}

/// No test is switched off.
pub fn no_ignored_tests(s: &Source) -> Vec<Finding> {
    if !s.is_rust() {
        return Vec::new();
    }
    s.code
        .lines()
        .enumerate()
        .filter(|(_, l)| l.contains("#[ignore"))
        .map(|(i, _)| found(s, i + 1, "an ignored test tests nothing: run it or remove it"))
        .collect()
}

/// Links between the project's pages lead somewhere: `exists` knows the repository's paths.
pub fn links_lead_somewhere(s: &Source, exists: &dyn Fn(&str) -> bool) -> Vec<Finding> {
    if !s.path.ends_with(".md") {
        return Vec::new();
    }
    let folder = s.path.rsplit_once('/').map_or("", |(f, _)| f);
    let mut out = Vec::new();
    for (i, line) in s.text.lines().enumerate() {
        for link in line.split("](").skip(1) {
            let target = link.split([')', '#', ' ']).next().unwrap_or("");
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let path = resolve(folder, target);
            if !exists(&path) {
                out.push(found(s, i + 1, format!("the link to '{target}' leads nowhere")));
            }
        }
    }
    out
}

/// The path that `target` means seen from `folder`, without `.` and `..`.
fn resolve(folder: &str, target: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|p| !p.is_empty()).collect();
    for p in target.split('/') {
        match p {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            p => parts.push(p),
        }
    }
    parts.join("/")
}

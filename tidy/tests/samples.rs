//! Each rule finds its violation in sample text, and leaves decent text alone.

use gipfel_tidy::rules::{self, Finding};
use gipfel_tidy::source::Source;

/// The lines that `rule` finds in `text`, as if it stood at `path`.
fn lines(rule: fn(&Source) -> Vec<Finding>, path: &str, text: &str) -> Vec<usize> {
    rule(&Source::new(path, text)).into_iter().map(|f| f.line).collect()
}

#[test]
fn unsafe_outside_io() {
    let rule = rules::unsafe_only_in_io;
    let text = "// unsafe\nfn f() { unsafe { g() } }\nconst S: &str = \"unsafe\";\n";
    assert_eq!(lines(rule, "node/src/a.rs", text), [2]);
    assert_eq!(lines(rule, "io/src/a.rs", text), []);
    assert_eq!(lines(rule, "gipfel/src/main.rs", "#![allow(unsafe_code)]\n"), [1]);
    assert_eq!(lines(rule, "node/tests/a.rs", "fn f() { unsafe { g() } }\n"), [1]);
    assert_eq!(lines(rule, "node/Cargo.toml", "[package]\nname = \"x\"\n"), [0]);
    assert_eq!(lines(rule, "node/Cargo.toml", "[lints]\nworkspace = true\n"), []);
}

#[test]
fn operating_system_above_io() {
    let rule = rules::no_os_above_io;
    let text = "use std::{\n    fs::File,\n    time::Duration,\n};\n\
                fn f() {\n    std::thread::spawn(g);\n}\n";
    assert_eq!(lines(rule, "node/src/a.rs", text), [1, 6]);
    assert_eq!(lines(rule, "qmp/src/a.rs", "use std::time::{Duration, Instant};\n"), [1]);
    assert_eq!(lines(rule, "graph/src/a.rs", "use gipfel_base::sync::thread;\n"), [1]);
    assert_eq!(lines(rule, "exports/src/a.rs", "use std::os::fd::RawFd as Fd;\n"), [1]);
    assert_eq!(lines(rule, "io/src/a.rs", text), []);
    assert_eq!(lines(rule, "testkit/src/lib.rs", text), []);
    let test = "#[cfg(test)]\nmod tests {\n    use std::fs;\n}\n";
    assert_eq!(lines(rule, "node/src/a.rs", test), []);
    assert_eq!(lines(rule, "exports/src/a.rs", "use std::net::{SocketAddr, TcpStream};\n"), [1]);
    assert_eq!(lines(rule, "exports/src/a.rs", "use std::net::SocketAddr;\n"), []);
    let fine = "use std::time::Duration;\nuse std::sync::Arc;\nfn std_fs() { my::fs::read() }\n";
    assert_eq!(lines(rule, "node/src/a.rs", fine), []);
}

#[test]
fn a_driver_named_where_none_is_known() {
    let rule = rules::no_driver_named;
    let text = "// qcow2\nfn f() { if driver == \"qcow2\" {} }\nuse gipfel_formats::x;\n";
    assert_eq!(lines(rule, "graph/src/a.rs", text), [2, 3]);
    assert_eq!(lines(rule, "exports/src/nbd.rs", "struct Qcow2State;\n"), [1]);
    assert_eq!(lines(rule, "gipfel/src/a.rs", text), []);
}

#[test]
fn a_client_named_by_a_driver() {
    let rule = rules::drivers_name_no_client;
    let text = "use gipfel_graph::Backend;\n// the QMP reference\nfn f(q: QmpOptions) {}\n";
    assert_eq!(lines(rule, "formats/src/raw.rs", text), [1, 3]);
    assert_eq!(lines(rule, "graph/src/a.rs", text), []);
}

#[test]
fn dependencies_against_the_order() {
    let rule = rules::dependency_order;
    let text = "[dependencies]\ngipfel-base.workspace = true\ngipfel-formats.workspace = true\n\
                [dev-dependencies]\ngipfel-testkit.workspace = true\n";
    assert_eq!(lines(rule, "graph/Cargo.toml", text), [3]);
    assert_eq!(lines(rule, "gipfel/Cargo.toml", text), []);
    let target = "[target.'cfg(unix)'.dependencies]\ngipfel-graph = { path = \"../graph\" }\n";
    assert_eq!(lines(rule, "node/Cargo.toml", target), [2]);
    assert_eq!(lines(rule, "filters/Cargo.toml", "[dependencies]\ngipfel-testkit = {}\n"), [2]);
    assert_eq!(lines(rule, "unknown/Cargo.toml", ""), [0]);
}

#[test]
fn what_was_left_for_later() {
    let mark = concat!("a\n// TO", "DO: more\n");
    assert_eq!(lines(rules::no_leftovers, "README.md", mark), [2]);
    assert_eq!(lines(rules::no_leftovers, "README.md", "todo list\n"), []);
}

#[test]
fn lengths() {
    let long = format!("// {}\n", "ä".repeat(98));
    assert_eq!(lines(rules::line_length, "io/src/a.rs", &long), [1]);
    assert_eq!(lines(rules::line_length, "io/src/a.rs", &long[..long.len() - 3]), []);
    let tests = format!("//! A.\n#[cfg(test)]\nmod tests {{\n{}}}\n", "fn f() {}\n".repeat(900));
    assert_eq!(lines(rules::file_length, "io/src/a.rs", &tests), []);
    assert_eq!(lines(rules::file_length, "io/src/a.rs", &"fn f() {}\n".repeat(701)), [0]);
}

#[test]
fn heads_of_modules() {
    let rule = rules::module_head;
    assert_eq!(lines(rule, "io/src/a.rs", "use std::fs;\n//! Late.\n"), [1]);
    assert_eq!(lines(rule, "io/src/a.rs", ""), [1]);
    assert_eq!(lines(rule, "io/src/a.rs", "#![forbid(x)]\n\n//! What it is.\n"), []);
}

#[test]
fn paths_of_one_machine() {
    let rule = rules::no_machine_paths;
    let [w, h] = ["work", "home"].map(|place| format!("/{place}/x"));
    let text = format!("see {w}\nsee target{w}\nhttps://host{h}\n");
    assert_eq!(lines(rule, "README.md", &text), [1]);
}

#[test]
fn switched_off_tests() {
    assert_eq!(lines(rules::no_ignored_tests, "io/src/a.rs", "#[ignore]\nfn f() {}\n"), [1]);
}

#[test]
fn links_that_lead_nowhere() {
    let page = "[a](decisions/0001.md#x), [b](../README.md), [c](gone.md), [d](https://e.f/g)\n";
    let s = Source::new("docs/a.md", page);
    let exists = |p: &str| ["docs/decisions/0001.md", "README.md"].contains(&p);
    let found = rules::links_lead_somewhere(&s, &exists);
    assert_eq!(found.len(), 1);
    assert!(found[0].message.contains("gone.md"), "{}", found[0].message);
}

//! The examples of docs/backends-filters-mutators.md: each is run, each graph is compared.
#![allow(missing_docs)]

use std::path::PathBuf;
use std::process::Command;

use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Scratch};
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../docs/backends-filters-mutators.md");

/// The blocks of the page: their kind and their text.
fn blocks() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = PAGE;
    while let Some((_, after)) = rest.split_once("\n```") {
        let (kind, after) = after.split_once('\n').unwrap();
        let (text, after) = after.split_once("\n```").unwrap();
        found.push((kind.to_owned(), text.to_owned()));
        rest = after;
    }
    found
}

/// The words of a command line, with what stands between single quotes kept together.
fn words(line: &str) -> Vec<String> {
    let parts = line.split('\'').enumerate();
    parts
        .flat_map(|(i, p)| match i % 2 {
            0 => p.split_whitespace().map(str::to_owned).collect::<Vec<_>>(),
            _ => vec![p.to_owned()],
        })
        .collect()
}

fn gipfel(scratch: &Scratch, args: &[String]) -> (bool, String) {
    let out =
        Command::new(Daemon::binary()).args(args).current_dir(scratch.dir()).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn every_example_runs() {
    let scratch = Scratch::new("book");
    let mut daemon = None;
    let mut graphs = 0;
    for (kind, text) in blocks() {
        match kind.as_str() {
            "sh" => {
                for line in text.lines() {
                    let words = words(line);
                    assert_eq!(words[0], "gipfel", "{line}");
                    match words[1].as_str() {
                        "storage-daemon" => daemon = Some(start(&scratch, &words[2..])),
                        "graph" => {
                            let (ok, told) = gipfel(&scratch, &words[1..]);
                            assert!(
                                !ok && told.contains("is in use by node 'over'"),
                                "{line}: {told}"
                            );
                        }
                        _ => {
                            let (ok, told) = gipfel(&scratch, &words[1..]);
                            assert!(ok, "{line}: {told}");
                        }
                    }
                }
            }
            "qmp" => {
                let (_, qmp) = daemon.as_mut().expect("the daemon comes before its commands");
                for line in text.lines() {
                    let v: Value = serde_json::from_str(line).unwrap();
                    let arguments = absolute(&scratch, v["arguments"].clone());
                    qmp.command(v["execute"].as_str().unwrap(), arguments);
                }
            }
            "graph" => {
                let args = ["graph", "--qmp", "qmp.sock"].map(str::to_owned);
                let (ok, shown) = gipfel(&scratch, &args);
                assert!(ok && shown.trim_end() == text, "the page:\n{text}\nand now:\n{shown}");
                graphs += 1;
            }
            other => panic!("a block of kind '{other}'"),
        }
    }
    assert!(graphs >= 4);
    let (mut d, _) = daemon.unwrap();
    assert!(d.terminate().success());
}

/// File names of the page are in the test's folder.
fn absolute(scratch: &Scratch, mut v: Value) -> Value {
    for at in ["/filename", "/file/filename"] {
        if let Some(name) = v.pointer_mut(at) {
            *name = json!(scratch.arg(name.as_str().unwrap()));
        }
    }
    v
}

fn start(scratch: &Scratch, args: &[String]) -> (Daemon, Qmp) {
    // The daemon of the test runs elsewhere, so that its files are named in full.
    let args: Vec<String> = args
        .iter()
        .map(|a| {
            let files = ["disk.qcow2", "nbd.sock", "qmp.sock"].iter();
            files.fold(a.clone(), |a, f| a.replace(f, &scratch.arg(f)))
        })
        .collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let sockets: [PathBuf; 2] = ["nbd.sock", "qmp.sock"].map(|s| scratch.path(s));
    let daemon = Daemon::gipfel(&args).wait_for(&sockets);
    let qmp = Qmp::connect(scratch.path("qmp.sock")).unwrap();
    (daemon, qmp)
}

//! Which messages and which arguments are taken.

use std::cell::RefCell;

use gipfel_qmp::{Incoming, Schema, Session};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Map, Value, json};

use crate::daemon::{Daemon, installed};

/// Failures print the smallest case; none is written to a file.
fn config(cases: u32) -> Config {
    Config { cases, failure_persistence: None, ..Config::default() }
}

/// The first thing that our session makes of `bytes`: the id of a command, or a refusal.
fn ours(bytes: &[u8]) -> Option<Option<Value>> {
    let mut session = Session::new(Schema::builtin().unwrap());
    for text in [&b"{'execute':'qmp_capabilities'}"[..], bytes, b"\n\x01"] {
        let mut input = text;
        while let Some(incoming) = session.push(&mut input) {
            match incoming {
                Incoming::Command(request) => return Some(Some(request.id?)),
                Incoming::Answer(a) if a.text(false).starts_with("{\"return\"") => {}
                Incoming::Answer(_) => return Some(None),
            }
        }
    }
    None
}

fn theirs(daemon: &mut Daemon, bytes: &[u8]) -> Option<Option<Value>> {
    let mut answers = daemon.say(bytes);
    if answers.is_empty() {
        return None;
    }
    let mut first = answers.remove(0);
    first.get("return").is_some().then(|| first.get_mut("id").map(Value::take)).or(Some(None))
}

/// The reference writes whole floats as integers and its last digits differ, so numbers are
/// compared by value, to twelve digits.
fn plain(answer: Option<Option<Value>>) -> Option<Option<Value>> {
    fn floats(value: Value) -> Value {
        match value {
            Value::Number(n) => json!(n.as_f64().map(|f| format!("{f:.12e}"))),
            Value::Array(items) => items.into_iter().map(floats).collect(),
            Value::Object(map) => map.into_iter().map(|(k, v)| (k, floats(v))).collect(),
            other => other,
        }
    }
    answer.map(|id| id.map(floats))
}

/// Pieces of JSON, good and bad.
fn piece() -> impl Strategy<Value = String> {
    let fixed = prop::sample::select(vec![
        "1",
        "-1",
        "0",
        "-0",
        "01",
        "1.",
        ".5",
        "1.5",
        "1e3",
        "1E+3",
        "1e",
        "-",
        "+1",
        "0x1",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775809",
        "true",
        "false",
        "null",
        "nul",
        "True",
        "NaN",
        "[]",
        "{}",
        "[1,2]",
        "[1,]",
        "[,]",
        "{'a':1}",
        "{'a':1,}",
        "{a:1}",
        "{'a'}",
        "{1:2}",
        "\"\\u00e9\"",
        "\"\\ud83d\\ude00\"",
        "\"\\ud83d\"",
        "\"\\u12\"",
        "\"\\x\"",
        "\"\\'\"",
        "'\\\"'",
        "'a\"b'",
        "\"it's\"",
        "\"\\u0000\"",
        "\"\\/\\b\\f\\n\\r\\t\"",
        "\"\u{e9}\u{1F600}\"",
        "'",
        "\"",
        "]",
        "}",
        ":",
        ",",
        "[",
        "{",
        "#",
        "%d",
        "/* */",
        " ",
        "\t",
        "\r\n",
        "{'k':1,'k':2}",
        "[[[[1]]]]",
    ]);
    prop::collection::vec(fixed, 1..4).prop_map(|pieces| pieces.concat())
}

#[test]
fn the_same_json_is_taken() {
    if !installed() {
        return;
    }
    let daemon = RefCell::new(Daemon::start());
    let mut runner = TestRunner::new(config(1500));
    let result = runner.run(&piece(), |id| {
        let message = format!("{{\"execute\":\"query-version\",\"id\":{id}}}");
        let got = ours(message.as_bytes());
        let want = theirs(&mut daemon.borrow_mut(), message.as_bytes());
        if want == Some(Some(json!("unreadable"))) {
            // It took a number too large for a float and wrote "inf"; we refuse such a number.
            prop_assert_eq!(got, Some(None));
            return Ok(());
        }
        prop_assert_eq!(plain(got), plain(want), "{}", message);
        Ok(())
    });
    result.unwrap();
}

/// Values for any member: mostly of the right type for something.
fn scalar() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!(true),
        json!(false),
        json!(0),
        json!(4096),
        json!(i64::MAX),
        json!(1.5),
        json!(null),
        json!("on"),
        json!("off"),
        json!("auto"),
        json!("unmap"),
        json!("native"),
        json!("all"),
        json!("x"),
        json!([]),
        json!({}),
        json!({"direct": true}),
        json!({"no-flush": false, "direct": true}),
        json!({"direct": 1}),
        json!({"template": "cached", "main-header": true}),
        json!({"format": "luks", "key-secret": "s"}),
        json!({"format": "aes"}),
        json!({"format": "x"}),
    ])
}

fn node() -> impl Strategy<Value = Value> {
    let driver = prop::sample::select(vec![
        "file",
        "null-co",
        "raw",
        "qcow2",
        "throttle",
        "copy-on-read",
        "nonsense",
    ]);
    let key = prop::sample::select(vec![
        "discard",
        "cache",
        "read-only",
        "auto-read-only",
        "force-share",
        "detect-zeroes",
        "active",
        "filename",
        "locking",
        "aio",
        "aio-max-batch",
        "drop-cache",
        "x-check-cache-dropped",
        "pr-manager",
        "size",
        "latency-ns",
        "read-zeroes",
        "offset",
        "backing",
        "lazy-refcounts",
        "pass-discard-request",
        "discard-no-unref",
        "overlap-check",
        "cache-size",
        "l2-cache-size",
        "cache-clean-interval",
        "encrypt",
        "data-file",
        "bottom",
        "throttle-group",
        "oops",
    ]);
    let leaf = (driver.clone(), prop::collection::vec((key.clone(), scalar()), 0..4))
        .prop_map(|(driver, members)| object(driver, members, None));
    leaf.prop_recursive(3, 8, 1, move |inner| {
        let file = prop_oneof![inner, Just(json!("ref")), scalar()];
        (driver.clone(), prop::collection::vec((key.clone(), scalar()), 0..4), file)
            .prop_map(|(driver, members, file)| object(driver, members, Some(file)))
    })
}

/// A node's options; what the driver must have is mostly there.
fn object(driver: &str, members: Vec<(&str, Value)>, file: Option<Value>) -> Value {
    let mut map = Map::new();
    map.insert("driver".into(), driver.into());
    if driver == "file" {
        map.insert("filename".into(), "x".into());
    }
    if driver == "throttle" {
        map.insert("throttle-group".into(), "g".into());
    }
    if let Some(file) = file {
        map.insert("file".into(), file);
    }
    map.extend(members.into_iter().map(|(k, v)| (k.to_owned(), v)));
    Value::Object(map)
}

#[test]
fn the_same_arguments_are_taken() {
    if !installed() {
        return;
    }
    let schema = Schema::builtin().unwrap();
    let command = schema.command("blockdev-add").unwrap();
    let daemon = RefCell::new(Daemon::start());
    let accepted = RefCell::new(0);
    let mut runner = TestRunner::new(config(1500));
    let result = runner.run(&node(), |args| {
        // Without a node-name the reference stops right after the checks of form.
        let answer = daemon.borrow_mut().ask("blockdev-add", args.clone());
        let what = answer["error"]["desc"].as_str().unwrap().to_owned();
        let want = what.contains("'node-name' must be specified");
        let got = schema.check_arguments(command, &mut args.clone());
        prop_assert_eq!(got.is_ok(), want, "{} ours: {:?}, theirs: {}", args, got, what);
        *accepted.borrow_mut() += usize::from(want);
        Ok(())
    });
    result.unwrap();
    assert!(*accepted.borrow() > 50, "too few good cases: {}", accepted.borrow());
}

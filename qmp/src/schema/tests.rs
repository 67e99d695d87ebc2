//! Tests of the schema language, of validation and of introspection.

use super::*;
use serde_json::{Value, json};

fn builtin() -> &'static Schema {
    Schema::builtin().unwrap()
}

fn arguments(command: &str, args: Value) -> Result<()> {
    let mut args = args;
    builtin().check_arguments(builtin().command(command).unwrap(), &mut args)
}

fn refusal(command: &str, args: Value) -> String {
    arguments(command, args).unwrap_err().to_string()
}

#[test]
fn the_builtin_schema_reads() {
    let schema = builtin();
    assert!(schema.commands().len() > 30);
    assert!(schema.event("JOB_STATUS_CHANGE").is_some());
}

#[test]
fn good_arguments_pass() {
    let deep = json!({"driver": "qcow2", "node-name": "d", "backing": null, "overlap-check": "all",
        "cache": {"direct": true}, "cache-size": 1 << 20, "file": {"driver": "file",
        "filename": "x", "locking": "off"}});
    arguments("blockdev-add", deep.clone()).unwrap();
    arguments("blockdev-reopen", json!({"options": [deep]})).unwrap();
    arguments("blockdev-add", json!({"driver": "raw", "file": "node"})).unwrap();
    arguments(
        "nbd-server-start",
        json!({"addr": {"type": "unix", "data": {"path": "/run/nbd.sock"}}, "max-connections": 0}),
    )
    .unwrap();
    arguments("quit", json!({})).unwrap();
    arguments("qom-set", json!({"path": "t", "property": "limits", "value": {"x": [1]}})).unwrap();
    arguments(
        "blockdev-create",
        json!({"job-id": "j", "options": {"driver": "qcow2", "file": "f", "size": u64::MAX}}),
    )
    .unwrap();
}

#[test]
fn refusals_name_the_path() {
    let cases = [
        ("blockdev-del", json!({}), "'arguments.node-name' is missing: give a string"),
        ("blockdev-del", json!({"node-name": 3}), "'arguments.node-name' must be a string, not a"),
        ("blockdev-del", json!({"node-name": "a\0b"}), "'arguments.node-name' holds a NUL"),
        ("blockdev-add", json!({}), "'arguments.driver' is missing"),
        ("blockdev-add", json!({"driver": "qcov2"}), "'arguments.driver' must not be 'qcov2'"),
        (
            "blockdev-add",
            json!({"driver": "raw", "file": {"driver": "file", "filenam": "x"}}),
            "'arguments.file.filenam' is not known where driver is 'file': did you mean 'filename'",
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "file": {"driver": "file"}}),
            "'arguments.file.filename' is missing",
        ),
        ("blockdev-add", json!({"driver": "raw", "file": null}), "'arguments.file' must be an obj"),
        ("blockdev-add", json!({"driver": "raw", "file": 5}), "'arguments.file' must be an object"),
        (
            "blockdev-add",
            json!({"driver": "raw", "file": "f", "offset": 1.0}),
            "'arguments.offset' must be an integer, without fraction",
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "file": "f", "offset": -1}),
            "'arguments.offset' must lie between 0 and 18446744073709551615, not -1",
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "file": "f", "offset": "1"}),
            "'arguments.offset' must be a size in bytes, not a string",
        ),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "raw", "file": "f"}, {"driver": "raw"}]}),
            "'arguments.options.1.file' is missing",
        ),
        ("blockdev-reopen", json!({"options": {}}), "'arguments.options' must be a list, not an"),
        (
            "block_resize",
            json!({"size": 1}),
            "'arguments.device' is missing: give 'device' or 'node-name'",
        ),
        (
            "block_resize",
            json!({"size": 1, "device": "a", "node-name": "b"}),
            "'arguments.node-name' is given together with 'device'",
        ),
        ("quit", json!({"now": true}), "'arguments.now' is not known"),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "path": "x"}}),
            "'arguments.addr.path' is not known where type is 'unix'",
        ),
        (
            "nbd-server-start",
            json!({"addr": {"type": "unix", "data": {"path": "x"}}, "max-connections": 1u64 << 32}),
            "'arguments.max-connections' must lie between 0 and 4294967295",
        ),
    ];
    for (command, args, want) in cases {
        let got = refusal(command, args);
        assert!(got.starts_with(want), "{command}: got: {got}\n          want: {want}");
    }
    assert_eq!(
        arguments("quit", json!([])).unwrap_err().to_string(),
        "'arguments' must be an object, not a list"
    );
}

#[test]
fn absurd_names_are_cut_in_errors() {
    let key = "k".repeat(1 << 20);
    assert!(refusal("quit", json!({key.clone(): 1})).len() < 200);
    assert!(refusal("blockdev-add", json!({"driver": "raw", key.clone(): 1})).len() < 200);
    // The names of all drivers are in this one.
    assert!(refusal("blockdev-add", json!({"driver": key})).len() < 1000);
}

#[test]
fn nesting_is_bounded() {
    let mut node = json!("leaf");
    for _ in 0..600 {
        node = json!({"driver": "raw", "file": node});
    }
    arguments("blockdev-add", node.clone()).unwrap();
    for _ in 0..600 {
        node = json!({"driver": "raw", "file": node});
    }
    assert!(refusal("blockdev-add", node).contains("deeper than 1024"));
}

fn language_error(text: &str) -> String {
    Schema::from_sources(&[("t.qmp", text)]).unwrap_err().to_string()
}

#[test]
fn the_language_says_what_is_wrong() {
    let cases = [
        ("struct A {\n x str }", "t.qmp:2: ':' is missing"),
        ("struct A { x: Nothing }", "type 'A': t.qmp:1: type 'Nothing' is unknown"),
        ("enum E { a a }", "type 'E': t.qmp:1: value 'a' stands twice"),
        ("struct A { x: str x: int }", "type 'A': t.qmp:1: member 'x' stands twice"),
        ("struct A { }\nenum A { }", "t.qmp:2: name 'A' is taken"),
        ("struct str { }", "t.qmp:1: name 'str' is taken"),
        ("thing A { }", "'thing' is no kind of definition"),
        ("command x { }", "'x' has no documentation"),
        ("-- doc\ncommand x (str)", "'x': t.qmp:2: 'str' is no object type"),
        ("-- doc\nevent X @silent", "@silent and @not-found are for commands"),
        ("-- doc\ncommand x @not-found(Oops)", "'Oops' is no error class"),
        ("struct A @strange { }", "attribute '@strange' is unknown"),
        ("struct A: B { } struct B: C { } struct C { }", "base 'B' is no struct without a base"),
        ("enum E { a } union U on t { t: E b => A } struct A { }", "'b' is no value of the disc"),
        ("enum E { a } union U on t { t: E a => E }", "branch type 'E' is no object"),
        ("enum E { a } union U on t { t: E a => A } struct A { t: int }", "a branch repeats mem"),
        ("union U on t { t: str }", "the discriminator is no enum"),
        ("union U on z { t: str }", "discriminator 'z' is no member"),
        ("enum E { a } alternate X { a: str b: E }", "two ways in are a JSON string"),
        ("alternate X { a: any }", "'a' is of no single JSON type"),
        ("struct A { x: str !", "t.qmp:1: character '!' means nothing here"),
        ("struct A {", "t.qmp:1: a member or '}' is missing"),
        ("enum E {", "t.qmp:1: a value or '}' is missing"),
        ("struct A @one-of(x) { x: int }", "'x' is no optional member"),
        ("enum A @one-of(x) { x }", "@one-of is for structs"),
        ("-- d\ncommand x @one-of(x) (A) struct A { }", "@one-of is for structs"),
        ("-- left over", "documentation stands at the end"),
        ("", ""),
    ];
    for (text, want) in cases {
        if text.is_empty() {
            assert!(Schema::from_sources(&[("t.qmp", text)]).is_ok());
            continue;
        }
        let got = language_error(text);
        assert!(got.contains(want), "{text}\n got: {got}\nwant: {want}");
    }
}

#[test]
fn the_language_keeps_what_is_said() {
    let text = "# c\n-- Two\n-- lines.\ncommand do-it @silent @unstable @not-found(DeviceNotFound) \
                {\n a?: [int8] -- First.\n -- Second.\n b: str @ours\n} -> [Point]\n\
                struct Point { x: int }";
    let schema = Schema::from_sources(&[("t.qmp", text)]).unwrap();
    let c = schema.command("do-it").unwrap();
    assert_eq!(c.notes.doc, "Two\nlines.");
    assert_eq!(c.notes.features, ["unstable"]);
    assert!(!c.success_response && c.not_found == crate::ErrorClass::DeviceNotFound);
    let members = schema.members(c.args.unwrap()).unwrap();
    assert_eq!(members[0].notes.doc, "First.\nSecond.");
    assert!(members[0].optional && members[0].ty.list && members[1].notes.ours);
    assert_eq!(schema.type_text(c.returns.unwrap()), "[Point]");
    let text = "enum K { a b } union U on k { k: K a => A } union V on k { k: K b => W }\n\
                struct A { x: int } union W on l { l: K a => A }";
    assert!(Schema::from_sources(&[("t.qmp", text)]).is_ok());
}

#[test]
fn branches_can_branch_again() {
    let text = "enum K { a b } union V on k { k: K b => W }\n\
                struct A { x: int } union W on l { l: K a => A }";
    let schema = Schema::from_sources(&[("t.qmp", text)]).unwrap();
    let check = |mut v: Value| schema.check_type("V", &mut v, Form::Json, "");
    check(json!({"k": "b", "l": "a", "x": 1})).unwrap();
    check(json!({"k": "a"})).unwrap();
    check(json!({"k": "b", "l": "b"})).unwrap();
    assert!(check(json!({"k": "b", "l": "b", "x": 1})).unwrap_err().to_string().contains("'x'"));
    assert!(check(json!({"k": "b"})).unwrap_err().to_string().contains("'l' is missing"));
}

#[test]
fn every_member_has_documentation() {
    let mut bare = Vec::new();
    for t in &builtin().types {
        let members = builtin().type_index[&t.name];
        let members = builtin().members(members).unwrap_or_default();
        bare.extend(
            members
                .iter()
                .filter(|m| m.notes.doc.is_empty())
                .map(|m| format!("{}.{}", t.name, m.name)),
        );
    }
    assert!(bare.is_empty(), "{bare:?}");
}

#[test]
fn introspection_describes_itself() {
    let schema = builtin();
    let mut answer = schema.introspection();
    schema.check_return(schema.command("query-qmp-schema").unwrap(), &mut answer).unwrap();
    let entries = answer.as_array().unwrap();
    let mut names = std::collections::HashSet::new();
    for e in entries {
        assert!(names.insert(e["name"].as_str().unwrap()), "{} stands twice", e["name"]);
    }
    let refers = |name: &Value| assert!(names.contains(name.as_str().unwrap()), "{name}");
    for e in entries {
        for key in ["arg-type", "ret-type", "element-type"] {
            e.get(key).map(refers);
        }
        for list in ["members", "variants"] {
            for m in e.get(list).and_then(Value::as_array).into_iter().flatten() {
                m.get("type").map(refers);
            }
        }
    }
    let union = entries.iter().find(|e| e["name"] == "BlockdevOptions").unwrap();
    assert_eq!(union["tag"], "driver");
    assert!(union["variants"].as_array().unwrap().len() >= 6);
    let mut list = schema.command_list();
    schema.check_return(schema.command("query-commands").unwrap(), &mut list).unwrap();
}

//! Tests of option text.

use super::*;
use proptest::prelude::*;
use serde_json::json;

fn node(text: &str) -> Result<Value> {
    Schema::builtin()?.read_option("BlockdevOptions", text, Style::implied("driver"))
}

#[test]
fn lists_become_typed_values() {
    let cases = [
        ("null-co,node-name=d", json!({"driver": "null-co", "node-name": "d"})),
        ("driver=null-co,node-name=d,", json!({"driver": "null-co", "node-name": "d"})),
        ("null-co,node-name=a,node-name=b", json!({"driver": "null-co", "node-name": "b"})),
        (
            "null-co,size=1M,read-zeroes=yes",
            json!({"driver": "null-co", "size": 1 << 20, "read-zeroes": true}),
        ),
        ("null-co,latency-ns=0x10", json!({"driver": "null-co", "latency-ns": 16})),
        ("file,filename=a,,b=c", json!({"driver": "file", "filename": "a,b=c"})),
        ("raw,file=other", json!({"driver": "raw", "file": "other"})),
        (
            "raw,file.driver=file,file.filename=x,file.locking=off",
            json!({"driver": "raw", "file":
                {"driver": "file", "filename": "x", "locking": "off"}}),
        ),
        (
            "qcow2,file=f,backing=,overlap-check=none",
            json!({"driver": "qcow2", "file": "f", "backing": null, "overlap-check": "none"}),
        ),
        (
            "qcow2,file=f,overlap-check.template=all,overlap-check.active-l1=off",
            json!({"driver": "qcow2", "file": "f",
                "overlap-check": {"template": "all", "active-l1": false}}),
        ),
        ("null-co,cache.direct=on", json!({"driver": "null-co", "cache": {"direct": true}})),
        ("{'driver':'null-co','size':5}", json!({"driver": "null-co", "size": 5})),
    ];
    for (text, want) in cases {
        assert_eq!(node(text).unwrap(), want, "{text}");
    }
    let export = Schema::builtin()
        .unwrap()
        .read_option(
            "BlockExportOptions",
            "nbd,id=e,node-name=n,bitmaps.1=b,bitmaps.0.node=n,bitmaps.0.name=a",
            Style::implied("type"),
        )
        .unwrap();
    assert_eq!(export["bitmaps"], json!([{"node": "n", "name": "a"}, "b"]));
}

#[test]
fn mistakes_are_named() {
    let cases = [
        ("", "'driver' is missing"),
        (",null-co", "begins with ','"),
        ("null-co,,x,node-name=a", "an option begins with ','"),
        ("null-co,size=1.5", "'size' is wrong: "),
        ("null-co,latency-ns=1k", "'latency-ns' must be an integer"),
        ("null-co,latency-ns=-1", "'latency-ns' must lie between 0 and"),
        ("null-co,latency-ns=010", "'latency-ns' must be an integer"),
        ("null-co,latency-ns=", "'latency-ns' must be an integer"),
        ("null-co,read-zeroes=On", "'read-zeroes' must be 'on' or 'off', not 'On'"),
        ("null-co,read-zeroes", "'read-zeroes' has no value"),
        ("null-co,=5", "'' is no option name"),
        ("null-co,a%b=5", "'a%b' is no option name"),
        ("raw,file.=5", "'file.' is no option name"),
        ("raw,file.driver=null-co,file=x", "'file' is given both"),
        ("raw,file=x,file.driver=null-co", "'file' is given both"),
        ("raw,file.driver=null-co,file.0=x", "'file': has list indices and the member 'driver'"),
        ("raw,file.0=x", "'file' must be an object"),
        ("raw,file.driver=null-co,file.siz=1", "'file.siz' is not known where driver is 'null-co'"),
        ("null-co,size.x=1", "'size' takes a size in bytes, and has no members"),
        ("null-co,node-name.x=1", "'node-name' takes a string, and has no members"),
        ("{'driver':'null-co','size':'5'}", "'size' must be a size in bytes, not a string"),
        ("{'driver':'null-co'} x", "more text follows"),
    ];
    for (text, want) in cases {
        let got = node(text).unwrap_err().to_string();
        assert!(got.contains(want), "{text}: {got}");
    }
    for (text, want) in [("a.0=x,a.2=y", "index 2 leaves a gap"), ("a.0=x,a.00=y", "stands twice")]
    {
        let got = parse(text, Style::default()).unwrap_err().to_string();
        assert!(got.contains(want), "{text}: {got}");
    }
    let deep = format!("{}=1", vec!["a"; MAX_DEPTH + 1].join("."));
    assert_eq!(parse(&deep, Style::default()).unwrap_err().kind(), ErrorKind::Limit);
    let long = format!("a={}", "x".repeat(MAX_OPTION_TEXT));
    assert_eq!(parse(&long, Style::default()).unwrap_err().kind(), ErrorKind::Limit);
}

#[test]
fn switches_of_old_option_groups() {
    let style = Style { implied: Some("backend"), switches: true };
    let schema = Schema::builtin().unwrap();
    let text = "socket,path=/run/q.sock,id=c,server,nowait";
    let got = schema.read_option("ChardevOptions", text, style).unwrap();
    assert_eq!(
        got,
        json!({"backend": "socket", "path": "/run/q.sock", "id": "c",
        "server": true, "wait": false})
    );
    let monitor = schema.read_option("MonitorOptions", "c,mode=control", Style::implied("chardev"));
    assert_eq!(monitor.unwrap(), json!({"chardev": "c", "mode": "control"}));
}

/// Objects and non-empty lists of strings, as option text can say them.
fn tree() -> impl Strategy<Value = Value> {
    let leaf = ".*".prop_map(Value::String);
    let value = leaf.prop_recursive(4, 40, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(Value::Array),
            prop::collection::btree_map("[a-z][a-z0-9_-]{0,6}", inner, 1..4)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    });
    prop::collection::btree_map("[a-z][a-z0-9_-]{0,6}", value, 0..4)
        .prop_map(|m| Value::Object(m.into_iter().collect()))
}

fn write(prefix: &str, value: &Value, out: &mut Vec<String>) {
    let step = |k: &str| if prefix.is_empty() { k.into() } else { format!("{prefix}.{k}") };
    match value {
        Value::String(s) => out.push(format!("{prefix}={}", s.replace(',', ",,"))),
        Value::Array(items) => {
            for (i, v) in items.iter().enumerate() {
                write(&step(&i.to_string()), v, out);
            }
        }
        Value::Object(map) => {
            for (k, v) in map {
                write(&step(k), v, out);
            }
        }
        other => panic!("{other} has no option text"),
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(tree in tree()) {
        let mut items = Vec::new();
        write("", &tree, &mut items);
        prop_assert_eq!(parse(&items.join(","), Style::default()).unwrap(), tree);
    }

    #[test]
    fn garbage_is_an_error_or_a_value(text in "[a-z0-9.,={}'\"%-]{0,60}") {
        let _ = node(&text);
        let style = Style { implied: Some("backend"), switches: true };
        let _ = parse(&text, style);
    }
}

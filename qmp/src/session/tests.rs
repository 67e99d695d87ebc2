//! Tests of the monitor's state machine.

use super::*;
use gipfel_base::ErrorKind;
use proptest::prelude::*;

fn new() -> Session {
    Session::new(Schema::builtin().unwrap())
}

/// Feeds all parts; commands show as `NAME ARGS ID`, answers as they are.
fn feed(session: &mut Session, parts: &[&[u8]]) -> Vec<String> {
    let mut out = Vec::new();
    for part in parts {
        let mut input = *part;
        while let Some(incoming) = session.push(&mut input) {
            out.push(match incoming {
                Incoming::Command(r) => format!("{} {} {:?}", r.name, r.args, r.id),
                Incoming::Answer(a) => a.text(false),
            });
        }
        assert!(input.is_empty());
    }
    out
}

/// The answer to one line after negotiation.
fn after(line: &str) -> String {
    let mut session = new();
    feed(&mut session, &[b"{'execute':'qmp_capabilities'}"]);
    let got = feed(&mut session, &[line.as_bytes(), b"\n"]);
    assert_eq!(got.len(), 1, "{line}: {got:?}");
    got[0].clone()
}

fn version() -> Version {
    Version { major: 10, minor: 0, micro: 2, package: "test".into() }
}

#[test]
fn greeting_and_negotiation() {
    assert_eq!(
        Session::greeting(&version()).text(false),
        "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}, \
         \"package\": \"test\"}, \"capabilities\": []}}\r\n"
    );
    let mut s = new();
    let early = feed(&mut s, &[br#"{"execute":"query-version","id":5}"#]);
    assert!(early[0].starts_with(r#"{"id": 5, "error": {"class": "CommandNotFound""#), "{early:?}");
    assert!(early[0].contains("negotiate with 'qmp_capabilities' first"));
    let oob = feed(&mut s, &[br#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#]);
    assert!(oob[0].contains("GenericError") && oob[0].contains("'oob' is not offered"));
    assert!(!s.negotiated());
    let ok = feed(&mut s, &[br#"{"execute":"qmp_capabilities","id":{"a":[1,null]}}"#]);
    assert_eq!(ok, ["{\"return\": {}, \"id\": {\"a\": [1, null]}}\r\n"]);
    assert!(s.negotiated());
    let again = feed(&mut s, &[br#"{"execute":"qmp_capabilities","id":7}"#]);
    assert!(again[0].starts_with(r#"{"id": 7, "error": {"class": "CommandNotFound""#));
    let two = feed(&mut s, &[b"{'execute':'query-version'}{'execute':'quit','id':'x'}"]);
    assert_eq!(two, ["query-version {} None", "quit {} Some(String(\"x\"))"]);
}

#[test]
fn messages_of_wrong_form() {
    let cases = [
        (r#"{"execute":"nosuch","id":1}"#, "CommandNotFound", "'nosuch' is unknown"),
        (r#"{"execute":"quit","foo":1}"#, "GenericError", "'foo' is no member"),
        (r#"{"execute":5}"#, "GenericError", "'execute' must be a string"),
        (r#"{"id":3}"#, "GenericError", "'execute' is missing"),
        (r#"{"exec-oob":"quit"}"#, "GenericError", "'exec-oob' is not offered"),
        (r#"{"execute":"quit","arguments":null}"#, "GenericError", "'arguments' must be an object"),
        (r#"{"execute":"quit","arguments":{"a":1}}"#, "GenericError", "'arguments.a' is not known"),
        (r#"{"execute":"quit","execute":"quit"}"#, "GenericError", "stands twice"),
        ("[]", "GenericError", "must be a JSON object"),
        ("null", "GenericError", "must be a JSON object"),
        ("{'a':[}", "GenericError", "not valid JSON"),
        ("{'execute':'\u{1}", "GenericError", "not valid JSON"),
    ];
    for (line, class, want) in cases {
        let got = after(line);
        assert!(got.contains(class) && got.contains(want), "{line}: {got}");
        assert!(got.ends_with("\r\n") && json::parse(&got).is_ok(), "{got}");
    }
    assert!(after(r#"{"id":3}"#).starts_with(r#"{"id": 3, "#));
    let bad_utf8 = {
        let mut s = new();
        feed(&mut s, &[b"{\"execute\":\"\xc3(\"}\n"])
    };
    assert!(bad_utf8[0].contains("not valid JSON"), "{bad_utf8:?}");
}

#[test]
fn replies_and_events() {
    let schema = Schema::builtin().unwrap();
    let request = |name: &str| Request { name: name.into(), args: json!({}), id: Some(json!(1)) };
    assert_eq!(
        request("quit").reply(schema, Ok(json!({}))).unwrap().text(false),
        "{\"return\": {}, \"id\": 1}\r\n"
    );
    let gone = || Err(Error::new(ErrorKind::NotFound, "nothing 'x'"));
    let line = request("blockdev-del").reply(schema, gone()).unwrap().text(false);
    assert_eq!(
        line,
        "{\"id\": 1, \"error\": {\"class\": \"GenericError\", \"desc\": \"nothing 'x'\"}}\r\n"
    );
    let get = request("qom-get").reply(schema, gone()).unwrap();
    assert!(get.text(false).contains("DeviceNotFound"));
    assert_eq!(get.text(true).matches("\r\n").count(), 7);
    let at = Timestamp { seconds: 5, microseconds: 7 };
    let data = json!({"id": "j", "status": "running"});
    assert_eq!(
        schema.event_message("JOB_STATUS_CHANGE", data, at).unwrap().text(false),
        "{\"timestamp\": {\"seconds\": 5, \"microseconds\": 7}, \"event\": \"JOB_STATUS_CHANGE\", \
         \"data\": {\"id\": \"j\", \"status\": \"running\"}}\r\n"
    );
    assert!(schema.event_message("JOB_STATUS_CHANGE", json!({"id": "j"}), at).is_err());
    assert!(schema.event_message("NO_SUCH", json!({}), at).is_err());
}

#[test]
fn a_flood_of_brackets_takes_linear_time_and_one_error() {
    let mut s = new();
    let flood = vec![b'['; 1_000_000];
    let got = feed(&mut s, &[&flood, b"\n", b"{'execute':'qmp_capabilities'}"]);
    assert_eq!(got.len(), 2);
    assert!(got[0].contains("1024") && got[1].contains("return"));
}

proptest! {
    #[test]
    fn cuts_do_not_matter(
        lines in prop::collection::vec(prop::sample::select(vec![
            "{'execute':'qmp_capabilities'}\n", "{'execute':'query-version','id':'\\u00e9'}",
            "{'execute':'blockdev-del','arguments':{'node-name':'a\"b'}}\r\n", "} ", "{'a':[}\n",
            "{'execute':'blockdev-add','arguments':{'driver':'raw','file':{'driver':'null-co'}}}",
            "\u{1}", "{'x\n", "nul ", " 12 ", "\"s\"", "{'execute':'quit','id':[[1.5]]}\n",
        ]), 0..8),
        size in 1usize..40,
    ) {
        let text = lines.concat();
        let whole = feed(&mut new(), &[text.as_bytes()]);
        let parts: Vec<&[u8]> = text.as_bytes().chunks(size).collect();
        prop_assert_eq!(whole, feed(&mut new(), &parts));
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        let mut s = new();
        feed(&mut s, &[&bytes]);
        s.finish();
        feed(&mut s, &[b"\xff"]);
        let ok = feed(&mut s, &[b"{'execute':'qmp_capabilities'}"]);
        prop_assert!(ok[0].contains("return") || ok[0].contains("negotiated already"));
    }
}

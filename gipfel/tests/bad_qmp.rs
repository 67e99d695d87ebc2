//! Bad QMP clients: each mistake is answered with an error that says what to do, the daemon goes
//! on within bounded memory, and NBD clients and other monitors notice nothing.
#![allow(missing_docs)]

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{PATIENCE, Served, Witness, grown};
use gipfel_testkit::Rng;
use gipfel_testkit::qmp::Qmp;
use serde_json::{Value, json};

const SIZE: u64 = 4 << 20;
/// The most that bad clients may make the daemon hold, in KiB.
const BOUND: u64 = 192 << 10;

fn beside_a_witness(name: &str, bad: impl FnOnce(&mut Served)) {
    let mut rng = Rng::from_env();
    let mut served = Served::raw(name, SIZE);
    let witness = Witness::start(served.address(), 0, SIZE, rng.next_u64());
    witness.lives();
    let before = served.daemon.memory();
    bad(&mut served);
    witness.lives();
    let more = grown(&served.daemon, before);
    assert!(more < BOUND, "bad clients made the daemon hold {more} KiB more");
    let mut qmp = served.qmp();
    let nodes = qmp.command("query-named-block-nodes", json!({ "flat": true }));
    assert_eq!(nodes.as_array().unwrap().len(), 2, "nothing was left behind: {nodes}");
    assert_eq!(qmp.command("query-block-exports", json!({})).as_array().unwrap().len(), 1);
    witness.end();
    served.end();
}

/// A monitor connection that says what it likes.
struct Raw(UnixStream, Vec<u8>);

impl Raw {
    /// Connected, past the greeting.
    fn new(s: &Served) -> Raw {
        let stream = UnixStream::connect(s.scratch.path("qmp.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut raw = Raw(stream, Vec::new());
        assert!(raw.receive().get("QMP").is_some());
        raw
    }

    /// Past the negotiation too.
    fn negotiated(s: &Served) -> Raw {
        let mut raw = Raw::new(s);
        raw.send(b"{'execute':'qmp_capabilities'}");
        assert_eq!(raw.receive(), json!({ "return": {} }));
        raw
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    fn receive(&mut self) -> Value {
        loop {
            if let Some(end) = self.1.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.1.drain(..=end).collect();
                return serde_json::from_slice(&line).unwrap();
            }
            let mut room = vec![0; 65536];
            let n = self.0.read(&mut room).expect("an answer in time");
            assert!(n > 0, "the daemon closed the connection");
            self.1.extend_from_slice(&room[..n]);
        }
    }

    /// Sends and expects an error of this class that speaks of `says`.
    #[track_caller]
    fn refused(&mut self, bytes: &[u8], class: &str, says: &str) {
        self.send(bytes);
        let answer = self.receive();
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(120)]).into_owned();
        assert_eq!(answer["error"]["class"], class, "{shown}: {answer}");
        let desc = answer["error"]["desc"].as_str().unwrap();
        assert!(desc.contains(says), "{shown}: {desc}");
        assert!(desc.len() < 2000, "{shown}: an error of {} bytes", desc.len());
    }

    /// Whether the monitor still does what it is told.
    #[track_caller]
    fn works(&mut self) {
        self.send(b"{'execute':'query-version','id':'still there'}\n");
        // Text that breaks in its middle may be complained of more than once.
        let answers = std::iter::repeat_with(|| self.receive()).take(10);
        let answer = answers.into_iter().find(|a| a["id"] == "still there");
        assert!(answer.is_some_and(|a| a.get("return").is_some()));
    }
}

#[test]
fn text_that_is_no_message() {
    beside_a_witness("qmp-text", |s| {
        let mut m = Raw::negotiated(s);
        for (bytes, says) in [
            (&b"}\n"[..], "JSON"),
            (b"{'execute':}\n", "JSON"),
            (b"{'execute':'query-version',}\n", "JSON"),
            (b"{'execute' 'query-version'}\n", "JSON"),
            (b"[1,2]\n", "object"),
            (b"42\n", "object"),
            (b"'text'\n", "object"),
            (b"null\n", "object"),
            (b"{}\n", "'execute' is missing"),
            (b"{'execute':7}\n", "must be a string"),
            (b"{'execute':'query-version','arguments':[]}\n", "must be an object"),
            (b"{'execute':'query-version','argument':{}}\n", "no member of a message"),
            (b"{'execute':'query-version','execute':'quit'}\n", "twice"),
            (b"{'exec-oob':'query-version'}\n", "not offered"),
            (b"{'execute':'query-\xff\xfe'}\n", "JSON"),
            (b"{'execute':'\xed\xa0\x80'}\n", "JSON"),
            (b"{'execute':'\\ud800'}\n", "JSON"),
            (b"{'execute':'a\x01b'}\n", "JSON"),
            (b"\xff\xff\xff\n", "JSON"),
            (b"{'execute':1e999}\n", "JSON"),
        ] {
            m.refused(bytes, "GenericError", says);
            m.works();
        }
        // A good command, then one bracket too many.
        m.send(b"{'execute':'query-version'}}\n");
        assert!(m.receive().get("return").is_some());
        m.refused(b"", "GenericError", "JSON");
        let deep = [b"{'execute':'query-version','id':".to_vec(), b"[".repeat(5000)].concat();
        m.refused(&[&deep[..], b"\n"].concat(), "GenericError", "levels");
        Raw::negotiated(s).works();
    });
}

#[test]
fn messages_without_end() {
    beside_a_witness("qmp-long", |s| {
        // One string, one list, one key that never end, at as many bytes as they like.
        for start in [&b"{'execute':'"[..], b"{'execute':'x','id':[", b"{'", b"[[[[[[[[", b"   "] {
            let mut m = Raw::negotiated(s);
            m.send(start);
            let filler = match start.last() {
                Some(b'[') => b"1,".repeat(32 << 10),
                Some(b' ') => b" ".repeat(64 << 10),
                _ => b"a".repeat(64 << 10),
            };
            // 20 MiB, more than any message may have.
            for _ in 0..320 {
                if m.0.write_all(&filler).is_err() {
                    break;
                }
            }
            let _ = m.0.shutdown(Shutdown::Write);
            let mut rest = Vec::new();
            let _ = m.0.read_to_end(&mut rest);
            let said = String::from_utf8_lossy(&rest);
            let blank = start.iter().all(|b| *b == b' ');
            assert!(blank || said.contains("GenericError"), "{start:?}: {said}");
        }
    });
}

#[test]
fn commands_that_do_not_fit() {
    beside_a_witness("qmp-args", |s| {
        let mut early = Raw::new(s);
        early.refused(b"{'execute':'query-version'}\n", "CommandNotFound", "qmp_capabilities");
        early.refused(b"{'execute':'quit'}\n", "CommandNotFound", "qmp_capabilities");
        let oob = b"{'execute':'qmp_capabilities','arguments':{'enable':['oob']}}\n";
        early.refused(oob, "GenericError", "not offered");
        early.send(b"{'execute':'qmp_capabilities','id':{'a':[1]}}\n");
        assert_eq!(early.receive(), json!({ "return": {}, "id": { "a": [1] } }));
        early.refused(b"{'execute':'qmp_capabilities'}\n", "CommandNotFound", "already");
        early.refused(b"{'execute':'no-such-command'}\n", "CommandNotFound", "no-such-command");
        let mut q = s.qmp();
        for (command, arguments, says) in [
            ("query-version", json!({ "x": 1 }), "x"),
            ("blockdev-del", json!({}), "node-name"),
            ("blockdev-del", json!({ "node-name": 5 }), "node-name"),
            ("blockdev-del", json!({ "node-name": null }), "node-name"),
            ("blockdev-del", json!({ "node-name": "f", "extra": true }), "extra"),
            ("blockdev-add", json!({}), "driver"),
            ("blockdev-add", json!({ "driver": "no-such" }), "no-such"),
            ("blockdev-add", json!({ "driver": "file", "node-name": "a" }), "filename"),
            ("blockdev-add", json!({ "driver": "raw", "node-name": "a" }), "file"),
            ("blockdev-add", json!({ "driver": "null-co", "node-name": "a", "size": "1" }), "size"),
            (
                "blockdev-add",
                json!({ "driver": "null-co", "node-name": "a", "read-only": "on" }),
                "read-only",
            ),
            (
                "block-export-add",
                json!({ "type": "nbd", "id": "z", "node-name": "disk", "writable": 1 }),
                "writable",
            ),
            ("block-export-add", json!({ "type": "cd", "id": "z", "node-name": "disk" }), "cd"),
            ("nbd-server-start", json!({ "addr": { "type": "pigeon", "data": {} } }), "pigeon"),
        ] {
            let e = q.refused(command, arguments.clone());
            assert_eq!(e.class, "GenericError", "{command} {arguments}: {e:?}");
            assert!(e.desc.contains(says), "{command} {arguments}: {}", e.desc);
        }
    });
}

#[test]
fn names_that_are_taken_missing_or_in_use() {
    beside_a_witness("qmp-names", |s| {
        let mut q = s.qmp();
        let image = s.image();
        let node = |name: &str| json!({ "driver": "null-co", "node-name": name });
        for (command, arguments, says) in [
            ("blockdev-add", node("disk"), "disk"),
            ("blockdev-add", node("f"), "f"),
            ("blockdev-add", node(""), "node-name"),
            ("blockdev-add", node("#block1"), "#block1"),
            ("blockdev-add", node("with space"), "with space"),
            ("blockdev-add", node(&"x".repeat(500)), "node-name"),
            (
                "blockdev-add",
                json!({
                    "driver": "raw", "node-name": "twice",
                    "file": { "driver": "null-co", "node-name": "twice" }
                }),
                "twice",
            ),
            ("blockdev-add", json!({ "driver": "raw", "node-name": "a", "file": "gone" }), "gone"),
            ("blockdev-add", json!({ "driver": "raw", "node-name": "a", "file": "a" }), "a"),
            (
                "blockdev-add",
                json!({ "driver": "file", "node-name": "a", "filename": "/no/such/file" }),
                "No such file",
            ),
            ("blockdev-del", json!({ "node-name": "disk" }), "in use"),
            ("blockdev-del", json!({ "node-name": "f" }), "in use"),
            ("blockdev-del", json!({ "node-name": "gone" }), "gone"),
            ("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "disk" }), "'e'"),
            (
                "block-export-add",
                json!({ "type": "nbd", "id": "e2", "node-name": "disk", "name": "x" }),
                "'x'",
            ),
            ("block-export-add", json!({ "type": "nbd", "id": "e2", "node-name": "no" }), "no"),
            (
                "block-export-add",
                json!({ "type": "nbd", "id": "e2", "node-name": "disk", "name": "n".repeat(5000) }),
                "4096",
            ),
            ("block-export-del", json!({ "id": "gone" }), "gone"),
            ("block-export-del", json!({ "id": "e" }), "connected"),
            (
                "nbd-server-start",
                json!({ "addr": { "type": "unix", "data": { "path": s.scratch.arg("2.sock") } } }),
                "already",
            ),
            ("job-dismiss", json!({ "id": "gone" }), "gone"),
            ("object-add", json!({ "qom-type": "iothread", "id": "tg" }), "tg"),
        ] {
            let e = q.refused(command, arguments.clone());
            assert!(e.desc.contains(says), "{command} {arguments}: {}", e.desc);
        }
        // A second node on an image that is being written.
        let again = json!({ "driver": "file", "node-name": "again", "filename": image });
        q.command("blockdev-add", again);
        let export = json!({ "type": "nbd", "id": "e2", "node-name": "again" });
        q.command("block-export-add", export);
        q.command("block-export-del", json!({ "id": "e2" }));
        q.wait_event("BLOCK_EXPORT_DELETED", PATIENCE).unwrap();
        q.command("blockdev-del", json!({ "node-name": "again" }));
    });
}

#[test]
fn random_changes_to_good_commands() {
    let mut rng = Rng::from_env();
    beside_a_witness("qmp-fuzz", |s| {
        let good = [
            r#"{"execute":"query-named-block-nodes","arguments":{"flat":true},"id":17}"#,
            r#"{"execute":"blockdev-add","arguments":{"driver":"null-co","node-name":"gone"}}"#,
            r#"{"execute":"blockdev-del","arguments":{"node-name":"gone"},"id":"b"}"#,
            r#"{"execute":"query-qmp-schema","id":{"x":[1,2,{"y":null}]}}"#,
            r#"{"execute":"block-export-del","arguments":{"id":"none","mode":"safe"}}"#,
        ];
        let start = Instant::now();
        let mut m = Raw::negotiated(s);
        m.0.set_nonblocking(true).unwrap();
        while start.elapsed() < Duration::from_millis(1500) {
            let mut bytes = rng.pick(&good).as_bytes().to_vec();
            for _ in 0..rng.below(4).min(bytes.len() as u64) {
                let at = rng.below(bytes.len() as u64) as usize;
                match rng.below(4) {
                    0 if bytes.len() > 1 => drop(bytes.remove(at)),
                    1 => bytes.insert(at, rng.next_u64() as u8),
                    2 => bytes[at] ^= 1 << rng.below(8),
                    _ => bytes.truncate(at + 1),
                }
            }
            bytes.push(b'\n');
            let mut left = &bytes[..];
            while !left.is_empty() {
                match m.0.write(left) {
                    Ok(n) => left = &left[n..],
                    Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock),
                }
                let mut room = [0; 65536];
                while m.0.read(&mut room).is_ok_and(|n| n > 0) {}
            }
        }
        // What may have come of it, once it is all done.
        m.0.set_nonblocking(false).unwrap();
        m.0.shutdown(Shutdown::Write).unwrap();
        m.0.read_to_end(&mut Vec::new()).unwrap();
        let _ = s.qmp().try_command("blockdev-del", json!({ "node-name": "gone" }));
        let nodes = s.qmp().command("query-named-block-nodes", json!({ "flat": true }));
        for n in nodes.as_array().unwrap() {
            let name = n["node-name"].as_str().unwrap();
            if !["f", "disk"].contains(&name) {
                s.qmp().command("blockdev-del", json!({ "node-name": name }));
            }
        }
    });
}

#[test]
fn clients_that_never_read() {
    beside_a_witness("qmp-deaf", |s| {
        // Questions with long answers, asked until nothing is taken any more.
        let mut deaf: Vec<_> = (0..3).map(|_| Raw::negotiated(s)).collect();
        for m in &mut deaf {
            let questions = b"{'execute':'query-qmp-schema'}\n".repeat(100);
            while m.0.write_all(&questions).is_ok() {}
        }
        // One that hears events only, and does not listen: more of them than it may have queued.
        let mut quiet = Raw::negotiated(s);
        let mut q = s.qmp();
        let id = "e".repeat(60_000);
        for _ in 0..150 {
            let export = json!({ "type": "nbd", "id": id, "node-name": "disk", "name": "y" });
            q.command("block-export-add", export);
            q.command("block-export-del", json!({ "id": id }));
            q.wait_event("BLOCK_EXPORT_DELETED", PATIENCE).unwrap();
        }
        Raw::negotiated(s).works();
        quiet.0.read_to_end(&mut Vec::new()).expect("it was cut off");
        drop(deaf);
        let start = Instant::now();
        let mut m = Raw::negotiated(s);
        while start.elapsed() < Duration::from_millis(50) {
            m.works();
        }
    });
}

#[test]
fn many_monitors_and_those_that_vanish() {
    beside_a_witness("qmp-many", |s| {
        let idle = s.daemon.descriptors();
        for i in 0..200 {
            let mut m = Raw::new(s);
            match i % 4 {
                0 => m.send(b"{'execute':'qmp_capabilities'}{'execute':'query-named-block-nodes'}"),
                1 => m.send(b"{'execute':'qmp_cap"),
                2 => m.0.shutdown(Shutdown::Read).unwrap(),
                _ => {}
            }
        }
        let mut all: Vec<Qmp> = (0..20).map(|_| s.qmp()).collect();
        let export = json!({ "type": "nbd", "id": "e2", "node-name": "disk", "name": "y" });
        all[0].command("block-export-add", export);
        all[1].command("block-export-del", json!({ "id": "e2" }));
        for q in &mut all {
            let e = q.wait_event("BLOCK_EXPORT_DELETED", PATIENCE).unwrap();
            assert_eq!(e["data"], json!({ "id": "e2" }));
            assert!(e["timestamp"]["seconds"].as_i64().unwrap() > 1_600_000_000);
            assert!(e["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
        }
        // More than there are seats: those beyond are turned away, nobody else.
        let more: Vec<_> =
            (0..100).map(|_| UnixStream::connect(s.scratch.path("qmp.sock")).unwrap()).collect();
        all[2].command("query-version", json!({}));
        drop(more);
        drop(all);
        let start = Instant::now();
        while s.daemon.descriptors() > idle + 2 {
            assert!(start.elapsed() < PATIENCE, "the daemon keeps what belonged to clients");
            std::thread::sleep(Duration::from_millis(5));
        }
    });
}

//! Bad NBD clients: each is answered or cut off, the daemon goes on within bounded memory, and a
//! client beside them that writes and checks all the time notices nothing.
#![allow(missing_docs)]

mod common;

use std::net::Shutdown;
use std::time::{Duration, Instant};

use common::{PATIENCE, Served, Witness, grown};
use gipfel_testkit::nbd::{Address, Client, Command, Handshake, wire};
use gipfel_testkit::{Daemon, Rng, tools};

const SIZE: u64 = 8 << 20;
const HALF: u64 = SIZE / 2;
/// The most that bad clients may make the daemon hold, in KiB: one connection has at most 32 MiB
/// of requests in flight, and three of them stop reading.
const BOUND: u64 = 160 << 10;

/// Runs `bad` against a daemon with a witness beside it, and looks whether all is well.
fn beside_a_witness(name: &str, more: &[&str], bad: impl FnOnce(&Served)) {
    let mut rng = Rng::from_env();
    let mut served = Served::raw_with(name, SIZE, "", more);
    let witness = Witness::start(served.address(), 0, HALF, rng.next_u64());
    witness.lives();
    let before = served.daemon.memory();
    bad(&served);
    witness.lives();
    let more = grown(&served.daemon, before);
    println!("the daemon held {more} KiB more");
    assert!(more < BOUND, "bad clients made the daemon hold {more} KiB more");
    assert!(served.daemon.is_running());
    let (model, _) = witness.end();
    // A new client still gets in, and nobody is left.
    let mut c = served.client();
    model.expect(0, &c.read(0, HALF as u32).unwrap());
    c.disconnect().unwrap();
    let image = served.image();
    let scratch = served.end();
    if tools::have("qemu-img") {
        let mut whole = gipfel_testkit::DiskModel::of(&std::fs::read(&image).unwrap());
        whole.write(0, &model.read(0, HALF));
        whole.save(&scratch.arg("model"));
        tools::same_content("raw", &image, "raw", &scratch.arg("model"));
    }
}

/// Waits until the server has closed this connection.
#[track_caller]
fn is_cut_off(c: &mut gipfel_testkit::nbd::Stream) {
    c.set_timeout(PATIENCE).unwrap();
    c.receive_to_end(1 << 20).expect("the server closes");
}

#[test]
fn garbage_before_and_in_the_negotiation() {
    let mut rng = Rng::from_env();
    beside_a_witness("bad-hello", &[], |s| {
        for i in 0..300 {
            let mut c = s.address().connect().unwrap();
            let n = rng.below(600) as usize;
            let mut bytes = rng.bytes(n);
            match i % 4 {
                // What other protocols say first.
                0 => bytes = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
                1 => drop(bytes.splice(0..0, *b"\0\0\0\x03IHAVEOPT\0\0\0\x07")),
                2 => drop(bytes.splice(0..0, *b"\0\0\0\x01IHAVEOPT")),
                _ => {}
            }
            let _ = c.send(&bytes);
            let _ = c.shutdown(Shutdown::Write);
            is_cut_off(&mut c);
        }
        // Client flags that do not exist, and a wrong magic number.
        for bytes in [&b"\x80\0\0\x03"[..], b"\0\0\0\x03IHAVENOT\0\0\0\x07\0\0\0\0"] {
            let mut c = s.address().connect().unwrap();
            let _ = c.send(bytes);
            is_cut_off(&mut c);
        }
    });
}

fn options(s: &Served) {
    let mut h = Handshake::connect(&s.address()).unwrap();
    let mut last = |option, data: &[u8]| h.option(option, data).unwrap().pop().unwrap().kind;
    for option in [4, 12, 99, 0x4000_0000, u32::MAX] {
        assert_eq!(last(option, b"whatever"), wire::REP_ERR_UNSUP);
    }
    assert_eq!(last(wire::OPT_EXTENDED_HEADERS, b""), wire::REP_ERR_UNSUP);
    assert_eq!(last(wire::OPT_LIST, b"x"), wire::REP_ERR_INVALID);
    assert_eq!(last(wire::OPT_STRUCTURED_REPLY, b"x"), wire::REP_ERR_INVALID);
    assert_eq!(last(wire::OPT_LIST, &vec![0; 1 << 20]), wire::REP_ERR_TOO_BIG);
    for data in [
        &b""[..],
        b"\0\0\0",
        b"\xff\xff\xff\xffx",
        b"\0\0\0\x01x\0\x09\0\0",
        b"\0\0\0\x01\xff\0\0",
        b"\0\0\0\x02x\0\0\0",
    ] {
        assert_eq!(last(wire::OPT_GO, data), wire::REP_ERR_INVALID, "{data:?}");
        assert_eq!(last(wire::OPT_INFO, data), wire::REP_ERR_INVALID, "{data:?}");
    }
    assert_eq!(last(wire::OPT_GO, b"\0\0\0\x02no\0\0"), wire::REP_ERR_UNKNOWN);
    h.structured_reply().unwrap();
    let mut last = |option, data: &[u8]| h.option(option, data).unwrap().pop().unwrap().kind;
    for data in [
        &b"\0\0\0\x01x\xff\xff\xff\xff"[..],
        b"\0\0\0\x01x\0\0\0\x01\xff\xff\xff\xff",
        b"\0\0\0\x01x\0\0\0\x01\0\0\0\x01:",
        b"\0\0\0\x01x",
    ] {
        assert_eq!(last(wire::OPT_SET_META_CONTEXT, data), wire::REP_ERR_INVALID, "{data:?}");
        assert_eq!(last(wire::OPT_LIST_META_CONTEXT, data), wire::REP_ERR_INVALID, "{data:?}");
    }
    // After all that the connection is as good as new.
    h.set_meta_context("x", &["base:allocation"]).unwrap();
    let mut c = h.go("x").unwrap();
    assert_eq!(c.read(HALF, 512).unwrap(), [0; 512]);
}

#[test]
fn options_that_are_unknown_malformed_or_endless() {
    beside_a_witness("bad-opt", &[], |s| {
        options(s);
        // Longer than anything worth skipping; an export name without end; too many options.
        for bytes in [
            &b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"[..],
            b"IHAVEOPT\0\0\0\x01\0\0\xff\xff",
            b"IHAVEOPT\0\0\0\x01\0\0\0\x02no",
        ] {
            let mut h = Handshake::connect(&s.address()).unwrap();
            h.stream().send(bytes).unwrap();
            is_cut_off(h.stream());
        }
        let mut h = Handshake::connect(&s.address()).unwrap();
        let start = Instant::now();
        while h.option(wire::OPT_LIST, b"").is_ok() {
            assert!(start.elapsed() < PATIENCE, "a handshake of options only comes to its end");
        }
        // Options without anybody who reads the answers.
        let mut h = Handshake::connect(&s.address()).unwrap();
        h.stream().set_timeout(Duration::from_millis(100)).unwrap();
        for _ in 0..100_000 {
            if h.send_option(wire::OPT_LIST, b"").is_err() {
                break;
            }
        }
    });
}

fn request(kind: u16, flags: u16, offset: u64, length: u32) -> Command<'static> {
    Command { kind, flags, offset, length, payload: &[] }
}

#[track_caller]
fn refused(c: &mut Client, r: &Command, errno: i32) {
    let e = c.run(r).expect_err("refused");
    assert_eq!(e.errno(), errno, "{r:?}: {e}");
}

#[test]
fn requests_that_break_a_rule_are_answered_one_by_one() {
    beside_a_witness("bad-req", &[], |s| {
        const EINVAL: i32 = 22;
        const ENOSPC: i32 = 28;
        const EOVERFLOW: i32 = 75;
        for simple in [false, true] {
            let mut c = if simple {
                Client::connect_simple(&s.address(), "x").unwrap()
            } else {
                s.client()
            };
            for kind in 8..12 {
                refused(&mut c, &request(kind, 0, 0, 512), EINVAL);
            }
            refused(&mut c, &request(u16::MAX, 0, 0, 0), EINVAL);
            for flags in [1 << 2, 1 << 4, 1 << 5, 1 << 15] {
                refused(&mut c, &request(wire::CMD_FLUSH, flags, 0, 0), EINVAL);
            }
            refused(&mut c, &request(wire::CMD_FLUSH, 0, 0, 512), EINVAL);
            for (offset, length) in
                [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 10, 20), (1 << 63, 512)]
            {
                refused(&mut c, &request(wire::CMD_READ, 0, offset, length), EINVAL);
                refused(&mut c, &request(wire::CMD_TRIM, 0, offset, length), EINVAL);
                refused(&mut c, &request(wire::CMD_CACHE, 0, offset, length), EINVAL);
                refused(&mut c, &request(wire::CMD_WRITE_ZEROES, 0, offset, length), ENOSPC);
                let payload = vec![1; length as usize];
                let write = Command { payload: &payload, ..request(1, 0, offset, length) };
                refused(&mut c, &write, ENOSPC);
            }
            let long = if simple { EINVAL } else { EOVERFLOW };
            refused(&mut c, &request(wire::CMD_READ, 0, 0, (32 << 20) + 1), long);
            // Too long, but it can still be skipped.
            let payload = vec![1; (32 << 20) + 512];
            let write = Command { payload: &payload, ..request(1, 0, 0, payload.len() as u32) };
            refused(&mut c, &write, EINVAL);
            if simple {
                refused(&mut c, &request(wire::CMD_BLOCK_STATUS, 0, 0, 512), EINVAL);
            } else {
                refused(&mut c, &request(wire::CMD_BLOCK_STATUS, 0, 0, 0), EINVAL);
                refused(&mut c, &request(wire::CMD_BLOCK_STATUS, 0, SIZE, 512), EINVAL);
            }
            // Nothing is wrong with the connection.
            c.write(HALF, &[7; 1000], 0).unwrap();
            assert_eq!(c.read(HALF, 1000).unwrap(), [7; 1000]);
            c.disconnect().unwrap();
        }
    });
}

#[test]
fn garbage_after_the_negotiation() {
    let mut rng = Rng::from_env();
    beside_a_witness("bad-talk", &[], |s| {
        for i in 0..300u64 {
            let mut c = s.client();
            let bytes = match i % 5 {
                0 => rng.bytes(500),
                // A write longer than what would be skipped, and one whose payload never comes.
                1 => Client::encode(&request(wire::CMD_WRITE, 0, 0, u32::MAX), i),
                2 => Client::encode(&request(wire::CMD_WRITE, 0, HALF, 32 << 20), i),
                // A good request, then a wrong magic number.
                3 => {
                    let mut m = Client::encode(&request(wire::CMD_READ, 0, 0, 4096), i);
                    m.extend_from_slice(&[0x25, 0x60, 0x95, 0x14]);
                    m.extend_from_slice(&[0; 24]);
                    m
                }
                _ => {
                    let (kind, flags) = (rng.below(12) as u16, rng.next_u64() as u16);
                    // A random write may not hit the witness' half.
                    let offset = rng.next_u64() | HALF;
                    let mut m =
                        Client::encode(&request(kind, flags, offset, rng.below(600) as u32), i);
                    m.truncate(rng.between(1, 28) as usize);
                    m
                }
            };
            let _ = c.stream().send(&bytes);
            if i % 3 == 0 {
                // Not even a goodbye.
                continue;
            }
            let _ = c.stream().shutdown(Shutdown::Write);
            is_cut_off(c.stream());
        }
    });
}

#[test]
fn clients_that_stop_reading_stop_only_themselves() {
    beside_a_witness("bad-stall", &[], |s| {
        let mut stalled = Vec::new();
        for _ in 0..2 {
            let mut c = s.client();
            c.stream().set_timeout(Duration::from_millis(200)).unwrap();
            let reads = Client::encode(&request(wire::CMD_READ, 0, HALF, 1 << 20), 1).repeat(100);
            while c.stream().send(&reads).is_ok() {}
            stalled.push(c);
        }
        let mut good = s.client();
        for _ in 0..200 {
            good.write(HALF, &[1; 4096], 0).unwrap();
        }
        // The export can be taken away from them.
        let mut qmp = s.qmp();
        let export = serde_json::json!({
            "type": "nbd", "id": "e2", "node-name": "disk", "name": "y", "writable": true
        });
        qmp.command("block-export-add", export);
        let mut third = Client::connect(&s.address(), "y").unwrap();
        third.stream().set_timeout(Duration::from_millis(200)).unwrap();
        let reads = Client::encode(&request(wire::CMD_READ, 0, HALF, 1 << 20), 1).repeat(100);
        while third.stream().send(&reads).is_ok() {}
        qmp.refused("block-export-del", serde_json::json!({ "id": "e2" }));
        qmp.command("block-export-del", serde_json::json!({ "id": "e2", "mode": "hard" }));
        qmp.wait_event("BLOCK_EXPORT_DELETED", PATIENCE).unwrap();
    });
}

#[test]
fn half_open_connections_and_silence() {
    // The witness holds one seat, the bad clients get nine, and one waits for each that goes.
    let s = gipfel_testkit::Scratch::new("bad-half");
    let image = s.file("disk.raw", &[0; 1 << 20]);
    let sock = s.arg("nbd.sock");
    let mut daemon = Daemon::gipfel(&[
        "--blockdev",
        &format!("file,node-name=f,filename={image}"),
        "--nbd-server",
        &format!("addr.type=unix,addr.path={sock},max-connections=10,handshake-max-seconds=1"),
        "--export",
        "nbd,id=e,node-name=f,name=x,writable=on",
    ])
    .wait_for(&[&sock]);
    let address = Address::unix(&sock);
    let witness = Witness::start(address.clone(), 0, 1 << 19, 1);
    witness.lives();
    // Silent, silent in the middle of a handshake, closed for writing, closed for reading.
    let mut bad: Vec<_> = (0..12)
        .map(|i| {
            let mut c = address.connect().unwrap();
            match i % 4 {
                0 => {}
                1 => c.send(b"\0\0\0\x03IHAVEO").unwrap(),
                2 => c.shutdown(Shutdown::Write).unwrap(),
                _ => c.shutdown(Shutdown::Read).unwrap(),
            }
            c
        })
        .collect();
    let mut late = Client::connect(&address, "x").unwrap();
    assert_eq!(late.read(1 << 19, 512).unwrap(), [0; 512]);
    for (i, c) in bad.iter_mut().enumerate() {
        if i % 4 != 3 {
            is_cut_off(c);
        }
    }
    witness.end();
    assert!(daemon.terminate().success());
}

/// One descriptor each on this side, so that the system's usual 1024 suffice.
struct Light(Handshake);

impl Light {
    fn connect(a: &Address) -> Light {
        let mut h = Handshake::connect(a).unwrap();
        let replies = h.option(wire::OPT_GO, b"\0\0\0\x01x\0\0").unwrap();
        assert_eq!(replies.last().unwrap().kind, wire::REP_ACK);
        Light(h)
    }

    fn run(&mut self, c: &Command, cookie: u64) -> Vec<u8> {
        let s = self.0.stream();
        s.send(&Client::encode(c, cookie)).unwrap();
        let reply = s.receive(16).unwrap();
        assert_eq!(reply[..8], *b"\x67\x44\x66\x98\0\0\0\0", "a simple reply without error");
        assert_eq!(reply[8..], cookie.to_be_bytes());
        s.receive(if c.kind == wire::CMD_READ { c.length as usize } else { 0 }).unwrap()
    }
}

#[test]
fn a_thousand_connections() {
    beside_a_witness("bad-1000", &[], |s| {
        let idle = s.daemon.descriptors();
        let mut clients: Vec<_> = (0..1000).map(|_| Light::connect(&s.address())).collect();
        for (i, c) in clients.iter_mut().enumerate() {
            let data = (i as u64).to_be_bytes().repeat(64);
            let write = request(wire::CMD_WRITE, 0, HALF + i as u64 * 512, 512);
            c.run(&Command { payload: &data, ..write }, i as u64);
        }
        for (i, c) in clients.iter_mut().enumerate().rev() {
            let got = c.run(&request(wire::CMD_READ, 0, HALF + i as u64 * 512, 512), i as u64);
            assert_eq!(got, (i as u64).to_be_bytes().repeat(64));
        }
        drop(clients);
        let start = Instant::now();
        while s.daemon.descriptors() > idle + 4 {
            assert!(start.elapsed() < PATIENCE, "the daemon keeps what belonged to clients");
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

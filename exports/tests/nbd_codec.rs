//! The test client and the server's codec, written apart from the specification, against one
//! another over a socket pair, with a disk in memory.

use gipfel_exports::nbd::proto::consts::{REQUEST_LEN, allocation, export_flag};
use gipfel_exports::nbd::proto::{
    ExportInfo, Negotiation, Op, Progress, Request, Session, Verdict, reply,
};
use gipfel_testkit::nbd::{Client, Command, Handshake, Stream, wire};
use gipfel_testkit::{DiskModel, Rng};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

const SIZE: u64 = 1 << 20;

fn export() -> ExportInfo {
    ExportInfo {
        name: "x".into(),
        description: Some("in memory".into()),
        size: SIZE,
        has_medium: true,
        flags: export_flag::SEND_FLUSH
            | export_flag::SEND_FUA
            | export_flag::SEND_TRIM
            | export_flag::SEND_WRITE_ZEROES,
        min_block: 1,
        preferred_block: 4096,
        require_block_size: false,
        contexts: vec![allocation::NAME.into()],
    }
}

/// A blocking server, one request at a time; returns its disk.
fn serve(mut s: UnixStream) -> JoinHandle<DiskModel> {
    std::thread::spawn(move || {
        let mut disk = DiskModel::new(SIZE);
        let Some(session) = negotiate(&mut s) else { return disk };
        let mut header = [0; REQUEST_LEN];
        while s.read_exact(&mut header).is_ok() {
            let Some(request) = Request::parse(&header) else { break };
            let mut payload = vec![0; request.payload() as usize];
            s.read_exact(&mut payload).unwrap();
            let Some(out) = answer(&session, &request, &payload, &mut disk) else { break };
            s.write_all(&out).unwrap();
        }
        disk
    })
}

fn negotiate(s: &mut UnixStream) -> Option<Session> {
    s.write_all(&Negotiation::greeting()).unwrap();
    let (mut n, list) = (Negotiation::new(), [export()]);
    loop {
        let (mut byte, mut out) = ([0], Vec::new());
        s.read_exact(&mut byte).ok()?;
        let (_, progress) = n.push(&byte, &list[..], &mut out);
        s.write_all(&out).unwrap();
        match progress {
            Progress::Done(session) => return Some(session),
            Progress::Close(_) => return None,
            _ => {}
        }
    }
}

fn answer(s: &Session, r: &Request, payload: &[u8], disk: &mut DiskModel) -> Option<Vec<u8>> {
    let mut out = vec![0; 512];
    let n = match r.judge(s) {
        Verdict::Disconnect | Verdict::Violation(_) => return None,
        Verdict::Refuse(x) if s.structured => reply::error(&mut out, r.cookie, x.error, x.message),
        Verdict::Refuse(x) => reply::simple(&mut out, r.cookie, Some(x.error)),
        Verdict::Run(Op::Read { range, df }) => {
            let data = disk.read(range.start(), range.len());
            return Some(read_reply(s, r.cookie, range.start(), &data, df));
        }
        Verdict::Run(Op::BlockStatus { range, one }) => {
            let mut c = reply::StatusChunk::new(&mut out, if one { 1 } else { 8 });
            let half = range.len() as u32 / 2;
            assert!(c.push(half, 0) | c.push(range.len() as u32 - half, allocation::HOLE));
            c.finish(r.cookie, s.contexts[0], true)
        }
        Verdict::Run(op) => {
            match op {
                Op::Write { range, .. } => disk.write(range.start(), payload),
                Op::WriteZeroes { range, .. } => disk.zero(range.start(), range.len()),
                _ => {}
            }
            match (s.structured, r.kind) {
                (true, wire::CMD_FLUSH | wire::CMD_READ) => reply::none(&mut out, r.cookie),
                _ => reply::simple(&mut out, r.cookie, None),
            }
        }
    };
    out.truncate(n);
    Some(out)
}

/// Reads in all shapes: simple, one chunk, or a chunk, a hole where the rest is zero, and an end.
fn read_reply(s: &Session, cookie: u64, offset: u64, data: &[u8], df: bool) -> Vec<u8> {
    let mut head = [0; 64];
    if !s.structured {
        let n = reply::simple(&mut head, cookie, None);
        return [&head[..n], data].concat();
    }
    let half = data.len() / 2;
    let rest = (data.len() - half) as u32;
    if df || half == 0 || data[half..].iter().any(|b| *b != 0) {
        let n = reply::data_prefix(&mut head, cookie, offset, data.len() as u32, true);
        return [&head[..n], data].concat();
    }
    let n = reply::data_prefix(&mut head, cookie, offset, half as u32, false);
    let mut out = [&head[..n], &data[..half]].concat();
    let n = reply::hole(&mut head, cookie, offset + half as u64, rest, true);
    out.extend_from_slice(&head[..n]);
    out
}

fn pair() -> (Handshake, JoinHandle<DiskModel>) {
    let (a, b) = UnixStream::pair().unwrap();
    let server = serve(b);
    (Handshake::start(Stream::Unix(a), wire::CLIENT_FLAGS).unwrap(), server)
}

#[test]
fn random_requests_match_the_model() {
    let mut rng = Rng::from_env();
    for structured in [true, false] {
        let (mut h, server) = pair();
        if structured {
            h.structured_reply().unwrap();
            assert_eq!(h.set_meta_context("x", &["base:allocation"]).unwrap().len(), 1);
        }
        let mut c = h.go("x").unwrap();
        assert_eq!(c.info().description.as_deref(), Some("in memory"));
        assert_eq!(c.info().block_size, Some((1, 4096, 32 << 20)));
        let mut model = DiskModel::new(SIZE);
        for _ in 0..400 {
            let offset = rng.below(SIZE);
            let len = rng.between(1, (SIZE - offset).min(9000)) as u32;
            match rng.below(7) {
                0 | 1 => {
                    let data = rng.bytes(len as usize);
                    c.write(offset, &data, wire::FLAG_FUA).unwrap();
                    model.write(offset, &data);
                }
                2 => {
                    c.zero(offset, len, wire::FLAG_NO_HOLE).unwrap();
                    model.zero(offset, u64::from(len));
                }
                3 => c.flush().unwrap(),
                4 if structured => {
                    let flags = *rng.pick(&[0, wire::FLAG_REQ_ONE]);
                    c.block_status(offset, len, flags).unwrap();
                }
                _ => {
                    let flags = if structured { *rng.pick(&[0, wire::FLAG_DF]) } else { 0 };
                    let r =
                        Command { kind: wire::CMD_READ, flags, offset, length: len, payload: &[] };
                    model.expect(offset, &c.run(&r).unwrap().bytes);
                }
            }
        }
        c.disconnect().unwrap();
        assert!(server.join().unwrap().to_vec() == model.to_vec());
    }
}

#[test]
fn errors_reach_the_client_and_the_session_goes_on() {
    for structured in [true, false] {
        let (mut h, server) = pair();
        if structured {
            h.structured_reply().unwrap();
        }
        let mut c = h.go("x").unwrap();
        let errno = |r: gipfel_base::Result<()>| r.unwrap_err().errno();
        assert_eq!(errno(c.write(SIZE - 1, &[1, 2], 0)), 28);
        assert_eq!(errno(c.read(SIZE, 1).map(drop)), 22);
        assert_eq!(errno(c.zero(0, 1, wire::FLAG_DF)), 22);
        assert_eq!(errno(c.block_status(0, 512, 0).map(drop)), 22);
        c.write(SIZE - 1, &[7], 0).unwrap();
        assert_eq!(c.read(SIZE - 2, 2).unwrap(), [0, 7]);
        assert!(c.read(5, 0).unwrap().is_empty());
        c.disconnect().unwrap();
        server.join().unwrap();
    }
}

#[test]
fn handshake_options() {
    let (mut h, server) = pair();
    assert_eq!(h.list().unwrap(), [("x".to_owned(), "in memory".to_owned())]);
    assert_eq!(h.list_meta_context("x", &[]).unwrap(), ["base:allocation"]);
    assert_eq!(h.info("x").unwrap().size, SIZE);
    assert!(h.info("y").is_err());
    let refused = h.option(wire::OPT_STARTTLS, &[]).unwrap();
    assert_eq!(refused[0].kind, wire::REP_ERR_UNSUP);
    let mut c: Client = h.export_name("x").unwrap();
    c.write(0, b"old way", 0).unwrap();
    c.disconnect().unwrap();
    assert_eq!(server.join().unwrap().read(0, 7), b"old way");
    let (h, server) = pair();
    assert!(h.abort().unwrap());
    server.join().unwrap();
}

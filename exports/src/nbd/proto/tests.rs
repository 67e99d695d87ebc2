//! The codec on its own: what it takes, what it refuses, what it answers, byte for byte.

use super::consts::*;
use super::negotiate::*;
use super::reply;
use super::request::*;
use gipfel_base::ByteRange;
use gipfel_testkit::Rng;

fn exports() -> Vec<ExportInfo> {
    let one = ExportInfo {
        name: "disk".into(),
        description: Some("a disk for tests".into()),
        size: 1 << 20,
        has_medium: true,
        flags: export_flag::SEND_FLUSH | export_flag::SEND_FUA | export_flag::CAN_MULTI_CONN,
        min_block: 1,
        preferred_block: 4096,
        require_block_size: false,
        contexts: vec!["base:allocation".into(), "qemu:dirty-bitmap:b".into()],
    };
    let strict = ExportInfo {
        name: "strict".into(),
        description: None,
        min_block: 512,
        require_block_size: true,
        contexts: vec![],
        ..one.clone()
    };
    vec![one, strict]
}

fn opt(option: u32, data: &[u8]) -> Vec<u8> {
    let mut m = OPTION_MAGIC.to_be_bytes().to_vec();
    m.extend_from_slice(&option.to_be_bytes());
    m.extend_from_slice(&(data.len() as u32).to_be_bytes());
    m.extend_from_slice(data);
    m
}

fn go_data(name: &str, requests: &[u16]) -> Vec<u8> {
    let mut d = (name.len() as u32).to_be_bytes().to_vec();
    d.extend_from_slice(name.as_bytes());
    d.extend_from_slice(&(requests.len() as u16).to_be_bytes());
    requests.iter().for_each(|r| d.extend_from_slice(&r.to_be_bytes()));
    d
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut d = (name.len() as u32).to_be_bytes().to_vec();
    d.extend_from_slice(name.as_bytes());
    d.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    for q in queries {
        d.extend_from_slice(&(q.len() as u32).to_be_bytes());
        d.extend_from_slice(q.as_bytes());
    }
    d
}

/// Feeds all of `input` in pieces of `step` bytes: output, last progress, bytes used.
fn feed(n: &mut Negotiation, input: &[u8], step: usize) -> (Vec<u8>, Progress, usize) {
    let (mut out, mut at, mut last) = (Vec::new(), 0, Progress::More);
    let list = exports();
    while at < input.len() {
        let end = (at + step).min(input.len());
        let (used, p) = n.push(&input[at..end], &list[..], &mut out);
        assert!(used > 0 || !matches!(p, Progress::More), "no byte used and none answered");
        at += used;
        let over = matches!(p, Progress::Done(_) | Progress::Close(_));
        last = p;
        if over {
            break;
        }
    }
    (out, last, at)
}

fn fixed(options: &[Vec<u8>]) -> Vec<u8> {
    let mut m = 3u32.to_be_bytes().to_vec();
    options.iter().for_each(|o| m.extend_from_slice(o));
    m
}

/// Reply types and data in `out`.
fn replies(mut out: &[u8]) -> Vec<(u32, Vec<u8>)> {
    let mut all = Vec::new();
    while !out.is_empty() {
        let word = |i: usize| u32::from_be_bytes(out[i..i + 4].try_into().unwrap());
        assert_eq!(&out[..8], &OPTION_REPLY_MAGIC.to_be_bytes());
        let len = word(16) as usize;
        all.push((word(12), out[20..20 + len].to_vec()));
        out = &out[20 + len..];
    }
    all
}

fn kinds(options: &[Vec<u8>]) -> Vec<u32> {
    let (out, _, _) = feed(&mut Negotiation::new(), &fixed(options), usize::MAX >> 1);
    replies(&out).into_iter().map(|r| r.0).collect()
}

#[test]
fn a_whole_handshake_in_pieces_of_any_size() {
    let all = fixed(&[
        opt(option::STRUCTURED_REPLY, &[]),
        opt(option::LIST, &[]),
        opt(77, b"what is this"),
        opt(option::SET_META_CONTEXT, &meta_data("disk", &["base:allocation", "x-foo:bar"])),
        opt(option::INFO, &go_data("disk", &[3])),
        opt(option::GO, &go_data("disk", &[1, 2, 3])),
        b"first request".to_vec(),
    ]);
    let mut first = None;
    for step in 1..all.len() + 1 {
        let (out, progress, used) = feed(&mut Negotiation::new(), &all, step);
        let Progress::Done(session) = progress else { panic!("{progress:?}") };
        assert_eq!(&all[used..], b"first request", "step {step}");
        assert_eq!((session.size, session.structured), (1 << 20, true));
        assert_eq!(session.contexts, [0]);
        assert_ne!(session.flags & export_flag::SEND_DF, 0);
        assert_eq!(first.get_or_insert_with(|| out.clone()), &out, "step {step}");
    }
    let first = first.unwrap();
    let got: Vec<u32> = replies(&first).iter().map(|r| r.0).collect();
    use option_reply::*;
    assert_eq!(
        got,
        [ACK, SERVER, SERVER, ACK, ERR_UNSUP, META_CONTEXT, ACK, INFO, INFO, ACK]
            .into_iter()
            .chain([INFO, INFO, INFO, INFO, ACK])
            .collect::<Vec<_>>()
    );
}

#[test]
fn what_each_option_refuses() {
    use option_reply::*;
    let big = vec![0; MAX_OPTION_DATA as usize + 1];
    let sr = || opt(option::STRUCTURED_REPLY, &[]);
    let set = |d: &[u8]| opt(option::SET_META_CONTEXT, d);
    let cases: Vec<(Vec<Vec<u8>>, Vec<u32>)> = vec![
        (vec![opt(option::LIST, b"x")], vec![ERR_INVALID]),
        (vec![opt(option::STRUCTURED_REPLY, b"x")], vec![ERR_INVALID]),
        (vec![opt(option::STARTTLS, b"")], vec![ERR_UNSUP]),
        (vec![opt(option::STARTTLS, b"x")], vec![ERR_INVALID]),
        (vec![opt(option::EXTENDED_HEADERS, b"")], vec![ERR_UNSUP]),
        (vec![opt(4, b"peek"), sr()], vec![ERR_UNSUP, ACK]),
        (vec![opt(option::GO, &big), sr()], vec![ERR_TOO_BIG, ACK]),
        (vec![opt(99, &big), sr()], vec![ERR_UNSUP, ACK]),
        (vec![opt(option::GO, b"")], vec![ERR_INVALID]),
        (vec![opt(option::GO, &go_data("nope", &[]))], vec![ERR_UNKNOWN]),
        (vec![opt(option::GO, &go_data("di\0sk", &[]))], vec![ERR_INVALID]),
        (vec![opt(option::INFO, &[go_data("disk", &[]), vec![0]].concat())], vec![ERR_INVALID]),
        (vec![opt(option::INFO, &go_data(&"n".repeat(4097), &[]))], vec![ERR_INVALID]),
        (
            vec![opt(option::GO, &go_data("strict", &[1]))],
            vec![INFO, INFO, INFO, ERR_BLOCK_SIZE_REQD],
        ),
        (vec![set(&meta_data("disk", &["base:allocation"]))], vec![ERR_INVALID]),
        (vec![sr(), set(&meta_data("nope", &["base:allocation"]))], vec![ACK, ERR_UNKNOWN]),
        (vec![sr(), set(&meta_data("disk", &["allocation"]))], vec![ACK, ERR_INVALID]),
        (vec![sr(), set(&meta_data("disk", &[":x"]))], vec![ACK, ERR_INVALID]),
        (vec![sr(), set(&meta_data("disk", &[]))], vec![ACK, ACK]),
        (vec![sr(), set(&meta_data("disk", &["base:", "base:what"]))], vec![ACK, ACK]),
        (vec![sr(), set(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])], vec![ACK, ERR_INVALID]),
        (vec![sr(), set(&[0xff, 0xff, 0xff, 0xff])], vec![ACK, ERR_INVALID]),
    ];
    for (options, expected) in cases {
        assert_eq!(kinds(&options), expected, "{options:02x?}");
    }
    let list = |q: &[&str]| kinds(&[opt(option::LIST_META_CONTEXT, &meta_data("disk", q))]).len();
    assert_eq!([list(&[]), list(&["base:"]), list(&["qemu:dirty-bitmap:b"])], [3, 2, 2]);
    assert_eq!([list(&["x:y"]), list(&["base:allocation", "base:"])], [1, 2]);
}

#[test]
fn what_ends_a_handshake() {
    let end = |bytes: &[u8]| match feed(&mut Negotiation::new(), bytes, 7).1 {
        Progress::Close(c) => c,
        p => panic!("{p:?}"),
    };
    assert!(matches!(end(&4u32.to_be_bytes()), Close::Violation(_)));
    assert!(matches!(end(&fixed(&[b"GET / HTTP/1.1\r\n".to_vec()])), Close::Violation(_)));
    assert_eq!(end(&fixed(&[opt(option::ABORT, &[])])), Close::Aborted);
    assert_eq!(end(&fixed(&[opt(option::EXPORT_NAME, b"nope")])), Close::UnknownExport);
    let long = opt(option::EXPORT_NAME, &[b'n'; 4097]);
    assert!(matches!(end(&fixed(&[long])), Close::Violation(_)));
    assert!(matches!(end(&fixed(&[opt(option::EXPORT_NAME, b"strict")])), Close::Violation(_)));
    let unfixed = [0u32.to_be_bytes().to_vec(), opt(option::LIST, &[])].concat();
    assert!(matches!(end(&unfixed), Close::Violation(_)));
    let mut endless = opt(option::LIST, &[]);
    endless[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(matches!(end(&fixed(&[endless])), Close::Violation(_)));
    let many: Vec<_> = (0..MAX_OPTIONS + 1).map(|_| opt(50, &[])).collect();
    assert!(matches!(end(&fixed(&many)), Close::Violation(_)));
}

#[test]
fn the_old_way_in() {
    for (flags, len) in [(0u32, 134), (1, 134), (2, 10), (3, 10)] {
        let bytes = [flags.to_be_bytes().to_vec(), opt(option::EXPORT_NAME, b"disk")].concat();
        let (out, p, _) = feed(&mut Negotiation::new(), &bytes, 5);
        let Progress::Done(s) = p else { panic!("{p:?}") };
        assert_eq!((out.len(), s.structured, s.contexts.len()), (len, false, 0));
        assert_eq!(out[..8], (1u64 << 20).to_be_bytes());
        assert_eq!(s.flags & export_flag::SEND_DF, 0);
        assert_eq!(u16::from_be_bytes([out[8], out[9]]), s.flags);
    }
}

#[test]
fn contexts_belong_to_the_export_they_were_chosen_for() {
    let sr = opt(option::STRUCTURED_REPLY, &[]);
    let set = |q| opt(option::SET_META_CONTEXT, &meta_data("disk", &[q]));
    let session = |options: &[Vec<u8>]| match feed(&mut Negotiation::new(), &fixed(options), 1000).1
    {
        Progress::Done(s) => s.contexts,
        p => panic!("{p:?}"),
    };
    let go = |name| opt(option::GO, &go_data(name, &[info::BLOCK_SIZE]));
    assert_eq!(session(&[sr.clone(), set("base:allocation"), go("strict")]), [0u32; 0]);
    assert_eq!(session(&[sr.clone(), set("qemu:dirty-bitmap:b"), go("disk")]), [1]);
    let bad = opt(option::SET_META_CONTEXT, b"");
    assert_eq!(session(&[sr, set("base:allocation"), bad, go("disk")]), [0u32; 0]);
}

#[test]
fn garbage_neither_panics_nor_piles_up() {
    let mut rng = Rng::from_env();
    for _ in 0..3000 {
        let mut n = Negotiation::new();
        let mut input = fixed(&[]);
        for _ in 0..rng.below(6) {
            let len = rng.below(40) as usize;
            let mut o = opt(rng.below(14) as u32, &rng.bytes(len));
            for _ in 0..rng.below(3) {
                let i = rng.below(o.len() as u64) as usize;
                o[i] = rng.below(256) as u8;
            }
            input.extend(o);
        }
        let (out, _, _) = feed(&mut n, &input, rng.between(1, 64) as usize);
        assert!(out.len() < 20_000);
    }
}

fn session(flags: u16) -> Session {
    Session {
        export: "disk".into(),
        size: 1 << 20,
        flags,
        min_block: 1,
        structured: true,
        contexts: vec![0],
    }
}

fn ask(kind: u16, flags: u16, offset: u64, length: u32) -> Request {
    Request { flags, kind, cookie: 7, offset, length }
}

const ALL: u16 = export_flag::HAS_FLAGS
    | export_flag::SEND_FLUSH
    | export_flag::SEND_FUA
    | export_flag::SEND_TRIM
    | export_flag::SEND_WRITE_ZEROES
    | export_flag::SEND_DF
    | export_flag::SEND_FAST_ZERO;

#[test]
fn what_requests_become() {
    use command::*;
    use command_flag::*;
    let s = session(ALL);
    let range = ByteRange::new(4096, 512);
    let run = |kind, flags| match ask(kind, flags, 4096, 512).judge(&s) {
        Verdict::Run(op) => op,
        v => panic!("{v:?}"),
    };
    assert_eq!(run(READ, DF | FUA), Op::Read { range, df: true });
    assert_eq!(run(WRITE, FUA), Op::Write { range, fua: true });
    assert_eq!(run(TRIM, 0), Op::Trim { range, fua: false });
    assert_eq!(run(CACHE, 0), Op::Cache { range });
    assert_eq!(run(BLOCK_STATUS, REQ_ONE), Op::BlockStatus { range, one: true });
    let zeroes = Op::WriteZeroes { range, fua: false, may_unmap: false, fast: true };
    assert_eq!(run(WRITE_ZEROES, NO_HOLE | FAST_ZERO), zeroes);
    assert_eq!(ask(FLUSH, 0, 0, 0).judge(&s), Verdict::Run(Op::Flush));
    assert_eq!(ask(DISC, 0, 1, 1).judge(&s), Verdict::Disconnect);
    for kind in [READ, WRITE, TRIM, WRITE_ZEROES, CACHE] {
        assert_eq!(ask(kind, 0, 1 << 20, 0).judge(&s), Verdict::Run(Op::Nothing));
    }
}

#[test]
fn what_requests_are_refused() {
    use WireError::*;
    use command::*;
    use command_flag::*;
    let s = session(ALL);
    let refused = |s: &Session, r: Request| match r.judge(s) {
        Verdict::Refuse(r) => r.error,
        v => panic!("{r:?}: {v:?}"),
    };
    let end = 1 << 20;
    for (kind, error) in
        [(READ, Inval), (WRITE, NoSpace), (WRITE_ZEROES, NoSpace), (TRIM, Inval), (CACHE, Inval)]
    {
        for (offset, length) in [(end, 1), (end - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2)] {
            assert_eq!(refused(&s, ask(kind, 0, offset, length)), error, "{kind}");
        }
    }
    assert_eq!(refused(&s, ask(BLOCK_STATUS, 0, end, 1)), Inval);
    assert_eq!(refused(&s, ask(BLOCK_STATUS, 0, 0, 0)), Inval);
    assert_eq!(refused(&s, ask(FLUSH, 0, 0, 1)), Inval);
    for kind in [8, 9, 0xffff] {
        assert_eq!(refused(&s, ask(kind, 0, 0, 512)), Inval);
    }
    for (kind, flags) in [
        (READ, NO_HOLE),
        (READ, REQ_ONE),
        (WRITE, DF),
        (WRITE, NO_HOLE),
        (TRIM, FAST_ZERO),
        (FLUSH, DF),
        (CACHE, DF),
        (BLOCK_STATUS, DF),
        (WRITE_ZEROES, REQ_ONE),
        (READ, 1 << 5),
        (WRITE, 1 << 15),
    ] {
        let length = if kind == FLUSH { 0 } else { 512 };
        assert_eq!(refused(&s, ask(kind, flags, 0, length)), Inval, "{kind} {flags:#x}");
    }
    let bare = session(export_flag::HAS_FLAGS);
    for (kind, flags) in [(READ, FUA), (READ, DF), (WRITE, FUA), (TRIM, 0), (WRITE_ZEROES, 0)] {
        assert_eq!(refused(&bare, ask(kind, flags, 0, 512)), Inval, "{kind} {flags:#x}");
    }
    assert_eq!(refused(&bare, ask(FLUSH, 0, 0, 0)), Inval);
    let read_only = session(ALL | export_flag::READ_ONLY);
    for kind in [WRITE, TRIM, WRITE_ZEROES] {
        assert_eq!(refused(&read_only, ask(kind, 0, 0, 512)), Perm);
        assert_eq!(refused(&read_only, ask(kind, 0, end, 512)), Perm);
    }
    assert_eq!(ask(FLUSH, 0, 0, 0).judge(&read_only), Verdict::Run(Op::Flush));
    let large = Session { size: 1 << 40, ..s.clone() };
    assert_eq!(refused(&large, ask(READ, 0, 0, MAX_PAYLOAD + 1)), Overflow);
    let simple = Session { structured: false, ..large.clone() };
    assert_eq!(refused(&simple, ask(READ, 0, 0, MAX_PAYLOAD + 1)), Inval);
    assert_eq!(refused(&large, ask(WRITE, 0, 0, MAX_PAYLOAD + 1)), Inval);
    let absurd = ask(WRITE, 0, 0, MAX_PAYLOAD_SKIP + 1).judge(&large);
    assert!(matches!(absurd, Verdict::Violation(_)));
    assert!(matches!(ask(TRIM, 0, 0, u32::MAX).judge(&large), Verdict::Run(_)));
    let coarse = Session { min_block: 512, ..s.clone() };
    assert_eq!(refused(&coarse, ask(READ, 0, 1, 512)), Inval);
    assert_eq!(refused(&coarse, ask(WRITE, 0, 0, 511)), Inval);
    let contextless = Session { contexts: vec![], ..s };
    assert_eq!(refused(&contextless, ask(BLOCK_STATUS, 0, 0, 512)), Inval);
}

#[test]
fn any_request_gets_a_verdict_within_the_export() {
    let mut rng = Rng::from_env();
    for _ in 0..100_000 {
        let mut s = session(rng.next_u64() as u16);
        s.structured = rng.one_in(2);
        s.size = rng.next_u64() >> rng.below(64);
        let offset = if rng.one_in(2) { rng.next_u64() } else { rng.below(s.size.max(1)) };
        let length = (rng.next_u64() >> rng.between(32, 63)) as u32;
        let r = ask(rng.below(10) as u16, rng.below(64) as u16, offset, length);
        let range = match r.judge(&s) {
            Verdict::Run(
                Op::Read { range, .. }
                | Op::Write { range, .. }
                | Op::WriteZeroes { range, .. }
                | Op::Trim { range, .. }
                | Op::Cache { range }
                | Op::BlockStatus { range, .. },
            ) => range,
            _ => continue,
        };
        assert!(range.end() <= s.size && !range.is_empty(), "{r:?}");
        let writes = matches!(r.kind, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        assert!(!writes || s.flags & export_flag::READ_ONLY == 0, "{r:?}");
    }
}

#[test]
fn request_headers() {
    let c = gipfel_testkit::nbd::Command {
        kind: 6,
        flags: 0x11,
        offset: 0x0102_0304_0506_0708,
        length: 9,
        payload: &[],
    };
    let bytes = gipfel_testkit::nbd::Client::encode(&c, u64::MAX - 1);
    let mut b: [u8; REQUEST_LEN] = bytes.try_into().unwrap();
    let r = Request {
        flags: 0x11,
        kind: 6,
        cookie: u64::MAX - 1,
        offset: 0x0102_0304_0506_0708,
        length: 9,
    };
    assert_eq!(Request::parse(&b), Some(r));
    b[3] ^= 1;
    assert_eq!(Request::parse(&b), None);
}

#[test]
fn errors_keep_within_the_protocols_numbers() {
    let numbers: Vec<u32> = (-1..200).map(|e| WireError::from_errno(e, false).number()).collect();
    assert!(numbers.iter().all(|n| [1, 5, 12, 22, 28, 108].contains(n)));
    assert_eq!(WireError::from_errno(95, true), WireError::NotSup);
    assert_eq!(WireError::from_errno(122, false), WireError::NoSpace);
    let mut buf = [0; reply::MAX_ERROR_LEN];
    let n = reply::error_at(&mut buf, 1, WireError::Io, &"ä".repeat(300), 5, true);
    assert_eq!(n, reply::MAX_ERROR_LEN);
    assert_eq!(u32::from_be_bytes(buf[16..20].try_into().unwrap()) as usize, n - 20);
}

#[test]
fn status_chunks_join_neighbours_and_stop_when_full() {
    let mut buf = [0; reply::STATUS_PREFIX_LEN + 2 * reply::EXTENT_LEN];
    let mut c = reply::StatusChunk::new(&mut buf, 10);
    assert!(c.push(10, 0) && c.push(0, 3) && c.push(20, 0) && c.push(5, 3));
    assert!(!c.push(1, 0));
    assert!(c.push(u32::MAX - 5, 3));
    assert!(!c.push(1, 3), "an extent that would overflow needs a new one");
    assert_eq!(c.finish(9, 4, true), 40);
    assert_eq!(buf[16..24], [0, 0, 0, 20, 0, 0, 0, 4]);
    assert_eq!(buf[24..32], [0, 0, 0, 30, 0, 0, 0, 0]);
    assert_eq!(buf[32..40], [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 3]);
    let mut buf = [0; 100];
    let mut one = reply::StatusChunk::new(&mut buf, 1);
    assert!(one.push(10, 1) && !one.push(10, 2) && one.push(3, 1));
}

//! The executor, files and sockets on the real kernel.
#![allow(missing_docs)]

use std::time::Duration;

use gipfel_base::{ByteRange, ErrorKind};
use gipfel_io::net::{Listener, Message, Stream, socket_pair};
use gipfel_io::time::{Instant, sleep, timeout};
use gipfel_io::{Buf, File, Gate, OpenOptions, Runtime, ZeroMode, spawn_local, yield_now};

fn scratch(name: &str) -> std::path::PathBuf {
    let d = std::env::temp_dir().join(format!("gipfel-io-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&d).unwrap();
    d
}

#[test]
fn files_read_write_zero_extend_lock() {
    let dir = scratch("files");
    let path = dir.join("a.img");
    let rt = Runtime::new(0).unwrap();
    rt.block_on(async {
        let o = OpenOptions { write: true, create_new: true, ..Default::default() };
        let f = File::open(&path, o).await.unwrap();
        assert_eq!(File::open(&path, o).await.err().unwrap().kind(), ErrorKind::Exists);
        f.write_at(1 << 20, Buf::from_slice(&[7; 100_000])).await.unwrap();
        let b = Buf::new(200_000);
        f.read_at(1 << 20, b.clone()).await.unwrap();
        assert_eq!(b.slice(0..100_000).to_vec(), vec![7; 100_000]);
        assert!(b.slice(100_000..200_000).is_zero(), "past the end is zeros");
        assert_eq!(f.extent(0).await.unwrap(), (false, 1 << 20));
        f.zero(ByteRange::new(1 << 20, 65536), ZeroMode::Unmap).await.unwrap();
        f.read_at(1 << 20, b.clone()).await.unwrap();
        assert!(b.slice(0..65536).is_zero() && !b.slice(65536..65537).is_zero());
        f.sync().await.unwrap();
        f.set_len(4096).await.unwrap();
        assert_eq!(f.info().await.unwrap().len, 4096);
        assert_eq!(f.extent(8192).await.unwrap(), (false, u64::MAX));

        let g = File::open(&path, OpenOptions { write: true, ..Default::default() }).await.unwrap();
        f.lock_byte(100).await.unwrap();
        assert!(g.is_byte_locked(100).await.unwrap());
        assert!(!f.is_byte_locked(100).await.unwrap(), "one's own lock does not count");
        f.unlock_byte(100).await.unwrap();
        assert!(!g.is_byte_locked(100).await.unwrap());
    })
    .unwrap();
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn direct_io_says_what_it_demands() {
    let dir = scratch("direct");
    let path = dir.join("d.img");
    std::fs::write(&path, vec![3u8; (1 << 20) + 1000]).unwrap();
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            let o = OpenOptions { write: true, direct: true, ..Default::default() };
            let f = match File::open(&path, o).await {
                Ok(f) => f,
                Err(e) if e.kind() == ErrorKind::Unsupported => return,
                Err(e) => panic!("{e}"),
            };
            let i = f.info().await.unwrap();
            assert!(i.offset_align >= 512 && i.memory_align > 1, "{i:?}");
            let b = Buf::new(8192);
            f.read_at(4096, b.clone()).await.unwrap();
            assert_eq!(b.to_vec(), vec![3; 8192]);
            // The end of the file inside a block, and memory that is not aligned.
            f.read_at(1 << 20, b.clone()).await.unwrap();
            assert_eq!(b.slice(0..1000).to_vec(), vec![3; 1000]);
            assert!(b.slice(1000..8192).is_zero());
            let odd = Buf::new(9000).slice(1..4097);
            odd.fill(7);
            f.write_at(4096, odd.clone()).await.unwrap();
            odd.fill(0);
            f.read_at(4096, odd.clone()).await.unwrap();
            assert_eq!(odd.to_vec(), vec![7; 4096]);
        })
        .unwrap();
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn opening_a_pipe_does_not_wait() {
    let dir = scratch("pipe");
    let path = dir.join("p");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            let f = File::open(&path, OpenOptions::default()).await.unwrap();
            assert_eq!(f.info().await.unwrap_err().kind(), ErrorKind::InvalidInput);
        })
        .unwrap();
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn sockets_carry_gathered_messages_across_threads() {
    let dir = scratch("sock");
    let path = dir.join("s.sock");
    let rt = Runtime::new(2).unwrap();
    let io = rt.io_threads();
    rt.block_on(async {
        let listener = Listener::unix(&path).await.unwrap();
        let p = path.clone();
        let client = io[1].spawn(move || async move {
            let s = Stream::connect_unix(&p).await.unwrap();
            let mut m = Message::new();
            for i in 0..100u8 {
                m.push(Buf::from_slice(&vec![i; 50_000]));
            }
            let (r, m) = s.send(m).await;
            r.unwrap();
            assert!(m.is_empty());
            let b = Buf::new(4);
            s.recv_exact(b.clone()).await.unwrap();
            b.to_vec()
        });
        let s = listener.accept().await.unwrap();
        let server = io[0].spawn(move || async move {
            for i in 0..100u8 {
                let b = Buf::new(50_000);
                s.recv_exact(b.clone()).await.unwrap();
                assert_eq!(b.to_vec(), vec![i; 50_000]);
            }
            let mut m = Message::new();
            m.push(Buf::from_slice(b"done"));
            s.send(m).await.0.unwrap();
        });
        server.await.unwrap();
        assert_eq!(client.await.unwrap(), b"done");
    })
    .unwrap();
    std::fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_dropped_receive_lets_go_and_the_stream_lives_on() {
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            let (a, b) = socket_pair().unwrap();
            let buf = Buf::new(64);
            assert!(timeout(Duration::from_millis(20), a.recv(buf.clone())).await.is_none());
            let mut m = Message::new();
            m.push(Buf::from_slice(b"hello"));
            b.send(m).await.0.unwrap();
            assert_eq!(a.recv(buf.clone()).await.unwrap(), 5);
            b.shutdown();
            assert_eq!(a.recv(buf).await.unwrap(), 0);
        })
        .unwrap();
}

#[test]
fn timers_fire_in_order() {
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            let t = Instant::now();
            let a = spawn_local(async {
                sleep(Duration::from_millis(30)).await;
                Instant::now()
            });
            sleep(Duration::from_millis(10)).await;
            let b = Instant::now();
            assert!(b.since(t) >= Duration::from_millis(10));
            assert!(a.await > b);
        })
        .unwrap();
}

#[test]
fn a_gate_closes_when_all_have_left_and_opens_for_those_who_wait() {
    let rt = Runtime::new(2).unwrap();
    let io = rt.io_threads();
    let gate = std::sync::Arc::new(Gate::new(1));
    rt.block_on(async {
        let work: Vec<_> = io
            .iter()
            .map(|t| {
                let g = gate.clone();
                t.spawn(move || async move {
                    let mut seen = 0;
                    while seen < 100 {
                        let e = g.enter().await;
                        let before = *e;
                        yield_now().await;
                        assert_eq!(before, *e, "the value stays while someone is inside");
                        seen = *e;
                    }
                })
            })
            .collect();
        for i in 2..=100 {
            let mut d = gate.close().await;
            assert_eq!(d.replace(i), i - 1);
            drop(d);
            sleep(Duration::from_micros(200)).await;
        }
        for w in work {
            w.await.unwrap();
        }
    })
    .unwrap();
}

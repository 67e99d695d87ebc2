//! The NBD server on real sockets with a disk in memory: data, errors, bad clients, removal.

mod common;

use common::{MemoryDisk, SIZE, beside, with_server};
use gipfel_base::ErrorKind;
use gipfel_exports::nbd::{ExportOptions, Removal, ServerOptions};
use gipfel_testkit::nbd::{Address, Client, Command, Handshake, wire};
use gipfel_testkit::{DiskModel, Rng, tools};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

fn read(offset: u64, length: u32) -> Command<'static> {
    Command { kind: wire::CMD_READ, flags: 0, offset, length, payload: &[] }
}

/// Random requests, up to 24 in flight on ranges of its own, checked against a model.
fn hammer(address: &Address, span: std::ops::Range<u64>, structured: bool, rounds: u64, seed: u64) {
    let mut rng = Rng::new(seed);
    let mut c = match structured {
        true => Client::connect(address, "x").unwrap(),
        false => Client::connect_simple(address, "x").unwrap(),
    };
    let mut model = DiskModel::new(SIZE);
    for _ in 0..rounds {
        let n = rng.between(1, 24);
        let part = (span.end - span.start) / n;
        let mut payloads = Vec::new();
        let mut plan = Vec::new();
        for i in 0..n {
            let offset = span.start + i * part + rng.below(part / 2);
            let most = *rng.pick(&[600, 5000, 40_000, 300_000]);
            let length = rng.between(1, most.min(part / 2));
            let kind = *rng.pick(&[0, 0, 1, 1, 1, 6, 3, 5]);
            payloads.push(if kind == 1 { rng.bytes(length as usize) } else { Vec::new() });
            let length = if kind == 3 { 0 } else { length as u32 };
            plan.push((kind, if kind == 3 { 0 } else { offset }, length));
        }
        let commands: Vec<_> = plan
            .iter()
            .zip(&payloads)
            .map(|(&(kind, offset, length), payload)| {
                let flags = if kind == 1 { wire::FLAG_FUA * (length as u16 & 1) } else { 0 };
                Command { kind, flags, offset, length, payload }
            })
            .collect();
        let cookies = c.submit_all(&commands).unwrap();
        for _ in 0..n {
            let done = c.complete().unwrap();
            let i = cookies.iter().position(|k| *k == done.cookie).unwrap();
            let (kind, offset, length) = plan[i];
            let data = done.result.unwrap();
            match kind {
                0 => model.expect(offset, &data.bytes),
                1 => model.write(offset, &payloads[i]),
                6 => model.zero(offset, u64::from(length)),
                _ => {}
            }
        }
    }
    assert_eq!(c.in_flight(), 0);
    for at in (span.start..span.end).step_by(1 << 20) {
        let n = (span.end - at).min(1 << 20) as u32;
        model.expect(at, &c.read(at, n).unwrap());
    }
    c.disconnect().unwrap();
}

#[test]
fn many_clients_on_both_sockets_match_their_models() {
    let seed = Rng::from_env().seed();
    with_server(ServerOptions::default(), |site| async move {
        let share = SIZE / 6;
        let mut threads = Vec::new();
        for i in 0..6 {
            let address = if i % 2 == 0 { site.address.clone() } else { site.tcp.clone() };
            threads.push(std::thread::spawn(move || {
                hammer(&address, i * share..(i + 1) * share, i % 3 != 0, 40, seed + i);
            }));
        }
        beside(move || threads.into_iter().for_each(|t| t.join().unwrap())).await;
        assert!(site.disk.most_running.load(SeqCst) > 4, "requests run side by side");
        assert!(site.disk.flushes.load(SeqCst) > 0);
        site.server.stop().await;
    });
}

#[test]
fn the_largest_requests_pass() {
    with_server(ServerOptions::default(), |site| async move {
        let big = MemoryDisk::new(40 << 20);
        let options = ExportOptions { name: "big".into(), writable: true, description: None };
        site.server.add(options, big).unwrap();
        site.client(|a| {
            let mut c = Client::connect(a, "big").unwrap();
            assert_eq!(c.info().block_size, Some((1, 4096, 32 << 20)));
            let data = Rng::new(1).bytes(32 << 20);
            c.write(5, &data, 0).unwrap();
            assert!(c.read(5, 32 << 20).unwrap() == data);
            assert_eq!(c.read(0, (32 << 20) + 1).unwrap_err().errno(), 75);
            let long = vec![1; (32 << 20) + 1];
            assert_eq!(c.write(0, &long, 0).unwrap_err().errno(), 22);
            assert_eq!(c.read(0, 6).unwrap(), [0, 0, 0, 0, 0, data[0]]);
            let cookies: Vec<_> = (0..5).map(|_| c.submit(&read(1, 30 << 20)).unwrap()).collect();
            for k in cookies {
                assert!(c.wait(k).unwrap().bytes[4..] == data[..(30 << 20) - 4]);
            }
            c.disconnect().unwrap();
        })
        .await;
    });
}

#[test]
fn block_status_tells_data_from_holes() {
    with_server(ServerOptions::default(), |site| async move {
        site.client(|a| {
            let mut c = Client::connect(a, "x").unwrap();
            c.write(8192, &[1; 4096], 0).unwrap();
            c.write(20480, &[1; 1], 0).unwrap();
            let status = c.block_status(100, 30_000, 0).unwrap();
            assert_eq!(status[0].extents, [(8092, 3), (4096, 0), (8192, 3), (4096, 0), (5524, 3)]);
            let one = c.block_status(0, 30_000, wire::FLAG_REQ_ONE).unwrap();
            assert_eq!(one[0].extents, [(8192, 3)]);
            let blocks = (0..5000u64).map(|i| (i % 2048) * 4096);
            for at in blocks.step_by(2) {
                c.write(at, &[7; 4096], 0).unwrap();
            }
            let many = c.block_status(0, SIZE as u32, 0).unwrap();
            assert!(many[0].extents.len() <= 2048);
            assert_eq!(c.map().unwrap().iter().map(|e| e.1).sum::<u64>(), SIZE);
            c.disconnect().unwrap();
        })
        .await;
    });
}

#[test]
fn failures_of_the_disk_reach_the_client_without_names_of_the_host() {
    with_server(ServerOptions::default(), |site| async move {
        for (errno, expected) in [(5, 5), (28, 28), (122, 28), (2, 5), (1, 1), (95, 22), (16, 5)] {
            site.disk.errno.store(errno, SeqCst);
            site.client(move |a| {
                let mut c = Client::connect(a, "x").unwrap();
                let e = c.read(0, 4096).unwrap_err();
                assert_eq!(e.errno(), expected, "{errno}");
                assert!(!e.to_string().contains("secret"), "{e}");
                assert_eq!(c.write(0, &[1; 70_000], 0).unwrap_err().errno(), expected);
                assert_eq!(c.flush().unwrap_err().errno(), expected);
                assert_eq!(c.block_status(0, 4096, 0).unwrap_err().errno(), expected);
                let fast = wire::FLAG_FAST_ZERO | wire::FLAG_NO_HOLE;
                assert_eq!(c.zero(0, 4096, fast).unwrap_err().errno(), 95);
                c.disconnect().unwrap();
                let mut c = Client::connect_simple(a, "x").unwrap();
                assert_eq!(c.read(0, 4096).unwrap_err().errno(), expected);
                c.disconnect().unwrap();
            })
            .await;
        }
    });
}

#[test]
fn a_read_only_export_refuses_writes_only() {
    with_server(ServerOptions { max_connections: 1, ..Default::default() }, |site| async move {
        let options = ExportOptions {
            name: "ro".into(),
            description: Some("nothing to write".into()),
            writable: false,
        };
        site.server.add(options, site.disk.clone()).unwrap();
        site.client(|a| {
            let mut c = Client::connect(a, "ro").unwrap();
            assert_eq!(c.info().description.as_deref(), Some("nothing to write"));
            assert_ne!(c.info().flags & wire::EXPORT_READ_ONLY, 0);
            assert_eq!(c.info().flags & wire::EXPORT_CAN_MULTI_CONN, 0, "one connection at most");
            assert_eq!(c.write(0, &[1; 512], 0).unwrap_err().errno(), 1);
            assert_eq!(c.zero(0, 512, 0).unwrap_err().errno(), 1);
            assert_eq!(c.trim(0, 512, 0).unwrap_err().errno(), 1);
            c.flush().unwrap();
            c.cache(0, 512).unwrap();
            c.read(0, 512).unwrap();
            c.disconnect().unwrap();
        })
        .await;
    });
}

#[test]
fn exports_come_and_go() {
    with_server(ServerOptions::default(), |site| async move {
        let add = |name: &str| {
            let o = ExportOptions { name: name.into(), ..Default::default() };
            site.server.add(o, site.disk.clone())
        };
        assert_eq!(add("x").unwrap_err().kind(), ErrorKind::Exists);
        assert!(add(&"n".repeat(4097)).is_err() && add("a\0b").is_err());
        add("").unwrap();
        assert_eq!(site.server.names(), ["x", ""]);
        let (mut c, mut d) = site
            .client(|a| {
                let names: Vec<_> = Handshake::connect(a)
                    .unwrap()
                    .list()
                    .unwrap()
                    .into_iter()
                    .map(|e| e.0)
                    .collect();
                assert_eq!(names, ["x", ""]);
                (Client::connect(a, "x").unwrap(), Client::connect(a, "").unwrap())
            })
            .await;
        let soft = site.server.remove("x", Removal::Soft).await.unwrap_err();
        assert_eq!(soft.kind(), ErrorKind::InUse);
        assert!(soft.to_string().contains("1 connected client;"), "{soft}");
        let none = site.server.remove("y", Removal::Hard).await.unwrap_err();
        assert_eq!(none.kind(), ErrorKind::NotFound);
        // A write in flight outlives the removal's start, and ends before the removal does.
        site.disk.held.store(true, SeqCst);
        let write =
            Command { kind: wire::CMD_WRITE, flags: 0, offset: 0, length: 4, payload: b"last" };
        c.submit(&write).unwrap();
        while site.disk.running.load(SeqCst) == 0 {
            gipfel_io::time::sleep(Duration::from_millis(1)).await;
        }
        {
            let mut removal = std::pin::pin!(site.server.remove("x", Removal::Hard));
            let early = gipfel_io::time::timeout(Duration::from_millis(50), removal.as_mut()).await;
            assert!(early.is_none(), "removal waits for what is in flight");
            assert_eq!(site.server.names(), [""]);
            site.disk.release();
            removal.await.unwrap();
        }
        assert_eq!(site.disk.data.lock().unwrap().read(0, 4), b"last");
        beside(move || {
            assert_eq!(c.complete().unwrap_err().kind(), ErrorKind::Disconnected);
            assert_eq!(d.read(0, 4).unwrap(), b"last", "the other export was left alone");
            d.disconnect().unwrap();
        })
        .await;
        let gone = site.client(|a| Client::connect(a, "x").unwrap_err().kind()).await;
        assert_eq!(gone, ErrorKind::NotFound);
        while site.server.users("") != Some(0) {
            gipfel_io::time::sleep(Duration::from_millis(1)).await;
        }
        site.server.remove("", Removal::Soft).await.unwrap();
        site.server.stop().await;
    });
}

#[test]
fn bad_clients_are_cut_off_and_harm_nobody() {
    let mut rng = Rng::from_env();
    let limit = Duration::from_millis(300);
    let options = ServerOptions { handshake_limit: limit, ..Default::default() };
    with_server(options, |site| async move {
        site.client(move |a| {
            let mut good = Client::connect(a, "x").unwrap();
            good.write(0, b"good", 0).unwrap();
            // Silence in the handshake.
            let mut silent = a.connect().unwrap();
            let start = Instant::now();
            assert_eq!(silent.receive_to_end(100).unwrap().len(), 18);
            assert!(start.elapsed() >= Duration::from_millis(250));
            // Byte by byte, without end.
            let mut slow = a.connect().unwrap();
            let start = Instant::now();
            while slow.send(&[0]).is_ok() {
                assert!(start.elapsed() < Duration::from_secs(5), "a slow handshake is cut off");
                std::thread::sleep(Duration::from_millis(30));
            }
            // Garbage before negotiation and in it.
            for i in 0..200 {
                let mut s = a.connect().unwrap();
                let n = rng.below(300) as usize;
                let mut bytes = rng.bytes(n);
                if i % 2 == 0 {
                    bytes.splice(0..0, *b"\0\0\0\x03IHAVEOPT\0\0\0");
                }
                let _ = s.send(&bytes);
                let _ = s.shutdown(std::net::Shutdown::Write);
                s.receive_to_end(1 << 20).unwrap();
            }
            // Garbage after negotiation, and absurd lengths.
            for i in 0..200 {
                let mut c = Client::connect(a, "x").unwrap();
                let bytes = match i % 4 {
                    0 => rng.bytes(500),
                    1 => {
                        let r = Command {
                            kind: 1,
                            flags: 0,
                            offset: 0,
                            length: u32::MAX,
                            payload: &[],
                        };
                        Client::encode(&r, 1)
                    }
                    2 => {
                        // A write whose payload never comes whole.
                        let r = Command {
                            kind: 1,
                            flags: 0,
                            offset: 0,
                            length: 1 << 20,
                            payload: b"gone",
                        };
                        Client::encode(&r, 1)
                    }
                    _ => {
                        let kind = rng.below(12) as u16;
                        let flags = rng.next_u64() as u16;
                        let (offset, length) = (rng.next_u64(), rng.below(600) as u32);
                        let r = Command { kind, flags, offset, length, payload: &[] };
                        Client::encode(&r, 1)
                    }
                };
                let _ = c.stream().send(&bytes);
                let _ = c.stream().shutdown(std::net::Shutdown::Write);
                while c.receive_raw(1).is_ok() {}
            }
            assert_eq!(good.read(0, 4).unwrap(), b"good");
            good.disconnect().unwrap();
        })
        .await;
        while site.server.connections() > 0 {
            gipfel_io::time::sleep(Duration::from_millis(5)).await;
        }
        site.server.remove("x", Removal::Soft).await.unwrap();
    });
}

#[test]
fn a_client_that_stops_reading_blocks_itself_only() {
    with_server(ServerOptions::default(), |site| async move {
        let stopped = site
            .client(|a| {
                let mut stopped = Client::connect(a, "x").unwrap();
                stopped.stream().set_timeout(Duration::from_millis(200)).unwrap();
                // Far more answers than sockets hold and more requests than may be in flight.
                let reads = Client::encode(&read(0, 1 << 20), 1).repeat(100);
                while stopped.stream().send(&reads).is_ok() {}
                let mut good = Client::connect(a, "x").unwrap();
                for _ in 0..50 {
                    good.write(0, &[1; 4096], 0).unwrap();
                }
                good.disconnect().unwrap();
                stopped
            })
            .await;
        let most = site.disk.most_running.load(SeqCst);
        assert!(most <= 40, "{most} reads of 1 MiB ran at once: 32 MiB are the limit");
        // It can be removed all the same.
        site.server.remove("x", Removal::Hard).await.unwrap();
        drop(stopped);
        site.server.stop().await;
    });
}

#[test]
fn requests_before_a_goodbye_are_answered() {
    with_server(ServerOptions::default(), |site| async move {
        site.disk.held.store(true, SeqCst);
        let mut c = site.client(|a| Client::connect(a, "x").unwrap()).await;
        c.submit_all(&[read(0, 512); 200]).unwrap();
        let client = std::thread::spawn(move || {
            c.disconnect().unwrap();
        });
        gipfel_io::time::sleep(Duration::from_millis(50)).await;
        assert!(!client.is_finished());
        assert!(site.disk.most_running.load(SeqCst) <= 128, "requests in flight are limited");
        site.disk.release();
        beside(move || client.join().unwrap()).await;
    });
}

#[test]
fn clients_beyond_the_limit_wait_for_a_seat() {
    with_server(ServerOptions { max_connections: 2, ..Default::default() }, |site| async move {
        site.client(|a| {
            let one = Client::connect(a, "x").unwrap();
            let two = Client::connect(a, "x").unwrap();
            let address = a.clone();
            let third = std::thread::spawn(move || {
                let mut c = Client::connect(&address, "x").unwrap();
                c.read(0, 512).unwrap();
            });
            std::thread::sleep(Duration::from_millis(100));
            assert!(!third.is_finished(), "the third waits");
            one.disconnect().unwrap();
            third.join().unwrap();
            two.disconnect().unwrap();
        })
        .await;
        site.server.stop().await;
    });
}

#[test]
fn a_thousand_connections() {
    let options = ServerOptions { max_connections: 0, ..Default::default() };
    with_server(options, |site| async move {
        let before = resident();
        site.client(|a| {
            // Each costs a descriptor on either side of this process.
            let mut clients: Vec<_> = (0..400).map(|_| Client::connect(a, "x").unwrap()).collect();
            for (i, c) in clients.iter_mut().enumerate() {
                c.write(i as u64 * 512, &[i as u8; 512], 0).unwrap();
            }
            for (i, c) in clients.iter_mut().enumerate().rev() {
                assert_eq!(c.read(i as u64 * 512, 512).unwrap(), [i as u8; 512]);
            }
            clients.into_iter().for_each(|c| c.disconnect().unwrap());
        })
        .await;
        // The test's own clients hold 256 KiB each.
        let grown = resident().saturating_sub(before);
        assert!(grown < 300 << 20, "{} MiB for 400 connections", grown >> 20);
        site.server.stop().await;
    });
}

fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn reference_clients() {
    if !tools::have("nbdinfo") || !tools::have("nbdcopy") || !tools::have("qemu-io") {
        return;
    }
    with_server(ServerOptions::default(), |site| async move {
        let path = |name| site.dir.join(name).to_str().unwrap().to_owned();
        let (socket, copy) = (path("s"), path("copy"));
        let copied = copy.clone();
        beside(move || {
            let uri = format!("nbd+unix:///x?socket={socket}");
            let write = [
                "write -P 7 1M 64k",
                "write -z 3M 4k",
                "discard 4M 64k",
                "flush",
                "write -f -P 9 100000 1234",
                "read -P 7 1M 64k",
                "read -P 9 100000 1234",
            ];
            tools::qemu_io("raw", &uri, &write);
            let info = tools::run("nbdinfo", &[&uri]);
            for line in [
                "export-size: 8388608",
                "base:allocation",
                "can_multi_conn: true",
                "can_fast_zero: true",
                "can_df: true",
                "block_size_maximum: 33554432",
            ] {
                assert!(info.contains(line), "{line} in {info}");
            }
            let map = tools::run("nbdinfo", &["--map", &uri]);
            assert!(map.contains("hole,zero"), "{map}");
            tools::run("nbdcopy", &[&uri, &copied]);
            let list = format!("nbd+unix://?socket={socket}");
            assert!(tools::run("nbdinfo", &["--list", &list]).contains("export=\"x\""));
        })
        .await;
        let copied = std::fs::read(copy).unwrap();
        site.disk.data.lock().unwrap().expect(0, &copied);
        assert_eq!(copied.len() as u64, SIZE);
        site.server.stop().await;
    });
}

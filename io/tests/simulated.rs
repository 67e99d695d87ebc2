//! The simulation: the same seed gives the same run, crashes keep what was flushed.
#![allow(missing_docs)]

use std::path::Path;
use std::time::Duration;

use gipfel_io::net::{Message, Stream};
use gipfel_io::sim::{Fault, IoKind, Keep, World};
use gipfel_io::time::{Instant, sleep};
use gipfel_io::{Buf, File, OpenOptions, spawn_local};

const RW: OpenOptions =
    OpenOptions { write: true, direct: false, create_new: false, create: false };

fn run(seed: u64) -> (u64, Vec<u8>) {
    let w = World::new(seed);
    w.put_file("a", vec![0; 8192]);
    w.run(async {
        let f = File::open(Path::new("a"), RW).await.unwrap();
        let tasks: Vec<_> = (0..8u8)
            .map(|i| {
                let f = f.clone();
                spawn_local(async move { f.write_at(0, Buf::from_slice(&[i; 4096])).await })
            })
            .collect();
        for t in tasks {
            t.await.unwrap();
        }
        (Instant::now().nanos(), w.file("a").unwrap())
    })
}

#[test]
fn the_seed_decides_everything() {
    assert_eq!(run(7), run(7));
    let winners: std::collections::HashSet<u8> = (0..50).map(|s| run(s).1[0]).collect();
    assert!(winners.len() > 3, "different seeds order concurrent writes differently");
}

#[test]
fn a_power_loss_keeps_what_was_flushed_and_only_that_for_sure() {
    let w = World::new(1);
    w.put_file("a", vec![0; 4096]);
    w.set_crash(Some(3));
    let crashed = w.run(async {
        let work = spawn_local(async {
            let f = File::open(Path::new("a"), RW).await.unwrap();
            f.write_at(0, Buf::from_slice(&[1; 1024])).await.unwrap();
            f.sync().await.unwrap();
            f.write_at(1024, Buf::from_slice(&[2; 1024])).await.unwrap();
            f.sync().await.unwrap();
        });
        w.crashed().await;
        drop(work);
        true
    });
    assert!(crashed);
    let lost = w.after_power_loss(Keep::Nothing, 1).file("a").unwrap();
    assert!(lost[..1024].iter().all(|b| *b == 1) && lost[1024..].iter().all(|b| *b == 0));
    let kept = w.after_power_loss(Keep::Everything, 1).file("a").unwrap();
    assert!(kept[1024..2048].iter().all(|b| *b == 2));
    let torn: Vec<_> =
        (0..20).map(|s| w.after_power_loss(Keep::Torn, s).file("a").unwrap()).collect();
    assert!(torn.iter().any(|t| t[1024] != t[1536]), "a write tears between sectors");
}

#[test]
fn faults_hit_the_io_they_name() {
    let w = World::new(1);
    w.put_file("a", vec![0; 4096]);
    w.set_fault(Some(Fault { nth: 1, kind: Some(IoKind::Write), errno: 28, sticky: false }));
    w.run(async {
        let f = File::open(Path::new("a"), RW).await.unwrap();
        let b = Buf::from_slice(&[1; 512]);
        f.write_at(0, b.clone()).await.unwrap();
        f.read_at(0, Buf::new(512)).await.unwrap();
        let e = f.write_at(0, b.clone()).await.unwrap_err();
        assert_eq!(e.errno(), 28);
        f.write_at(0, b).await.unwrap();
    });
}

#[test]
fn time_is_virtual_and_streams_cut_anywhere() {
    let w = World::new(3);
    let started = std::time::Instant::now();
    w.run(async {
        let (a, b) = Stream::simulated_pair();
        let t = spawn_local(async move {
            sleep(Duration::from_secs(3600)).await;
            let mut m = Message::new();
            m.push(Buf::from_slice(&[9; 100_000]));
            a.send(m).await.0.unwrap();
            a
        });
        let buf = Buf::new(100_000);
        b.recv_exact(buf.clone()).await.unwrap();
        assert_eq!(buf.to_vec(), vec![9; 100_000]);
        drop(t.await);
        assert_eq!(b.recv(Buf::new(1)).await.unwrap(), 0);
    });
    assert!(started.elapsed() < Duration::from_secs(60));
}

//! `kill -9` at random moments: every flushed byte is there, and the image has leaks at most.
#![allow(missing_docs)]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Served, soak};
use gipfel_testkit::nbd::Client;
use gipfel_testkit::{Rng, tools};

const SIZE: u64 = 16 << 20;
const BLOCK: u64 = 4096;
const WRITERS: u64 = 3;

/// For each block of a writer: the version that a flush has confirmed, and the last one sent.
type Versions = Vec<(u32, u32)>;

fn content(block: u64, version: u32) -> Vec<u8> {
    if version == 0 {
        return vec![0; BLOCK as usize];
    }
    let word = (block << 32 | u64::from(version)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word.to_le_bytes().iter().copied().cycle().take(BLOCK as usize).collect()
}

/// Writes and flushes until the daemon dies.
fn writer(mut c: Client, n: u64, seed: u64, versions: &Mutex<Versions>) {
    let mut rng = Rng::new(seed + n);
    let blocks = SIZE / BLOCK / WRITERS;
    loop {
        let mut touched = Vec::new();
        for _ in 0..rng.between(1, 20) {
            let block = rng.below(blocks);
            let version = {
                let mut v = versions.lock().unwrap();
                v[block as usize].1 += 1;
                v[block as usize].1
            };
            let at = (n * blocks + block) * BLOCK;
            if c.write(at, &content(n * blocks + block, version), 0).is_err() {
                return;
            }
            touched.push((block, version));
        }
        if c.flush().is_err() {
            return;
        }
        let mut v = versions.lock().unwrap();
        for (block, version) in touched {
            let confirmed = &mut v[block as usize].0;
            *confirmed = (*confirmed).max(version);
        }
    }
}

fn verify(served: &Served, all: &[Arc<Mutex<Versions>>]) {
    let mut c = served.client();
    let blocks = SIZE / BLOCK / WRITERS;
    for (n, versions) in all.iter().enumerate() {
        let mut v = versions.lock().unwrap();
        for block in 0..blocks {
            let id = n as u64 * blocks + block;
            let got = c.read(id * BLOCK, BLOCK as u32).unwrap();
            let (confirmed, sent) = v[block as usize];
            let found = (confirmed..=sent).find(|x| got == content(id, *x));
            let found = found.unwrap_or_else(|| {
                panic!("block {id} holds none of the versions {confirmed} to {sent}")
            });
            // What is there now is what later flushes confirm again.
            v[block as usize] = (found, sent);
        }
    }
}

#[test]
fn nothing_flushed_is_lost_by_kill() {
    if !tools::have("qemu-img") {
        return;
    }
    let mut rng = Rng::from_env();
    println!("seed {}", rng.seed());
    let mut served = Served::new("kill", "16M", &[], "");
    let blocks = (SIZE / BLOCK / WRITERS) as usize;
    let all: Vec<_> = (0..WRITERS).map(|_| Arc::new(Mutex::new(vec![(0, 0); blocks]))).collect();
    for _ in 0..soak(8, 100) {
        let seed = rng.next_u64() >> 8;
        let writers: Vec<_> = all
            .iter()
            .enumerate()
            .map(|(n, v)| {
                let (c, v) = (served.client(), v.clone());
                std::thread::spawn(move || writer(c, n as u64, seed, &v))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(rng.between(20, 250)));
        served.daemon.kill();
        // The kernel takes the dead process's ring down after it, and its listener with that: who
        // comes by the old name is let in and then cut off.
        std::fs::remove_file(served.scratch.path("nbd.sock")).unwrap();
        for w in writers {
            w.join().unwrap();
        }
        let check = tools::try_run("qemu-img", &["check", "-f", "qcow2", &served.image()]);
        let code = check.status.code();
        assert!(
            matches!(code, Some(0 | 3)),
            "more than leaks: {code:?}\n{}",
            String::from_utf8_lossy(&check.stdout)
        );
        served = Served::existing(served.scratch, "");
        verify(&served, &all);
    }
}

//! Random requests through four connections on two I/O threads agree with a model of the disk.
#![allow(missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::{Served, soak};
use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::{DiskModel, Rng, Scratch, tools};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
/// In the first half of the disk the clients' pieces alternate, many to a cluster.
const PIECE: u64 = 3000;
const CLIENTS: u64 = 4;
const LARGE: u64 = MIB;

/// A range that belongs to this client alone.
fn range(rng: &mut Rng, client: u64) -> (u64, u64) {
    let half = SIZE / 2;
    if rng.one_in(2) {
        let pieces = half / PIECE / CLIENTS;
        let piece = rng.below(pieces) * CLIENTS + client;
        let from = rng.below(PIECE);
        let len = rng.between(1, PIECE - from);
        (piece * PIECE + from, len)
    } else {
        let quarter = half / CLIENTS;
        let from = rng.below(quarter);
        let most = (quarter - from).min(if rng.one_in(4) { LARGE } else { 70_000 });
        (half + client * quarter + from, rng.between(1, most))
    }
}

/// One client's work; gives the model of what it knows of the disk.
fn work(
    address: &Address,
    client: u64,
    seed: u64,
    mut model: DiskModel,
    time: Duration,
) -> DiskModel {
    let mut c = Client::connect(address, "x").unwrap();
    let mut rng = Rng::new(seed * 4 + client);
    let end = Instant::now() + time;
    while Instant::now() < end {
        let (at, len) = range(&mut rng, client);
        let len32 = len as u32;
        match rng.below(16) {
            0..=5 => {
                let data = rng.bytes(len as usize);
                c.write(at, &data, u16::from(rng.one_in(20))).unwrap();
                model.write(at, &data);
            }
            6 | 7 => {
                // Flags: FUA, NO_HOLE or none.
                c.zero(at, len32, *rng.pick(&[0, 1, 2])).unwrap();
                model.zero(at, len);
            }
            8 => {
                let old = model.read(at, len);
                c.trim(at, len32, 0).unwrap();
                let got = c.read(at, len32).unwrap();
                for (g, o) in got.iter().zip(&old) {
                    assert!(*g == *o || *g == 0, "after a discard: old bytes or zeros");
                }
                model.write(at, &got);
            }
            9 if rng.one_in(8) => c.flush().unwrap(),
            _ => model.expect(at, &c.read(at, len32).unwrap()),
        }
    }
    c.flush().unwrap();
    model
}

fn run(name: &str, create: &[&str], node_options: &str, time: Duration) {
    if tools::have("qemu-img") {
        check(Served::new(name, "64M", create, node_options), &DiskModel::new(SIZE), time);
    }
}

/// Runs the clients on a disk that begins as `first`.
fn check(served: Served, first: &DiskModel, time: Duration) {
    let mut rng = Rng::from_env();
    let seed = rng.next_u64() >> 8;
    println!("seed {}", rng.seed());
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let (address, first) = (served.address(), first.clone());
            std::thread::spawn(move || work(&address, n, seed, first, time))
        })
        .collect();
    let models: Vec<_> = clients.into_iter().map(|c| c.join().unwrap()).collect();
    // The clients' parts of the disk together are the disk.
    let mut whole = first.clone();
    let half = SIZE / 2;
    for piece in 0..half / PIECE {
        let owner = &models[(piece % CLIENTS) as usize];
        whole.write(piece * PIECE, &owner.read(piece * PIECE, PIECE));
    }
    let quarter = half / CLIENTS;
    for (n, m) in models.iter().enumerate() {
        let at = half + n as u64 * quarter;
        whole.write(at, &m.read(at, quarter));
    }
    let image = served.image();
    let mut c = served.client();
    for at in (0..SIZE).step_by(MIB as usize) {
        whole.expect(at, &c.read(at, MIB as u32).unwrap());
    }
    drop(c);
    let scratch = served.end();
    tools::qcow2_is_clean(&image);
    let raw = scratch.arg("model.raw");
    whole.save(&raw);
    tools::same_content("qcow2", &image, "raw", &raw);
}

#[test]
fn four_connections_agree_with_the_model() {
    run("model", &[], "", soak(Duration::from_secs(4), Duration::from_secs(60)));
}

/// On an image with the file system of real files.
#[test]
fn four_connections_over_a_file_system() {
    if !tools::have("qemu-img") || !tools::have("mkfs.ext4") {
        return;
    }
    let scratch = Scratch::new("model-ext4");
    let (raw, image) = (scratch.arg("fs.raw"), scratch.arg("disk.qcow2"));
    let files = "/usr/share/common-licenses";
    let dir = if std::path::Path::new(files).is_dir() { files } else { "." };
    tools::run("mkfs.ext4", &["-q", "-d", dir, &raw, "64M"]);
    tools::qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &raw, &image]);
    let first = DiskModel::of(&std::fs::read(&raw).unwrap());
    let served = Served::existing(scratch, "");
    check(served, &first, soak(Duration::from_secs(3), Duration::from_secs(60)));
}

#[test]
fn small_clusters_and_a_small_cache() {
    let create = ["-o", "cluster_size=512,refcount_bits=1"];
    let options = ",l2-cache-size=65536,refcount-cache-size=65536";
    run("model-small", &create, options, soak(Duration::from_secs(3), Duration::from_secs(60)));
}

#[test]
fn version_2_and_lazy_refcounts() {
    run(
        "model-v2",
        &["-o", "compat=0.10"],
        "",
        soak(Duration::from_secs(2), Duration::from_secs(30)),
    );
    let lazy = ["-o", "lazy_refcounts=on,cluster_size=2M,refcount_bits=64"];
    run("model-lazy", &lazy, "", soak(Duration::from_secs(2), Duration::from_secs(30)));
}

//! Against the reference tools, both ways: images that they made are read and written here in the
//! simulated world, and they read what was written.

use gipfel_base::ByteRange;
use gipfel_io::Buf;
use gipfel_io::sim::World;
use gipfel_node::{Child, WriteFlags, ZeroFlags};
use gipfel_testkit::{DiskModel, Rng, Scratch, tools};
use serde_json::{Value, json};

use super::disk;

/// Size of the disks, in bytes.
const SIZE: u64 = (3 << 20) + 1536;

/// A request at a random place: where, and how long.
fn place(rng: &mut Rng) -> ByteRange {
    let unit = *rng.pick(&[512, 2048, 65536]);
    let at = rng.below(SIZE / unit) * unit;
    ByteRange::new(at, (rng.between(1, 40) * unit).min(SIZE - at).min(500_000))
}

/// The reference writes at random places of an image.
fn written_by_reference(path: &str, model: &mut DiskModel, rng: &mut Rng) {
    for _ in 0..rng.between(1, 8) {
        let r = place(rng);
        let (at, len) = (r.start(), r.len());
        let command = match rng.below(4) {
            0 => {
                model.zero(at, len);
                format!("write -z {at} {len}")
            }
            1 => {
                model.zero(at, len);
                format!("write -z -u {at} {len}")
            }
            _ => {
                let value = rng.between(1, 255) as u8;
                model.write(at, &vec![value; len as usize]);
                format!("write -P {value} {at} {len}")
            }
        };
        tools::qemu_io("qcow2", path, &[&command]);
    }
}

/// This driver does.
async fn written_here(image: &Child, model: &mut DiskModel, rng: &mut Rng) {
    for _ in 0..rng.between(1, 20) {
        let r = place(rng);
        match rng.below(6) {
            0 | 1 => {
                let flags = ZeroFlags { unmap: rng.one_in(2), ..ZeroFlags::default() };
                image.write_zeroes(r, flags).await.unwrap();
                model.zero(r.start(), r.len());
            }
            2 => {
                image.discard(r).await.unwrap();
                model.write(r.start(), &read(image, r).await);
            }
            _ => {
                let data = rng.bytes(r.len() as usize);
                image
                    .write(r.start(), Buf::from_slice(&data), WriteFlags::default())
                    .await
                    .unwrap();
                model.write(r.start(), &data);
            }
        }
    }
}

async fn read(image: &Child, range: ByteRange) -> Vec<u8> {
    let buf = Buf::new(range.len() as usize);
    image.read(range.start(), buf.clone()).await.unwrap();
    buf.to_vec()
}

/// Options by which the reference makes an image, and what this driver is told for the same.
fn shapes(s: &Scratch) -> Vec<(String, Value)> {
    // In the simulation a data file has no name: the reference makes the images that have one.
    let data = format!("data_file={}", s.arg("image.data"));
    let files = ["", ",data_file_raw=on", ",extended_l2=on"];
    let files = files.iter().map(|more| (format!("{data}{more}"), Value::Null));
    let plain = [
        ("cluster_size=4k", json!({ "cluster-size": 4096 })),
        ("extended_l2=on,cluster_size=16k", json!({ "cluster-size": 16384, "extended-l2": true })),
        ("extended_l2=on", json!({ "extended-l2": true })),
        (
            "extended_l2=on,preallocation=metadata",
            json!({ "extended-l2": true, "preallocation": "metadata" }),
        ),
        ("extended_l2=on,cluster_size=2M", json!({ "extended-l2": true, "cluster-size": 2 << 20 })),
    ];
    plain.into_iter().map(|(t, o)| (t.to_owned(), o)).chain(files).collect()
}

#[test]
fn images_go_both_ways() {
    if !tools::have("qemu-img") {
        return;
    }
    let (s, mut rng) = (Scratch::new("qcow2-judged"), Rng::from_env());
    let (path, raw, base) = (s.arg("image"), s.arg("raw"), s.arg("base"));
    let data = s.arg("image.data");
    for (theirs, ours) in shapes(&s) {
        for round in 0..4 {
            let what = format!("{theirs}, round {round}, seed {}", rng.seed());
            let alone = theirs.contains("prealloc") || theirs.contains("raw");
            let (backed, has_data) = (round % 2 == 1 && !alone, ours.is_null());
            let mut model = DiskModel::new(SIZE);
            let world = World::new(rng.next_u64());
            let take = || {
                world.put_file("image", std::fs::read(&path).unwrap());
                if has_data {
                    world.put_file("image.data", std::fs::read(&data).unwrap());
                }
            };
            if backed {
                model.randomize(&mut rng, 100);
                model.save(&base);
                world.put_file("base", model.to_vec());
            }
            let below = backed.then_some("base");
            if round < 2 || has_data {
                let size = SIZE.to_string();
                let args = ["create", "-q", "-f", "qcow2", "-o", &theirs, &path, &size];
                tools::qemu_img(&args);
                if backed {
                    tools::qemu_img(&["rebase", "-u", "-b", &base, "-F", "raw", &path]);
                }
                // Compressed data, where nothing is preallocated.
                let args = ["-f", "qcow2", "-c", "write -c -P 7 0 2M", &path];
                if tools::try_run("qemu-io", &args).status.success() {
                    model.write(0, &vec![7; 2 << 20]);
                }
                written_by_reference(&path, &mut model, &mut rng);
                take();
            } else {
                let mut o = ours.clone();
                o["size"] = json!(SIZE);
                if backed {
                    o["backing-file"] = json!(base);
                    o["backing-fmt"] = json!("raw");
                }
                world.run(disk::create("image", o));
            }
            for _ in 0..3 {
                world.run(async {
                    let image = disk::open("image", below, json!({})).await.unwrap();
                    model.expect(0, &read(&image, ByteRange::new(0, SIZE)).await);
                    written_here(&image, &mut model, &mut rng).await;
                    model.expect(0, &read(&image, ByteRange::new(0, SIZE)).await);
                    disk::close(&image).await.unwrap();
                });
                std::fs::write(&path, world.file("image").unwrap()).unwrap();
                if has_data {
                    std::fs::write(&data, world.file("image.data").unwrap()).unwrap();
                }
                println!("{what}");
                tools::qcow2_is_clean(&path);
                model.save(&raw);
                tools::same_content("qcow2", &path, "raw", &raw);
                if theirs.contains("raw=on") {
                    tools::same_content("raw", &data, "raw", &raw);
                }
                written_by_reference(&path, &mut model, &mut rng);
                if rng.one_in(2) && !has_data {
                    tools::qemu_img(&["snapshot", "-c", "x", &path]);
                }
                take();
            }
        }
    }
}

//! The check against the reference: the same counts, and images that it finds clean.

mod disk;
mod random;

use gipfel_base::{ErrorKind, Result};
use gipfel_node::{CheckArgs, CheckReport, Fix};
use gipfel_testkit::rng::Rng;
use gipfel_testkit::scratch::Scratch;
use gipfel_testkit::tools::{have, qcow2_is_clean, qemu_img, qemu_io, same_content, try_run};

use self::disk::{Disk, Event, run};
use crate::qcow2::entry::{COMPRESSED, COPIED, OFFSET_MASK, ZERO};
use crate::qcow2::header::{CORRUPT, DIRTY};

fn check(disk: &Disk, fix: Fix) -> Result<CheckReport> {
    run(super::check(CheckArgs { file: disk.child(), fix }))
}

/// The reference's counts, in the order corruptions, leaks, total, allocated, fragmented,
/// compressed, end; nothing where it cannot check the image.
fn reference(path: &str) -> Option<[u64; 7]> {
    let out = try_run("qemu-img", &["check", "-f", "qcow2", "--output=json", path]);
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).ok()?;
    if v["check-errors"].as_u64() != Some(0) {
        return None;
    }
    let names = [
        "corruptions",
        "leaks",
        "total-clusters",
        "allocated-clusters",
        "fragmented-clusters",
        "compressed-clusters",
        "image-end-offset",
    ];
    Some(names.map(|n| v[n].as_u64().unwrap_or(0)))
}

fn counts(r: &CheckReport) -> [u64; 7] {
    [
        r.corruptions,
        r.leaks,
        r.total_clusters.unwrap(),
        r.allocated_clusters.unwrap(),
        r.fragmented_clusters.unwrap(),
        r.compressed_clusters.unwrap(),
        r.image_end.unwrap(),
    ]
}

#[track_caller]
fn agrees(path: &str) -> CheckReport {
    let ours = check(&Disk::load(path), Fix::Nothing).unwrap();
    let theirs = reference(path).expect("the reference checks it");
    assert_eq!(counts(&ours), theirs, "{:#?}", ours.findings);
    ours
}

/// Where an image's structures lie.
struct Places {
    cluster: u64,
    l1: u64,
    l2: u64,
    table: u64,
    block: u64,
}

fn places(d: &Disk) -> Places {
    let (l1, table) = (d.get_be(40, 8), d.get_be(48, 8));
    Places {
        cluster: 1 << d.get_be(20, 4),
        l1,
        l2: d.get_be(l1, 8) & OFFSET_MASK,
        table,
        block: d.get_be(table, 8),
    }
}

fn create(s: &Scratch, name: &str, options: &str, size: &str, commands: &[&str]) -> String {
    let path = s.arg(name);
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([path.as_str(), size]);
    qemu_img(&args);
    if !commands.is_empty() {
        qemu_io("qcow2", &path, commands);
    }
    path
}

/// A sample: data, zeros with and without a cluster, compressed data.
fn sample(s: &Scratch, options: &str) -> String {
    let zeros = ["write -z 64k 128k", "write -z 1M 128k"];
    let commands = ["write -P 1 0 256k", "write -P 2 1536k 128k", "write -P 3 320k 64k"];
    let path = create(s, "sample.qcow2", options, "8M", &commands);
    if !options.contains("compat=0.10") {
        qemu_io("qcow2", &path, &zeros);
    }
    if !["refcount_bits", "cluster_size=2M", "preallocation"].iter().any(|o| options.contains(o)) {
        qemu_io("qcow2", &path, &["write -c -P 4 2M 64k", "write -c -P 5 2112k 64k"]);
    }
    path
}

#[test]
fn clean_images_agree() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-clean");
    let mut options: Vec<String> =
        [1, 2, 4, 8, 16, 32, 64].iter().map(|b| format!("refcount_bits={b}")).collect();
    options.extend(["512", "1k", "4k", "64k", "2M"].map(|c| format!("cluster_size={c}")));
    options.extend(
        ["compat=0.10", "compression_type=zstd", "lazy_refcounts=on", "preallocation=metadata"]
            .map(String::from),
    );
    options.extend(["16k", "2M"].map(|c| format!("extended_l2=on,cluster_size={c}")));
    options.push("cluster_size=512,refcount_bits=64".into());
    for o in options {
        let r = agrees(&sample(&s, &o));
        assert_eq!((r.corruptions, r.leaks), (0, 0), "{o}: {:?}", r.findings);
    }
    agrees(&create(&s, "empty.qcow2", "", "0", &[]));
    agrees(&create(&s, "huge.qcow2", "cluster_size=2M", "1P", &["write 1023T 64k"]));
}

#[test]
fn compressed_and_backed_images_agree() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-convert");
    let base = sample(&s, "");
    for kind in ["zlib", "zstd"] {
        let out = s.arg(kind);
        let kind = format!("compression_type={kind}");
        qemu_img(&["convert", "-c", "-O", "qcow2", "-o", &kind, &base, &out]);
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &out, &s.arg("over")]);
        qemu_io("qcow2", &s.arg("over"), &["write 100k 300k", "write -z 1500k 100k"]);
        assert!(agrees(&out).compressed_clusters > Some(0));
        agrees(&s.arg("over"));
    }
}

/// An image with snapshots whose tables are shared and were written apart again.
fn with_snapshots(s: &Scratch, options: &str) -> String {
    let path = sample(s, options);
    qemu_img(&["snapshot", "-c", "one", &path]);
    qemu_io("qcow2", &path, &["write -P 9 0 64k", "write -P 8 7M 64k"]);
    qemu_img(&["snapshot", "-c", "two", &path]);
    qemu_img(&["snapshot", "-c", "three", &path]);
    qemu_io("qcow2", &path, &["write -P 7 128k 64k", "discard 1536k 64k"]);
    path
}

#[test]
fn snapshots_and_bitmaps_agree() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-snapshots");
    for o in ["cluster_size=64k", "cluster_size=512", "compat=0.10", "refcount_bits=4"] {
        let r = agrees(&with_snapshots(&s, o));
        assert_eq!((r.corruptions, r.leaks), (0, 0), "{o}: {:?}", r.findings);
    }
    let path = with_snapshots(&s, "");
    qemu_img(&["bitmap", "--add", &path, "a"]);
    qemu_img(&["bitmap", "--add", "-g", "512", &path, "b"]);
    qemu_io("qcow2", &path, &["write -P 6 256k 1M"]);
    let r = agrees(&path);
    assert_eq!((r.corruptions, r.leaks), (0, 0), "{:?}", r.findings);
    // Without the autoclear bit, the bitmaps' clusters are leaked.
    let d = Disk::load(&path);
    d.put_be(88, 8, 0);
    d.save(&path);
    assert!(agrees(&path).leaks > 3);
}

/// Damages that the reference and this check count alike.
type Damage = fn(&Disk, &Places);
const USUAL: [(&str, Damage); 12] = [
    ("leak", |d, p| d.put_be(p.l2, 8, 0)),
    ("too low, 0", |d, p| d.put_be(p.block + 2 * 6, 2, 0)),
    ("too high", |d, p| d.put_be(p.block + 2 * 6, 2, 2)),
    ("far too high", |d, p| d.put_be(p.block + 2 * 6, 2, 65535)),
    ("no flag in L2", |d, p| d.put_be(p.l2, 8, d.get_be(p.l2, 8) & !COPIED)),
    ("no flag in L1", |d, p| d.put_be(p.l1, 8, d.get_be(p.l1, 8) & !COPIED)),
    ("entry twice", |d, p| d.put_be(p.l2, 8, d.get_be(p.l2 + 8, 8))),
    ("data on L2 table", |d, p| d.put_be(p.l2, 8, p.l2 | COPIED)),
    ("header free", |d, p| d.put_be(p.block, 2, 0)),
    ("block free", |d, p| d.put_be(p.block + p.block / p.cluster * 2, 2, 0)),
    ("no blocks", |d, p| d.put_be(p.table, 8, 0)),
    ("block past the end", |d, p| d.put_be(p.table, 8, 1000 * p.cluster)),
];

#[test]
fn usual_damages_agree_and_are_mended() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-damage");
    let path = create(
        &s,
        "a.qcow2",
        "",
        "8M",
        &["write -P 1 0 256k", "write -P 2 1M 64k", "write -z 64k 64k"],
    );
    let good = Disk::load(&path);
    for (name, damage) in USUAL {
        let d = good.copy();
        damage(&d, &places(&d));
        d.save(&path);
        let found = agrees(&path);
        assert!(found.corruptions + found.leaks > 0, "{name}");
        let before = s.arg("before.qcow2");
        std::fs::copy(&path, &before).unwrap();
        let r = check(&d, Fix::All).unwrap();
        assert_eq!((r.corruptions, r.leaks, r.check_errors), (0, 0, 0), "{name}: {r:#?}");
        assert!(r.corruptions_fixed + r.leaks_fixed > 0, "{name}");
        d.save(&path);
        qcow2_is_clean(&path);
        if name != "data on L2 table" {
            same_content("qcow2", &before, "qcow2", &path);
        }
        agrees(&path);
    }
}

/// Damages of subclusters: whether the reference sees them too, and the bitmap that is left.
const SUBCLUSTERS: [(&str, bool, Damage, u64); 4] = [
    ("both", true, |d, p| d.put_be(p.l2 + 8, 8, 3 << 32 | 6), 1 << 32 | 6),
    ("all", true, |d, p| d.put_be(p.l2 + 8, 8, u64::MAX), u32::MAX as u64),
    ("no place", true, |d, p| d.put_be(p.l2, 8, 0), (u32::MAX as u64) << 32),
    ("flag", false, |d, p| d.put_be(p.l2, 8, d.get_be(p.l2, 8) | 1), u32::MAX as u64),
];

#[test]
fn subclusters_that_contradict_are_mended() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-subclusters");
    let path = create(&s, "a.qcow2", "extended_l2=on", "8M", &["write -P 1 0 256k"]);
    let good = Disk::load(&path);
    for (name, seen, damage, left) in SUBCLUSTERS {
        let d = good.copy();
        damage(&d, &places(&d));
        d.save(&path);
        let found = check(&d, Fix::Nothing).unwrap();
        assert_eq!(found.corruptions, 1, "{name}: {found:?}");
        if seen {
            agrees(&path);
        }
        let r = check(&d, Fix::All).unwrap();
        assert_eq!((r.corruptions, r.leaks, r.check_errors), (0, 0, 0), "{name}: {r:#?}");
        assert_eq!(d.get_be(places(&d).l2 + 8, 8), left, "{name}");
        d.save(&path);
        qcow2_is_clean(&path);
    }
}

#[test]
fn leaks_are_given_back() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-leaks");
    let path = with_snapshots(&s, "cluster_size=4k");
    let d = Disk::load(&path);
    let p = places(&d);
    for i in [20, 30, 31, 100] {
        d.put_be(p.block + 2 * i, 2, d.get_be(p.block + 2 * i, 2) + 1);
    }
    d.put_be(72, 8, DIRTY | CORRUPT);
    d.save(&path);
    // A leak that makes a flag wrong is a corruption at first, and is none afterwards.
    let found = agrees(&path);
    assert_eq!(found.leaks, 4);
    let r = check(&d, Fix::Leaks).unwrap();
    assert_eq!((r.corruptions, r.leaks, r.leaks_fixed), (0, 0, 4), "{:?}", r.findings);
    assert_eq!(d.get_be(72, 8), 0);
    d.save(&path);
    qcow2_is_clean(&path);
}

#[test]
fn leaks_are_kept_where_references_are_lost() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-blind");
    let path = sample(&s, "");
    let d = Disk::load(&path);
    d.put_be(places(&d).l1, 8, 1 << 40 | COPIED);
    let before = d.copy();
    let r = check(&d, Fix::Leaks).unwrap();
    assert!(r.corruptions == 1 && r.leaks > 5 && r.leaks_fixed == 0, "{r:?}");
    assert_eq!(d.get(0, d.len()), before.get(0, d.len()), "nothing is written");
    d.fail_reads_of(places(&before).block);
    let r = check(&d, Fix::All).unwrap();
    assert!(r.check_errors > 0 && r.leaks_fixed == 0, "{r:?}");
}

/// Damages that only this check mends, and what becomes of the first L2 entry.
type Mended = fn(&Disk, &Places) -> u64;
const BAD_ENTRIES: [(&str, Mended); 9] = [
    ("data not aligned", |d, p| {
        let e = d.get_be(p.l2, 8);
        d.put_be(p.l2, 8, e + 512);
        e
    }),
    ("zeros not aligned", |d, p| {
        d.put_be(p.l2, 8, d.get_be(p.l2, 8) + 513);
        ZERO
    }),
    ("past the end", |d, p| {
        d.put_be(p.l2, 8, COPIED | 1 << 50);
        ZERO
    }),
    ("reserved bits", |d, p| {
        let e = d.get_be(p.l2, 8);
        d.put_be(p.l2, 8, e | 1 << 57 | 2);
        e
    }),
    ("on the header's table", |d, p| {
        d.put_be(p.l2, 8, p.table | COPIED);
        ZERO
    }),
    ("compressed at 0", |d, p| {
        d.put_be(p.l2, 8, COMPRESSED);
        ZERO
    }),
    ("compressed past the end", |d, p| {
        d.put_be(p.l2, 8, COMPRESSED | 1 << 50);
        ZERO
    }),
    ("L1 entry with reserved bits", |d, p| {
        d.put_be(p.l1, 8, d.get_be(p.l1, 8) | 1 << 57 | 2);
        d.get_be(p.l2, 8)
    }),
    ("L1 entry not aligned", |d, p| {
        d.put_be(p.l1, 8, d.get_be(p.l1, 8) + 512);
        d.get_be(p.l2, 8)
    }),
];

#[test]
fn bad_entries_are_mended() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-entries");
    let path = sample(&s, "");
    let good = Disk::load(&path);
    for (name, damage) in BAD_ENTRIES {
        let d = good.copy();
        let p = places(&d);
        let want = damage(&d, &p);
        assert_eq!(check(&d, Fix::Nothing).unwrap().corruptions, 1, "{name}");
        let r = check(&d, Fix::All).unwrap();
        assert_eq!((r.corruptions, r.leaks, r.corruptions_fixed), (0, 0, 1), "{name}: {r:#?}");
        assert_eq!(d.get_be(p.l2, 8), want, "{name}");
        d.save(&path);
        qcow2_is_clean(&path);
    }
    let d = good.copy();
    let p = places(&d);
    let at = p.l2 + 8 * 32;
    let e = d.get_be(at, 8);
    assert!(e & COMPRESSED != 0, "the sample has a compressed cluster there");
    for bad in [e | COPIED, e | 200 << 54] {
        d.put_be(at, 8, bad);
        let r = check(&d, Fix::All).unwrap();
        assert_eq!((r.corruptions, r.leaks, r.corruptions_fixed), (0, 0, 1), "{r:#?}");
        d.save(&path);
        qcow2_is_clean(&path);
        same_content("qcow2", &path, "qcow2", &sample(&Scratch::new("check-same"), ""));
    }
}

#[test]
fn damaged_refcount_structures_are_written_anew() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-rebuild");
    for options in ["cluster_size=512", "cluster_size=64k", "refcount_bits=1", "compat=0.10"] {
        let path = sample(&s, options);
        let good = Disk::load(&path);
        let damages: [(&str, Damage); 7] = [
            ("not aligned", |d, p| d.put_be(p.table, 8, p.block + 64)),
            ("past the end", |d, p| d.put_be(p.table, 8, 1 << 50)),
            ("twice", |d, p| d.put_be(p.table + 8, 8, p.block)),
            ("reserved bits", |d, p| d.put_be(p.table, 8, p.block | 1)),
            ("on the L1 table", |d, p| d.put_be(p.table, 8, p.l1)),
            ("table past the end", |d, _| d.put_be(48, 8, 1 << 50)),
            ("table on the L1 table", |d, p| d.put_be(48, 8, p.l1)),
        ];
        for (name, damage) in damages {
            let d = good.copy();
            damage(&d, &places(&d));
            let r = check(&d, Fix::Leaks).unwrap();
            assert!(r.corruptions > 0 && r.corruptions_fixed == 0, "{options}, {name}: {r:?}");
            let r = check(&d, Fix::All).unwrap();
            assert_eq!((r.corruptions, r.leaks), (0, 0), "{options}, {name}: {r:#?}");
            let bad = s.arg("mended.qcow2");
            d.save(&bad);
            agrees(&bad);
            same_content("qcow2", &path, "qcow2", &bad);
            if name == "past the end" {
                qemu_io("qcow2", &bad, &["write -P 77 3M 1M", "read -P 77 3M 1M"]);
                qcow2_is_clean(&bad);
            }
        }
    }
}

#[test]
fn a_dirty_image_is_made_fit_for_use() {
    if !have("qemu-img") {
        return;
    }
    let s = Scratch::new("check-dirty");
    let path = create(&s, "a.qcow2", "lazy_refcounts=on", "8M", &[]);
    // The reference is killed, which leaves refcounts behind.
    try_run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "flush", "-c", "abort", &path],
    );
    let d = Disk::load(&path);
    assert_eq!(d.get_be(72, 8), DIRTY);
    assert!(agrees(&path).corruptions >= 16);
    let header = run(super::rebuild_dirty(&d.child())).unwrap();
    assert_eq!((header.incompatible, d.get_be(72, 8)), (0, 0));
    d.save(&path);
    qcow2_is_clean(&path);
    qemu_io("qcow2", &path, &["read -P 5 0 1M"]);

    // More than refcounts is left for the user to decide.
    d.put_be(places(&d).l2, 8, 1 << 50);
    d.put_be(72, 8, DIRTY);
    let e = run(super::rebuild_dirty(&d.child())).unwrap_err();
    assert!(e.kind() == ErrorKind::Corrupt && e.to_string().contains("check -r all"), "{e}");
    assert_eq!((d.get_be(72, 8), d.get_be(places(&d).l2, 8)), (DIRTY, 1 << 50));
}

/// The state of the disk after any part of the repair's writes is no worse, and can be mended.
#[test]
fn a_crash_during_the_repair_leaves_nothing_worse() {
    if !have("qemu-img") {
        return;
    }
    let (s, mut rng) = (Scratch::new("check-crash"), Rng::from_env());
    let path = with_snapshots(&s, "cluster_size=512");
    let base = s.arg("base.qcow2");
    std::fs::copy(&path, &base).unwrap();
    let good = Disk::load(&path);
    let damages: [Damage; 4] = [
        |d, p| {
            // Of an entry, the refcount is too high and the flag agrees with that.
            let at = d.get_be(p.l1 + 8 * 4, 8) & OFFSET_MASK;
            let entry = d.get_be(at, 8);
            assert!(entry & COPIED != 0, "it was written after the snapshots");
            d.put_be(at, 8, entry & !COPIED);
            let cluster = (entry & OFFSET_MASK) / 512;
            let block = d.get_be(p.table + cluster / 256 * 8, 8);
            d.put_be(block + 2 * (cluster % 256), 2, 9);
            d.put_be(p.l2 + 8, 8, d.get_be(p.l2 + 8, 8) | 2);
        },
        |d, p| {
            // In one block refcounts are too high, in the next one too low.
            d.put_be(p.block + 2 * 50, 2, d.get_be(p.block + 2 * 50, 2) + 9);
            let next = d.get_be(p.table + 8, 8);
            (40..90).for_each(|i| d.put_be(next + 2 * i, 2, 0));
            d.put_be(p.l1, 8, d.get_be(p.l1, 8) ^ COPIED);
        },
        |d, p| d.put_be(p.table, 8, 1 << 50),
        |d, p| (100..250).for_each(|i| d.put_be(p.block + 2 * i, 2, 1)),
    ];
    for damage in damages {
        let start = good.copy();
        damage(&start, &places(&start));
        let d = start.copy();
        let r = check(&d, Fix::All).unwrap();
        assert_eq!((r.corruptions, r.leaks), (0, 0), "{r:#?}");
        let log = d.take_log();
        let writes = log.iter().filter(|e| matches!(e, Event::Write(..))).count();
        assert!(writes > 0 && matches!(log.last(), Some(Event::Flush)), "{r:?}");
        let r = check(&start, Fix::Nothing).unwrap();
        let ((low, wrong), leaks) = (dangers(&r), r.leaks);
        for n in 0..log.len() {
            // Everything up to the last flush, and some of what was written after it.
            let flushed = log[..n].iter().rposition(|e| matches!(e, Event::Flush)).unwrap_or(0);
            let crashed = start.copy();
            for (i, e) in log[..=n].iter().enumerate() {
                match e {
                    Event::Write(at, bytes) if i < flushed || i == n || rng.one_in(2) => {
                        crashed.put(*at, bytes);
                    }
                    _ => {}
                }
            }
            let r = check(&crashed, Fix::Nothing).unwrap();
            let now = dangers(&r);
            assert!(now.0 <= low && now.1 <= wrong, "after {n} events: {now:?} > {low}, {wrong}");
            assert!(now.0 == 0 || r.leaks >= leaks, "after {n} events, some are lowered already");
            let r = check(&crashed, Fix::All).unwrap();
            assert_eq!((r.corruptions, r.leaks), (0, 0), "after {n} events: {r:#?}");
            if n % 16 == 0 {
                crashed.save(&path);
                qcow2_is_clean(&path);
                same_content("qcow2", &base, "qcow2", &path);
            }
        }
    }
}

/// How many refcounts are too low, and how many entries allow what their refcount does not.
fn dangers(r: &CheckReport) -> (usize, usize) {
    assert_eq!(r.more_findings, 0);
    let count = |end: &str| r.findings.iter().filter(|f| f.ends_with(end)).count();
    (count(" uses"), count("is not one, unlike its flag"))
}

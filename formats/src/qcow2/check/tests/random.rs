//! Random images, random damage, absurd images: no panic, no hang, no memory beyond the limits.

use super::*;

/// A random image of the reference's making (which now and then makes one that it then calls
/// corrupt; that one is not taken).
fn image(s: &Scratch, rng: &mut Rng) -> String {
    loop {
        let path = try_image(s, rng);
        if try_run("qemu-img", &["check", "-f", "qcow2", &path]).status.success() {
            return path;
        }
    }
}

fn try_image(s: &Scratch, rng: &mut Rng) -> String {
    let v2 = rng.one_in(4);
    let extended = !v2 && rng.one_in(3);
    let cluster = match extended {
        true => *rng.pick(&["16k", "64k"]),
        false => *rng.pick(&["512", "1k", "4k", "64k"]),
    };
    let bits = if v2 { 16 } else { *rng.pick(&[1, 2, 4, 8, 16, 32, 64]) };
    let mut options = format!("cluster_size={cluster},refcount_bits={bits}");
    options += match (v2, rng.below(3)) {
        (true, _) => ",compat=0.10",
        (_, 0) => ",compression_type=zstd",
        (_, 1) => ",lazy_refcounts=on",
        _ => "",
    };
    if extended {
        options += ",extended_l2=on";
    }
    let path = create(s, "random.qcow2", &options, "4M", &[]);
    for round in 0..2 {
        let commands: Vec<String> = (0..rng.between(1, 8))
            .map(|_| {
                let unit = if extended { *rng.pick(&[1, 64]) } else { 64 };
                let (at, len) = (rng.below(60) * 64 / unit * unit, rng.between(1, 4) * unit);
                match rng.below(5) {
                    0 => format!("write -z {at}k {len}k"),
                    1 => format!("discard {at}k {len}k"),
                    2 if bits > 8 => format!("write -c -P 7 {at}k 64k"),
                    _ => format!("write -P {} {at}k {len}k", rng.below(256)),
                }
            })
            .collect();
        let mut args = vec!["-f", "qcow2"];
        args.extend(commands.iter().flat_map(|c| ["-c", c]));
        args.push(&path);
        // Some commands fail: nothing can be compressed where data lie already.
        try_run("qemu-io", &args);
        if bits > 1 && round == 0 && rng.one_in(2) {
            try_run("qemu-img", &["snapshot", "-c", "x", &path]);
        }
    }
    path
}

#[test]
fn random_images_agree() {
    if !have("qemu-img") {
        return;
    }
    let (s, mut rng) = (Scratch::new("check-random"), Rng::from_env());
    for _ in 0..12 {
        let path = image(&s, &mut rng);
        let r = agrees(&path);
        assert_eq!((r.corruptions, r.leaks), (0, 0), "{:?}", r.findings);
    }
}

/// Changes a few bytes where metadata lie.
fn hurt(d: &Disk, p: &Places, rng: &mut Rng) {
    let (at, span) = *rng.pick(&[
        (0, 112),
        (p.l1, 64),
        (p.l2, p.cluster),
        (p.table, 64),
        (p.block, p.cluster),
        (d.get_be(64, 8), 128),
    ]);
    let at = at + rng.below(span);
    if at + 8 > d.len() {
        return;
    }
    match rng.below(4) {
        0 => d.put(at, &[(d.get_be(at, 1) as u8) ^ (1 << rng.below(8))]),
        1 => d.put(at, &rng.bytes(1)),
        2 => d.put(at & !7, &rng.bytes(8)),
        _ => {
            let flag = if rng.one_in(2) { COPIED } else { 0 };
            d.put_be(at & !7, 8, flag | (rng.below(d.len() / 512 + 8) * 512));
        }
    }
}

#[test]
fn random_damage_is_mended_or_named() {
    if !have("qemu-img") {
        return;
    }
    let (s, mut rng) = (Scratch::new("check-fuzz"), Rng::from_env());
    let (mut mended, mut judged) = (0, 0);
    for _ in 0..4 {
        let good = Disk::load(image(&s, &mut rng));
        let p = places(&good);
        for _ in 0..400 {
            let d = good.copy();
            for _ in 0..rng.between(1, 3) {
                hurt(&d, &p, &mut rng);
            }
            let Ok(found) = check(&d, Fix::Nothing) else { continue };
            assert!(d.take_log().is_empty(), "a check without repair writes nothing");
            let _ = check(&d.copy(), Fix::Leaks);
            let Ok(r) = check(&d, Fix::All) else { continue };
            let again = check(&d, Fix::Nothing).unwrap();
            assert_eq!((again.corruptions, again.leaks), (r.corruptions, r.leaks), "{r:#?}");
            if r.corruptions + r.leaks + r.check_errors > 0 {
                assert!(!r.findings.is_empty());
                continue;
            }
            mended += 1;
            // The reference judges some of them: it takes longer than everything else.
            if found.corruptions + found.leaks > 0 && rng.one_in(10) {
                judged += 1;
                let path = s.arg("judged.qcow2");
                d.save(&path);
                let out = try_run("qemu-img", &["check", "-f", "qcow2", &path]);
                let story = String::from_utf8_lossy(&out.stderr);
                // The end of the header extensions has a length that nobody else looks at.
                assert!(out.status.success() || story.contains("extension too large"), "{story}");
            }
        }
    }
    println!("{mended} were clean in the end, the reference looked at {judged} of them");
    assert!(mended > 400 && judged > 20);
}

/// A header for an image of `size` bytes on a sparse disk.
fn header(d: &Disk, bits: u64, order: u64, size: u64, l1: (u64, u64), table: (u64, u64)) {
    d.put(0, b"QFI\xfb");
    for (at, len, value) in [
        (4, 4, 3),
        (20, 4, bits),
        (24, 8, size),
        (36, 4, l1.1),
        (40, 8, l1.0),
        (48, 8, table.0),
        (56, 4, table.1),
        (96, 4, order),
        (100, 4, 104),
    ] {
        d.put_be(at, len, value);
    }
}

#[test]
fn absurd_images_end_soon() {
    // 1 EiB of disk in a file of 64 PiB, with tables as large as they may be, all holes.
    let d = Disk::sparse(1 << 56);
    header(&d, 21, 4, 1 << 60, (1 << 30, 1 << 22), (1 << 40, 4));
    let r = check(&d, Fix::Nothing).unwrap();
    assert_eq!(r.total_clusters, Some(1 << 39));
    assert!(r.corruptions > 0);
    let _ = check(&d, Fix::All);

    // Each L1 entry leads to the same L2 table, full of entries that lead far apart.
    let d = Disk::sparse(1 << 50);
    header(&d, 12, 4, 1 << 40, (1 << 30, 1 << 20), (1 << 32, 1));
    for i in 0..1u64 << 20 {
        d.put_be((1 << 30) + i * 8, 8, 1 << 34);
    }
    for i in 0..512 {
        d.put_be((1 << 34) + i * 8, 8, (i + 1) << 40);
    }
    let r = check(&d, Fix::Nothing).unwrap();
    assert_eq!(r.allocated_clusters, Some(512));
    let r = check(&d, Fix::All);
    assert!(r.is_err() || r.unwrap().corruptions > 0, "refcounts of 2^20 do not fit");

    // So many clusters far apart that their counts pass the limit.
    let d = Disk::sparse(1 << 54);
    header(&d, 21, 4, 1 << 40, (1 << 30, 1 << 10), (1 << 32, 1));
    for t in 0..3u64 {
        let at = (1 << 34) + (t << 21);
        d.put_be((1 << 30) + t * 8, 8, at);
        let table: Vec<u8> =
            (0..1u64 << 18).flat_map(|i| (((t << 18 | i) + 8) << 31).to_be_bytes()).collect();
        d.put(at, &table);
    }
    assert_eq!(check(&d, Fix::Nothing).unwrap_err().kind(), ErrorKind::Limit);
}

#[test]
fn what_is_no_image_is_refused() {
    for bytes in [&b""[..], b"QFI\xfb", &[0; 1000]] {
        let d = Disk::default();
        d.put(0, bytes);
        assert!(check(&d, Fix::All).unwrap_err().to_string().contains("not a qcow2"));
    }
    let d = Disk::sparse(1 << 20);
    header(&d, 16, 4, 1 << 20, (3 << 16, 1), (1 << 16, 1));
    d.put_be(72, 8, 1 << 5);
    assert_eq!(check(&d, Fix::All).unwrap_err().kind(), ErrorKind::Unsupported);
}

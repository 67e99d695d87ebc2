//! `gipfel img` on qcow2 images, compared with the tool that it stands for.

mod img_tools;

use gipfel_testkit::{Rng, Scratch, tools};
use img_tools::{alike, code, gipfel, stderr, stdout};
use serde_json::Value;

/// Size of the disks, in bytes.
const DISK: u64 = 6 << 20;

fn have() -> bool {
    tools::have("qemu-img") && tools::have("qemu-io")
}

/// Writes, zeroes and discards at random places.
fn scribble(rng: &mut Rng, format: &str, image: &str) {
    let commands: Vec<_> = (0..rng.between(2, 12))
        .map(|_| {
            let unit = *rng.pick(&[1024, 4096]);
            let at = rng.below(DISK / 4096) * 4096;
            let len = (rng.between(1, 60) * unit).min(DISK - at);
            match rng.below(5) {
                0 => format!("write -z {at} {len}"),
                1 => format!("write -z -u {at} {len}"),
                _ => format!("write -P {} {at} {len}", rng.between(1, 255)),
            }
        })
        .collect();
    tools::qemu_io(format, image, &commands.iter().map(String::as_str).collect::<Vec<_>>());
}

/// A qcow2 image made by the reference, over a chain of images that are so too.
fn chain(rng: &mut Rng, s: &Scratch, name: &str) -> String {
    let mut below: Option<(String, &str)> = None;
    for i in 0..rng.between(1, 3) {
        let file = format!("{name}{i}");
        let path = s.arg(&file);
        let raw = below.is_none() && rng.one_in(3);
        let format = if raw { "raw" } else { "qcow2" };
        let cluster = *rng.pick(&["4k", "64k", "256k"]);
        let compat = *rng.pick(&["compat=v2", "compat=v3"]);
        let extended = compat == "compat=v3" && cluster != "4k" && rng.one_in(2);
        let more = if extended { ",extended_l2=on" } else { "" };
        let options = format!("cluster_size={cluster},{compat}{more}");
        let size = DISK.to_string();
        let mut args = vec!["create", "-q", "-f", format];
        if !raw {
            args.extend(["-o", &options]);
        }
        if let Some((name, format)) = &below {
            args.extend(["-b", name, "-F", format]);
        }
        args.extend([path.as_str(), &size]);
        tools::qemu_img(&args);
        if !raw && rng.one_in(4) {
            tools::qemu_io("qcow2", &path, &["write -c -P 9 1M 1M"]);
        }
        scribble(rng, format, &path);
        below = Some((file, format));
    }
    let (file, format) = below.unwrap();
    if format == "raw" { chain(rng, s, name) } else { s.arg(&file) }
}

/// The extents of a map: start, length, and what is known of each that both tools tell. Left out
/// are where clusters lie that hold zeros by a flag, and which data are holes of the file.
fn extents(json: &str) -> Vec<(u64, u64, Value)> {
    let list: Vec<Value> = serde_json::from_str(json).unwrap();
    let mut joined: Vec<(u64, u64, Value)> = Vec::new();
    for mut e in list {
        let number = |k: &str| e[k].as_u64().unwrap();
        let (start, len) = (number("start"), number("length"));
        let m = e.as_object_mut().unwrap();
        if m["data"] == true {
            m.remove("zero");
        } else {
            m.remove("offset");
        }
        for key in ["start", "length"] {
            m.remove(key);
        }
        // As the distance between disk and file, which stays the same where they go on together.
        if let Some(o) = m.get("offset").and_then(Value::as_u64) {
            m.insert("offset".into(), o.wrapping_sub(start).into());
        }
        match joined.last_mut() {
            Some(last) if last.2 == e => last.1 += len,
            _ => joined.push((start, len, e)),
        }
    }
    joined
}

#[test]
fn info_map_and_check_agree_with_the_reference() {
    if !have() {
        return;
    }
    let mut rng = Rng::from_env();
    let s = Scratch::new("img-qcow2-info");
    for i in 0..6 {
        let image = chain(&mut rng, &s, &format!("disk{i}-"));
        for args in [
            &["info"][..],
            &["info", "--output=json"],
            &["info", "--backing-chain"],
            &["info", "--output=json", "--backing-chain", "-U"],
            &["info", "--output=json", "-f", "raw"],
            &["check", "--output=json"],
            &["check", "-q"],
        ] {
            alike(&[args, &[&image]].concat());
        }
        for part in [&[][..], &["-s", "70000", "-l", "3M"]] {
            let args = [&["map", "--output=json"], part, &[&image]].concat();
            let (ours, theirs) = (gipfel(&args), tools::qemu_img(&args));
            assert_eq!(extents(&stdout(&ours)), extents(&theirs), "{args:?}: {}", stderr(&ours));
            let args = [&["map"], part, &[&image]].concat();
            let (table, reference) = (gipfel(&args), tools::try_run("qemu-img", &args));
            assert_eq!(code(&table), code(&reference), "{args:?}: {}", stderr(&table));
            if stdout(&ours) == theirs && code(&table) == 0 {
                assert_eq!(stdout(&table), stdout(&reference));
            }
        }
        let options = format!("driver=qcow2,file.filename={image}");
        assert_eq!(code(&gipfel(&["map", "--output=json", "--image-opts", &options])), 0);
        alike(&["info", "--output=json", "--image-opts", &format!("file.filename={image}")]);
    }
}

/// What the reference says of an image, without what depends on where its clusters lie.
fn facts(image: &str) -> Value {
    let mut v: Value =
        serde_json::from_str(&tools::qemu_img(&["info", "--output=json", image])).unwrap();
    let m = v.as_object_mut().unwrap();
    m.remove("children");
    m.remove("actual-size");
    v
}

#[test]
fn new_images_are_those_of_the_reference() {
    if !have() {
        return;
    }
    let s = Scratch::new("img-qcow2-new");
    let base = s.arg("base");
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &base, "3M"]);
    let (image, data) = (s.arg("image"), s.arg("data"));
    for args in [
        &["IMAGE", "64M"][..],
        &["-o", "size=1000", "IMAGE"],
        &["-o", "cluster_size=4k,compat=0.10", "IMAGE", "1G"],
        &["-o", "lazy_refcounts=on", "-o", "refcount_bits=64", "IMAGE", "1G"],
        &["-o", "lazy_refcounts,compression_type=zstd", "IMAGE", "0"],
        &["-o", "preallocation=metadata,compat=1.1", "IMAGE", "5M"],
        &["-o", "preallocation=falloc,extended_l2=off", "IMAGE", "5M"],
        &["-o", "preallocation=full,nocow=on", "IMAGE", "1M"],
        &["-o", "extended_l2=on", "IMAGE", "1G"],
        &["-o", "extended_l2=on,cluster_size=2M,preallocation=metadata", "IMAGE", "5M"],
        &["-o", "extended_l2=on,preallocation=falloc", "-b", "base", "-F", "qcow2", "IMAGE"],
        &["-o", "extended_l2=on,cluster_size=8k", "IMAGE", "1G"],
        &["-o", "extended_l2=on,compat=0.10", "IMAGE", "1G"],
        &["-o", "data_file=DATA", "IMAGE", "5M"],
        &["-o", "data_file=DATA,extended_l2=on,preallocation=full", "IMAGE", "1M"],
        &["-o", "data_file=DATA,data_file_raw=on", "IMAGE", "5M"],
        &["-o", "data_file=DATA", "-b", "base", "-F", "qcow2", "IMAGE"],
        &["-o", "data_file=DATA,data_file_raw=on", "-b", "base", "-F", "qcow2", "IMAGE"],
        &["-o", "data_file_raw=on", "IMAGE", "1M"],
        &["-o", "data_file=DATA,compat=0.10", "IMAGE", "1M"],
        &["-b", "base", "-F", "qcow2", "IMAGE"],
        &["-b", "base", "-F", "qcow2", "IMAGE", "10M"],
        &["-o", "backing_file=base,backing_fmt=qcow2", "IMAGE"],
        &["-o", "backing_file=nothing,backing_fmt=raw", "-b", "base", "-F", "qcow2", "IMAGE"],
        &["-u", "-b", "nothing", "-F", "raw", "IMAGE", "1M"],
        &["IMAGE"],
        &["-u", "-b", "nothing", "-F", "raw", "IMAGE"],
        &["-b", "nothing", "-F", "raw", "IMAGE"],
        &["-b", "base", "IMAGE"],
        &["-b", "base", "-F", "bogus", "IMAGE"],
        &["-b", "image", "-F", "qcow2", "IMAGE"],
        &["-F", "qcow2", "IMAGE", "1M"],
        &["-b", "", "IMAGE", "1M"],
        &["-o", "cluster_size=1000", "IMAGE", "1M"],
        &["-o", "compat=v4", "IMAGE", "1M"],
        &["-o", "clustersize=64k", "IMAGE", "1M"],
    ] {
        let args: Vec<_> = ["create", "-f", "qcow2"]
            .iter()
            .chain(args)
            .map(|a| if *a == "IMAGE" { image.clone() } else { a.replace("DATA", &data) })
            .collect();
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let made = |run: &dyn Fn(&[&str]) -> std::process::Output| {
            let _ = std::fs::remove_file(&image);
            let out = run(&args);
            let story = format!("{args:?}: {}", stderr(&out));
            if code(&out) == 0 {
                if !args.contains(&"nothing") {
                    tools::qcow2_is_clean(&image);
                }
                (0, stdout(&out), facts(&image), story)
            } else {
                assert!(!std::path::Path::new(&image).exists(), "{story}");
                (code(&out), String::new(), Value::Null, story)
            }
        };
        let ours = made(&gipfel);
        let theirs = made(&|a| tools::try_run("qemu-img", a));
        assert_eq!((ours.0, &ours.1, &ours.2), (theirs.0, &theirs.1, &theirs.2), "{}", ours.3);
    }
}

#[test]
fn data_lie_in_a_file_of_their_own() {
    if !have() {
        return;
    }
    let mut rng = Rng::from_env();
    let s = Scratch::new("img-qcow2-data");
    let (source, image, data) = (s.arg("source"), s.arg("image"), s.arg("data"));
    tools::qemu_img(&["create", "-q", "-f", "raw", &source, &DISK.to_string()]);
    scribble(&mut rng, "raw", &source);
    for raw in ["off", "on"] {
        let options = format!("data_file={data},data_file_raw={raw}");
        let out = gipfel(&["convert", "-O", "qcow2", "-o", &options, &source, &image]);
        assert_eq!(code(&out), 0, "{}", stderr(&out));
        tools::qcow2_is_clean(&image);
        tools::same_content("raw", &source, "qcow2", &image);
        if raw == "on" {
            tools::same_content("raw", &source, "raw", &data);
        }
        scribble(&mut rng, "qcow2", &image);
        for args in [&["info"][..], &["info", "--output=json"], &["check", "--output=json"]] {
            alike(&[args, &[&image]].concat());
        }
        let args = ["map", "--output=json", &image];
        assert_eq!(extents(&stdout(&gipfel(&args))), extents(&tools::qemu_img(&args)));
        let back = s.arg("back");
        let out = gipfel(&["convert", "-O", "raw", &image, &back]);
        assert_eq!(code(&out), 0, "{}", stderr(&out));
        tools::same_content("qcow2", &image, "raw", &back);
        // Looking at an image opens nothing that it names.
        std::fs::remove_file(&data).unwrap();
        assert_eq!(code(&gipfel(&["info", &image])), 0);
        let out = gipfel(&["map", &image]);
        assert!(code(&out) == 1 && stderr(&out).contains("data"), "{}", stderr(&out));
    }
}

#[test]
fn copies_show_the_same_bytes() {
    if !have() {
        return;
    }
    let mut rng = Rng::from_env();
    let s = Scratch::new("img-qcow2-copy");
    let target = s.arg("target");
    for round in 0..24 {
        let source = chain(&mut rng, &s, &format!("source{}-", round % 3));
        let format = *rng.pick(&["raw", "qcow2", "qcow2"]);
        let mut args = vec!["convert", "-O", format];
        let workers = rng.between(1, 16).to_string();
        if rng.one_in(2) {
            args.extend(["-m", &workers]);
        }
        if rng.one_in(3) {
            args.push("-W");
        }
        if rng.one_in(3) {
            args.extend(["-S", *rng.pick(&["0", "512", "64k", "1M"])]);
        }
        if rng.one_in(3) {
            // Into what is there, full of other data.
            args.push("-n");
            tools::qemu_img(&["create", "-q", "-f", format, &target, &DISK.to_string()]);
            tools::qemu_io(format, &target, &[&format!("write -P 77 0 {DISK}")]);
        } else if format == "qcow2" && rng.one_in(2) {
            let options = ["cluster_size=4k", "compat=v2", "lazy_refcounts=on", "extended_l2=on"];
            args.extend(["-o", *rng.pick(&options)]);
        }
        args.extend([source.as_str(), &target]);
        let out = gipfel(&args);
        assert_eq!(code(&out), 0, "round {round}: {args:?}: {}", stderr(&out));
        if format == "qcow2" {
            tools::qcow2_is_clean(&target);
        }
        tools::same_content("qcow2", &source, format, &target);
    }
}

#[test]
fn a_copy_can_keep_its_backing_image() {
    if !have() {
        return;
    }
    let mut rng = Rng::from_env();
    let s = Scratch::new("img-qcow2-base");
    let (base, top, copy) = (s.arg("base"), s.arg("top"), s.arg("copy"));
    for _ in 0..8 {
        tools::qemu_img(&["create", "-q", "-f", "qcow2", &base, &DISK.to_string()]);
        scribble(&mut rng, "qcow2", &base);
        let size = (DISK + rng.below(2) * 65536).to_string();
        tools::qemu_img(&["create", "-qf", "qcow2", "-b", &base, "-F", "qcow2", &top, &size]);
        scribble(&mut rng, "qcow2", &top);
        let out = gipfel(&["convert", "-O", "qcow2", "-B", "base", "-F", "qcow2", &top, &copy]);
        assert_eq!(code(&out), 0, "{}", stderr(&out));
        tools::qcow2_is_clean(&copy);
        tools::same_content("qcow2", &top, "qcow2", &copy);
        let mapped = |image: &str| {
            let text = tools::qemu_img(&["map", "--output=json", image]);
            let v: Vec<Value> = serde_json::from_str(&text).unwrap();
            let own = v.iter().filter(|e| e["depth"] == 0 && e["data"] == true);
            own.map(|e| e["length"].as_u64().unwrap()).sum::<u64>()
        };
        assert!(mapped(&copy) <= mapped(&top));
        let out = gipfel(&["convert", "-O", "qcow2", "-B", "top", "-F", "qcow2", &copy, &top]);
        assert!(code(&out) == 1 && stderr(&out).contains("itself"), "{}", stderr(&out));
    }
    let two = ["convert", "-O", "qcow2", "-B", "base", "-F", "qcow2", &top, &base, &copy];
    assert!(stderr(&gipfel(&two)).contains("one source"));
}

/// The image with refcounts of the clusters behind its end raised (leaks), and that of a data
/// cluster taken away if `corrupt`.
fn damage(image: &str, corrupt: bool) {
    let mut bytes = std::fs::read(image).unwrap();
    let word =
        |b: &[u8], at: u64| u64::from_be_bytes(b[at as usize..at as usize + 8].try_into().unwrap());
    let table = word(&bytes, 48);
    let block = word(&bytes, table) as usize;
    let end = bytes.len() / 65536;
    bytes.resize((end + 2) * 65536, 0);
    for n in [end, end + 1] {
        bytes[block + 2 * n + 1] = 1;
    }
    if corrupt {
        bytes[block + 2 * 5 + 1] = 0;
    }
    std::fs::write(image, bytes).unwrap();
}

#[test]
fn damage_is_told_by_the_exit_code_and_mended() {
    if !have() {
        return;
    }
    let s = Scratch::new("img-qcow2-check");
    let image = s.arg("image");
    for (corrupt, found) in [(false, 3), (true, 2)] {
        let fresh = || {
            let _ = std::fs::remove_file(&image);
            tools::qemu_img(&["create", "-q", "-f", "qcow2", &image, "8M"]);
            tools::qemu_io("qcow2", &image, &["write -P 1 0 1M"]);
            damage(&image, corrupt);
        };
        fresh();
        alike(&["check", "--output=json", &image]);
        let out = gipfel(&["check", &image]);
        assert_eq!(code(&out), found, "{}", stderr(&out));
        assert!(stdout(&out).contains("2 leaked clusters"), "{}", stdout(&out));
        assert!(!stderr(&out).is_empty());
        assert_eq!(stdout(&gipfel(&["check", "-q", &image])), "");
        if !corrupt {
            assert_eq!(code(&gipfel(&["check", "-r", "leaks", &image])), 0);
            tools::qcow2_is_clean(&image);
            fresh();
        }
        let out = gipfel(&["check", "-r", "all", "--output=json", &image]);
        assert_eq!(code(&out), 0, "{}", stderr(&out));
        let told: Value = serde_json::from_str(&stdout(&out)).unwrap();
        assert!(told["leaks-fixed"].as_u64().unwrap() >= 2, "{told}");
        assert_eq!(told["check-errors"], 0);
        tools::qcow2_is_clean(&image);
        tools::qemu_io("qcow2", &image, &["read -P 1 0 1M"]);
    }
}

#[test]
fn a_chain_that_bites_its_tail_is_told() {
    if !have() {
        return;
    }
    let s = Scratch::new("img-qcow2-loop");
    let (a, b) = (s.arg("a"), s.arg("b"));
    for (image, below) in [(&a, "b"), (&b, "a")] {
        let made = ["create", "-qu", "-f", "qcow2", "-b", below, "-F", "qcow2", image, "1M"];
        assert_eq!(code(&gipfel(&made)), 0);
    }
    assert_eq!(code(&gipfel(&["info", &a])), 0);
    for args in [&["info", "--backing-chain", &a][..], &["map", &a], &["convert", &a, &s.arg("c")]]
    {
        let out = gipfel(args);
        assert!(code(&out) == 1 && stderr(&out).contains("own backing chain"), "{}", stderr(&out));
    }
}

#[test]
fn a_guessed_raw_target_gets_no_header() {
    if !have() {
        return;
    }
    let s = Scratch::new("img-qcow2-guess");
    let (image, target) = (s.arg("image"), s.file("target", &[0; 1 << 20]));
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &image, "1M"]);
    let options = format!("file.filename={target}");
    let args = ["convert", "-n", "-f", "raw", "--target-image-opts", &image, &options];
    let out = gipfel(&args);
    assert!(code(&out) == 1 && stderr(&out).contains("format qcow2"), "{}", stderr(&out));
    assert_eq!(std::fs::read(&target).unwrap(), [0; 1 << 20]);
}

//! `gipfel img` on raw images, compared with the tool that it stands for.

mod img_tools;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use gipfel_testkit::{Rng, Scratch, tools};
use img_tools::{GIPFEL, alike, code, gipfel, stderr, stdout};

/// A file with data and holes; its length is not always a multiple of anything.
fn sparse_file(rng: &mut Rng, s: &Scratch, name: &str) -> String {
    let path = s.file(name, b"");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let unit = *rng.pick(&[512u64, 4096, 4096, 65536]);
    let mut at = 0;
    for _ in 0..rng.between(1, 24) {
        let len = rng.between(1, 40) * unit;
        match rng.below(4) {
            0 => {}
            1 => write_at(&file, at, &vec![0; len as usize]),
            _ => write_at(&file, at, &rng.bytes(len as usize)),
        }
        at += len;
    }
    let odd = if rng.one_in(3) { rng.below(5000) } else { 0 };
    file.set_len(at + odd).unwrap();
    path
}

fn write_at(file: &std::fs::File, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    file.write_all_at(bytes, at).unwrap();
}

/// Whether two files take the same space, in sectors. The reference gives every new file its
/// first block.
fn as_sparse(ours: u64, theirs: u64) -> bool {
    ours == theirs || ours + 8 == theirs
}

#[test]
fn info_map_and_check_agree_with_the_reference() {
    if !tools::have("qemu-img") {
        return;
    }
    let mut rng = Rng::from_env();
    let s = Scratch::new("img-info");
    let mut files = vec![
        s.file("empty", b""),
        s.file("small", b"some bytes"),
        s.file("dense", &rng.bytes(300_000)),
    ];
    files.extend((0..6).map(|i| sparse_file(&mut rng, &s, &format!("sparse{i}"))));
    for f in &files {
        for format in [&[][..], &["-f", "raw"], &["-f", "file"]] {
            for args in [
                &["info"][..],
                &["info", "--output=json"],
                &["info", "--output", "json", "--backing-chain", "-U"],
                &["map"],
                &["map", "--output=json"],
                &["map", "--output=json", "-s", "700", "-l", "70000"],
                &["map", "--output=json", "--start-offset=1M", "--max-length", "1.5k"],
                &["check"],
                &["check", "--output=json"],
            ] {
                alike(&[args, format, &[f]].concat());
            }
        }
        for options in ["driver=raw,file.filename", "file.filename", "driver=file,filename"] {
            let options = format!("{options}={f}");
            alike(&["info", "--image-opts", "--output=json", &options]);
            alike(&["map", "--image-opts", &options]);
        }
        let json = format!(r#"json:{{"driver":"raw","file.filename":"{f}"}}"#);
        alike(&["info", &json]);
        alike(&["map", "--output=json", &format!("file:{f}")]);
    }
    let window = format!("driver=raw,offset=4096,size=8192,file.filename={}", files[2]);
    alike(&["map", "--image-opts", "--output=json", &window]);
    // Texts for numbers, as in names that tools write into images.
    let window = format!(
        r#"json:{{"driver":"raw","size":"8192","file":{{"driver":"file","filename":"{}"}}}}"#,
        files[2]
    );
    alike(&["map", "--output=json", &window]);
    assert_eq!(code(&gipfel(&["check", &files[0]])), 63);
}

#[test]
fn new_images_are_those_of_the_reference() {
    if !tools::have("qemu-img") {
        return;
    }
    let s = Scratch::new("img-create");
    let path = s.arg("disk");
    for args in [
        &["DISK", "3M"][..],
        &["-f", "raw", "DISK", "1000"],
        &["DISK", "1.5k"],
        &["DISK", "0"],
        &["-q", "DISK", "64k"],
        &["-o", "size=2M", "DISK"],
        &["-o", "size=1M,size=2M", "DISK"],
        &["-o", "preallocation=full", "DISK", "1M"],
        &["-o", "preallocation=falloc", "-o", "size=1M", "DISK"],
        &["-o", "preallocation=off", "DISK", "1T"],
        &["-f", "file", "DISK", "1M"],
        &["DISK", "--", "4K"],
        &["DISK"],
        &["DISK", "abc"],
        &["DISK", "9E"],
        &["DISK", "16E"],
        &["DISK", "--", "-1"],
        &["-o", "size=2M", "DISK", "3M"],
        &["-o", "bogus=1", "DISK", "1M"],
        &["-o", "preallocation=metadata", "DISK", "1M"],
        &["-f", "bogus", "DISK", "1M"],
        &["-F", "raw", "DISK", "1M"],
        &["-b", "DISK", "-F", "raw", "DISK", "1M"],
        &["DISK", "1M", "2M"],
        &["/nowhere/at/all", "1M"],
        &[],
    ] {
        for old in [None, Some(vec![7u8; 5 << 20])] {
            let args: Vec<_> = ["create"]
                .iter()
                .chain(args)
                .map(|a| if *a == "DISK" { path.as_str() } else { a })
                .collect();
            let made = |run: &dyn Fn(&[&str]) -> std::process::Output| {
                let _ = std::fs::remove_file(&path);
                if let Some(o) = &old {
                    std::fs::write(&path, o).unwrap();
                }
                let out = run(&args);
                let file = std::fs::metadata(&path).map(|m| (m.len(), m.blocks())).ok();
                (code(&out), stdout(&out), file)
            };
            let ours = made(&gipfel);
            let theirs = made(&|a| tools::try_run("qemu-img", a));
            assert_eq!(ours.0, theirs.0, "{args:?}");
            if ours.0 == 0 {
                assert_eq!(ours.1, theirs.1, "{args:?}");
                let (ours, theirs) = (ours.2.unwrap(), theirs.2.unwrap());
                assert_eq!(ours.0, theirs.0, "{args:?}");
                assert!(as_sparse(ours.1, theirs.1), "{args:?}: {ours:?} {theirs:?}");
            } else if old.is_some() {
                // A failure leaves what was there.
                assert_eq!(ours.2.unwrap().0, 5 << 20, "{args:?}");
            } else {
                assert_eq!(ours.2, None, "{args:?}");
            }
        }
    }
}

#[test]
fn mistakes_are_told() {
    let s = Scratch::new("img-mistakes");
    let disk = s.file("disk", &[1; 4096]);
    let new = s.arg("new");
    for (args, told) in [
        (&["info", "/nowhere"][..], "No such file"),
        (&["info", "-f", "bogus", &disk], "no driver 'bogus'"),
        (&["info", "-f", "raw", "--image-opts", "driver=raw"], "--image-opts"),
        (&["info", "--image-opts", "cache.direct=on"], "neither 'driver' nor 'file'"),
        (&["info", "--image-opts", "driver=raw,file.filename=x,ofset=1"], "did you mean 'offset'"),
        (&["info", "--output=xml", &disk], "'xml'"),
        (&["info", "--outputt=json", &disk], "--output"),
        (&["info", "json:{"], "JSON"),
        (&["info"], "FILENAME"),
        (&["map", "-s", "x", &disk], "--start-offset"),
        (&["check", "-r", "some", &disk], "'leaks' or 'all'"),
        (&["check", "-r", "all", "-U", &disk], "--force-share"),
        (&["check", "-T", "bogus", &disk], "unsafe"),
        (&["create", "-o", "prealocation=off", &new, "1M"], "did you mean 'preallocation'"),
        (&["create", "--object", "secret,id=s", &new, "1M"], "'data' or 'file'"),
        (&["create", "-b", &disk, "-F", "raw", &new], "stand on no other image"),
        (&["create", "nbd:host:1", "1M"], "protocol 'nbd'"),
        (&["convert", &disk], "name of the new one"),
        (&["convert", "-O", "bogus", &disk, &new], "no driver 'bogus'"),
        (&["convert", "-c", &disk, &new], "compressed"),
        (&["convert", "-l", "snap", &disk, &new], "snapshot"),
        (&["convert", "--bitmaps", &disk, &new], "bitmaps"),
        (&["convert", "--salvage", "-C", &disk, &new], "-C and --salvage"),
        (&["convert", "-S", "511", &disk, &new], "multiple of 512"),
        (&["convert", "-m", "17", &disk, &new], "1 to 16"),
        (&["convert", "-t", "bogus", &disk, &new], "cache mode"),
        (&["convert", "-n", &disk, &new], "No such file"),
        (&["convert", "-n", "-o", "size=1", &disk, &new], "-n"),
        (&["convert", "--target-is-zero", &disk, &new], "-n"),
        (&["convert", "--target-image-opts", &disk, "driver=raw"], "-n"),
        (&["convert", "-C", "-S", "4k", &disk, &new], "-S"),
        (&["convert", "-B", &disk, "-F", "raw", &disk, &new], "stand on no other image"),
        (&["convert", &disk, &disk], "read from"),
        (&["convert", "-U", &disk, &format!("file:{disk}")], "read from"),
        (&["resize", &disk, "1k"], "--shrink"),
        (&["resize", "--shrink", &disk, "-8k"], "has 4096 bytes"),
        (&["resize", "--preallocation=metadata", &disk, "1M"], "off, falloc, full"),
        (&["measure", &disk, "--size", "1M"], "one to convert"),
        (&["measure", "-O", "luks", "--size", "1M"], "not known"),
        (&["dd", "if=/nowhere", "seek=1"], "no operand 'seek=1'"),
        (&["dd", &format!("if={disk}"), &format!("of={disk}")], "read from"),
        (&["rebase", "-b", "x", "-F", "raw", &disk], "stand on no other image"),
        (&["rebase", "-b", &disk, &disk], "-F"),
        (&["commit", &disk], "stands on no other image"),
        (&["bench", "-w", "-U", &disk], "-U"),
        (&["amend", "-o", "size=1M", &disk], "no option that can change"),
        (&["amend", "-f", "qcow2", "-o", "cluster_size=4k", &disk], "qcow2"),
        (&["snapshot", "-l", &disk], "not offered"),
        (&["nonsense"], "nonsense"),
    ] {
        let out = gipfel(args);
        assert_eq!(code(&out), 1, "{args:?}: {}", stderr(&out));
        assert!(stderr(&out).contains(told), "{args:?}: {}", stderr(&out));
        assert!(!std::path::Path::new(&new).exists(), "{args:?}");
    }
    assert_eq!(std::fs::read(&disk).unwrap(), [1; 4096]);
    let help = gipfel(&["convert", "--help"]);
    assert!(code(&help) == 0 && stdout(&help).contains("Examples:"));
    let smaller = s.file("smaller", &[0; 512]);
    assert!(stderr(&gipfel(&["convert", "-n", &disk, &smaller])).contains("too few"));
}

#[test]
fn copies_show_the_same_bytes() {
    if !tools::have("qemu-img") {
        return;
    }
    let mut rng = Rng::from_env();
    let s = Scratch::new("img-convert");
    let (ours, theirs) = (s.arg("ours"), s.arg("theirs"));
    for round in 0..40 {
        let sources: Vec<_> = (0..if rng.one_in(4) { rng.between(2, 4) } else { 1 })
            .map(|i| sparse_file(&mut rng, &s, &format!("source{i}")))
            .collect();
        let mut options = vec!["-f".to_owned(), "raw".into()];
        let hole = *rng.pick(&["", "0", "512", "4k", "12k", "64k", "1M"]);
        if !hole.is_empty() {
            options.extend(["-S".into(), hole.into()]);
        }
        if rng.one_in(2) {
            options.extend(["-m".into(), rng.between(1, 16).to_string()]);
        }
        if rng.one_in(3) {
            options.push("-W".into());
        }
        if rng.one_in(4) {
            options.extend(["-T".into(), "none".into(), "-t".into(), "none".into()]);
        }
        if hole.is_empty() && rng.one_in(4) {
            options.push("-C".into());
        }
        let exists = rng.one_in(3);
        let mut args: Vec<&str> = vec!["convert"];
        args.extend(options.iter().map(String::as_str));
        args.extend(sources.iter().map(String::as_str));
        let reference: Vec<_> = args.iter().copied().chain([theirs.as_str()]).collect();
        tools::qemu_img(&reference);
        let len = std::fs::metadata(&theirs).unwrap().len();
        if exists {
            args.push("-n");
            std::fs::write(&ours, rng.bytes(len as usize)).unwrap();
        }
        args.push(&ours);
        let out = gipfel(&args);
        assert_eq!(code(&out), 0, "round {round}: {args:?}: {}", stderr(&out));
        tools::qemu_img(&["compare", "-f", "raw", "-F", "raw", &ours, &theirs]);
        assert_eq!(std::fs::metadata(&ours).unwrap().len(), len, "{args:?}");
        // In a file that was there, zeros for a part of a block do not free the block.
        if !exists && (hole == "4k" || hole == "0") {
            let blocks = |p: &str| std::fs::metadata(p).unwrap().blocks();
            let (ours, theirs) = (blocks(&ours), blocks(&theirs));
            assert!(ours <= theirs, "round {round}: {args:?}: {ours} {theirs}");
        }
    }
}

#[test]
fn a_signal_ends_a_copy_and_another_asks_how_far_it_is() {
    let s = Scratch::new("img-signal");
    let source = s.file("source", &vec![1; 8 << 20]);
    let target = s.arg("target");
    let start = Instant::now();
    let child = Command::new(GIPFEL)
        .args(["img", "convert", "-r", "1M", &source, &target])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let kill = |signal: &str| {
        tools::run("kill", &[signal, &child.id().to_string()]);
    };
    while !std::fs::metadata(&target).is_ok_and(|m| m.blocks() > 0) {
        assert!(start.elapsed() < Duration::from_secs(10), "the copy has not begun");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill("-USR1");
    std::thread::sleep(Duration::from_millis(100));
    kill("-INT");
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(130), "signal {:?}", out.status.signal());
    let told = stderr(&out);
    assert!(told.contains("/100%)") && told.contains("a part of the disk only"), "{told}");
    assert!(start.elapsed() < Duration::from_secs(7));
}

#[test]
fn progress_goes_to_standard_output() {
    let s = Scratch::new("img-progress");
    let source = s.file("source", &vec![1; 3 << 20]);
    let target = s.arg("target");
    let out = gipfel(&["convert", "-p", &source, &target]);
    let shown = stdout(&out);
    assert!(shown.starts_with("    (0.00/100%)\r"), "{shown:?}");
    assert!(shown.ends_with("    (100.00/100%)\r\n"), "{shown:?}");
    assert_eq!(stdout(&gipfel(&["convert", "-p", "-q", &source, &target])), "");
}

#[test]
fn a_guessed_raw_target_is_warned_of() {
    let s = Scratch::new("img-guess");
    let source = s.file("source", &[1; 4096]);
    let target = s.file("target", &[0; 4096]);
    let options = format!("file.filename={target}");
    let out = gipfel(&["convert", "-n", "--target-image-opts", &source, &options]);
    assert!(code(&out) == 0 && stderr(&out).contains("warning"), "{}", stderr(&out));
    let options = format!("driver=raw,file.filename={target}");
    let out = gipfel(&["convert", "-n", "--target-image-opts", &source, &options]);
    assert!(code(&out) == 0 && stderr(&out).is_empty(), "{}", stderr(&out));
}

#[test]
fn an_image_in_use_is_left_alone() {
    if !tools::have("qemu-io") {
        return;
    }
    let s = Scratch::new("img-use");
    let disk = s.file("disk", &[1; 65536]);
    let new = s.arg("new");
    let mut user = Command::new("qemu-io")
        .args(["-f", "raw", &disk])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Once it has answered it holds its locks. Looking for those from outside would be a use of
    // its own, which could keep it from getting them.
    let (mut ask, answers) = (user.stdin.take().unwrap(), user.stdout.take().unwrap());
    ask.write_all(b"read 0 512\n").unwrap();
    let mut answers = BufReader::new(answers).lines();
    let answered = |line: &str| line.contains("read 512/512 bytes at offset 0");
    assert!(answers.any(|line| answered(&line.unwrap())), "the other tool does not open the image");
    for args in [&["create", &disk, "1M"][..], &["convert", &disk, &new], &["map", &disk]] {
        let out = gipfel(args);
        assert!(code(&out) == 1 && stderr(&out).contains("in use"), "{args:?}: {}", stderr(&out));
    }
    for args in [&["info", "-U", &disk][..], &["convert", "-U", &disk, &new], &["map", "-U", &disk]]
    {
        let out = gipfel(args);
        assert_eq!(code(&out), 0, "{args:?}: {}", stderr(&out));
    }
    drop(ask);
    user.wait().unwrap();
    assert_eq!(std::fs::read(&disk).unwrap(), [1; 65536]);
}

#[test]
fn it_answers_to_the_name_of_the_tool_it_stands_for() {
    let s = Scratch::new("img-name");
    let link = s.arg("qemu-img");
    std::os::unix::fs::symlink(GIPFEL, &link).unwrap();
    assert!(tools::run(&link, &["--version"]).starts_with("qemu-img version 10.0.2"));
    let disk = s.arg("disk");
    tools::run(&link, &["create", "-q", &disk, "1M"]);
    assert!(tools::run(&link, &["info", &disk]).contains("virtual size: 1 MiB (1048576 bytes)"));
}

//! `gipfel io`, compared with the tool that it stands for: scripts of commands, random commands,
//! commands over a pipe.

mod img_tools;

use std::io::Write;
use std::process::{Command, Output, Stdio};

use gipfel_testkit::{Rng, Scratch, tools};
use img_tools::{GIPFEL, code, stderr, stdout};

/// The output with times and rates left out.
fn plain(text: &str) -> String {
    let line = |l: &str| match (l.split_once("; "), l.split_once(",1,")) {
        (Some((head, _)), _) if l.ends_with("ops/sec)") => format!("{head}; ..."),
        (_, Some((head, rest))) if rest.contains(':') => format!("{head},1,..."),
        _ => l.to_owned(),
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

/// The two programs, each in a folder of its own with the same images.
struct Pair {
    folders: [Scratch; 2],
}

const IMAGES: [&[&str]; 4] = [
    &["create", "-q", "-f", "raw", "r.raw", "1M"],
    &["create", "-q", "-f", "raw", "odd.raw", "1M"],
    &["create", "-q", "-f", "qcow2", "q.qcow2", "1M"],
    &["create", "-q", "-f", "qcow2", "-b", "q.qcow2", "-F", "qcow2", "o.qcow2"],
];

impl Pair {
    fn new(name: &str) -> Pair {
        let p = Pair { folders: [Scratch::new(name), Scratch::new(name)] };
        for s in &p.folders {
            for args in IMAGES {
                let made = Command::new("qemu-img").args(args).current_dir(s.dir()).status();
                assert!(made.unwrap().success(), "{args:?}");
            }
            std::fs::OpenOptions::new()
                .write(true)
                .open(s.path("odd.raw"))
                .and_then(|f| f.set_len(1500))
                .unwrap();
            s.file("pat", b"abcdefg\n");
            s.file("conf", b"[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\n");
        }
        p
    }

    fn run(&self, args: &[&str], input: &str) -> [Output; 2] {
        let ours = (Command::new(GIPFEL), ["io"].as_slice());
        let theirs = (Command::new("qemu-io"), [].as_slice());
        let mut both = [ours, theirs].into_iter().zip(&self.folders).map(|((mut c, first), s)| {
            let mut child = c
                .args(first)
                .args(args)
                .current_dir(s.dir())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            // A program that ends at once reads nothing.
            let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
            child.wait_with_output().unwrap()
        });
        [both.next().unwrap(), both.next().unwrap()]
    }

    /// Panics unless both print the same and end alike.
    fn alike(&self, args: &[&str], input: &str) {
        let [ours, theirs] = self.run(args, input);
        let story = format!("{args:?} {input:?}\n{}\n{}", stderr(&ours), stderr(&theirs));
        assert_eq!(plain(&stdout(&ours)), plain(&stdout(&theirs)), "{story}");
        assert_eq!(ours.status, theirs.status, "{story}");
    }

    /// The same with one `-c` for each command.
    fn commands(&self, image: &[&str], commands: &str) {
        let mut args = image.to_vec();
        args.extend(commands.split('|').flat_map(|c| ["-c", c]));
        self.alike(&args, "");
    }
}

#[test]
fn scripts_read_the_same() {
    if !tools::have("qemu-io") {
        return;
    }
    for image in [["-f", "raw", "r.raw"], ["-f", "qcow2", "q.qcow2"]] {
        let pair = Pair::new("io");
        for script in [
            "write 0 4k|read 0 4k|read -P 0xcd 0 4k|read -P 1 0 4k|read -v 0 40|read -Cv 8 20",
            "write -C 0 4k|read -Cq 0 1k|readv -C 0 512 512|readv 0 1k 512|read -qv 0 16",
            "write 0 0|read 0 0|read 1M 0|read 2M 0|read 1M 1|write 1M 64k|discard 3M 1",
            "read 0 512b|read .5k 0x10|read +1 1|read 1 511|read 0 1 -q|read -- 0 1|r 0 1",
            "read -P 0 -s 10 -l 20 0 512|read -P 0 -s 500 0 512",
            "write 3 7|write -s pat 10 20|read -v 0 40|write -P 010 0 1|read -v 0 1",
            "write -z 0 4k|write -zu 0 4k|write -zn 0 64k|write -f 0 4k|write -zf 0 4k|map",
            "discard 0 1k|discard -q 0 1k|discard -C 0 64k|discard 1 5|discard 0 0",
            "writev 0 512 1k|writev -P 5 0 1 2 3|readv -P 5 0 6|readv -v 0 1 2 3|writev 3M 1",
            "alloc 0|alloc 0 1M|alloc 2M 512|alloc 1 5|alloc 0 2M|map|length|info|flush",
            "aio_read -P 77 0 512|aio_flush|aio_read 3M 4k|aio_flush|aio_write -C 3M 1",
            "aio_read -v 0 4|aio_flush|aio_read -C 0 4|aio_flush|aio_write -z 0 5|aio_flush",
            "sleep 1|sleep 0x2|quit|length",
            "truncate 2M|length|map|truncate -m full 3M|length|map",
            "reopen -r|flush|reopen -w|write -q 0 1|read 0 1|reopen -c writethrough|write 0 1",
            "close|open -o driver=raw r.raw|length|close|open -r q.qcow2|length|read 0 1",
            "abort",
            "sigraise 9",
            "sigraise 15|length",
        ] {
            pair.commands(&image, script);
        }
    }
}

#[test]
fn images_are_named_and_opened_in_many_ways() {
    if !tools::have("qemu-io") {
        return;
    }
    let pair = Pair::new("io-open");
    let odd = "length|map|alloc 0 2M|read 0 1536|read 0 1537|write 1501 3|write -z 1500 36|length";
    pair.commands(&["-f", "raw", "odd.raw"], odd);
    pair.commands(&["-f", "qcow2", "q.qcow2"], "write 0 64k");
    pair.commands(&["-C", "-f", "qcow2", "o.qcow2"], "map|read 0 4k|alloc 0 1M");
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"q.qcow2"}}"#;
    for name in ["blkdebug::q.qcow2", "blkdebug::blkdebug::q.qcow2", "file:q.qcow2", json, "no"] {
        pair.commands(&[name], "write 0 4k|read 0 4k|length");
        pair.commands(&["-f", "qcow2", name], "write 0 4k|read 0 4k|length");
    }
    for name in ["blkdebug:conf", "blkdebug:", "blkdebug:no:q.qcow2", "blkverify:r.raw", "null-co:"]
    {
        pair.commands(&["-f", "raw", name], "length");
    }
    pair.commands(&["-f", "raw", "blkdebug::q.qcow2"], "length");
    pair.commands(&["-f", "qcow2", "blkdebug:conf:q.qcow2"], "read 0 4k|length");
    pair.commands(&["-f", "blkverify", "blkverify:r.raw:q.qcow2"], "length");
    pair.commands(&["-f", "null-co", "null-co://"], "length|write 0 1");
    for options in ["driver=qcow2,file.filename=q.qcow2", "file.filename=q.qcow2", "driver=null-co"]
    {
        pair.commands(&["--image-opts", options], "write 0 4k|length");
    }
    for flags in [
        &["-n"][..],
        &["-nm"],
        &["-C"],
        &["-rC"],
        &["-k"],
        &["-k", "-n"],
        &["-U"],
        &["-U", "-r"],
        &["-t", "no"],
        &["-t", "writethrough"],
        &["-d", "no"],
        &["-d", "ignore"],
        &["-i", "no"],
        &["-i", "io_uring"],
        &["--cache", "unsafe"],
        &["--object", "secret,id=a,data=b"],
    ] {
        let mut image = flags.to_vec();
        image.extend(["-f", "raw", "r.raw"]);
        pair.commands(&image, "write -P 7 0 512|read -P 7 0 512");
    }
    pair.commands(&["-s", "-f", "raw", "r.raw"], "write -P 9 0 512|read -P 9 0 512|length|info");
    pair.commands(&["-f", "raw", "r.raw"], "read -P 7 0 512");
    let options =
        "close|open -o driver=blkdebug,image.driver=qcow2,align=4k blkdebug::q.qcow2|length";
    pair.commands(&["-f", "raw", "r.raw"], options);
}

#[test]
fn requests_wait_at_breakpoints_while_commands_go_on() {
    if !tools::have("qemu-io") {
        return;
    }
    let pair = Pair::new("io-break");
    let image = ["-f", "qcow2", "blkdebug::q.qcow2"];
    pair.commands(
        &image,
        "write -q 0 64k|break write_aio A|aio_write 0 512|wait_break A|aio_write 8k 4k|sleep 200|\
         resume A|aio_flush",
    );
    // Where the reference waits for ever, there is an answer.
    let out = Command::new(GIPFEL)
        .args(["io", "-c", "wait_break A"])
        .args(image)
        .current_dir(pair.folders[0].dir())
        .output()
        .unwrap();
    assert_eq!((code(&out), &*stdout(&out)), (1, "wait_break failed: No such file or directory\n"));
}

#[test]
fn commands_come_over_a_pipe() {
    if !tools::have("qemu-io") {
        return;
    }
    let pair = Pair::new("io-pipe");
    for input in [
        "",
        "quit",
        "read 0 512\nread -P 3 0 512\nquit\nlength\n",
        "\n\n  length  \nread 0 512",
        "close\nlength\nclose\nopen -s -o driver=raw r.raw\nwrite -P 7 0 1\nread -P 7 0 1\nq\n",
    ] {
        pair.alike(&["-f", "raw", "r.raw"], input);
    }
    pair.alike(&[], "read 0 1\nopen q.qcow2\nlength\n");
}

#[test]
fn mistakes_fail_and_say_why() {
    let s = Scratch::new("io-wrong");
    let disk = s.file("disk", &[0; 4096]);
    for (command, told) in [
        ("reed 0 1", "did you mean 'read'"),
        ("read 0", "an argument is missing"),
        ("read 0 3G", "too long"),
        ("read -P 256 0 1", "is not a byte"),
        ("read -s 1 0 1", "need -P"),
        ("write -u 0 1", "-u needs -z"),
        ("write -zP 1 0 1", "exclude"),
        ("write -s nothing 0 1", "'nothing'"),
        ("zone_report 0 1", "zoned"),
        ("write -b 0 512", "virtual machine"),
        ("break write_aio A", "blkdebug"),
        ("open x", "open already"),
        ("truncate -m no 1M", "'no'"),
        ("reopen -rw", "-r and -w"),
        ("sigraise x", "not a number"),
    ] {
        let out = Command::new(GIPFEL)
            .args(["io", "-f", "raw", "-c", command, "-c", "length", &disk])
            .output()
            .unwrap();
        let story = format!("{command}: {}{}", stdout(&out), stderr(&out));
        assert!(code(&out) == 1 && stderr(&out).contains(told), "{story}");
        assert!(stdout(&out).ends_with("4 KiB\n"), "what follows is carried out: {story}");
    }
}

/// A random command on a disk of 1 MiB.
fn command(rng: &mut Rng) -> String {
    let unit = *rng.pick(&[1, 512, 4096, 65536]);
    let offset = rng.below((1 << 20) / unit + 2) * unit;
    let len = rng.below(20) * unit;
    let byte = rng.below(256);
    match rng.below(12) {
        0 => format!("read -v {offset} {}", len.min(64)),
        1 => format!("read -P {byte} {offset} {len}"),
        2 => format!("readv {offset} {len} 512"),
        3 | 4 => format!("write -P {byte} {offset} {len}"),
        5 => format!("writev -P {byte} {offset} {len} 1k"),
        6 => format!("write -z {offset} {len}"),
        7 => format!("write -zu {offset} {len}"),
        8 => "flush".to_owned(),
        9 => format!("aio_write -P {byte} {offset} {len}|aio_flush"),
        10 => format!("aio_read -P {byte} {offset} {len}|aio_flush"),
        _ => format!("read -CP 0 {offset} {len}"),
    }
}

#[test]
fn random_commands_end_alike() {
    if !tools::have("qemu-io") {
        return;
    }
    let mut rng = Rng::from_env();
    let pair = Pair::new("io-random");
    for round in 0..16 {
        let (format, file) =
            *rng.pick(&[("raw", "r.raw"), ("qcow2", "q.qcow2"), ("qcow2", "o.qcow2")]);
        let script: Vec<_> = (0..40).map(|_| command(&mut rng)).collect();
        pair.commands(&["-f", format, file], &script.join("|"));
        let images = pair.folders.each_ref().map(|s| s.arg(file));
        println!("round {round}: {file}");
        tools::same_content(format, &images[0], format, &images[1]);
        if format == "qcow2" {
            tools::qcow2_is_clean(&images[0]);
        }
    }
}

//! `gipfel nbd` beside qemu-nbd: the same arguments do the same.
#![allow(missing_docs)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::{Daemon, Scratch, tools};

const KIB: usize = 1 << 10;
const SIZE: usize = 256 * KIB;

/// Our program under the old name, and the reference.
fn programs(s: &Scratch) -> [PathBuf; 2] {
    let ours = s.path("qemu-nbd");
    std::os::unix::fs::symlink(Daemon::binary(), &ours).unwrap();
    [ours, tools::find("qemu-nbd").unwrap()]
}

/// An image whose 4 KiB blocks are filled with their number.
fn image(s: &Scratch, name: &str) -> String {
    let bytes: Vec<u8> = (0..SIZE).map(|i| (i / (4 * KIB)) as u8).collect();
    s.file(name, &bytes)
}

fn start(program: &PathBuf, socket: &str, args: &[&str]) -> Daemon {
    let all = [&["-k", socket][..], args].concat();
    Daemon::start(program, &all).wait_for(&[socket])
}

fn connect(socket: &str, name: &str) -> Client {
    Client::connect(&Address::Unix(socket.into()), name).unwrap()
}

#[test]
fn it_ends_with_its_last_client_unless_it_is_persistent() {
    let s = Scratch::new("nbd-ends");
    let (disk, socket) = (image(&s, "d.raw"), s.arg("sock"));
    for program in programs(&s) {
        let mut d = start(&program, &socket, &["-f", "raw", "-x", "here", "-e", "2", &disk]);
        assert!(Client::connect(&Address::Unix(socket.clone().into()), "elsewhere").is_err());
        let (a, mut b) = (connect(&socket, "here"), connect(&socket, "here"));
        a.disconnect().unwrap();
        assert_eq!(b.read(8 << 10, 512).unwrap(), [2; 512], "the other is still there");
        assert!(d.is_running());
        b.disconnect().unwrap();
        assert!(d.wait_end().success());
        let mut d = start(&program, &socket, &["-t", "-f", "raw", &disk]);
        for _ in 0..2 {
            let mut c = connect(&socket, "");
            assert_eq!(c.read(4 << 10, 512).unwrap(), [1; 512]);
            c.disconnect().unwrap();
        }
        assert!(d.is_running());
        assert!(d.terminate().success(), "{program:?}");
    }
}

#[test]
fn windows_overlays_and_read_only_disks() {
    let s = Scratch::new("nbd-options");
    let (disk, socket) = (image(&s, "d.raw"), s.arg("sock"));
    for program in programs(&s) {
        let mut d = start(&program, &socket, &["-f", "raw", "-o", "8192", "-r", &disk]);
        let mut c = connect(&socket, "");
        assert_eq!(c.size(), (SIZE - 8192) as u64);
        assert_eq!(c.read(0, 512).unwrap(), [2; 512]);
        assert!(c.write(0, &[9; 512], 0).is_err(), "read-only");
        c.disconnect().unwrap();
        assert!(d.wait_end().success());
        let mut d = start(&program, &socket, &["-f", "raw", "-s", &disk]);
        let mut c = connect(&socket, "");
        c.write(0, &[9; 512], 0).unwrap();
        assert_eq!(c.read(0, 1024).unwrap(), [[9; 512], [0; 512]].concat());
        c.disconnect().unwrap();
        assert!(d.wait_end().success());
        assert_eq!(std::fs::read(&disk).unwrap()[0], 0, "the image was only read");
        let window = format!("driver=raw,offset=4k,size=4k,file.driver=file,file.filename={disk}");
        let mut d = start(&program, &socket, &["--image-opts", "--cache=writethrough", &window]);
        let mut c = connect(&socket, "");
        assert_eq!((c.size(), c.read(0, 512).unwrap()), (4096, vec![1; 512]));
        c.write(0, &[7; 512], 0).unwrap();
        c.disconnect().unwrap();
        assert!(d.wait_end().success());
        assert_eq!(std::fs::read(&disk).unwrap()[4096], 7);
        std::fs::remove_file(&disk).unwrap();
        image(&s, "d.raw");
    }
}

#[test]
fn a_guessed_raw_image_does_not_become_one_of_another_format() {
    let s = Scratch::new("nbd-guessed");
    let (disk, socket, other) = (image(&s, "d.raw"), s.arg("sock"), s.arg("o.qcow2"));
    tools::qemu_img(&["create", "-q", "-f", "qcow2", &other, "1M"]);
    let header = std::fs::read(&other).unwrap()[..512].to_vec();
    for program in programs(&s) {
        let mut d = start(&program, &socket, &[&disk]);
        let mut c = connect(&socket, "");
        assert!(c.write(0, &header, 0).is_err(), "a header of qcow2");
        c.write(0, &[5; 512], 0).unwrap();
        c.write(512, &header, 0).unwrap();
        assert_eq!(c.read(0, 512).unwrap(), [5; 512]);
        c.disconnect().unwrap();
        assert!(d.wait_end().success());
        let mut d = start(&program, &socket, &["-f", "raw", &disk]);
        let mut c = connect(&socket, "");
        c.write(0, &header, 0).unwrap();
        c.disconnect().unwrap();
        assert!(d.wait_end().success(), "where the format is said the guest may write anything");
        std::fs::remove_file(&disk).unwrap();
        image(&s, "d.raw");
    }
}

#[test]
fn in_the_background_it_leaves_its_process_id() {
    let s = Scratch::new("nbd-fork");
    let (disk, socket, pid) = (image(&s, "d.raw"), s.arg("sock"), s.arg("pid"));
    for program in programs(&s) {
        let args = ["--fork", "--pid-file", &pid, "-f", "raw", "-k", &socket, &disk];
        let out = tools::try_run(program.to_str().unwrap(), &args);
        assert!(out.status.success() && out.stdout.is_empty(), "{out:?}");
        let process = std::fs::read_to_string(&pid).unwrap().trim().to_owned();
        assert!(PathBuf::from(format!("/proc/{process}")).exists());
        let mut c = connect(&socket, "");
        assert_eq!(c.read(0, 512).unwrap(), [0; 512]);
        c.disconnect().unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while PathBuf::from(&socket).exists() {
            assert!(Instant::now() < end, "it ends with its client");
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = std::fs::remove_file(&pid);
    }
}

#[test]
fn wrong_arguments_are_refused_as_by_the_reference() {
    let s = Scratch::new("nbd-wrong");
    let (disk, socket) = (image(&s, "d.raw"), s.arg("sock"));
    let missing = s.arg("missing.raw");
    let cases: [(&[&str], &str); 11] = [
        (&[], "IMAGE"),
        (&["-f", "raw", &missing], "missing.raw"),
        (&["-f", "colour", &disk], "colour"),
        (&["-e", "x", &disk], "x"),
        (&["--cache=sometimes", &disk], "sometimes"),
        (&["-n", "--cache=none", &disk], "--cache"),
        (&["-f", "raw", "--detect-zeroes=unmap", &disk], "--discard=unmap"),
        (&["-f", "raw", "-o", "1048576", &disk], "offset 1048576 lies past the end"),
        (&["--image-opts", "-f", "raw", "driver=raw"], "--format (-f) out"),
        (&["-c", "/dev/nbd-none", &disk], "nbd-client"),
        (&[&disk, &disk], "unexpected argument"),
    ];
    let [ours, reference] = programs(&s);
    for (args, says) in cases {
        let all = [&["-k", &socket][..], args].concat();
        let out = tools::try_run(ours.to_str().unwrap(), &all);
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(1), "{args:?}: {text}");
        assert!(text.contains(says) && !text.contains("panicked"), "{args:?}: {text}");
        let theirs = tools::try_run(reference.to_str().unwrap(), &all);
        assert_eq!(theirs.status.code(), Some(1), "{args:?}");
    }
}

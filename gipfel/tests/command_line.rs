//! The storage daemon as people start it: every form of its options, the background, pid files,
//! sockets passed on, and what is said to mistakes.
#![allow(missing_docs)]

mod common;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::PATIENCE;
use gipfel_testkit::nbd::{Address, Client};
use gipfel_testkit::qmp::Qmp;
use gipfel_testkit::{Daemon, Scratch, tools};
use serde_json::json;

/// Runs the binary to its end, which comes by itself.
fn gipfel(args: &[&str]) -> Output {
    Command::new(Daemon::binary()).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the storage daemon with options that it refuses; gives what it says.
#[track_caller]
fn refused(args: &[&str]) -> String {
    let out = gipfel(&[&["storage-daemon"], args].concat());
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{args:?}: {said}");
    assert!(out.stdout.is_empty(), "{args:?} writes to standard output");
    assert!(said.starts_with("gipfel: ") || said.starts_with("error: "), "{said}");
    said
}

/// Whether something answers as export `name` there, with as many bytes.
#[track_caller]
fn serves(address: &Address, name: &str, size: u64) {
    assert_eq!(Client::connect(address, name).unwrap().size(), size);
}

#[test]
fn every_form_of_an_option_means_the_same() {
    let s = Scratch::new("cli-forms");
    let image = s.file("disk,a.raw", &[0; 8192]);
    let escaped = image.replace(',', ",,");
    let sock = s.arg("nbd.sock");
    let server = format!("addr.type=unix,addr.path={sock}");
    let forms: [[String; 2]; 4] = [
        [
            format!("driver=raw,node-name=d,file.driver=file,file.filename={escaped},size=4k"),
            "type=nbd,id=e,node-name=d,name=x,writable=on".into(),
        ],
        [
            format!("raw,node-name=d,size=0x1000,file.filename={escaped},file.driver=file"),
            "nbd,id=e,node-name=d,name=x,writable=yes".into(),
        ],
        [
            json!({
                "driver": "raw", "node-name": "d", "size": 4096,
                "file": { "driver": "file", "filename": image }
            })
            .to_string(),
            json!({ "type": "nbd", "id": "e", "node-name": "d", "name": "x", "writable": true })
                .to_string(),
        ],
        [
            format!(
                "raw,node-name=d,read-only=off,size=4096,file.driver=file,\
                     file.filename={escaped},file.locking=auto,file.aio=io_uring"
            ),
            "nbd,id=e,node-name=d,name=x,writable=true".into(),
        ],
    ];
    for [blockdev, export] in &forms {
        let args = ["--blockdev", blockdev, "--nbd-server", &server, "--export", export];
        let mut daemon = Daemon::gipfel(&args).wait_for(&[&sock]);
        serves(&Address::unix(&sock), "x", 4096);
        Client::connect(&Address::unix(&sock), "x").unwrap().write(0, &[1], 0).unwrap();
        assert!(daemon.terminate().success());
        assert!(!Path::new(&sock).exists());
    }
    // The name of an export is the node's where none is given.
    let args = ["--blockdev", "null-co,node-name=n,size=1M", "--nbd-server", &server, "--export"];
    let mut daemon =
        Daemon::gipfel(&[&args[..], &["nbd,id=e,node-name=n"]].concat()).wait_for(&[&sock]);
    serves(&Address::unix(&sock), "n", 1 << 20);
    assert!(daemon.terminate().success());
}

/// A TCP port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn servers_on_all_kinds_of_sockets() {
    let s = Scratch::new("cli-socks");
    let node = ["--blockdev", "null-co,node-name=n,size=1M"];
    let export = ["--export", "nbd,id=e,node-name=n,name=x"];
    let port = free_port();
    let pid = s.arg("pid");
    let start = |server: &str| {
        let server = ["--nbd-server", server, "--pidfile", &pid];
        let mut d = Daemon::gipfel(&[&node[..], &server, &export].concat());
        wait(&mut d, s.path("pid").as_path());
        d
    };
    for server in [
        format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port}"),
        format!("addr.type=inet,addr.host=localhost,addr.port={port},addr.ipv4=on"),
        format!("addr.type=inet,addr.host=,addr.port={port},addr.keep-alive=on"),
        // The first port of this range may be taken; one of them is not.
        format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port},addr.to={}", port + 9),
        json!({ "addr": { "type": "inet", "host": "127.0.0.1", "port": port.to_string() } })
            .to_string(),
    ] {
        let mut d = start(&server);
        serves(&Address::Tcp(format!("127.0.0.1:{port}")), "x", 1 << 20);
        assert!(d.terminate().success());
    }
    let taken = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let at = format!("addr.type=inet,addr.host=127.0.0.1,addr.port={port}");
    assert!(refused(&["--nbd-server", &at]).contains("in use"));
    drop(taken);
    // An abstract name.
    let name = format!("gipfel-test-{}", std::process::id());
    let mut d = start(&format!("addr.type=unix,addr.path={name},addr.abstract=on"));
    use std::os::linux::net::SocketAddrExt;
    let abstract_name = std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap();
    UnixStream::connect_addr(&abstract_name).unwrap();
    assert!(d.terminate().success());
    // One that was opened already, on the command line and by QMP.
    let sock = s.path("passed.sock");
    let qmp_sock = s.arg("qmp.sock");
    let listener = UnixListener::bind(&sock).unwrap();
    let chardev = format!("socket,id=c,path={qmp_sock},server=on,wait=off");
    let args = [&node[..], &["--chardev", &chardev, "--monitor", "c"]].concat();
    let more = ["--nbd-server", "addr.type=fd,addr.str=3"];
    let mut d = Daemon::gipfel_passing(
        listener.try_clone().unwrap().into(),
        &[&args[..], &more, &export].concat(),
    )
    .wait_for(&[&qmp_sock]);
    serves(&Address::unix(&sock), "x", 1 << 20);
    let mut q = Qmp::connect(&qmp_sock).unwrap();
    q.command("nbd-server-stop", json!({}));
    let again = json!({ "addr": { "type": "fd", "data": { "str": "3" } } });
    let e = q.refused("nbd-server-start", again);
    assert!(e.desc.contains("not passed on"), "{}", e.desc);
    for wrong in ["-1", "0", "x", "99", "5", "6", "7", "8", "9", "10", "11", "12"] {
        let wrong = json!({ "addr": { "type": "fd", "data": { "str": wrong } } });
        q.refused("nbd-server-start", wrong);
    }
    q.command("quit", json!({}));
    assert!(d.wait_end().success());
}

/// Waits until the file is there.
#[track_caller]
fn wait(d: &mut Daemon, file: &Path) {
    let start = Instant::now();
    while !std::fs::read_to_string(file).is_ok_and(|t| t.ends_with('\n')) {
        assert!(d.is_running(), "the daemon ended before it wrote its pid file");
        assert!(start.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn monitors_on_all_kinds_of_character_devices() {
    let s = Scratch::new("cli-chardev");
    let sock = s.arg("qmp.sock");
    // Passed on, as the manual's example does it.
    let listener = UnixListener::bind(&sock).unwrap();
    let args = ["--chardev", "socket,fd=3,server=on,wait=off,id=c", "--monitor", "chardev=c"];
    let mut d = Daemon::gipfel_passing(listener.into(), &args);
    Qmp::connect(&sock).unwrap().command("quit", json!({}));
    assert!(d.wait_end().success());
    // We listen, it comes.
    let sock = s.arg("ours.sock");
    let listener = UnixListener::bind(&sock).unwrap();
    let chardev = format!("socket,id=c,path={sock}");
    let mut d = Daemon::gipfel(&["--chardev", &chardev, "--monitor", "c"]);
    let (mut stream, _) = listener.accept().unwrap();
    use std::io::Write;
    stream.write_all(b"{'execute':'qmp_capabilities'}{'execute':'quit'}").unwrap();
    assert!(d.wait_end().success());
    // It waits for the first client unless told not to; old switches are understood.
    let sock = s.arg("wait.sock");
    let pid = s.arg("pid");
    for (how, waits) in
        [("server=on", true), ("server,nowait", false), ("server=on,wait=off", false)]
    {
        let chardev = format!("socket,id=c,path={sock},{how}");
        let mut d = Daemon::gipfel(&["--chardev", &chardev, "--monitor", "c", "--pidfile", &pid]);
        if waits {
            std::thread::sleep(Duration::from_millis(100));
            assert!(!s.path("pid").exists(), "it waits");
        } else {
            wait(&mut d, &s.path("pid"));
        }
        let start = Instant::now();
        let mut q = loop {
            match Qmp::connect(&sock) {
                Ok(q) => break q,
                Err(e) => assert!(start.elapsed() < PATIENCE, "{e}"),
            }
        };
        q.command("quit", json!({}));
        assert!(d.wait_end().success());
    }
    // Waiting can be ended.
    let chardev = format!("socket,id=c,path={sock},server=on");
    let mut d = Daemon::gipfel(&["--chardev", &chardev, "--monitor", "c"]);
    let start = Instant::now();
    while !Path::new(&sock).exists() {
        assert!(start.elapsed() < PATIENCE);
    }
    assert!(d.terminate().success());
    // Standard input and output, also for people.
    for (monitor, lines) in [("c", 1), ("chardev=c,pretty=on", 3)] {
        let mut child = Command::new(Daemon::binary())
            .args(["storage-daemon", "--chardev", "stdio,id=c", "--monitor", monitor])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let commands = b"{'execute':'qmp_capabilities'}\n{'execute':'quit','id':1}\n";
        child.stdin.take().unwrap().write_all(commands).unwrap();
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success());
        let said = text(&out.stdout);
        assert!(said.contains("\"QMP\"") && said.contains("\"id\": 1"), "{said}");
        assert!(said.lines().count() > 2 * lines, "{said}");
    }
}

#[test]
fn to_the_background_and_back() {
    let s = Scratch::new("cli-back");
    let (pid, sock) = (s.arg("pid"), s.arg("qmp.sock"));
    let image = s.file("disk.raw", &[0; 4096]);
    let chardev = format!("socket,id=c,path={sock},server=on,wait=off");
    let nbd = s.arg("nbd.sock");
    let node = format!("file,node-name=f,filename={image}");
    let server = format!("addr.type=unix,addr.path={nbd}");
    let args = [
        "storage-daemon",
        "--daemonize",
        "--pidfile",
        &pid,
        "--blockdev",
        &node,
        "--chardev",
        &chardev,
        "--monitor",
        "c",
        "--nbd-server",
        &server,
        "--export",
        "nbd,id=e,node-name=f,writable=on",
    ];
    let out = gipfel(&args);
    assert!(out.status.success() && out.stderr.is_empty(), "{}", text(&out.stderr));
    // All is there at once.
    let number: u32 = std::fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    let mut q = Qmp::connect(&sock).unwrap();
    let mut c = Client::connect(&Address::unix(&nbd), "f").unwrap();
    c.write(0, &[7; 512], 0).unwrap();
    let proc_ = |what: &str| std::fs::read_link(format!("/proc/{number}/{what}")).unwrap();
    assert_eq!(proc_("cwd"), Path::new("/"));
    for fd in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(proc_(fd), Path::new("/dev/null"));
    }
    // A second one with the same pid file is refused, and says so; the first one goes on.
    let out = gipfel(&["storage-daemon", "--daemonize", "--pidfile", &pid]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("pid file"), "{}", text(&out.stderr));
    assert_eq!(c.read(0, 512).unwrap(), [7; 512]);
    c.disconnect().unwrap();
    q.command("quit", json!({}));
    let start = Instant::now();
    // Ended means no program; who reaps it is the system's business.
    while std::fs::read(format!("/proc/{number}/cmdline")).is_ok_and(|c| !c.is_empty()) {
        assert!(start.elapsed() < PATIENCE, "it ends");
        std::thread::sleep(Duration::from_millis(5));
    }
    for left in [&pid, &sock, &nbd] {
        assert!(!Path::new(left).exists(), "{left} is left behind");
    }
    assert_eq!(std::fs::read(&image).unwrap()[..512], [7; 512]);
    // What fails in the background is told in front, and leaves nothing behind.
    let out = gipfel(&[&args[..], &["--export", "nbd,id=e2,node-name=gone"]].concat());
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("gone"), "{}", text(&out.stderr));
    for left in [&pid, &sock, &nbd] {
        assert!(!Path::new(left).exists(), "{left} is left behind");
    }
    let stdio = ["--daemonize", "--chardev", "stdio,id=c", "--monitor", "c"];
    assert!(refused(&stdio).contains("--daemonize"));
}

#[test]
fn a_pid_file_excludes_a_second_daemon_of_either_kind() {
    if !tools::have("qemu-storage-daemon") {
        return;
    }
    let s = Scratch::new("cli-pid");
    let pid = s.arg("pid");
    let mut ours = Daemon::gipfel(&["--pidfile", &pid]);
    wait(&mut ours, &s.path("pid"));
    assert_eq!(std::fs::read_to_string(&pid).unwrap(), format!("{}\n", ours.pid()));
    let out = tools::try_run("qemu-storage-daemon", &["--pidfile", &pid]);
    assert!(!out.status.success());
    assert!(ours.terminate().success());
    let mut theirs = Daemon::reference(&["--pidfile", &pid]);
    wait(&mut theirs, &s.path("pid"));
    assert!(refused(&["--pidfile", &pid]).contains("running process"));
    theirs.terminate();
    // Signals end it as quit does.
    for signal in ["-INT", "-HUP", "-TERM"] {
        let mut d = Daemon::gipfel(&["--pidfile", &pid]);
        wait(&mut d, &s.path("pid"));
        tools::run("kill", &[signal, &d.pid().to_string()]);
        assert!(d.wait_end().success());
        assert!(!Path::new(&pid).exists());
    }
}

#[test]
fn mistakes_are_told_where_and_how_to_mend_them() {
    let s = Scratch::new("cli-bad");
    let image = s.file("disk.raw", b"precious");
    let in_the_way = format!("addr.type=unix,addr.path={image}");
    for (args, says) in [
        (&["--blokdev", "x"][..], "--blockdev"),
        (&["extra"], "extra"),
        (&["--blockdev"], "value is required"),
        (&["--trace", "bdrv*"], "traces nothing"),
        (&["--io-threads", "0"], "io-threads"),
        (&["--blockdev", "fil,node-name=x,filename=y"], "did you mean 'file'?"),
        (&["--blockdev", "file,node-name=x,filname=y"], "did you mean 'filename'?"),
        (&["--blockdev", "file,node-name=x"], "'filename' is missing"),
        (&["--blockdev", "null-co,size=1X,node-name=x"], "size"),
        (&["--blockdev", "{\"driver\":\"file\",}"], "JSON"),
        (&["--blockdev", "raw,node-name=x,file.driver=file"], "'file.filename' is missing"),
        (&["--blockdev", "file,node-name=x,filename=/no/such/image"], "No such file"),
        (&["--blockdev", "null-co,node-name=x", "--blockdev", "null-co,node-name=x"], "'x'"),
        (&["--export", "nbd,id=e,node-name=x"], "--nbd-server"),
        (&["--export", "vhost-user-blk,id=e,node-name=x"], "type"),
        (&["--monitor", "c"], "--chardev"),
        (&["--chardev", "socket,id=c"], "path"),
        (&["--chardev", "socket,id=c,path=a,host=b,port=1"], "path"),
        (&["--nbd-server", "addr.type=unix"], "'addr.path' is missing"),
        (&["--nbd-server", "addr.type=fd,addr.str=33"], "not passed on"),
        (&["--nbd-server", "addr.type=fd,addr.str=1"], "descriptor 1"),
        (&["--nbd-server", &in_the_way], "it is kept"),
        (&["--object", "iothred,id=x"], "did you mean 'iothread'?"),
        (&["--object", "iothread"], "'id' is missing"),
        (&["--pidfile", "/no/such/folder/pid"], "pid file"),
    ] {
        let said = refused(args);
        assert!(said.contains(says), "{args:?}: {said}");
        assert!(said.lines().count() < 12, "{args:?}: {said}");
    }
    assert_eq!(std::fs::read(&image).unwrap(), b"precious");
}

#[test]
fn help_is_where_people_look_for_it() {
    for (args, says) in [
        (&["--help"][..], "storage-daemon"),
        (&["-h"], "serve"),
        (&["help", "serve"], "--read-only"),
        (&["--version"], env!("CARGO_PKG_VERSION")),
        (&["storage-daemon", "--version"], env!("CARGO_PKG_VERSION")),
        (&["storage-daemon", "-V"], env!("CARGO_PKG_VERSION")),
        (&["storage-daemon", "--help"], "--daemonize"),
        (&["storage-daemon", "--object", "help"], "throttle-group"),
        (&["storage-daemon", "--object", "throttle-group,help"], "limits"),
        (&["storage-daemon", "--blockdev", "help"], "null-co"),
        (&["storage-daemon", "--blockdev", "driver=file,help"], "filename=<str>"),
        (&["storage-daemon", "--export", "nbd,help"], "[name=<str>]"),
        (&["storage-daemon", "--chardev", "help"], "socket"),
        (&["serve", "--help"], "--socket"),
    ] {
        let out = gipfel(args);
        assert!(out.status.success(), "{args:?}: {}", text(&out.stderr));
        assert!(text(&out.stdout).contains(says), "{args:?}: {}", text(&out.stdout));
    }
    for (args, says) in [
        (&[][..], "Usage"),
        (&["serv", "x"], "serve"),
        (&["serve"], "IMAGE"),
        (&["serve", "--soket", "a", "b"], "--socket"),
        (&["serve", "/no/such/image"], "No such file"),
        (&["storage-daemon", "--object", "throttle-grop,help"], "throttle-group"),
    ] {
        let out = gipfel(args);
        assert_eq!(out.status.code(), Some(1), "{args:?}");
        assert!(text(&out.stderr).contains(says), "{args:?}: {}", text(&out.stderr));
    }
}

//! Image locks against the reference tools, both ways.

use std::process::Stdio;

use gipfel_base::ErrorKind;
use gipfel_io::Runtime;
use gipfel_node::{Common, Perm};
use gipfel_testkit::{Daemon, Scratch, tools};
use serde_json::json;

use super::{Disk, open, open_with};

const READ: Perm = Perm::CONSISTENT_READ;

fn writer() -> (Perm, Perm) {
    (READ | Perm::WRITE | Perm::RESIZE, READ | Perm::WRITE_UNCHANGED)
}

/// Whether the reference tool with these arguments agrees to run.
fn runs(tool: &str, args: &[&str]) -> bool {
    let out = tools::try_run(tool, args);
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    if !out.status.success() {
        assert!(text.contains("lock"), "{tool} failed for another reason: {text}");
    }
    out.status.success()
}

/// Whether the reference reads an image that nobody else writes.
fn can_copy(path: &str, s: &Scratch, force: bool) -> bool {
    let copy = s.arg("copy");
    let args = ["convert", "-f", "raw", "-O", "raw", path, &copy, "-U"];
    runs("qemu-img", if force { &args } else { &args[..7] })
}

fn can_write(path: &str) -> bool {
    runs("qemu-io", &["-f", "raw", "-c", "write 0 512", path])
}

/// Whether the reference daemon opens and exports the image, for writing if `writable`.
fn can_serve(path: &str, s: &Scratch, writable: bool) -> bool {
    let on = if writable { "on" } else { "off" };
    let sock = s.arg("ref.sock");
    let mut child = std::process::Command::new("qemu-storage-daemon")
        .args(["--blockdev", &format!("file,node-name=f,filename={path},read-only=off")])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={sock}")])
        .args(["--export", &format!("nbd,id=e,node-name=f,writable={on}")])
        .args(["--pidfile", &s.arg("ref.pid")])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // It ends at once, or writes its process id once everything is set up.
    let served = loop {
        if child.try_wait().unwrap().is_some() {
            break false;
        }
        if s.path("ref.pid").exists() {
            break true;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    };
    let _ = child.kill();
    let _ = child.wait();
    let _ = std::fs::remove_file(s.path("ref.pid"));
    let _ = std::fs::remove_file(sock);
    served
}

fn have_tools() -> bool {
    ["qemu-io", "qemu-img", "qemu-storage-daemon"].into_iter().all(tools::have)
}

#[test]
fn the_reference_refuses_what_we_hold() {
    if !have_tools() {
        return;
    }
    let s = Scratch::new("lock");
    let path = s.file("disk", &[0; 1 << 20]);
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            let d = open(&path, Common::default()).await;
            assert!(can_write(&path), "an idle node is in nobody's way");
            let (used, shared) = writer();
            d.perms(used, shared).await.unwrap();
            assert!(!can_write(&path) && !can_serve(&path, &s, true));
            assert!(!can_copy(&path, &s, false));
            assert!(can_copy(&path, &s, true), "who forces it may look");
            assert!(!runs("qemu-img", &["resize", "-f", "raw", &path, "2M"]));
            // A reader beside a reader.
            d.perms(READ, READ | Perm::WRITE_UNCHANGED).await.unwrap();
            assert!(can_copy(&path, &s, false));
            assert!(!can_write(&path) && !can_serve(&path, &s, true));
            assert!(can_serve(&path, &s, false));
            // One that lets others write.
            d.perms(READ, Perm::ALL).await.unwrap();
            assert!(can_serve(&path, &s, true));
            // Given up.
            d.perms(used, shared).await.unwrap();
            d.perms(Perm::NONE, Perm::ALL).await.unwrap();
            assert!(can_write(&path));
            d.perms(used, shared).await.unwrap();
            drop(d);
            assert!(can_write(&path), "the locks go with the node");
        })
        .unwrap();
}

async fn refused(d: &Disk, used: Perm, shared: Perm) -> bool {
    match d.perms(used, shared).await {
        Ok(()) => {
            d.perms(Perm::NONE, Perm::ALL).await.unwrap();
            false
        }
        Err(e) => {
            assert_eq!(e.kind(), ErrorKind::InUse, "{e}");
            assert!(e.to_string().contains("in use by another process"), "{e}");
            true
        }
    }
}

#[test]
fn we_refuse_what_the_reference_holds() {
    if !have_tools() {
        return;
    }
    let s = Scratch::new("lock2");
    let path = s.file("disk", &[0; 1 << 20]);
    let sock = s.arg("r.sock");
    let serve = |format: &str, writable: &str| {
        Daemon::reference(&[
            "--blockdev",
            &format!("file,node-name=f,filename={path}"),
            "--blockdev",
            &format!("{format},node-name=n,file=f"),
            "--nbd-server",
            &format!("addr.type=unix,addr.path={sock}"),
            "--export",
            &format!("nbd,id=e,node-name=n,name=x,writable={writable}"),
        ])
        .wait_for(&[&sock])
    };
    let (used, shared) = writer();
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            let d = open(&path, Common::default()).await;
            let reader = open(&path, Common { read_only: true, ..Common::default() }).await;
            let peek = Common { read_only: true, force_share: true, ..Common::default() };
            let peek = open(&path, peek).await;
            let off = json!({ "filename": path, "locking": "off" });
            let off = open_with(off, Common::default()).await.unwrap();
            let mut writing = serve("raw", "on");
            assert!(refused(&d, used, shared).await);
            assert!(refused(&reader, READ, READ | Perm::WRITE_UNCHANGED).await);
            assert!(!refused(&peek, READ, READ).await && !refused(&off, used, shared).await);
            writing.kill();
            assert!(!refused(&d, used, shared).await, "the locks go with the process");
            std::fs::remove_file(&sock).unwrap();
            let mut reading = serve("raw", "off");
            assert!(!refused(&reader, READ, READ | Perm::WRITE_UNCHANGED).await);
            assert!(!refused(&d, READ | Perm::WRITE, Perm::ALL).await);
            reading.kill();
        })
        .unwrap();
}

#[test]
fn two_nodes_of_one_process_exclude_each_other_too() {
    let s = Scratch::new("lock3");
    let path = s.file("disk", &[0; 4096]);
    let (used, shared) = writer();
    Runtime::new(0)
        .unwrap()
        .block_on(async {
            let (a, b) =
                (open(&path, Common::default()).await, open(&path, Common::default()).await);
            a.perms(used, shared).await.unwrap();
            assert!(refused(&b, used, shared).await);
            assert!(refused(&b, READ, READ).await);
            // What was refused left nothing behind.
            b.perms(Perm::NONE, Perm::ALL).await.unwrap();
            a.perms(used, READ | Perm::WRITE).await.unwrap();
            b.perms(READ, Perm::ALL).await.unwrap();
            // Their own permissions never stand in their own way.
            a.perms(used, Perm::WRITE).await.unwrap_err();
            b.perms(Perm::NONE, Perm::ALL).await.unwrap();
            a.perms(used, shared).await.unwrap();
        })
        .unwrap();
}

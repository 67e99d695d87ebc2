//! Backends without clients, their trays and media, and what becomes of failed requests.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::common::steps::{read_byte, refused, sim, write_byte, writer};
use crate::common::{add_overlay, map, picture};
use gipfel_base::ErrorKind;
use gipfel_graph::{BackendOptions, Graph, IoStatus, OnError, ZeroDetection};
use gipfel_io::time::sleep;
use gipfel_io::{Buf, spawn_local};
use gipfel_node::Reports;
use serde_json::json;

fn drive(name: &str) -> BackendOptions {
    BackendOptions { name: Some(name.into()), removable: true, ..writer() }
}

/// The permissions that a backend has on its medium.
async fn perms(g: &Rc<Graph>, label: &str) -> String {
    let m = g.model().await;
    let (_, e) = m.edges().find(|(_, e)| e.label == label).unwrap();
    format!("{:?}", e.perms.used)
}

#[test]
fn media_come_and_go() {
    sim(1, async |g| {
        for n in ["a", "b"] {
            add_overlay(&g, n).await.unwrap();
        }
        let options =
            BackendOptions { copy_on_read: true, detect_zeroes: ZeroDetection::On, ..drive("cd") };
        let id = g.backend_add(options, Some("a")).await.unwrap();
        let (_, c) = g.attach("cd", "export 'e'", writer()).await.unwrap();
        write_byte(&c, 0, 1).await;
        let closed = picture(&g).await;
        let r = g.remove_medium(id).await;
        refused(&g, &closed, r, ErrorKind::InUse, "tray of backend 'cd' is closed").await;
        let r = g.insert_medium(id, "b").await;
        refused(&g, &closed, r, ErrorKind::InUse, "tray of backend 'cd' is closed").await;
        assert!(g.open_tray(id, false).await.unwrap());
        assert!(!g.open_tray(id, false).await.unwrap(), "it is open already");
        let no_medium = |r: gipfel_base::Result<()>| {
            assert_eq!(r.unwrap_err().kind(), ErrorKind::NoMedium);
        };
        no_medium(c.read(0, Buf::new(512)).await);
        no_medium(c.write(0, Buf::new(512), false).await);
        no_medium(c.flush().await);
        assert_eq!(c.size(), 0);
        let r = g.insert_medium(id, "b").await;
        refused(&g, &closed, r, ErrorKind::InUse, "has a medium already: 'a'").await;
        g.remove_medium(id).await.unwrap();
        g.remove_medium(id).await.unwrap();
        let empty = picture(&g).await;
        let stays = |l: &&String| !l.contains("-> a") || !l.contains("#");
        assert_eq!(closed.iter().filter(stays).count(), empty.len(), "only the medium's edge goes");
        no_medium(c.read(0, Buf::new(512)).await);
        let r = g.insert_medium(id, "nobody").await;
        refused(&g, &empty, r, ErrorKind::NotFound, "there is no node 'nobody'").await;
        g.insert_medium(id, "b").await.unwrap();
        no_medium(c.read(0, Buf::new(512)).await);
        assert!(g.close_tray(id).await.unwrap());
        assert_eq!(read_byte(&c, 0).await, 0, "the other medium");
        write_byte(&c, 0, 2).await;
        assert!(g.eject(id, false).await.unwrap());
        no_medium(c.read(0, Buf::new(512)).await);
        assert_eq!(picture(&g).await, empty);
        g.insert_medium(id, "a").await.unwrap();
        g.close_tray(id).await.unwrap();
        assert_eq!(read_byte(&c, 0).await, 1, "the first medium kept its bytes");
    });
}

#[test]
fn media_that_cannot_go_in_leave_everything_as_it_was() {
    sim(2, async |g| {
        add_overlay(&g, "busy").await.unwrap();
        let alone = BackendOptions { alone: true, ..writer() };
        g.attach("busy", "export 'alone'", alone).await.unwrap();
        let ro = json!({ "driver": "mem", "node-name": "ro", "read-only": true });
        g.blockdev_add(map(ro)).await.unwrap();
        let id = g.backend_add(drive("cd"), None).await.unwrap();
        let (client, _) = g.attach("cd", "export 'e'", writer()).await.unwrap();
        let p = picture(&g).await;
        let r = g.insert_medium(id, "busy").await;
        refused(&g, &p, r, ErrorKind::InUse, "'cd.root' (export 'e') needs permission").await;
        let r = g.insert_medium(id, "ro").await;
        refused(&g, &p, r, ErrorKind::ReadOnly, "node 'ro' is read-only").await;
        g.detach(client).await.unwrap();
        g.attach("cd", "export 'r'", BackendOptions::default()).await.unwrap();
        g.insert_medium(id, "ro").await.unwrap();
        let fixed = BackendOptions { removable: false, ..drive("hd") };
        let hd = g.backend_add(fixed, None).await.unwrap();
        let e = g.open_tray(hd, true).await.unwrap_err();
        assert!(e.to_string().contains("cannot be taken out"), "{e}");
    });
}

#[test]
fn a_backend_holds_nothing_without_its_client() {
    sim(3, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let alone = BackendOptions { alone: true, ..drive("b") };
        g.backend_add(alone.clone(), Some("n")).await.unwrap();
        let idle = perms(&g, "b.root").await;
        let (other, o) = g.attach("n", "export 'o'", writer()).await.unwrap();
        write_byte(&o, 0, 5).await;
        let p = picture(&g).await;
        let r = g.attach("b", "export 'e'", alone.clone()).await.map(drop);
        refused(&g, &p, r, ErrorKind::InUse, "export 'e'").await;
        g.detach(other).await.unwrap();
        let (id, b) = g.attach("b", "export 'e'", alone).await.unwrap();
        assert_ne!(perms(&g, "b.root").await, idle);
        write_byte(&b, 0, 6).await;
        g.detach(id).await.unwrap();
        assert_eq!(perms(&g, "b.root").await, idle);
        let e = b.write(0, Buf::new(512), false).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::ReadOnly, "a client that has left writes nothing");
        let reading = BackendOptions { writable: false, ..drive("r") };
        g.backend_add(reading, None).await.unwrap();
        let e = g.attach("r", "export 'w'", writer()).await.map(drop).unwrap_err();
        assert!(e.to_string().contains("backend 'r' was made read-only"), "{e}");
    });
}

#[test]
fn failed_requests_follow_the_policies() {
    sim(4, async |g| {
        let told = Arc::new(Reports::default());
        g.tell(told.clone());
        let bad = json!({ "driver": "mem", "node-name": "bad", "fail-flush": true });
        g.blockdev_add(map(bad)).await.unwrap();
        for (policy, ok) in [(OnError::Report, false), (OnError::Ignore, true)] {
            let name = format!("b-{}", policy.name());
            let o = BackendOptions { on_write_error: policy, ..drive(&name) };
            g.backend_add(o, Some("bad")).await.unwrap();
            let (_, b) = g.attach(&name, "export", writer()).await.unwrap();
            assert_eq!(b.flush().await.is_ok(), ok, "{policy:?}");
            let r = told.take().unwrap();
            assert_eq!((r.event, &r.data["device"]), ("BLOCK_IO_ERROR", &json!(name)));
            assert_eq!(
                (&r.data["action"], &r.data["nospace"]),
                (&json!(policy.name()), &json!(false))
            );
        }
        let o = BackendOptions { on_write_error: OnError::Stop, ..drive("s") };
        g.backend_add(o, Some("bad")).await.unwrap();
        let (id, b) = g.attach("s", "export", writer()).await.unwrap();
        let waiting = b.clone();
        let flush = spawn_local(async move { waiting.flush().await });
        sleep(Duration::from_secs(1)).await;
        assert!(!flush.is_finished(), "the client waits");
        assert_eq!(b.faults().status(), IoStatus::Failed);
        write_byte(&b, 0, 1).await;
        b.faults().resume();
        sleep(Duration::from_secs(1)).await;
        assert!(!flush.is_finished(), "it failed once more");
        assert!(told.take().is_some() && told.take().is_some() && told.take().is_none());
        b.faults().give_up();
        assert!(flush.await.is_err());
        g.detach(id).await.unwrap();
        let wrong = BackendOptions { on_read_error: OnError::Enospc, ..drive("w") };
        let e = g.backend_add(wrong, None).await.unwrap_err();
        assert!(e.to_string().contains("for writes only"), "{e}");
    });
}

/// A medium goes with its last holder only if no user added it; a node-side filter stays with a
/// node that a user added.
#[test]
fn nodes_go_with_their_last_holder() {
    sim(5, async |g| {
        let n = json!({ "driver": "mem", "node-name": "n", "detect-zeroes": "on" });
        g.blockdev_add(map(n)).await.unwrap();
        let before = picture(&g).await;
        let id = g.backend_add(drive("b"), Some("n")).await.unwrap();
        g.eject(id, false).await.unwrap();
        g.insert_medium(id, "n").await.unwrap();
        g.backend_del("b").await.unwrap();
        assert_eq!(picture(&g).await, before);
        let over = json!({
            "driver": "overlay", "node-name": "o", "file": { "driver": "mem" }, "backing": "n"
        });
        g.blockdev_add(map(over)).await.unwrap();
        g.blockdev_del("o").await.unwrap();
        assert_eq!(picture(&g).await, before);
        g.attach("n", "export 'e'", writer()).await.unwrap();
    });
}

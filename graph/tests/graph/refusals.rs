//! Refusals of mutators.md's table that no other test names: each says what is refused and why, and
//! changes nothing.

use std::rc::Rc;

use gipfel_base::{ErrorKind, Result};
use gipfel_graph::{
    Action, BackendOptions, ChildChange, Follow, Graph, JobFilter, Medium, ReadOnlyMode,
    ReplaceEdges, SnapshotSync,
};
use serde_json::json;

use crate::common::jobs::{cbw, mirror};
use crate::common::steps::{reader, refused, sim, writer};
use crate::common::{BLOCK, add_overlay, map, picture};

use ErrorKind::{Exists, InUse, InvalidInput, NotFound, ReadOnly, Unsupported};

async fn is_refused<T>(g: &Rc<Graph>, r: Result<T>, kind: ErrorKind, says: &[&str]) {
    let p = picture(g).await;
    let r = r.map(drop);
    for s in says {
        refused(g, &p, r.clone(), kind, s).await;
    }
}

async fn add_mem(g: &Rc<Graph>, name: &str, blocks: u64) {
    let o = json!({ "driver": "mem", "node-name": name, "size": blocks * BLOCK });
    g.blockdev_add(map(o)).await.unwrap();
}

/// `q` over `m0` to `m2`, with a client.
async fn quorum(g: &Rc<Graph>) {
    for n in ["m0", "m1", "m2"] {
        add_mem(g, n, 64).await;
    }
    let q = json!({ "driver": "fan", "node-name": "q", "children": ["m0", "m1", "m2"] });
    g.blockdev_add(map(q)).await.unwrap();
    g.attach("q", "export 'q'", writer()).await.unwrap();
}

async fn start(
    g: &Rc<Graph>,
    job: &str,
    disk: &str,
    target: &str,
    replaces: &str,
) -> Result<JobFilter> {
    let (mut spec, _) = mirror(job, target);
    spec.replaces = Some(replaces.into());
    g.insert_job_filter(disk, spec).await
}

#[test]
fn block_resize() {
    sim(1, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let f = json!({ "driver": "pass", "node-name": "f", "file": "n" });
        g.blockdev_add(map(f)).await.unwrap();
        let size = 64 * BLOCK;
        let resize = async |name: &str, to: u64| g.block_resize(name, to, false).await;
        is_refused(&g, resize("nobody", size).await, NotFound, &["no node 'nobody'"]).await;
        let says = ["node 'n' has 32768 bytes", "with 512", "shrink=true"];
        is_refused(&g, resize("n", 512).await, InvalidInput, &says).await;
        let ro = json!({ "driver": "mem", "node-name": "ro", "read-only": true });
        g.blockdev_add(map(ro)).await.unwrap();
        let says = ["node 'ro' is read-only", "block_resize", "'resize'"];
        is_refused(&g, resize("ro", 2 * size).await, ReadOnly, &says).await;
        let told_once = BackendOptions { fixed_size: true, ..reader() };
        let (nbd, _) = g.attach("f", "export 'nbd'", told_once).await.unwrap();
        let says = ["node 'f'", "block_resize", "'resize'", "export 'nbd'"];
        let filter = ["node 'n'", "block_resize", "'resize'", "'f.file' (node 'f'"];
        is_refused(&g, resize("n", 2 * size).await, InUse, &filter).await;
        is_refused(&g, resize("f", 2 * size).await, InUse, &says).await;
        g.detach(nbd).await.unwrap();
        let follow = BackendOptions { follow: Follow::Node, ..reader() };
        let (still, _) = g.attach("f", "export 'still'", follow).await.unwrap();
        let says = ["export 'still' follows node 'n'", "keeps its size"];
        is_refused(&g, resize("n", 2 * size).await, InUse, &says).await;
        g.detach(still).await.unwrap();
        add_mem(&g, "t", 64).await;
        // The job is on a filter that shows the node.
        let job = g.insert_job_filter("f", cbw("backup0", "t").0).await.unwrap();
        let says = ["node 'n' is being copied by job 'backup0'", "keeps its size"];
        is_refused(&g, resize("n", 2 * size).await, InUse, &says).await;
        let says = ["node 't'", "'resize'", "job 'backup0'"];
        is_refused(&g, resize("t", 2 * size).await, InUse, &says).await;
        g.remove_job_filter(&job).await.unwrap();
        let again = g.remove_job_filter(&job).await;
        is_refused(&g, again, NotFound, &["filter is gone already"]).await;
        quorum(&g).await;
        let says = ["node 'm1'", "'resize'", "'q.children.1'"];
        is_refused(&g, resize("m1", 2 * size).await, InUse, &says).await;
        is_refused(&g, resize("q", 2 * size).await, Unsupported, &["node 'q'", "resized"]).await;
        resize("n", 2 * size).await.unwrap();
    });
}

#[test]
fn what_a_mirror_replaces() {
    sim(2, async |g| {
        quorum(&g).await;
        for (name, blocks) in [("t", 64), ("big", 96), ("x", 64)] {
            add_mem(&g, name, blocks).await;
        }
        for n in ["o", "p"] {
            add_overlay(&g, n).await.unwrap();
        }
        g.blockdev_change("q", &ChildChange::Add("big".into())).await.unwrap();
        let r = start(&g, "m0", "q", "t", "nobody").await;
        is_refused(&g, r, NotFound, &["no node 'nobody'"]).await;
        let says = ["node 'x' cannot be replaced by a copy of node 'q'", "does not reach it"];
        is_refused(&g, start(&g, "m0", "q", "t", "x").await, InvalidInput, &says).await;
        // A target that is large enough for the source and too small for what it replaces.
        let job = start(&g, "m0", "q", "t", "big").await.unwrap();
        let says = ["node 't' has 32768 bytes", "less than the 49152 of node 'big'"];
        is_refused(&g, g.complete_job_filter(&job, "t").await, InvalidInput, &says).await;
        g.remove_job_filter(&job).await.unwrap();
        let job = start(&g, "m0", "q", "t", "m1").await.unwrap();
        // What leads to the node that is to be replaced rests.
        let says = ["edge 'q.children.1' is in use by job 'm0'"];
        is_refused(&g, start(&g, "m1", "q", "x", "m1").await, InUse, &says).await;
        let change = ChildChange::Remove("children.1".into());
        is_refused(&g, g.blockdev_change("q", &change).await, InUse, &says).await;
        is_refused(&g, g.blockdev_snapshot("m1", "p").await, InUse, &says).await;
        let f = json!({ "driver": "pass", "node-name": "f", "file": "m1" });
        g.blockdev_add(map(f)).await.unwrap();
        let edge = ReplaceEdges::Named("q.children.1".into());
        is_refused(&g, g.blockdev_replace(&edge, "f").await, InUse, &says).await;
        let r = g.transaction(vec![
            Action::Snapshot { disk: "q".into(), overlay: "o".into() },
            Action::Snapshot { disk: "m1".into(), overlay: "p".into() },
        ]);
        let says = ["action 2 (blockdev-snapshot)", says[0]];
        is_refused(&g, r.await, InUse, &says).await;
        // The target's other client.
        let alone = BackendOptions { alone: true, ..reader() };
        g.attach("x", "export 'alone'", alone).await.unwrap();
        let says = ["conflict on node 'x'", "'write'", "export 'alone'"];
        is_refused(&g, g.complete_job_filter(&job, "x").await, InUse, &says).await;
        // An overlay on the source: the node is no more reached through filters and quorums only.
        g.blockdev_snapshot("q", "o").await.unwrap();
        let says = ["node 'm1' cannot be replaced by a copy of node 'o'", "does not reach it"];
        is_refused(&g, g.complete_job_filter(&job, "t").await, InvalidInput, &says).await;
        g.remove_job_filter(&job).await.unwrap();
        g.blockdev_change("q", &change).await.unwrap();
    });
}

#[test]
fn nodes_and_files() {
    sim(3, async |g| {
        add_overlay(&g, "n").await.unwrap();
        add_mem(&g, "m", 64).await;
        let (_, b) = g.attach("m", "export 'w'", writer()).await.unwrap();
        let o = json!({ "driver": "overlay", "node-name": "x", "file": "m", "backing": null });
        let says = ["node 'm'", "'write'", "export 'w'", "'x.file'"];
        is_refused(&g, g.blockdev_add(map(o)).await, InUse, &says).await;
        drop(b);
        // All that use a node are named.
        for client in ["export 'a'", "export 'b'"] {
            g.attach("n", client, reader()).await.unwrap();
        }
        let f = json!({ "driver": "pass", "node-name": "f", "file": "n" });
        g.blockdev_add(map(f)).await.unwrap();
        let job = g.insert_job_filter("n", cbw("backup0", "f").0).await;
        is_refused(&g, job, InUse, &["target 'f' stands on node 'n'"]).await;
        add_mem(&g, "t", 64).await;
        g.insert_job_filter("n", cbw("backup0", "t").0).await.unwrap();
        let says = ["node 'n'", "export 'a'", "export 'b'", "node 'f'", "job 'backup0'"];
        is_refused(&g, g.blockdev_del("n").await, InUse, &says).await;
        is_refused(&g, g.blockdev_del("t").await, InUse, &["node 't'", "job 'backup0'"]).await;
        let sync = SnapshotSync {
            disk: "n".into(),
            file: "there.img".into(),
            node_name: Some("o".into()),
            format: "overlay".into(),
            existing: false,
        };
        g.blockdev_snapshot_sync(&sync).await.unwrap();
        let again = SnapshotSync { node_name: Some("p".into()), disk: "o".into(), ..sync };
        let r = g.blockdev_snapshot_sync(&again).await;
        is_refused(&g, r, Exists, &["overlay of 'o'", "there.img"]).await;
        let reopen = |o: serde_json::Value| g.blockdev_reopen(vec![map(o)]);
        let cache = json!({
            "driver": "mem", "node-name": "m", "size": 64 * BLOCK, "cache": { "direct": true }
        });
        let r = reopen(cache).await;
        is_refused(&g, r, Unsupported, &["node 'm'", "'cache'", "cannot be changed"]).await;
        let ro = json!({
            "driver": "mem", "node-name": "m", "size": 64 * BLOCK, "read-only": true
        });
        let e = reopen(ro).await.unwrap_err().to_string();
        assert!(e.contains("node 'm'"), "{e}");
    });
}

#[test]
fn backends_and_media() {
    sim(4, async |g| {
        let cd = BackendOptions { name: Some("cd".into()), removable: true, ..writer() };
        add_overlay(&g, "n").await.unwrap();
        let id = g.backend_add(cd.clone(), Some("n")).await.unwrap();
        let r = g.backend_add(cd, None).await;
        is_refused(&g, r, Exists, &["there is a backend 'cd' already"]).await;
        let r = add_overlay(&g, "cd").await;
        is_refused(&g, r, Exists, &["there is a backend 'cd' already"]).await;
        let medium = |file: &str| Medium {
            filename: file.into(),
            format: Some("overlay".into()),
            read_only: ReadOnlyMode::Retain,
        };
        let r = g.change_medium(id, &medium("missing.img"), false).await;
        is_refused(&g, r, NotFound, &["new medium 'missing.img'", "no such file"]).await;
        let edge = ReplaceEdges::Named("cd.root".into());
        add_overlay(&g, "other").await.unwrap();
        let says = ["node 'other' shows the data of 'other', not of 'n'", "change of medium"];
        is_refused(&g, g.blockdev_replace(&edge, "other").await, InvalidInput, &says).await;
        g.eject(id, false).await.unwrap();
        let says = ["edge 'cd.root' leads to no node", "insert a medium"];
        is_refused(&g, g.blockdev_replace(&edge, "n").await, ErrorKind::NoMedium, &says).await;
        add_overlay(&g, "o").await.unwrap();
        let says = ["backend 'cd' has no medium"];
        is_refused(&g, g.blockdev_snapshot("cd", "o").await, ErrorKind::NoMedium, &says).await;
    });
}

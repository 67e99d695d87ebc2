//! The implicit throttle of a backend (mutators.md, row block_set_io_throttle), in the simulated
//! world.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use crate::common::steps::{read_byte, reader, sim, write_byte, writer};
use crate::common::{BLOCK, add_overlay, picture};
use gipfel_base::ErrorKind;
use gipfel_graph::{Backend, BackendOptions, Graph, ZeroDetection};
use gipfel_io::time::{Instant, sleep};
use gipfel_io::{Buf, Task, spawn_local};

/// The nodes below a backend, topmost first, without the numbers of implicit ones.
async fn stack(g: &Rc<Graph>, backend: &str) -> Vec<String> {
    let lines = picture(g).await;
    let mut names = Vec::new();
    let mut at = format!("{backend}.root");
    while let Some(n) = lines.iter().find_map(|l| l.strip_prefix(&format!("{at} -> "))) {
        names.push(n.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned());
        at = format!("{n}.file");
    }
    names
}

#[test]
fn the_throttle_is_topmost_whenever_it_was_made() {
    sim(1, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let filters =
            BackendOptions { copy_on_read: true, detect_zeroes: ZeroDetection::On, ..writer() };
        let with = BackendOptions {
            name: Some("vm0".into()),
            throttle: Some("g".into()),
            ..filters.clone()
        };
        let (first, _) = g.attach("n", "device 'a'", with).await.unwrap();
        let whole = ["#throttle", "#copy-on-read", "#detect-zeroes", "n", "#block"];
        assert_eq!(stack(&g, "vm0").await, whole);
        // Beside copy-on-read nobody else may write.
        g.detach(first).await.unwrap();
        let without = BackendOptions { name: Some("vm1".into()), ..filters };
        let (id, _) = g.attach("n", "device 'b'", without).await.unwrap();
        assert_eq!(stack(&g, "vm1").await, whole[1..]);
        let before = picture(&g).await;
        g.set_throttle(id, Some("g")).await.unwrap();
        assert_eq!(stack(&g, "vm1").await, whole);
        assert_eq!(g.throttle_of(id).await.unwrap(), (Some("g".into()), "vm1".into()));
        g.set_throttle(id, Some("h")).await.unwrap();
        assert_eq!(stack(&g, "vm1").await, whole);
        // A snapshot goes in below.
        add_overlay(&g, "o").await.unwrap();
        g.blockdev_snapshot("n", "o").await.unwrap();
        assert_eq!(stack(&g, "vm1").await[..4], [whole[0], whole[1], whole[2], "o"]);
        g.set_throttle(id, None).await.unwrap();
        assert_eq!(stack(&g, "vm1").await[..3], [whole[1], whole[2], "o"]);
        assert!(before.iter().all(|l| !l.contains("vm1.root -> #throttle")));
    });
}

#[test]
fn it_stays_with_a_backend_without_filters_or_medium() {
    sim(2, async |g| {
        let own = BackendOptions { name: Some("b0".into()), ..writer() };
        g.backend_add(own, None).await.unwrap();
        let before = picture(&g).await;
        let id = g.throttled_backend("b0").await.unwrap();
        g.set_throttle(id, Some("g")).await.unwrap();
        assert_eq!(stack(&g, "b0").await, ["#throttle"]);
        g.set_throttle(id, None).await.unwrap();
        assert_eq!(picture(&g).await, before);
        g.backend_del("b0").await.unwrap();
        assert!(picture(&g).await.is_empty());
    });
}

#[test]
fn refusals_name_what_to_do_and_change_nothing() {
    sim(3, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let (id, _) = g.attach("n", "export 'e'", writer()).await.unwrap();
        let before = picture(&g).await;
        let e = g.throttled_backend("n").await.unwrap_err();
        assert!(e.to_string().contains("throttle node"), "{e}");
        let e = g.throttled_backend("nobody").await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NotFound);
        let e = g.set_throttle(id, Some("none")).await.unwrap_err();
        assert!(e.to_string().contains("no group 'none'"), "{e}");
        assert_eq!(picture(&g).await, before);
        g.detach(id).await.unwrap();
        let e = g.set_throttle(id, Some("g")).await.unwrap_err();
        assert_eq!(e.kind(), ErrorKind::NotFound);
    });
}

#[test]
fn a_writer_does_not_notice() {
    for seed in 0..20 {
        sim(seed, async |g| {
            add_overlay(&g, "n").await.unwrap();
            let (id, disk) = g.attach("n", "export 'e'", writer()).await.unwrap();
            let ended = Rc::new(Cell::new(false));
            let (d, stop) = (disk.clone(), ended.clone());
            let writing = spawn_local(async move {
                let mut n = 0u64;
                while !stop.get() {
                    n += 1;
                    let at = n % 64 * BLOCK;
                    let bytes = [n as u8; BLOCK as usize];
                    d.write(at, Buf::from_slice(&bytes), false).await.unwrap();
                    let back = Buf::new(BLOCK as usize);
                    d.read(at, back.clone()).await.unwrap();
                    assert_eq!(back.to_vec(), bytes);
                }
                n
            });
            for group in [Some("g"), Some("h"), None].into_iter().cycle().take(30) {
                g.set_throttle(id, group).await.unwrap();
                gipfel_io::yield_now().await;
            }
            ended.set(true);
            assert!(writing.await > 0);
            g.detach(id).await.unwrap();
        });
    }
}

#[test]
fn edges_are_granted_what_the_graph_settled() {
    sim(5, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let (id, _) = g.attach("n", "export 'e'", writer()).await.unwrap();
        g.set_throttle(id, Some("g")).await.unwrap();
        let check = async || {
            let m = g.model().await;
            m.edges().for_each(|(_, e)| assert_eq!(e.live.granted(), e.perms.used, "{}", e.label));
            m.edges().filter(|(_, e)| e.perms.writes()).count()
        };
        assert_eq!(check().await, 3);
        g.detach(id).await.unwrap();
        assert_eq!(check().await, 0);
    });
}

/// Writes of one block each, and the numbers of those that have ended.
fn queue(disk: &Arc<Backend>, writes: u64) -> (Rc<RefCell<Vec<u64>>>, Vec<Task<()>>) {
    let ended = Rc::new(RefCell::new(Vec::new()));
    let tasks = (0..writes).map(|n| {
        let (d, ended) = (disk.clone(), ended.clone());
        spawn_local(async move {
            write_byte(&d, n * BLOCK, 1 + n as u8).await;
            ended.borrow_mut().push(n);
        })
    });
    let tasks = tasks.collect();
    (ended, tasks)
}

/// Rule 8: who sits in the queue is not in flight below; nobody waits for it, and none is let
/// through early. What comes out of it in the end is whole, and on the new node.
#[test]
fn a_queue_outlives_a_change_below_it() {
    sim(6, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let tight = BackendOptions { throttle: Some("tight".into()), ..writer() };
        let (_, disk) = g.attach("n", "export 'e'", tight).await.unwrap();
        let (ended, tasks) = queue(&disk, 30);
        sleep(Duration::from_millis(25)).await;
        let early = ended.borrow().len();
        assert!(early < 20, "{early} of 30 have passed already");
        add_overlay(&g, "o").await.unwrap();
        g.blockdev_snapshot("n", "o").await.unwrap();
        assert!(ended.borrow().len() <= early + 1, "the change let some through");
        for t in tasks {
            t.await;
        }
        assert_eq!(ended.borrow().len(), 30);
        let (_, old) = g.attach("n", "export 'old'", reader()).await.unwrap();
        for n in 0..30 {
            assert_eq!(read_byte(&disk, n * BLOCK).await, 1 + n as u8);
        }
        let late = *ended.borrow().last().unwrap();
        assert_eq!(read_byte(&old, late * BLOCK).await, 0, "what came late is not below");
    });
}

/// When the throttle itself goes, its queue goes on at once and loses nothing.
#[test]
fn a_queue_goes_on_when_its_throttle_goes() {
    sim(7, async |g| {
        add_overlay(&g, "n").await.unwrap();
        let tight = BackendOptions { throttle: Some("tight".into()), ..writer() };
        let (id, disk) = g.attach("n", "export 'e'", tight).await.unwrap();
        let (ended, tasks) = queue(&disk, 30);
        sleep(Duration::from_millis(25)).await;
        let began = Instant::now();
        g.set_throttle(id, None).await.unwrap();
        for t in tasks {
            t.await;
        }
        assert!(Instant::now() - began < Duration::from_millis(20), "nobody is held back any more");
        assert_eq!(ended.borrow().len(), 30);
        for n in 0..30 {
            assert_eq!(read_byte(&disk, n * BLOCK).await, 1 + n as u8);
        }
    });
}

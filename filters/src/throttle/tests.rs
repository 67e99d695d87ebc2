//! Properties of the throttle in simulated time: rates, bursts, turns, order, requests given up;
//! and one run on real threads.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use gipfel_base::ErrorKind;
use gipfel_io::sim::{Rng, World};
use gipfel_io::time::{Instant, sleep, timeout};
use gipfel_io::{Buf, Runtime, Task, spawn_local};
use gipfel_node::WriteFlags;
use serde_json::json;

use super::group::{Member, Way};
use super::{Groups, Limits, THROTTLE, ThrottleGroup};
use crate::testing::{BLOCK, overlay, stack};

fn limits(values: serde_json::Value) -> Limits {
    let mut l = Limits::default();
    l.update(values.as_object().unwrap()).unwrap();
    l
}

fn group(values: serde_json::Value) -> Arc<ThrottleGroup> {
    ThrottleGroup::new("g".into(), limits(values)).unwrap()
}

/// Starts `n` requests of `bytes` bytes at once; each calls `done` when it is let go.
fn flood(
    member: &Rc<Member>,
    way: Way,
    n: u64,
    bytes: u64,
    done: impl Fn(u64) + Clone + 'static,
) -> Vec<Task<()>> {
    let start = |i| {
        let (member, done) = (member.clone(), done.clone());
        spawn_local(async move {
            member.admit(way, bytes).await;
            done(i);
        })
    };
    (0..n).map(start).collect()
}

async fn all(tasks: Vec<Task<()>>) {
    for t in tasks {
        t.await;
    }
}

fn since(start: Instant) -> f64 {
    Instant::now().since(start).as_secs_f64()
}

fn near(value: f64, wanted: f64, within: f64, what: &str) {
    let ok = (value - wanted).abs() <= wanted * within;
    assert!(ok, "{what}: {value}, not {wanted} (within {within})");
}

#[test]
fn the_long_run_rate_is_the_limit() {
    for seed in 0..60 {
        World::new(seed).run(async move {
            let mut rng = Rng::new(seed);
            let rate = 10u64.pow(1 + rng.below(6) as u32) * (1 + rng.below(9));
            let way = if rng.one_in(2) { Way::Read } else { Way::Write };
            let own = if way == Way::Read { "read" } else { "write" };
            let direction = if rng.one_in(2) { "total" } else { own };
            let bytes = 512 * (1 + rng.below(64));
            let (l, unit) = match rng.below(3) {
                0 => (json!({ format!("iops-{direction}"): rate }), 1.0),
                // A request of so many bytes counts for each 4 KiB, and once at least.
                1 => (
                    json!({ format!("iops-{direction}"): rate, "iops-size": 4096 }),
                    (bytes as f64 / 4096.0).max(1.0),
                ),
                _ => (json!({ format!("bps-{direction}"): rate }), bytes as f64),
            };
            let member = Rc::new(group(l.clone()).join("m"));
            let n = 2000;
            let start = Instant::now();
            all(flood(&member, way, n, bytes, |_| ())).await;
            // At once: a tenth of a second's worth, and the request that overfills the bucket.
            let free = (rate as f64 / 10.0 / unit).floor() + 1.0;
            let wanted = (n as f64 - free) * unit / rate as f64;
            if wanted > 1e-3 {
                near(since(start), wanted, 0.01, &format!("seed {seed}, {l}"));
            }
        });
    }
}

#[test]
fn the_other_direction_is_not_limited() {
    World::new(1).run(async {
        let member = group(json!({ "iops-write": 1, "bps-write": 1 })).join("m");
        assert!(member.is_open(Way::Read) && !member.is_open(Way::Write));
        let total = group(json!({ "bps-total": 1 })).join("m");
        assert!(!total.is_open(Way::Read) && !total.is_open(Way::Write));
        // Reads go on while writes wait for their own limit.
        let g = group(json!({ "iops-write": 1, "iops-read": 1000 }));
        let member = Rc::new(g.join("m"));
        let writes = flood(&member, Way::Write, 5, 1, |_| ());
        sleep(Duration::from_millis(1)).await;
        let start = Instant::now();
        all(flood(&member, Way::Read, 1101, 1, |_| ())).await;
        near(since(start), 1.0, 0.02, "reads");
        all(writes).await;
        near(since(start), 3.9, 0.02, "writes");
    });
}

#[test]
fn bursts_are_as_long_and_as_high_as_they_say() {
    World::new(2).run(async {
        // A second's burst comes at once, what follows at the average.
        let member = Rc::new(group(json!({ "iops-total": 100, "iops-total-max": 500 })).join("m"));
        let done = Rc::new(Cell::new(0u64));
        let count = done.clone();
        let flooding = flood(&member, Way::Read, 2000, 1, move |_| count.set(count.get() + 1));
        sleep(Duration::from_millis(1)).await;
        assert_eq!(done.get(), 501);
        sleep(Duration::from_secs(5)).await;
        near(done.get() as f64, 1001.0, 0.002, "after five seconds");
        drop(flooding);
        // A longer one goes at its own rate until what it may do in all is done.
        let l = json!({ "bps-write": 10, "bps-write-max": 100, "bps-write-max-length": 3 });
        let member = Rc::new(group(l).join("m"));
        let done = Rc::new(Cell::new(0u64));
        let count = done.clone();
        let flooding = flood(&member, Way::Write, 2000, 1, move |_| count.set(count.get() + 1));
        sleep(Duration::from_millis(1)).await;
        assert_eq!(done.get(), 11, "a tenth of a second of the burst");
        sleep(Duration::from_secs(3)).await;
        near(done.get() as f64, 311.0, 0.01, "after three seconds");
        // What leaked meanwhile prolongs it a little: 300 / (100 - 10) seconds in all.
        sleep(Duration::from_secs(10)).await;
        near(done.get() as f64, 301.0 + 130.0, 0.02, "after thirteen seconds");
        drop(flooding);
    });
}

#[test]
fn members_and_directions_take_turns() {
    for seed in 0..20 {
        World::new(seed).run(async move {
            let g = group(json!({ "iops-total": 1000 }));
            let order: Rc<RefCell<Vec<usize>>> = Rc::default();
            let mut tasks = Vec::new();
            for (m, n) in [300, 400, 500, 600].into_iter().enumerate() {
                let (member, order) = (Rc::new(g.join("m")), order.clone());
                let way = if m == 3 { Way::Write } else { Way::Read };
                tasks.extend(flood(&member, way, n, 1, move |_| order.borrow_mut().push(m)));
            }
            all(tasks).await;
            // The first hundred go as they come; then all wait, and take turns.
            let mut seen = [0u64; 4];
            for m in &order.borrow()[110..600] {
                seen[*m] += 1;
                let reads = &seen[..3];
                let spread = reads.iter().max().unwrap() - reads.iter().min().unwrap();
                assert!(spread <= 1, "seed {seed}: members {seen:?}");
                let ways = seen[3].abs_diff(reads.iter().sum());
                assert!(ways <= 1, "seed {seed}: directions {seen:?}");
            }
        });
    }
}

#[test]
fn each_member_keeps_its_order() {
    for seed in 0..20 {
        World::new(seed).run(async move {
            let g = group(json!({ "bps-total": 1 << 20 }));
            let mut rng = Rng::new(seed);
            let mut tasks = Vec::new();
            for m in 0..3u64 {
                let member = Rc::new(g.join("m"));
                let (asked, gone) = (Rc::new(Cell::new(0u64)), Rc::new(Cell::new(0u64)));
                for _ in 0..100 {
                    let (member, asked, gone) = (member.clone(), asked.clone(), gone.clone());
                    // More than the bucket holds: one goes in each step.
                    let bytes = 105_000 + rng.below(100_000);
                    tasks.push(spawn_local(async move {
                        let mine = asked.replace(asked.get() + 1);
                        member.admit(Way::Read, bytes).await;
                        let turn = gone.replace(gone.get() + 1);
                        assert_eq!(turn, mine, "seed {seed}, member {m}");
                    }));
                }
            }
            all(tasks).await;
        });
    }
}

#[test]
fn requests_given_up_leave_the_others_their_turns() {
    for seed in 0..60 {
        World::new(seed).run(async move {
            let g = group(json!({ "iops-total": 1000 }));
            let mut rng = Rng::new(seed);
            let done = Rc::new(Cell::new(0u64));
            let members: Vec<_> = (0..3).map(|_| Rc::new(g.join("m"))).collect();
            let start = Instant::now();
            let tasks: Vec<_> = (0..900)
                .map(|i| {
                    let (member, done) = (members[i % 3].clone(), done.clone());
                    let patience = rng.one_in(2).then(|| Duration::from_micros(rng.below(600_000)));
                    let way = if rng.one_in(3) { Way::Write } else { Way::Read };
                    spawn_local(async move {
                        let gone = match patience {
                            Some(p) => timeout(p, member.admit(way, 1)).await.is_some(),
                            None => {
                                member.admit(way, 1).await;
                                true
                            }
                        };
                        done.set(done.get() + u64::from(gone));
                    })
                })
                .collect();
            all(tasks).await;
            // Nobody is forgotten, and no turn is lost to one who left.
            let wanted = (done.get() as f64 - 101.0) / 1000.0;
            near(since(start), wanted, 0.02, &format!("seed {seed}"));
        });
    }
}

#[test]
fn new_limits_hold_at_once_for_those_who_wait() {
    World::new(4).run(async {
        let g = group(json!({ "iops-total": 1 }));
        let member = Rc::new(g.join("m"));
        let start = Instant::now();
        let waiting = flood(&member, Way::Write, 1101, 1, |_| ());
        sleep(Duration::from_millis(500)).await;
        g.set_limits(limits(json!({ "iops-total": 1000 }))).unwrap();
        all(waiting).await;
        near(since(start), 1.5, 0.01, "faster");
        let start = Instant::now();
        let waiting = flood(&member, Way::Write, 1101, 1, |_| ());
        sleep(Duration::from_millis(1)).await;
        g.set_limits(Limits::default()).unwrap();
        all(waiting).await;
        assert!(since(start) < 0.002, "no limit");
        assert!(member.is_open(Way::Write));
        // A refused change changes nothing.
        let e = g.set_limits(limits(json!({ "iops-total": 1, "iops-read": 1 }))).unwrap_err();
        assert!(e.to_string().contains("'iops-total'"), "{e}");
        assert!(g.limits().is_unlimited());
        // A debt under an old limit is not paid under a new one.
        g.set_limits(limits(json!({ "bps-total": 1_000_000 }))).unwrap();
        member.admit(Way::Read, 1_000_000_000).await;
        g.set_limits(limits(json!({ "bps-total": 1000 }))).unwrap();
        let start = Instant::now();
        member.admit(Way::Read, 1).await;
        assert!(since(start) < 0.01);
    });
}

#[test]
fn who_waits_is_above_the_filter_only() {
    World::new(5).run(async {
        let groups = Groups::new();
        let g = groups.create("g", limits(json!({ "iops-total": 10 }))).unwrap();
        let (disk, seen) = overlay("disk", 64 * BLOCK, None, 1000);
        let (root, edge) = stack(&THROTTLE, Some(disk), |c| groups.make(c, "g", "client").unwrap());
        let write = |_| {
            let root = root.clone();
            spawn_local(async move {
                let b = Buf::from_slice(&[1; BLOCK as usize]);
                root.write(0, b, WriteFlags::default()).await.unwrap();
            })
        };
        let tasks: Vec<_> = (0..12).map(write).collect();
        sleep(Duration::from_millis(1)).await;
        assert_eq!(seen.count(|s| &s.writes), 2);
        // Below: nobody waits for the queue, and nobody is let through early.
        let start = Instant::now();
        let drained = edge.drain().await;
        assert!(since(start) < 0.001);
        assert_eq!(seen.count(|s| &s.writes), 2);
        sleep(Duration::from_millis(500)).await;
        assert_eq!(seen.count(|s| &s.writes), 2, "let go, and waiting at the closed edge");
        drop(drained);
        sleep(Duration::from_millis(1)).await;
        assert_eq!(seen.count(|s| &s.writes), 7);
        // Above: they go at once, since somebody waits for them, and those who come later pay.
        let start = Instant::now();
        drop(root.drain().await);
        assert!(since(start) < 0.001);
        assert_eq!(seen.count(|s| &s.writes), 12);
        all(tasks).await;
        let start = Instant::now();
        write(0).await;
        near(since(start), 0.6, 0.02, "the debt");
        assert_eq!(g.members(), ["client"]);
    });
}

#[test]
fn groups_have_names_and_members() {
    World::new(6).run(async {
        let groups = Groups::new();
        let e = groups.get("g").err().unwrap();
        assert_eq!(e.kind(), ErrorKind::NotFound);
        groups.create("g", Limits::default()).unwrap();
        assert_eq!(groups.create("g", Limits::default()).err().unwrap().kind(), ErrorKind::Exists);
        let (root, _) = stack(&THROTTLE, None, |c| groups.make(c, "g", "export 'e'").unwrap());
        let e = groups.remove("g").unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InUse);
        assert!(e.to_string().contains("export 'e'"), "{e}");
        root.node().await.unwrap().driver().close().await.unwrap();
        groups.remove("g").unwrap();
        // A group made for a client goes with it.
        let (other, _) = stack(&THROTTLE, None, |c| groups.make(c, "own", "backend 'b'").unwrap());
        groups.get("own").unwrap().set_limits(limits(json!({ "iops-total": 1 }))).unwrap();
        drop(other);
        assert!(groups.get("own").is_err());
    });
}

#[test]
fn contradictions_are_named() {
    for (values, says) in [
        (json!({ "iops-total": 1, "iops-write": 1 }), "'iops-total' and 'iops-read' or"),
        (json!({ "bps-read-max": 1 }), "'bps-read-max' needs 'bps-read'"),
        (json!({ "bps-read": 2, "bps-read-max": 1 }), "is below 'bps-read'"),
        (json!({ "bps-read": 2, "bps-read-max-length": 2 }), "needs 'bps-read-max'"),
        (json!({ "bps-read-max-length": 0 }), "at least 1"),
        (json!({ "bps-total": 1_000_000_000_000_001u64 }), "at most 1000000000000000"),
        (
            json!({ "iops-read": 1, "iops-read-max": 1u64 << 40, "iops-read-max-length": 1001 }),
            "times",
        ),
        (json!({ "iops-size": 512, "bps-total": 1 }), "'iops-size' needs"),
    ] {
        let e = limits(values).check().unwrap_err().to_string();
        assert!(e.contains(says), "'{e}' does not say '{says}'");
    }
    let l = limits(json!({ "iops-size": 7, "iops-write": 5, "bps-total": 4 }));
    assert_eq!(limits(l.to_json().into()), l);
    assert_eq!(Limits::names().count(), 19);
    assert!(Limits::default().update(json!({ "iops": 1 }).as_object().unwrap()).is_err());
}

#[test]
fn no_wake_up_is_lost_between_threads() {
    const THREADS: usize = 4;
    const EACH: u64 = 3000;
    let runtime = Runtime::new(THREADS).unwrap();
    let done = Arc::new(AtomicU64::new(0));
    let spent = runtime
        .block_on(async {
            let g = group(json!({ "iops-total": 40_000 }));
            let shared = Arc::new(g.join("shared"));
            let start = Instant::now();
            let threads: Vec<_> = runtime
                .io_threads()
                .into_iter()
                .enumerate()
                .map(|(t, handle)| {
                    let (g, shared, done) = (g.clone(), shared.clone(), done.clone());
                    handle.spawn(move || async move {
                        let own = Arc::new(g.join("own"));
                        let mut rng = Rng::new(t as u64);
                        let mut tasks = Vec::new();
                        for i in 0..EACH {
                            let m = if i % 2 == 0 { own.clone() } else { shared.clone() };
                            let (done, patience) = (done.clone(), rng.below(100_000));
                            let way = if rng.one_in(2) { Way::Read } else { Way::Write };
                            let gives_up = rng.one_in(3);
                            tasks.push(spawn_local(async move {
                                if gives_up {
                                    let p = Duration::from_micros(patience);
                                    let _ = timeout(p, m.admit(way, 1)).await;
                                }
                                m.admit(way, 1).await;
                                done.fetch_add(1, Ordering::SeqCst);
                            }));
                        }
                        for t in tasks {
                            t.await;
                        }
                    })
                })
                .collect();
            for t in threads {
                t.await.unwrap();
            }
            since(start)
        })
        .unwrap();
    assert_eq!(done.load(Ordering::SeqCst), THREADS as u64 * EACH);
    // Those who gave up in vain counted nothing; those who were let go first count twice.
    assert!((0.18..4.0).contains(&spent), "{spent} s");
}

//! Random graphs, random changes, random failures of what prepares them, clients at work all the
//! time. After every step the graph, its permissions and what was quiesced are compared with the
//! oracle; clients check what they read, and at the end nothing is left (`common/stage.rs`).
//!
//! `GIPFEL_SEED` runs one history, `GIPFEL_SOAK=1` many more.

use std::cell::RefCell;

use crate::common::caught;
use crate::common::lab::{Call, SIZE};
use crate::common::mutate::*;
use crate::common::notation::{Door, NodeSketch, Sketch};
use crate::common::oracle::{data_of, has_cycle, permissions, reaches, showing_below};
use crate::common::stage::{Outcome, Stage};
use gipfel_graph::{ChildChange, ReplaceEdges};
use gipfel_io::sim::{Rng, World};

/// Histories of the ordinary run.
const HISTORIES: u64 = 10_000;
/// Test functions that share them, so that they run side by side.
const PARTS: u64 = 4;

fn pick<'a, T>(rng: &mut Rng, of: &'a [T]) -> Option<&'a T> {
    (!of.is_empty()).then(|| &of[rng.below(of.len() as u64) as usize])
}

/// A name that begins so and is not taken.
fn fresh(s: &Sketch, letter: &str) -> String {
    let taken = |n: &String| s.nodes.contains_key(n) || s.doors.contains_key(n);
    (0..).map(|i| format!("{letter}{i}")).find(|n| !taken(n)).unwrap()
}

fn random_door(s: &Sketch, rng: &mut Rng) -> Door {
    let filters = ["thr", "cor", "dz"].into_iter().filter(|_| rng.one_in(3)).map(str::to_owned);
    let filters = filters.collect();
    let along = rng.one_in(2);
    let follows_node = rng.one_in(4);
    Door {
        filters,
        to: random_node(s, rng).filter(|_| along || !rng.one_in(8)),
        // Those who follow a node rather look than write.
        writes: rng.one_in(if follows_node { 5 } else { 2 }),
        follows_node,
        along,
        client: along || !rng.one_in(4),
        tray: None,
        resizes: false,
    }
}

/// A node with a name of its own.
fn random_node(s: &Sketch, rng: &mut Rng) -> Option<String> {
    let named: Vec<_> = s.nodes.keys().filter(|n| !Sketch::is_anonymous(n)).collect();
    pick(rng, &named).map(|n| (*n).clone())
}

/// A node that `fits`, mostly; now and then any.
fn likely_node(s: &Sketch, rng: &mut Rng, fits: impl Fn(&str) -> bool) -> Option<String> {
    let named = s.nodes.keys().filter(|n| !Sketch::is_anonymous(n) && fits(n));
    let named: Vec<_> = named.collect();
    if named.is_empty() || rng.one_in(6) {
        return random_node(s, rng);
    }
    pick(rng, &named).map(|n| (*n).clone())
}

/// A graph to begin with: a few nodes on each other, and backends as far as they get along.
fn random_graph(rng: &mut Rng) -> Sketch {
    let mut s = Sketch::default();
    for _ in 0..2 + rng.below(4) {
        let add = random_add(&s, rng);
        let _ = add.next(&mut s);
    }
    for _ in 0..1 + rng.below(3) {
        let mut with = s.clone();
        let mut d = random_door(&s, rng);
        d.tray = (!d.along && rng.one_in(3)).then_some(d.to.is_none());
        with.doors.insert(fresh(&s, "b"), d);
        if permissions(&with).is_ok() {
            s = with;
        }
    }
    s
}

fn random_add(s: &Sketch, rng: &mut Rng) -> Add {
    let letter = *pick(rng, &["o", "o", "o", "o", "t", "f", "f", "m", "m", "q"]).unwrap();
    let name = match rng.one_in(20) {
        true => random_node(s, rng).unwrap_or_else(|| fresh(s, letter)),
        false => fresh(s, letter),
    };
    let overlay = NodeSketch::new(&name).driver == "overlay";
    let bare = overlay && !rng.one_in(3);
    let on = random_node(s, rng).filter(|_| !bare && !name.starts_with('m'));
    if on.is_none() && name.starts_with('q') {
        return random_add(s, rng);
    }
    Add { name, on, zeroes: rng.one_in(4), read_only: rng.one_in(12) }
}

fn random_snapshot(s: &Sketch, rng: &mut Rng) -> Option<Snapshot> {
    let doors: Vec<_> = s.doors.keys().collect();
    let disk = match rng.one_in(3) {
        true => (*pick(rng, &doors)?).clone(),
        false => likely_node(s, rng, |n| !s.users(n).is_empty())?,
    };
    if rng.one_in(4) {
        let overlay = fresh(s, "o");
        let sync = Some(format!("{overlay}.{}.img", rng.next_u64()));
        return Some(Snapshot { disk, overlay, sync });
    }
    let free = |n: &str| {
        let node = &s.nodes[n];
        let empty = node.driver == "overlay" && !n.starts_with('t');
        empty && node.child("backing").is_none() && s.users(n).is_empty()
    };
    // What a job copied to is no empty overlay.
    let overlay = likely_node(s, rng, free).filter(|o| !o.starts_with('t'))?;
    Some(Snapshot { disk, overlay, sync: None })
}

fn random_replace(s: &Sketch, rng: &mut Rng) -> Option<Replace> {
    // Those of jobs have names that nobody knows.
    let known = |l: &str| !l.contains(".file.") && !l.contains(['/', '~']);
    let edges: Vec<_> = s.links().into_iter().filter(|l| known(&l.0)).collect();
    let (edge, to) = pick(rng, &edges)?.clone();
    let same = |n: &str| to.as_ref().is_some_and(|t| data_of(s, t) == data_of(s, n));
    let with = likely_node(s, rng, |n| same(n) && Some(n) != to.as_deref())?;
    let node = to.filter(|t| !Sketch::is_anonymous(t));
    let edges = match (rng.below(4), node) {
        (0, Some(n)) => ReplaceEdges::AllOf(n),
        (1, Some(n)) => ReplaceEdges::OnlyOf(n),
        _ => ReplaceEdges::Named(edge),
    };
    Some(Replace { edges, with })
}

fn random_reopen(s: &Sketch, rng: &mut Rng) -> Option<Reopen> {
    let mut list: Vec<ReopenOne> = Vec::new();
    for _ in 0..1 + rng.below(3) {
        let node = random_node(s, rng)?;
        let n = &s.nodes[&node];
        let seen = s.doors.values().any(|d| d.to.as_ref().is_some_and(|t| reaches(s, t, &node)));
        let mut children = Vec::new();
        if let Some((c, now)) = pick(rng, &n.children).filter(|c| c.0.len() < 9 && rng.one_in(2)) {
            // What clients see stays the same: other bytes would be a change of medium.
            let same =
                |t: &str| !seen || now.as_ref().is_some_and(|o| data_of(s, o) == data_of(s, t));
            let to = match c.as_str() {
                "backing" if !seen && rng.one_in(3) => None,
                _ => Some(likely_node(s, rng, same)?),
            };
            if to.as_ref().is_none_or(|t| same(t)) {
                children.push((c.clone(), to));
            }
        }
        let zeroes = n.zeroes != rng.one_in(2);
        if rng.one_in(20) || !list.iter().any(|r| r.node == node) {
            list.push(ReopenOne { node, zeroes, children });
        }
    }
    Some(Reopen(list))
}

fn random_media(s: &Sketch, rng: &mut Rng) -> Option<Media> {
    let trays: Vec<_> = s.doors.iter().filter(|d| d.1.tray.is_some()).map(|d| d.0).collect();
    let door = (*pick(rng, &trays)?).clone();
    let what = match (rng.below(5), s.doors[&door].tray) {
        (0, _) => Tray::Eject,
        (1, _) => Tray::Remove,
        (2, Some(false)) | (3, _) => Tray::Open,
        (2, _) => Tray::Insert(random_node(s, rng)?),
        _ if s.doors[&door].to.is_none() => Tray::Insert(random_node(s, rng)?),
        _ => Tray::Close,
    };
    Some(Media { door, what })
}

fn random_child(s: &Sketch, rng: &mut Rng) -> Option<ChangeChild> {
    let parent = likely_node(s, rng, |n| s.nodes[n].driver == "fan")?;
    let n = &s.nodes[&parent];
    let change = match n.children.iter().skip(1).next_back() {
        // What is read is the first, and a new one holds nothing yet.
        Some((c, _)) if rng.one_in(2) => ChildChange::Remove(c.clone()),
        _ => ChildChange::Add(likely_node(s, rng, |m| s.users(m).is_empty())?),
    };
    Some(ChangeChild { parent, change })
}

fn random_resize(s: &Sketch, rng: &mut Rng) -> Option<Resize> {
    let nodes = likely_node(s, rng, |n| !s.users(n).is_empty())?;
    let doors: Vec<_> = s.doors.keys().cloned().collect();
    let disk = pick(rng, &doors).filter(|_| rng.one_in(3)).cloned().unwrap_or(nodes);
    let node = s.doors.get(&disk).map_or(Some(&disk), |d| d.to.as_ref())?;
    // What has copies cannot be resized, and says so late.
    (s.nodes[data_of(s, node)].driver != "fan").then_some(())?;
    let size = SIZE + rng.below(3) * SIZE / 2;
    Some(Resize { disk, size, shrink: rng.one_in(2) })
}

fn random_job(s: &Sketch, rng: &mut Rng) -> Option<Box<dyn Mutator>> {
    let jobs: Vec<_> = s.jobs().collect();
    if jobs.len() == 2 || !jobs.is_empty() && rng.one_in(2) {
        let j = pick(rng, &jobs)?;
        // What a job is to replace, the graph says only by the edges that rest.
        let replaced = j.frozen.first().and_then(|l| s.links().into_iter().find(|x| x.0 == *l));
        return Some(match j.mirror && !rng.one_in(3) && !Sketch::is_anonymous(&j.target) {
            true => boxed(JobComplete {
                id: j.id.clone(),
                target: j.target.clone(),
                replaces: replaced.and_then(|l| l.1),
            }),
            false => boxed(JobEnd(j.id.clone())),
        });
    }
    let id = ["j0", "j1"].into_iter().find(|i| jobs.iter().all(|j| j.id != *i))?.to_owned();
    let disk = likely_node(s, rng, |n| !s.users(n).is_empty())?;
    let target = likely_node(s, rng, |n| n.starts_with('t') && s.users(n).is_empty())?;
    let target = Some(target).filter(|t| t.starts_with('t'))?;
    let mirror = rng.one_in(2);
    let below = |n: &str| n != disk && showing_below(s, &disk).contains(n);
    let replaces = likely_node(s, rng, below).filter(|_| mirror && rng.one_in(3));
    // Without an edge that rests for it, nothing would say what is to be replaced.
    let replaces = replaces.filter(|r| r != &disk);
    Some(boxed(JobStart { id, mirror, disk, target, replaces }))
}

fn boxed(m: impl Mutator + 'static) -> Box<dyn Mutator> {
    Box::new(m)
}

/// A change that may make sense on `s`.
fn random_change(s: &Sketch, rng: &mut Rng) -> Option<Box<dyn Mutator>> {
    let doors: Vec<String> = s.doors.keys().cloned().collect();
    let door = pick(rng, &doors).cloned();
    Some(match rng.below(25) {
        0..=2 => boxed(random_add(s, rng)),
        3..=6 => boxed(random_snapshot(s, rng)?),
        7..=9 => boxed(random_replace(s, rng)?),
        10 | 11 => boxed(random_reopen(s, rng)?),
        12 => {
            let group = *pick(rng, &[None, Some("thr"), Some("lim"), Some("none")])?;
            let door = door.filter(|_| !rng.one_in(10)).or_else(|| random_node(s, rng))?;
            boxed(Throttle { door, group })
        }
        13 => {
            // To a backend that is made first its client comes by itself.
            let d = random_door(s, rng);
            boxed(AddDoor(fresh(s, "b"), Door { client: d.along, ..d }))
        }
        14 => {
            let door = door?;
            match &s.doors[&door] {
                d if d.client && rng.one_in(2) => boxed(Detach(door)),
                d if d.along => return None,
                _ if rng.one_in(2) => boxed(DelDoor(door)),
                _ => boxed(Attach(door)),
            }
        }
        15 => boxed(Del(likely_node(s, rng, |n| s.users(n).is_empty())?)),
        16 | 17 => boxed(random_media(s, rng)?),
        18 | 19 => boxed(random_child(s, rng)?),
        20 | 21 => boxed(random_resize(s, rng)?),
        _ => random_job(s, rng)?,
    })
}

/// Runs the history; `told` gets each step.
fn history(seed: u64, steps: &[u64], told: &RefCell<Vec<String>>) -> [u64; 3] {
    World::new(seed).run(async {
        let mut rng = Rng::new(seed);
        let graph = random_graph(&mut rng).to_string();
        told.borrow_mut().push(graph.clone());
        let stage = Stage::build(&graph, seed, file_options(rng.one_in(2))).await;
        let mut outcomes = [0; 3];
        for roll in steps {
            let mut rng = Rng::new(*roll);
            let s = stage.sketch().await;
            let Some(m) = random_change(&s, &mut rng) else { continue };
            let call = *pick(&mut rng, &[Call::Open, Call::Flush, Call::SetPerms]).unwrap();
            let fault = rng.one_in(4).then(|| (call, rng.below(3)));
            told.borrow_mut().push(format!("{m:?} {fault:?}"));
            let outcome = stage.change(&*m, fault).await;
            let now = stage.sketch().await;
            told.borrow_mut().push(format!("{outcome:?}\n{now}"));
            outcomes[match outcome {
                Outcome::Done => 0,
                Outcome::Refused => 1,
                Outcome::Failed => 2,
            }] += 1;
            if rng.one_in(2) {
                stage.work(1).await;
            }
        }
        stage.end().await;
        outcomes
    })
}

/// The shortest history that fails: steps are left out as long as it does.
fn shrink(seed: u64, mut steps: Vec<u64>) -> Vec<u64> {
    let mut at = 0;
    while at < steps.len() {
        let mut fewer = steps.clone();
        fewer.remove(at);
        if caught(|| history(seed, &fewer, &RefCell::default())).is_err() {
            (steps, at) = (fewer, 0);
        } else {
            at += 1;
        }
    }
    steps
}

fn one(seed: u64) -> [u64; 3] {
    let mut rng = Rng::new(seed ^ 0x5eed_0f57_e950_0000);
    let steps: Vec<u64> = (0..5 + rng.below(8)).map(|_| rng.next_u64()).collect();
    match caught(|| history(seed, &steps, &RefCell::default())) {
        Ok(outcomes) => outcomes,
        Err(first) => {
            let steps = shrink(seed, steps);
            let told = RefCell::default();
            let why = caught(|| history(seed, &steps, &told)).err().unwrap_or(first);
            println!("history GIPFEL_SEED={seed}:\n{}\n{why}", told.into_inner().join("\n"));
            panic!("the history of seed {seed} fails");
        }
    }
}

fn part(which: u64) {
    let given = std::env::var("GIPFEL_SEED").ok().and_then(|s| s.parse().ok());
    let (first, last) = match given {
        Some(seed) => (seed, seed + 1),
        None => {
            let more = if std::env::var_os("GIPFEL_SOAK").is_some() { 10 } else { 1 };
            let each = HISTORIES * more / PARTS;
            (which * each, (which + 1) * each)
        }
    };
    let mut outcomes = [0; 3];
    for seed in first..last {
        outcomes.iter_mut().zip(one(seed)).for_each(|(a, b)| *a += b);
    }
    let [done, refused, failed] = outcomes;
    println!(
        "{} histories: {done} changes done, {refused} refused, {failed} failed by injection",
        last - first
    );
}

#[test]
fn histories_first_quarter() {
    part(0);
}

#[test]
fn histories_second_quarter() {
    part(1);
}

#[test]
fn histories_third_quarter() {
    part(2);
}

#[test]
fn histories_fourth_quarter() {
    part(3);
}

#[test]
fn the_notation_reads_what_it_writes() {
    for seed in 0..500 {
        let s = random_graph(&mut Rng::new(seed));
        assert!(!has_cycle(&s));
        let text = s.to_string();
        let again = Sketch::parse(&text);
        assert_eq!(again, s, "seed {seed}:\n{text}\nread as\n{again}");
    }
}

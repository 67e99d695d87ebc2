//! Sizes and headers that change, with loss of power at every I/O.

use std::rc::Rc;

use gipfel_base::Result;
use gipfel_io::Buf;
use gipfel_io::sim::{Keep, Rng, World};
use gipfel_node::{BackingName, Child, Preallocation, WriteFlags};
use serde_json::{Value, json};

use super::disk::{check, close, create, open, shapes};
use super::model::{SECTOR, backing_tag, content};

const IMAGE: &str = "image";
const DATA: &str = "image.data";
const BASE: &str = "base";

/// What is done to an image.
#[derive(Clone, Debug)]
enum Change {
    Resize(u64),
    Empty,
    Rename(Option<BackingName>),
    Amend(Value),
}

struct Case {
    seed: u64,
    shape: Value,
    change: Change,
    /// Contents of every sector before, and of the base.
    before: Vec<u8>,
    base: Vec<u8>,
}

impl Case {
    fn new(seed: u64) -> Case {
        let mut rng = Rng::new(seed);
        let shapes = shapes();
        let mut shape = shapes[rng.below(shapes.len() as u64) as usize].clone();
        let size = shape["size"].as_u64().unwrap();
        let name = |rng: &mut Rng| BackingName {
            file: "n".repeat(1 + rng.below(300) as usize),
            format: rng.one_in(2).then(|| "raw".repeat(1 + rng.below(4) as usize)),
        };
        let raw = shape["data-file-raw"] == true;
        let change = match rng.below(if raw { 2 } else { 6 }) {
            0 => Change::Resize(rng.below(size / SECTOR) * SECTOR),
            1 => Change::Resize(size + rng.below(3 * size / SECTOR) * SECTOR),
            2 => Change::Empty,
            3 | 4 => Change::Rename((!rng.one_in(4)).then(|| name(&mut rng))),
            _ if shape["version"] == "v2" => Change::Amend(json!({ "version": "v3" })),
            _ if shape["refcount-bits"] == 16 => Change::Amend(json!({ "version": "v2" })),
            _ => Change::Amend(json!({ "lazy-refcounts": true })),
        };
        let has_base = !raw && rng.one_in(2) || matches!(change, Change::Empty | Change::Rename(_));
        if has_base {
            shape["backing-file"] = json!(BASE);
        }
        let base_sectors = if has_base { size / SECTOR * 5 / 4 + 1 } else { 0 };
        let mut base: Vec<u8> =
            (0..base_sectors).flat_map(|s| content(s, backing_tag(s))).collect();
        let mut before = base.clone();
        before.resize(size as usize, 0);
        for s in 0..size / SECTOR {
            if rng.one_in(3) {
                let tag = if rng.one_in(3) { 0 } else { 2 + rng.below(1000) };
                let at = (s * SECTOR) as usize;
                before[at..at + SECTOR as usize].copy_from_slice(&content(s, tag));
            }
        }
        if matches!(change, Change::Empty) {
            // As after a commit: the base shows the same.
            base[..size as usize].copy_from_slice(&before);
        }
        Case { seed, shape, change, before, base }
    }

    fn base_name(&self) -> Option<&str> {
        self.shape.get("backing-file").map(|_| BASE)
    }

    /// A world with the image, flushed and closed.
    fn world(&self) -> Rc<World> {
        let world = World::new(self.seed);
        world.put_file(BASE, self.base.clone());
        world.run(create(IMAGE, self.shape.clone()));
        world.run(async {
            let image = open(IMAGE, self.base_name(), json!({})).await.unwrap();
            let mut rng = Rng::new(self.seed);
            let mut at = 0;
            while at < self.before.len() {
                let len = (1 + rng.below(40) as usize) * SECTOR as usize;
                let part = &self.before[at..(at + len).min(self.before.len())];
                let zeros = part.iter().all(|b| *b == 0);
                if zeros && rng.one_in(2) {
                    let range = gipfel_base::ByteRange::new(at as u64, part.len() as u64);
                    image.write_zeroes(range, Default::default()).await.unwrap();
                } else {
                    let buf = Buf::from_slice(part);
                    image.write(at as u64, buf, WriteFlags::default()).await.unwrap();
                }
                at += part.len();
            }
            close(&image).await.unwrap();
        });
        let image = world.file(IMAGE).unwrap();
        world.put_file(IMAGE, image);
        if let Some(data) = world.file(DATA) {
            world.put_file(DATA, data);
        }
        world
    }

    async fn carry_out(&self) -> Result<()> {
        let image = open(IMAGE, self.base_name(), json!({})).await?;
        let node = image.node().await.unwrap();
        let format = node.driver().image_format().unwrap();
        match &self.change {
            Change::Resize(size) => node.driver().resize(*size).await?,
            Change::Empty => format.make_empty().await?,
            Change::Rename(b) => format.set_backing(b.clone()).await?,
            Change::Amend(o) => format.amend(o.clone(), &|_, _| ()).await?,
        }
        close(&image).await
    }

    /// The contents of the image, whatever its size, and the names in its header.
    async fn judge(&self, what: &str, done: bool) {
        let report = check(IMAGE).await.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(report.corruptions, 0, "{what}: {:#?}", report.findings);
        assert_eq!(report.check_errors, 0, "{what}: {:#?}", report.findings);
        if done {
            assert_eq!(report.leaks, 0, "{what}: {:#?}", report.findings);
        }
        let image = open(IMAGE, self.base_name(), json!({})).await.unwrap();
        let old = self.before.len();
        let size = image.size().await.unwrap() as usize;
        match self.change {
            Change::Resize(new) if done => assert_eq!(size as u64, new, "{what}"),
            Change::Resize(new) => assert!(size == old || size as u64 == new, "{what}: {size}"),
            _ => assert_eq!(size, old, "{what}"),
        }
        let now = read(&image, size).await;
        let (kept, lost) = match self.change {
            Change::Resize(new) if (new as usize) < old => (new as usize, true),
            _ => (old.min(size), false),
        };
        assert!(now[..kept] == self.before[..kept], "{what}: what stays has changed");
        if !lost {
            assert!(now[kept..].iter().all(|b| *b == 0), "{what}: what is new is not zeros");
        }
        self.judge_names(&image, what, done).await;
        // What was cut off does not come back.
        if done && lost {
            let node = image.node().await.unwrap();
            node.driver().resize(old as u64).await.unwrap();
            let now = read(&image, old).await;
            assert!(now[..kept] == self.before[..kept], "{what}: grown again");
            assert!(now[kept..].iter().all(|b| *b == 0), "{what}: old data came back");
        }
        close(&image).await.unwrap();
    }

    async fn judge_names(&self, image: &Child, what: &str, done: bool) {
        let info = image.node().await.unwrap().driver().info().await.unwrap();
        let old = self.base_name().map(|b| (b.to_owned(), None));
        let new = match &self.change {
            Change::Rename(b) => b.clone().map(|b| (b.file, b.format)),
            _ => old.clone(),
        };
        let names = &info.backing;
        assert!(*names == new || !done && *names == old, "{what}: {names:?}");
    }
}

async fn read(image: &Child, size: usize) -> Vec<u8> {
    let buf = Buf::new(size);
    image.read(0, buf.clone()).await.unwrap();
    buf.to_vec()
}

#[test]
fn the_power_goes_while_sizes_and_headers_change() {
    let mut crashes = 0;
    for seed in 0..super::crash::soak(120, 2000) {
        let case = Case::new(seed);
        let what = format!("seed {seed}, {}, {:?}", case.shape, case.change);
        let whole = case.world();
        whole.set_crash(None);
        whole.run(async {
            case.carry_out().await.unwrap_or_else(|e| panic!("{what}: {e}"));
            case.judge(&what, true).await;
        });
        let counted = case.world();
        counted.set_crash(None);
        counted.run(async { case.carry_out().await.unwrap() });
        let ios = counted.io_count();
        let mut rng = Rng::new(seed);
        let points: Vec<u64> = match super::crash::soak(false, true) {
            true => (0..ios).collect(),
            false => (0..6).map(|_| rng.below(ios)).collect(),
        };
        for at in points {
            let world = case.world();
            world.set_crash(Some(at));
            world.run(async {
                let (mut all, mut crash) =
                    (std::pin::pin!(case.carry_out()), std::pin::pin!(world.crashed()));
                std::future::poll_fn(|cx| {
                    if crash.as_mut().poll(cx).is_ready() || all.as_mut().poll(cx).is_ready() {
                        return std::task::Poll::Ready(());
                    }
                    std::task::Poll::Pending
                })
                .await;
            });
            for keep in [Keep::Nothing, Keep::Everything, Keep::Some, Keep::Torn] {
                let what = format!("{what}, crash at {at}, {keep:?}");
                let after = world.after_power_loss(keep, seed ^ at);
                after.run(case.judge(&what, false));
                crashes += 1;
            }
        }
    }
    println!("{crashes} crashes");
}

#[test]
fn space_made_ready_reads_as_zeros() {
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let shapes = shapes();
        let mut shape = shapes[rng.below(shapes.len() as u64) as usize].clone();
        let size = shape["size"].as_u64().unwrap();
        let has_base = rng.one_in(2) && shape["data-file-raw"] != true;
        if has_base {
            shape["backing-file"] = json!(BASE);
        }
        let how = [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
        let how = how[rng.below(3) as usize];
        let world = World::new(seed);
        world.put_file(BASE, vec![7; size as usize * 2]);
        world.run(async {
            create(IMAGE, shape.clone()).await;
            let image = open(IMAGE, has_base.then_some(BASE), json!({})).await.unwrap();
            let all = Buf::new(size as usize);
            all.fill(9);
            image.write(0, all, WriteFlags::default()).await.unwrap();
            // Clusters that were in use come again.
            let node = image.node().await.unwrap();
            node.driver().resize(size / 2 / SECTOR * SECTOR).await.unwrap();
            node.driver().resize(size * 2).await.unwrap();
            let range = gipfel_base::ByteRange::between(size / 2 / SECTOR * SECTOR, size * 2);
            node.driver().image_format().unwrap().preallocate(range, how).await.unwrap();
            let now = read(&image, size as usize * 2).await;
            let kept = range.start() as usize;
            assert!(now[..kept].iter().all(|b| *b == 9), "seed {seed}");
            assert!(now[kept..].iter().all(|b| *b == 0), "seed {seed}, {how:?}");
            let status = image.status(range).await.unwrap();
            // Of clusters that are kept for subclusters none is allocated.
            let is_data = status.allocated && status.data;
            assert!(is_data || shape["extended-l2"] == true, "seed {seed}: {status:?}");
            if shape["data-file-raw"] == true {
                assert!(world.file(DATA).unwrap() == now, "seed {seed}: as seen by itself");
            }
            close(&image).await.unwrap();
            let r = check(IMAGE).await.unwrap();
            assert_eq!((r.corruptions, r.leaks), (0, 0), "seed {seed}: {:#?}", r.findings);
        });
    }
}

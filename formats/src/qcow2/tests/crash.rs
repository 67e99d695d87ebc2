//! Loss of power and errors at every I/O (ARCHITECTURE.md, invariant 9).
//!
//! `GIPFEL_SOAK=1` tries every single I/O of many runs instead of some.

use std::rc::Rc;

use gipfel_io::sim::{Fault, Keep, Rng, World};
use gipfel_node::WriteFlags;
use serde_json::{Value, json};

use super::disk::{check, close, create, open, shapes};
use super::model::{
    Model, SECTOR, Shared, backing_tag, check_all, content, sometimes_compressed, work,
};

const IMAGE: &str = "image";
const DATA: &str = "image.data";
const TASKS: u64 = 3;

pub fn soak<T>(short: T, long: T) -> T {
    if std::env::var_os("GIPFEL_SOAK").is_some() { long } else { short }
}

/// One way to run.
#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    shape: Value,
    backing: bool,
    options: Value,
    steps: u64,
}

impl Case {
    fn new(seed: u64) -> Case {
        let mut rng = Rng::new(seed);
        let shapes = shapes();
        let mut shape = shapes[rng.below(shapes.len() as u64) as usize].clone();
        let backing = rng.one_in(2) && shape["data-file-raw"] != true;
        if backing {
            shape["backing-file"] = json!("base");
        }
        // Caches of a few slices, so that tables come and go.
        let options = match rng.one_in(2) {
            true => json!({ "l2-cache-size": 2048, "refcount-cache-size": 2048 }),
            false => json!({}),
        };
        Case { seed, shape, backing, options, steps: 20 + rng.below(60) }
    }

    fn size(&self) -> u64 {
        self.shape["size"].as_u64().unwrap()
    }

    /// Whether the data file is the disk too, read by itself.
    fn is_raw(&self) -> bool {
        self.shape["data-file-raw"] == true
    }

    fn base(&self) -> Option<&str> {
        self.backing.then_some("base")
    }

    /// The contents of the backing file: shorter than the disk, and not whole clusters.
    fn base_sectors(&self) -> u64 {
        self.size() / SECTOR * 3 / 4 + 1
    }

    fn model(&self) -> Model {
        let sectors = if self.backing { self.base_sectors() } else { 0 };
        Model::new(self.size(), |s| if s < sectors { backing_tag(s) } else { 0 })
    }

    /// A world with the empty image.
    fn world(&self) -> Rc<World> {
        let world = World::new(self.seed);
        if self.backing {
            let base = (0..self.base_sectors()).flat_map(|s| content(s, backing_tag(s)));
            world.put_file("base", base.collect());
        }
        world.run(create(IMAGE, self.shape.clone()));
        let image = world.file(IMAGE).unwrap();
        world.put_file(IMAGE, image);
        if let Some(data) = world.file(DATA) {
            world.put_file(DATA, data);
        }
        world
    }

    /// Runs the work until it ends or the power goes; gives what the disk may hold then.
    fn run(&self, world: &Rc<World>) -> Model {
        let shared = Shared::new(self.model());
        world.run(async {
            let all = async {
                let image = open(IMAGE, self.base(), self.options.clone()).await.unwrap();
                work(&image, &shared, self.seed, TASKS, self.steps).await;
                close(&image).await.unwrap();
            };
            let (mut all, mut crash) = (std::pin::pin!(all), std::pin::pin!(world.crashed()));
            std::future::poll_fn(|cx| {
                if crash.as_mut().poll(cx).is_ready() {
                    return std::task::Poll::Ready(());
                }
                all.as_mut().poll(cx)
            })
            .await;
        });
        shared.model.borrow().clone()
    }
}

/// After the power came back: no contradiction in the image, and every sector holds something
/// that it may hold.
fn judge(case: &Case, world: &Rc<World>, model: &Model, what: &str) {
    world.run(async {
        let report = check(IMAGE).await.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(report.corruptions, 0, "{what}: {:#?}", report.findings);
        assert_eq!(report.check_errors, 0, "{what}: {:#?}", report.findings);
        let image = open(IMAGE, case.base(), json!({})).await.unwrap();
        let buf = gipfel_io::Buf::new(case.size() as usize);
        image.read(0, buf.clone()).await.unwrap_or_else(|e| panic!("{what}: {e}"));
        holds(model, &buf.to_vec(), what);
        if case.is_raw() {
            holds(model, &world.file(DATA).unwrap(), &format!("data file, {what}"));
        }
    });
}

fn holds(model: &Model, bytes: &[u8], what: &str) {
    for (s, got) in (0..model.sectors()).zip(bytes.chunks(SECTOR as usize)) {
        assert!(
            model.may_hold(s, got),
            "{what}: sector {s} holds {:x?}..., may hold {}",
            &got[..8],
            model.describe(s)
        );
    }
}

#[test]
fn requests_agree_with_a_model_and_the_image_is_clean() {
    for seed in 0..soak(60, 2000) {
        let case = Case::new(seed);
        let world = case.world();
        let shared = Shared::new(case.model());
        world.run(async {
            let image = open(IMAGE, case.base(), case.options.clone()).await.unwrap();
            work(&image, &shared, seed, TASKS, case.steps * 4).await;
            check_all(&image, &shared).await;
            let buf = gipfel_io::Buf::new(case.size() as usize);
            image.read(0, buf.clone()).await.unwrap();
            close(&image).await.unwrap();
            if case.is_raw() {
                assert!(world.file(DATA).unwrap() == buf.to_vec(), "{case:?}: as seen by itself");
            }
            let r = check(IMAGE).await.unwrap();
            assert_eq!((r.corruptions, r.leaks), (0, 0), "{case:?}: {:#?}", r.findings);
        });
    }
}

#[test]
fn the_power_goes_at_every_io() {
    let mut crashes = 0;
    for seed in 0..soak(40, 400) {
        let case = Case::new(seed);
        let whole = case.world();
        whole.set_crash(None);
        case.run(&whole);
        let ios = whole.io_count();
        let mut rng = Rng::new(seed);
        let points: Vec<u64> = if soak(false, true) {
            (0..ios).collect()
        } else {
            (0..6).map(|_| rng.below(ios)).collect()
        };
        for at in points {
            let world = case.world();
            world.set_crash(Some(at));
            let model = case.run(&world);
            for keep in [Keep::Nothing, Keep::Everything, Keep::Some, Keep::Torn] {
                let after = world.after_power_loss(keep, seed ^ at);
                judge(&case, &after, &model, &format!("{case:?}, crash at {at}, {keep:?}"));
                crashes += 1;
            }
        }
    }
    println!("{crashes} crashes");
}

/// Tables in one piece that are longer than what one refcount block counts.
#[test]
fn long_tables_find_a_place() {
    for (size, larger) in [(1 << 20, 140 << 20), (120 << 20, 9 << 30)] {
        let world = World::new(size);
        let shape = json!({ "size": size, "cluster-size": 512, "refcount-bits": 64 });
        world.run(async {
            create(IMAGE, shape).await;
            let image = open(IMAGE, None, json!({})).await.unwrap();
            let write = async |at: u64, byte: u8| {
                let buf = gipfel_io::Buf::new(5000);
                buf.fill(byte);
                image.write(at, buf, WriteFlags::default()).await.unwrap();
            };
            write(size / 2, 1).await;
            image.node().await.unwrap().driver().resize(larger).await.unwrap();
            write(larger - 5000, 2).await;
            let buf = gipfel_io::Buf::new(5000);
            for (at, byte) in [(size / 2, 1), (larger - 5000, 2)] {
                image.read(at, buf.clone()).await.unwrap();
                assert_eq!(buf.to_vec(), [byte; 5000]);
            }
            close(&image).await.unwrap();
            let r = check(IMAGE).await.unwrap();
            assert_eq!((r.corruptions, r.leaks), (0, 0), "{:#?}", r.findings);
        });
    }
}

#[test]
fn errors_at_every_io_leave_a_sound_image() {
    for seed in 0..soak(40, 400) {
        let case = Case::new(seed);
        let mut rng = Rng::new(seed ^ 0xfa);
        let whole = case.world();
        whole.set_crash(None);
        case.run(&whole);
        let ios = whole.io_count();
        for sticky in [false, true] {
            let at = rng.below(ios);
            let world = case.world();
            let fault = Fault { nth: at, kind: None, errno: 5, sticky };
            world.run(async {
                let image = open(IMAGE, case.base(), case.options.clone()).await.unwrap();
                world.set_fault(Some(fault));
                // Requests may fail; they must end, and nothing else may break.
                for n in 0..case.steps * TASKS {
                    let at = rng.below(case.size() / SECTOR) * SECTOR;
                    let len = (1 + rng.below(8)) * SECTOR;
                    let range = gipfel_base::ByteRange::new(at, len.min(case.size() - at));
                    let buf = gipfel_io::Buf::new(range.len() as usize);
                    buf.fill(n as u8 | 1);
                    let _ = match rng.below(5) {
                        0 => image.flush().await,
                        1 => image.discard(range).await,
                        2 => image.write_zeroes(range, Default::default()).await,
                        _ => {
                            let flags = sometimes_compressed(&image, &mut rng).await;
                            image.write(at, buf, flags).await
                        }
                    };
                }
                world.set_fault(None);
                let _ = close(&image).await;
                let r = check(IMAGE).await.unwrap();
                assert_eq!(r.corruptions, 0, "{case:?}, error at {at}: {:#?}", r.findings);
            });
        }
    }
}

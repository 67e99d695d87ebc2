//! `gipfel img` beside the tool that it stands for: the same arguments, exit status, standard
//! output and images afterwards.
//!
//! A line of a table has the arguments, then what is done before (shell commands), then the images
//! that are looked at afterwards, with ` ## ` between them. `''` is an empty argument.

mod img_tools;

use std::path::Path;
use std::process::{Command, Output, Stdio};

use gipfel_testkit::{Rng, Scratch, tools};
use img_tools::{GIPFEL, code, stderr, stdout};
use serde_json::Value;

/// The images that every case begins with.
const IMAGES: &str = "
truncate -s 1M a.raw b.raw && truncate -s 2M c.raw
head -c 4096 /dev/zero | dd of=a.raw conv=notrunc status=none
cp --sparse=always a.raw d.raw && printf x | dd of=d.raw bs=1 seek=70000 conv=notrunc status=none
truncate -s 2M e.raw && printf x | dd of=e.raw bs=1 seek=1500000 conv=notrunc status=none
head -c 1048576 /dev/zero > z.raw; printf abc > tiny; printf abcd > tiny2
seq 3000 | head -c 10000 > u; printf secret > pw; mkdir sub
qemu-img create -q -f qcow2 q.qcow2 1M
qemu-img create -q -f qcow2 -b a.raw -F raw ov.qcow2
qemu-img create -q -f qcow2 -o compat=0.10 v2 1M
qemu-img create -q -f qcow2 am 1M
qemu-io -c 'write -P 1 0 64k' -c 'write -z 128k 64k' am
qemu-img create -q -f qcow2 base 1M; qemu-io -c 'write -P 1 0 256k' base
qemu-img create -q -f qcow2 base2 1M; qemu-io -c 'write -P 2 128k 256k' base2
qemu-img create -q -f qcow2 -b base -F qcow2 mid; qemu-io -c 'write -P 3 512k 64k' mid
qemu-img create -q -f qcow2 -b mid -F qcow2 top
qemu-io -c 'write -P 4 576k 64k' -c 'write -z 0 64k' top
";

fn have() -> bool {
    tools::have("qemu-img") && tools::have("qemu-io")
}

fn shell(text: &str, dir: &Path) {
    let out = Command::new("sh").args(["-c", text]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{text}: {}", stderr(&out));
}

/// A case in a table.
struct Case<'a> {
    line: &'a str,
    args: Vec<String>,
    before: &'a str,
    judged: Vec<&'a str>,
}

impl<'a> Case<'a> {
    fn parse(line: &'a str) -> Case<'a> {
        let mut parts = line.split(" ## ");
        let word = |w: &str| if w == "''" { String::new() } else { w.to_owned() };
        let args = parts.next().unwrap().split_whitespace();
        Case {
            line,
            args: args.map(word).collect(),
            before: parts.next().unwrap_or_default(),
            judged: parts.next().unwrap_or_default().split_whitespace().collect(),
        }
    }

    /// What one of the tools does, in fresh images: exit status, what it prints, what is left,
    /// and what it complains of.
    fn run(&self, tool: &[&str], s: &Scratch) -> (i32, String, Vec<String>, String) {
        let dir = s.path("case");
        let _ = std::fs::remove_dir_all(&dir);
        shell("cp -r --sparse=always images case", s.dir());
        shell(self.before, &dir);
        let out = Command::new(tool[0])
            .args(&tool[1..])
            .args(&self.args)
            .current_dir(&dir)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let left = self.judged.iter().map(|f| state(f, &dir)).collect();
        (code(&out), usual(&stdout(&out)), left, stderr(&out))
    }
}

fn reference(args: &[&str], dir: &Path) -> Output {
    Command::new("qemu-img").args(args).current_dir(dir).output().unwrap()
}

/// What the reference says of an image: its shape, whether it is sound, its contents.
fn state(image: &str, dir: &Path) -> String {
    let info = reference(&["info", "-U", "--output=json", image], dir);
    let Ok(mut info) = serde_json::from_str::<Value>(&stdout(&info)) else {
        return format!("{image}: none");
    };
    let info = info.as_object_mut().unwrap();
    for differs in ["children", "actual-size", "snapshots"] {
        info.remove(differs);
    }
    let sound = code(&reference(&["check", "-q", image], dir));
    let made = reference(&["convert", "-U", "-S", "0", "-O", "raw", image, "../contents"], dir);
    let contents = match code(&made) {
        0 => std::fs::read(dir.join("../contents")).unwrap(),
        _ => stderr(&made).into_bytes(),
    };
    let empty = info["format"] == "qcow2" && holds_nothing(image, dir);
    let contents = fingerprint(&contents);
    format!("{image}: {info:?}, check {sound}, empty {empty}, contents {contents:x}")
}

/// Whether an image stores no data itself.
fn holds_nothing(image: &str, dir: &Path) -> bool {
    let map = reference(&["map", "-U", "--output=json", image], dir);
    let map: Vec<Value> = serde_json::from_str(&stdout(&map)).unwrap_or_default();
    !map.iter().any(|e| e["depth"] == 0 && e["data"] == true)
}

fn fingerprint(bytes: &[u8]) -> u64 {
    let step = |h: u64, b: &u8| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// Without times, and without the steps of a progress.
fn usual(text: &str) -> String {
    let mut out = String::new();
    for part in text.split_inclusive(['\r', '\n']) {
        match part.strip_prefix("Run completed in ") {
            Some(_) => out.push_str("Run completed\n"),
            None if part.ends_with('\r') => {
                if !out.ends_with("(progress)") {
                    out.push_str("(progress)");
                }
            }
            None => out.push_str(part),
        }
    }
    out
}

/// Runs the cases of a table with both tools.
fn alike<'a>(name: &str, table: impl Iterator<Item = &'a str>) {
    let s = Scratch::new(&format!("img-like-{name}"));
    let images = s.path("images");
    std::fs::create_dir(&images).unwrap();
    shell(IMAGES, &images);
    let mut told = Vec::new();
    for line in table {
        let case = Case::parse(line);
        let ours = case.run(&[GIPFEL, "img"], &s);
        let theirs = case.run(&["qemu-img"], &s);
        if (ours.0, &ours.1, &ours.2) != (theirs.0, &theirs.1, &theirs.2) {
            told.push(format!("{}\n   ours {ours:?}\n theirs {theirs:?}", case.line));
        }
    }
    assert!(told.is_empty(), "{}", told.join("\n"));
}

#[test]
fn compare() {
    if have() {
        alike("compare", include_str!("img_cases/compare.txt").lines());
    }
}

#[test]
fn resize() {
    if have() {
        alike("resize", include_str!("img_cases/resize.txt").lines());
    }
}

#[test]
fn measure() {
    if have() {
        alike("measure", include_str!("img_cases/measure.txt").lines());
    }
}

#[test]
fn dd() {
    if have() {
        alike("dd", include_str!("img_cases/dd.txt").lines());
    }
}

#[test]
fn rebase() {
    if have() {
        alike("rebase", include_str!("img_cases/rebase.txt").lines());
    }
}

#[test]
fn commit() {
    if have() {
        alike("commit", include_str!("img_cases/commit.txt").lines());
    }
}

#[test]
fn bench() {
    if have() {
        alike("bench", include_str!("img_cases/bench.txt").lines());
    }
}

#[test]
fn amend() {
    if have() {
        alike("amend", include_str!("img_cases/amend.txt").lines());
    }
}

#[test]
fn info() {
    if have() {
        alike("info", include_str!("img_cases/info.txt").lines());
    }
}

#[test]
fn convert() {
    if have() {
        alike("convert", include_str!("img_cases/convert.txt").lines());
    }
}

#[test]
fn map() {
    if have() {
        alike("map", include_str!("img_cases/map.txt").lines());
    }
}

#[test]
fn check() {
    if have() {
        alike("check", include_str!("img_cases/check.txt").lines());
    }
}

#[test]
fn create() {
    if have() {
        alike("create", include_str!("img_cases/create.txt").lines());
    }
}

/// Shell commands that make `image` and write here and there in it.
///
/// Overlays are of version 3: the reference does not make others longer over a longer image.
fn random_image(rng: &mut Rng, image: &str, below: Option<&str>) -> String {
    let cluster = *rng.pick(&["512", "4k", "64k", "256k"]);
    let compat = if below.is_some() { "1.1" } else { *rng.pick(&["0.10", "1.1"]) };
    let size = *rng.pick(&["1M", "1000k", "1537k", "2M"]);
    let mut text = format!("qemu-img create -q -f qcow2 -o cluster_size={cluster},compat={compat}");
    if let Some(b) = below {
        text += &format!(" -b {b} -F qcow2");
    }
    text += &format!(" {image} {size}; qemu-io");
    for _ in 0..rng.between(1, 8) {
        let at = rng.below(240) * 4;
        let len = rng.between(1, (1000 - at).min(300));
        text += &match rng.below(5) {
            0 => format!(" -c 'write -z {at}k {len}k'"),
            1 => format!(" -c 'write -z -u {at}k {len}k'"),
            2 => format!(" -c 'write -P 0 {at}k {len}k'"),
            _ => format!(" -c 'write -P {} {at}k {len}k'", rng.between(1, 255)),
        };
    }
    format!("{text} {image};")
}

fn random_case(rng: &mut Rng) -> String {
    let before = [
        random_image(rng, "r0", None),
        random_image(rng, "r1", Some("r0")),
        random_image(rng, "r2", Some("r1")),
        random_image(rng, "other", None),
    ];
    let size = rng.between(1, 6000) * 512;
    let sizes = ["512", "2k", "64k", "2M"];
    let (cluster, bits) = (rng.pick(&sizes), 1 << rng.below(7));
    let (args, judged) = match rng.below(10) {
        0 => ("rebase -b r0 -F qcow2 r2".into(), "r2"),
        1 => ("rebase -b other -F qcow2 r2".into(), "r2"),
        2 => ("rebase -b '' r2".into(), "r2"),
        3 => ("commit r2".into(), "r2 r1"),
        4 => ("commit -d r2".into(), "r2 r1"),
        5 => ("commit -b r0 r2".into(), "r0"),
        6 => (format!("resize --shrink r2 {size}"), "r2"),
        7 => (format!("resize --shrink other {size}"), "other"),
        8 => {
            let o = format!("cluster_size={cluster},refcount_bits={bits}");
            (format!("measure -O qcow2 -o {o} r2"), "")
        }
        _ => (format!("dd bs=3k skip={} if=r2 of=o", rng.below(400)), "o"),
    };
    format!("{args} ## {} ## {judged}", before.concat())
}

#[test]
fn random_chains() {
    if have() {
        let mut rng = Rng::from_env();
        let cases: Vec<_> = (0..24).map(|_| random_case(&mut rng)).collect();
        alike("random", cases.iter().map(String::as_str));
    }
}

#[test]
fn random_pairs() {
    if !have() {
        return;
    }
    let mut rng = Rng::from_env();
    let mut cases = Vec::new();
    for _ in 0..12 {
        let before = random_image(&mut rng, "r0", None) + &random_image(&mut rng, "r1", None);
        cases.push(format!("compare r0 r1 ## {before}"));
        cases.push(format!("compare r1 a.raw ## {before}"));
    }
    alike("random-pairs", cases.iter().map(String::as_str));
}

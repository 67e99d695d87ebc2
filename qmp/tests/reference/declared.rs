//! Everything that we declare and the reference has too is declared alike.

use std::collections::{HashMap, HashSet};

use gipfel_qmp::Schema;
use serde_json::{Value, json};

use crate::daemon::{Daemon, installed};

/// Of the reference's emulator and not of its storage daemon.
const NOT_THERE: [&str; 9] = [
    "block_set_io_throttle",
    "blockdev-open-tray",
    "blockdev-close-tray",
    "blockdev-remove-medium",
    "blockdev-insert-medium",
    "blockdev-change-medium",
    "eject",
    "DEVICE_TRAY_MOVED",
    "SHUTDOWN",
];

/// Members that we leave out for now.
const LEFT_OUT: [&str; 2] = ["ImageInfoSpecificQCow2.encrypt", "ImageInfoSpecificQCow2.bitmaps"];

struct Both<'a> {
    ours: HashMap<&'a str, &'a Value>,
    theirs: HashMap<&'a str, &'a Value>,
    seen: HashSet<(&'a str, &'a str)>,
    wrong: Vec<String>,
}

#[test]
fn declarations_agree() {
    if !installed() {
        return;
    }
    let ours = Schema::builtin().unwrap().introspection();
    let theirs = Daemon::start().ask("query-qmp-schema", json!({}))["return"].take();
    let mut both =
        Both { ours: index(&ours), theirs: index(&theirs), seen: HashSet::new(), wrong: vec![] };
    let calls: Vec<&str> = both
        .ours
        .values()
        .filter(|e| e["meta-type"] == "command" || e["meta-type"] == "event")
        .map(|e| text(&e["name"]))
        .collect();
    for name in calls {
        let (our, Some(their)) = (both.ours[name], both.theirs.get(name).copied()) else {
            if !NOT_THERE.contains(&name) && !is_ours(both.ours[name]) {
                both.wrong.push(format!("{name}: the reference does not have it"));
            }
            continue;
        };
        both.features(name, our, their);
        for key in ["arg-type", "ret-type"] {
            if let Some(ty) = our.get(key) {
                both.types(text(ty), text(&their[key]));
            }
        }
    }
    assert!(both.wrong.is_empty(), "{:#?}", both.wrong);
    assert!(both.seen.len() > 80, "only {} types were compared", both.seen.len());
}

fn index(entries: &Value) -> HashMap<&str, &Value> {
    entries.as_array().unwrap().iter().map(|e| (text(&e["name"]), e)).collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn list<'a>(entry: &'a Value, key: &str) -> &'a [Value] {
    entry.get(key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn named<'a>(entries: &'a [Value], key: &str, name: &Value) -> Option<&'a Value> {
    entries.iter().find(|e| e[key] == *name)
}

fn is_ours(entry: &Value) -> bool {
    list(entry, "features").iter().any(|f| f == "gipfel-extension")
}

impl<'a> Both<'a> {
    fn types(&mut self, our_name: &'a str, their_name: &'a str) {
        if !self.seen.insert((our_name, their_name)) {
            return;
        }
        let (our, their) = (self.ours[our_name], self.theirs[their_name]);
        if our["meta-type"] != their["meta-type"] {
            self.wrong.push(format!("{our_name}: {} there", their["meta-type"]));
            return;
        }
        self.features(our_name, our, their);
        match text(&our["meta-type"]) {
            "builtin" if our["json-type"] != their["json-type"] => {
                self.wrong.push(format!("{our_name}: {} there", their["json-type"]));
            }
            "array" => self.types(text(&our["element-type"]), text(&their["element-type"])),
            "enum" => self.words(our_name, our, their),
            "object" => self.members(our_name, our, their),
            "alternate" => self.ways(our_name, our, their),
            _ => {}
        }
    }

    fn words(&mut self, name: &str, our: &Value, their: &Value) {
        for word in list(our, "members") {
            match named(list(their, "members"), "name", &word["name"]) {
                Some(there) => self.features(&format!("{name}:{}", word["name"]), word, there),
                None if is_ours(word) => {}
                None => self.wrong.push(format!("{name}: no value {} there", word["name"])),
            }
        }
    }

    fn members(&mut self, name: &str, our: &'a Value, their: &'a Value) {
        for m in list(our, "members").iter().filter(|m| !is_ours(m)) {
            let path = format!("{name}.{}", text(&m["name"]));
            let Some(there) = named(list(their, "members"), "name", &m["name"]) else {
                self.wrong.push(format!("{path}: not there"));
                continue;
            };
            if m.get("default").is_some() != there.get("default").is_some() {
                self.wrong.push(format!("{path}: optional in one only"));
            }
            self.features(&path, m, there);
            self.types(text(&m["type"]), text(&there["type"]));
        }
        for there in list(their, "members") {
            let path = format!("{name}.{}", text(&there["name"]));
            let here = named(list(our, "members"), "name", &there["name"]).is_some();
            if !here && !LEFT_OUT.contains(&path.as_str()) {
                self.wrong.push(format!("{path}: missing here"));
            }
        }
        if our.get("tag") != their.get("tag") {
            self.wrong.push(format!("{name}: tag {:?} there", their.get("tag")));
            return;
        }
        for variant in list(our, "variants") {
            if let Some(there) = named(list(their, "variants"), "case", &variant["case"]) {
                self.types(text(&variant["type"]), text(&there["type"]));
            }
        }
    }

    /// The ways of an alternate differ in kind, so they are matched by it.
    fn ways(&mut self, name: &str, our: &'a Value, their: &'a Value) {
        let (ours, theirs) = (list(our, "members"), list(their, "members"));
        if ours.len() != theirs.len() {
            self.wrong.push(format!("{name}: {} ways there", theirs.len()));
        }
        for way in ours {
            let entry = self.ours[text(&way["type"])];
            let same = |t: &&Value| {
                let there = self.theirs[text(&t["type"])];
                there["meta-type"] == entry["meta-type"] && there["json-type"] == entry["json-type"]
            };
            match theirs.iter().find(same) {
                Some(there) => self.types(text(&way["type"]), text(&there["type"])),
                None => self.wrong.push(format!("{name}: way {} not there", way["type"])),
            }
        }
    }

    fn features(&mut self, path: &str, our: &Value, their: &Value) {
        let ours: Vec<_> =
            list(our, "features").iter().filter(|f| *f != "gipfel-extension").collect();
        let theirs: Vec<_> = list(their, "features").iter().collect();
        if ours != theirs {
            self.wrong.push(format!("{path}: features {theirs:?} there, {ours:?} here"));
        }
    }
}

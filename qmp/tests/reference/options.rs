//! Which option text is taken.

use gipfel_qmp::{Schema, keyval::Style};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::daemon::{installed, refusal};

fn compare(text: &str) -> Result<(), String> {
    // Without a node-name the reference stops right after the checks of form.
    let what = refusal(&["--blockdev", text]);
    let want = what.contains("'node-name' must be specified");
    let style = Style::implied("driver");
    let got = Schema::builtin().unwrap().read_option("BlockdevOptions", text, style);
    if got.is_ok() == want {
        return Ok(());
    }
    Err(format!("{text}\n ours: {got:?}\n theirs: {what}"))
}

#[test]
fn known_texts() {
    if !installed() {
        return;
    }
    for text in [
        "null-co",
        "driver=null-co",
        "null-co,",
        "null-co,size=0x100",
        "null-co,latency-ns=+5",
        "{'driver':'null-co'}",
        "{\"driver\":\"null-co\"} ",
        "null-co,read-zeroes=y",
        "file,filename=a,,b=c",
        "raw,file=x",
        "raw,file.driver=null-co",
        "raw,file.driver=file,file.filename=x,file.locking=off,file.cache.direct=on",
        "qcow2,file=f,overlap-check=none",
        "qcow2,file=f,overlap-check.template=all",
        "qcow2,file=f,backing=b",
        "qcow2,file=f,backing=",
        "null-co,size=1,size=2",
        // Refused:
        "",
        ",null-co",
        "null-co,,x",
        "null-co,size=1.5",
        "null-co,size=x",
        "null-co,size=",
        "null-co,read-zeroes=On",
        "null-co,read-zeroes",
        "null-co,=5",
        "null-co,a%b=5",
        "raw,file.=5",
        "raw,file=x,file.driver=null-co",
        "raw,file.driver=null-co,file.0=x",
        "raw,file.0=x",
        "raw,file.driver=null-co,file.oops=1",
        "null-co,size.x=1",
        "{'driver':'null-co','size':'5'}",
        "{'driver':'null-co'} x",
        "{'driver':'null-co'",
        " {'driver':'null-co'}",
        "node-name=a,null-co",
        "null-co,size=99999999999999999999",
    ] {
        compare(text).unwrap();
    }
}

#[test]
fn differences_on_purpose() {
    if !installed() {
        return;
    }
    // Sizes take suffixes here, and no sign; a leading zero, octal there, is refused rather than
    // misread.
    for text in
        ["null-co,size=1M", "null-co,size=+5", "null-co,latency-ns=010", "null-co,latency-ns= 5"]
    {
        compare(text).unwrap_err();
    }
}

#[test]
fn random_texts() {
    if !installed() {
        return;
    }
    let item = prop::sample::select(vec![
        "null-co",
        "driver=raw",
        "file=x",
        "file.driver=null-co",
        "file.size=5",
        "cache.direct=on",
        "cache.direct=maybe",
        "cache=on",
        "read-only=off",
        "size=7",
        "offset=1",
        "oops=1",
        "=",
        "a",
        "file.cache.no-flush=yes",
        "detect-zeroes=on",
        "discard=unmap",
        "file.file.driver=null-co",
        "",
        "file..driver=raw",
        "file.driver=raw",
        "0=1",
        "file.1=x",
        "x,,y",
    ]);
    let text = prop::collection::vec(item, 1..5).prop_map(|items| items.join(","));
    let mut runner = TestRunner::new(Config { cases: 150, ..Config::default() });
    runner.run(&text, |text| compare(&text).map_err(TestCaseError::fail)).unwrap();
}

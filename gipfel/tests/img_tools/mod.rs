//! Running `gipfel img` in tests, alone and beside the tool that it stands for.
// Each test program uses its part of this.
#![allow(dead_code)]

use std::process::{Command, Output};

use gipfel_testkit::tools;
use serde_json::Value;

/// The program under test.
pub const GIPFEL: &str = env!("CARGO_BIN_EXE_gipfel");

/// Runs `gipfel img`.
pub fn gipfel(args: &[&str]) -> Output {
    Command::new(GIPFEL).arg("img").args(args).output().unwrap()
}

/// Its exit code.
pub fn code(out: &Output) -> i32 {
    out.status.code().unwrap_or_else(|| panic!("ended by {}", out.status))
}

/// What it printed.
pub fn stdout(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// What it complained about.
pub fn stderr(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Panics unless `gipfel img` and `qemu-img` print the same (as JSON, where it is JSON) and end
/// with the same code.
#[track_caller]
pub fn alike(args: &[&str]) {
    let (ours, theirs) = (gipfel(args), tools::try_run("qemu-img", args));
    let story = format!("{args:?}\n{}{}", stderr(&ours), stderr(&theirs));
    assert_eq!(code(&ours), code(&theirs), "{story}");
    let (a, b) = (stdout(&ours), stdout(&theirs));
    match (serde_json::from_str::<Value>(&a), serde_json::from_str::<Value>(&b)) {
        (Ok(a), Ok(b)) => assert_eq!(a, b, "{story}"),
        _ => assert_eq!(a, b, "{story}"),
    }
}

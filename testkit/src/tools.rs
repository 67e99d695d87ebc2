//! The reference tools as tests use them: run, compare, fail with the whole story.

use std::path::PathBuf;
use std::process::{Command, Output};

/// Where `tool` is in `PATH`, if it is installed.
pub fn find(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|d| d.join(tool)).find(|p| p.is_file())
}

/// Whether `tool` is installed; says on standard output that a test is skipped where it is not,
/// and panics instead where `GIPFEL_NEED_TOOLS` is set (as in the checks that must skip nothing).
pub fn have(tool: &str) -> bool {
    if find(tool).is_some() {
        return true;
    }
    assert!(
        std::env::var_os("GIPFEL_NEED_TOOLS").is_none(),
        "this test needs '{tool}', which is not in PATH, and GIPFEL_NEED_TOOLS is set"
    );
    println!("skipped: '{tool}' is not installed");
    false
}

/// Runs `tool` and returns what it did, whatever its exit status.
pub fn try_run(tool: &str, args: &[&str]) -> Output {
    Command::new(tool)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("cannot run '{tool}': {e} (is it installed?)"))
}

/// Runs `tool`, panics with its output where it fails, and returns its standard output.
#[track_caller]
pub fn run(tool: &str, args: &[&str]) -> String {
    let out = try_run(tool, args);
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "{tool} {} ended with {}\n--- stdout\n{stdout}\n--- stderr\n{}",
        args.join(" "),
        out.status,
        String::from_utf8_lossy(&out.stderr),
    );
    stdout
}

/// `qemu-img` with `args`.
#[track_caller]
pub fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args)
}

/// `qemu-io` with one `-c` for each command, on `image` of `format`.
#[track_caller]
pub fn qemu_io(format: &str, image: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", format];
    for c in commands {
        args.extend(["-c", c]);
    }
    args.push(image);
    run("qemu-io", &args)
}

/// Panics unless `qemu-img check` finds the qcow2 `image` free of errors and leaks.
#[track_caller]
pub fn qcow2_is_clean(image: &str) {
    qemu_img(&["check", "-f", "qcow2", image]);
}

/// Panics unless the two images show the same bytes.
#[track_caller]
pub fn same_content(format_a: &str, a: &str, format_b: &str, b: &str) {
    qemu_img(&["compare", "-f", format_a, "-F", format_b, a, b]);
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_failing_tool_tells_its_story() {
        let story = std::panic::catch_unwind(|| super::run("ls", &["/no/such/path"])).unwrap_err();
        let story = story.downcast_ref::<String>().unwrap();
        assert!(story.contains("ls /no/such/path ended with"), "{story}");
        assert!(super::find("no-such-tool").is_none());
    }
}

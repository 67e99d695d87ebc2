//! The tidy check: holds the invariants of ARCHITECTURE.md by reading the sources.
//!
//! It runs as a test of this crate (`cargo test -p gipfel-tidy`). It reads files and knows no
//! other crate; it does not format (rustfmt) and does not judge style (clippy).

pub mod rules;
pub mod source;

use std::path::Path;

use rules::Finding;
use source::Source;

/// File name endings that are read as text; others are left alone.
const TEXT: &[&str] = &["rs", "toml", "md", "py", "sh", "json"];
/// Text files without an ending.
const NAMED: &[&str] = &["justfile", ".ci/run", "tools/test"];

/// Reads every text file of the project under `root`, without build output and dot folders.
pub fn read_project(root: &Path) -> std::io::Result<Vec<Source>> {
    let mut out = Vec::new();
    walk(root, "", &mut out)?;
    out.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(out)
}

fn walk(dir: &Path, prefix: &str, out: &mut Vec<Source>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{prefix}{name}");
        let kind = entry.file_type()?;
        if kind.is_dir() {
            let skip = name == "target" || (name.starts_with('.') && name != ".ci");
            if !skip {
                walk(&entry.path(), &format!("{path}/"), out)?;
            }
        } else if kind.is_file() {
            let ending = name.rsplit_once('.').map_or("", |(_, e)| e);
            if TEXT.contains(&ending) || NAMED.contains(&path.as_str()) {
                out.push(Source::new(&path, &std::fs::read_to_string(entry.path())?));
            }
        }
    }
    Ok(())
}

/// All rules over all sources.
pub fn check(sources: &[Source]) -> Vec<Finding> {
    let per_file: [fn(&Source) -> Vec<Finding>; 11] = [
        rules::unsafe_only_in_io,
        rules::no_os_above_io,
        rules::no_driver_named,
        rules::drivers_name_no_client,
        rules::dependency_order,
        rules::no_leftovers,
        rules::line_length,
        rules::file_length,
        rules::module_head,
        rules::no_machine_paths,
        rules::no_ignored_tests,
    ];
    let exists = |path: &str| {
        path.is_empty()
            || sources.iter().any(|s| {
                s.path == path || s.path.strip_prefix(path).is_some_and(|r| r.starts_with('/'))
            })
            || ["LICENSE-MIT", "LICENSE-APACHE"].contains(&path)
    };
    let mut out: Vec<Finding> =
        sources.iter().flat_map(|s| per_file.iter().flat_map(|rule| rule(s))).collect();
    out.extend(sources.iter().flat_map(|s| rules::links_lead_somewhere(s, &exists)));
    out.sort();
    out
}

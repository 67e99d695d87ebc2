//! The check itself, on the repository that this crate stands in.

use std::path::Path;

#[test]
fn the_repository_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tidy stands in a folder");
    let sources = gipfel_tidy::read_project(root).expect("the sources can be read");
    assert!(sources.len() > 20, "only {} files found under {root:?}", sources.len());
    let found = gipfel_tidy::check(&sources);
    let list: Vec<String> =
        found.iter().map(|f| format!("{}:{}: {}", f.path, f.line, f.message)).collect();
    assert!(found.is_empty(), "{} findings\n{}", found.len(), list.join("\n"));
}

#[test]
fn the_list_of_long_files_names_files_that_are_long() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tidy stands in a folder");
    for (path, limit, reason) in gipfel_tidy::rules::LONG_FILES {
        let text = std::fs::read_to_string(root.join(path)).expect("a listed file exists");
        let lines = gipfel_tidy::source::Source::new(path, &text).product_code().count();
        assert!(lines > gipfel_tidy::rules::MAX_FILE, "{path} needs no place in the list");
        assert!(lines <= *limit && reason.len() > 10, "{path}: say why it is long");
    }
}

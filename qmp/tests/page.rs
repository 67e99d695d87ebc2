//! The reference page says what the schema says.

#[test]
fn the_reference_page_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/qmp-reference.md");
    let page = std::fs::read_to_string(path).unwrap();
    let now = gipfel_qmp::Schema::builtin().unwrap().reference_markdown();
    let differs = page.lines().zip(now.lines()).position(|(a, b)| a != b);
    assert!(
        page == now,
        "docs/qmp-reference.md differs from the schema (line {differs:?}): run \
         cargo run -p gipfel-qmp --example reference_page > docs/qmp-reference.md"
    );
}

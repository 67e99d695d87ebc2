//! Prints the reference page: `cargo run -p gipfel-qmp --example reference_page >
//! docs/qmp-reference.md` brings it up to date after a change of `qmp/schema`.

fn main() -> gipfel_base::Result<()> {
    print!("{}", gipfel_qmp::Schema::builtin()?.reference_markdown());
    Ok(())
}

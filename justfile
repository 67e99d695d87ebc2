# Daily commands; `just` alone lists them. Everything works without just too: see each line.

_list:
    @just --list --unsorted

# All checks and tests, as CI runs them
test:
    tools/test

# Formatting, clippy and the tidy check: a minute
check:
    tools/test --quick

# The main job: a disk served live, changed under its clients
demo:
    cargo run --release --quiet -- demo

# Compare with qemu-storage-daemon; arguments as for bench/run.py
bench *args:
    cargo build --release --quiet
    bench/run.py {{args}}

# The documentation of all crates
doc:
    cargo doc --workspace --no-deps --open

# Run the tests again with a seed that a failure printed
sim seed:
    GIPFEL_SEED={{seed}} cargo nextest run --workspace

# The long forms of the tests; three quarters of an hour
soak *args:
    tools/soak {{args}}

//! What the test for zeros of detect-zeroes costs, beside the plain loop over bytes
//! (docs/decisions/0004-filters.md).
//!
//!     cargo run --release -p gipfel-io --example zero_test
//!
//! With a count of passes and `buf`, `bytes` or `none` it does only that, for callgrind to count.

use std::hint::black_box;
use std::time::Instant;

use gipfel_io::Buf;

const LEN: usize = 64 << 10;

fn byte_by_byte(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}

fn passes(n: usize, what: &str, buf: &Buf, bytes: &[u8]) {
    for _ in 0..n {
        let zero = match what {
            "buf" => black_box(buf).is_zero(),
            "bytes" => byte_by_byte(black_box(bytes)),
            _ => true,
        };
        assert!(black_box(zero));
    }
}

fn main() {
    let buf = Buf::zeroed(LEN);
    let bytes = buf.to_vec();
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [n, what] = &args[..] {
        return passes(n.parse().expect("a count of passes"), what, &buf, &bytes);
    }
    for what in ["buf", "bytes"] {
        let mut fastest = f64::MAX;
        for _ in 0..20 {
            let start = Instant::now();
            passes(2000, what, &buf, &bytes);
            fastest = fastest.min(start.elapsed().as_secs_f64());
        }
        println!("{what}: {:.1} GB/s", (2000 * LEN) as f64 / fastest / 1e9);
    }
}

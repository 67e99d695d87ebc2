//! What is printed of requests: the lines that scripts read.

use std::fmt::Write;
use std::time::Duration;

use gipfel_io::Buf;

/// How the statistics of a request are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// Two lines for people.
    Human,
    /// Values between commas.
    Machine,
    /// Nothing.
    Nothing,
}

/// A number of bytes with its unit: `512 bytes`, `1.500 KiB`, `4 GiB`.
pub fn amount(bytes: f64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let exact = |text: String| match text.split_once('.') {
        Some((whole, decimals)) if decimals.bytes().all(|b| b == b'0') => whole.to_owned(),
        _ => text,
    };
    if bytes < 1024.0 {
        return exact(format!("{bytes:.6}")) + " bytes";
    }
    let (mut value, mut unit) = (bytes / 1024.0, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", exact(format!("{value:.3}")), UNITS[unit])
}

fn clock(t: Duration) -> String {
    let (all, hundredths) = (t.as_secs(), t.subsec_millis() / 10);
    format!("{}:{:02}:{:02}.{hundredths:02}", all / 3600, all / 60 % 60, all % 60)
}

/// The statistics of one request: `op` (read, wrote, discard), its place, how long it took.
pub fn statistics(op: &str, offset: u64, len: u64, took: Duration, show: Show) -> String {
    // A request that took no time that can be measured took the least that can.
    let seconds = took.as_secs_f64().max(1e-9);
    let (rate, ops) = (len as f64 / seconds, 1.0 / seconds);
    match show {
        Show::Nothing => String::new(),
        Show::Machine => format!("{len},1,{},{rate:.3},{ops:.3}\n", clock(took)),
        Show::Human => {
            let time = match took.as_secs() {
                s @ 0..60 => format!("{s:02}.{:02} sec", took.subsec_millis() / 10),
                _ => clock(took),
            };
            format!(
                "{op} {len}/{len} bytes at offset {offset}\n\
                 {}, 1 ops; {time} ({}/sec and {ops:.4} ops/sec)\n",
                amount(len as f64),
                amount(rate)
            )
        }
    }
}

/// Bytes of a line of a dump.
const LINE: usize = 16;

/// The lines of a dump of `part`, which lies at `offset`, a multiple of 16 from its beginning.
pub fn dump(offset: u64, part: &Buf, out: &mut String) {
    let mut line = [0; LINE];
    for at in (0..part.len()).step_by(LINE) {
        let line = &mut line[..LINE.min(part.len() - at)];
        part.copy_to(at, line);
        let _ = write!(out, "{:08x}:  ", offset + at as u64);
        for b in &*line {
            let _ = write!(out, "{b:02x} ");
        }
        out.push(' ');
        let shown = |b: &u8| if b.is_ascii_alphanumeric() { char::from(*b) } else { '.' };
        out.extend(line.iter().map(shown));
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_units() {
        for (bytes, text) in [
            (0.0, "0 bytes"),
            (1023.0, "1023 bytes"),
            (1018.5, "1018.500000 bytes"),
            (1536.0, "1.500 KiB"),
            (1501.0, "1.466 KiB"),
            (1_048_576.0, "1 MiB"),
            (9.3e18, "8.066 EiB"),
        ] {
            assert_eq!(amount(bytes), text);
        }
    }

    #[test]
    fn statistics_have_the_form_that_scripts_read() {
        let t = Duration::from_millis(250);
        assert_eq!(
            statistics("read", 512, 4096, t, Show::Human),
            "read 4096/4096 bytes at offset 512\n\
             4 KiB, 1 ops; 00.25 sec (16 KiB/sec and 4.0000 ops/sec)\n"
        );
        assert_eq!(
            statistics("read", 0, 4096, t, Show::Machine),
            "4096,1,0:00:00.25,16384.000,4.000\n"
        );
        let long = statistics("wrote", 0, 0, Duration::from_millis(3_725_010), Show::Human);
        assert!(long.contains("0 bytes, 1 ops; 1:02:05.01 (0 bytes/sec and 0.0003"), "{long}");
        let mut text = String::new();
        dump(16, &Buf::from_slice(b"Hi!\0Hello, world 42"), &mut text);
        assert_eq!(
            text,
            "00000010:  48 69 21 00 48 65 6c 6c 6f 2c 20 77 6f 72 6c 64  Hi..Hello..world\n\
             00000020:  20 34 32  .42\n"
        );
    }
}

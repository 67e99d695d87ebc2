//! Finding zeros in data that was read.

use gipfel_io::Buf;

/// Blocks are looked at in this size where the shortest hole that counts is a multiple of it.
const BLOCK: usize = 4096;
/// And in this size elsewhere.
const SECTOR: usize = 512;

/// Parts of a buffer: where each begins, how long it is, whether it is data (else zeros).
pub type Part = (usize, usize, bool);

/// Splits `buf`, which goes to `offset` of the target, into data and zeros. Zeros shorter than
/// `shortest` bytes count as data; with 0 everything does. Blocks are those of the target, since
/// only whole ones are holes there.
pub fn split(buf: &Buf, offset: u64, shortest: usize) -> Vec<Part> {
    if shortest == 0 {
        return vec![(0, buf.len(), true)];
    }
    let block = if shortest.is_multiple_of(BLOCK) { BLOCK } else { SECTOR };
    let mut parts: Vec<Part> = Vec::new();
    let mut at = 0;
    while at < buf.len() {
        let into = (offset % block as u64) as usize + at;
        let len = (block - into % block).min(buf.len() - at);
        push(&mut parts, (at, len, !buf.slice(at..at + len).is_zero()));
        at += len;
    }
    if parts.iter().all(|p| !p.2) {
        return parts;
    }
    let mut joined = Vec::with_capacity(parts.len());
    for (at, len, data) in parts {
        // A piece of a block at an edge goes with what lies beyond the edge: as zeros it does not
        // keep the block from being a hole.
        let is_edge = len < BLOCK && (at == 0 || at + len == buf.len());
        push(&mut joined, (at, len, data || len < shortest && !is_edge));
    }
    joined
}

/// Splits `buf`, which goes to `offset` of the target, into units of `unit` bytes there that are
/// all zeros, and the others.
pub fn units(buf: &Buf, offset: u64, unit: usize) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut at = 0;
    while at < buf.len() {
        let into = (offset % unit as u64) as usize + at;
        let len = (unit - into % unit).min(buf.len() - at);
        push(&mut parts, (at, len, !buf.slice(at..at + len).is_zero()));
        at += len;
    }
    parts
}

/// Adds a part, to the last one if it is of the same kind.
fn push(parts: &mut Vec<Part>, part: Part) {
    match parts.last_mut() {
        Some(last) if last.2 == part.2 => last.1 += part.1,
        _ => parts.push(part),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_found_where_they_are_long_enough() {
        let mut bytes = vec![0u8; 64 * 1024];
        bytes[5000] = 1;
        bytes[20_000] = 1;
        let buf = Buf::from_slice(&bytes);
        let at_4k = [
            (0, 4096, false),
            (4096, 4096, true),
            (8192, 8192, false),
            (16384, 4096, true),
            (20480, 45056, false),
        ];
        assert_eq!(split(&buf, 0, 4096), at_4k);
        assert_eq!(split(&buf, 0, 32768), [(0, 20480, true), (20480, 45056, false)]);
        assert_eq!(split(&buf, 0, 0), [(0, 65536, true)]);
        assert_eq!(split(&buf, 0, 512)[1], (4608, 512, true));
        assert_eq!(split(&Buf::zeroed(1000), 512, 4096), [(0, 1000, false)]);
        assert_eq!(units(&buf, 0, 16384)[..2], [(0, 32768, true), (32768, 32768, false)]);
        assert_eq!(units(&buf, 1024, 65536), [(0, 64512, true), (64512, 1024, false)]);
        assert_eq!(split(&buf, 1024, 4096)[..2], [(0, 3072, false), (3072, 4096, true)]);
    }
}

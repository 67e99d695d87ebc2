//! Owned, aligned, reference-counted I/O buffers, pooled by thread.
//!
//! A [`Buf`] is a window onto a block of memory that lives as long as any window does; an
//! operation in flight holds a window of its own, so the kernel never writes to freed memory
//! (invariant 6). Bytes are only copied in and out, except where a window is the only one left
//! ([`Buf::exclusive`]): nobody holds a Rust reference to memory that the kernel may write.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering, fence};

use gipfel_base::limits::{BUFFER_ALIGN, MAX_POOLED};

/// Smallest block, in bytes (2^9); classes double from here.
const MIN_SHIFT: u32 = 9;
/// Largest pooled block, in bytes (2^21); larger ones are freed at once.
const MAX_SHIFT: u32 = 21;
const CLASSES: usize = (MAX_SHIFT - MIN_SHIFT + 1) as usize;

struct Block {
    refs: AtomicUsize,
    data: NonNull<u8>,
    layout: Layout,
}

/// A window of `len` bytes onto a shared block of I/O memory.
pub struct Buf {
    block: NonNull<Block>,
    start: usize,
    len: usize,
}

// SAFETY: a block's count is atomic and its bytes are only reached by raw copies or by the one
// remaining window; moving or sharing a window between threads adds no further access.
unsafe impl Send for Buf {}
// SAFETY: as above; `&Buf` offers raw copies only.
unsafe impl Sync for Buf {}

#[derive(Default)]
struct Pool {
    free: [Vec<NonNull<Block>>; CLASSES],
    bytes: u64,
}

impl Drop for Pool {
    fn drop(&mut self) {
        for b in self.free.iter_mut().flat_map(|v| v.drain(..)) {
            // SAFETY: blocks on a free list have no window and are on exactly one list.
            unsafe { free_block(b) };
        }
    }
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

/// # Safety
/// `b` has no window left and is not used again.
unsafe fn free_block(b: NonNull<Block>) {
    // SAFETY: the caller gives up the only pointer; it came from Box::into_raw in `new_block`,
    // and `data` from `alloc_zeroed` with this layout.
    unsafe {
        let block = Box::from_raw(b.as_ptr());
        dealloc(block.data.as_ptr(), block.layout);
    }
}

fn new_block(capacity: usize) -> NonNull<Block> {
    let layout = Layout::from_size_align(capacity, BUFFER_ALIGN.min(capacity.next_power_of_two()))
        .expect("a buffer's size is bounded by the request limit");
    // SAFETY: the layout's size is not zero (`Buf::new` asks for at least 2^MIN_SHIFT).
    let data = unsafe { alloc_zeroed(layout) };
    let Some(data) = NonNull::new(data) else { handle_alloc_error(layout) };
    NonNull::from(Box::leak(Box::new(Block { refs: AtomicUsize::new(1), data, layout })))
}

fn class_of(len: usize) -> u32 {
    len.max(1).next_power_of_two().trailing_zeros().max(MIN_SHIFT)
}

impl Buf {
    /// A buffer of `len` bytes with unspecified (but initialised) contents, aligned to
    /// [`BUFFER_ALIGN`] where it is at least that long, else to its own rounded-up length.
    pub fn new(len: usize) -> Buf {
        let shift = class_of(len);
        if shift > MAX_SHIFT {
            let block = new_block(len.next_multiple_of(BUFFER_ALIGN));
            return Buf { block, start: 0, len };
        }
        let reused = POOL.try_with(|p| {
            let mut p = p.borrow_mut();
            let b = p.free[(shift - MIN_SHIFT) as usize].pop()?;
            p.bytes -= 1 << shift;
            Some(b)
        });
        let block = match reused {
            Ok(Some(b)) => {
                // SAFETY: blocks on a free list are valid and unshared.
                unsafe { b.as_ref() }.refs.store(1, Ordering::Relaxed);
                b
            }
            _ => new_block(1 << shift),
        };
        Buf { block, start: 0, len }
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Buf {
        let b = Self::new(len);
        b.fill(0);
        b
    }

    /// A buffer with a copy of `bytes`.
    pub fn from_slice(bytes: &[u8]) -> Buf {
        let b = Self::new(bytes.len());
        b.copy_from(0, bytes);
        b
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A window onto `range` of this one. Panics where the range passes the end.
    pub fn slice(&self, range: Range<usize>) -> Buf {
        assert!(range.start <= range.end && range.end <= self.len, "slice outside the buffer");
        let mut b = self.clone();
        b.start += range.start;
        b.len = range.end - range.start;
        b
    }

    /// Cuts the window in two at `at`: this one keeps the first part, the rest is returned.
    pub fn split_off(&mut self, at: usize) -> Buf {
        let rest = self.slice(at..self.len);
        self.len = at;
        rest
    }

    /// Shortens the window to at most `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Copies `bytes` in at offset `at`. Panics where they pass the end.
    pub fn copy_from(&self, at: usize, bytes: &[u8]) {
        assert!(at <= self.len && bytes.len() <= self.len - at, "copy outside the buffer");
        // SAFETY: the range was checked; the block outlives the window; `bytes` is a Rust
        // reference, which never points into a block that has a second window.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr().add(at), bytes.len()) }
    }

    /// Copies bytes out from offset `at`. Panics where they would pass the end.
    pub fn copy_to(&self, at: usize, out: &mut [u8]) {
        assert!(at <= self.len && out.len() <= self.len - at, "copy outside the buffer");
        // SAFETY: as in `copy_from`.
        unsafe { std::ptr::copy_nonoverlapping(self.ptr().add(at), out.as_mut_ptr(), out.len()) }
    }

    /// Copies the bytes of `from` in at offset `at`. Panics where they pass the end.
    pub fn copy_from_buf(&self, at: usize, from: &Buf) {
        assert!(at <= self.len && from.len <= self.len - at, "copy outside the buffer");
        // SAFETY: both ranges are checked; `copy` allows them to overlap.
        unsafe { std::ptr::copy(from.ptr(), self.ptr().add(at), from.len) }
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        // SAFETY: the window lies within its block.
        unsafe { std::ptr::write_bytes(self.ptr(), byte, self.len) }
    }

    /// Whether every byte is zero.
    pub fn is_zero(&self) -> bool {
        let mut chunk = [0u64; 32];
        let mut at = 0;
        while at < self.len {
            let n = (self.len - at).min(256);
            if n < 256 {
                chunk = [0; 32];
            }
            // SAFETY: `n` bytes from `at` lie in the window; `chunk` has 256 bytes.
            unsafe {
                std::ptr::copy_nonoverlapping(self.ptr().add(at), chunk.as_mut_ptr().cast(), n);
            }
            if chunk.iter().fold(0, |a, b| a | b) != 0 {
                return false;
            }
            at += n;
        }
        true
    }

    /// Where the bytes first differ from those of `other`, as an offset; the end of the shorter
    /// one where it is the beginning of the longer one; `None` where they are the same.
    pub fn first_difference(&self, other: &Buf) -> Option<usize> {
        const PIECE: usize = 512;
        let (mut a, mut b) = ([0u8; PIECE], [0u8; PIECE]);
        let common = self.len.min(other.len);
        let mut at = 0;
        while at < common {
            let n = (common - at).min(PIECE);
            self.copy_to(at, &mut a[..n]);
            other.copy_to(at, &mut b[..n]);
            if a[..n] != b[..n] {
                return a.iter().zip(&b).position(|(x, y)| x != y).map(|i| at + i);
            }
            at += n;
        }
        (self.len != other.len).then_some(common)
    }

    /// A copy of the bytes.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut v = vec![0; self.len];
        self.copy_to(0, &mut v);
        v
    }

    /// The bytes themselves, if this window is the only one onto its block: then no operation
    /// in flight and no other holder can touch them.
    pub fn exclusive(&mut self) -> Option<&mut [u8]> {
        // SAFETY: the block is valid while a window exists.
        if unsafe { self.block.as_ref() }.refs.load(Ordering::Acquire) != 1 {
            return None;
        }
        // SAFETY: the only window is borrowed mutably, so nobody else reaches the bytes, and
        // they are initialised (zeroed at allocation).
        Some(unsafe { std::slice::from_raw_parts_mut(self.ptr(), self.len) })
    }

    /// Whether the window's memory starts at a multiple of `align` (a power of two).
    pub fn is_aligned(&self, align: usize) -> bool {
        self.ptr() as usize & (align - 1) == 0
    }

    pub(crate) fn ptr(&self) -> *mut u8 {
        // SAFETY: `start <= capacity` by construction, so the pointer stays within the block.
        unsafe { self.block.as_ref().data.as_ptr().add(self.start) }
    }
}

impl Clone for Buf {
    fn clone(&self) -> Self {
        // SAFETY: the block is valid while a window exists.
        unsafe { self.block.as_ref() }.refs.fetch_add(1, Ordering::Relaxed);
        Buf { block: self.block, start: self.start, len: self.len }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        // SAFETY: the block is valid while this window exists.
        if unsafe { self.block.as_ref() }.refs.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        fence(Ordering::Acquire);
        let block = self.block;
        // SAFETY: this was the last window, so the block is ours.
        let size = unsafe { block.as_ref() }.layout.size();
        let kept = POOL.try_with(|p| {
            let mut p = p.borrow_mut();
            if size > 1 << MAX_SHIFT || p.bytes + size as u64 > MAX_POOLED {
                return false;
            }
            p.bytes += size as u64;
            p.free[(size.trailing_zeros() - MIN_SHIFT) as usize].push(block);
            true
        });
        if !matches!(kept, Ok(true)) {
            // SAFETY: no window is left and the block is on no list.
            unsafe { free_block(block) };
        }
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_share_and_the_last_one_is_exclusive() {
        let mut a = Buf::zeroed(10_000);
        assert!(a.is_aligned(4096) && a.is_zero());
        let b = a.split_off(4096);
        assert_eq!((a.len(), b.len()), (4096, 5904));
        b.copy_from(5903, &[7]);
        assert!(a.is_zero() && !b.is_zero());
        assert!(a.exclusive().is_none());
        drop(b);
        a.exclusive().unwrap()[0] = 1;
        assert_eq!(a.to_vec()[0], 1);
    }

    #[test]
    fn sizes_of_every_class_come_back() {
        for len in [0, 1, 511, 512, 513, 4096, 1 << 20, (1 << 21) + 1, 5 << 20] {
            for _ in 0..2 {
                let b = Buf::new(len);
                b.fill(0xff);
                assert_eq!(b.len(), len);
            }
        }
    }
}

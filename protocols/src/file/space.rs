//! Zeros, discard and what is known of a range: fallocate and SEEK_DATA behind the node contract.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{MutexGuard, PoisonError};

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::{FileKind, RangeGuard, ZeroMode};
use gipfel_node::{Driver, Status, ZeroFlags};

use super::FileDriver;

/// What the file system turned out to be unable to do.
#[derive(Default)]
pub(super) struct Ability {
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
}

impl Ability {
    pub(super) fn zeroes(&self) -> gipfel_node::Ability {
        let lacks = |b: &AtomicBool| b.load(Ordering::Relaxed);
        if lacks(&self.no_zero_range) && lacks(&self.no_punch) {
            gipfel_node::Ability::Emulated
        } else {
            gipfel_node::Ability::Native
        }
    }
}

/// How file systems say that they cannot do it (EINVAL: devices, where a range is not aligned).
fn cannot(e: &Error) -> bool {
    const EINVAL: i32 = 22;
    const ENODEV: i32 = 19;
    const ENOSYS: i32 = 38;
    const ENOTTY: i32 = 25;
    e.kind() == ErrorKind::Unsupported || matches!(e.errno(), EINVAL | ENODEV | ENOSYS | ENOTTY)
}

impl FileDriver {
    pub(super) fn known_extent(&self) -> MutexGuard<'_, Option<ByteRange>> {
        self.extent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps away those who grow the file or merge blocks where `range` lies.
    async fn hold(&self, range: ByteRange) -> Result<Option<RangeGuard<'_>>> {
        if self.direct.is_on() || range.end() > self.size() {
            let wide = self.direct.around(range)?;
            return Ok(Some(self.ranges.lock(wide).await));
        }
        Ok(None)
    }

    fn forget_extent(&self, range: ByteRange) {
        let mut known = self.known_extent();
        if known.is_some_and(|k| k.overlaps(range)) {
            *known = None;
        }
    }

    pub(super) async fn zero(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let _held = self.hold(range).await?;
        let inside = self.size().clamp(range.start(), range.end());
        let (inside, past) =
            (ByteRange::between(range.start(), inside), ByteRange::between(inside, range.end()));
        if !inside.is_empty() {
            self.zero_inside(inside, flags).await?;
        }
        if !past.is_empty() {
            // What lies past the end reads as zeros once the file is longer.
            match self.zero_as(past, ZeroMode::Keep).await {
                Err(e) if e.kind() == ErrorKind::Unsupported => self.reserve(past).await?,
                r => r?,
            }
            self.grown_to(past.end());
        }
        self.forget_extent(range);
        Ok(())
    }

    async fn zero_inside(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if flags.unmap && self.flags.unmap.load(Ordering::Relaxed) {
            match self.zero_as(range, ZeroMode::Unmap).await {
                Err(e) if e.kind() == ErrorKind::Unsupported => {}
                r => return r,
            }
        }
        self.zero_keeping(range, flags).await
    }

    /// Zeros that keep their space, by whatever the file system offers for it.
    async fn zero_keeping(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        if self.kind == FileKind::Block && flags.no_fallback {
            // The kernel would write them out where the device cannot do better.
            return Err(Error::unsupported("the device is not known to write zeros quickly"));
        }
        match self.zero_as(range, ZeroMode::Keep).await {
            Err(e) if e.kind() == ErrorKind::Unsupported && self.kind == FileKind::Regular => {
                self.zero_as(range, ZeroMode::Unmap).await?;
                self.reserve(range).await
            }
            r => r,
        }
    }

    async fn zero_as(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let lacking = match mode {
            ZeroMode::Unmap => &self.space.no_punch,
            ZeroMode::Keep => &self.space.no_zero_range,
        };
        if lacking.load(Ordering::Relaxed) {
            return Err(Error::unsupported("its file system cannot write zeros without data"));
        }
        match self.file().zero(range, mode).await {
            Err(e) if cannot(&e) => {
                lacking.store(e.kind() == ErrorKind::Unsupported, Ordering::Relaxed);
                Err(Error::unsupported(e.to_string()))
            }
            r => r,
        }
    }

    async fn reserve(&self, range: ByteRange) -> Result<()> {
        match self.file().reserve(range).await {
            Err(e) if cannot(&e) => Err(Error::unsupported(e.to_string())),
            r => r,
        }
    }

    pub(super) async fn punch(&self, range: ByteRange) -> Result<()> {
        if !self.flags.unmap.load(Ordering::Relaxed) || range.is_empty() {
            return Ok(());
        }
        let _held = self.hold(range).await?;
        match self.zero_as(range, ZeroMode::Unmap).await {
            // Discard is advice.
            Err(e) if e.kind() == ErrorKind::Unsupported => {}
            r => r?,
        }
        self.forget_extent(range);
        Ok(())
    }

    pub(super) async fn extent_status(&self, range: ByteRange) -> Result<Status> {
        let found = |data: bool, end: u64| {
            let len = end.min(range.end()) - range.start();
            let at = Some(range.start());
            let s = if data { Status::data(len, at) } else { Status::hole(len) };
            Ok(Status { at, ..s })
        };
        let known = *self.known_extent();
        if let Some(k) = known
            && k.contains(range.take(1))
        {
            return found(true, k.end());
        }
        match self.first.extent(range.start()).await {
            // A data extent stays true until this node gives it up: at worst it is said to be
            // data where it is a hole by now.
            Ok((true, end)) => {
                *self.known_extent() = Some(ByteRange::between(range.start(), end));
                found(true, end)
            }
            Ok((false, end)) => found(false, end),
            Err(e) if cannot(&e) => found(true, range.end()),
            Err(e) => Err(e.context(self.at())),
        }
    }
}

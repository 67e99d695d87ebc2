//! The moment that is kept: what a write is going to overwrite is copied to the target first, and
//! readers of the moment find each granule where it is.
//!
//! A granule is copied once. Copies, and reads of what is not copied yet, hold their granules
//! against each other: a writer waits for the copy of its granule, or for a reader that is just
//! reading it from the filtered node. A granule that needs no copy any more is not held by anyone.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_lock::Semaphore;
use gipfel_base::{ByteRange, Error, ErrorKind, Result, ResultExt};
use gipfel_io::{Buf, RangeLock, spawn_local, time};
use gipfel_node::{Child, IoFuture, SnapshotSource, Status, WriteFlags, ZeroFlags};

use super::granules::{Granules, Place};

/// Bytes that are copied, or read for a reader of the moment, in one go.
const PIECE: u64 = 1 << 20;
/// Pieces that are being copied at once: with [`PIECE`] the memory that copies take.
const COPIES: usize = 32;
/// EIO and ETIMEDOUT of Linux.
const EIO: i32 = 5;
const ETIMEDOUT: i32 = 110;

/// What a copy that fails costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OnError {
    /// The write that needed it.
    BreakGuestWrite,
    /// The moment; writes go on.
    BreakSnapshot,
}

/// A disk's state at one moment.
pub(super) struct Moment {
    file: Arc<Child>,
    target: Arc<Child>,
    granules: Granules,
    /// Granules that are being copied, or read while they are not.
    held: RangeLock,
    copies: Semaphore,
    on_error: OnError,
    /// How long a write may wait for its copies.
    timeout: Option<Duration>,
    /// Why the moment is lost, once it is.
    lost: OnceLock<Error>,
}

impl Moment {
    pub(super) fn new(
        [file, target]: [Arc<Child>; 2],
        granules: Granules,
        on_error: OnError,
        timeout: Option<Duration>,
    ) -> Arc<Moment> {
        Arc::new(Moment {
            file,
            target,
            granules,
            held: RangeLock::new(),
            copies: Semaphore::new(COPIES),
            on_error,
            timeout,
            lost: OnceLock::new(),
        })
    }

    /// For how many of the first bytes of `range` the answer holds whether they need a copy before
    /// they change.
    pub(super) fn needs_copy(&self, range: ByteRange) -> (bool, u64) {
        let size = self.granules.size();
        if self.lost.get().is_some() || range.start() >= size {
            return (false, range.len());
        }
        let inside = range.take(size - range.start());
        let (place, len) = self.granules.place(inside);
        (place == Place::Source, len)
    }

    /// Copies what is to be copied before `range` changes. An error is the write's.
    pub(super) async fn before_change(self: &Arc<Self>, range: ByteRange) -> Result<()> {
        let done = match self.timeout {
            None => self.copy(range).await,
            Some(d) => {
                let moment = self.clone();
                let mut copying = spawn_local(async move { moment.copy(range).await });
                match time::timeout(d, &mut copying).await {
                    Some(done) => done,
                    None => {
                        // It is not cut off half-way: late, it still serves the next write.
                        copying.detach();
                        let secs = d.as_secs();
                        Err(Error::os(ETIMEDOUT, format!("not copied within {secs} s")))
                    }
                }
            }
        };
        let at = || format!("copying {range:?} to '{}' before it is written", self.target.label());
        match (done.at(at), self.on_error) {
            (Err(e), OnError::BreakSnapshot) => {
                let _ = self.lost.set(e);
                Ok(())
            }
            (done, _) => done,
        }
    }

    async fn copy(&self, range: ByteRange) -> Result<()> {
        let size = self.granules.size();
        let mut left = range.intersect(ByteRange::new(0, size)).unwrap_or(range.take(0));
        while !left.is_empty() {
            let (needed, len) = self.needs_copy(left);
            let piece = left.take(if needed { len.min(PIECE) } else { len });
            if needed {
                self.copy_granules(self.granules.around(piece)).await?;
            }
            left = left.skip(piece.len());
        }
        Ok(())
    }

    /// Copies those of some whole granules that are not copied yet.
    async fn copy_granules(&self, whole: ByteRange) -> Result<()> {
        let _held = self.held.lock(whole).await;
        let mut left = whole;
        while !left.is_empty() {
            let (needed, len) = self.needs_copy(left);
            let same = left.take(len);
            left = left.skip(len);
            let mut rest = same.take(if needed { len } else { 0 });
            while !rest.is_empty() {
                self.copy_piece(rest.take(PIECE)).await?;
                rest = rest.skip(PIECE);
            }
            self.granules.set_done(same);
        }
        Ok(())
    }

    async fn copy_piece(&self, piece: ByteRange) -> Result<()> {
        let _memory = self.copies.acquire().await;
        let buf = Buf::new(piece.len() as usize);
        self.file.read(piece.start(), buf.clone()).await?;
        if buf.is_zero() {
            self.target.write_zeroes(piece, ZeroFlags::default()).await
        } else {
            self.target.write(piece.start(), buf, WriteFlags::default()).await
        }
    }

    /// Waits for the end of copies that nobody waits for any more, and lets go of the target: it
    /// does not stay open while someone still holds the filter, to flush it for instance.
    pub(super) async fn end(&self) {
        self.held.lock(ByteRange::new(0, u64::MAX)).await;
        self.target.drain().await.replace(None);
    }

    fn check_kept(&self) -> Result<()> {
        let Some(why) = self.lost.get() else { return Ok(()) };
        let text = format!("the snapshot is lost, since a copy for it failed: {why}");
        Err(Error::new(ErrorKind::Os(EIO), text))
    }

    /// Where the first bytes of `range` lie, and how many of them; those that lie in the source
    /// stay there while `f` uses them.
    async fn with_place<T>(
        &self,
        range: ByteRange,
        f: impl AsyncFnOnce(Place, ByteRange) -> Result<T>,
    ) -> Result<T> {
        self.check_kept()?;
        let piece = range.take(PIECE);
        let (mut place, mut len) = self.granules.place(piece);
        let mut held = None;
        if place == Place::Source {
            held = Some(self.held.lock(self.granules.around(piece)).await);
            (place, len) = self.granules.place(piece);
        }
        let done = f(place, piece.take(len)).await?;
        drop(held);
        // Once it is lost, writes overtake readers: what was read just now is worth nothing.
        self.check_kept()?;
        Ok(done)
    }
}

impl SnapshotSource for Moment {
    fn size(&self) -> u64 {
        self.granules.size()
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            let mut left = ByteRange::new(offset, buf.len() as u64);
            let mut buf = buf;
            while !left.is_empty() {
                let read = async |place, part: ByteRange| {
                    let b = buf.slice(0..part.len() as usize);
                    match place {
                        Place::Source => self.file.read(part.start(), b).await?,
                        Place::Target => self.target.read(part.start(), b).await?,
                        Place::Dropped => {
                            return Err(Error::invalid(format!(
                                "{part:?} of the snapshot was discarded and cannot be read"
                            )));
                        }
                    }
                    Ok(part.len())
                };
                let n = self.with_place(left, read).await?;
                left = left.skip(n);
                buf = buf.split_off(n as usize);
            }
            Ok(())
        })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move {
            let ask = async |place, part: ByteRange| {
                let (s, _) = match place {
                    Place::Source => self.file.status_through(part).await?,
                    Place::Target => self.target.status_through(part).await?,
                    // Neither data nor zeros: they cannot be read.
                    Place::Dropped => {
                        return Ok(Status { zero: false, ..Status::hole(part.len()) });
                    }
                };
                Ok(Status { allocated: true, compressed: false, at: None, ..s })
            };
            self.with_place(range, ask).await
        })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            let whole = {
                let _held = self.held.lock(self.granules.around(range)).await;
                self.granules.set_dropped(range)?
            };
            if whole.is_empty() {
                return Ok(());
            }
            self.target.discard(whole).await
        })
    }
}

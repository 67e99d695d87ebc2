//! A disk as the tools see it: in whole sectors, with zeros past the image's end.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;

use gipfel_base::{ByteRange, Result};
use gipfel_io::Buf;
use gipfel_node::Status;

use super::open::Image;

/// Its size in bytes, a multiple of 512.
pub fn size(image: &Image) -> u64 {
    super::whole_sectors(image.node.size())
}

/// What is known of the first bytes of `range`, and how many overlays were passed.
pub async fn status(image: &Image, range: ByteRange) -> Result<(Status, u32)> {
    let end = image.node.size();
    if range.start() >= end {
        return Ok((Status { allocated: false, ..Status::hole(range.len()) }, 0));
    }
    image.backend.status(range.take(end - range.start())).await
}

/// Reads all of `buf` from `offset`.
pub async fn read(image: &Image, offset: u64, buf: Buf) -> Result<()> {
    let n = image.node.size().saturating_sub(offset).min(buf.len() as u64) as usize;
    buf.slice(n..buf.len()).fill(0);
    if n > 0 { image.backend.read(offset, buf.slice(0..n)).await } else { Ok(()) }
}

/// Carries both out side by side; both end before an error is told.
pub async fn both<A, B>(
    a: impl Future<Output = Result<A>>,
    b: impl Future<Output = Result<B>>,
) -> Result<(A, B)> {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let (mut first, mut second) = (None, None);
    std::future::poll_fn(|cx| {
        if first.is_none()
            && let Poll::Ready(r) = a.as_mut().poll(cx)
        {
            first = Some(r);
        }
        if second.is_none()
            && let Poll::Ready(r) = b.as_mut().poll(cx)
        {
            second = Some(r);
        }
        match (&first, &second) {
            (Some(_), Some(_)) => Poll::Ready(()),
            _ => Poll::Pending,
        }
    })
    .await;
    match (first, second) {
        (Some(a), Some(b)) => Ok((a?, b?)),
        _ => unreachable!("both have ended"),
    }
}

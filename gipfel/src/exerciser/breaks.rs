//! Breakpoints: requests that wait at an event in the blkdebug node below the image.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use gipfel_base::{Error, ErrorKind, Result};
use gipfel_node::{DebugEvent, Node};

use super::commands::Verb;
use super::failed;
use super::image::Image;
use super::requests::InFlight;
use super::words::Call;

/// The node below `image` that holds requests at breakpoints.
async fn debugging_node(image: &Image) -> Result<Arc<Node>> {
    let mut at = image.node().await?;
    while at.driver().debugger().is_none() {
        let below = match at.driver().children().first() {
            Some(child) => child.node().await,
            None => None,
        };
        at = below.ok_or_else(|| {
            Error::unsupported("breakpoints need an image that stands on blkdebug: blkdebug::FILE")
        })?;
    }
    Ok(at)
}

/// Carries out one of the commands for breakpoints. Whether all was well.
pub async fn run(image: &Image, in_flight: &InFlight, call: &Call<'_>) -> Result<bool> {
    let done = async {
        let node = debugging_node(image).await?;
        let Some(debugger) = node.driver().debugger() else { return Ok(()) };
        match (call.def.verb, &call.args[..]) {
            (Verb::Break, [event, tag]) => {
                let known = DebugEvent::from_name(event).ok_or_else(|| {
                    Error::new(ErrorKind::NotFound, format!("there is no event '{event}'"))
                })?;
                debugger.set_break(known, tag);
                Ok(())
            }
            (Verb::RemoveBreak, [tag]) => debugger.remove_break(tag),
            (Verb::Resume, [tag]) => debugger.resume(tag),
            (_, [tag, ..]) => wait(debugger.wait_break(tag), in_flight, tag).await,
            (_, []) => Ok(()),
        }
    };
    match done.await {
        Ok(()) => Ok(true),
        Err(e) => failed(call.def.name(), &e, true),
    }
}

/// Waits for `held`, as long as a request is under way that may still come there.
async fn wait(held: impl Future<Output = ()>, in_flight: &InFlight, tag: &str) -> Result<()> {
    let mut held = pin!(held);
    loop {
        let mut ended = pin!(in_flight.next_end());
        let arrived = std::future::poll_fn(|cx| {
            if held.as_mut().poll(cx).is_ready() {
                return Poll::Ready(true);
            }
            ended.as_mut().poll(cx).map(|()| false)
        })
        .await;
        if arrived {
            return Ok(());
        }
        if in_flight.is_empty() {
            let text = format!("no request is under way that could come to breakpoint '{tag}'");
            return Err(Error::new(ErrorKind::NotFound, text));
        }
    }
}

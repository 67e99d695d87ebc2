//! Commands that tell of the image, and `truncate`.

use gipfel_base::units::SECTOR;
use gipfel_base::{ByteRange, Error, Result};
use serde_json::json;

use super::failed;
use super::image::Image;
use super::report::amount;
use super::words::{Call, bytes};
use crate::img::info::specific;
use crate::img::print;
use crate::img::resize::{preallocate, preallocation};

/// `length`.
pub fn length(image: &Image) -> Result<()> {
    print(&format!("{}\n", amount(image.medium.size() as f64)))
}

/// `info`.
pub async fn info(image: &Image) -> Result<()> {
    let node = image.node().await?;
    let facts = node.driver().info().await?;
    let size = |n: u64| amount(n as f64);
    let mut text = format!(
        "format name: {}\ncluster size: {}\nvm state offset: {}\n",
        node.def().name,
        size(facts.cluster_size.unwrap_or(0).into()),
        size(facts.vm_state.unwrap_or(0))
    );
    specific(&mut text, "", &json!({ "format-specific": facts.specific }));
    print(&text)
}

/// Whether the image itself, not its backing image, holds the first bytes from `at` on, and how
/// many that holds for, up to `end`.
async fn held(image: &Image, at: u64, end: u64) -> Result<(bool, u64)> {
    let stored = image.medium.backend.size();
    if at >= stored {
        // The rest of a last sector that the file does not fill goes with it.
        return Ok((true, end - at));
    }
    let range = ByteRange::between(at, end.min(stored));
    let (status, depth) = image.medium.backend.status(range).await?;
    Ok((status.allocated && depth == 0, status.len))
}

/// `map`.
pub async fn map(image: &Image) -> Result<()> {
    let end = image.medium.size();
    let (mut at, mut open) = (0, None);
    while at < end {
        let (held, len) = held(image, at, end).await?;
        open = match open {
            Some((h, start)) if h == held => Some((h, start)),
            Some((h, start)) => {
                print(&extent(h, start, at))?;
                Some((held, at))
            }
            None => Some((held, at)),
        };
        at += len;
    }
    match open {
        Some((held, start)) => print(&extent(held, start, end)),
        None => Ok(()),
    }
}

fn extent(held: bool, start: u64, end: u64) -> String {
    let (len, state) = (end - start, if held { "    allocated" } else { "not allocated" });
    format!(
        "{} ({len:#x}) bytes {state} at offset {} ({start:#x})\n",
        amount(len as f64),
        amount(start as f64)
    )
}

/// `alloc`. Whether all was well.
pub async fn alloc(image: &Image, call: &Call<'_>) -> Result<bool> {
    let start = bytes(call.args[0])?;
    let len = call.args.get(1).map_or(Ok(SECTOR), |t| bytes(t))?;
    let end = start.saturating_add(len).min(image.medium.size()).max(start);
    let (mut at, mut sum) = (start, 0);
    while at < end {
        let (held, len) = match held(image, at, end).await {
            Ok(found) => found,
            Err(e) => return failed("is_allocated", &e, true),
        };
        sum += if held { len } else { 0 };
        at += len;
    }
    let place = amount(start as f64);
    print(&format!("{sum}/{} bytes allocated at offset {place}\n", end - start))?;
    Ok(true)
}

/// `truncate`.
pub async fn truncate(image: &Image, call: &Call<'_>) -> Result<()> {
    let size = bytes(call.args[0])?;
    let (node, backend) = (image.node().await?, &image.medium.backend);
    let how = preallocation(node.def().name, call.value('m').unwrap_or("off"))?;
    let old = backend.size();
    if how.is_some() && size < old {
        return Err(Error::invalid("space is made ready (-m) for longer disks only"));
    }
    backend.resize(size).await?;
    match how {
        Some(how) if size > old => {
            preallocate(&node, backend, ByteRange::between(old, size), how).await
        }
        _ => Ok(()),
    }
}

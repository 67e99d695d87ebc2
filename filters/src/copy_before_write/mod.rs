//! Filter copy-before-write: keeps the disk as it is at the moment when the filter comes into use.
//!
//! Before a write, a write of zeros or a discard reaches `file`, what it is going to change is
//! copied to `target`, in whole granules and once for each of them. Node snapshot-access over the
//! filter shows the moment: see [`SnapshotSource`]. Writes that change nothing
//! (copy-on-read) pass without a copy. Where each granule lies is known by a bit for each:
//! a 64 KiB granule makes that 2 MiB for a disk of 1 TiB.
//!
//! It holds true only while every writer of the node below comes through the filter; its edge
//! `file` lets no other write as soon as anyone uses the filter. What is written past the size
//! that the disk had at the moment is not copied.
//!
//! Source: BlockdevOptionsCbw of the QMP reference.

mod granules;
mod moment;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::Buf;
use gipfel_node::{
    Access, Binding, Child, ChildSpec, DriverDef, IoFuture, Kind, Mapping, OpenArgs, Opened, Perm,
    Perms, Role, SnapshotSource, WriteFlags, ZeroFlags,
};
use serde::Deserialize;
use serde_json::Value;

use crate::filter::{Below, FILE, Filter, Filtered, parse, span};
use granules::Granules;
use moment::{Moment, OnError};

/// The filter copy-before-write.
pub static COPY_BEFORE_WRITE: DriverDef = DriverDef {
    name: "copy-before-write",
    kind: Kind::Filter,
    children: &[
        FILE[0],
        ChildSpec { name: "target", role: Role::Data, binding: Binding::Position, required: true },
    ],
    open: |args| Box::pin(open(args)),
    create: None,
    probe: None,
    check: None,
};

/// Smallest granule, in bytes.
const MIN_GRANULE: u64 = 64 << 10;
/// Largest `min-cluster-size`, in bytes: one write waits for the copy of at least so much.
const MAX_MIN_CLUSTER: u64 = 1 << 30;

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    on_cbw_error: Option<String>,
    #[serde(default)]
    cbw_timeout: u32,
    #[serde(default)]
    min_cluster_size: u64,
    bitmap: Option<Value>,
}

impl Options {
    fn parse(options: Value) -> Result<Options> {
        let options: Options = parse(COPY_BEFORE_WRITE.name, options)?;
        if options.bitmap.is_some() {
            return Err(Error::unsupported(
                "option 'bitmap' needs dirty bitmaps, which this version does not have: leave it \
                 out, and the whole disk is kept",
            ));
        }
        let min = options.min_cluster_size;
        if min != 0 && !min.is_power_of_two() || min > MAX_MIN_CLUSTER {
            return Err(Error::invalid(format!(
                "min-cluster-size is {min}: it must be a power of two, at most {MAX_MIN_CLUSTER} \
                 (1 GiB)"
            )));
        }
        options.on_error()?;
        Ok(options)
    }

    fn timeout(&self) -> Option<Duration> {
        (self.cbw_timeout > 0).then(|| Duration::from_secs(self.cbw_timeout.into()))
    }

    fn on_error(&self) -> Result<OnError> {
        match self.on_cbw_error.as_deref() {
            None | Some("break-guest-write") => Ok(OnError::BreakGuestWrite),
            Some("break-snapshot") => Ok(OnError::BreakSnapshot),
            Some(other) => Err(Error::invalid(format!(
                "on-cbw-error is '{other}': it must be 'break-guest-write' or 'break-snapshot'"
            ))),
        }
    }
}

async fn open(args: OpenArgs) -> Result<Opened> {
    let options = Options::parse(args.options)?;
    let [file, target] = <[Arc<Child>; 2]>::try_from(args.children)
        .map_err(|_| Error::invalid("copy-before-write has the children 'file' and 'target'"))?;
    let (size, room) = (file.size().await?, target.size().await?);
    if room < size {
        return Err(Error::invalid(format!(
            "'{}' has {room} bytes, less than the {size} of '{}': what is to be kept may not find \
             room there",
            target.label(),
            file.label()
        )));
    }
    let (below, beside) = (file.node().await, target.node().await);
    if below.as_ref().zip(beside.as_ref()).is_some_and(|(f, t)| Arc::ptr_eq(f, t)) {
        return Err(Error::invalid(format!(
            "'{}' and '{}' are the same node: what is kept must lie elsewhere",
            file.label(),
            target.label()
        )));
    }
    let cluster = match beside {
        Some(n) => n.driver().info().await?.cluster_size.unwrap_or(1),
        None => 1,
    };
    let granule = u64::from(cluster).max(MIN_GRANULE).max(options.min_cluster_size);
    let granules = Granules::new(size, granule.next_power_of_two())?;
    let children = [file, target];
    let moment = Moment::new(children.clone(), granules, options.on_error()?, options.timeout());
    let filter = CopyBeforeWrite { options, moment };
    Ok(Opened { driver: Filtered::open(children.into(), filter).await?, implicit: Vec::new() })
}

struct CopyBeforeWrite {
    options: Options,
    moment: Arc<Moment>,
}

impl Filter for CopyBeforeWrite {
    fn map<'a>(&'a self, below: &'a Below, access: Access, range: ByteRange) -> Mapping<'a> {
        if access == Access::Read {
            return below.straight(range);
        }
        match self.moment.needs_copy(range) {
            (true, len) => Mapping::Work { len },
            (false, len) => below.straight(range.take(len)),
        }
    }

    fn write<'a>(
        &'a self,
        below: &'a Below,
        offset: u64,
        buf: Buf,
        flags: WriteFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            if !flags.unchanged {
                self.moment.before_change(span(offset, &buf)?).await?;
            }
            below.child().write(offset, buf, flags).await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        below: &'a Below,
        range: ByteRange,
        flags: ZeroFlags,
    ) -> IoFuture<'a> {
        Box::pin(async move {
            if !flags.unchanged {
                self.moment.before_change(range).await?;
            }
            below.child().write_zeroes(range, flags).await
        })
    }

    fn discard<'a>(&'a self, below: &'a Below, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            self.moment.before_change(range).await?;
            below.child().discard(range).await
        })
    }

    fn resize<'a>(&'a self, _: &'a Below, _: u64) -> IoFuture<'a> {
        Box::pin(async {
            Err(Error::unsupported("a disk keeps its size while the past of it is kept"))
        })
    }

    fn child_perms(&self, above: Perms, _: bool) -> Perms {
        if above.used.is_empty() {
            // Not in use yet, or any more: writers find their way in and out.
            return Perms::IDLE;
        }
        Perms {
            used: above.used | Perm::CONSISTENT_READ,
            shared: above.shared & !(Perm::WRITE | Perm::RESIZE),
        }
    }

    fn other_perms(&self, _: Role, above: Perms, _: bool) -> Perms {
        if above.used.is_empty() {
            return Perms::IDLE;
        }
        // Only what was copied there is read there: where the target is an overlay, what it stands
        // on may change (and does, where that is the disk).
        Perms { used: Perm::WRITE, shared: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED }
    }

    fn snapshot_source(&self) -> Option<&dyn SnapshotSource> {
        Some(&*self.moment)
    }

    fn same_options(&self, options: Value) -> Result<()> {
        if Options::parse(options)? == self.options {
            return Ok(());
        }
        Err(Error::unsupported(
            "the options of copy-before-write cannot be changed while it keeps a moment",
        ))
    }

    fn close<'a>(&'a self, _: &'a Below) -> IoFuture<'a> {
        Box::pin(async {
            self.moment.end().await;
            Ok(())
        })
    }
}

//! The contract of a driver.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use gipfel_base::{ByteRange, Error, Result};
use gipfel_io::{Buf, Entered, EpochPin, File};
use serde_json::Value;

use crate::child::Child;
use crate::copies::Copies;
use crate::debug::Debugger;
use crate::image::ImageFormat;
use crate::perm::{Perms, Role, child_perms};
use crate::snapshot::SnapshotSource;
use crate::status::Status;

/// A request's slow way: it stays on the I/O thread where it began.
pub type IoFuture<'a, T = ()> = Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

/// What a request is going to do with the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read them.
    Read,
    /// Overwrite them.
    Write,
}

/// Where the first bytes of a range lie. `len` is at least one and at most what was asked.
pub enum Mapping<'a> {
    /// In this file at `offset`.
    File {
        /// The open file.
        file: &'a File,
        /// Where in it, in bytes.
        offset: u64,
        /// How many bytes lie there in one piece.
        len: u64,
        /// Holds back what must not overlap the request while it is in flight.
        pin: Option<Entered<'a, ()>>,
    },
    /// In this child at `offset`.
    Child {
        /// The edge to the child.
        child: &'a Child,
        /// Where in it, in bytes.
        offset: u64,
        /// How many bytes lie there in one piece.
        len: u64,
        /// Keeps the place from being given to others while the request is in flight.
        pin: Option<EpochPin<'a>>,
    },
    /// Nowhere: they read as zeros. Only for [`Access::Read`].
    Zero {
        /// How many bytes.
        len: u64,
    },
    /// The driver must be asked the asynchronous way.
    Work {
        /// How many bytes from here on need that.
        len: u64,
    },
}

impl Mapping<'_> {
    /// For how many bytes the mapping holds.
    pub fn len(&self) -> u64 {
        match self {
            Mapping::File { len, .. }
            | Mapping::Child { len, .. }
            | Mapping::Zero { len }
            | Mapping::Work { len } => *len,
        }
    }

    /// Whether it holds for no byte (a driver never answers that).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How a write is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Durable before it completes.
    pub fua: bool,
    /// It does not change what is read (copy-on-read): no bitmap, no copy-before-write.
    pub unchanged: bool,
    /// Stored compressed, as far as that saves space. A node that cannot ([`Driver::compresses`])
    /// fails it with `Unsupported`.
    pub compressed: bool,
}

/// How zeros are to be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Durable before it completes.
    pub fua: bool,
    /// Space may be given back.
    pub unmap: bool,
    /// Fail with `Unsupported` rather than write zeros byte by byte.
    pub no_fallback: bool,
    /// It does not change what is read.
    pub unchanged: bool,
}

/// How far a driver can do something.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ability {
    /// Not at all.
    None,
    /// By doing something slower.
    Emulated,
    /// As such.
    Native,
}

/// What requests a node prefers, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Smallest useful size and alignment (any other works, by reading around it).
    pub align: u32,
    /// The size that costs least.
    pub preferred: u32,
}

/// What a driver tells about its image, for queries.
#[derive(Clone, Debug, Default)]
pub struct DriverInfo {
    /// What the user would write to open the same again.
    pub filename: Option<String>,
    /// Bytes taken on storage.
    pub allocated: Option<u64>,
    /// Cluster size of the format, in bytes.
    pub cluster_size: Option<u32>,
    /// Where the state of a virtual machine would begin, past the end of the disk, in bytes.
    pub vm_state: Option<u64>,
    /// The backing file's name and format as the image has them.
    pub backing: Option<(String, Option<String>)>,
    /// Whether the image says that it was not closed properly.
    pub dirty: Option<bool>,
    /// Whether what is stored is encrypted.
    pub encrypted: bool,
    /// What only this driver knows (ImageInfoSpecific of the QMP reference).
    pub specific: Option<Value>,
}

/// A reopen that was prepared and cannot fail any more. Dropping it changes nothing.
pub trait Reopen {
    /// Takes the new options into use.
    fn commit(self: Box<Self>);
}

/// One driver instance: gives structure or access to bytes. All methods may be called from any
/// I/O thread at any time; offsets and lengths lie within [`Driver::size`], except that writes to
/// a driver that [`Driver::grows`] may end past it.
pub trait Driver: Send + Sync + 'static {
    /// Visible size in bytes.
    fn size(&self) -> u64;

    /// The edges to its children; the same ones for the driver's whole life. Those that come and
    /// go are [`Driver::copies`].
    fn children(&self) -> &[Arc<Child>] {
        &[]
    }

    /// The children that come and go while it is in use, for a driver with a child of
    /// [`Role::Copy`].
    fn copies(&self) -> Option<&Copies> {
        None
    }

    /// Says why the driver could not go on with `count` copies, if it could not.
    fn check_copies(&self, count: usize) -> Result<()> {
        let _ = count;
        Ok(())
    }

    /// Where the first bytes of `range` lie, answered without waiting, locking or allocating.
    fn map(&self, access: Access, range: ByteRange) -> Mapping<'_> {
        let _ = access;
        Mapping::Work { len: range.len() }
    }

    /// Reads what [`Driver::map`] calls work.
    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a>;

    /// Writes what [`Driver::map`] calls work, and all that is to be stored compressed. FUA is the
    /// runner's business.
    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a>;

    /// Makes `range` read as zeros. `Unsupported` makes the runner write zeros, if flags allow.
    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        let _ = (range, flags);
        Box::pin(async { Err(Error::unsupported("no efficient way to write zeros")) })
    }

    /// Lets go of `range`: its contents are of no use any more. Advice: doing nothing is right.
    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        let _ = range;
        Box::pin(async { Ok(()) })
    }

    /// Makes all completed writes durable, metadata and children included.
    fn flush<'a>(&'a self) -> IoFuture<'a>;

    /// About how many bytes a flush of this node would have to write itself, in bytes; what its
    /// children hold is not counted. Answered without waiting.
    fn unflushed(&self) -> u64 {
        0
    }

    /// Lets storage begin with what a flush would have to write, bit by bit, so that requests
    /// don't feel it and the flush has little left. Ends early once `enough` says so. It makes
    /// nothing durable and reports nothing: the flush does.
    fn write_back<'a>(
        &'a self,
        enough: &'a dyn Fn() -> bool,
    ) -> Pin<Box<dyn Future<Output = ()> + 'a>> {
        let _ = enough;
        Box::pin(async {})
    }

    /// What is known of the first bytes of `range`.
    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status>;

    /// Whether writes past the end make it larger.
    fn grows(&self) -> bool {
        false
    }

    /// Whether bytes that were never written read as zeros, also after growing.
    fn reads_zero_when_new(&self) -> bool {
        false
    }

    /// How zeros are written.
    fn zero_ability(&self) -> Ability {
        Ability::Emulated
    }

    /// The unit in which it stores compressed what is written so, in bytes; `None` if it cannot.
    /// Other sizes work too, by reading around them.
    fn compresses(&self) -> Option<u32> {
        None
    }

    /// Preferred sizes.
    fn limits(&self) -> Limits {
        Limits { align: 1, preferred: 4096 }
    }

    /// What it needs of child `index`, given what its parents together need and allow.
    fn child_perms(&self, index: usize, role: Role, above: Perms, writable: bool) -> Perms {
        let _ = index;
        child_perms(role, above, writable)
    }

    /// Takes (or gives up) what its parents' permissions mean outside this process, such as file
    /// locks. Giving up must not fail.
    fn set_perms<'a>(&'a self, perms: Perms) -> IoFuture<'a> {
        let _ = perms;
        Box::pin(async { Ok(()) })
    }

    /// While `on`, an edge above waits for the requests inside: those that the driver holds back
    /// by choice (a throttle's queue) go on at once. Calls may nest; each `true` is followed by a
    /// `false`.
    fn expedite(&self, on: bool) {
        let _ = on;
    }

    /// The past moment that it shows beside its data, if it keeps one.
    fn snapshot_source(&self) -> Option<&dyn SnapshotSource> {
        None
    }

    /// Who hears of events in the nodes above, if this driver wants to. It answers no request by a
    /// mapping, so that events of mapped requests reach it before them.
    fn debugger(&self) -> Option<&dyn Debugger> {
        None
    }

    /// What image tools can change of the image, if it is one of a format that has more than data.
    fn image_format(&self) -> Option<&dyn ImageFormat> {
        None
    }

    /// Changes the visible size, in bytes. What a larger one adds reads as zeros. Nobody uses what
    /// a smaller one cuts off.
    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        let _ = size;
        Box::pin(async { Err(Error::unsupported("this node cannot be resized")) })
    }

    /// Checks and prepares new options (as the driver's `open` takes them). `read_only` is the
    /// common option.
    fn reopen<'a>(&'a self, options: Value, read_only: bool) -> IoFuture<'a, Box<dyn Reopen>> {
        let _ = (options, read_only);
        Box::pin(async { Err(Error::unsupported("this driver has no option that can be changed")) })
    }

    /// Facts for queries.
    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        Box::pin(async { Ok(DriverInfo::default()) })
    }

    /// Writes back what is only in memory, before the node goes. No request follows.
    fn close<'a>(&'a self) -> IoFuture<'a> {
        self.flush()
    }
}

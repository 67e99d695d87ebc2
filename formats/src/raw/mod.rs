//! Format `raw`: the bytes of its child as they are, or a window of them (BlockdevOptionsRaw).
//!
//! It keeps no metadata, so it asks of its child what is asked of it and nothing more.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_node::{
    Ability, Access, Binding, Child, ChildSpec, CreateArgs, DebugEvent, Driver, DriverDef,
    DriverInfo, ImageSize, IoFuture, Kind, Limits, Mapping, OpenArgs, Opened, Perms, Reopen, Role,
    Status, WriteFlags, ZeroFlags,
};
use serde::Deserialize;
use serde_json::Value;

/// The format `raw`.
pub static RAW: DriverDef = DriverDef {
    name: "raw",
    kind: Kind::Format,
    children: &[ChildSpec {
        name: "file",
        role: Role::Data,
        binding: Binding::Position,
        required: true,
    }],
    open: |args| Box::pin(open(args)),
    create: Some(|args| Box::pin(create(args))),
    // Any bytes are a raw image, but every other format is surer of its own.
    probe: Some(|_| 1),
    check: None,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Options {
    #[serde(default)]
    offset: u64,
    size: Option<u64>,
    /// Nobody said that this is a raw image, and none of its bytes spoke against it. It shall not
    /// become, by what is written to it, an image of another format that is believed at its next
    /// opening. An option of tools; users cannot give it.
    #[serde(default)]
    guessed: bool,
}

/// Sizes are whole sectors where a window is given (as the reference has it).
const SECTOR: u64 = 512;

struct Raw {
    children: [Arc<Child>; 1],
    offset: u64,
    /// Size of the window, if one was given.
    fixed: Option<u64>,
    /// Size when it was last seen, for the moments in which the child is being changed.
    seen: AtomicU64,
    options: Options,
}

fn parse(options: Value) -> Result<Options> {
    serde_json::from_value(options)
        .map_err(|e| Error::invalid(format!("options of format 'raw': {e}")))
}

async fn open(args: OpenArgs) -> Result<Opened> {
    let options = parse(args.options)?;
    let [child] = <[Arc<Child>; 1]>::try_from(args.children)
        .map_err(|_| Error::invalid("format 'raw' has one child, 'file'"))?;
    let below = child.size().await?;
    let size = window(&options, below)?;
    let driver = Raw {
        children: [child],
        offset: options.offset,
        fixed: options.size.map(|_| size),
        seen: AtomicU64::new(size),
        options,
    };
    Ok(Opened { driver: Box::new(driver), implicit: Vec::new() })
}

/// The size of the window on a child of `below` bytes.
fn window(o: &Options, below: u64) -> Result<u64> {
    let Some(room) = below.checked_sub(o.offset) else {
        return Err(Error::invalid(format!(
            "offset {} lies past the end of the file, which has {below} bytes",
            o.offset
        )));
    };
    let Some(size) = o.size else { return Ok(room) };
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::invalid(format!("size {size} is not a multiple of {SECTOR}")));
    }
    if size > room {
        return Err(Error::invalid(format!(
            "offset {} and size {size} together pass the end of the file, which has {below} bytes",
            o.offset
        )));
    }
    Ok(size)
}

/// How large the file of an image that is made with these options becomes: as large as the disk.
pub fn measure(options: Value) -> Result<ImageSize> {
    let disk = options.get("size").and_then(Value::as_u64);
    let disk = disk.ok_or_else(|| Error::invalid("option 'size' is missing"))?;
    Ok(ImageSize { disk, overhead: 0, unit: gipfel_base::units::SECTOR, whole: true })
}

/// Gives the file its size; the file is the image.
async fn create(args: CreateArgs) -> Result<()> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Create {
        size: u64,
        preallocation: Option<Preallocation>,
    }
    #[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Preallocation {
        Off,
        Falloc,
        Full,
    }
    const PIECE: u64 = 1 << 20;
    let o: Create = serde_json::from_value(args.options)
        .map_err(|e| Error::invalid(format!("options to create a raw image: {e}")))?;
    let child = args.children.into_iter().find(|(n, _)| n == "file");
    let (_, child) = child.ok_or_else(|| Error::invalid("option 'file' is missing"))?;
    let none = || Error::new(ErrorKind::NoMedium, "'file' has no node");
    let node = child.node().await.ok_or_else(none)?;
    node.driver().resize(0).await?;
    node.driver().resize(o.size).await?;
    let all = ByteRange::new(0, o.size);
    match o.preallocation.unwrap_or(Preallocation::Off) {
        Preallocation::Off => {}
        Preallocation::Falloc => child.write_zeroes(all, ZeroFlags::default()).await?,
        Preallocation::Full => {
            let zeros = Buf::zeroed(PIECE.min(o.size) as usize);
            let mut left = all;
            while !left.is_empty() {
                let part = left.take(PIECE);
                let b = zeros.slice(0..part.len() as usize);
                child.write(part.start(), b, WriteFlags::default()).await?;
                left = left.skip(PIECE);
            }
        }
    }
    child.flush().await
}

/// Refuses bytes for the start of an image that would make it look like one of another format.
fn refuse_header(first: &Buf) -> Result<()> {
    let mut head = [0; SECTOR as usize];
    let n = head.len().min(first.len());
    first.slice(0..n).copy_to(0, &mut head[..n]);
    let looks = |d: &&&DriverDef| d.probe.is_some_and(|p| p(&head) > 1);
    match crate::FORMATS.iter().find(looks) {
        None => Ok(()),
        Some(d) => Err(Error::new(
            ErrorKind::PermissionDenied,
            format!(
                "these bytes would make an image of format '{}' of one that was only taken for \
                 raw: give the format to write them",
                d.name
            ),
        )),
    }
}

impl Raw {
    /// The first sector as a write would leave it.
    async fn first_sector_with(&self, offset: u64, buf: &Buf) -> Result<Buf> {
        let end = offset + buf.len() as u64;
        let first = Buf::zeroed(SECTOR.min(self.size().max(end)) as usize);
        if offset > 0 || end < first.len() as u64 {
            let stored = first.slice(0..first.len().min(self.size() as usize));
            self.child().read(self.offset, stored).await?;
        }
        let part = first.slice(offset as usize..first.len().min(end as usize));
        part.copy_from_buf(0, &buf.slice(0..part.len()));
        Ok(first)
    }

    fn child(&self) -> &Child {
        &self.children[0]
    }

    /// What the child's driver says, while the edge is not being changed.
    fn below<T>(&self, f: impl FnOnce(&dyn Driver) -> T) -> Option<T> {
        let entered = self.child().try_enter()?;
        entered.as_ref().map(|n| f(n.driver()))
    }

    fn down(&self, range: ByteRange) -> Result<ByteRange> {
        range
            .start()
            .checked_add(self.offset)
            .and_then(|s| ByteRange::checked(s, range.len()))
            .ok_or_else(|| Error::invalid("a request ends past 2^64 bytes"))
    }
}

impl Driver for Raw {
    fn size(&self) -> u64 {
        if let Some(size) = self.fixed {
            return size;
        }
        match self.below(|d| d.size().saturating_sub(self.offset)) {
            Some(size) => {
                self.seen.store(size, Ordering::Relaxed);
                size
            }
            None => self.seen.load(Ordering::Relaxed),
        }
    }

    fn children(&self) -> &[Arc<Child>] {
        &self.children
    }

    fn map(&self, access: Access, range: ByteRange) -> Mapping<'_> {
        if self.options.guessed && access == Access::Write && range.start() < SECTOR {
            return Mapping::Work { len: range.len() };
        }
        match self.down(range) {
            Ok(r) => Mapping::Child {
                child: self.child(),
                offset: r.start(),
                len: range.len(),
                pin: None,
            },
            Err(_) => Mapping::Work { len: range.len() },
        }
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            let r = self.down(ByteRange::new(offset, buf.len() as u64))?;
            self.child().read(r.start(), buf).await
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            if self.options.guessed && offset < SECTOR {
                refuse_header(&self.first_sector_with(offset, &buf).await?)?;
            }
            let r = self.down(ByteRange::new(offset, buf.len() as u64))?;
            self.child().write(r.start(), buf, flags).await
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move { self.child().write_zeroes(self.down(range)?, flags).await })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move { self.child().discard(self.down(range)?).await })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            self.child().event(DebugEvent::FlushToOs).await;
            self.child().event(DebugEvent::FlushToDisk).await;
            self.child().flush().await
        })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move {
            let below = self.down(range)?;
            // The child's whole chain is this image's own bytes.
            let (s, _) = self.child().status_through(below).await?;
            Ok(Status { allocated: true, at: Some(below.start()), compressed: false, ..s })
        })
    }

    fn grows(&self) -> bool {
        self.fixed.is_none() && self.below(|d| d.grows()).unwrap_or(false)
    }

    fn reads_zero_when_new(&self) -> bool {
        self.fixed.is_none() && self.below(|d| d.reads_zero_when_new()).unwrap_or(false)
    }

    fn zero_ability(&self) -> Ability {
        self.below(|d| d.zero_ability()).unwrap_or(Ability::Emulated)
    }

    fn limits(&self) -> Limits {
        let l = self.below(|d| d.limits()).unwrap_or(Limits { align: 1, preferred: 4096 });
        // The first sector is judged as a whole.
        let align = if self.options.guessed { l.align.max(SECTOR as u32) } else { l.align };
        Limits { align, ..l }
    }

    fn child_perms(&self, _: usize, _: Role, above: Perms, _: bool) -> Perms {
        above
    }

    fn resize<'a>(&'a self, size: u64) -> IoFuture<'a> {
        Box::pin(async move {
            if self.fixed.is_some() {
                return Err(Error::unsupported(
                    "the size of this node is fixed by its option 'size'",
                ));
            }
            let below = self.down(ByteRange::new(size, 0))?.start();
            let node = self.child().node().await;
            let node = node.ok_or_else(|| {
                Error::new(ErrorKind::NoMedium, format!("'{}' is empty", self.child().label()))
            })?;
            node.driver().resize(below).await
        })
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        Box::pin(async move {
            let Some(node) = self.child().node().await else { return Ok(DriverInfo::default()) };
            let below = node.driver().info().await?;
            // A window is not what one gets by opening the file's name.
            let filename = below.filename.filter(|_| self.offset == 0 && self.fixed.is_none());
            let (allocated, dirty) = (below.allocated, below.dirty);
            Ok(DriverInfo { filename, allocated, dirty, ..DriverInfo::default() })
        })
    }

    fn reopen<'a>(&'a self, options: Value, _: bool) -> IoFuture<'a, Box<dyn Reopen>> {
        struct Same;
        impl Reopen for Same {
            fn commit(self: Box<Self>) {}
        }
        Box::pin(async move {
            let mut options = options;
            if let Some(o) = options.as_object_mut() {
                o.remove("discard");
            }
            let asked = Options { guessed: self.options.guessed, ..parse(options)? };
            if asked != self.options {
                return Err(Error::unsupported(
                    "options 'offset' and 'size' cannot be changed while the node is open",
                ));
            }
            Ok(Box::new(Same) as Box<dyn Reopen>)
        })
    }
}

#[cfg(test)]
mod tests;

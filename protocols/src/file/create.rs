//! Making a file (QMP reference, BlockdevCreateOptionsFile).
//!
//! An existing file is locked before anything of it is cut off, so that the image of a running
//! machine survives a slip of the keyboard.

use std::path::Path;

use gipfel_base::{ByteRange, Error, ErrorKind, Result, ResultExt};
use gipfel_io::file::remove;
use gipfel_io::{Buf, File, OpenOptions};
use gipfel_node::{CreateArgs, Perm, Perms};
use serde::Deserialize;

use super::MAX_SIZE;
use super::lock::{Locks, Use};

/// What is written of the space in advance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Space is reserved, without writing data.
    Falloc,
    /// Zeros are written.
    Full,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    filename: String,
    size: u64,
    #[serde(default)]
    preallocation: Preallocation,
    /// Only a hint to file systems with copy-on-write of their own: taken and not acted upon,
    /// since it needs an ioctl that the I/O layer does not offer.
    #[expect(dead_code, reason = "taken, so that it is no unknown option")]
    nocow: Option<bool>,
    /// A hint for file systems with extents, as above.
    #[expect(dead_code, reason = "taken, so that it is no unknown option")]
    extent_size_hint: Option<u64>,
}

/// Zeros are written in pieces of this size, in bytes.
const PIECE: u64 = 1 << 20;

pub(super) async fn create(args: CreateArgs) -> Result<()> {
    let o: Options = serde_json::from_value(args.options)
        .map_err(|e| Error::invalid(format!("options to create a file: {e}")))?;
    if o.size > MAX_SIZE {
        return Err(Error::invalid(format!("size {} is more than a file can have", o.size)));
    }
    let path = Path::new(&o.filename);
    let write = OpenOptions { write: true, ..OpenOptions::default() };
    let (file, is_new) = match File::open(path, write).await {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let how = OpenOptions { create_new: true, ..write };
            (File::open(path, how).await?, true)
        }
        f => (f?, false),
    };
    let made = fill(&file, &o).await.at(|| format!("creating '{}'", o.filename));
    if made.is_err() && is_new {
        // The first error is the one that counts.
        let _ = remove(path).await;
    }
    made
}

async fn fill(file: &File, o: &Options) -> Result<()> {
    let locks = Locks::new(Use::Auto);
    let used = Perm::WRITE | Perm::RESIZE;
    locks.set(file, &o.filename, Perms { used, shared: !Perm::RESIZE }).await?;
    let info = file.info().await?;
    if info.kind != gipfel_io::FileKind::Regular {
        return match info.len {
            len if o.size <= len => Ok(()),
            len => Err(Error::new(
                ErrorKind::NoSpace,
                format!("it is a device of {len} bytes, too small for {}", o.size),
            )),
        };
    }
    file.set_len(0).await?;
    match o.preallocation {
        Preallocation::Off => file.set_len(o.size).await,
        Preallocation::Falloc if o.size == 0 => Ok(()),
        Preallocation::Falloc => file.reserve(ByteRange::new(0, o.size)).await,
        Preallocation::Full => {
            let zeros = Buf::zeroed(PIECE.min(o.size) as usize);
            let mut left = ByteRange::new(0, o.size);
            while !left.is_empty() {
                let part = left.take(PIECE);
                file.write_at(part.start(), zeros.slice(0..part.len() as usize)).await?;
                left = left.skip(PIECE);
            }
            file.sync().await
        }
    }
}

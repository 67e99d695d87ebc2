//! What image tools ask of a format beyond reading and writing: changes of what an image says of
//! itself. Whoever asks is the only user of the image.

use gipfel_base::ByteRange;
use serde_json::Value;

use crate::driver::IoFuture;

/// How far space is made ready before it is written (PreallocMode of the QMP reference).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preallocation {
    /// Every guest cluster has its host cluster.
    Metadata,
    /// And that has its space reserved.
    Falloc,
    /// And zeros written to it.
    Full,
}

/// The image that another one stands on, as that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// File name, relative to the image.
    pub file: String,
    /// Format, where it is said.
    pub format: Option<String>,
}

/// A format whose images can be changed beside their contents.
pub trait ImageFormat {
    /// Writes what the image stands on into it. What it shows until it is opened anew stays what
    /// the open backing child shows. A loss of power leaves the old name or the new one.
    fn set_backing<'a>(&'a self, backing: Option<BackingName>) -> IoFuture<'a>;

    /// Lets go of all that the image holds itself, so that its backing image decides every byte.
    fn make_empty<'a>(&'a self) -> IoFuture<'a>;

    /// Gives `range` (bytes of the disk), which reads as zeros and was never written, its space.
    fn preallocate<'a>(&'a self, range: ByteRange, how: Preallocation) -> IoFuture<'a>;

    /// Changes options of the image (BlockdevCreateOptions of the format without `driver`, those
    /// that are to change). `progress` hears of bytes of the disk done and of all. The image is
    /// closed afterwards.
    fn amend<'a>(&'a self, options: Value, progress: &'a dyn Fn(u64, u64)) -> IoFuture<'a>;
}

/// How large the file of a new image becomes, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageSize {
    /// Size of the disk.
    pub disk: u64,
    /// What is stored beside data, for all of the disk.
    pub overhead: u64,
    /// Data are stored in pieces of this size.
    pub unit: u64,
    /// Whether all of the disk takes space at once, because it is preallocated.
    pub whole: bool,
}

impl ImageSize {
    /// The file's size while `units` pieces hold data.
    pub fn required(&self, units: u64) -> u64 {
        if self.whole { self.full() } else { self.overhead + units * self.unit }
    }

    /// The file's size once all of the disk has been written.
    pub fn full(&self) -> u64 {
        self.overhead + self.disk.div_ceil(self.unit) * self.unit
    }
}

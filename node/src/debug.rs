//! Events: what a driver says to its child while it works, for fault injection.
//!
//! A format tells its `file` child what it is about to do ("the next write is of an L2 table").
//! Whoever injects errors or holds requests there listens: see
//! [`Driver::debugger`](crate::Driver::debugger). To all others an event costs a look at the child,
//! and nothing on the steady path, where none is told.

use std::future::Future;
use std::pin::Pin;

use gipfel_base::Result;

use crate::child::Child;
use crate::def::Kind;
use crate::node::Node;
use crate::perm::Role;

macro_rules! events {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Something that happens in the node above (BlkdebugEvent of the QMP reference).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum DebugEvent {
            $($(#[$doc])* $name,)*
        }

        impl DebugEvent {
            /// All of them.
            pub const ALL: &[DebugEvent] = &[$(DebugEvent::$name,)*];

            /// Its name, as QMP writes it.
            pub fn name(self) -> &'static str {
                match self {
                    $(DebugEvent::$name => $text,)*
                }
            }

            /// The event of that name.
            pub fn from_name(name: &str) -> Option<DebugEvent> {
                Self::ALL.iter().copied().find(|e| e.name() == name)
            }
        }
    };
}

events! {
    /// Entries of the L1 table are written.
    L1Update = "l1_update",
    /// A longer L1 table gets its place.
    L1GrowAllocTable = "l1_grow_alloc_table",
    /// The longer L1 table is written.
    L1GrowWriteTable = "l1_grow_write_table",
    /// The header is pointed at the longer L1 table.
    L1GrowActivateTable = "l1_grow_activate_table",
    /// An L2 table is read.
    L2Load = "l2_load",
    /// Entries of an L2 table are written.
    L2Update = "l2_update",
    /// The same for compressed clusters.
    L2UpdateCompressed = "l2_update_compressed",
    /// An L2 table that others share is read, to be copied.
    L2AllocCowRead = "l2_alloc_cow_read",
    /// A new L2 table is written.
    L2AllocWrite = "l2_alloc_write",
    /// Guest data are read from the image.
    ReadAio = "read_aio",
    /// Guest data are read from the backing file.
    ReadBackingAio = "read_backing_aio",
    /// A compressed cluster is read.
    ReadCompressed = "read_compressed",
    /// Guest data are written.
    WriteAio = "write_aio",
    /// A compressed cluster is written.
    WriteCompressed = "write_compressed",
    /// The state of a virtual machine is read.
    VmstateLoad = "vmstate_load",
    /// The state of a virtual machine is written.
    VmstateSave = "vmstate_save",
    /// The rest of a cluster is read for copy-on-write.
    CowRead = "cow_read",
    /// The rest of a cluster is written for copy-on-write.
    CowWrite = "cow_write",
    /// The refcount table is read.
    ReftableLoad = "reftable_load",
    /// The refcount table becomes longer.
    ReftableGrow = "reftable_grow",
    /// Entries of the refcount table are written.
    ReftableUpdate = "reftable_update",
    /// A refcount block is read.
    RefblockLoad = "refblock_load",
    /// A refcount block is written.
    RefblockUpdate = "refblock_update",
    /// A part of a refcount block is written.
    RefblockUpdatePart = "refblock_update_part",
    /// A refcount block is made.
    RefblockAlloc = "refblock_alloc",
    /// A new refcount block is entered into the refcount table.
    RefblockAllocHookup = "refblock_alloc_hookup",
    /// A new refcount block is written.
    RefblockAllocWrite = "refblock_alloc_write",
    /// The blocks for a longer refcount table are written.
    RefblockAllocWriteBlocks = "refblock_alloc_write_blocks",
    /// A longer refcount table is written.
    RefblockAllocWriteTable = "refblock_alloc_write_table",
    /// The header is pointed at the longer refcount table.
    RefblockAllocSwitchTable = "refblock_alloc_switch_table",
    /// Clusters are taken.
    ClusterAlloc = "cluster_alloc",
    /// Space for compressed data is taken.
    ClusterAllocBytes = "cluster_alloc_bytes",
    /// Clusters are given back.
    ClusterFree = "cluster_free",
    /// What is only in memory is written out.
    FlushToOs = "flush_to_os",
    /// What was written is made durable.
    FlushToDisk = "flush_to_disk",
    /// An unaligned write reads the block that it begins in.
    PwritevRmwHead = "pwritev_rmw_head",
    /// That has been read.
    PwritevRmwAfterHead = "pwritev_rmw_after_head",
    /// An unaligned write reads the block that it ends in.
    PwritevRmwTail = "pwritev_rmw_tail",
    /// That has been read.
    PwritevRmwAfterTail = "pwritev_rmw_after_tail",
    /// Data are written to the listener itself.
    Pwritev = "pwritev",
    /// Zeros are written to the listener itself.
    PwritevZero = "pwritev_zero",
    /// Either has ended.
    PwritevDone = "pwritev_done",
    /// An empty image is about to be made of this one.
    EmptyImagePrepare = "empty_image_prepare",
    /// A shorter L1 table is written.
    L1ShrinkWriteTable = "l1_shrink_write_table",
    /// L2 tables past the end of a shorter L1 table are given back.
    L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters",
    /// What was read from a backing file is kept (copy-on-read).
    CorWrite = "cor_write",
    /// Space for clusters is taken at the end of the file.
    ClusterAllocSpace = "cluster_alloc_space",
    /// The listener has been opened.
    Created = "none",
}

/// A wait that ends when a request may go on.
pub type Held<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Hears of events, and holds the requests that reach a breakpoint.
pub trait Debugger {
    /// `event` happens now. A request that reaches a breakpoint waits for what this gives.
    fn event(&self, event: DebugEvent) -> Option<Held<'_>>;

    /// Lets the next request that comes to `event` wait there, under the name `tag`. Breakpoints
    /// are used up by the request that reaches them.
    fn set_break(&self, event: DebugEvent, tag: &str);

    /// Removes the breakpoints `tag` and lets what waits there go on. Fails where there is
    /// neither.
    fn remove_break(&self, tag: &str) -> Result<()>;

    /// Lets the request that has waited longest as `tag` go on. Fails where there is none.
    fn resume(&self, tag: &str) -> Result<()>;

    /// Waits until a request waits as `tag`.
    fn wait_break<'a>(&'a self, tag: &'a str) -> Held<'a>;

    /// Fails where an error is to be injected into a query of status for `len` bytes at `offset`.
    fn status(&self, offset: u64, len: u64) -> Result<()>;
}

impl Child {
    /// Tells the node below that `event` happens, and waits while a breakpoint holds it. Whether
    /// somebody there listens.
    pub async fn event(&self, event: DebugEvent) -> bool {
        let entered = self.enter().await;
        let debugger = entered.as_ref().and_then(|n| n.driver().debugger());
        if let Some(held) = debugger.and_then(|d| d.event(event)) {
            held.await;
        }
        debugger.is_some()
    }
}

/// Tells `node` of a request for guest data that `above` mapped to it through `child`.
pub(crate) fn mapped<'a>(
    above: Option<&Node>,
    child: &Child,
    node: &'a Node,
    event: DebugEvent,
) -> Option<Held<'a>> {
    let debugger = node.driver().debugger()?;
    let above = above.filter(|n| n.def().kind == Kind::Format)?;
    let at = above.driver().children().iter().position(|c| std::ptr::eq(&**c, child))?;
    match above.def().children[at].role {
        Role::Image | Role::Data => debugger.event(event),
        Role::Filtered | Role::Backing | Role::Copy => None,
    }
}

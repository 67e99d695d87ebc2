//! Opening an image: header, L1 table, refcount table, and what is done once before the first
//! write.

use std::collections::HashSet;
use std::sync::Arc;

use gipfel_base::sync::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use gipfel_base::sync::sync::{Mutex, PoisonError};
use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::{Buf, Epoch, RangeLock};
use gipfel_node::{Child, DebugEvent, Discard, Implicit, OpenArgs, Opened, WriteFlags};

use super::cache::TableCache;
use super::check;
use super::entry::OFFSET_MASK;
use super::geometry::Geometry;
use super::header::{self, CORRUPT, DIRTY, Header, RAW_DATA_FILE};
use super::l1::L1;
use super::load::words;
use super::options::Options;
use super::refcounts::Refcounts;
use super::{Flags, Qcow2, flush};

/// Where the autoclear features stand in the header.
const AUTOCLEAR_FIELD: u64 = 88;
/// Bits 9 to 63 of an entry of the refcount table.
const REFTABLE_MASK: u64 = !511;

/// Reads the header of the image below `file`.
pub(super) async fn read_header(file: &Child) -> Result<Header> {
    let size = file.size().await?;
    let first = Buf::new(size.min(512) as usize);
    file.read(0, first.clone()).await?;
    let cluster = header::cluster_size(&first.to_vec())?;
    let whole = Buf::new(size.min(cluster) as usize);
    file.read(0, whole.clone()).await?;
    Header::parse(&whole.to_vec())
}

pub(super) async fn open(args: OpenArgs) -> Result<Opened> {
    let options = Options::parse(args.options)?;
    let children = <[Arc<Child>; 3]>::try_from(args.children)
        .map_err(|_| Error::invalid("format 'qcow2' has three children"))?;
    let unmap = args.common.discard == Discard::Unmap;
    let driver = image(args.node_name, children, options, unmap).await?;
    let mut implicit = Vec::new();
    {
        let h = driver.header();
        if let Some(filename) = h.backing.clone() {
            let format = h.backing_format.clone();
            implicit.push(Implicit { child: "backing", filename, format });
        }
        match h.data_file.clone() {
            Some(filename) if driver.g.data_file => {
                implicit.push(Implicit { child: "data-file", filename, format: None });
            }
            _ => {}
        }
    }
    driver.check_data_file(implicit.iter().any(|i| i.child == "data-file")).await?;
    Ok(Opened { driver: Box::new(driver), implicit })
}

/// Opens an image that was just created, without a backing image.
pub(super) async fn open_new(file: Arc<Child>, data: Arc<Child>) -> Result<Qcow2> {
    let children = [file, Child::new("new.backing", None), data];
    image("new".into(), children, Options::default(), false).await
}

async fn image(
    name: String,
    children: [Arc<Child>; 3],
    options: Options,
    unmap: bool,
) -> Result<Qcow2> {
    let file = &children[0];
    let header = read_header(file).await?;
    header.check_offered()?;
    let g = header.geometry;
    let caches = options.caches(g, header.size)?;
    let per_slice = (caches.refcount_slice * 8) >> g.refcount_order;
    // Of a data file that is opened later, this is found out when it is read.
    let data_end = children[if g.data_file { 2 } else { 0 }].size_now();
    let watched = file.node().await.is_some_and(|n| n.driver().debugger().is_some());
    let Tables { l1, refcounts, damage } = Tables::read(file, &header, per_slice).await?;
    Ok(Qcow2 {
        name,
        children,
        g,
        version: header.version,
        size: AtomicU64::new(header.size),
        data_end: AtomicU64::new(data_end),
        header: Mutex::new(header),
        flags: Arc::new(Flags {
            unmap: AtomicBool::new(unmap),
            pass_discard: AtomicBool::new(options.pass_discard_request.unwrap_or(unmap)),
        }),
        options,
        damage: Mutex::new(damage),
        activated: AtomicBool::new(false),
        activation: async_lock::Mutex::new(()),
        l1: L1::new(l1),
        l2: TableCache::new(caches.l2_slice as usize / 8, caches.l2),
        refcounts: Mutex::new(refcounts),
        refcount_slices: TableCache::new(caches.refcount_slice as usize / 8, caches.refcounts),
        epoch: Epoch::default(),
        guests: RangeLock::new(),
        tables: RangeLock::new(),
        l2_loads: RangeLock::new(),
        refcount_loads: RangeLock::new(),
        packing: async_lock::Mutex::new(()),
        flushing: flush::Flushing::default(),
        watched: AtomicBool::new(watched),
    })
}

/// What is read when an image is opened, and again after a repair.
struct Tables {
    l1: Vec<u64>,
    refcounts: Refcounts,
    damage: Option<String>,
}

impl Tables {
    async fn read(file: &Child, header: &Header, per_slice: u64) -> Result<Tables> {
        let g = header.geometry;
        let end = file.size().await?;
        let l1 = table(file, header.l1_offset, u64::from(header.l1_size), end, "L1 table").await?;
        let entries = u64::from(header.reftable_clusters) * g.cluster_words();
        file.event(DebugEvent::ReftableLoad).await;
        let reftable = table(file, header.reftable_offset, entries, end, "refcount table").await?;
        let mut layout = Layout { g, end, meta: HashSet::new(), damage: None };
        let reftable = layout.read(header, &l1, reftable);
        if header.incompatible & CORRUPT != 0 {
            layout.damage("the image says of itself that it is corrupt".into());
        }
        let mut refcounts = Refcounts::new(g, per_slice, reftable, g.clusters(end));
        refcounts.meta = layout.meta;
        Ok(Tables { l1, refcounts, damage: layout.damage })
    }
}

/// A table of the header, whole.
async fn table(file: &Child, at: u64, entries: u64, end: u64, what: &str) -> Result<Vec<u64>> {
    if entries > 0 && at >= end {
        return Err(Error::corrupt(format!(
            "the {what} at {at:#x} lies past the end of the file at {end:#x}"
        )));
    }
    // What a file that was cut short lacks of it is not made up in memory.
    if at + entries * 8 > end.next_multiple_of(512) {
        return Err(Error::corrupt(format!(
            "the {what} at {at:#x} has {} bytes and passes the end of the file at {end:#x}",
            entries * 8
        )));
    }
    let buf = Buf::new(entries as usize * 8);
    file.read(at, buf.clone()).await?;
    Ok(words(&buf))
}

/// Which clusters hold metadata, and whether that can be.
struct Layout {
    g: Geometry,
    end: u64,
    meta: HashSet<u64>,
    damage: Option<String>,
}

impl Layout {
    fn damage(&mut self, text: String) {
        self.damage.get_or_insert(text);
    }

    fn claim(&mut self, host: u64, bytes: u64, what: &str) {
        let first = host >> self.g.cluster_bits;
        for c in first..first + self.g.clusters(bytes) {
            if !self.meta.insert(c) {
                let at = c << self.g.cluster_bits;
                self.damage(format!("{what} at {at:#x} overlaps other metadata"));
            }
        }
    }

    /// Takes note of all tables; gives the refcount table's offsets, without those that cannot
    /// be.
    fn read(&mut self, h: &Header, l1: &[u64], mut reftable: Vec<u64>) -> Vec<u64> {
        let table = u64::from(h.reftable_clusters) << self.g.cluster_bits;
        self.claim(0, 1, "the header");
        self.claim(h.l1_offset, u64::from(h.l1_size) * 8, "the L1 table");
        self.claim(h.reftable_offset, table, "the refcount table");
        if h.snapshots > 0 {
            self.claim(h.snapshots_offset, 1, "the snapshot table");
        }
        for (i, e) in reftable.iter_mut().enumerate() {
            *e &= REFTABLE_MASK;
            if *e != 0 && !self.place(*e, "a refcount block", i) {
                *e = 0;
            }
        }
        for (i, e) in l1.iter().enumerate() {
            let host = e & OFFSET_MASK;
            if host != 0 {
                self.place(host, "an L2 table", i);
            }
        }
        while reftable.last() == Some(&0) {
            reftable.pop();
        }
        reftable
    }

    fn place(&mut self, host: u64, what: &str, entry: usize) -> bool {
        let aligned = self.g.in_cluster(host) == 0;
        if !aligned || host >= self.end {
            let why = if aligned { "past the end of the file" } else { "not aligned" };
            self.damage(format!("{what} (entry {entry}) at {host:#x} is {why}"));
            return false;
        }
        self.claim(host, 1, what);
        true
    }
}

impl Qcow2 {
    /// Fails where a data file is given to an image without one, or neither given nor `named`.
    async fn check_data_file(&self, named: bool) -> Result<()> {
        let given = self.children[2].node().await.is_some();
        match (self.g.data_file, given) {
            (false, true) => {
                Err(Error::invalid("'data-file' is given, but the image keeps its data itself"))
            }
            (true, false) if !named => Err(Error::invalid(
                "the image keeps its data in another file and does not name it: give 'data-file'",
            )),
            _ => Ok(()),
        }
    }

    /// What is done once before somebody writes.
    pub(super) async fn activate(&self) -> Result<()> {
        let _once = self.activation.lock().await;
        if self.activated.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.header().incompatible & DIRTY != 0 {
            self.rebuild().await?;
        }
        if let Some(why) = &*self.damage.lock().unwrap_or_else(PoisonError::into_inner) {
            let text = format!(
                "{why}: it can only be read; mend it with 'gipfel img check -r all' before it is \
                 written"
            );
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        // What the others promise is not kept up here (spec, autoclear_features).
        let (old, kept) = {
            let h = self.header();
            (h.autoclear, if self.g.data_file { h.autoclear & RAW_DATA_FILE } else { 0 })
        };
        if old != kept {
            let field = Buf::from_slice(&kept.to_be_bytes());
            self.file().write(AUTOCLEAR_FIELD, field, WriteFlags::default()).await?;
            self.file().flush().await?;
            self.header().autoclear = kept;
        }
        self.activated.store(true, Ordering::Release);
        Ok(())
    }

    /// The image was not closed properly and its refcounts were put off (spec, Dirty bit): they
    /// are counted anew. Nobody has written through this node yet.
    async fn rebuild(&self) -> Result<()> {
        // Nothing is read into the caches meanwhile.
        let _l2 = self.l2_loads.lock(ByteRange::new(0, u64::MAX)).await;
        let _refcounts = self.refcount_loads.lock(ByteRange::new(0, u64::MAX)).await;
        let header = check::rebuild_dirty(&self.children[0]).await?;
        let tables = Tables::read(self.file(), &header, self.refcounts_per_slice()).await?;
        self.l1.replace(tables.l1);
        let mut refcounts = self.refcounts();
        *refcounts = tables.refcounts;
        // Entries may have got or lost their flag for a refcount of one.
        self.l2.clear();
        self.refcount_slices.clear();
        drop(refcounts);
        *self.header() = header;
        *self.damage.lock().unwrap_or_else(PoisonError::into_inner) = tables.damage;
        Ok(())
    }
}

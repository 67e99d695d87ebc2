//! Where guest bytes lie, from the cached tables: the whole of a plain request's way through this
//! driver. It never waits, and takes no lock but the L1 table's, shared, where nothing is cached.

use gipfel_base::ByteRange;
use gipfel_base::sync::sync::atomic::{AtomicU64, Ordering};
use gipfel_node::Mapping;

use super::Qcow2;
use super::cache::Found;
use super::entry::{Cluster, Entry, Part};

/// What the first bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Plain data at this host byte; may be overwritten in place if `copied`.
    Data { host: u64, copied: bool },
    /// They read as zeros.
    Zero,
    /// The backing image decides.
    Unallocated,
    /// Part of a compressed cluster, whose stream lies there.
    Compressed { host: u64, len: u64 },
    /// The slice of entries must be read first.
    Uncached,
    /// The slice holds entries that contradict the image: look closely.
    Suspect,
    /// This entry contradicts the image.
    Bad { entry: u64 },
}

/// Bytes of one kind, in one piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) what: What,
    pub(super) len: u64,
}

impl What {
    /// Whether `next` goes on where `len` bytes of this end.
    fn goes_on(self, len: u64, next: What) -> bool {
        match (self, next) {
            (What::Data { host, copied }, What::Data { host: h, copied: c }) => {
                copied == c && h == host + len
            }
            (What::Compressed { .. } | What::Bad { .. }, _) => false,
            (a, b) => a == b,
        }
    }
}

impl Qcow2 {
    /// The number of the L2 slice for a guest offset, and the place of its entry there.
    pub(super) fn slice_of(&self, guest: u64) -> (u64, usize) {
        let cluster = guest >> self.g.cluster_bits;
        let entries = self.slice_entries() as u64;
        (cluster / entries, (cluster % entries) as usize)
    }

    /// The entries in `words`, which are a slice or its end.
    pub(super) fn entries<'a>(
        &self,
        words: &'a [AtomicU64],
    ) -> impl Iterator<Item = Entry> + use<'a> {
        words.chunks_exact(self.g.entry_words()).map(|w| Entry {
            word: w[0].load(Ordering::Acquire),
            bitmap: w.get(1).map_or(0, |b| b.load(Ordering::Acquire)),
        })
    }

    /// What the entry of the guest cluster at `guest` says.
    pub(super) fn decode(&self, entry: Entry, guest: u64) -> Cluster {
        let cluster = Cluster::decode(entry, self.g, self.version);
        match cluster.host() {
            // Spec, External data file bit: the offsets are those of the disk.
            Some((host, _)) if self.g.data_file && host != guest => Cluster::Bad,
            _ => cluster,
        }
    }

    /// Puts an entry into the words of its place.
    pub(super) fn put_entry(words: &[AtomicU64], entry: Entry) {
        words[0].store(entry.word, Ordering::Release);
        if let Some(b) = words.get(1) {
            b.store(entry.bitmap, Ordering::Release);
        }
    }

    /// Entry `index` of a slice, unless the slice has gone or the entry is just being changed.
    fn entry(&self, slice: &Found<'_>, index: usize) -> Option<Entry> {
        if self.g.extended_l2 {
            let (word, bitmap) = slice.pair(2 * index)?;
            return Some(Entry { word, bitmap });
        }
        Some(Entry { word: slice.word(index)?, bitmap: 0 })
    }

    /// What the first bytes of `range` are. With `closely`, entries of suspect slices are checked
    /// one by one; that takes a lock.
    pub(super) fn lookup(&self, range: ByteRange, closely: bool) -> Run {
        let mut run = self.lookup_slice(range, closely);
        while run.len < range.len() {
            let next = self.lookup_slice(range.skip(run.len), closely);
            if !run.what.goes_on(run.len, next.what) {
                break;
            }
            run.len += next.len;
        }
        run
    }

    /// The same within one slice.
    fn lookup_slice(&self, range: ByteRange, closely: bool) -> Run {
        let (slice, first) = self.slice_of(range.start());
        let reach = self.slice_reach();
        let whole = |what| Run { what, len: range.len().min(reach - range.start() % reach) };
        let Some(found) = self.l2.get(slice) else {
            let reach = self.g.l1_reach();
            let index = range.start() / reach;
            return match self.l1.get(index) {
                None => Run {
                    what: What::Unallocated,
                    len: range.len().min(reach - range.start() % reach),
                },
                Some(_) => whole(What::Uncached),
            };
        };
        let suspect = found.is_suspect();
        if suspect && !closely {
            return whole(What::Suspect);
        }
        let (entries, bits) = (self.slice_entries() as u64, self.g.cluster_bits);
        let run = |index: usize, skip: u64| {
            let entry = self.entry(&found, index)?;
            let cluster = self.decode(entry, ((slice * entries) + index as u64) << bits);
            if suspect && !self.is_plausible(cluster) {
                return Some(self.rest(What::Bad { entry: entry.word }, skip));
            }
            Some(self.cluster_run(cluster, entry.word, skip))
        };
        let mut skip = self.g.in_cluster(range.start());
        let Some(mut all) = run(first, skip) else { return whole(What::Uncached) };
        let (mut index, mut last) = (first, all.len);
        while all.len < range.len() {
            skip += last;
            if skip == self.g.cluster_size() {
                (index, skip) = (index + 1, 0);
            }
            if index == self.slice_entries() {
                break;
            }
            match run(index, skip) {
                Some(next) if all.what.goes_on(all.len, next.what) => {
                    all.len += next.len;
                    last = next.len;
                }
                _ => break,
            }
        }
        Run { what: all.what, len: all.len.min(range.len()) }
    }

    /// A run to the end of a cluster, from its byte `skip` on.
    fn rest(&self, what: What, skip: u64) -> Run {
        Run { what, len: self.g.cluster_size() - skip }
    }

    /// What a cluster is from its byte `skip` on. `entry` is its descriptor.
    fn cluster_run(&self, cluster: Cluster, entry: u64, skip: u64) -> Run {
        let what = match cluster {
            Cluster::Data { host, copied } => What::Data { host: host + skip, copied },
            Cluster::Zero { .. } => What::Zero,
            Cluster::Compressed { host, len } => What::Compressed { host, len },
            Cluster::Unallocated => What::Unallocated,
            Cluster::Bad => What::Bad { entry },
            Cluster::Mixed { host, parts } => {
                let bits = self.g.subcluster_bits();
                let first = (skip >> bits) as u32;
                let (part, n) = parts.run(first);
                let what = match (part, host) {
                    (Part::Zero, _) => What::Zero,
                    (Part::Data, Some((host, copied))) => What::Data { host: host + skip, copied },
                    _ => What::Unallocated,
                };
                return Run { what, len: (u64::from(first + n) << bits) - skip };
            }
        };
        self.rest(what, skip)
    }

    /// Where to read `range`.
    pub(super) fn map_read(&self, range: ByteRange) -> Mapping<'_> {
        // Before the look-up: what is found is not given to others while this is held.
        let pin = self.epoch.pin();
        let run = self.lookup(range, false);
        match run.what {
            What::Data { host, .. } if host + run.len <= self.data_end.load(Ordering::Acquire) => {
                Mapping::Child { child: self.data(), offset: host, len: run.len, pin: Some(pin) }
            }
            What::Zero => Mapping::Zero { len: run.len },
            What::Unallocated => self.map_backing(range.take(run.len)),
            _ => Mapping::Work { len: run.len },
        }
    }

    fn map_backing(&self, range: ByteRange) -> Mapping<'_> {
        let Some(backing) = self.backing().try_enter() else {
            return Mapping::Work { len: range.len() };
        };
        let end = backing.as_ref().map_or(0, |n| n.size());
        if range.start() >= end {
            return Mapping::Zero { len: range.len() };
        }
        if self.watched.load(Ordering::Relaxed) {
            // The file is told of it, not the backing image.
            return Mapping::Work { len: range.len().min(end - range.start()) };
        }
        Mapping::Child {
            child: self.backing(),
            offset: range.start(),
            len: range.len().min(end - range.start()),
            pin: None,
        }
    }

    /// Where to write `range`, if that can be done in place.
    pub(super) fn map_write(&self, range: ByteRange) -> Mapping<'_> {
        let pin = self.epoch.pin();
        let mut run = self.lookup(range, false);
        let in_place = |r: Run| matches!(r.what, What::Data { copied: true, .. });
        if let What::Data { host, copied: true } = run.what {
            return Mapping::Child {
                child: self.data(),
                offset: host,
                len: run.len,
                pin: Some(pin),
            };
        }
        // What needs work is not cut into pieces by its kind.
        while run.len < range.len() {
            let next = self.lookup(range.skip(run.len), false);
            if in_place(next) {
                break;
            }
            run.len += next.len;
        }
        Mapping::Work { len: run.len }
    }

    /// Whether what an entry of a suspect slice says can be true.
    fn is_plausible(&self, cluster: Cluster) -> bool {
        let end = self.file().try_enter().and_then(|n| n.as_ref().map(|n| n.size()));
        // While the edge is being changed nothing is known of the file.
        let Some(end) = end else { return true };
        self.check_cluster(cluster, end, &self.refcounts().meta)
    }

    /// Whether what an entry says can be true in a file of `end` bytes.
    pub(super) fn check_cluster(
        &self,
        cluster: Cluster,
        end: u64,
        meta: &std::collections::HashSet<u64>,
    ) -> bool {
        let clear = |host: u64| {
            self.g.data_file || host < end && !meta.contains(&(host >> self.g.cluster_bits))
        };
        match cluster {
            Cluster::Bad => false,
            Cluster::Unallocated
            | Cluster::Zero { host: None }
            | Cluster::Mixed { host: None, .. } => true,
            Cluster::Zero { host: Some((host, _)) }
            | Cluster::Mixed { host: Some((host, _)), .. }
            | Cluster::Data { host, .. } => clear(host),
            // The last sector of a stream may be cut short by the end of the file.
            Cluster::Compressed { host, len } => clear(host) && clear((host + len - 512).max(host)),
        }
    }
}

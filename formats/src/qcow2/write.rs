//! Writes that need clusters: allocation, copy-on-write, tables of their own.

use gipfel_base::sync::sync::atomic::Ordering;
use gipfel_base::{ByteRange, Result};
use gipfel_io::Buf;
use gipfel_node::{DebugEvent, WriteFlags, ZeroFlags};

use super::Qcow2;
use super::entry::{Cluster, Entry};
use super::lookup::What;
use super::refcounts::Extent;

/// The longest range that is written as one, in bytes (but at least a cluster).
const LONGEST: u64 = 2 << 20;

/// What the first clusters of a range need before they can be written.
enum Need {
    /// Nothing: they may be overwritten there.
    InPlace { host: u64, len: u64 },
    /// Their own clusters, kept for what reads as zeros or is not allocated.
    Kept { host: u64, clusters: u64 },
    /// New clusters.
    New { clusters: u64 },
    /// Their entries must be read first.
    Entries,
}

impl Qcow2 {
    /// Writes all of `buf` at guest offset `offset`.
    pub(super) async fn write_clusters(&self, offset: u64, buf: Buf) -> Result<()> {
        let mut left = ByteRange::new(offset, buf.len() as u64);
        let mut buf = buf;
        while !left.is_empty() {
            let piece = self.piece(left);
            let rest = buf.split_off(piece.len() as usize);
            let _held = self.guests.lock(self.whole(piece)).await;
            self.write_held(piece, buf).await?;
            (left, buf) = (left.skip(piece.len()), rest);
        }
        Ok(())
    }

    /// The first part of `range` that is worked on at once: within one slice of entries.
    pub(super) fn piece(&self, range: ByteRange) -> ByteRange {
        let reach = self.slice_reach();
        let most = LONGEST.max(self.g.cluster_size());
        range.take(most.min(reach - range.start() % reach))
    }

    /// The whole clusters around `range`.
    pub(super) fn whole(&self, range: ByteRange) -> ByteRange {
        let start = self.g.cluster_start(range.start());
        ByteRange::new(start, self.g.clusters(range.end() - start) << self.g.cluster_bits)
    }

    /// Writes within one slice; the caller holds the guest clusters.
    pub(super) async fn write_held(&self, range: ByteRange, buf: Buf) -> Result<()> {
        let (mut left, mut buf) = (range, buf);
        while !left.is_empty() {
            self.own_table(left.start()).await?;
            let pin = self.epoch.pin();
            let (host, clusters, new) = match self.need(left)? {
                Need::Entries => continue,
                Need::InPlace { host, len } => {
                    let rest = buf.split_off(len as usize);
                    self.event(DebugEvent::WriteAio).await;
                    self.data().write(host, buf, WriteFlags::default()).await?;
                    (left, buf) = (left.skip(len), rest);
                    continue;
                }
                Need::Kept { host, clusters } => (host, clusters, None),
                // Each cluster has its place in the data file.
                Need::New { clusters } if self.g.data_file => {
                    (self.g.cluster_start(left.start()), clusters, None)
                }
                Need::New { clusters } => {
                    let e = self.allocate(clusters, false).await?;
                    (e.first << self.g.cluster_bits, e.count, Some(e))
                }
            };
            drop(pin);
            let start = self.g.cluster_start(left.start());
            let span = ByteRange::new(start, clusters << self.g.cluster_bits);
            let part = left.take(span.end() - left.start());
            let rest = buf.split_off(part.len() as usize);
            let fresh = new.is_some_and(|e| e.fresh);
            let copied = self.copied_around(span, part, new.is_some()).await?;
            if let Err(e) =
                self.fill(copied, part, host + (copied.start() - start), fresh, buf).await
            {
                if let Some(n) = new {
                    self.unallocate(n).await?;
                }
                return Err(e);
            }
            self.flushing.wrote();
            self.refer(span, part, host).await?;
            (left, buf) = (left.skip(part.len()), rest);
        }
        self.limit_pending().await
    }

    fn need(&self, range: ByteRange) -> Result<Need> {
        let run = self.lookup(range, true);
        match run.what {
            What::Data { host, copied: true } => {
                return Ok(Need::InPlace { host, len: run.len });
            }
            What::Uncached => return Ok(Need::Entries),
            What::Bad { entry } => return Err(self.bad_entry(range.start(), entry)),
            _ => {}
        }
        let (slice, first) = self.slice_of(range.start());
        // Of a suspect slice only the clusters that were looked at are known to be good.
        let known = if self.is_suspect(slice) { range.take(run.len) } else { range };
        let most = (self.whole(known).len() >> self.g.cluster_bits) as usize;
        let size = self.g.cluster_size();
        let found = self.l2.inspect(slice, |words| {
            let kinds = self.entries(&words[first * self.g.entry_words()..]).take(most);
            let mut need = None;
            let guests = (0..).map(|i| self.g.cluster_start(range.start()) + i * size);
            for kind in kinds.zip(guests).map(|(e, guest)| self.decode(e, guest)) {
                need = match (need, kind, kind.host()) {
                    (n, Cluster::Data { copied: true, .. } | Cluster::Bad, _) => return n,
                    (None, _, Some((host, true))) => Some(Need::Kept { host, clusters: 1 }),
                    (Some(Need::Kept { host, clusters }), _, Some((next, true)))
                        if next == host + clusters * size =>
                    {
                        Some(Need::Kept { host, clusters: clusters + 1 })
                    }
                    (n, _, Some((_, true))) => return n,
                    (n @ Some(Need::Kept { .. }), ..) => return n,
                    (Some(Need::New { clusters }), ..) => {
                        Some(Need::New { clusters: clusters + 1 })
                    }
                    _ => Some(Need::New { clusters: 1 }),
                };
            }
            need
        });
        // Gone from the cache meanwhile: once more.
        Ok(found.flatten().unwrap_or(Need::Entries))
    }

    pub(super) fn is_suspect(&self, slice: u64) -> bool {
        self.l2.get(slice).is_none_or(|f| f.is_suspect())
    }

    /// What is written when `part` is: the part of the clusters `span` around it whose contents
    /// go along. Those are whole subclusters, and if the clusters are `new`, all that hold data.
    async fn copied_around(
        &self,
        span: ByteRange,
        part: ByteRange,
        new: bool,
    ) -> Result<ByteRange> {
        if !self.g.extended_l2 {
            return Ok(span);
        }
        let bits = self.g.subcluster_bits();
        let (first, last) = (span.start(), span.end() - self.g.cluster_size());
        let from = self.wanted(first, part, new).await?.trailing_zeros();
        let to = u32::BITS - self.wanted(last, part, new).await?.leading_zeros();
        Ok(ByteRange::between(first + (u64::from(from) << bits), last + (u64::from(to) << bits)))
    }

    /// The subclusters of the guest cluster at `start` whose contents are written with `part`.
    async fn wanted(&self, start: u64, part: ByteRange, new: bool) -> Result<u32> {
        let old = if new { self.cluster(start).await?.parts().data } else { 0 };
        Ok(old | self.touched(start, part))
    }

    /// What the entry of the guest cluster at `guest` says. The caller holds the cluster, and its
    /// table is there.
    pub(super) async fn cluster(&self, guest: u64) -> Result<Cluster> {
        let (slice, index) = self.slice_of(guest);
        loop {
            let entry = self.l2.inspect(slice, |words| {
                self.entries(&words[index * self.g.entry_words()..]).next().unwrap_or_default()
            });
            match entry {
                Some(e) => return Ok(self.decode(e, guest)),
                None => self.load_l2(guest).await?,
            }
        }
    }

    /// The subclusters of the guest cluster at `start` that `range` touches, as bits.
    pub(super) fn touched(&self, start: u64, range: ByteRange) -> u32 {
        let cluster = ByteRange::new(start, self.g.cluster_size());
        let Some(r) = cluster.intersect(range).filter(|r| !r.is_empty()) else { return 0 };
        if !self.g.extended_l2 {
            return u32::MAX;
        }
        let bits = self.g.subcluster_bits();
        let first = (r.start() - start) >> bits;
        let end = (r.end() - start).div_ceil(1 << bits);
        (u32::MAX >> (u64::from(u32::BITS) - (end - first))) << first
    }

    /// Writes `buf`, the data of `part`, to where `span` lies at `host`, with what was to be read
    /// around it.
    async fn fill(
        &self,
        span: ByteRange,
        part: ByteRange,
        host: u64,
        fresh: bool,
        buf: Buf,
    ) -> Result<()> {
        let head = ByteRange::between(span.start(), part.start());
        let tail = ByteRange::between(part.end(), span.end());
        let size = self.size.load(Ordering::Acquire);
        // What lies past the end of the disk is zeros.
        let inside = |r: ByteRange| r.take(size.saturating_sub(r.start()));
        let no_head = fresh && self.reads_as_zeros(inside(head)).await?;
        let no_tail = fresh && self.reads_as_zeros(inside(tail)).await?;
        let head = if no_head { head.take(0) } else { head };
        let tail = if no_tail { tail.take(0) } else { tail };
        if head.is_empty() && tail.is_empty() {
            let at = host + (part.start() - span.start());
            self.event(DebugEvent::WriteAio).await;
            return self.data().write(at, buf, WriteFlags::default()).await;
        }
        let from = if head.is_empty() { part.start() } else { span.start() };
        let to = if tail.is_empty() { part.end() } else { span.end() };
        let all = Buf::new((to - from) as usize);
        let window = |r: ByteRange| {
            let at = (r.start() - from) as usize;
            all.slice(at..at + r.len() as usize)
        };
        window(part).copy_from_buf(0, &buf);
        for r in [head, tail] {
            if !r.is_empty() {
                self.event(DebugEvent::CowRead).await;
                self.read_around(r, window(r)).await?;
            }
        }
        // One write is both: the data, and what is copied around them.
        self.event(DebugEvent::CowWrite).await;
        self.event(DebugEvent::WriteAio).await;
        self.data().write(host + (from - span.start()), all, WriteFlags::default()).await
    }

    /// Reads what was in `range` before; what lies past the end of the disk is zeros.
    pub(super) async fn read_around(&self, range: ByteRange, buf: Buf) -> Result<()> {
        let end = self.size.load(Ordering::Acquire);
        let n = end.saturating_sub(range.start()).min(range.len()) as usize;
        buf.slice(n..buf.len()).fill(0);
        if n > 0 { self.read_clusters(range.start(), buf.slice(0..n)).await } else { Ok(()) }
    }

    /// Gives the first clusters of `range`, which read as zeros, host clusters that do so too,
    /// unless they have some. Gives how many bytes of the disk that covers, and where in the file
    /// the new ones lie. What a data file has there reads as zeros already.
    pub(super) async fn preallocate_some(&self, range: ByteRange) -> Result<(u64, ByteRange)> {
        let piece = self.piece(range);
        let span = self.whole(piece);
        let _held = self.guests.lock(span).await;
        loop {
            self.own_table(span.start()).await?;
            let n = match self.need(piece)? {
                Need::Entries => continue,
                Need::InPlace { len, .. } => return Ok((len, ByteRange::new(0, 0))),
                Need::Kept { clusters, .. } => {
                    return Ok((clusters << self.g.cluster_bits, ByteRange::new(0, 0)));
                }
                Need::New { clusters } => clusters,
            };
            let (host, fresh) = if self.g.data_file {
                (span.take(n << self.g.cluster_bits), true)
            } else {
                let e = self.allocate(n, false).await?;
                let (at, len) = (e.first << self.g.cluster_bits, e.count << self.g.cluster_bits);
                (ByteRange::new(at, len), e.fresh)
            };
            let span = span.take(host.len());
            // With subclusters, the clusters are kept for them while none is allocated.
            let part = if self.g.extended_l2 { span.take(0) } else { span };
            if !fresh && !part.is_empty() {
                self.file().write_zeroes(host, ZeroFlags::default()).await?;
                self.flushing.wrote();
            }
            self.refer(span, part, host.start()).await?;
            return Ok((host.len(), host));
        }
    }

    /// Makes the file with the data reach to the end of the last cluster that was ever taken, or
    /// of the disk.
    pub(super) async fn reach_end(&self) -> Result<()> {
        let end = match self.g.data_file {
            true => self.size.load(Ordering::Acquire),
            false => self.refcounts().end() << self.g.cluster_bits,
        };
        match self.data().node().await {
            Some(n) if n.size() < end => n.driver().resize(end).await,
            _ => Ok(()),
        }
    }

    /// Lets the entries of `span` refer to the clusters at `host`, where there are data in `part`
    /// and where there were before.
    async fn refer(&self, span: ByteRange, part: ByteRange, host: u64) -> Result<()> {
        let entry = |i, old: Cluster| {
            let at = i << self.g.cluster_bits;
            let parts = old.parts().with_data(self.touched(span.start() + at, part));
            Some(Entry::of(self.g, Some((host + at, true)), parts))
        };
        self.change_entries(span, false, entry).await
    }

    /// Changes the entries of the whole clusters `span`, which lie in one slice and are held by
    /// the caller: `change` gets each one's number and what it is, and gives the new entry, if
    /// there is to be one. What the old ones referred to is let go.
    pub(super) async fn change_entries(
        &self,
        span: ByteRange,
        discard: bool,
        change: impl Fn(u64, Cluster) -> Option<Entry>,
    ) -> Result<()> {
        let (slice, first) = self.slice_of(span.start());
        let clusters = (span.len() >> self.g.cluster_bits) as usize;
        let n = self.g.entry_words();
        let guest = |i: usize| span.start() + ((i as u64) << self.g.cluster_bits);
        let mut gone = Vec::new();
        while self
            .l2
            .update(slice, |words| {
                let words = &words[n * first..n * (first + clusters)];
                for (i, e) in self.entries(words).enumerate() {
                    let old = self.decode(e, guest(i));
                    let Some(new) = change(i as u64, old) else { continue };
                    Self::put_entry(&words[n * i..n * (i + 1)], new);
                    if host_of(old) != host_of(self.decode(new, guest(i))) {
                        gone.push(old);
                    }
                }
            })
            .is_none()
        {
            self.load_l2(span.start()).await?;
        }
        self.flushing.changed();
        for old in gone {
            self.let_go(old, discard).await;
        }
        Ok(())
    }

    /// Makes sure that the L2 table of a guest offset exists, is referred to from here only, and
    /// that its slice is cached.
    pub(super) async fn own_table(&self, guest: u64) -> Result<()> {
        let index = guest / self.g.l1_reach();
        if !self.l1.get(index).is_some_and(|t| t.copied) {
            let _alone = self.tables.lock(ByteRange::new(index, 1)).await;
            match self.l1.get(index) {
                Some(t) if t.copied => {}
                old => self.new_table(index, old.map(|t| t.host)).await?,
            }
        }
        if self.l2.get(self.slice_of(guest).0).is_none() {
            self.load_l2(guest).await?;
        }
        Ok(())
    }

    /// Gives an L1 entry a table of its own: empty, or a copy of the one it shares.
    async fn new_table(&self, index: u64, old: Option<u64>) -> Result<()> {
        let size = self.g.cluster_size();
        let table = Buf::zeroed(size as usize);
        if let Some(host) = old {
            self.l2_slice_host(index * self.g.l1_reach())?;
            self.event(DebugEvent::L2AllocCowRead).await;
            self.read_file(host, table.clone()).await?;
        }
        let e = self.allocate(1, false).await?;
        let host = e.first << self.g.cluster_bits;
        self.event(DebugEvent::L2AllocWrite).await;
        if let Err(error) = self.file().write(host, table, WriteFlags::default()).await {
            self.unallocate(Extent { count: 1, ..e }).await?;
            return Err(error);
        }
        self.flushing.wrote();
        self.refcounts().meta.insert(e.first);
        self.l1.set(index, host);
        self.flushing.changed();
        if let Some(h) = old {
            self.let_go_bytes(h, size, false);
        }
        Ok(())
    }
}

/// What an entry refers to.
fn host_of(c: Cluster) -> Option<u64> {
    match c {
        Cluster::Compressed { host, .. } => Some(host),
        c => c.host().map(|h| h.0),
    }
}

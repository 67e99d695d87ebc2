//! Driver quorum: one disk on several children that hold the same data, read by vote.
//!
//! Options and events are those of the QMP reference (BlockdevOptionsQuorum, QUORUM_FAILURE,
//! QUORUM_REPORT_BAD). A write goes to all children and succeeds if `vote-threshold` of them took
//! it. A read asks all of them, and what at least that many agree on is the answer; with the
//! read pattern `fifo` it asks one after the other until one answers.
//!
//! It stands among the filters, for it shows its children's data and adds no structure; for the
//! graph it is no filter, since it has no single child whose data could stand for its own.
//!
//! Writes that overlap go one after the other, or children could keep different ones of them.
//! Reads take no lock. Where children disagree the read is done again while no write is under
//! way: only then is a difference a fault of a child, and only then is it safe to mend.

#[cfg(test)]
mod tests;
mod vote;

use std::future::Future;
use std::sync::Arc;
use std::task::Poll;

use crate::filter::{parse, span};
use gipfel_base::units::SECTOR;
use gipfel_base::{ByteRange, Error, ErrorKind, Result};
use gipfel_io::Buf;
use gipfel_io::rangelock::RangeLock;
use gipfel_node::perm::child_perms;
use gipfel_node::{
    Ability, Binding, Child, ChildSpec, Copies, Discard, Driver, DriverDef, DriverInfo, IoFuture,
    Kind, Limits, OpenArgs, Opened, Perm, Perms, Report, Reports, Role, Status, WriteFlags,
    ZeroFlags,
};
use serde::Deserialize;
use serde_json::{Value, json};
use vote::Vote;

/// Children of one quorum at most.
pub const MAX_CHILDREN: usize = 64;

/// The driver quorum. A process in which somebody listens to reports opens it through
/// [`open_reporting`].
pub static QUORUM: DriverDef = DriverDef {
    name: "quorum",
    kind: Kind::Format,
    children: &[ChildSpec {
        name: "children",
        role: Role::Copy,
        binding: Binding::Position,
        required: true,
    }],
    open: |args| open_reporting(args, Arc::default()),
    create: None,
    probe: None,
    check: None,
};

/// How reads choose their answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ReadPattern {
    /// All children vote.
    #[default]
    Quorum,
    /// The first child that answers decides.
    Fifo,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Options {
    vote_threshold: i64,
    #[serde(default)]
    blkverify: bool,
    #[serde(default)]
    rewrite_corrupted: bool,
    #[serde(default)]
    read_pattern: ReadPattern,
}

/// What a request does, as events call it (QuorumOpType).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Read,
    Write,
    Flush,
}

impl Op {
    fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
        }
    }
}

struct Quorum {
    name: String,
    copies: Copies,
    size: u64,
    threshold: usize,
    options: Options,
    /// Whether discards of clients are heeded.
    discards: bool,
    /// Held by every write, so that all children see the same order.
    order: RangeLock,
    reports: Arc<Reports>,
}

/// Opens a quorum that sends its events to `reports`.
pub fn open_reporting(args: OpenArgs, reports: Arc<Reports>) -> IoFuture<'static, Opened> {
    Box::pin(async move {
        let options: Options = parse(QUORUM.name, args.options)?;
        let threshold = check(&options, args.children.len())?;
        let size = common_size(&args.children).await?;
        let driver = Quorum {
            name: args.node_name,
            copies: Copies::new(args.children),
            size,
            threshold,
            options,
            discards: args.common.discard == Discard::Unmap,
            order: RangeLock::new(),
            reports,
        };
        Ok(Opened { driver: Box::new(driver), implicit: Vec::new() })
    })
}

/// The vote threshold, if these options fit `count` children.
fn check(o: &Options, count: usize) -> Result<usize> {
    if count == 0 {
        return Err(Error::invalid("'children' is empty: give at least one child"));
    }
    check_most(count)?;
    let threshold = usize::try_from(o.vote_threshold).unwrap_or(0);
    if threshold == 0 || threshold > count {
        return Err(Error::invalid(format!(
            "vote-threshold {} must lie between 1 and the number of children, {count}",
            o.vote_threshold
        )));
    }
    if o.read_pattern == ReadPattern::Fifo {
        // The other options are about votes, and there are none.
        return Ok(threshold);
    }
    if o.blkverify && (count, threshold) != (2, 2) {
        return Err(Error::invalid(
            "blkverify compares two children: it needs exactly two, and vote-threshold 2",
        ));
    }
    if o.blkverify && o.rewrite_corrupted {
        return Err(Error::invalid(
            "rewrite-corrupted needs to know which child is right, and blkverify never does: \
             set only one of them",
        ));
    }
    Ok(threshold)
}

fn check_most(count: usize) -> Result<()> {
    if count > MAX_CHILDREN {
        let text = format!("{count} children are too many: at most {MAX_CHILDREN}");
        return Err(Error::new(ErrorKind::Limit, text));
    }
    Ok(())
}

/// The size of all children, which must be the same.
async fn common_size(children: &[Arc<Child>]) -> Result<u64> {
    let size = children[0].size().await?;
    for c in &children[1..] {
        let other = c.size().await?;
        if other != size {
            return Err(Error::invalid(format!(
                "the children differ in size: '{}' has {size} bytes, '{}' has {other}",
                children[0].label(),
                c.label()
            )));
        }
    }
    Ok(size)
}

/// The outcomes of all futures, which run side by side.
async fn all<T>(futures: impl Iterator<Item = IoFuture<'_, T>>) -> Vec<Result<T>> {
    let mut open: Vec<_> = futures.map(|f| (Some(f), None)).collect();
    std::future::poll_fn(move |cx| {
        let mut pending = false;
        for (future, outcome) in &mut open {
            let Some(f) = future else { continue };
            match f.as_mut().poll(cx) {
                Poll::Ready(r) => (*future, *outcome) = (None, Some(r)),
                Poll::Pending => pending = true,
            }
        }
        if pending {
            return Poll::Pending;
        }
        Poll::Ready(open.iter_mut().filter_map(|(_, r)| r.take()).collect())
    })
    .await
}

fn boxed<'a, T>(f: impl Future<Output = Result<T>> + 'a) -> IoFuture<'a, T> {
    Box::pin(f)
}

/// The error that most of `errors` are like; of equally many, the first.
fn most_common<'a>(errors: impl Iterator<Item = &'a Error> + Clone) -> Option<Error> {
    let count = |e: &Error| errors.clone().filter(|x| x.errno() == e.errno()).count();
    let mut best: Option<(usize, &Error)> = None;
    for e in errors.clone() {
        let n = count(e);
        if best.is_none_or(|(m, _)| n > m) {
            best = Some((n, e));
        }
    }
    best.map(|(_, e)| e.clone())
}

impl Quorum {
    fn sectors(range: ByteRange) -> (u64, u64) {
        let first = range.start() / SECTOR;
        (first, range.end().div_ceil(SECTOR) - first)
    }

    /// Tells that a child did not do what the others did.
    async fn report_bad(&self, child: &Child, op: Op, range: ByteRange, error: Option<&Error>) {
        let node = child.node().await.map_or_else(String::new, |n| n.name().to_owned());
        let (first, count) = Self::sectors(range);
        let mut data = json!({
            "type": op.name(),
            "node-name": node,
            "sector-num": first,
            "sectors-count": count,
        });
        if let Some(e) = error {
            data["error"] = Value::from(e.to_string());
        }
        let about = format!("{} {node}", op.name());
        self.reports.send(Report { event: "QUORUM_REPORT_BAD", about, data });
    }

    /// Tells that too few children agreed, and gives `e` back.
    fn report_failure(&self, range: ByteRange, e: Error) -> Error {
        let (first, count) = Self::sectors(range);
        let data = json!({
            "reference": self.name,
            "sector-num": first,
            "sectors-count": count,
        });
        self.reports.send(Report { event: "QUORUM_FAILURE", about: self.name.clone(), data });
        e
    }

    /// What the outcomes of the children mean for a request that changes or flushes them all.
    async fn settle(
        &self,
        set: &[Arc<Child>],
        op: Op,
        range: ByteRange,
        outcomes: &[Result<()>],
    ) -> Result<()> {
        for (c, r) in set.iter().zip(outcomes) {
            if let Err(e) = r {
                self.report_bad(c, op, range, Some(e)).await;
            }
        }
        let errors = outcomes.iter().filter_map(|r| r.as_ref().err());
        if outcomes.len() - errors.clone().count() >= self.threshold {
            return Ok(());
        }
        match most_common(errors) {
            // As in the reference: of a flush only the children's failures are told.
            Some(e) if op == Op::Flush => Err(e),
            Some(e) => Err(self.report_failure(range, e)),
            None => Ok(()),
        }
    }

    /// Reads from the first child that answers.
    async fn read_first(&self, set: &[Arc<Child>], offset: u64, buf: Buf) -> Result<()> {
        let range = span(offset, &buf)?;
        let mut errors = Vec::new();
        for c in set {
            match c.read(offset, buf.clone()).await {
                Ok(()) => return Ok(()),
                Err(e) => {
                    self.report_bad(c, Op::Read, range, Some(&e)).await;
                    errors.push(e);
                }
            }
        }
        match most_common(errors.iter()) {
            Some(e) => Err(self.report_failure(range, e)),
            None => Ok(()),
        }
    }

    /// Asks all children. The first one's bytes come into `buf`, the others' into buffers of their
    /// own.
    async fn ask(&self, set: &[Arc<Child>], offset: u64, buf: &Buf) -> Vote {
        let bufs: Vec<Buf> = (0..set.len())
            .map(|i| if i == 0 { buf.clone() } else { Buf::new(buf.len()) })
            .collect();
        let reads = set.iter().zip(&bufs).map(|(c, b)| boxed(c.read(offset, b.clone())));
        let outcomes = all(reads).await;
        Vote::new(bufs.into_iter().zip(outcomes).map(|(b, r)| r.map(|()| b)).collect())
    }

    async fn read_voted(&self, set: &[Arc<Child>], offset: u64, buf: Buf) -> Result<()> {
        let range = span(offset, &buf)?;
        let mut vote = self.ask(set, offset, &buf).await;
        let mut held = None;
        if !vote.agrees() {
            held = Some(self.order.lock(range).await);
            vote = self.ask(set, offset, &buf).await;
        }
        for (i, e) in vote.errors() {
            self.report_bad(&set[i], Op::Read, range, Some(e)).await;
        }
        let winner = match vote.winner() {
            Some(w) if w.votes >= self.threshold => w,
            _ => {
                let e = match most_common(vote.errors().map(|(_, e)| e)) {
                    Some(e) if vote.voters() < self.threshold => e,
                    _ => self.disagreement(set, offset, &vote),
                };
                return Err(self.report_failure(range, e));
            }
        };
        let right = winner.buf.clone();
        if winner.first != 0 {
            buf.copy_from_buf(0, &right);
        }
        for i in vote.losers() {
            self.report_bad(&set[i], Op::Read, range, None).await;
            if self.options.rewrite_corrupted {
                self.mend(&set[i], range, right.clone()).await;
            }
        }
        drop(held);
        Ok(())
    }

    fn disagreement(&self, set: &[Arc<Child>], offset: u64, vote: &Vote) -> Error {
        if self.options.blkverify
            && let Some(at) = vote.first_difference()
        {
            let e = Error::corrupt(format!(
                "blkverify: '{}' and '{}' differ at byte {:#x}",
                set[0].label(),
                set[1].label(),
                offset + at as u64
            ));
            eprintln!("gipfel: node '{}': {e}", self.name);
            return e;
        }
        Error::corrupt(format!(
            "node '{}': of {} children that could be read only {} agree at {offset:#x}, and \
             vote-threshold is {}",
            self.name,
            vote.voters(),
            vote.winner().map_or(0, |w| w.votes),
            self.threshold
        ))
    }

    /// Writes the right bytes to a child that had others. Nobody writes there meanwhile. A failure
    /// is not told, as in the reference: the next read there finds the child wrong again.
    async fn mend(&self, child: &Child, range: ByteRange, right: Buf) {
        if child.granted().contains(Perm::WRITE) {
            let _ = child.write(range.start(), right, WriteFlags::default()).await;
        }
    }

    /// What the drivers of all children say, as far as they are not just being changed.
    fn say<T>(&self, f: impl Fn(&dyn Driver) -> T) -> Vec<T> {
        let Some(set) = self.copies.try_enter() else { return Vec::new() };
        let nodes = set.iter().filter_map(|c| c.try_enter());
        nodes.filter_map(|e| e.as_ref().map(|n| f(n.driver()))).collect()
    }

    fn zero_flags(flags: ZeroFlags) -> ZeroFlags {
        // Once one child has its zeros the others must get them, be it the slow way.
        ZeroFlags { fua: false, no_fallback: false, ..flags }
    }

    async fn zero_all(&self, op: Op, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let set = self.copies.enter().await;
        let _held = self.order.lock(range).await;
        let zeros = set.iter().map(|c| boxed(c.write_zeroes(range, flags)));
        let outcomes = all(zeros).await;
        self.settle(&set, op, range, &outcomes).await
    }
}

impl Driver for Quorum {
    fn size(&self) -> u64 {
        self.size
    }

    fn copies(&self) -> Option<&Copies> {
        Some(&self.copies)
    }

    fn check_copies(&self, count: usize) -> Result<()> {
        check_most(count)?;
        if count < self.threshold {
            return Err(Error::invalid(format!(
                "vote-threshold is {}: so many children are needed at least, not {count}",
                self.threshold
            )));
        }
        let votes = self.options.read_pattern == ReadPattern::Quorum;
        if votes && self.options.blkverify && count != 2 {
            return Err(Error::invalid("with blkverify there are two children, no more"));
        }
        Ok(())
    }

    fn read<'a>(&'a self, offset: u64, buf: Buf) -> IoFuture<'a> {
        Box::pin(async move {
            let set = self.copies.enter().await;
            match self.options.read_pattern {
                ReadPattern::Quorum => self.read_voted(&set, offset, buf).await,
                ReadPattern::Fifo => self.read_first(&set, offset, buf).await,
            }
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: Buf, flags: WriteFlags) -> IoFuture<'a> {
        Box::pin(async move {
            let range = span(offset, &buf)?;
            let flags = WriteFlags { fua: false, ..flags };
            let set = self.copies.enter().await;
            let _held = self.order.lock(range).await;
            let writes = set.iter().map(|c| boxed(c.write(offset, buf.clone(), flags)));
            let outcomes = all(writes).await;
            self.settle(&set, Op::Write, range, &outcomes).await
        })
    }

    fn write_zeroes<'a>(&'a self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'a> {
        Box::pin(async move {
            if flags.no_fallback && self.zero_ability() != Ability::Native {
                return Err(Error::unsupported("not every child can write zeros efficiently"));
            }
            self.zero_all(Op::Write, range, Self::zero_flags(flags)).await
        })
    }

    fn discard<'a>(&'a self, range: ByteRange) -> IoFuture<'a> {
        Box::pin(async move {
            // What is read after a discard may differ from child to child, and that would be
            // taken for a fault. Zeros are the same everywhere.
            if !self.discards || self.zero_ability() != Ability::Native {
                return Ok(());
            }
            let flags = ZeroFlags { unmap: true, ..ZeroFlags::default() };
            self.zero_all(Op::Write, range, flags).await
        })
    }

    fn flush<'a>(&'a self) -> IoFuture<'a> {
        Box::pin(async move {
            // A flush holds nobody up, so it does not hold the set.
            let set = self.copies.present().await;
            let outcomes = all(set.iter().map(|c| boxed(c.flush()))).await;
            let nowhere = ByteRange::new(0, 0);
            self.settle(&set, Op::Flush, nowhere, &outcomes).await
        })
    }

    fn status<'a>(&'a self, range: ByteRange) -> IoFuture<'a, Status> {
        Box::pin(async move {
            let set = self.copies.enter().await;
            let known = all(set.iter().map(|c| boxed(c.status_through(range)))).await;
            let good = || known.iter().flatten().map(|(s, _)| s);
            let len = good().map(|s| s.len).min().unwrap_or(range.len());
            // Zero is what no child contradicts, one that cannot be asked included.
            let zero = good().count() == known.len() && good().all(|s| s.zero);
            let data = !zero || good().any(|s| s.data);
            Ok(Status { data, zero, ..Status::hole(len) })
        })
    }

    fn reads_zero_when_new(&self) -> bool {
        let all = self.say(|d| d.reads_zero_when_new());
        !all.is_empty() && all.into_iter().all(|z| z)
    }

    fn zero_ability(&self) -> Ability {
        self.say(|d| d.zero_ability()).into_iter().min().unwrap_or(Ability::Emulated)
    }

    fn limits(&self) -> Limits {
        let all = self.say(|d| d.limits());
        Limits {
            align: all.iter().map(|l| l.align).max().unwrap_or(1),
            preferred: all.iter().map(|l| l.preferred).max().unwrap_or(4096),
        }
    }

    fn child_perms(&self, _: usize, role: Role, above: Perms, writable: bool) -> Perms {
        let mut p = child_perms(role, above, writable);
        if self.options.rewrite_corrupted && writable && p.used.contains(Perm::CONSISTENT_READ) {
            p.used = p.used | Perm::WRITE;
        }
        p
    }

    fn info<'a>(&'a self) -> IoFuture<'a, DriverInfo> {
        Box::pin(async move {
            let mut allocated = None;
            for c in self.copies.present().await.iter() {
                let Some(node) = c.node().await else { continue };
                if let Some(n) = node.driver().info().await?.allocated {
                    allocated = Some(allocated.unwrap_or(0) + n);
                }
            }
            Ok(DriverInfo { allocated, ..DriverInfo::default() })
        })
    }

    fn close<'a>(&'a self) -> IoFuture<'a> {
        // It holds nothing back itself, and its children are closed by themselves.
        Box::pin(async { Ok(()) })
    }
}

//! The check of an image's metadata, and its repair.
//!
//! Everything that refers to host clusters is read (header, L1 and L2 tables, snapshots, bitmaps,
//! refcounts) and the uses of every cluster are counted; then the stored refcounts and the flags
//! in the tables are held against the counts. What is counted as corruption or leak agrees with
//! the reference where both can see it.
//!
//! A repair writes in an order in which a crash leaves nothing worse than before: refcounts are
//! raised, then entries are mended and lose their flag "refcount is one", then refcounts are
//! lowered, then entries get that flag; a flush stands between each. Damaged refcount structures
//! are written anew elsewhere, and one header write puts them into use. The image is checked a
//! second time after a repair, and what that finds is what the report says is left.

mod image;
mod judge;
mod marks;
mod rebuild;
mod refcounts;
mod tables;
#[cfg(test)]
mod tests;
mod used;

use std::sync::Arc;

use gipfel_base::{Error, Result};
use gipfel_node::{CheckArgs, CheckReport, Child, Fix};

use self::image::Image;
use self::tables::{L1, Table};
use self::used::{HARD, Used};
use super::header::{CORRUPT, DIRTY, Header};

/// Where the header's incompatible features lie, in bytes.
const INCOMPATIBLE_AT: u64 = 72;

/// What may be changed.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    /// Refcounts that are too high.
    lower: bool,
    /// Refcounts that are too low, and structures that hold no refcount.
    raise: bool,
    /// Entries that contradict the specification.
    entries: bool,
    /// The flags in entries that say whether a refcount is one.
    flags: bool,
}

impl Plan {
    fn of(fix: Fix) -> Plan {
        match fix {
            Fix::Nothing => Plan::default(),
            Fix::Leaks => Plan { lower: true, flags: true, ..Plan::default() },
            Fix::All => Plan { lower: true, raise: true, entries: true, flags: true },
        }
    }

    fn writes(self) -> bool {
        self.lower || self.raise || self.entries || self.flags
    }
}

/// Checks the image in `args.file` and mends what `args.fix` allows. Fails where there is no
/// qcow2 header that can be worked with, where a limit is passed, or where writing fails.
pub(crate) async fn check(args: CheckArgs) -> Result<CheckReport> {
    run(&args.file, Plan::of(args.fix)).await
}

/// Makes an image with the dirty bit fit for use: refcounts and flags are corrected, the bit is
/// cleared. Fails where more is wrong with the image. The header is returned as it is then.
pub(crate) async fn rebuild_dirty(file: &Arc<Child>) -> Result<Header> {
    let plan = Plan { lower: true, raise: true, entries: false, flags: true };
    let report = run(file, plan).await?;
    if report.corruptions > 0 || report.check_errors > 0 {
        return Err(Error::corrupt(format!(
            "the image was not closed properly, and its refcounts cannot be corrected because \
             other metadata are damaged ({}); run 'gipfel img check -r all'",
            report.findings.first().map_or("cannot be read", String::as_str)
        )));
    }
    Ok(Image::open(file.clone()).await?.header)
}

async fn run(file: &Arc<Child>, plan: Plan) -> Result<CheckReport> {
    let mut check = Check::new(Image::open(file.clone()).await?, plan);
    check.scan().await?;
    let repaired = plan.writes() && check.repair().await?;
    let Check { mut report, image, .. } = check;
    if repaired {
        let mut again = Check::new(Image::open(file.clone()).await?, Plan::default());
        again.scan().await?;
        let left = again.report;
        // What is left matters more than what was found at first.
        let room = CheckReport::MAX_FINDINGS.saturating_sub(left.findings.len());
        report.more_findings += report.findings.len().saturating_sub(room) as u64;
        report.findings.truncate(room);
        for f in &left.findings {
            report.finding(format!("after the repair: {f}"));
        }
        report = CheckReport {
            corruptions_fixed: report.corruptions_fixed,
            leaks_fixed: report.leaks_fixed,
            findings: report.findings,
            more_findings: report.more_findings + left.more_findings,
            ..left
        };
    }
    if plan.writes() && report.corruptions == 0 && report.check_errors == 0 {
        clear_marks(&image).await?;
    }
    Ok(report)
}

/// Clears the bits by which the image says of itself that something is wrong.
async fn clear_marks(image: &Image) -> Result<()> {
    let h = &image.header;
    let clean = h.incompatible & !(DIRTY | CORRUPT);
    if clean != h.incompatible {
        image.write(INCOMPATIBLE_AT, &clean.to_be_bytes()).await?;
        image.flush().await?;
    }
    Ok(())
}

/// A check under way.
struct Check {
    image: Image,
    plan: Plan,
    report: CheckReport,
    used: Used,
    /// Something that refers to clusters could not be followed: clusters that seem unused may
    /// be in use, so no refcount is lowered.
    blind: bool,
    /// The L1 tables, the active one first if it can be read.
    l1: Vec<L1>,
    /// All L2 tables, once each; those of the active L1 table first.
    tables: Vec<Table>,
    /// How many of them the active L1 table has.
    active_tables: usize,
    /// The refcount blocks: where each lies in bytes, 0 where there is none.
    blocks: Vec<u64>,
    /// Whether the refcount table's clusters are counted as its own.
    reftable_claimed: bool,
    /// What is wrong with the refcount structures: how much, and in words.
    damages: u64,
    damage_texts: Vec<String>,
    /// The number behind the last cluster that is used or has a refcount.
    end: u64,
    /// What is to be done, as far as the scan found something.
    needs: Needs,
}

#[derive(Default)]
struct Needs {
    /// The refcount structures must be written anew.
    rebuild: bool,
    /// Some refcount must be raised.
    raise: bool,
    /// Some refcount must be lowered.
    lower: bool,
    /// Some entry must be changed or must lose its flag.
    mend: bool,
    /// Some entry must get its flag.
    set_flags: bool,
    /// A field of the header must be changed.
    header: bool,
}

impl Check {
    fn new(image: Image, plan: Plan) -> Check {
        Check {
            image,
            plan,
            report: CheckReport::default(),
            used: Used::default(),
            blind: false,
            l1: Vec::new(),
            tables: Vec::new(),
            active_tables: 0,
            blocks: Vec::new(),
            reftable_claimed: false,
            damages: 0,
            damage_texts: Vec::new(),
            end: 0,
            needs: Needs::default(),
        }
    }

    /// Reads everything and writes nothing. What the plan lets be mended is counted as mended.
    async fn scan(&mut self) -> Result<()> {
        let g = self.image.bounds.g;
        self.claim(0, g.cluster_size(), "the header")?;
        self.check_header();
        self.mark_active_l1()?;
        self.mark_snapshots().await?;
        self.mark_bitmaps().await?;
        self.mark_refcounts().await?;
        self.list_tables().await?;
        self.count_clusters().await?;
        self.find_missing_blocks();
        if self.blind && self.plan.lower {
            self.plan.lower = false;
            self.report.finding(
                "leaked clusters are left as they are: references that cannot be followed may \
                 lead to some of them",
            );
        }
        if self.needs.rebuild && !(self.plan.raise && self.plan.lower) {
            // A structure in which something is wrong is written as a whole or not at all.
            (self.plan.raise, self.plan.lower) = (false, false);
        }
        self.compare_refcounts().await?;
        if !self.plan.raise && self.report.corruptions > 0 {
            self.plan.flags = false;
        }
        self.compare_flags().await?;
        self.report.total_clusters = Some(g.clusters(self.image.header.size));
        Ok(())
    }

    /// Does what the scan found to do. Says whether anything was written.
    async fn repair(&mut self) -> Result<bool> {
        let n = &self.needs;
        let rebuild = n.rebuild && self.plan.raise && self.plan.lower;
        let raise = n.raise && self.plan.raise && !rebuild;
        let lower = n.lower && self.plan.lower && !rebuild;
        let mend = n.mend && (self.plan.entries || self.plan.flags);
        let set_flags = n.set_flags && self.plan.flags;
        let header = n.header && self.plan.entries;
        if !(rebuild || raise || lower || mend || set_flags || header) {
            return Ok(false);
        }
        self.mend_header(header).await?;
        if rebuild {
            self.rebuild().await?;
        }
        if raise {
            self.adjust_refcounts(u64::max).await?;
            self.image.flush().await?;
        }
        if mend {
            self.mend_entries(false).await?;
            self.image.flush().await?;
        }
        if lower {
            self.adjust_refcounts(u64::min).await?;
            self.image.flush().await?;
        }
        if set_flags {
            self.mend_entries(true).await?;
        }
        self.image.flush().await?;
        Ok(true)
    }

    /// Notes a contradiction that is mended if `can`.
    fn fault(&mut self, can: bool, text: String) {
        if can {
            self.report.corruptions_fixed += 1;
            self.report.finding(format!("{text} (mended)"));
        } else {
            self.report.corruptions += 1;
            self.report.finding(text);
        }
    }

    /// Notes something that cannot be mended and hides which clusters are in use.
    fn hidden(&mut self, text: String) {
        self.blind = true;
        self.fault(false, text);
    }

    /// Passes the result of reading on; a failed read is noted, and hides what was there.
    fn readable<T>(&mut self, read: Result<T>, what: impl FnOnce() -> String) -> Option<T> {
        match read {
            Ok(v) => Some(v),
            Err(e) => {
                self.blind = true;
                self.report.check_errors += 1;
                self.report.finding(format!("{} cannot be read: {e}", what()));
                None
            }
        }
    }

    /// Counts `len` bytes at `offset` as taken by metadata that nobody else uses. Where that
    /// cannot be, it notes so and says false.
    fn claim(&mut self, offset: u64, len: u64, what: &str) -> Result<bool> {
        match self.try_claim(offset, len)? {
            None => Ok(true),
            Some(why) => {
                self.hidden(format!("{what} at {offset:#x} ({len} bytes): {why}"));
                Ok(false)
            }
        }
    }

    /// As [`Check::claim`], but says what is wrong instead of noting it.
    fn try_claim(&mut self, offset: u64, len: u64) -> Result<Option<&'static str>> {
        let b = self.image.bounds;
        if b.g.in_cluster(offset) != 0 {
            return Ok(Some("it is not aligned to clusters"));
        }
        if len == 0 {
            return Ok(None);
        }
        if !b.fit(offset, len) {
            return Ok(Some("it reaches past the end of the file"));
        }
        let clusters = offset >> b.g.cluster_bits..(offset + len).div_ceil(b.g.cluster_size());
        if clusters.clone().any(|c| self.used.has(c, HARD)) {
            return Ok(Some("it overlaps other metadata"));
        }
        for c in clusters {
            self.used.add(c, 1)?;
            self.used.set(c, HARD)?;
        }
        Ok(None)
    }
}

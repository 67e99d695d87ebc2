//! What a driver finds when it checks an image's metadata (ImageCheck of the QMP reference).

use std::sync::Arc;

use crate::child::Child;

/// What a check may mend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fix {
    /// Nothing: the image is only read.
    #[default]
    Nothing,
    /// Space that is taken but not used.
    Leaks,
    /// Everything that can be mended.
    All,
}

/// What an image is checked with.
pub struct CheckArgs {
    /// The edge to the image file. Nobody else uses it.
    pub file: Arc<Child>,
    /// What is to be mended.
    pub fix: Fix,
}

/// What a check found and did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Places that could not be looked at, because reading them failed.
    pub check_errors: u64,
    /// Contradictions that are left: data may be wrong.
    pub corruptions: u64,
    /// Clusters that are left taken but unused: only space is lost.
    pub leaks: u64,
    /// Contradictions that were mended.
    pub corruptions_fixed: u64,
    /// Leaked clusters that were given back.
    pub leaks_fixed: u64,
    /// Where the last used cluster ends, in bytes, if the format can say it.
    pub image_end: Option<u64>,
    /// Clusters of the visible disk.
    pub total_clusters: Option<u64>,
    /// Those of them that are stored in this image.
    pub allocated_clusters: Option<u64>,
    /// Those of the stored that do not follow the one before.
    pub fragmented_clusters: Option<u64>,
    /// Those of the stored that are compressed.
    pub compressed_clusters: Option<u64>,
    /// What was found, a line each: at most [`CheckReport::MAX_FINDINGS`].
    pub findings: Vec<String>,
    /// Findings beyond that many, which are only counted.
    pub more_findings: u64,
}

impl CheckReport {
    /// Findings that are kept as text.
    pub const MAX_FINDINGS: usize = 1000;

    /// Adds a line about something found.
    pub fn finding(&mut self, text: impl Into<String>) {
        if self.findings.len() < Self::MAX_FINDINGS {
            self.findings.push(text.into());
        } else {
            self.more_findings += 1;
        }
    }
}

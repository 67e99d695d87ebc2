//! The count of votes: which children gave the same bytes, and which of that most agree on.

use gipfel_base::{Error, Result};
use gipfel_io::Buf;

/// Children that gave the same bytes.
pub(super) struct Version {
    /// The first of them, by its place in the set.
    pub(super) first: usize,
    /// How many they are.
    pub(super) votes: usize,
    /// The bytes, as that child gave them.
    pub(super) buf: Buf,
}

/// What the children answered to one read.
pub(super) struct Vote {
    versions: Vec<Version>,
    /// For each child, which version it gave, or why it gave none.
    answers: Vec<Result<usize>>,
}

impl Vote {
    /// Counts the answers, in the order of the children.
    pub(super) fn new(answers: Vec<Result<Buf>>) -> Vote {
        let mut versions: Vec<Version> = Vec::new();
        let count = |(i, answer): (usize, Result<Buf>)| {
            let buf = answer?;
            let same = |v: &Version| v.buf.first_difference(&buf).is_none();
            let at = versions.iter().position(same).unwrap_or_else(|| {
                versions.push(Version { first: i, votes: 0, buf: buf.clone() });
                versions.len() - 1
            });
            versions[at].votes += 1;
            Ok(at)
        };
        let answers = answers.into_iter().enumerate().map(count).collect();
        Vote { versions, answers }
    }

    /// Whether all that answered gave the same bytes.
    pub(super) fn agrees(&self) -> bool {
        self.versions.len() <= 1
    }

    /// How many answered.
    pub(super) fn voters(&self) -> usize {
        self.answers.iter().filter(|a| a.is_ok()).count()
    }

    /// Who did not answer, and why.
    pub(super) fn errors(&self) -> impl Iterator<Item = (usize, &Error)> + Clone {
        self.answers.iter().enumerate().filter_map(|(i, a)| Some((i, a.as_ref().err()?)))
    }

    /// The version with the most votes; of equally many, the one whose first child comes first.
    pub(super) fn winner(&self) -> Option<&Version> {
        self.versions.iter().rev().max_by_key(|v| v.votes)
    }

    /// Who answered otherwise than the winner.
    pub(super) fn losers(&self) -> impl Iterator<Item = usize> {
        let won = self.winner().map(|w| w.first);
        let lost =
            move |a: &Result<usize>| a.as_ref().is_ok_and(|v| Some(self.versions[*v].first) != won);
        self.answers.iter().enumerate().filter(move |(_, a)| lost(a)).map(|(i, _)| i)
    }

    /// Where the first two versions differ.
    pub(super) fn first_difference(&self) -> Option<usize> {
        let [a, b, ..] = &self.versions[..] else { return None };
        a.buf.first_difference(&b.buf)
    }
}

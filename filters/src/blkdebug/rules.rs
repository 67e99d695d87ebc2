//! Which requests fail: rules, the state they depend on, and what is active of them. Pure state.
//!
//! An event looks at the rules for it in their order. Where at least one of them injects errors in
//! the present state, those take the place of all that were active; after that the first that is
//! for this state changes it. A request fails by the first active rule that means it.

use gipfel_base::{ByteRange, Error, Result};
use gipfel_node::DebugEvent;
use serde::Deserialize;

/// Bytes in a sector, the unit of a rule's place.
const SECTOR: u64 = 512;
/// The state at the beginning.
const FIRST_STATE: i64 = 1;
/// The largest error number of Linux.
const MAX_ERRNO: i64 = 4095;
/// The error that is injected unless a rule names another (EIO).
const EIO: i64 = 5;

/// What a request does (BlkdebugIOType of the QMP reference).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum IoType {
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
    BlockStatus,
}

impl IoType {
    /// As it stands in options and messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            IoType::Read => "read",
            IoType::Write => "write",
            IoType::WriteZeroes => "write-zeroes",
            IoType::Discard => "discard",
            IoType::Flush => "flush",
            IoType::BlockStatus => "block-status",
        }
    }
}

/// BlkdebugInjectErrorOptions of the QMP reference.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct InjectError {
    event: String,
    state: Option<i64>,
    iotype: Option<IoType>,
    errno: Option<i64>,
    sector: Option<i64>,
    #[serde(default)]
    once: bool,
    #[serde(default)]
    immediately: bool,
}

/// BlkdebugSetStateOptions of the QMP reference.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SetState {
    event: String,
    state: Option<i64>,
    new_state: i64,
}

/// A rule that makes requests fail.
#[derive(Clone, Copy, Debug)]
struct Inject {
    event: DebugEvent,
    /// 0: in any state.
    state: i64,
    iotype: Option<IoType>,
    errno: i32,
    /// The byte that a request must cover.
    place: Option<u64>,
    once: bool,
    immediately: bool,
    spent: bool,
}

/// A rule that changes the state.
#[derive(Clone, Copy, Debug)]
struct Change {
    event: DebugEvent,
    state: i64,
    new_state: i64,
}

/// How a request is to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) errno: i32,
    /// Without letting others run first.
    pub(super) immediately: bool,
}

/// All rules of a node, and where they stand.
pub(super) struct Rules {
    injects: Vec<Inject>,
    changes: Vec<Change>,
    state: i64,
    /// Numbers of the active ones of `injects`.
    active: Vec<usize>,
}

fn event(name: &str) -> Result<DebugEvent> {
    DebugEvent::from_name(name).ok_or_else(|| {
        Error::invalid(format!("there is no event '{name}'; events are those of BlkdebugEvent"))
    })
}

fn state(given: Option<i64>) -> Result<i64> {
    match given {
        None => Ok(0),
        Some(s) if s >= 0 => Ok(s),
        Some(s) => Err(Error::invalid(format!("state {s} is below 0: no node is ever in it"))),
    }
}

impl InjectError {
    fn rule(&self) -> Result<Inject> {
        let errno = self.errno.unwrap_or(EIO);
        if !(1..=MAX_ERRNO).contains(&errno) {
            let text = format!("errno {errno} is no error number: give 1 to {MAX_ERRNO}");
            return Err(Error::invalid(text));
        }
        let place = match self.sector {
            None | Some(-1) => None,
            Some(s) => Some(u64::try_from(s).ok().and_then(|s| s.checked_mul(SECTOR)).ok_or_else(
                || Error::invalid(format!("sector {s} is out of range: -1 stands for any")),
            )?),
        };
        Ok(Inject {
            event: event(&self.event)?,
            state: state(self.state)?,
            iotype: self.iotype,
            errno: errno as i32,
            place,
            once: self.once,
            immediately: self.immediately,
            spent: false,
        })
    }

    /// Fails where the rule makes no sense.
    pub(super) fn check(&self) -> Result<()> {
        self.rule().map(drop)
    }
}

impl SetState {
    fn rule(&self) -> Result<Change> {
        let new_state = state(Some(self.new_state))?;
        Ok(Change { event: event(&self.event)?, state: state(self.state)?, new_state })
    }

    /// Fails where the rule makes no sense.
    pub(super) fn check(&self) -> Result<()> {
        self.rule().map(drop)
    }
}

impl Inject {
    fn means(&self, io: IoType, range: Option<ByteRange>) -> bool {
        // Queries of status fail only where a rule names them.
        let kind = self.iotype.map_or(io != IoType::BlockStatus, |t| t == io);
        let covers = |at| range.is_some_and(|r| r.start() <= at && at < r.end());
        kind && self.place.is_none_or(covers)
    }
}

impl Rules {
    /// The rules that these options say; nothing has happened yet.
    pub(super) fn new(injects: &[InjectError], changes: &[SetState]) -> Result<Rules> {
        Ok(Rules {
            injects: injects.iter().map(InjectError::rule).collect::<Result<_>>()?,
            changes: changes.iter().map(SetState::rule).collect::<Result<_>>()?,
            state: FIRST_STATE,
            active: Vec::new(),
        })
    }

    /// `event` happens.
    pub(super) fn event(&mut self, event: DebugEvent) {
        let now = self.state;
        let counts = |e: DebugEvent, state: i64| e == event && (state == 0 || state == now);
        let hit = |(i, r): (usize, &Inject)| (!r.spent && counts(r.event, r.state)).then_some(i);
        let active: Vec<usize> = self.injects.iter().enumerate().filter_map(hit).collect();
        if !active.is_empty() {
            self.active = active;
        }
        if let Some(c) = self.changes.iter().find(|c| counts(c.event, c.state)) {
            self.state = c.new_state;
        }
    }

    /// Whether, and how, a request is to fail. A flush covers no bytes.
    pub(super) fn check(&mut self, io: IoType, range: Option<ByteRange>) -> Option<Failure> {
        let at = self.active.iter().position(|i| self.injects[*i].means(io, range))?;
        let rule = &mut self.injects[self.active[at]];
        let failure = Failure { errno: rule.errno, immediately: rule.immediately };
        if rule.once {
            rule.spent = true;
            self.active.remove(at);
        }
        Some(failure)
    }
}

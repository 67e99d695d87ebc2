//! The limits of a throttle group, under the names of the QMP reference (ThrottleLimits).

use gipfel_base::{Error, Result};
use serde_json::{Map, Value};

/// Largest value of a rate, and of a burst's rate times its length.
const MAX: u64 = 1_000_000_000_000_000;

/// One limited quantity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    /// Units per second in the long run; 0 is no limit.
    pub avg: u64,
    /// Units per second in a burst; 0 is no burst beyond a tenth of a second's units.
    pub max: u64,
    /// How long a burst can be, in seconds.
    pub length: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Rate { avg: 0, max: 0, length: 1 }
    }
}

/// What is limited: in this order in [`Limits`] and in the buckets of a group.
pub(super) const KINDS: [&str; 6] =
    ["bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"];

/// Where the bytes begin in [`KINDS`], and where the requests.
pub(super) const BPS: usize = 0;
pub(super) const IOPS: usize = 3;

/// How many requests and bytes a group lets through per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub(super) rates: [Rate; 6],
    /// A request counts as one for each so many bytes (and at least once); 0: always once.
    pub(super) iops_size: u64,
}

impl Limits {
    /// The names of all properties, as in `iops-total-max-length`.
    pub fn names() -> impl Iterator<Item = String> {
        let of_kind = |k: &'static str| ["", "-max", "-max-length"].map(|s| format!("{k}{s}"));
        KINDS.into_iter().flat_map(of_kind).chain(["iops-size".to_owned()])
    }

    fn property(&mut self, name: &str) -> Option<&mut u64> {
        if name == "iops-size" {
            return Some(&mut self.iops_size);
        }
        // The longest name first: every other one is a prefix of it.
        for (suffix, part) in [("-max-length", 2), ("-max", 1), ("", 0)] {
            let Some(kind) = name.strip_suffix(suffix) else { continue };
            let at = KINDS.iter().position(|k| *k == kind)?;
            let rate = &mut self.rates[at];
            return Some([&mut rate.avg, &mut rate.max, &mut rate.length][part]);
        }
        None
    }

    /// The value of the property `name`, if there is such a one.
    pub fn get(mut self, name: &str) -> Option<u64> {
        self.property(name).copied()
    }

    /// Sets the property `name`. Not checked until [`Limits::check`]: some values are only
    /// allowed together.
    pub fn set(&mut self, name: &str, value: u64) -> Result<()> {
        match self.property(name) {
            Some(p) => *p = value,
            None => return Err(Error::invalid(format!("there is no limit '{name}'"))),
        }
        Ok(())
    }

    /// Sets the properties in `values` (ThrottleLimits); others stay.
    pub fn update(&mut self, values: &Map<String, Value>) -> Result<()> {
        for (name, value) in values {
            let value = value.as_u64().ok_or_else(|| {
                Error::invalid(format!("limit '{name}' must be a number of at least 0: {value}"))
            })?;
            self.set(name, value)?;
        }
        Ok(())
    }

    /// All properties (ThrottleLimits).
    pub fn to_json(self) -> Map<String, Value> {
        Self::names().map(|n| (n.clone(), self.get(&n).unwrap_or(0).into())).collect()
    }

    /// Whether nothing is limited.
    pub fn is_unlimited(&self) -> bool {
        self.rates.iter().all(|r| r.avg == 0)
    }

    /// Fails where limits contradict each other, naming the properties.
    pub fn check(&self) -> Result<()> {
        for (rate, kind) in self.rates.iter().zip(KINDS) {
            rate.check(kind)?;
        }
        for (first, what) in [(BPS, "bps"), (IOPS, "iops")] {
            let [total, read, write] = [0, 1, 2].map(|i| self.rates[first + i].avg != 0);
            if total && (read || write) {
                return Err(Error::invalid(format!(
                    "'{what}-total' and '{what}-read' or '{what}-write' exclude each other: limit \
                     both directions together, or each by itself"
                )));
            }
        }
        if self.iops_size > 0 && self.rates[IOPS..].iter().all(|r| r.avg == 0) {
            return Err(Error::invalid("'iops-size' needs one of the limits 'iops-*'"));
        }
        if self.iops_size > MAX {
            return Err(Error::invalid(format!("'iops-size' is more than {MAX}")));
        }
        Ok(())
    }
}

impl Rate {
    fn check(&self, kind: &str) -> Result<()> {
        let refuse = |text: String| Err(Error::invalid(text));
        if self.avg > MAX || self.max > MAX {
            return refuse(format!("'{kind}' and '{kind}-max' must be at most {MAX}"));
        }
        if self.max > 0 && self.avg == 0 {
            return refuse(format!("'{kind}-max' needs '{kind}': a burst needs a limit to pass"));
        }
        if self.max > 0 && self.max < self.avg {
            return refuse(format!("'{kind}-max' ({}) is below '{kind}' ({})", self.max, self.avg));
        }
        if self.length == 0 {
            return refuse(format!("'{kind}-max-length' must be at least 1 (second)"));
        }
        if self.length > 1 && self.max == 0 {
            return refuse(format!("'{kind}-max-length' needs '{kind}-max'"));
        }
        if self.max > 0 && self.length > MAX / self.max {
            return refuse(format!("'{kind}-max' times '{kind}-max-length' must be at most {MAX}"));
        }
        Ok(())
    }
}

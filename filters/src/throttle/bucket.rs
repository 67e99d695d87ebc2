//! A leaky bucket: what is done fills it, time empties it, and whoever finds it too full waits.
//!
//! Amounts are counted in billionths of a unit, so that a rate per second is an amount per
//! nanosecond: sums are exact, and the long-run rate is the one that was asked for.

use super::limits::Rate;

/// Billionths in a unit.
pub(super) const UNIT: u128 = 1_000_000_000;

/// A bucket that leaks at the average rate and, for bursts longer than a second, a second one
/// that leaks at the burst's rate.
///
/// Without a burst it holds what leaks in a tenth of a second. With one it holds what the burst
/// lets through in all: from empty, that much can be done at the burst's rate, and from then on
/// as much as leaks. The last request may overfill it; the ones after it pay for that.
#[derive(Default)]
pub(super) struct Bucket {
    rate: Rate,
    level: u128,
    burst: u128,
}

impl Bucket {
    /// Changes the rate. A bucket fuller than the new limit would allow is as full as it allows:
    /// what was done under the old limit is not held against the new one.
    pub(super) fn set_rate(&mut self, rate: Rate) {
        if self.rate == rate {
            return;
        }
        self.rate = rate;
        self.level = self.level.min(self.capacity());
        self.burst = self.burst.min(self.burst_capacity());
    }

    fn capacity(&self) -> u128 {
        match self.rate.max {
            0 => u128::from(self.rate.avg) * UNIT / 10,
            max => u128::from(max) * u128::from(self.rate.length) * UNIT,
        }
    }

    fn burst_capacity(&self) -> u128 {
        if self.rate.length > 1 { u128::from(self.rate.max) * UNIT / 10 } else { 0 }
    }

    /// Lets `nanos` nanoseconds pass.
    pub(super) fn leak(&mut self, nanos: u64) {
        let leaked = |rate: u64| u128::from(rate) * u128::from(nanos);
        self.level = self.level.saturating_sub(leaked(self.rate.avg));
        self.burst = self.burst.saturating_sub(leaked(self.rate.max));
    }

    /// Nanoseconds until a request may go.
    pub(super) fn wait(&self) -> u64 {
        if self.rate.avg == 0 {
            return 0;
        }
        let until = |level: u128, capacity: u128, rate: u64| {
            level.saturating_sub(capacity).div_ceil(u128::from(rate))
        };
        let mut wait = until(self.level, self.capacity(), self.rate.avg);
        if self.rate.length > 1 {
            wait = wait.max(until(self.burst, self.burst_capacity(), self.rate.max));
        }
        u64::try_from(wait).unwrap_or(u64::MAX)
    }

    /// Counts what a request does.
    pub(super) fn fill(&mut self, amount: u128) {
        if self.rate.avg > 0 {
            self.level = self.level.saturating_add(amount);
            if self.rate.length > 1 {
                self.burst = self.burst.saturating_add(amount);
            }
        }
    }

    /// Takes back what a request counted that was never made.
    pub(super) fn take_back(&mut self, amount: u128) {
        self.level = self.level.saturating_sub(amount);
        self.burst = self.burst.saturating_sub(amount);
    }
}

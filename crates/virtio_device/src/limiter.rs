// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Token buckets that hold a device's traffic to a rate.
//!
//! A [`Bucket`] is pure: it is told the time. What passes is not judged by its size, but paid for: it may pass while there is
//! any token, its cost is taken, and the next one waits until the debt is paid. So no size is too large, none is split, and
//! over time exactly the rate passes, for as long as a late wake-up is made up for by the burst.
//!
//! ```text
//!  tokens
//!   burst ─────╮            full again, and no fuller
//!              │╲ took    ╱
//!       0 ─────┼─╲──────╱── may pass from here on; after a wait, from a little above, so that wake-ups are few
//!              │  ╲___╱     debt
//! ```
//!
//! A [`Limiter`] is one for bytes and one for operations, with a clock, shared by the workers of several devices. A worker asks
//! [`Limiter::wait`] before each frame or request, says [`crate::Progress::Later`] while it must wait, and tells
//! [`Limiter::took`] afterwards.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ids::{Limit, Rate};

/// How much longer than needed a wait is, unless that is more than half a burst: at most so often is anybody woken.
const QUANTUM: Duration = Duration::from_millis(2);

const PICOSECONDS: u128 = 1_000_000_000_000;

/// One token bucket. Times are durations since a moment that is the caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    rate: Rate,
    /// When the bucket will be full if nothing is taken, in picoseconds: at 64 bytes, a nanosecond would be two percent of
    /// the time of a frame on a fast link.
    full_at: u128,
}

impl Bucket {
    /// A full one.
    #[must_use]
    pub fn new(rate: Rate) -> Self {
        Self { rate, full_at: 0 }
    }

    /// How long nothing may pass; `None` if something may.
    #[must_use]
    pub fn wait(&self, now: Duration) -> Option<Duration> {
        let burst = token_seconds(self.rate.burst.get()) / self.per_second();
        let in_debt_from = picoseconds(now).saturating_add(burst);
        let wait = self.full_at.checked_sub(in_debt_from)?;
        let rest = picoseconds(QUANTUM).min(burst / 2);
        Some(from_picoseconds(wait.saturating_add(rest)))
    }

    /// Something that costs so many tokens has passed.
    pub fn take(&mut self, cost: u64, now: Duration) {
        // Rounded up, so that no more than the rate passes.
        let cost = token_seconds(cost).div_ceil(self.per_second());
        self.full_at = self.full_at.max(picoseconds(now)).saturating_add(cost);
    }

    /// Changes the rate. What is missing to a full bucket stays missing, but debt does not outlive a burst of the new rate.
    pub fn set(&mut self, rate: Rate, now: Duration) {
        let missing = self.full_at.saturating_sub(picoseconds(now));
        let missing = missing.saturating_mul(self.per_second());
        let most = token_seconds(rate.burst.get().saturating_mul(2));
        self.rate = rate;
        let missing = missing.min(most) / self.per_second();
        self.full_at = picoseconds(now).saturating_add(missing);
    }

    fn per_second(&self) -> u128 {
        u128::from(self.rate.per_second.get())
    }
}

/// The picoseconds in which so many tokens come, times the tokens that come in a second.
fn token_seconds(tokens: u64) -> u128 {
    u128::from(tokens).saturating_mul(PICOSECONDS)
}

fn picoseconds(duration: Duration) -> u128 {
    duration.as_nanos().saturating_mul(1000)
}

/// Rounded up, so that a wait is never too short.
fn from_picoseconds(picoseconds: u128) -> Duration {
    let nanos = picoseconds.div_ceil(1000);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Holds the workers that share it to a [`Limit`], which may change. The default has none.
#[derive(Debug)]
pub struct Limiter {
    epoch: Instant,
    limited: AtomicBool,
    waits: AtomicU64,
    buckets: Mutex<Buckets>,
}

#[derive(Debug, Default)]
struct Buckets {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Default for Limiter {
    fn default() -> Self {
        Self {
            epoch: Instant::now(),
            limited: AtomicBool::new(false),
            waits: AtomicU64::new(0),
            buckets: Mutex::default(),
        }
    }
}

impl Limiter {
    /// Sets the limit from now on. Whoever waits under the old one must be called again to notice.
    pub fn set(&self, limit: Limit) {
        let now = self.epoch.elapsed();
        let mut buckets = self.buckets();
        change(&mut buckets.bytes, limit.bytes, now);
        change(&mut buckets.operations, limit.operations, now);
        let limited = limit != Limit::default();
        self.limited.store(limited, Ordering::Release);
    }

    /// How long nothing may pass; `None` if something may.
    pub fn wait(&self) -> Option<Duration> {
        if !self.limited.load(Ordering::Acquire) {
            return None;
        }
        let now = self.epoch.elapsed();
        let buckets = self.buckets();
        let wait = |bucket: &Option<Bucket>| bucket.as_ref().and_then(|bucket| bucket.wait(now));
        let wait = wait(&buckets.bytes).max(wait(&buckets.operations));
        if wait.is_some() {
            self.waits.fetch_add(1, Ordering::Relaxed);
        }
        wait
    }

    /// How often somebody was told to wait.
    pub fn waits(&self) -> u64 {
        self.waits.load(Ordering::Relaxed)
    }

    /// One frame or request of so many bytes has passed.
    pub fn took(&self, bytes: u64) {
        if !self.limited.load(Ordering::Acquire) {
            return;
        }
        let now = self.epoch.elapsed();
        let mut buckets = self.buckets();
        if let Some(bucket) = &mut buckets.bytes {
            bucket.take(bytes, now);
        }
        if let Some(bucket) = &mut buckets.operations {
            bucket.take(1, now);
        }
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn change(bucket: &mut Option<Bucket>, rate: Option<Rate>, now: Duration) {
    match (bucket.as_mut(), rate) {
        (Some(bucket), Some(rate)) => bucket.set(rate, now),
        (_, rate) => *bucket = rate.map(Bucket::new),
    }
}

#[cfg(test)]
mod tests;

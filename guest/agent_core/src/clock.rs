// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The guest's wall clock follows the host's: it is set once at the pod's start, and would then drift from a host whose
//! own clock is disciplined or set.
//!
//! The host says what time it is with every `NextEvents`. What it says is old when it arrives, by an unknown time, so it
//! may look as if the guest were ahead, and never as if it were behind: of two offsets the greater is nearer the truth.

/// What the clocks may differ by: as much as ntpd leaves to slewing (its `tinker step`), in ns.
const TOLERANCE: i128 = 128_000_000;

/// The last offset of the host's clock from the guest's, in ns.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    last: Option<i128>,
}

impl Clock {
    /// What the guest's clock is to be set to, both in ns since the epoch, if it is to be set.
    pub(crate) fn correction(&mut self, host: u64, guest: u64) -> Option<u64> {
        let offset = i128::from(host).checked_sub(i128::from(guest))?;
        // One that is ahead by a single word of the host's may only have heard it late.
        let Some(last) = self.last.replace(offset) else {
            return self.step(guest, offset.max(0));
        };
        self.step(guest, last.max(offset))
    }

    fn step(&mut self, guest: u64, offset: i128) -> Option<u64> {
        if offset.checked_abs()? <= TOLERANCE {
            return None;
        }
        self.last = None;
        u64::try_from(i128::from(guest).checked_add(offset)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;
    const NOON: u64 = 1_800_000_000 * SECOND;

    #[test]
    fn clock_that_is_behind_is_set_at_once() {
        let mut clock = Clock::default();
        assert_eq!(clock.correction(NOON, NOON - SECOND), Some(NOON));
        assert_eq!(clock.correction(NOON, NOON), None);
        assert_eq!(clock.correction(NOON + SECOND, NOON), Some(NOON + SECOND));
    }

    #[test]
    fn word_that_was_late_sets_nothing() {
        let mut clock = Clock::default();
        assert_eq!(clock.correction(NOON, NOON + 5 * SECOND), None);
        assert_eq!(clock.correction(NOON + SECOND, NOON + SECOND), None);
        assert_eq!(clock.correction(NOON, NOON + 5 * SECOND), None);
    }

    #[test]
    fn clock_that_is_ahead_twice_is_set_back_by_the_lesser() {
        let mut clock = Clock::default();
        assert_eq!(clock.correction(NOON, NOON + 7 * SECOND), None);
        let guest = NOON + 15 * SECOND;
        assert_eq!(
            clock.correction(NOON + 10 * SECOND, guest),
            Some(guest - 5 * SECOND)
        );
    }

    #[test]
    fn small_differences_are_left_alone_and_absurd_ones_do_no_harm() {
        let mut clock = Clock::default();
        assert_eq!(clock.correction(NOON, NOON - SECOND / 10), None);
        assert_eq!(clock.correction(NOON, NOON + SECOND / 10), None);
        assert_eq!(clock.correction(u64::MAX, 0), Some(u64::MAX));
        assert_eq!(clock.correction(0, u64::MAX), None);
        assert_eq!(clock.correction(0, u64::MAX), Some(0));
    }
}

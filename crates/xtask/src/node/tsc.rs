// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The rate of this machine's time stamp counter, which QEMU's emulation passes on as it is.
//!
//! A kernel that boots while other work takes the processor measures it wrong, up to several times: all its clocks then
//! run fast, and with them every deadline in the node and in the VMs there.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long is measured: the error of a reading, about a microsecond, is then nothing.
const SPAN: Duration = Duration::from_millis(100);

/// How many readings the best one is chosen from.
const READINGS: u32 = 16;

/// The counter and the clock at one moment.
#[derive(Clone, Copy)]
struct Reading {
    ticks: u64,
    at: Instant,
}

/// Ticks per millisecond.
pub(crate) fn khz() -> u64 {
    let first = reading();
    thread::sleep(SPAN);
    let second = reading();
    let ticks = u128::from(second.ticks.wrapping_sub(first.ticks));
    let nanoseconds = second.at.duration_since(first.at).as_nanos().max(1);
    u64::try_from(ticks.saturating_mul(1_000_000) / nanoseconds).unwrap_or(u64::MAX)
}

/// The reading that was interrupted least.
fn reading() -> Reading {
    let one = |_| {
        let at = Instant::now();
        let ticks = ticks();
        (at.elapsed(), Reading { ticks, at })
    };
    let best = (0..READINGS).map(one).min_by_key(|(took, _)| *took);
    best.map_or_else(|| one(0).1, |(_, reading)| reading)
}

#[expect(unsafe_code, reason = "the counter is read by an instruction")]
fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and it touches nothing but its registers.
    unsafe { _rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_that_of_a_processor() {
        assert!((100_000..20_000_000).contains(&khz()), "{}", khz());
    }
}

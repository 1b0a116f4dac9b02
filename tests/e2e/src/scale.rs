// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How long a test goes on: short in every run, whole in a soak (`cargo xtask test --soak`), and the chance in it.

use std::env;

/// How often something is done: `usual` times, in a soak `whole` times or the part of it that was asked for.
pub fn count(usual: u32, whole: u32) -> u32 {
    let percent = env::var("COFFER_SOAK").ok();
    scaled(usual, whole, percent.and_then(|text| text.parse().ok()))
}

fn scaled(usual: u32, whole: u32, percent: Option<u32>) -> u32 {
    percent.map_or(usual, |percent| {
        (whole.saturating_mul(percent) / 100).max(usual)
    })
}

/// Numbers that look random and are the same for the same seed (xorshift64*).
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// Seeded by `COFFER_SEED`, or by the clock; either way the seed is printed, for the run to be repeated.
    pub fn seeded() -> Self {
        let of_the_clock = || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |now| u64::from(now.subsec_micros()))
        };
        let seed = env::var("COFFER_SEED").ok();
        let seed = seed
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(of_the_clock);
        println!("seed {seed}: repeat with --seed {seed}");
        Self::of(seed)
    }

    fn of(seed: u64) -> Self {
        // Small seeds would begin alike; 0 would stay 0.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`, or 0 if that is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        mixed.checked_rem(end).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soak_is_whole_and_a_part_of_it_never_less_than_usual() {
        assert_eq!(scaled(20, 300, None), 20);
        assert_eq!(scaled(20, 300, Some(100)), 300);
        assert_eq!(scaled(20, 300, Some(10)), 30);
        assert_eq!(scaled(20, 300, Some(1)), 20);
    }

    #[test]
    fn same_seed_gives_the_same_numbers_within_bounds() {
        let ten = |seed| {
            let mut random = Random::of(seed);
            (0..10).map(|_| random.below(7)).collect::<Vec<_>>()
        };
        assert_eq!(ten(3), ten(3));
        assert_ne!(ten(3), ten(4));
        assert!(ten(5).iter().all(|number| *number < 7));
        assert_eq!(Random::of(0).below(0), 0);
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Runs every fuzz target on its seeds and on seeded random input, without a fuzzer.
//!
//! Deterministic: the same build runs the same inputs. The tests are the whole crate's purpose.

#[cfg(test)]
mod tests;

/// A small generator (SplitMix64), so that inputs are the same on every machine.
pub struct Random(u64);

impl Random {
    /// Starts from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> usize {
        usize::try_from(self.number() % bound.max(1)).unwrap_or(0)
    }

    /// `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        std::iter::repeat_with(|| self.number().to_le_bytes())
            .flatten()
            .take(len)
            .collect()
    }
}

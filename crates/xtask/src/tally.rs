// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Counts of tests, as libtest reports them.

use std::fmt;
use std::ops::AddAssign;

/// How many tests passed, failed and did not run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Tally {
    /// Adds up every summary of a libtest program in `output` ("test result: ok. 3 passed; 0 failed; ...").
    pub(crate) fn of_libtest(output: &str) -> Self {
        let mut sum = Self::default();
        for line in output.lines() {
            let Some((_, counts)) = line.split_once("test result: ") else {
                continue;
            };
            let count = |what: &str| -> u64 {
                let words: Vec<&str> = counts
                    .split(|c: char| c.is_whitespace() || c == ';' || c == '.')
                    .collect();
                let pair = words.windows(2).find(|pair| pair.get(1) == Some(&what));
                pair.and_then(|pair| pair.first()?.parse().ok())
                    .unwrap_or(0)
            };
            sum += Self {
                passed: count("passed"),
                failed: count("failed"),
                skipped: count("ignored"),
            };
        }
        sum
    }

    /// One check that passed, failed or could not be made.
    pub(crate) fn one(outcome: Outcome) -> Self {
        let mut tally = Self::default();
        match outcome {
            Outcome::Passed => tally.passed = 1,
            Outcome::Failed => tally.failed = 1,
            Outcome::Skipped => tally.skipped = 1,
        }
        tally
    }
}

/// How one check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    Failed,
    Skipped,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed = self.passed.saturating_add(other.passed);
        self.failed = self.failed.saturating_add(other.failed);
        self.skipped = self.skipped.saturating_add(other.skipped);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_of_several_programs_are_added() {
        let output = "running 3 tests\ntest a ... ok\n\
                      test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s\n\n\
                      test result: FAILED. 20 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(
            Tally::of_libtest(output).to_string(),
            "23 passed, 2 failed, 1 skipped"
        );
    }

    #[test]
    fn output_without_summary_counts_nothing() {
        assert_eq!(
            Tally::of_libtest("error: could not compile"),
            Tally::default()
        );
    }
}

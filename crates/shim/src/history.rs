// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The last lines of something, for the operator: numbered, bounded, and waited for.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// How many bytes of lines are kept: some hundreds of lines.
const MAX_BYTES: usize = 64 << 10;

/// What a line costs beside its text.
const LINE_OVERHEAD: usize = size_of::<String>();

/// The last lines of something. Any thread may add one; it never waits for a reader.
#[derive(Debug)]
pub(crate) struct History {
    kept: Mutex<Kept>,
    next: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Kept {
    lines: VecDeque<String>,
    bytes: usize,
    /// How many lines went before those that are kept.
    gone: u64,
}

impl Kept {
    fn next(&self) -> u64 {
        self.gone
            .saturating_add(u64::try_from(self.lines.len()).unwrap_or(u64::MAX))
    }
}

impl Default for History {
    fn default() -> Self {
        Self {
            kept: Mutex::default(),
            next: watch::Sender::new(0),
        }
    }
}

impl History {
    /// Adds a line, and lets the oldest go for which there is no room any more. An end of line at its end is left out.
    pub(crate) fn push(&self, line: &str) {
        let mut kept = self.kept();
        let line = line.trim_end_matches('\n').to_owned();
        kept.bytes = kept.bytes.saturating_add(cost(&line));
        kept.lines.push_back(line);
        while kept.bytes > MAX_BYTES
            && let Some(oldest) = kept.lines.pop_front()
        {
            kept.bytes = kept.bytes.saturating_sub(cost(&oldest));
            kept.gone = kept.gone.saturating_add(1);
        }
        self.next.send_replace(kept.next());
    }

    /// The lines that are kept from number `from` on, and the number of the one after them.
    pub(crate) fn since(&self, from: u64) -> (Vec<String>, u64) {
        let kept = self.kept();
        let skipped = usize::try_from(from.saturating_sub(kept.gone)).unwrap_or(usize::MAX);
        let lines = kept.lines.iter().skip(skipped).cloned();
        (lines.collect(), kept.next())
    }

    /// Answers when there is a line with number `from` or a later one.
    pub(crate) async fn has(&self, from: u64) {
        let mut next = self.next.subscribe();
        // The sender is here, so the wait has an end.
        let _there = next.wait_for(|next| *next > from).await;
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn cost(line: &str) -> usize {
    line.len().saturating_add(LINE_OVERHEAD)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[test]
    fn lines_keep_their_numbers() {
        let history = History::default();
        assert_eq!(history.since(0), (vec![], 0));
        history.push("a\n");
        history.push("b");
        assert_eq!(history.since(0), (vec!["a".to_owned(), "b".to_owned()], 2));
        assert_eq!(history.since(1), (vec!["b".to_owned()], 2));
        assert_eq!(history.since(2), (vec![], 2));
        assert_eq!(history.since(u64::MAX), (vec![], 2));
    }

    #[test]
    fn oldest_lines_go_at_the_cap() {
        let history = History::default();
        let line = "x".repeat(1024 - LINE_OVERHEAD);
        for _ in 0..64 {
            history.push(&line);
        }
        assert_eq!(history.since(0).0.len(), 64, "at the cap");
        history.push("one more");
        let (lines, next) = history.since(0);
        assert_eq!((lines.len(), next), (64, 65), "one past it");
        assert_eq!(history.since(64).0, ["one more"]);
        history.push(&"y".repeat(2 * MAX_BYTES));
        assert_eq!(
            history.since(0),
            (vec![], 66),
            "a line beyond the cap is not kept"
        );
    }

    #[tokio::test]
    async fn reader_waits_for_a_line_that_is_not_there_yet() {
        let history = History::default();
        history.push("a");
        history.has(0).await;
        assert!(timeout(Duration::ZERO, history.has(1)).await.is_err());
        let (_, ()) = tokio::join!(history.has(1), async { history.push("b") });
    }
}

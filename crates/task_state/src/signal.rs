// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a signal does to a process that does not handle it (signal(7)).

/// The highest signal number.
pub(crate) const MAX: u32 = 64;

/// Whether a process that does not handle signal `number` ends by it. The others are ignored, or stop and continue:
/// 0 (a question), `SIGCHLD`, `SIGCONT`, `SIGSTOP`, `SIGTSTP`, `SIGTTIN`, `SIGTTOU`, `SIGURG`, `SIGWINCH`.
pub(crate) fn ends_a_process(number: u32) -> bool {
    !matches!(number, 0 | 17..=23 | 28)
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Tells a fault of the emulated processor from one of ours. QEMU 7.2 loses the arithmetic flags of a nested guest once in
//! some hundred boots; the guest's kernel then ends in an exception whose registers no x86 processor can hold. Only that is
//! taken for the emulator's fault: whatever else a guest's kernel dies of is a failed test.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The bits of EFLAGS that are zero on every x86 processor (AMD64 Architecture Programmer's Manual, volume 1, §3.1.4).
const ALWAYS_ZERO: u32 = 0xffc0_8028;

/// The tests among those that failed in `output` whose guests had impossible registers; `artifacts` has their logs, in a
/// folder for each test.
pub(crate) fn failed_by_emulator(output: &str, artifacts: &Path) -> BTreeSet<String> {
    let failed = output.lines().filter_map(|line| {
        line.strip_prefix("test ")?
            .strip_suffix(" ... FAILED")
            .map(str::to_owned)
    });
    failed
        .filter(|name| {
            let folder = artifacts.join(name.rsplit("::").next().unwrap_or(name));
            let logs = fs::read_dir(folder).into_iter().flatten().flatten();
            logs.filter_map(|log| fs::read(log.path()).ok())
                .any(|log| has_impossible_flags(&String::from_utf8_lossy(&log)))
        })
        .collect()
}

/// Whether a kernel's account of an exception has flags that cannot be.
fn has_impossible_flags(log: &str) -> bool {
    log.split("EFLAGS: ").skip(1).any(|rest| {
        let digits = rest.get(..8).unwrap_or_default();
        u32::from_str_radix(digits, 16).is_ok_and(|flags| flags & ALWAYS_ZERO != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_a_real_processor_are_possible() {
        assert!(!has_impossible_flags(
            "RSP: 0018:ffffc90000013e40 EFLAGS: 00010246"
        ));
        assert!(!has_impossible_flags(
            "EFLAGS: 003f7fd7 | EFLAGS: 00000002 | EFLAGS: "
        ));
        assert!(has_impossible_flags(
            "EFLAGS: 00010246 | RSP: 0000:ffffc9000016be40 EFLAGS: 00ace646 | RAX: 0"
        ));
    }

    #[test]
    fn only_failed_tests_with_such_a_guest_are_the_emulators() {
        let artifacts = tempfile::tempdir().unwrap();
        for (test, log) in [
            ("a", "EFLAGS: 00ace646"),
            ("b", "EFLAGS: 00010246"),
            ("c", "EFLAGS: 00ace646"),
        ] {
            fs::create_dir(artifacts.path().join(test)).unwrap();
            fs::write(artifacts.path().join(test).join("containerd.log"), log).unwrap();
        }
        let output =
            "test m::a ... FAILED\ntest m::b ... FAILED\ntest m::c ... ok\ntest m::d ... FAILED\n";
        let found = failed_by_emulator(output, artifacts.path());
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["m::a"]);
    }
}

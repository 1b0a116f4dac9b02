// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a node must have to run pods. Each check stands alone, so that one report names everything that is missing.

mod artifacts;
mod host;

use std::path::Path;

use serde::Serialize;

/// One check and its outcome.
#[derive(Debug, Serialize)]
pub(crate) struct CheckResult {
    /// What was checked.
    pub(crate) name: &'static str,
    /// How it went.
    #[serde(flatten)]
    pub(crate) outcome: Outcome,
}

/// How a check went.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub(crate) enum Outcome {
    /// As it should be.
    Ok {
        /// What was found.
        found: String,
    },
    /// Pods run, with less.
    Warning {
        /// What is not as it should be.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// No pod runs.
    Failure {
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: String,
    },
}

impl Outcome {
    pub(crate) fn is_failure(&self) -> bool {
        matches!(self, Self::Failure { .. })
    }

    fn ok(found: impl Into<String>) -> Self {
        Self::Ok {
            found: found.into(),
        }
    }

    fn warning(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Warning {
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }

    fn failure(problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Failure {
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }
}

/// Every check of this node, under the config at `config`.
pub(crate) fn node(config: &Path) -> Vec<CheckResult> {
    let (config, config_outcome) = artifacts::config(config);
    let check = |name, outcome| CheckResult { name, outcome };
    vec![
        check("config", config_outcome),
        check("kvm", host::kvm(Path::new("/dev/kvm"))),
        check("user", host::user()),
        check("kernel", host::kernel_version()),
        check("cgroups", host::cgroups(Path::new("/proc/self/cgroup"))),
        check("overlayfs", host::file_system("overlay")),
        check("tun", host::tun(Path::new("/dev/net/tun"))),
        check(
            "memory",
            host::memory(Path::new("/proc/meminfo"), &config.guest),
        ),
        check("guest kernel", artifacts::kernel(&config.guest.kernel)),
        check("initramfs", artifacts::initramfs(&config.guest.initramfs)),
        check(
            "vmm",
            artifacts::program(
                &config.vmm.path,
                "install Coffer's binaries, or set vmm.path",
            ),
        ),
        check(
            "file server",
            artifacts::program(
                &config.file_server.path,
                "install Coffer's binaries, or set file_server.path",
            ),
        ),
        check(
            "mkfs.erofs",
            artifacts::program(
                &config.storage.mkfs_erofs,
                "install erofs-utils, or set storage.mkfs_erofs",
            ),
        ),
        check("mkfs.ext4", artifacts::mkfs_ext4(&config.storage.mkfs_ext4)),
        check("cache", artifacts::cache(&config.storage.cache_dir)),
        check("shim", artifacts::shim(std::env::var_os("PATH"))),
        check(
            "containerd",
            artifacts::containerd(Path::new("/etc/containerd")),
        ),
    ]
}

/// The report for people: a line a check, and below each that is not well what to do.
pub(crate) fn table(results: &[CheckResult]) -> String {
    let mut text = String::new();
    let width = results
        .iter()
        .map(|result| result.name.len())
        .max()
        .unwrap_or(0);
    for CheckResult { name, outcome } in results {
        let (mark, line, remedy) = match outcome {
            Outcome::Ok { found } => ("ok  ", found, None),
            Outcome::Warning { problem, remedy } => ("warn", problem, Some(remedy)),
            Outcome::Failure { problem, remedy } => ("FAIL", problem, Some(remedy)),
        };
        text.push_str(&format!("{mark}  {name:width$}  {line}\n"));
        if let Some(remedy) = remedy.filter(|remedy| !remedy.is_empty()) {
            text.push_str(&format!("      {:width$}  -> {remedy}\n", ""));
        }
    }
    let count = |wanted: fn(&Outcome) -> bool| {
        results
            .iter()
            .filter(|result| wanted(&result.outcome))
            .count()
    };
    let failures = count(Outcome::is_failure);
    let warnings = count(|outcome| matches!(outcome, Outcome::Warning { .. }));
    text.push_str(&match failures {
        0 => format!("This node can run pods ({warnings} warnings).\n"),
        _ => format!("This node cannot run pods ({failures} failures, {warnings} warnings).\n"),
    });
    text
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_says_below_each_failure_what_to_do() {
        let results = [
            CheckResult {
                name: "kvm",
                outcome: Outcome::failure("no /dev/kvm", "load the module"),
            },
            CheckResult {
                name: "overlayfs",
                outcome: Outcome::ok("there"),
            },
        ];
        let expected = "FAIL  kvm        no /dev/kvm\n                 -> load the module\n\
                        ok    overlayfs  there\n\
                        This node cannot run pods (1 failures, 0 warnings).\n";
        assert_eq!(table(&results), expected);
    }

    #[test]
    fn json_names_check_and_outcome() {
        let result = CheckResult {
            name: "kvm",
            outcome: Outcome::warning("slow", "wait"),
        };
        let json = serde_json::to_string(&result).unwrap();
        assert_eq!(
            json,
            r#"{"name":"kvm","outcome":"warning","problem":"slow","remedy":"wait"}"#
        );
    }

    #[test]
    fn every_check_has_a_remedy_for_its_failure() {
        for CheckResult { name, outcome } in node(Path::new("/nowhere/config.toml")) {
            if let Outcome::Failure { problem, remedy } = outcome {
                assert!(!problem.is_empty() && !remedy.is_empty(), "{name}");
            }
        }
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Whether the node's OOM killer has struck in the pod's cgroup, which this process and the VMM are in.

use std::path::{Path, PathBuf};

/// Where the cgroup hierarchies are mounted, by systemd's and the kubelet's convention.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Processes of this process's cgroup that the OOM killer has ended; 0 if that is not known.
pub(crate) fn kills() -> u64 {
    let cgroups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    kills_in(&cgroups, |path| std::fs::read_to_string(path).ok())
}

/// The lines are `0::/path` of version 2, and `number:controllers:/path` of version 1 (cgroups(7)).
fn kills_in(cgroups: &str, read: impl Fn(&Path) -> Option<String>) -> u64 {
    let count = |line: &str| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let file: PathBuf = match controllers {
            "" => [CGROUPS, path.trim_start_matches('/'), "memory.events"]
                .iter()
                .collect(),
            _ if controllers.split(',').any(|name| name == "memory") => [
                CGROUPS,
                "memory",
                path.trim_start_matches('/'),
                "memory.oom_control",
            ]
            .iter()
            .collect(),
            _ => return None,
        };
        let text = read(&file)?;
        text.lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.parse::<u64>().ok())
    };
    cgroups.lines().filter_map(count).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_read_from_either_version() {
        let read = |path: &Path| {
            let text = match path.to_str()? {
                "/sys/fs/cgroup/kubepods/pod1/memory.events" => "oom 1\noom_kill 2\n",
                "/sys/fs/cgroup/memory/pod1/memory.oom_control" => "under_oom 0\noom_kill 3\n",
                _ => return None,
            };
            Some(text.to_owned())
        };
        assert_eq!(kills_in("0::/kubepods/pod1\n", read), 2);
        let one = "4:cpu,cpuacct:/pod1\n7:memory:/pod1\n0::/\n";
        assert_eq!(kills_in(one, read), 3);
        assert_eq!(kills_in("0::/elsewhere\nno line\n", read), 0);
    }
}

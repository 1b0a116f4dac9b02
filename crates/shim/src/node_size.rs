// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How much memory a VM can have here: the node's, and what the pod's cgroup leaves.

use std::fs;
use std::io;
use std::path::Path;

use ids::{Bytes, Mib};

use crate::host_cgroup::{self, CgroupError, PodCgroup};

/// Of the pod's cgroup, what its processes on the host need beside the guest's memory: VMM and shim take about 12 MiB, and
/// what the host's kernel keeps for them is charged too.
const HOST_SHARE: u64 = 16 << 20;

/// The node's memory.
///
/// # Errors
/// The kernel does not say.
pub(crate) fn node_memory() -> io::Result<Mib> {
    let text = fs::read_to_string("/proc/meminfo")?;
    parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// From the text of `/proc/meminfo` (proc(5)).
fn parse(meminfo: &str) -> Option<Mib> {
    let total = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(Mib(u32::try_from(kib >> 10).unwrap_or(u32::MAX)))
}

/// The most memory that a VM can have within the pod's cgroup as its limits are now, or those of what it is in; `None` if
/// nothing limits it, or there is no cgroup.
///
/// # Errors
/// [`CgroupError`] if the path of the cgroup is none.
pub(crate) fn memory_limit(cgroups_path: Option<&Path>) -> Result<Option<Mib>, CgroupError> {
    let Some(path) = cgroups_path.filter(|path| !path.as_os_str().is_empty()) else {
        return Ok(None);
    };
    let cgroups = host_cgroup::plan(&path.to_string_lossy())?;
    let limits = cgroups.iter().filter_map(PodCgroup::memory_limit);
    Ok(limits.min().map(|Bytes(limit)| {
        let mib = limit.saturating_sub(HOST_SHARE) >> 20;
        Mib(u32::try_from(mib).unwrap_or(u32::MAX))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_has_the_memory_that_its_kernel_says() {
        let meminfo = "MemTotal:       24684444 kB\nMemFree:  1 kB\n";
        assert_eq!(parse(meminfo), Some(Mib(24105)));
        assert_eq!(parse("MemTotal: lots"), None);
        node_memory().unwrap();
    }

    #[test]
    fn pod_without_a_cgroup_has_no_limit() {
        assert_eq!(memory_limit(None).unwrap(), None);
        assert_eq!(memory_limit(Some(Path::new(""))).unwrap(), None);
        memory_limit(Some(Path::new("/../x"))).unwrap_err();
    }
}

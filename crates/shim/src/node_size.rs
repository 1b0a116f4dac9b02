// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How large a VM can be here: the node's processors and memory, and the pod's cgroup.

use std::fs;
use std::io;
use std::path::Path;

use ids::{Bytes, Mib, VcpuCount};
use pod_spec::VmSize;

use crate::host_cgroup::{self, CgroupError, PodCgroup};

/// Of the pod's cgroup, what its processes on the host need beside the guest's memory: VMM and shim take about 12 MiB, and
/// what the host's kernel keeps for them is charged too.
const HOST_SHARE: u64 = 16 << 20;

/// The node, as a VM that would have all of it.
///
/// # Errors
/// The kernel does not say.
pub(crate) fn node() -> io::Result<VmSize> {
    let online = fs::read_to_string("/sys/devices/system/cpu/online")?;
    let memory = fs::read_to_string("/proc/meminfo")?;
    parse(&online, &memory).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// From a list of processors (cpuset(7)) and the text of `/proc/meminfo` (proc(5)).
fn parse(online: &str, meminfo: &str) -> Option<VmSize> {
    let mut count = 0u64;
    for range in online.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
        count = count.saturating_add(last.checked_sub(first)?.saturating_add(1));
    }
    let total = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(VmSize {
        vcpus: VcpuCount::new(u8::try_from(count).unwrap_or(u8::MAX))?,
        memory: Mib(u32::try_from(kib >> 10).unwrap_or(u32::MAX)),
    })
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
    fn node_is_what_the_kernel_says() {
        let meminfo = "MemTotal:       24684444 kB\nMemFree:  1 kB\n";
        let size = parse("0-3,8,10-11\n", meminfo).unwrap();
        assert_eq!((size.vcpus.get(), size.memory), (7, Mib(24105)));
        assert_eq!(parse("3-1", meminfo), None);
        assert_eq!(parse("0", "MemTotal: lots"), None);
        assert_eq!(parse("0-999", meminfo).unwrap().vcpus.get(), 255);
        node().unwrap();
    }

    #[test]
    fn pod_without_a_cgroup_has_no_limit() {
        assert_eq!(memory_limit(None).unwrap(), None);
        assert_eq!(memory_limit(Some(Path::new(""))).unwrap(), None);
        memory_limit(Some(Path::new("/../x"))).unwrap_err();
    }
}

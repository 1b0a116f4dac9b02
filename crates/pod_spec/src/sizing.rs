// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How large a pod's VM is: the pod's limits plus a measured overhead, never more than the node's config allows.
//!
//! CRI puts the sums over the pod's containers on the sandbox container as annotations (containerd 1.6 and later); a
//! container without a pod has its own limits in its spec.

use std::collections::HashMap;

use ids::{Bytes, Mib, VcpuCount};
use oci_spec::runtime::LinuxResources;

use crate::annotations::Overrides;
use crate::config::{Guest, MIN_VM_MEMORY};
use crate::error::{SpecError, shown};

const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// The kernel's period where none is set.
pub(crate) const DEFAULT_PERIOD_US: u64 = 100_000;

/// The size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// Virtual CPUs, the CPU limit rounded up.
    pub vcpus: VcpuCount,
    /// Guest memory: the memory limit plus overhead.
    pub memory: Mib,
}

/// What a VM was started with, and what it can become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodSize {
    /// At the start.
    pub started_with: VmSize,
    /// The most, while it runs.
    pub largest: VmSize,
    /// Memory that the VM has beyond its containers' limits.
    pub overhead: Mib,
}

/// What a pod or container may use. `None`: no limit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// CPU time per period, both in µs.
    pub cpu: Option<(u64, u64)>,
    /// Memory.
    pub memory: Option<Bytes>,
    /// Huge pages, all of every size. They come beside the memory limit; those of a pod only the Sandbox API has a place for.
    pub huge_pages: Bytes,
}

impl Limits {
    /// From the annotations of a CRI sandbox.
    pub(crate) fn from_annotations(
        annotations: &HashMap<String, String>,
    ) -> Result<Self, SpecError> {
        let number = |key: &'static str| match annotations.get(key) {
            None => Ok(None),
            Some(text) => text
                .parse::<i64>()
                .map(positive)
                .map_err(|_| SpecError::Annotation {
                    key,
                    value: shown(text),
                    expected: "a whole number was expected".to_owned(),
                }),
        };
        let cpu = number(CPU_QUOTA)?.zip(number(CPU_PERIOD)?);
        Ok(Self {
            cpu,
            memory: number(MEMORY)?.map(Bytes),
            huge_pages: Bytes(0),
        })
    }

    /// From CRI's sums over a pod's containers; what is not positive is no limit.
    pub(crate) fn of_pod(quota: i64, period: i64, memory: i64, huge_pages: Bytes) -> Self {
        Self {
            cpu: positive(quota).zip(positive(period)),
            memory: positive(memory).map(Bytes),
            huge_pages,
        }
    }

    /// From the resources of a container that has no pod.
    pub(crate) fn from_resources(resources: Option<&LinuxResources>) -> Self {
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let quota = cpu.and_then(|cpu| cpu.quota()).and_then(positive);
        let period = cpu
            .and_then(|cpu| cpu.period())
            .filter(|period| *period > 0);
        let memory = resources
            .and_then(|resources| resources.memory().as_ref())
            .and_then(|memory| memory.limit());
        let huge_pages = resources.and_then(|resources| resources.hugepage_limits().as_ref());
        let huge_pages = huge_pages
            .into_iter()
            .flatten()
            .filter_map(|limit| positive(limit.limit()))
            // Written for "no limit", which asks for none.
            .filter(|limit| *limit < i64::MAX.unsigned_abs());
        Self {
            cpu: quota.map(|quota| (quota, period.unwrap_or(DEFAULT_PERIOD_US))),
            memory: memory.and_then(positive).map(Bytes),
            huge_pages: Bytes(huge_pages.fold(0, u64::saturating_add)),
        }
    }

    /// The VM for these limits, and what it can become on a node with so much memory. Where the pod's annotations say
    /// something, no limit makes it larger.
    pub(crate) fn pod_size(
        self,
        guest: &Guest,
        node_memory: Mib,
        overrides: &Overrides,
    ) -> Result<PodSize, SpecError> {
        let started_with = self.vm_size(guest, overrides)?;
        let spare = guest.spare_vcpus;
        let vcpus = VcpuCount::new(started_with.vcpus.get().saturating_add(spare));
        let vcpus = vcpus.unwrap_or(started_with.vcpus).min(guest.max_vcpus);
        let memory = guest.max_memory.min(node_memory);
        let memory = memory.max(started_with.memory);
        Ok(PodSize {
            started_with,
            largest: VmSize {
                vcpus: overrides.vcpus.unwrap_or(vcpus),
                memory: overrides.memory.unwrap_or(memory),
            },
            overhead: guest.overhead_memory,
        })
    }

    /// The VM for these limits, as far as the pod's annotations say nothing else.
    pub(crate) fn vm_size(self, guest: &Guest, overrides: &Overrides) -> Result<VmSize, SpecError> {
        let memory = self.vm_memory(guest)?;
        let memory = match self.memory {
            None => overrides.memory.unwrap_or(memory),
            Some(_) => overrides.memory_within(memory)?.unwrap_or(memory),
        };
        let vcpus = match overrides.vcpus {
            None => self.vm_vcpus(guest)?,
            Some(vcpus) => vcpus,
        };
        Ok(VmSize { vcpus, memory })
    }

    fn vm_vcpus(self, guest: &Guest) -> Result<VcpuCount, SpecError> {
        let Some((quota, period)) = self.cpu else {
            return Ok(guest.default_vcpus);
        };
        let wanted = quota.div_ceil(period);
        u8::try_from(wanted)
            .ok()
            .and_then(VcpuCount::new)
            .filter(|vcpus| *vcpus <= guest.max_vcpus)
            .ok_or(SpecError::TooLarge {
                wanted,
                unit: "vCPUs",
                limit: u64::from(guest.max_vcpus.get()),
                key: "guest.max_vcpus",
            })
    }

    fn vm_memory(self, guest: &Guest) -> Result<Mib, SpecError> {
        let huge_pages = self.huge_pages.0.div_ceil(1 << 20);
        let memory = match self.memory {
            None if huge_pages == 0 => guest.default_memory,
            limit => {
                let wanted = match limit {
                    None => u64::from(guest.default_memory.0),
                    Some(limit) => limit
                        .0
                        .div_ceil(1 << 20)
                        .saturating_add(u64::from(guest.overhead_memory.0)),
                };
                let wanted = wanted.saturating_add(huge_pages);
                let memory = u32::try_from(wanted)
                    .ok()
                    .map(Mib)
                    .filter(|memory| *memory <= guest.max_memory);
                memory.ok_or(SpecError::TooLarge {
                    wanted,
                    unit: "MiB of memory",
                    limit: u64::from(guest.max_memory.0),
                    key: "guest.max_memory_mib",
                })?
            }
        };
        Ok(memory.max(MIN_VM_MEMORY))
    }
}

fn positive(number: i64) -> Option<u64> {
    u64::try_from(number).ok().filter(|number| *number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RuntimeConfig;

    fn guest() -> Guest {
        RuntimeConfig::parse("[guest]\nmax_vcpus = 8\nmax_memory_mib = 4096")
            .unwrap()
            .guest
    }

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn size(pairs: &[(&str, &str)]) -> Result<VmSize, SpecError> {
        sized(pairs, &Overrides::default())
    }

    fn sized(pairs: &[(&str, &str)], overrides: &Overrides) -> Result<VmSize, SpecError> {
        Limits::from_annotations(&annotations(pairs))?.vm_size(&guest(), overrides)
    }

    #[test]
    fn pod_without_limits_has_the_default_size() {
        // kubelet writes 0 and -1 for "no limit".
        let none = size(&[(CPU_QUOTA, "0"), (CPU_PERIOD, "100000"), (MEMORY, "0")]).unwrap();
        assert_eq!(
            none,
            VmSize {
                vcpus: VcpuCount::ONE,
                memory: Mib(512)
            }
        );
        assert_eq!(size(&[(CPU_QUOTA, "-1")]).unwrap(), none);
        assert_eq!(size(&[]).unwrap(), none);
    }

    #[test]
    fn limits_are_rounded_up_and_overhead_is_added() {
        let pairs = [
            (CPU_QUOTA, "150000"),
            (CPU_PERIOD, "100000"),
            (MEMORY, "268435457"),
        ];
        let size = size(&pairs).unwrap();
        assert_eq!(size.vcpus.get(), 2);
        assert_eq!(size.memory, Mib(257 + 64));
    }

    #[test]
    fn pod_above_the_nodes_bounds_is_refused_with_the_key_to_change() {
        let error = size(&[(CPU_QUOTA, "900000"), (CPU_PERIOD, "100000")])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("9 vCPUs") && error.contains("guest.max_vcpus"),
            "{error}"
        );
        let error = size(&[(MEMORY, "9223372036854775807")])
            .unwrap_err()
            .to_string();
        assert!(error.contains("guest.max_memory_mib"), "{error}");
    }

    #[test]
    fn vm_can_become_as_large_as_node_and_config_allow() {
        let size = |vcpus, memory| VmSize {
            vcpus: VcpuCount::new(vcpus).unwrap(),
            memory: Mib(memory),
        };
        let (none, lots) = (Overrides::default(), Mib(1 << 20));
        let largest = |memory| {
            let size = Limits::default().pod_size(&guest(), memory, &none);
            size.unwrap().largest
        };
        let spare = guest().spare_vcpus;
        assert_eq!(largest(Mib(2048)), size(1 + spare, 2048));
        assert_eq!(
            largest(Mib(64)).memory,
            Mib(512),
            "not less than at the start"
        );
        assert_eq!(largest(lots).memory, Mib(4096));
        let large = Limits {
            cpu: Some((7, 1)),
            ..Limits::default()
        };
        let large = large.pod_size(&guest(), lots, &none).unwrap();
        assert_eq!(large.largest.vcpus.get(), 8, "guest.max_vcpus");
        let overrides = Overrides {
            vcpus: VcpuCount::new(2),
            memory: None,
        };
        let fixed = Limits::default().pod_size(&guest(), Mib(2048), &overrides);
        let fixed = fixed.unwrap();
        assert_eq!(fixed.started_with, size(2, 512));
        assert_eq!(fixed.largest, size(2, 2048), "what an annotation says");
    }

    #[test]
    fn huge_pages_come_beside_the_memory_limit() {
        let size = |json: &str| {
            let resources = serde_json::from_str(json).unwrap();
            Limits::from_resources(Some(&resources)).vm_size(&guest(), &Overrides::default())
        };
        let pages = r#""hugepageLimits":[{"pageSize":"2MB","limit":67108865},{"pageSize":"1GB","limit":0},
            {"pageSize":"64KB","limit":9223372036854775807}]"#;
        let with_limit = format!(r#"{{{pages},"memory":{{"limit":268435456}}}}"#);
        assert_eq!(size(&with_limit).unwrap().memory, Mib(256 + 65 + 64));
        let without = format!("{{{pages}}}");
        assert_eq!(size(&without).unwrap().memory, Mib(512 + 65));
        let error = size(r#"{"hugepageLimits":[{"pageSize":"1GB","limit":4294967296}]}"#);
        assert!(
            error
                .unwrap_err()
                .to_string()
                .contains("guest.max_memory_mib")
        );
    }

    #[test]
    fn annotations_of_ours_replace_what_the_limits_give_but_not_beyond_a_memory_limit() {
        let overrides = |vcpus, memory: Option<u32>| Overrides {
            vcpus: VcpuCount::new(vcpus),
            memory: memory.map(Mib),
        };
        let free = sized(&[], &overrides(4, Some(2048))).unwrap();
        assert_eq!((free.vcpus.get(), free.memory), (4, Mib(2048)));
        let limits = [
            (CPU_QUOTA, "900000"),
            (CPU_PERIOD, "100000"),
            (MEMORY, "268435456"),
        ];
        let limited = sized(&limits, &overrides(4, Some(256 + 64))).unwrap();
        assert_eq!((limited.vcpus.get(), limited.memory), (4, Mib(256 + 64)));
        let error = sized(&limits, &overrides(4, Some(256 + 65))).unwrap_err();
        assert!(
            error.to_string().contains("at most 320 MiB are allowed"),
            "{error}"
        );
    }

    #[test]
    fn annotation_that_is_no_number_is_refused() {
        assert!(matches!(
            size(&[(MEMORY, "1Gi")]),
            Err(SpecError::Annotation { key: MEMORY, .. })
        ));
    }
}

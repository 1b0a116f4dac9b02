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

/// The size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmSize {
    /// Virtual CPUs, the CPU limit rounded up.
    pub vcpus: VcpuCount,
    /// Guest memory: the memory limit plus overhead.
    pub memory: Mib,
}

/// What limits a pod has. `None`: no limit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// CPU time per period, both in µs.
    pub(crate) cpu: Option<(u64, u64)>,
    pub(crate) memory: Option<Bytes>,
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
        })
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
        // The kernel's default period is 100 ms.
        Self {
            cpu: quota.map(|quota| (quota, period.unwrap_or(100_000))),
            memory: memory.and_then(positive).map(Bytes),
        }
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
        let memory = match self.memory {
            None => guest.default_memory,
            Some(limit) => {
                let wanted = limit
                    .0
                    .div_ceil(1 << 20)
                    .saturating_add(u64::from(guest.overhead_memory.0));
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

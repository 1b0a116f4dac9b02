// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! New resources for a container that is there already.

use oci_spec::runtime::LinuxResources;

use crate::bundle::is_object;
use crate::error::SpecError;
use crate::sizing::{Limits, VmSize};
use crate::translate::check_resources;

/// The longest JSON of an update: a few numbers, and the device rules that containerd repeats.
pub const MAX_RESOURCES_BYTES: usize = 256 << 10;

/// The OCI runtime spec's `LinuxResources`, for the guest.
///
/// Device rules are left out, as runc leaves them out of an update: containerd's CRI repeats those of the creation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResourceUpdate {
    guest_json: Vec<u8>,
    limits: Limits,
}

impl ResourceUpdate {
    /// From JSON as containerd sends it.
    ///
    /// # Errors
    /// [`SpecError::TooLong`] or [`SpecError::ResourcesJson`] if the bytes are none, [`SpecError::Unsupported`] with the
    /// name of a field that no guest can apply.
    pub fn parse(json: &[u8]) -> Result<Self, SpecError> {
        if json.len() > MAX_RESOURCES_BYTES {
            return Err(SpecError::TooLong {
                len: json.len(),
                max: MAX_RESOURCES_BYTES,
            });
        }
        is_object(json).map_err(SpecError::ResourcesJson)?;
        let mut resources: LinuxResources =
            serde_json::from_slice(json).map_err(SpecError::ResourcesJson)?;
        check_resources(&resources)?;
        resources.set_devices(None);
        Ok(Self {
            limits: Limits::from_resources(Some(&resources)),
            guest_json: serde_json::to_vec(&resources).map_err(SpecError::ResourcesJson)?,
        })
    }

    /// Whether a VM of this size can give what is asked.
    ///
    /// # Errors
    /// [`SpecError::BeyondVm`] for the first limit that it cannot.
    pub fn check_fits(&self, vm: VmSize) -> Result<(), SpecError> {
        let vcpus = u64::from(vm.vcpus.get());
        let beyond = |field, wanted| Err(SpecError::BeyondVm { field, wanted, vm });
        if let Some(memory) = self.limits.memory
            && memory.0.div_ceil(1 << 20) > u64::from(vm.memory.0)
        {
            return beyond("memory.limit", format!("{} bytes", memory.0));
        }
        if let Some((quota, period)) = self.limits.cpu
            && quota > vcpus.saturating_mul(period)
        {
            let wanted = format!("{quota} us of CPU time in each {period} us");
            return beyond("cpu.quota", wanted);
        }
        Ok(())
    }

    /// For the agent.
    pub fn guest_json(&self) -> &[u8] {
        &self.guest_json
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ids::{Mib, VcpuCount};

    const VM: VmSize = VmSize {
        vcpus: VcpuCount::ONE,
        memory: Mib(256),
    };

    fn parse(json: &str) -> Result<ResourceUpdate, String> {
        ResourceUpdate::parse(json.as_bytes()).map_err(|error| error.to_string())
    }

    fn fits(json: &str) -> Result<(), String> {
        let update = parse(json).unwrap();
        update.check_fits(VM).map_err(|error| error.to_string())
    }

    #[test]
    fn devices_are_left_out_and_limits_kept() {
        let json = r#"{"devices":[{"allow":false,"access":"rwm"}],"memory":{"limit":5},"cpu":{"shares":7},
            "unified":{"memory.high":"9"}}"#;
        let update = parse(json).unwrap();
        let guest: serde_json::Value = serde_json::from_slice(update.guest_json()).unwrap();
        assert_eq!(
            guest,
            serde_json::json!({
                "memory": {"limit": 5}, "cpu": {"shares": 7}, "unified": {"memory.high": "9"}
            })
        );
    }

    #[test]
    fn what_is_no_resources_is_refused() {
        assert_eq!(
            parse("7").unwrap_err(),
            "the update holds no OCI LinuxResources"
        );
        for text in ["", "[]"] {
            parse(text).unwrap_err();
        }
        let padded = |len: usize| format!("{{}}{}", " ".repeat(len.saturating_sub(2)));
        parse(&padded(MAX_RESOURCES_BYTES)).unwrap();
        parse(&padded(MAX_RESOURCES_BYTES + 1)).unwrap_err();
    }

    #[test]
    fn what_no_guest_can_apply_is_refused_by_name() {
        let error = parse(r#"{"memory":{"disableOOMKiller":true}}"#).unwrap_err();
        assert!(
            error.starts_with("linux.resources.memory.disableOOMKiller: "),
            "{error}"
        );
    }

    #[test]
    fn limit_beyond_the_vm_names_the_vms_size() {
        for (fitting, beyond, field) in [
            (
                r#"{"memory":{"limit":268435456}}"#,
                r#"{"memory":{"limit":268435457}}"#,
                "memory.limit is 268435457 bytes",
            ),
            (
                r#"{"cpu":{"quota":50000,"period":50000}}"#,
                r#"{"cpu":{"quota":100001}}"#,
                "cpu.quota is 100001 us of CPU time in each 100000 us",
            ),
            (
                r#"{"memory":{"limit":-1},"cpu":{"quota":-1,"cpus":"62-63"}}"#,
                r#"{"memory":{"limit":9223372036854775807}}"#,
                "memory.limit is 9223372036854775807 bytes",
            ),
        ] {
            fits(fitting).unwrap();
            let error = fits(beyond).unwrap_err();
            assert_eq!(
                error,
                format!(
                    "linux.resources.{field}, the pod's VM has 1 vCPUs and 256 MiB of memory for as long as it runs: make \
                     the pod anew with larger limits"
                )
            );
        }
    }
}

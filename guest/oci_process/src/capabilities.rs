// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The capability sets of a process, capabilities(7).

use oci_spec::runtime::{Capability, LinuxCapabilities};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
};

use crate::Error;
use crate::error::Context as _;

/// Capabilities in the order of their numbers (linux/capability.h).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The five sets of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sets {
    bounding: CapabilitySet,
    effective: CapabilitySet,
    permitted: CapabilitySet,
    inheritable: CapabilitySet,
    ambient: CapabilitySet,
}

impl Sets {
    /// No capability in any set.
    const NONE: Self = Self {
        bounding: CapabilitySet::empty(),
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
        ambient: CapabilitySet::empty(),
    };

    /// The sets that the spec names; none at all if it names none.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a capability that is not known.
    pub(crate) fn parse(spec: Option<&LinuxCapabilities>) -> Result<Self, Error> {
        let Some(spec) = spec else {
            return Ok(Self::NONE);
        };
        Ok(Self {
            bounding: set(spec.bounding().iter().flatten())?,
            effective: set(spec.effective().iter().flatten())?,
            permitted: set(spec.permitted().iter().flatten())?,
            inheritable: set(spec.inheritable().iter().flatten())?,
            ambient: set(spec.ambient().iter().flatten())?,
        })
    }

    /// Drops from the bounding set what is not in it. Needs `CAP_SETPCAP`, so it comes before [`Self::apply`].
    ///
    /// # Errors
    /// [`Error::Step`].
    pub(crate) fn limit_bounding(&self) -> Result<(), Error> {
        for (number, name) in NAMES.iter().enumerate() {
            let one = bit(number);
            if self.bounding.contains(one) {
                continue;
            }
            match remove_capability_from_bounding_set(one) {
                // A kernel older than the capability.
                Err(rustix::io::Errno::INVAL) => {}
                other => other.step(|| format!("dropping CAP_{name} from the bounding set"))?,
            }
        }
        Ok(())
    }

    /// Takes the other four sets on.
    ///
    /// # Errors
    /// [`Error::Step`].
    pub(crate) fn apply(&self) -> Result<(), Error> {
        set_capabilities(
            None,
            CapabilitySets {
                effective: self.effective,
                permitted: self.permitted,
                inheritable: self.inheritable,
            },
        )
        .step(|| "setting the process's capabilities".to_owned())?;
        clear_ambient_capability_set().step(|| "clearing the ambient capabilities".to_owned())?;
        for one in self.ambient.iter() {
            configure_capability_in_ambient_set(one, true)
                .step(|| format!("raising the ambient capability {one:?}"))?;
        }
        Ok(())
    }
}

fn bit(number: usize) -> CapabilitySet {
    u32::try_from(number)
        .ok()
        .and_then(|number| 1_u64.checked_shl(number))
        .map_or(CapabilitySet::empty(), CapabilitySet::from_bits_retain)
}

fn set<'a>(capabilities: impl Iterator<Item = &'a Capability>) -> Result<CapabilitySet, Error> {
    capabilities
        .map(one)
        .try_fold(CapabilitySet::empty(), |all, one| Ok(all | one?))
}

fn one(capability: &Capability) -> Result<CapabilitySet, Error> {
    let name = capability.to_string();
    let short = name.strip_prefix("CAP_").unwrap_or(&name);
    NAMES
        .iter()
        .position(|known| *known == short)
        .map(bit)
        .ok_or_else(|| Error::invalid("process.capabilities", format!("{name} is not known")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_to_the_kernels_numbers() {
        let spec: LinuxCapabilities = serde_json::from_str(
            r#"{"bounding": ["CAP_CHOWN", "CAP_CHECKPOINT_RESTORE"], "effective": ["CAP_NET_BIND_SERVICE"],
                "permitted": ["CAP_SYS_ADMIN"], "inheritable": [], "ambient": ["CAP_KILL"]}"#,
        )
        .unwrap();
        let sets = Sets::parse(Some(&spec)).unwrap();
        assert_eq!(
            sets.bounding,
            CapabilitySet::CHOWN | CapabilitySet::CHECKPOINT_RESTORE
        );
        assert_eq!(sets.effective, CapabilitySet::NET_BIND_SERVICE);
        assert_eq!(sets.permitted, CapabilitySet::SYS_ADMIN);
        assert_eq!(sets.ambient, CapabilitySet::KILL);
    }

    #[test]
    fn missing_capabilities_are_none() {
        assert_eq!(Sets::parse(None).unwrap(), Sets::NONE);
    }
}

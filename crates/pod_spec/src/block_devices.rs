// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Block devices of the host that a container asks for: a PersistentVolumeClaim with volumeMode Block, `ctr --device`.
//!
//! Each becomes a disk of the VM, and its device file in the container has the guest's number. One is asked for by a cgroup
//! rule of its own: the devices that containerd puts into the spec of a privileged container have none.

use std::path::PathBuf;

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::SpecError;

/// The most block devices that one container may have; its VM's slots for disks are fewer still.
const MAX_BLOCK_DEVICES: usize = 16;

/// A block device of the host that a container has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    /// Where its file is in the container.
    pub path: PathBuf,
    /// Its major and minor number on the host.
    pub number: (u32, u32),
    /// What the container may do, in the letters of a device rule: any of "r", "w" and "m".
    pub access: String,
    /// Permission bits of its file.
    pub mode: u32,
    /// Owner of its file.
    pub uid: u32,
    /// Group of its file.
    pub gid: u32,
}

impl BlockDevice {
    /// Whether the container may write to it.
    pub fn is_writable(&self) -> bool {
        self.access.contains('w')
    }
}

/// Takes the block devices that are asked for out of the spec, and their rules.
///
/// # Errors
/// [`SpecError::Unsupported`] for more than [`MAX_BLOCK_DEVICES`], and for numbers that are none.
pub(crate) fn take(linux: &mut Linux) -> Result<Vec<BlockDevice>, SpecError> {
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().clone());
    let rules = rules.unwrap_or_default();
    let (asked, others): (Vec<_>, Vec<_>) = linux
        .devices()
        .iter()
        .flatten()
        .cloned()
        .partition(|device| rules.iter().any(|rule| is_own(rule, device)));
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    if asked.len() > MAX_BLOCK_DEVICES {
        let reason = format!("more than {MAX_BLOCK_DEVICES} block devices: use fewer");
        return Err(SpecError::unsupported("linux.devices", reason));
    }
    let taken = asked
        .iter()
        .map(|device| block_device(device, &rules))
        .collect::<Result<_, _>>()?;
    if let Some(resources) = linux.resources_mut() {
        let left = rules
            .into_iter()
            .filter(|rule| !asked.iter().any(|device| is_own(rule, device)));
        resources.set_devices(Some(left.collect()));
    }
    linux.set_devices(Some(others));
    Ok(taken)
}

/// Whether the rule allows this one block device and no other.
fn is_own(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    device.typ() == LinuxDeviceType::B
        && rule.typ() == Some(LinuxDeviceType::B)
        && rule.allow()
        && rule.major() == Some(device.major())
        && rule.minor() == Some(device.minor())
}

fn block_device(
    device: &LinuxDevice,
    rules: &[LinuxDeviceCgroup],
) -> Result<BlockDevice, SpecError> {
    let refused = |reason: &str| {
        let field = format!("linux.devices[{}]", device.path().display());
        SpecError::unsupported(field, reason)
    };
    if !device.path().is_absolute() {
        return Err(refused("is not an absolute path: name one"));
    }
    let number = |value: i64| {
        u32::try_from(value).map_err(|_| refused("has a number that no device has: correct it"))
    };
    let own: Vec<&str> = rules
        .iter()
        .filter(|rule| is_own(rule, device))
        .map(|rule| rule.access().as_deref().unwrap_or("rwm"))
        .collect();
    let access = "rwm"
        .chars()
        .filter(|letter| own.iter().any(|access| access.contains(*letter)));
    Ok(BlockDevice {
        path: device.path().clone(),
        number: (number(device.major())?, number(device.minor())?),
        access: access.collect(),
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linux(devices: &str, rules: &str) -> Linux {
        let json = format!(r#"{{"devices":[{devices}],"resources":{{"devices":[{rules}]}}}}"#);
        serde_json::from_str(&json).unwrap()
    }

    const DISK: &str =
        r#"{"path":"/dev/xvda","type":"b","major":7,"minor":3,"fileMode":432,"gid":6}"#;

    #[test]
    fn device_with_a_rule_of_its_own_is_taken_with_the_rule() {
        for (access, expected) in [("rwm", "rwm"), ("mrw", "rwm"), ("r", "r"), ("mr", "rm")] {
            let rules = format!(
                r#"{{"allow":false,"access":"rwm"}},
                   {{"allow":true,"type":"b","major":7,"minor":3,"access":"{access}"}},
                   {{"allow":true,"type":"c","major":1,"minor":3,"access":"rwm"}}"#
            );
            let null = r#"{"path":"/dev/null","type":"c","major":1,"minor":3}"#;
            let mut linux = linux(&format!("{DISK},{null}"), &rules);
            let taken = take(&mut linux).unwrap();
            let [device] = taken.as_slice() else {
                panic!("one: {taken:?}");
            };
            assert_eq!(device.path, PathBuf::from("/dev/xvda"));
            assert_eq!((device.number, device.mode, device.gid), ((7, 3), 0o660, 6));
            assert_eq!(device.access, expected);
            assert_eq!(device.is_writable(), expected.contains('w'));
            let left = linux.devices().as_ref().unwrap();
            assert_eq!(left.len(), 1, "{left:?}");
            let rules = linux.resources().as_ref().unwrap().devices().as_ref();
            assert_eq!(
                rules.unwrap().len(),
                2,
                "the rule goes by the guest's number"
            );
        }
    }

    #[test]
    fn device_that_nobody_asked_for_stays_for_others_to_refuse() {
        for rules in [
            "",
            r#"{"allow":true,"access":"rwm"}"#,
            r#"{"allow":false,"type":"b","major":7,"minor":3,"access":"rwm"}"#,
            r#"{"allow":true,"type":"b","major":7,"access":"rwm"}"#,
            r#"{"allow":true,"type":"c","major":7,"minor":3,"access":"rwm"}"#,
        ] {
            let mut linux = linux(DISK, rules);
            assert_eq!(take(&mut linux).unwrap(), [], "{rules}");
            assert_eq!(linux.devices().as_ref().unwrap().len(), 1);
        }
        let mut character = linux(
            &DISK.replace("\"b\"", "\"c\""),
            r#"{"allow":true,"type":"c","major":7,"minor":3,"access":"rwm"}"#,
        );
        assert_eq!(take(&mut character).unwrap(), []);
    }

    #[test]
    fn one_device_past_the_cap_and_numbers_that_are_none_are_refused() {
        let rule = r#"{"allow":true,"type":"b","major":7,"minor":3,"access":"rwm"}"#;
        let many = |count| take(&mut linux(&vec![DISK; count].join(","), rule));
        assert_eq!(many(MAX_BLOCK_DEVICES).unwrap().len(), MAX_BLOCK_DEVICES);
        many(MAX_BLOCK_DEVICES + 1).unwrap_err();
        let negative = |text: &str| text.replace("\"major\":7", "\"major\":-7");
        take(&mut linux(&negative(DISK), &negative(rule))).unwrap_err();
        take(&mut linux(&DISK.replace("/dev/xvda", "xvda"), rule)).unwrap_err();
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The device files of a container. None is the host's: a device number means the guest's device of that number.
//!
//! containerd fills the spec of a privileged container with every device of the host and one rule that allows them all.
//! Nobody has asked for these by name, so the guest's own take their place. A device that somebody did ask for (a device
//! plugin, `ctr --device`) comes with a rule of its own, or in a spec that does not allow all, and is refused.

use std::path::Path;

use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceType,
};

use crate::error::SpecError;

/// Character devices that the guest has of its own, by major and minor (Linux, Documentation/admin-guide/devices.txt).
const GUESTS: [(i64, i64); 9] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (1, 11),   // kmsg, the guest's kernel log
    (5, 0),    // tty
    (10, 200), // net/tun
    (10, 229), // fuse
];

/// `/dev/ptmx` is a link to the container's own devpts (OCI runtime specification, config-linux, "Default Devices").
const PTMX: (i64, i64) = (5, 2);

/// What a privileged container has beside the default devices: path, major, minor, mode.
const PRIVILEGED: [(&str, i64, i64, u32); 3] = [
    ("/dev/kmsg", 1, 11, 0o600),
    ("/dev/net/tun", 10, 200, 0o666),
    ("/dev/fuse", 10, 229, 0o666),
];

/// Leaves the devices that the guest has, and gives a privileged container the guest's own.
///
/// # Errors
/// [`SpecError::Unsupported`] for a device of the host that was asked for.
pub(crate) fn translate(linux: &mut Linux) -> Result<(), SpecError> {
    let asked = linux.devices().clone().unwrap_or_default();
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().as_deref());
    let rules = rules.unwrap_or_default();
    let privileged = allow_all(rules);
    let mut guests = Vec::new();
    for device in asked {
        let number = (device.major(), device.minor());
        let character = matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U);
        if character && number == PTMX {
            continue;
        }
        let fifo = device.typ() == LinuxDeviceType::P;
        if character && GUESTS.contains(&number) || fifo && !privileged {
            guests.push(device);
        } else if !privileged || rules.iter().any(|rule| is_own(rule, &device)) {
            let field = format!("linux.devices[{}]", device.path().display());
            return Err(SpecError::unsupported(
                field,
                "a device of the host cannot be passed to a pod: do not ask for it (devices of a device plugin, of CRI, \
                 ctr --device)",
            ));
        }
    }
    if privileged {
        for (path, major, minor, mode) in PRIVILEGED {
            if !guests.iter().any(|device| device.path() == Path::new(path)) {
                guests.push(character(path, major, minor, mode)?);
            }
        }
    }
    linux.set_devices(Some(guests).filter(|guests| !guests.is_empty()));
    Ok(())
}

/// Whether the last rule about all devices allows them (runc's rule: later rules go before earlier ones).
fn allow_all(rules: &[LinuxDeviceCgroup]) -> bool {
    let mut about_all = rules.iter().rev().filter(|rule| {
        matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            && rule.major().is_none_or(|number| number < 0)
            && rule.minor().is_none_or(|number| number < 0)
            && rule
                .access()
                .as_ref()
                .is_none_or(|access| "rwm".chars().all(|character| access.contains(character)))
    });
    about_all.next().is_some_and(LinuxDeviceCgroup::allow)
}

/// Whether the rule allows this one device and no other.
fn is_own(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    rule.allow() && rule.major() == Some(device.major()) && rule.minor() == Some(device.minor())
}

fn character(path: &str, major: i64, minor: i64, mode: u32) -> Result<LinuxDevice, SpecError> {
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(LinuxDeviceType::C)
        .major(major)
        .minor(minor)
        .file_mode(mode)
        .build()
        .map_err(|error| SpecError::unsupported("linux.devices", error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = r#"{"allow":true,"access":"rwm"}"#;
    const NONE: &str = r#"{"allow":false,"access":"rwm"}"#;

    fn of(devices: &str, rules: &[&str]) -> Result<Vec<String>, String> {
        let json = format!(
            r#"{{"devices":[{devices}],"resources":{{"devices":[{}]}}}}"#,
            rules.join(",")
        );
        let mut linux: Linux = serde_json::from_str(&json).unwrap();
        translate(&mut linux).map_err(|error| error.to_string())?;
        let devices = linux.devices().iter().flatten();
        Ok(devices
            .map(|device| device.path().display().to_string())
            .collect())
    }

    fn device(path: &str, kind: &str, major: i64, minor: i64) -> String {
        format!(r#"{{"path":"{path}","type":"{kind}","major":{major},"minor":{minor}}}"#)
    }

    #[test]
    fn device_of_the_host_is_refused_by_its_path_and_dev_null_is_not() {
        let null = device("/dev/x", "c", 1, 3);
        assert_eq!(of(&null, &[NONE]).unwrap(), ["/dev/x"]);
        for (path, kind, major) in [("/dev/kvm", "c", 10), ("/dev/sda", "b", 1)] {
            // A block device of null's number is no null.
            let error = of(&device(path, kind, major, 3), &[NONE]).unwrap_err();
            assert!(
                error.starts_with(&format!("linux.devices[{path}]: ")),
                "{error}"
            );
        }
    }

    #[test]
    fn privileged_container_has_the_guests_devices_instead_of_the_hosts() {
        let hosts = [
            device("/dev/kvm", "c", 10, 232),
            device("/dev/ptmx", "c", 5, 2),
            device("/dev/sda", "b", 8, 0),
            device("/dev/fuse", "c", 10, 229),
            device("/dev/initctl", "p", 0, 0),
            device("/dev/full", "c", 1, 7),
        ]
        .join(",");
        assert_eq!(
            of(&hosts, &[NONE, ALL]).unwrap(),
            ["/dev/fuse", "/dev/full", "/dev/kmsg", "/dev/net/tun"]
        );
    }

    #[test]
    fn device_with_a_rule_of_its_own_is_asked_for_though_all_are_allowed() {
        let own = r#"{"allow":true,"type":"c","major":10,"minor":232,"access":"rwm"}"#;
        let error = of(&device("/dev/kvm", "c", 10, 232), &[ALL, own]).unwrap_err();
        assert!(error.starts_with("linux.devices[/dev/kvm]: "), "{error}");
    }

    #[test]
    fn last_rule_about_all_devices_counts() {
        let kvm = device("/dev/kvm", "c", 10, 232);
        of(&kvm, &[ALL, NONE]).unwrap_err();
        of(&kvm, &[r#"{"allow":true,"access":"r"}"#]).unwrap_err();
        of(&kvm, &[r#"{"allow":true,"type":"c","access":"rwm"}"#]).unwrap_err();
        of(
            &kvm,
            &[r#"{"allow":true,"type":"a","major":-1,"minor":-1}"#],
        )
        .unwrap();
        assert_eq!(of("", &[NONE]).unwrap(), Vec::<String>::new());
    }
}

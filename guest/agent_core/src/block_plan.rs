// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The block devices of a container: disks whose device files it has.

use std::path::PathBuf;

use agent_proto::api;
use ids::DiskSerial;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
    Spec,
};

use crate::Error;
use crate::plan::{MAX_COPIED_PATH_LEN, device_name};

/// The most block devices of one container.
pub const MAX_BLOCK_DEVICES: usize = 16;

/// A disk whose device file a container has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevicePlan {
    /// By which the guest finds it.
    pub serial: DiskSerial,
    /// The platform device to bind first, if any.
    pub bind_device: Option<String>,
    /// Its file in the container: absolute.
    pub path: PathBuf,
    /// Any of "r", "w" and "m".
    pub access: String,
    /// Permission bits of the file.
    pub mode: u32,
    /// Owner of the file.
    pub uid: u32,
    /// Group of the file.
    pub gid: u32,
}

impl BlockDevicePlan {
    /// The block devices of a request.
    ///
    /// # Errors
    /// [`Error::BadRequest`].
    pub fn parse_all(devices: Vec<api::BlockDevice>) -> Result<Vec<Self>, Error> {
        let count = devices.len();
        if count > MAX_BLOCK_DEVICES {
            return Err(Error::bad(
                "block_devices",
                format!("are {count}, at most {MAX_BLOCK_DEVICES} are allowed"),
            ));
        }
        devices.into_iter().map(Self::parse).collect()
    }

    fn parse(device: api::BlockDevice) -> Result<Self, Error> {
        let path = PathBuf::from(&device.path);
        if !path.is_absolute() || device.path.len() > MAX_COPIED_PATH_LEN {
            let problem = format!("{:?} is no absolute path", device.path);
            return Err(Error::bad("block_devices.path", problem));
        }
        if !device.access.chars().all(|letter| "rwm".contains(letter)) {
            let problem = format!("{:?} has more than r, w and m", device.access);
            return Err(Error::bad("block_devices.access", problem));
        }
        let serial = device.serial.parse();
        Ok(Self {
            serial: serial.map_err(|error: ids::InvalidId| {
                Error::bad("block_devices.serial", error.to_string())
            })?,
            bind_device: device_name("block_devices.bind_device", device.bind_device)?,
            path,
            access: device.access,
            mode: device.mode & 0o7777,
            uid: device.uid,
            gid: device.gid,
        })
    }

    /// Puts the device, which has this number in the guest, into the spec: its file, and the rule that allows it.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for a spec without a Linux part.
    pub fn add_to(&self, spec: &mut Spec, number: (u32, u32)) -> Result<(), Error> {
        let missing = || Error::bad("spec_json", "has no linux.resources for its block devices");
        let linux = spec.linux_mut().as_mut().ok_or_else(missing)?;
        let mut devices = linux.devices().clone().unwrap_or_default();
        devices.push(self.device(number)?);
        linux.set_devices(Some(devices));
        if self.access.is_empty() {
            return Ok(());
        }
        let resources = linux.resources_mut().as_mut().ok_or_else(missing)?;
        let mut rules = resources.devices().clone().unwrap_or_default();
        rules.push(self.rule(number)?);
        resources.set_devices(Some(rules));
        Ok(())
    }

    fn device(&self, (major, minor): (u32, u32)) -> Result<LinuxDevice, Error> {
        LinuxDeviceBuilder::default()
            .path(self.path.clone())
            .typ(LinuxDeviceType::B)
            .major(major)
            .minor(minor)
            .file_mode(self.mode)
            .uid(self.uid)
            .gid(self.gid)
            .build()
            .map_err(|error| Error::bad("block_devices", error.to_string()))
    }

    fn rule(&self, (major, minor): (u32, u32)) -> Result<LinuxDeviceCgroup, Error> {
        LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(LinuxDeviceType::B)
            .major(major)
            .minor(minor)
            .access(self.access.clone())
            .build()
            .map_err(|error| Error::bad("block_devices", error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(path: &str, access: &str) -> api::BlockDevice {
        api::BlockDevice {
            serial: "b7-0-rw".to_owned(),
            path: path.to_owned(),
            access: access.to_owned(),
            mode: 0o60660,
            gid: 6,
            ..Default::default()
        }
    }

    #[test]
    fn device_is_added_with_the_guests_number_and_a_rule() {
        let plan = BlockDevicePlan::parse_all(vec![device("/dev/xvda", "rm")]).unwrap();
        let json = r#"{"ociVersion":"1.1.0","linux":{"resources":{"devices":[{"allow":false}]}}}"#;
        let mut spec: Spec = serde_json::from_str(json).unwrap();
        plan[0].add_to(&mut spec, (254, 16)).unwrap();
        let linux = serde_json::to_value(spec.linux()).unwrap();
        let expected = serde_json::json!({
            "path": "/dev/xvda", "type": "b", "major": 254, "minor": 16, "fileMode": 0o660, "uid": 0, "gid": 6
        });
        assert_eq!(linux["devices"][0], expected);
        let expected = serde_json::json!({
            "allow": true, "type": "b", "major": 254, "minor": 16, "access": "rm"
        });
        assert_eq!(linux["resources"]["devices"][1], expected);
    }

    #[test]
    fn devices_that_make_no_sense_and_one_past_the_cap_are_refused() {
        for (path, access) in [("dev/xvda", "r"), ("", "r"), ("/dev/xvda", "rx")] {
            BlockDevicePlan::parse_all(vec![device(path, access)]).unwrap_err();
        }
        let mut no_serial = device("/dev/xvda", "r");
        no_serial.serial = "../x".to_owned();
        BlockDevicePlan::parse_all(vec![no_serial]).unwrap_err();
        let many = |count| BlockDevicePlan::parse_all(vec![device("/dev/x", "r"); count]);
        many(MAX_BLOCK_DEVICES).unwrap();
        many(MAX_BLOCK_DEVICES + 1).unwrap_err();
    }
}

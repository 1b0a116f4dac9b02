// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The mounts of a container: which the guest makes by itself, which are copies of host files, and which are refused.

use std::path::{Path, PathBuf};

use agent_proto::layout;
use ids::ContainerId;
use oci_spec::runtime::Mount;

use crate::bundle::HostCopy;
use crate::error::SpecError;

/// The most host files or folders that one container may have copied.
const MAX_COPIES: usize = 64;

/// File systems that the guest makes by itself, without anything of the host's.
const GUEST_FILE_SYSTEMS: [&str; 7] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
];

/// Files that CRI writes for a pod and mounts into each container: small, and never changed again.
const CRI_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// The mounts for the guest, and the host files to copy for them.
pub(crate) fn translate(
    id: &ContainerId,
    mounts: Vec<Mount>,
) -> Result<(Vec<Mount>, Vec<HostCopy>), SpecError> {
    let mut copies = Vec::new();
    let mounts = mounts
        .into_iter()
        .map(|mount| one(id, mount, &mut copies))
        .collect::<Result<_, _>>()?;
    Ok((mounts, copies))
}

fn one(id: &ContainerId, mut mount: Mount, copies: &mut Vec<HostCopy>) -> Result<Mount, SpecError> {
    let destination = mount.destination().display().to_string();
    let field = || format!("mounts[{destination}]");
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        return Err(SpecError::unsupported(
            field(),
            "id-mapped mounts are not supported: remove uidMappings and gidMappings",
        ));
    }
    if !is_bind(&mount) {
        let fs_type = mount.typ().as_deref().unwrap_or_default();
        if GUEST_FILE_SYSTEMS.contains(&fs_type) {
            return Ok(mount);
        }
        let reason = format!(
            "a mount of type {fs_type:?} cannot be made in the guest: use a bind mount or a tmpfs"
        );
        return Err(SpecError::unsupported(field(), reason));
    }
    let Some(source) = mount.source().clone() else {
        return Err(SpecError::unsupported(
            field(),
            "the bind mount has no source: name one",
        ));
    };
    let guest_source = if mount.destination() == Path::new("/dev/shm") {
        PathBuf::from(layout::SHM_DIR)
    } else if is_read_only(&mount) || is_cri_file(mount.destination()) {
        PathBuf::from(copy(id, source, copies).ok_or_else(|| {
            SpecError::unsupported(
                field(),
                format!("more than {MAX_COPIES} host files: use fewer volumes"),
            )
        })?)
    } else {
        let reason = format!(
            "{} is a writable folder of the host, which a pod cannot share yet: mount it read-only, or use a tmpfs",
            source.display()
        );
        return Err(SpecError::unsupported(field(), reason));
    };
    mount.set_source(Some(guest_source));
    Ok(mount)
}

fn copy(id: &ContainerId, source: PathBuf, copies: &mut Vec<HostCopy>) -> Option<String> {
    if copies.len() >= MAX_COPIES {
        return None;
    }
    let index = u32::try_from(copies.len()).ok()?;
    copies.push(HostCopy { index, source });
    Some(layout::copied_mount(id, index))
}

/// runc's rule: the type says "bind", or an option does.
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || has_option(mount, |option| matches!(option, "bind" | "rbind"))
}

fn is_read_only(mount: &Mount) -> bool {
    has_option(mount, |option| matches!(option, "ro" | "rro"))
}

fn is_cri_file(destination: &Path) -> bool {
    CRI_FILES.iter().any(|file| destination == Path::new(file))
}

fn has_option(mount: &Mount, wanted: impl Fn(&str) -> bool) -> bool {
    mount
        .options()
        .as_ref()
        .is_some_and(|options| options.iter().any(|option| wanted(option)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(json: &str) -> Mount {
        serde_json::from_str(json).unwrap()
    }

    fn translate_one(json: &str) -> Result<(Mount, Vec<HostCopy>), SpecError> {
        let (mut mounts, copies) = translate(&"c1".parse().unwrap(), vec![mount(json)])?;
        Ok((mounts.remove(0), copies))
    }

    #[test]
    fn guest_file_systems_pass_unchanged() {
        let json = r#"{"destination":"/proc","type":"proc","source":"proc","options":["nosuid"]}"#;
        assert_eq!(translate_one(json).unwrap(), (mount(json), Vec::new()));
    }

    #[test]
    fn shared_memory_is_the_pods() {
        let json =
            r#"{"destination":"/dev/shm","type":"bind","source":"/run/x/shm","options":["rbind"]}"#;
        let (mount, copies) = translate_one(json).unwrap();
        assert_eq!(mount.source().as_deref(), Some(Path::new(layout::SHM_DIR)));
        assert_eq!(copies, []);
    }

    #[test]
    fn read_only_host_files_are_copied() {
        let json =
            r#"{"destination":"/config","type":"bind","source":"/var/x","options":["rbind","ro"]}"#;
        let (mount, copies) = translate_one(json).unwrap();
        assert_eq!(
            mount.source().as_deref(),
            Some(Path::new("/run/coffer/containers/c1/copied/0"))
        );
        assert_eq!(
            copies,
            [HostCopy {
                index: 0,
                source: "/var/x".into()
            }]
        );
    }

    #[test]
    fn files_that_cri_writes_are_copied_though_writable() {
        let json = r#"{"destination":"/etc/hosts","type":"bind","source":"/s/hosts","options":["rbind","rw"]}"#;
        assert_eq!(translate_one(json).unwrap().1.len(), 1);
    }

    #[test]
    fn writable_host_folder_is_refused_by_name() {
        let json = r#"{"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","rw"]}"#;
        let error = translate_one(json).unwrap_err().to_string();
        assert!(
            error.starts_with("mounts[/data]: /srv/data is a writable folder of the host"),
            "{error}"
        );
    }

    #[test]
    fn unknown_file_system_is_refused_by_name() {
        let error = translate_one(r#"{"destination":"/n","type":"nfs","source":"h:/x"}"#)
            .unwrap_err()
            .to_string();
        assert!(error.contains("\"nfs\""), "{error}");
    }

    #[test]
    fn one_copy_past_the_cap_is_refused() {
        let json = r#"{"destination":"/config","type":"bind","source":"/var/x","options":["ro"]}"#;
        let id = "c1".parse().unwrap();
        assert!(translate(&id, vec![mount(json); MAX_COPIES]).is_ok());
        assert!(translate(&id, vec![mount(json); MAX_COPIES + 1]).is_err());
    }
}

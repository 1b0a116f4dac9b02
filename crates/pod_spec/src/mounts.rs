// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The mounts of a container: which the guest makes by itself, which are copies of host files, and which are refused.

use std::path::{Path, PathBuf};

use agent_proto::layout;
use ids::ContainerId;
use oci_spec::runtime::Mount;

use crate::bundle::{HostCopy, SubPath};
use crate::error::SpecError;
use crate::host_folders::HostFolder;
use crate::host_mounts::HostMounts;
use crate::volumes::{self, EmptyDir, LiveVolume, Medium, VolumeKind, WriteBack};

/// The most host files or folders that one container may have copied.
const MAX_COPIES: usize = 64;

/// File systems that the guest makes by itself, without anything of the host's.
const GUEST_FILE_SYSTEMS: [&str; 7] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
];

/// The most directories of the host that one container may mount.
const MAX_HOST_FOLDERS: usize = 64;

/// The most parts of emptyDirs that one container may mount.
const MAX_SUB_PATHS: usize = 64;

/// What the mounts of a container need beside the spec.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    pub(crate) copies: Vec<HostCopy>,
    pub(crate) live: Vec<LiveVolume>,
    pub(crate) empty_dirs: Vec<EmptyDir>,
    pub(crate) sub_paths: Vec<SubPath>,
    pub(crate) host_folders: Vec<HostFolder>,
}

/// The mounts for the guest, and what they need.
pub(crate) fn translate(
    id: &ContainerId,
    mounts: Vec<Mount>,
    host: &HostMounts,
) -> Result<(Vec<Mount>, Needs), SpecError> {
    let mut needs = Needs::default();
    let mounts = mounts
        .into_iter()
        .map(|mount| one(id, mount, host, &mut needs))
        .collect::<Result<_, _>>()?;
    Ok((mounts, needs))
}

fn one(
    id: &ContainerId,
    mut mount: Mount,
    host: &HostMounts,
    needs: &mut Needs,
) -> Result<Mount, SpecError> {
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
    let kind = volumes::classify(mount.destination(), &source, is_read_only(&mount), host);
    let guest_source = match kind {
        VolumeKind::SharedMemory => Ok(layout::SHM_DIR.to_owned()),
        VolumeKind::EmptyDir { volume, below } => empty_dir(id, volume, below, source, needs),
        VolumeKind::Live(volume) => Ok(live(volume, &mut needs.live)),
        VolumeKind::Copied => copy(id, source, None, &mut needs.copies),
        VolumeKind::WrittenBack(back) => copy(id, source, Some(back), &mut needs.copies),
        VolumeKind::Shared => {
            let options = mount.options().as_deref().unwrap_or_default();
            HostFolder::new(&source, options, host)
                .and_then(|folder| share(folder, &mut needs.host_folders))
        }
    };
    let guest_source = guest_source.map_err(|reason| SpecError::unsupported(field(), reason))?;
    mount.set_source(Some(guest_source.into()));
    Ok(mount)
}

fn copy(
    id: &ContainerId,
    source: PathBuf,
    back: Option<WriteBack>,
    copies: &mut Vec<HostCopy>,
) -> Result<String, String> {
    let index = next_index(copies, MAX_COPIES)
        .ok_or_else(|| format!("more than {MAX_COPIES} host files: use fewer volumes"))?;
    copies.push(HostCopy {
        index,
        source,
        back,
    });
    Ok(layout::copied_mount(id, index))
}

/// The place of an emptyDir, or of a part of it, which is found in the guest: the files are there alone.
fn empty_dir(
    id: &ContainerId,
    volume: EmptyDir,
    below: PathBuf,
    source: PathBuf,
    needs: &mut Needs,
) -> Result<String, String> {
    let place = match volume.medium {
        Medium::Disk => layout::disk_volume(&volume.name),
        Medium::Memory(_) | Medium::HugePages(_) => layout::memory_volume(&volume.name),
    };
    let guest_source = if below.as_os_str().is_empty() {
        place
    } else {
        let index = next_index(&needs.sub_paths, MAX_SUB_PATHS)
            .ok_or_else(|| format!("more than {MAX_SUB_PATHS} subPaths: use fewer"))?;
        needs.sub_paths.push(SubPath {
            index,
            volume: volume.name.clone(),
            path: below,
            source,
        });
        layout::sub_path(id, index)
    };
    if !needs
        .empty_dirs
        .iter()
        .any(|known| known.name == volume.name)
    {
        needs.empty_dirs.push(volume);
    }
    Ok(guest_source)
}

fn live(volume: LiveVolume, volumes: &mut Vec<LiveVolume>) -> String {
    let place = layout::memory_volume(&volume.name);
    if !volumes.contains(&volume) {
        volumes.push(volume);
    }
    place
}

/// The place of a directory of the host's; a container may mount one at several places.
fn share(folder: HostFolder, folders: &mut Vec<HostFolder>) -> Result<String, String> {
    let place = layout::host_folder(&folder.name);
    if folders.contains(&folder) {
        return Ok(place);
    }
    if folders.len() >= MAX_HOST_FOLDERS {
        return Err(format!(
            "more than {MAX_HOST_FOLDERS} directories of the host: use fewer volumes"
        ));
    }
    folders.push(folder);
    Ok(place)
}

/// The sources of `mounts` that are bound.
pub(crate) fn bind_sources(mounts: &[Mount]) -> impl Iterator<Item = &Path> {
    mounts
        .iter()
        .filter(|mount| is_bind(mount))
        .filter_map(|mount| mount.source().as_deref())
}

fn next_index<T>(list: &[T], max: usize) -> Option<u32> {
    (list.len() < max).then(|| u32::try_from(list.len()).ok())?
}

/// runc's rule: the type says "bind", or an option does.
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || has_option(mount, |option| matches!(option, "bind" | "rbind"))
}

fn is_read_only(mount: &Mount) -> bool {
    has_option(mount, |option| matches!(option, "ro" | "rro"))
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

    fn translate_one(json: &str) -> Result<(Mount, Needs), SpecError> {
        let host = HostMounts::default();
        let (mut mounts, needs) = translate(&"c1".parse().unwrap(), vec![mount(json)], &host)?;
        Ok((mounts.remove(0), needs))
    }

    #[test]
    fn guest_file_systems_pass_unchanged() {
        let json = r#"{"destination":"/proc","type":"proc","source":"proc","options":["nosuid"]}"#;
        assert_eq!(
            translate_one(json).unwrap(),
            (mount(json), Needs::default())
        );
    }

    #[test]
    fn shared_memory_is_the_pods() {
        let json =
            r#"{"destination":"/dev/shm","type":"bind","source":"/run/x/shm","options":["rbind"]}"#;
        let (mount, needs) = translate_one(json).unwrap();
        assert_eq!(mount.source().as_deref(), Some(Path::new(layout::SHM_DIR)));
        assert_eq!(needs, Needs::default());
    }

    #[test]
    fn read_only_host_files_are_copied() {
        let json =
            r#"{"destination":"/config","type":"bind","source":"/var/x","options":["rbind","ro"]}"#;
        let (mount, needs) = translate_one(json).unwrap();
        assert_eq!(
            mount.source().as_deref(),
            Some(Path::new("/run/coffer/containers/c1/copied/0"))
        );
        assert_eq!(
            needs.copies,
            [HostCopy {
                index: 0,
                source: "/var/x".into(),
                back: None,
            }]
        );
    }

    #[test]
    fn files_that_cri_writes_are_copied_though_writable() {
        let json = r#"{"destination":"/etc/hosts","type":"bind","source":"/s/hosts","options":["rbind","rw"]}"#;
        assert_eq!(translate_one(json).unwrap().1.copies.len(), 1);
    }

    #[test]
    fn writable_host_folder_is_shared_once_however_often_it_is_mounted() {
        let json = r#"{"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","rw"]}"#;
        let host = HostMounts::default();
        let id = "c1".parse().unwrap();
        let (mounts, needs) = translate(&id, vec![mount(json); 2], &host).unwrap();
        let [folder] = needs.host_folders.as_slice() else {
            panic!("one is shared: {needs:?}");
        };
        assert_eq!(folder.source, Path::new("/srv/data"));
        for mount in mounts {
            let source = mount.source().clone().unwrap();
            assert_eq!(source, Path::new("/run/coffer/host").join(&folder.name));
        }
    }

    #[test]
    fn one_host_folder_past_the_cap_is_refused() {
        let json = r#"{"destination":"/data","type":"bind","source":"/srv/N","options":["rbind"]}"#;
        let host = HostMounts::default();
        let many = |count: usize| {
            let mounts = (0..count).map(|number| mount(&json.replace('N', &number.to_string())));
            translate(&"c1".parse().unwrap(), mounts.collect(), &host)
        };
        assert!(many(MAX_HOST_FOLDERS).is_ok());
        let error = many(MAX_HOST_FOLDERS + 1).unwrap_err().to_string();
        assert!(error.starts_with("mounts[/data]: more than"), "{error}");
    }

    #[test]
    fn propagation_to_the_host_is_refused_by_name() {
        let json = r#"{"destination":"/data","type":"bind","source":"/srv/data","options":["rbind","rshared"]}"#;
        let error = translate_one(json).unwrap_err().to_string();
        assert!(error.contains("HostToContainer"), "{error}");
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
        let host = HostMounts::default();
        assert!(translate(&id, vec![mount(json); MAX_COPIES], &host).is_ok());
        assert!(translate(&id, vec![mount(json); MAX_COPIES + 1], &host).is_err());
    }

    #[test]
    fn config_map_is_one_volume_for_all_its_mounts() {
        let json = r#"{"destination":"/c","type":"bind","options":["rbind","ro"],
            "source":"/k/pods/u/volumes/kubernetes.io~configmap/v"}"#;
        let host = HostMounts::default();
        let mounts = vec![mount(json), mount(json)];
        let (mounts, needs) = translate(&"c1".parse().unwrap(), mounts, &host).unwrap();
        for mount in mounts {
            let source = mount.source().clone().unwrap();
            assert_eq!(source, Path::new("/run/coffer/volumes/u.v"));
        }
        assert_eq!(needs.live.len(), 1);
        assert_eq!(needs.copies, []);
    }

    #[test]
    fn empty_dir_is_the_guests_and_named_once_however_often_it_is_mounted() {
        let host = HostMounts::parse(
            b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
              23 22 8:1 /k/pods/u/volumes/kubernetes.io~empty-dir/v/a /k/pods/u/volume-subpaths/v/main/1 rw - ext4 x rw\n",
        );
        let mounts = [
            "volumes/kubernetes.io~empty-dir/v",
            "volume-subpaths/v/main/1",
        ]
        .map(|path| {
            mount(&format!(
                r#"{{"destination":"/x","type":"bind","source":"/k/pods/u/{path}","options":["rbind","ro"]}}"#
            ))
        });
        let (mounts, needs) = translate(&"c1".parse().unwrap(), mounts.into(), &host).unwrap();
        let sources: Vec<_> = mounts
            .iter()
            .map(|mount| mount.source().clone().unwrap())
            .collect();
        assert_eq!(
            sources,
            [
                PathBuf::from("/run/coffer/volume_disks/u.v/content"),
                PathBuf::from("/run/coffer/sub_paths/c1/0")
            ]
        );
        let names: Vec<_> = needs
            .empty_dirs
            .iter()
            .map(|volume| volume.name.as_str())
            .collect();
        assert_eq!(names, ["u.v"]);
        let sub_path = needs.sub_paths.first().unwrap();
        assert_eq!(sub_path.path, Path::new("a"));
        assert_eq!(needs.copies, []);
    }
}

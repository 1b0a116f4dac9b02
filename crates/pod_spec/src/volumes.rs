// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the source of a bind mount is: one pure function, [`classify`], from paths, options and the host's mounts.
//!
//! A kubelet's paths say what is behind them, whatever its root directory is:
//!
//! | below the root directory | what |
//! |---|---|
//! | `pods/<uid>/volumes/kubernetes.io~empty-dir/<name>` | an emptyDir; a mount there tells its medium |
//! | the same with `~configmap`, `~secret`, `~projected`, `~downward-api` | files that the kubelet keeps current |
//! | `pods/<uid>/volume-subpaths/<volume>/<container>/<n>` | a bind mount of a part of a volume |
//! | `pods/<uid>/containers/<container>/<file>` | where the container leaves its termination message |
//! | `pods/<uid>/etc-hosts` | the pod's `/etc/hosts` |
//!
//! An emptyDir that somebody on the host has put files into is shared, for they are meant to be seen.
//! What is elsewhere is copied if it is a read-only file, and otherwise shared.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ids::Bytes;

use crate::host_mounts::{HostMount, HostMounts};

/// What the source of a bind mount is, and so how it reaches the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeKind {
    /// The pod's `/dev/shm`, which the guest has by itself.
    SharedMemory,
    /// An emptyDir, or a part of one: a directory that the guest makes for all containers of the pod.
    EmptyDir {
        /// The volume.
        volume: EmptyDir,
        /// The part of it that is mounted (subPath); empty for the whole.
        below: PathBuf,
    },
    /// A folder whose files the kubelet keeps current, and so the guest's copy of it, for all containers of the pod.
    Live(LiveVolume),
    /// A file or folder whose contents the guest gets once, when the container is made.
    Copied,
    /// A file of the kubelet's that the container may write: copied, and written back when the container ends.
    WrittenBack(WriteBack),
    /// A directory, or a writable file, that must be the host's own.
    Shared,
}

/// An emptyDir of the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmptyDir {
    /// Its name among the guest's volumes: one path component.
    pub name: String,
    /// What it is kept in.
    pub medium: Medium,
    /// Where the kubelet made it on the host: its owner and mode count. The disk of one of medium Disk is kept there.
    pub source: PathBuf,
}

/// A volume whose files the kubelet writes: a ConfigMap, Secret, projected or downward API volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveVolume {
    /// Its name among the guest's volumes: one path component.
    pub name: String,
    /// Where the kubelet keeps it on the host.
    pub source: PathBuf,
}

/// What an emptyDir is kept in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// A disk of its own, kept in the kubelet's directory.
    Disk,
    /// Guest memory, with the volume's sizeLimit if there is one.
    Memory(Option<Bytes>),
    /// Huge pages of guest memory, of this size each; `None` is the kernel's default.
    HugePages(Option<Bytes>),
}

/// How much of a file is written back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteBack {
    /// Its last [`MAX_TERMINATION_MESSAGE`]: more is not read by a kubelet.
    TerminationMessage,
    /// All of it, or nothing if it has more than [`MAX_WRITTEN_BACK`].
    Whole,
}

/// The most of a termination message that counts: `MaxContainerTerminationMessageLength` of Kubernetes.
pub const MAX_TERMINATION_MESSAGE: Bytes = Bytes(4096);

/// The largest other file that is written back.
pub const MAX_WRITTEN_BACK: Bytes = Bytes(64 << 10);

impl WriteBack {
    /// The most bytes that are written back.
    pub fn max(self) -> Bytes {
        match self {
            Self::TerminationMessage => MAX_TERMINATION_MESSAGE,
            Self::Whole => MAX_WRITTEN_BACK,
        }
    }
}

/// Files that CRI writes for a pod and mounts into each container: small, and never changed again.
const CRI_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// Where CRI mounts the pod's shared memory.
const SHARED_MEMORY: &str = "/dev/shm";

const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// Plugins of a kubelet's whose volumes its atomic writer writes.
const LIVE: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// What the bind mount of `source` at `destination` is.
pub fn classify(
    destination: &Path,
    source: &Path,
    read_only: bool,
    host: &HostMounts,
) -> VolumeKind {
    // First: an emptyDir may well be mounted at /dev/shm, for more than a pod's has.
    if let Some(kind) = kubelets(source, read_only, host) {
        return kind;
    }
    if destination == Path::new(SHARED_MEMORY) {
        return VolumeKind::SharedMemory;
    }
    let small = read_only && !host.is_directory(source);
    if small || CRI_FILES.iter().any(|file| destination == Path::new(file)) {
        return VolumeKind::Copied;
    }
    VolumeKind::Shared
}

/// What of a kubelet's `source` is, or is a part of.
fn kubelets(source: &Path, read_only: bool, host: &HostMounts) -> Option<VolumeKind> {
    let path = PodPath::parse(source)?;
    let volume = match path.within {
        Within::Volume(_) => path,
        Within::SubPath(_) => whole_of_sub_path(&path, host)?,
        Within::TerminationLog | Within::EtcHosts if read_only => return None,
        Within::TerminationLog => {
            return Some(VolumeKind::WrittenBack(WriteBack::TerminationMessage));
        }
        Within::EtcHosts => return Some(VolumeKind::WrittenBack(WriteBack::Whole)),
    };
    let Within::Volume(place) = volume.within else {
        return None;
    };
    let name = format!("{}.{}", volume.uid, place.name);
    let whole = volume
        .pod
        .join("volumes")
        .join(&place.plugin)
        .join(&place.name);
    if place.plugin == EMPTY_DIR {
        if host.is_filled(&whole) {
            return Some(VolumeKind::Shared);
        }
        return Some(VolumeKind::EmptyDir {
            volume: EmptyDir {
                name,
                medium: medium(&volume.uid, &place, host),
                source: whole,
            },
            below: place.below,
        });
    }
    if !LIVE.contains(&place.plugin.as_str()) {
        return None;
    }
    // As with any runtime, a part of one does not follow: its mount keeps the file that was there at the start.
    Some(if place.below.as_os_str().is_empty() {
        VolumeKind::Live(LiveVolume {
            name,
            source: whole,
        })
    } else {
        VolumeKind::Copied
    })
}

/// Those directories of the kubelet's that are the emptyDirs of medium Disk among `sources`, or of which these are parts.
/// Which of them are filled is for the caller to find out: [`HostMounts::with_filled`].
pub fn disk_empty_dirs<'a>(
    sources: impl Iterator<Item = &'a Path>,
    host: &HostMounts,
) -> BTreeSet<PathBuf> {
    sources
        .filter_map(|source| match kubelets(source, false, host)? {
            VolumeKind::EmptyDir { volume, .. } if volume.medium == Medium::Disk => {
                Some(volume.source)
            }
            _ => None,
        })
        .collect()
}

/// A path below a pod's directory of a kubelet's.
#[derive(Debug, Clone, PartialEq, Eq)]
struct PodPath {
    /// `<root>/pods/<uid>`
    pod: PathBuf,
    uid: String,
    within: Within,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Within {
    /// `volumes/<plugin>/<name>[/<below>]`
    Volume(Place),
    /// `volume-subpaths/<volume>/<container>/<n>`: the last three.
    SubPath([String; 3]),
    /// `containers/<container>/<file>`
    TerminationLog,
    /// `etc-hosts`
    EtcHosts,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    plugin: String,
    name: String,
    below: PathBuf,
}

impl PodPath {
    /// A kubelet's root directory may have any name, `pods` among them: the first part that fits is taken.
    fn parse(path: &Path) -> Option<Self> {
        let parts: Vec<&str> = path
            .components()
            .map(|part| match part {
                std::path::Component::RootDir => Some("/"),
                std::path::Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .collect::<Option<_>>()?;
        (0..parts.len()).find_map(|at| {
            let (root, rest) = parts.split_at_checked(at)?;
            let ["pods", uid, rest @ ..] = rest else {
                return None;
            };
            let within = match rest {
                ["volumes", plugin, name, below @ ..] => Within::Volume(Place {
                    plugin: (*plugin).to_owned(),
                    name: (*name).to_owned(),
                    below: below.iter().collect(),
                }),
                ["volume-subpaths", volume, container, number] => {
                    Within::SubPath([*volume, *container, *number].map(str::to_owned))
                }
                ["containers", _, _] => Within::TerminationLog,
                ["etc-hosts"] => Within::EtcHosts,
                _ => return None,
            };
            let pod = root.iter().chain(["pods", *uid].iter()).collect();
            Some(Self {
                pod,
                uid: (*uid).to_owned(),
                within,
            })
        })
    }
}

/// The volume that the bind mount at `path`, a subPath, is a part of.
fn whole_of_sub_path(path: &PodPath, host: &HostMounts) -> Option<PodPath> {
    let mount = mount_at(&path.uid, &path.within, host)?;
    host.other_paths(mount)
        .filter_map(|other| PodPath::parse(&other))
        .find(|other| other.uid == path.uid && matches!(other.within, Within::Volume(_)))
}

/// The mount at a pod's path. Kubelet's root directory may be reached by several paths: the pod and what is below it say
/// which path is meant.
fn mount_at<'a>(uid: &str, within: &Within, host: &'a HostMounts) -> Option<&'a HostMount> {
    host.latest_first().find(|mount| {
        PodPath::parse(&mount.place)
            .is_some_and(|place| place.uid == uid && place.within == *within)
    })
}

fn medium(uid: &str, place: &Place, host: &HostMounts) -> Medium {
    let whole = Within::Volume(Place {
        below: PathBuf::new(),
        ..place.clone()
    });
    match mount_at(uid, &whole, host) {
        Some(mount) if mount.fs_type == "tmpfs" => Medium::Memory(mount.bytes("size")),
        Some(mount) if mount.fs_type == "hugetlbfs" => Medium::HugePages(mount.bytes("pagesize")),
        _ => Medium::Disk,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &[u8] = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
        90 22 0:45 / /data/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/mem rw - tmpfs tmpfs rw,size=1024k\n\
        91 22 0:46 / /data/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/any rw - tmpfs tmpfs rw\n\
        92 22 0:47 / /data/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/huge rw - hugetlbfs nodev rw,pagesize=2M\n\
        93 22 0:45 /a/b /data/kubelet/pods/u1/volume-subpaths/mem/main/0 rw - tmpfs tmpfs rw,size=1024k\n\
        94 22 8:1 /data/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/disk/logs \
           /data/kubelet/pods/u1/volume-subpaths/disk/main/1 rw - ext4 /dev/sda1 rw\n\
        96 22 8:1 /data/kubelet/pods/u1/volumes/kubernetes.io~configmap/cfg/..2026/key \
           /data/kubelet/pods/u1/volume-subpaths/cfg/main/4 rw - ext4 /dev/sda1 rw\n\
        95 22 8:1 /srv/claim/x /data/kubelet/pods/u1/volume-subpaths/pv/main/2 rw - ext4 /dev/sda1 rw\n";

    fn kind(destination: &str, source: &str, read_only: bool) -> VolumeKind {
        let host = HostMounts::parse(MOUNTINFO);
        classify(Path::new(destination), Path::new(source), read_only, &host)
    }

    fn empty_dir(name: &str, medium: Medium, below: &str) -> VolumeKind {
        let source = format!("/data/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/{name}");
        VolumeKind::EmptyDir {
            volume: EmptyDir {
                name: format!("u1.{name}"),
                medium,
                source: source.into(),
            },
            below: below.into(),
        }
    }

    fn volume(name: &str) -> String {
        format!("/data/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/{name}")
    }

    #[test]
    fn empty_dir_is_known_by_its_path_and_its_medium_by_the_mount_there() {
        for (name, medium) in [
            ("disk", Medium::Disk),
            ("mem", Medium::Memory(Some(Bytes(1 << 20)))),
            ("any", Medium::Memory(None)),
            ("huge", Medium::HugePages(Some(Bytes(2 << 20)))),
        ] {
            for read_only in [false, true] {
                assert_eq!(
                    kind("/x", &volume(name), read_only),
                    empty_dir(name, medium, "")
                );
            }
        }
    }

    #[test]
    fn empty_dir_at_dev_shm_is_not_the_pods_shared_memory() {
        assert_eq!(
            kind("/dev/shm", &volume("mem"), false),
            empty_dir("mem", Medium::Memory(Some(Bytes(1 << 20))), "")
        );
    }

    #[test]
    fn sub_path_of_an_empty_dir_is_found_by_its_mount() {
        let of = |number: &str| format!("/data/kubelet/pods/u1/volume-subpaths/{number}");
        assert_eq!(
            kind("/x", &of("mem/main/0"), false),
            empty_dir("mem", Medium::Memory(Some(Bytes(1 << 20))), "a/b")
        );
        assert_eq!(
            kind("/x", &of("disk/main/1"), false),
            empty_dir("disk", Medium::Disk, "logs")
        );
        // Of a claim, and of what is not mounted.
        for number in ["pv/main/2", "pv/main/9"] {
            assert_eq!(
                kind("/x", &of(number), false),
                VolumeKind::Shared,
                "{number}"
            );
        }
    }

    #[test]
    fn empty_dir_that_the_host_has_filled_is_shared_and_so_are_its_parts() {
        let part = "/data/kubelet/pods/u1/volume-subpaths/disk/main/1";
        let sources = [volume("disk"), volume("mem"), part.to_owned()];
        let host = HostMounts::parse(MOUNTINFO);
        let found = disk_empty_dirs(sources.iter().map(Path::new), &host);
        assert_eq!(found, [PathBuf::from(volume("disk"))].into());
        let host = host.with_filled(found);
        for (source, shared) in [
            (volume("disk"), true),
            (part.to_owned(), true),
            (volume("mem"), false),
        ] {
            let kind = classify(Path::new("/x"), Path::new(&source), false, &host);
            assert_eq!(kind == VolumeKind::Shared, shared, "{source}");
        }
    }

    #[test]
    fn kubelets_root_directory_may_be_a_link_and_have_any_name() {
        let source = volume("mem").replace("/data/kubelet", "/pods/link");
        let VolumeKind::EmptyDir { volume, below } = kind("/x", &source, false) else {
            panic!("{source} is an emptyDir");
        };
        assert_eq!(volume.name, "u1.mem");
        assert_eq!(volume.medium, Medium::Memory(Some(Bytes(1 << 20))));
        assert_eq!(volume.source, Path::new(&source));
        assert_eq!(below, Path::new(""));
    }

    #[test]
    fn volumes_that_the_kubelet_writes_are_kept_current_and_parts_of_them_are_not() {
        for plugin in ["configmap", "secret", "projected", "downward-api"] {
            let source = format!("/k/pods/u1/volumes/kubernetes.io~{plugin}/cfg");
            let expected = VolumeKind::Live(LiveVolume {
                name: "u1.cfg".to_owned(),
                source: source.clone().into(),
            });
            assert_eq!(kind("/x", &source, true), expected);
        }
        let part = "/data/kubelet/pods/u1/volume-subpaths/cfg/main/4";
        assert_eq!(kind("/x", part, true), VolumeKind::Copied);
    }

    #[test]
    fn kubelets_own_files_are_written_back_unless_they_are_read_only() {
        for (source, back) in [
            (
                "/k/pods/u/containers/main/1234abcd",
                WriteBack::TerminationMessage,
            ),
            ("/k/pods/u/etc-hosts", WriteBack::Whole),
        ] {
            assert_eq!(kind("/x", source, false), VolumeKind::WrittenBack(back));
            assert_eq!(kind("/x", source, true), VolumeKind::Copied);
        }
    }

    #[test]
    fn read_only_directory_is_the_hosts_own_unless_the_kubelet_writes_it() {
        let config = "/k/pods/u1/volumes/kubernetes.io~configmap/cfg";
        let host = HostMounts::default().with_directories(["/srv/data", config].map(Into::into));
        let kind = |source: &str| classify(Path::new("/x"), Path::new(source), true, &host);
        assert_eq!(kind("/srv/data"), VolumeKind::Shared);
        assert_eq!(kind("/srv/file"), VolumeKind::Copied);
        assert!(matches!(kind(config), VolumeKind::Live(_)));
    }

    #[test]
    fn what_is_no_kubelets_is_copied_if_read_only_and_the_hosts_own_if_not() {
        for (destination, source, read_only, expected) in [
            ("/dev/shm", "/run/x/shm", false, VolumeKind::SharedMemory),
            ("/etc/hosts", "/s/hosts", false, VolumeKind::Copied),
            ("/x", "/srv", true, VolumeKind::Copied),
            ("/x", "/srv", false, VolumeKind::Shared),
            (
                "/x",
                "/k/pods/u/volumes/kubernetes.io~csi/v/mount",
                false,
                VolumeKind::Shared,
            ),
            (
                "/x",
                "/k/pods/u/volumes/kubernetes.io~empty-dir/../../../etc",
                false,
                VolumeKind::Shared,
            ),
            ("/x", "relative", false, VolumeKind::Shared),
        ] {
            assert_eq!(
                kind(destination, source, read_only),
                expected,
                "{destination} <- {source}"
            );
        }
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Where things are in the guest, for both ends: the host writes these paths into the specs that it translates.

use ids::ContainerId;

/// The agent's own tmpfs.
pub const RUN_DIR: &str = "/run/coffer";

/// Where the scratch disk is mounted.
pub const SCRATCH_DIR: &str = "/run/coffer/scratch";

/// The pod's shared memory, behind every container's `/dev/shm` that CRI shares.
pub const SHM_DIR: &str = "/run/coffer/shm";

/// In a spec: the pid namespace that the pod's containers share, whose process 1 is the agent's pause process.
pub const POD_PID_NAMESPACE: &str = "/run/coffer/pause/ns/pid";

/// The root file system of the pause process.
pub const PAUSE_ROOTFS: &str = "/run/coffer/pause/rootfs";

/// In a spec: the pid namespace of the container whose init has the pid `pid` in the guest.
pub fn pid_namespace_of(pid: u32) -> String {
    format!("/proc/{pid}/ns/pid")
}

/// The folder of one container: rootfs, bundle and copied mounts.
pub fn container_dir(id: &ContainerId) -> String {
    format!("{RUN_DIR}/containers/{id}")
}

/// The root file system of a container.
pub fn rootfs(id: &ContainerId) -> String {
    format!("{}/rootfs", container_dir(id))
}

/// The copy of the host files that the `index`th copied mount of a container names.
pub fn copied_mount(id: &ContainerId, index: u32) -> String {
    format!("{}/copied/{index}", container_dir(id))
}

/// An emptyDir on the scratch disk, shared by the containers of the pod. `name` is one path component.
pub fn scratch_volume(name: &str) -> String {
    format!("{SCRATCH_DIR}/volumes/{name}")
}

/// A volume of the pod in guest memory, shared by its containers. `name` is one path component.
pub fn memory_volume(name: &str) -> String {
    format!("{RUN_DIR}/volumes/{name}")
}

/// Where the file system with the host's own directories is mounted, as soon as a container needs one.
pub const HOST_FOLDERS_DIR: &str = "/run/coffer/host";

/// The directory or file of the host that the pod has under `name`, which is one path component.
pub fn host_folder(name: &str) -> String {
    format!("{HOST_FOLDERS_DIR}/{name}")
}

/// The parts of volumes that a container mounts are mounted below this.
pub fn sub_paths_dir(id: &ContainerId) -> String {
    format!("{RUN_DIR}/sub_paths/{id}")
}

/// The `index`th part of a volume that a container mounts.
pub fn sub_path(id: &ContainerId, index: u32) -> String {
    format!("{}/{index}", sub_paths_dir(id))
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Requests as values that make sense: every id parsed, every path relative, every length within its cap.

use std::path::PathBuf;
use std::sync::Arc;

use agent_proto::api;
use agent_proto::{ProcessKey, StreamKind};
use ids::{ContainerId, DiskSerial, ExecId, Generation};
use oci_spec::runtime::{Process, Spec};

use crate::Error;
use crate::network::NetworkPlan;
use crate::pid_namespace::PidNamespace;
use crate::volume_plan::{self, HostFoldersPlan, SubPathPlan, VolumePlan};

/// The most layers under one overlay (`OVL_MAX_STACK` of the kernel).
pub const MAX_LAYERS: usize = 500;

/// The most files in the copied mounts of one container.
pub const MAX_COPIED_FILES: usize = 16_384;

/// The most bytes of a path in a copied mount (`PATH_MAX`).
pub const MAX_COPIED_PATH_LEN: usize = 4096;

/// The most bytes of one mount option.
pub const MAX_OPTION_LEN: usize = 256;

/// What all containers of the pod share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxPlan {
    /// `None` keeps the kernel's.
    pub hostname: Option<String>,
    /// Kernel parameters, names with dots.
    pub sysctls: Vec<(String, String)>,
    /// The disk for writable layers; `None`: memory.
    pub scratch: Option<DiskPlan>,
    /// Size of `/dev/shm` in bytes; 0 leaves the kernel's default.
    pub shm_bytes: u64,
    /// Wall clock in ns since the epoch; 0 leaves the guest's clock alone.
    pub wall_clock_ns: u64,
    /// The pod's network besides loopback.
    pub network: NetworkPlan,
}

/// A disk to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPlan {
    /// By which the guest finds it.
    pub serial: DiskSerial,
    /// The platform device to bind first, if any.
    pub bind_device: Option<String>,
    /// "erofs", "ext4" or "xfs".
    pub fs_type: &'static str,
    /// Options, each `key` or `key=value`.
    pub options: Vec<String>,
}

/// A container's root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootfsPlan {
    /// An overlay of these, topmost first.
    Layered(Vec<DiskPlan>),
    /// The disk itself.
    Disk(DiskPlan),
}

/// The streams of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StdioPlan {
    /// One terminal instead of pipes.
    pub terminal: bool,
    /// Whether the host has an end of each stream.
    pub stdin: bool,
    /// See `stdin`.
    pub stdout: bool,
    /// See `stdin`.
    pub stderr: bool,
    /// The terminal's size; zero leaves the kernel's.
    pub columns: u16,
    /// See `columns`.
    pub rows: u16,
}

/// One entry of a copied mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopiedFile {
    /// Relative, of plain components only; empty for the mount itself.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// What it is.
    pub content: CopiedContent,
    /// How many bytes of the file are there already; the contents come behind them.
    pub offset: u64,
}

/// What a copied entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopiedContent {
    /// A file with these bytes.
    Data(Vec<u8>),
    /// A symbolic link to this.
    Symlink(String),
    /// A directory.
    Directory,
}

/// A container to make.
#[derive(Debug, Clone)]
pub struct ContainerPlan {
    /// Its init's key.
    pub key: ProcessKey,
    /// Its spec, already translated for the guest.
    pub spec: Arc<Spec>,
    /// Its pid namespace, another container's by the pid of its init.
    pub pids: PidNamespace<u32>,
    /// Its root file system.
    pub rootfs: RootfsPlan,
    /// Its init's streams.
    pub stdio: StdioPlan,
    /// Copied mounts: index and entries, parents before what is in them.
    pub copied: Vec<(u32, Vec<CopiedFile>)>,
    /// The emptyDirs that it mounts.
    pub volumes: Vec<VolumePlan>,
    /// The parts of them that it mounts.
    pub sub_paths: Vec<SubPathPlan>,
    /// The host's own directories that it mounts.
    pub host_folders: Option<HostFoldersPlan>,
}

/// A further process to make.
#[derive(Debug, Clone)]
pub struct ExecPlan {
    /// Its key; the exec id is there.
    pub key: ProcessKey,
    /// What to run.
    pub process: Process,
    /// Its streams.
    pub stdio: StdioPlan,
}

/// The container that a request names.
///
/// # Errors
/// [`Error::BadRequest`] for an id that is none.
pub fn container_id(text: &str) -> Result<ContainerId, Error> {
    text.parse()
        .map_err(|error: ids::InvalidId| Error::bad("container_id", error.to_string()))
}

/// The process that a request names.
///
/// # Errors
/// [`Error::BadRequest`] for an id that is none.
pub fn process_key(process: &api::ProcessRef) -> Result<ProcessKey, Error> {
    let exec = match process.exec_id.as_str() {
        "" => None,
        text => Some(
            text.parse::<ExecId>()
                .map_err(|error| Error::bad("exec_id", error.to_string()))?,
        ),
    };
    Ok(ProcessKey {
        container: container_id(&process.container_id)?,
        exec,
        generation: Generation(process.generation),
    })
}

/// The wire's name for a process.
pub fn process_ref(key: &ProcessKey) -> api::ProcessRef {
    api::ProcessRef {
        container_id: key.container.to_string(),
        exec_id: key
            .exec
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        generation: key.generation.0,
        ..Default::default()
    }
}

/// The wire's name for a stream.
pub fn stream_kind(kind: StreamKind) -> api::StreamKind {
    match kind {
        StreamKind::Stdin => api::StreamKind::STDIN,
        StreamKind::Stdout => api::StreamKind::STDOUT,
        StreamKind::Stderr => api::StreamKind::STDERR,
    }
}

impl SandboxPlan {
    /// # Errors
    /// [`Error::BadRequest`].
    pub fn parse(request: api::ConfigureSandboxRequest) -> Result<Self, Error> {
        if request.hostname.len() > 64 {
            return Err(Error::bad("hostname", "is longer than 64 bytes"));
        }
        Ok(Self {
            hostname: Some(request.hostname).filter(|name| !name.is_empty()),
            sysctls: request.sysctls.into_iter().collect(),
            scratch: request
                .scratch
                .into_option()
                .map(DiskPlan::parse)
                .transpose()?,
            shm_bytes: request.shm_bytes,
            wall_clock_ns: request.wall_clock_ns,
            network: NetworkPlan::parse(request.interfaces, request.rules)?,
        })
    }
}

impl DiskPlan {
    /// # Errors
    /// [`Error::BadRequest`].
    pub fn parse(disk: api::Disk) -> Result<Self, Error> {
        let serial = disk
            .serial
            .parse()
            .map_err(|error: ids::InvalidId| Error::bad("disk.serial", error.to_string()))?;
        let fs_type = ["erofs", "ext4", "xfs"]
            .into_iter()
            .find(|known| *known == disk.fs_type)
            .ok_or_else(|| {
                Error::bad(
                    "disk.fs_type",
                    format!("{:?} is not one of erofs, ext4, xfs", disk.fs_type),
                )
            })?;
        if let Some(long) = disk
            .mount_options
            .iter()
            .find(|option| option.len() > MAX_OPTION_LEN)
        {
            return Err(Error::bad(
                "disk.mount_options",
                format!("one is {} bytes long", long.len()),
            ));
        }
        Ok(Self {
            serial,
            bind_device: device_name("disk.bind_device", disk.bind_device)?,
            fs_type,
            options: disk.mount_options,
        })
    }
}

impl StdioPlan {
    /// # Errors
    /// [`Error::BadRequest`] for a terminal with a stderr of its own.
    pub fn parse(stdio: Option<api::Stdio>) -> Result<Self, Error> {
        let Some(stdio) = stdio else {
            return Ok(Self::default());
        };
        if stdio.terminal && stdio.stderr {
            return Err(Error::bad(
                "stdio.stderr",
                "a terminal has one output stream",
            ));
        }
        let size = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        Ok(Self {
            terminal: stdio.terminal,
            stdin: stdio.stdin,
            stdout: stdio.stdout,
            stderr: stdio.stderr,
            columns: size(stdio.columns),
            rows: size(stdio.rows),
        })
    }
}

impl ContainerPlan {
    /// # Errors
    /// [`Error::BadRequest`], or [`Error::Process`] for a spec that is refused.
    pub fn parse(request: api::CreateContainerRequest) -> Result<Self, Error> {
        let container = container_id(&request.container_id)?;
        let spec: Spec = serde_json::from_slice(&request.spec_json)
            .map_err(|error| Error::bad("spec_json", format!("is no OCI runtime spec: {error}")))?;
        oci_process::check_spec(&spec)?;
        let pids = PidNamespace::parse(&spec)?;
        let stdio = StdioPlan::parse(request.stdio.into_option())?;
        same_terminal(spec.process().as_ref(), stdio)?;
        let rootfs = match request.rootfs {
            Some(api::create_container_request::Rootfs::Layered(layered)) => {
                if layered.layers.is_empty() || layered.layers.len() > MAX_LAYERS {
                    let count = layered.layers.len();
                    return Err(Error::bad(
                        "rootfs.layers",
                        format!("are {count}, 1 to {MAX_LAYERS} are allowed"),
                    ));
                }
                RootfsPlan::Layered(
                    layered
                        .layers
                        .into_iter()
                        .map(DiskPlan::parse)
                        .collect::<Result<_, _>>()?,
                )
            }
            Some(api::create_container_request::Rootfs::Disk(disk)) => {
                RootfsPlan::Disk(DiskPlan::parse(disk)?)
            }
            _ => return Err(Error::bad("rootfs", "is missing")),
        };
        let files: usize = request
            .copied_mounts
            .iter()
            .map(|mount| mount.entries.len())
            .sum();
        if files > MAX_COPIED_FILES {
            return Err(Error::bad(
                "copied_mounts",
                format!("have {files} files, at most {MAX_COPIED_FILES} are allowed"),
            ));
        }
        let copied = request
            .copied_mounts
            .into_iter()
            .map(|mount| {
                let files = mount
                    .entries
                    .into_iter()
                    .map(copied_file)
                    .collect::<Result<_, _>>()?;
                Ok((mount.index, files))
            })
            .collect::<Result<_, Error>>()?;
        let (volumes, sub_paths) = volume_plan::parse_all(request.volumes, request.sub_paths)?;
        let host_folders = request.host_folders.into_option();
        Ok(Self {
            key: ProcessKey {
                container,
                exec: None,
                generation: Generation(request.generation),
            },
            spec: Arc::new(spec),
            pids,
            rootfs,
            stdio,
            copied,
            volumes,
            sub_paths,
            host_folders: host_folders.map(HostFoldersPlan::parse).transpose()?,
        })
    }
}

impl ExecPlan {
    /// # Errors
    /// [`Error::BadRequest`], or [`Error::Process`] for a process that is refused.
    pub fn parse(request: api::StartExecRequest) -> Result<Self, Error> {
        let key = process_key(request.process.get_or_default())?;
        if key.exec.is_none() {
            return Err(Error::bad("process.exec_id", "is empty"));
        }
        let process: Process = serde_json::from_slice(&request.process_json)
            .map_err(|error| Error::bad("process_json", format!("is no OCI process: {error}")))?;
        oci_process::check_process(&process)?;
        let stdio = StdioPlan::parse(request.stdio.into_option())?;
        same_terminal(Some(&process), stdio)?;
        Ok(Self {
            key,
            process,
            stdio,
        })
    }
}

fn same_terminal(process: Option<&Process>, stdio: StdioPlan) -> Result<(), Error> {
    let wants = process.and_then(Process::terminal).unwrap_or(false);
    if wants == stdio.terminal {
        return Ok(());
    }
    Err(Error::bad(
        "stdio.terminal",
        format!("is {}, but process.terminal is {wants}", stdio.terminal),
    ))
}

/// The name of a platform device, or none.
///
/// # Errors
/// [`Error::BadRequest`].
pub(crate) fn device_name(field: &str, name: String) -> Result<Option<String>, Error> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if !name.bytes().all(known) || name.starts_with('.') {
        return Err(Error::bad(field, format!("{name:?} is no device's name")));
    }
    Ok(Some(name).filter(|name| !name.is_empty()))
}

/// A relative path of plain components, or an empty one.
///
/// # Errors
/// [`Error::BadRequest`].
pub(crate) fn plain_path(field: &str, path: &str) -> Result<PathBuf, Error> {
    if path.len() > MAX_COPIED_PATH_LEN {
        return Err(Error::bad(field, format!("is {} bytes long", path.len())));
    }
    let plain = path.is_empty()
        || path
            .split('/')
            .all(|part| !part.is_empty() && part != "." && part != ".." && !part.contains('\0'));
    if !plain {
        let problem = format!("{path:?} is no plain relative path");
        return Err(Error::bad(field, problem));
    }
    Ok(PathBuf::from(path))
}

pub(crate) fn copied_file(file: api::CopiedFile) -> Result<CopiedFile, Error> {
    let path = plain_path("copied_mounts.path", &file.path)?;
    let content = match file.content {
        Some(api::copied_file::Content::Data(data)) => CopiedContent::Data(data),
        Some(api::copied_file::Content::Symlink(target)) => CopiedContent::Symlink(target),
        Some(api::copied_file::Content::Directory(_)) => CopiedContent::Directory,
        _ => {
            return Err(Error::bad(
                "copied_mounts.content",
                format!("of {:?} is missing", file.path),
            ));
        }
    };
    Ok(CopiedFile {
        path,
        mode: file.mode & 0o7777,
        uid: file.uid,
        gid: file.gid,
        content,
        offset: file.offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(serial: &str, fs_type: &str, bind_device: &str) -> api::Disk {
        api::Disk {
            serial: serial.to_owned(),
            fs_type: fs_type.to_owned(),
            bind_device: bind_device.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn disks_that_could_reach_elsewhere_are_refused() {
        DiskPlan::parse(disk("layer-0", "erofs", "virtio-mmio.9")).unwrap();
        DiskPlan::parse(disk("../x", "erofs", "")).unwrap_err();
        DiskPlan::parse(disk("a", "nfs", "")).unwrap_err();
        DiskPlan::parse(disk("a", "ext4", "../../x")).unwrap_err();
    }

    #[test]
    fn copied_paths_stay_below_their_mount() {
        let file = |path: &str| {
            copied_file(api::CopiedFile {
                path: path.to_owned(),
                content: Some(api::copied_file::Content::Directory(api::Empty::new())),
                ..Default::default()
            })
        };
        for path in ["", "a", "a/b", "..data", "a/.hidden"] {
            file(path).unwrap();
        }
        for path in ["/a", "..", "a/../b", "a//b", "./a", "a/", "a\0b"] {
            file(path).unwrap_err();
        }
        file(&"x".repeat(MAX_COPIED_PATH_LEN)).unwrap();
        file(&"x".repeat(MAX_COPIED_PATH_LEN + 1)).unwrap_err();
    }

    #[test]
    fn too_many_layers_are_refused() {
        let request = |count: usize| {
            let layers = (0..count)
                .map(|number| disk(&format!("l{number}"), "erofs", ""))
                .collect();
            ContainerPlan::parse(api::CreateContainerRequest {
                container_id: "c".to_owned(),
                spec_json: br#"{"ociVersion":"1.1.0","process":{"user":{"uid":0,"gid":0},"args":["a"],"cwd":"/"},
                                "linux":{"namespaces":[{"type":"mount"}]}}"#
                    .to_vec(),
                rootfs: Some(api::create_container_request::Rootfs::Layered(api::LayeredRootfs {
                    layers,
                    ..Default::default()
                })),
                ..Default::default()
            })
        };
        request(0).unwrap_err();
        request(MAX_LAYERS).unwrap();
        request(MAX_LAYERS + 1).unwrap_err();
    }
}

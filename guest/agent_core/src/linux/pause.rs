// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The pid namespace that the containers of a pod share, and its process 1.
//!
//! It is made for the pod's first container that shares (`shareProcessNamespace: true`), as any container's init is: the
//! agent's program once more, as `/pause` in a root with nothing else, without a privilege and with the user that
//! Kubernetes's own pause container has. If something has ended it, and all containers in its namespace with it, the next
//! container gets another.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use agent_proto::layout;
use oci_process::Streams;
use oci_spec::runtime::Spec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::cgroup;
use super::process::helper;
use crate::Error;
use crate::error::Context as _;

/// The pause process of the pod, if it has been needed.
#[derive(Debug, Default)]
pub(super) struct Pause(Mutex<Option<OwnedFd>>);

impl Pause {
    /// A pidfd of a process in the pod's namespace. Blocks.
    ///
    /// # Errors
    /// [`Error`] if the process cannot be made.
    pub(super) fn process(&self) -> Result<OwnedFd, Error> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let process = match running.take() {
            Some(process) if !has_ended(&process) => process,
            _ => start()?,
        };
        running
            .insert(process)
            .try_clone()
            .step(|| "doubling a pidfd".to_owned())
    }
}

fn has_ended(process: &OwnedFd) -> bool {
    let now = Timespec::default();
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)) != Ok(0)
}

fn start() -> Result<OwnedFd, Error> {
    let root = Path::new(layout::PAUSE_ROOTFS);
    let program = root.join("pause");
    fs::create_dir_all(root).step(|| format!("making {}", root.display()))?;
    match fs::File::create_new(&program) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => drop(other.step(|| format!("making {}", program.display()))?),
    }
    rustix::mount::mount_bind("/proc/self/exe", &program)
        .step(|| format!("binding the agent's program to {}", program.display()))?;
    let job = oci_process::Job {
        helper: helper(),
        // It is the agent's, and no container's limits are meant for it.
        cgroup: cgroup::MOUNT.into(),
        streams: Streams::default(),
    };
    let launched = oci_process::launch_init(job, "pause", &spec()?, root, None)?;
    let process = launched
        .pidfd()
        .try_clone()
        .step(|| "doubling a pidfd".to_owned())?;
    let (ready, _) = launched.ready()?;
    ready.start()?;
    Ok(process)
}

fn spec() -> Result<Spec, Error> {
    serde_json::from_value(serde_json::json!({
        "ociVersion": "1.1.0",
        "process": {
            "args": [oci_process::PAUSE],
            "cwd": "/",
            "user": {"uid": 65535, "gid": 65535},
            "noNewPrivileges": true,
            // The kubelet's for the pause container.
            "oomScoreAdj": -998
        },
        "root": {"path": layout::PAUSE_ROOTFS, "readonly": true},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]}
    }))
    .map_err(|_| Error::Internal("writing the pause process's spec"))
}

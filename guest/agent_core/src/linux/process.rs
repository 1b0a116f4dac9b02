// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Processes, made by [`oci_process`] with the agent's own program as the helper.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use agent_proto::layout;
use oci_process::Streams;

use super::cgroup;
use super::pause::Pause;
use crate::Error;
use crate::error::Context as _;
use crate::pid_namespace::PidNamespace;
use crate::system::{Gate, Job, Launched};

/// The program's argument that makes it a helper; its `main` looks for it.
pub const HELPER_ARGUMENT: &str = "container-process";

/// How a helper is run: the agent's own program, whatever file it comes from.
pub(super) fn helper() -> (&'static Path, &'static str) {
    (Path::new("/proc/self/exe"), HELPER_ARGUMENT)
}

struct Waiting {
    launched: oci_process::Launched,
    handle: Arc<OwnedFd>,
}

struct Ready(oci_process::Ready);

/// Makes the process of `job`.
///
/// # Errors
/// [`Error::Process`].
pub(super) fn launch(
    job: Job<'_>,
    streams: Streams,
    pause: &Pause,
) -> Result<Box<dyn Launched>, Error> {
    let container = match job {
        Job::Init { container, .. } | Job::Exec { container, .. } => container,
    };
    let how = oci_process::Job {
        helper: helper(),
        cgroup: cgroup::directory(container),
        streams,
    };
    let launched = match job {
        Job::Init {
            container,
            spec,
            pids,
        } => oci_process::launch_init(
            how,
            container.as_str(),
            spec,
            Path::new(&layout::rootfs(container)),
            match pids {
                PidNamespace::Own => None,
                PidNamespace::Pod => Some(pause.process()?),
                PidNamespace::Of(init) => {
                    Some(init.try_clone().step(|| "doubling a pidfd".to_owned())?)
                }
            },
        )?,
        Job::Exec {
            spec,
            init,
            process,
            ..
        } => oci_process::launch_exec(how, spec, init, process.clone())?,
    };
    let handle = launched.pidfd().try_clone().map_err(|source| Error::Step {
        step: "doubling a pidfd".to_owned(),
        source,
    })?;
    Ok(Box::new(Waiting {
        launched,
        handle: Arc::new(handle),
    }))
}

impl Launched for Waiting {
    fn pid(&self) -> u32 {
        self.launched.pid().as_raw_nonzero().get().unsigned_abs()
    }

    fn handle(&self) -> Arc<OwnedFd> {
        self.handle.clone()
    }

    fn ready(self: Box<Self>) -> Result<(Box<dyn Gate>, Option<OwnedFd>), Error> {
        let (ready, terminal) = self.launched.ready()?;
        Ok((Box::new(Ready(ready)), terminal))
    }
}

impl Gate for Ready {
    fn start(self: Box<Self>) -> Result<(), Error> {
        self.0.start().map_err(Into::into)
    }
}

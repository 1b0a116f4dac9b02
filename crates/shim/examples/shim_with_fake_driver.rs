// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The shim without KVM, for its own tests: the VM, the guest agent and the storage are fake, everything else is the
//! product's. What a container does is said by `process.args` of its spec; see `driver_fake::Program`.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use agent_proto::api;
use driver_fake::{FakeDriver, Script, fake_spec};
use ids::{Mib, SandboxId};
use sandbox::{
    ContainerKind, ContainerPlan, CreateTask, Deadlines, GuestContainer, GuestRootfs, Host,
    PodPlan, SandboxError, SandboxErrorKind,
};
use shim::{Node, PodParts, PodRequest, PodSource, Roots, run};

struct FakeNode;

impl Node for FakeNode {
    fn prepare(&self, pod: &PodRequest<'_>) -> Result<PodParts, Box<dyn Error + Send + Sync>> {
        Ok(PodParts {
            driver: FakeDriver::new(Script::new()),
            host: Arc::new(FakeHost {
                sandbox: pod.id.clone(),
                source: pod.source.clone(),
            }),
            deadlines: Deadlines::default(),
        })
    }
}

struct FakeHost {
    sandbox: SandboxId,
    source: PodSource,
}

impl Host for FakeHost {
    fn plan_pod(&self) -> Result<PodPlan, SandboxError> {
        let vm = fake_spec(self.sandbox.clone()).map_err(internal)?;
        Ok(PodPlan {
            vm,
            overhead: Mib(64),
            configure: api::ConfigureSandboxRequest::new(),
            loopback: None,
            guard: Box::new(()),
        })
    }

    fn plan_container(&self, task: &CreateTask) -> Result<ContainerPlan, SandboxError> {
        if matches!(self.source, PodSource::Described(_))
            && task.container.as_str() == self.sandbox.as_str()
        {
            return Ok(ContainerPlan {
                kind: ContainerKind::Sandbox,
                guard: Box::new(()),
            });
        }
        let spec_json = match &task.shell {
            Some(shell) => pod_spec::shell_spec(&shell.args, task.stdio.terminal, &shell.term),
            None => std::fs::read(task.bundle.join("config.json")).map_err(internal)?,
        };
        let bundle = pod_spec::Bundle::parse(&spec_json).map_err(internal)?;
        let kind = match bundle.role() {
            pod_spec::Role::Sandbox if task.shell.is_none() => ContainerKind::Sandbox,
            _ => ContainerKind::Guest(Box::new(GuestContainer {
                oom_score_adj: None,
                limits: None,
                spec_json,
                rootfs: GuestRootfs::Layered(Vec::new()),
                copied_mounts: Vec::new(),
                live: Vec::new(),
                written_back: Vec::new(),
                volumes: Vec::new(),
                sub_paths: Vec::new(),
                host_folders: Vec::new(),
                block_devices: Vec::new(),
            })),
        };
        Ok(ContainerPlan {
            kind,
            guard: Box::new(()),
        })
    }

    fn memory_limit(&self) -> Result<Option<Mib>, SandboxError> {
        Ok(None)
    }
}

fn internal(error: impl Error + Send + Sync + 'static) -> SandboxError {
    SandboxError::new(SandboxErrorKind::Internal, "the fake node").because(error)
}

fn root(name: &str) -> PathBuf {
    std::env::var_os(name)
        .map(PathBuf::from)
        .unwrap_or_default()
}

fn main() -> ExitCode {
    let roots = Roots {
        state: root("COFFER_STATE_ROOT"),
        sockets: root("COFFER_SOCKET_ROOT"),
    };
    run(std::env::args().skip(1), &roots, &FakeNode)
}

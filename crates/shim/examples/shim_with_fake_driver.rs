// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The shim without KVM, for its own tests: the driver and the guest agent are fake, everything else is the product's.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use async_trait::async_trait;
use hypervisor::{Capabilities, Driver, DriverError, DriverErrorKind, RunningVm, VmSpec};
use shim::{Node, NodeHost, PodParts, PodRequest, Roots, run};

struct NoVm;

#[async_trait]
impl Driver for NoVm {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "none",
            max_disks: 0,
            max_vcpus: 1,
        }
    }

    async fn launch(&self, _: VmSpec) -> Result<Arc<dyn RunningVm>, DriverError> {
        Err(DriverError::new(DriverErrorKind::Node, "no VM"))
    }
}

struct FakeNode;

impl Node for FakeNode {
    fn prepare(
        &self,
        pod: &PodRequest<'_>,
    ) -> Result<PodParts, Box<dyn std::error::Error + Send + Sync>> {
        Ok(PodParts {
            driver: Arc::new(NoVm),
            host: Arc::new(NodeHost::new(pod)),
            deadlines: sandbox::Deadlines::default(),
        })
    }
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

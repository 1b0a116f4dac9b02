// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! containerd-shim-coffer-v2 with the embedded VMM.
#![forbid(unsafe_code)]

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use driver_embedded::{EmbeddedDriver, EmbeddedOptions, JailUser};
use sandbox::Deadlines;
use shim::{Node, NodeHost, PodParts, PodRequest, Roots, run};

/// The node with the embedded VMM.
struct EmbeddedNode;

impl Node for EmbeddedNode {
    fn prepare(&self, pod: &PodRequest<'_>) -> Result<PodParts, Box<dyn Error + Send + Sync>> {
        let vmm = &pod.config.vmm;
        let options = EmbeddedOptions {
            vmm: vmm.path.clone(),
            kvm: PathBuf::from("/dev/kvm"),
            private_dir: pod.private_dir.to_path_buf(),
            jail: Some(JailUser {
                uid: vmm.uid,
                gid: vmm.uid,
            }),
        };
        Ok(PodParts {
            driver: Arc::new(EmbeddedDriver::new(options)),
            host: Arc::new(NodeHost::new(pod)),
            deadlines: Deadlines {
                boot: pod.config.guest.ready_timeout,
                // Where guests take long to boot, they take long for their containers.
                create: pod
                    .config
                    .guest
                    .ready_timeout
                    .max(Deadlines::default().create),
                ..Deadlines::default()
            },
        })
    }
}

fn main() -> ExitCode {
    run(std::env::args().skip(1), &Roots::default(), &EmbeddedNode)
}

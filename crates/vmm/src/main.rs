// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `coffer-vmm`: one VM in a process of its own, started by the shim with the control socket as standard input.

use std::os::fd::AsFd;
use std::process::exit;

use vmm::ExitCode;
use vmm::control::ControlSocket;

fn main() {
    let Ok(socket) = std::io::stdin().as_fd().try_clone_to_owned() else {
        eprintln!(
            "coffer-vmm is started by containerd-shim-coffer-v2, with its control socket as standard input"
        );
        exit(i32::from(ExitCode::Usage as u8));
    };
    let code = vmm::serve(ControlSocket::from_fd(socket));
    // Without unwinding the VM: the kernel takes everything back faster.
    exit(i32::from(code as u8));
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `coffer-vmm`: one VM in a process of its own, started by the shim with the control socket as standard input.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::exit;

use rustix::net::SocketType;
use vmm::control::ControlSocket;
use vmm::{ExitCode, jail};

fn main() {
    let code = match jail::at_start() {
        Ok(()) if !is_control_socket() => {
            eprintln!(
                "coffer-vmm is started by containerd-shim-coffer-v2, with its control socket as standard input"
            );
            ExitCode::Usage
        }
        Ok(()) => vmm::serve(control_socket()),
        Err(error) => {
            eprintln!("{}", error.chain());
            ExitCode::Jail
        }
    };
    exit(i32::from(code as u8));
}

fn is_control_socket() -> bool {
    rustix::net::sockopt::socket_type(std::io::stdin()) == Ok(SocketType::SEQPACKET)
}

#[expect(unsafe_code, reason = "taking over standard input")]
fn control_socket() -> ControlSocket {
    // SAFETY: std has descriptor 0 open from the start, and nothing in this program reads standard input.
    ControlSocket::from_fd(unsafe { OwnedFd::from_raw_fd(0) })
}

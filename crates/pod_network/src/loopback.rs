// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Every TCP port of a pod's loopback, on the host: who connects there is given to one listening socket.
//!
//! ```text
//! containerd, in the pod's namespace: connect 127.0.0.1:80
//!    └─ the kernel looks for a listener ── sk_lookup program: to 127.0.0.0/8 or ::1? ──> ours
//!                                                              any other ──────────────> the kernel's own search
//! ```
//!
//! The pod's processes listen in the guest, and containerd's port-forward dials loopback in the pod's namespace on the host,
//! where nobody listens. The local address of an accepted connection is the one that was dialled, port included.
//!
//! Nothing is left behind: program, table and attachment are descriptors without names, which go with the value or with the
//! process. No frame reaches the namespace's stack from outside, so only processes in it, which are the host's, can connect.

mod bpf;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, listen, setsockopt,
    socket, sockopt,
};

use crate::error::NetError;
use crate::namespace;

/// As many connections as may wait for being accepted.
const BACKLOG: i32 = 128;

/// A listener to which every TCP connection to loopback in a namespace comes.
#[derive(Debug)]
pub struct LoopbackListener {
    /// The listener, non-blocking. Once it is closed, connections are refused as if nothing had been there.
    pub listener: TcpListener,
    /// Ends the redirection on drop.
    pub guard: LoopbackGuard,
}

/// Keeps the redirection.
#[derive(Debug)]
pub struct LoopbackGuard {
    _link: OwnedFd,
}

impl LoopbackListener {
    /// Takes over the TCP ports of loopback in the namespace at `namespace`.
    ///
    /// # Errors
    /// [`NetError`]; nothing is left behind. Kernels before 5.9 cannot do it, nor can a process without `CAP_BPF` and
    /// `CAP_NET_ADMIN`.
    pub fn open(namespace: &Path) -> Result<Self, NetError> {
        namespace::run_in(namespace, || {
            let step = |operation| NetError::step(operation, "lo");
            let listener = listen_somewhere().map_err(step("listen behind"))?;
            let link =
                attach(&listener).map_err(step("attach a BPF program of type sk_lookup to"))?;
            Ok(Self {
                listener,
                guard: LoopbackGuard { _link: link },
            })
        })
    }
}

/// A socket that listens for both families, where the node has both. Its own port is of no account.
fn listen_somewhere() -> io::Result<TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let make = |family| socket(family, SockType::Stream, flags, None);
    let socket = match make(AddressFamily::Inet6) {
        Ok(socket) => {
            setsockopt(&socket, sockopt::Ipv6V6Only, &false)?;
            bind_to(&socket, (Ipv6Addr::UNSPECIFIED, 0).into())?;
            socket
        }
        Err(nix::Error::EAFNOSUPPORT) => {
            let socket = make(AddressFamily::Inet)?;
            bind_to(&socket, (Ipv4Addr::UNSPECIFIED, 0).into())?;
            socket
        }
        Err(error) => return Err(error.into()),
    };
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket.into())
}

fn bind_to(socket: &OwnedFd, address: SocketAddr) -> nix::Result<()> {
    use std::os::fd::AsRawFd;
    match address {
        SocketAddr::V4(address) => bind(socket.as_raw_fd(), &SockaddrIn::from(address)),
        SocketAddr::V6(address) => bind(socket.as_raw_fd(), &SockaddrIn6::from(address)),
    }
}

/// Has the kernel give what is dialled on loopback to `listener`. For the namespace of the calling thread.
fn attach(listener: &TcpListener) -> io::Result<OwnedFd> {
    let table = bpf::SocketTable::new()?;
    table.put(listener.as_fd())?;
    let program = bpf::load(&bpf::loopback_to_listener(&table))?;
    let namespace = std::fs::File::open("/proc/thread-self/ns/net")?;
    bpf::attach(&program, &namespace)
}

#[cfg(test)]
mod tests;

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The file system behind its vhost-user connection.
//!
//! The connection is made inside: an abstract socket in this process's own, otherwise empty network namespace is
//! listened on, connected to and closed. The server's end stays; the other goes to the shim as the sign that all is ready.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use seccomp_filters::ThreadRole;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use virtiofsd::passthrough::{CachePolicy, Config, PassthroughFs};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory_virtiofsd::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::ServerError;
use crate::jail::Jail;

/// How long the guest may take names and attributes for true without asking. The host and other pods may change what is
/// shared; opening a file always asks (close-to-open consistency).
const METADATA_VALID: Duration = Duration::from_secs(1);
/// Descriptors that are not the guest's: guest memory, queues, sockets.
const OWN_DESCRIPTORS: u64 = 256;
/// Any name: the network namespace is this process's alone.
const SOCKET_NAME: &str = "vhost-user";

/// Serves until the VMM closes the connection.
///
/// # Errors
/// [`ServerError`] if it cannot start, or the connection breaks in a way that is not its end.
pub(crate) fn serve(jail: Jail) -> Result<(), ServerError> {
    let (listener, client) = connection().map_err(ServerError::serve("make its connection"))?;
    let fs = PassthroughFs::new(config(jail))
        .map_err(ServerError::serve("open the root of what it shares"))?;
    let backend = VhostUserFsBackendBuilder::default()
        .build(fs)
        .map_err(ServerError::serve("make the file system"))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), Arc::new(backend), memory)
        .map_err(|error| failed("start its threads", &error))?;
    let mut listener = Listener::from(listener);
    daemon
        .start(&mut listener)
        .map_err(|error| failed("start its threads", &error))?;
    drop(listener);
    // All threads are there, and nobody has spoken to them yet.
    seccomp_filters::install_in_all_threads(ThreadRole::FileServer)
        .map_err(ServerError::serve("confine itself"))?;
    say_ready(&client).map_err(ServerError::serve("say that it is ready"))?;
    drop(client);
    match daemon.wait() {
        Ok(())
        | Err(DaemonError::HandleRequest(
            VhostUserError::Disconnected | VhostUserError::PartialMessage,
        )) => Ok(()),
        Err(error) => Err(failed("understand the VMM", &error)),
    }
}

/// The daemon's errors are not `Sync`, so only their text is kept.
fn failed(operation: &'static str, error: &DaemonError) -> ServerError {
    ServerError::serve(operation)(error.to_string())
}

fn config(jail: Jail) -> Config {
    Config {
        entry_timeout: METADATA_VALID,
        attr_timeout: METADATA_VALID,
        cache_policy: CachePolicy::Auto,
        // Others may write to the same files, so what the guest has written is with the host before `write` answers.
        writeback: false,
        root_dir: "/".to_owned(),
        // User attributes; those that need a capability are refused by the kernel.
        xattr: true,
        // With attributes, the guest would otherwise ask for one at every write.
        killpriv_v2: true,
        proc_sfd_rawfd: Some(jail.own_descriptors),
        // Each shared directory is a file system of its own to the guest, so that inode numbers are unique.
        announce_submounts: true,
        guest_fd_limit: jail.max_descriptors.saturating_sub(OWN_DESCRIPTORS),
        ..Config::default()
    }
}

fn connection() -> io::Result<(UnixListener, UnixStream)> {
    let address = SocketAddr::from_abstract_name(SOCKET_NAME)?;
    let listener = UnixListener::bind_addr(&address)?;
    let client = UnixStream::connect_addr(&address)?;
    Ok((listener, client))
}

fn say_ready(client: &UnixStream) -> io::Result<()> {
    let descriptors = [client.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    rustix::net::sendmsg(
        io::stdin(),
        &[IoSlice::new(b"R")],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How `start` gives the shim the socket to listen on: over a pair of sockets, one of which is the shim's standard input.
//!
//! The shim is there before anything is made for it, and outlives a `start` that is killed half way: it then sees the end
//! of the pair in place of a socket, and removes what there is.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::error::ShimError;

/// Room for one descriptor in a control message.
const SPACE: usize = rustix::cmsg_space!(ScmRights(1));

/// The end of `start`, and the shim's.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socketpair(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// Gives the shim its socket.
pub(crate) fn give(end: &OwnedFd, listener: &UnixListener) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [listener.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(
        end,
        &[IoSlice::new(b"l")],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Waits for the socket on standard input, which becomes `/dev/null`. `None` if `start` has died.
pub(crate) fn take() -> Result<Option<UnixListener>, ShimError> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        io::stdin(),
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(|_| ShimError::NotStarted)?;
    let listener = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let null = File::open("/dev/null").map_err(ShimError::file("open", "/dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(|error| ShimError::Input(error.into()))?;
    Ok(listener.map(UnixListener::from))
}

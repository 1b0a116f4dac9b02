// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How `start` gives the shim the socket to listen on and a hold on its keeper: over a pair of sockets, one of which is
//! the shim's standard input.
//!
//! The shim is there before anything is made for it, and outlives a `start` that is killed half way: it then sees the end
//! of the pair in place of a socket, and ends too.

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
use crate::keeper::Hold;

/// Room for two descriptors in a control message.
const SPACE: usize = rustix::cmsg_space!(ScmRights(2));

/// The end of `start`, and the shim's.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(socketpair(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// Gives the shim its socket, and the hold.
pub(crate) fn give(end: &OwnedFd, listener: &UnixListener, hold: &Hold) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); SPACE];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [listener.as_fd(), hold.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(
        end,
        &[IoSlice::new(b"l")],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Waits for socket and hold on standard input, which becomes `/dev/null`.
pub(crate) fn take() -> Result<(UnixListener, Hold), ShimError> {
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
    let mut descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect(),
        _ => Vec::new(),
    });
    let (Some(listener), Some(hold)) = (descriptors.next(), descriptors.next()) else {
        return Err(ShimError::StartDied);
    };
    drop(descriptors);
    let null = File::open("/dev/null").map_err(ShimError::file("open", "/dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(|error| ShimError::Input(error.into()))?;
    Ok((listener.into(), hold.into()))
}

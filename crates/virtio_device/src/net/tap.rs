// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Where frames come from and go to.
#![expect(unsafe_code, reason = "the tap's ioctls have no safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use virtio_wire::net::HEADER_BYTES;

/// TUNSETOFFLOAD and TUNSETVNETHDRSZ (Linux `include/uapi/linux/if_tun.h`), also named in the seccomp rules.
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUN_F_CSUM: libc::c_ulong = 1;
const TUN_F_TSO4: libc::c_ulong = 2;
const TUN_F_TSO6: libc::c_ulong = 4;

/// Whether frames for the guest may leave some work to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offload {
    /// The host does it.
    #[default]
    Host,
    /// The guest may be given it.
    Guest,
}

/// Which work on frames for the guest may be left to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums. Without it there are no others.
    pub checksum: Offload,
    /// Segmentation of TCP over IPv4.
    pub tcp4: Offload,
    /// Segmentation of TCP over IPv6.
    pub tcp6: Offload,
}

/// A descriptor of which one read gives one frame and one write takes one, each with a `virtio_net_hdr` of 12 bytes
/// before it. The seam at which tests put a socket.
///
/// Caller: the device and its one worker. The descriptor is non-blocking.
pub trait FrameIo: Send + Sync {
    /// The descriptor; constant.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// From now on, frames read are as these offloads allow.
    ///
    /// # Errors
    /// The host's.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

/// A tap, opened with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Takes a tap over and sets the size of its headers.
    ///
    /// # Errors
    /// The host's; the descriptor is no tap.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let size = libc::c_int::try_from(HEADER_BYTES).unwrap_or(0);
        // SAFETY: the request reads one int, which lives over the call; the descriptor is open.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        check(result)?;
        Ok(Self { fd })
    }
}

impl FrameIo for Tap {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        if offloads.checksum == Offload::Guest {
            flags |= TUN_F_CSUM;
            for (offload, flag) in [(offloads.tcp4, TUN_F_TSO4), (offloads.tcp6, TUN_F_TSO6)] {
                if offload == Offload::Guest {
                    flags |= flag;
                }
            }
        }
        // SAFETY: the request takes its argument by value; the descriptor is open.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD, flags) })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The network device between a hostile driver and a network that sends what it likes.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use virtio_device::net::{FrameIo, Net, NetOptions, Offloads};

use crate::Guest;

/// Bytes of the header before a frame.
const HEADER_BYTES: usize = 12;

/// Keeps frames apart, as a tap does.
struct Socket(OwnedFd);

impl FrameIo for Socket {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }
}

/// A card, and the other end of its cable.
pub(crate) fn device() -> (Net, OwnedFd) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (ours, network) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a socket pair");
    let options = NetOptions {
        io: Arc::new(Socket(ours)),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        limits: Default::default(),
    };
    (Net::new(options).expect("a network card"), network)
}

/// Whatever the driver does, what is sent has a sane header before it, and frames that arrive harm nobody.
pub(crate) fn net(data: &[u8]) {
    let (card, network) = device();
    Guest::new(data, |_| Box::new(card)).run(|input| {
        if input.u8().is_multiple_of(4) {
            let length = usize::from(input.u16() % 2048).max(HEADER_BYTES + 1);
            // A full socket is a network that drops.
            let _ = send(network.as_raw_fd(), &vec![0x5a; length], MsgFlags::empty());
        }
        let mut bytes = vec![0; 1 << 18];
        while let Ok(length @ 1..) = recv(network.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            let [flags, gso_type] = [bytes.first(), bytes.get(1)].map(|byte| byte.copied());
            assert!(length >= HEADER_BYTES + 14, "no Ethernet header");
            assert!(flags.is_some_and(|flags| flags <= 1), "an unknown flag");
            assert!(matches!(gso_type, Some(0 | 1 | 4)), "an unknown kind");
        }
    });
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Just enough netlink to make links and packet filters: messages are built as bytes, answers are read as errnos.

use std::os::fd::{AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto,
    socket,
};

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
/// `NLM_F_CREATE | NLM_F_EXCL`.
pub(crate) const NEW: u16 = 0x600;
/// `NLM_F_CREATE | NLM_F_APPEND`.
pub(crate) const APPEND: u16 = 0xc00;
const NLMSG_ERROR: u16 = 2;
/// Attributes may nest.
const NLA_F_NESTED: u16 = 0x8000;

/// One message: header, the protocol's fixed part, attributes.
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// A request of a type, with flags besides "request, and tell me how it went".
    pub(crate) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(fixed);
        Self(bytes)
    }

    /// A message that the kernel answers only when it goes wrong: begin and end of a batch.
    pub(crate) fn silent(kind: u16, fixed: &[u8]) -> Self {
        let mut message = Self::new(kind, 0, fixed);
        message.0.splice(6..8, NLM_F_REQUEST.to_ne_bytes());
        message
    }

    /// Adds attributes, as [`attribute`] and [`nested`] make them.
    pub(crate) fn with(mut self, attributes: &[Vec<u8>]) -> Self {
        attributes
            .iter()
            .for_each(|attribute| self.0.extend(attribute));
        self
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        let length = u32::try_from(self.0.len())?;
        self.0.splice(0..4, length.to_ne_bytes());
        Ok(self.0)
    }
}

/// An attribute with a value.
pub(crate) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len().saturating_add(4)).unwrap_or(u16::MAX);
    let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An attribute with a name, which ends with a zero byte.
pub(crate) fn name(kind: u16, text: &str) -> Vec<u8> {
    attribute(kind, &[text.as_bytes(), &[0]].concat())
}

/// An attribute made of attributes.
pub(crate) fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, &attributes.concat())
}

/// A netlink socket.
pub(crate) struct Netlink(OwnedFd);

impl Netlink {
    /// Opens a socket of one of netlink's protocols.
    pub(crate) fn open(protocol: SockProtocol) -> Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )
        .context("socket")?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).context("bind")?;
        Ok(Self(socket))
    }

    /// Sends messages as one datagram and reads `answers` acknowledgements.
    pub(crate) fn ask(&self, messages: Vec<Message>, answers: usize) -> Result<()> {
        let mut bytes = Vec::new();
        for message in messages {
            bytes.extend(message.finish()?);
        }
        sendto(
            self.0.as_raw_fd(),
            &bytes,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )
        .context("send")?;
        let mut seen = 0;
        while seen < answers {
            let mut buffer = [0; 8192];
            let length =
                recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()).context("receive")?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, body, after)) = split(rest) {
                ensure!(
                    kind == NLMSG_ERROR,
                    "the kernel answers with message type {kind}"
                );
                let code = body
                    .first_chunk()
                    .map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                ensure!(
                    code == 0,
                    "the kernel refuses: {}",
                    Errno::from_raw(code.saturating_neg())
                );
                seen = seen.saturating_add(1);
                rest = after;
            }
        }
        Ok(())
    }
}

/// The first message of a datagram: type, what follows the header, the messages behind it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*bytes.get(4..6)?.first_chunk()?);
    let body = bytes.get(16..length)?;
    Some((
        kind,
        body,
        bytes.get(length.next_multiple_of(4)..).unwrap_or_default(),
    ))
}

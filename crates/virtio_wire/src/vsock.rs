// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The socket device's packet header (virtio v1.3 §5.10.6) and what a device may accept of it.
//!
//! [`Header`] is the 44 bytes as numbers; decoding it never fails. [`Packet::from_guest`] decides
//! whether a header that a guest wrote means something to a device that serves one guest CID and
//! stream sockets. It is pure: the caller copies the header out of guest memory once and only uses
//! the copy.

use ids::GuestCid;

use crate::WireError;
use crate::bytes::{take_u16, take_u32, take_u64};

/// Size of the packet header in bytes (virtio v1.3 §5.10.6).
pub const HEADER_LEN: usize = 44;
/// The well-known CID of the host (virtio v1.3 §5.10.4).
pub const HOST_CID: u64 = 2;
/// `type` of a stream socket's packets (virtio v1.3 §5.10.6).
pub const TYPE_STREAM: u16 = 1;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio v1.3 §5.10.6.7): the guest drops its connections
/// and reads its CID again.
pub const EVENT_TRANSPORT_RESET: u32 = 0;
/// Size of `struct virtio_vsock_event` in bytes (virtio v1.3 §5.10.6.7).
pub const EVENT_LEN: usize = 4;
/// The most payload that one packet carries, in bytes. The specification names no limit; this is
/// the one Linux keeps on both sides (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will not receive any more.
const SHUTDOWN_F_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will not send any more.
const SHUTDOWN_F_SEND: u32 = 2;

/// What a packet asks for: the `op` field, open because a guest may write any number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Open a connection.
    Request,
    /// Accept a connection.
    Response,
    /// Drop or refuse a connection.
    Reset,
    /// Stop one or both directions.
    Shutdown,
    /// Stream bytes.
    Data,
    /// Say how much room there is.
    CreditUpdate,
    /// Ask how much room there is.
    CreditRequest,
    /// A number the specification does not define (0 is `VIRTIO_VSOCK_OP_INVALID`).
    Unknown(u16),
}

impl Op {
    /// The operation of an `op` field.
    pub fn from_wire(op: u16) -> Self {
        match op {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            other => Self::Unknown(other),
        }
    }

    /// The `op` field of an operation.
    pub fn to_wire(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Data => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// `struct virtio_vsock_hdr` in the machine's byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// CID of the sender.
    pub src_cid: u64,
    /// CID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload behind the header.
    pub len: u32,
    /// Socket type; only [`TYPE_STREAM`] is served.
    pub socket_type: u16,
    /// The operation.
    pub op: Op,
    /// Flags of the operation; only a shutdown has any.
    pub flags: u32,
    /// Size of the sender's receive buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of its receive buffer so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes the first [`HEADER_LEN`] bytes; every pattern is a header.
    ///
    /// # Errors
    /// [`WireError::Short`] if there are fewer bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        const WHAT: &str = "vsock packet header";
        let mut rest = bytes.get(..HEADER_LEN).ok_or(WireError::Short {
            what: WHAT,
            need: HEADER_LEN,
            got: bytes.len(),
        })?;
        Ok(Self {
            src_cid: take_u64(&mut rest, WHAT)?,
            dst_cid: take_u64(&mut rest, WHAT)?,
            src_port: take_u32(&mut rest, WHAT)?,
            dst_port: take_u32(&mut rest, WHAT)?,
            len: take_u32(&mut rest, WHAT)?,
            socket_type: take_u16(&mut rest, WHAT)?,
            op: Op::from_wire(take_u16(&mut rest, WHAT)?),
            flags: take_u32(&mut rest, WHAT)?,
            buf_alloc: take_u32(&mut rest, WHAT)?,
            fwd_cnt: take_u32(&mut rest, WHAT)?,
        })
    }

    /// Encodes the wire form.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let fields = self
            .src_cid
            .to_le_bytes()
            .into_iter()
            .chain(self.dst_cid.to_le_bytes())
            .chain(self.src_port.to_le_bytes())
            .chain(self.dst_port.to_le_bytes())
            .chain(self.len.to_le_bytes())
            .chain(self.socket_type.to_le_bytes())
            .chain(self.op.to_wire().to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buf_alloc.to_le_bytes())
            .chain(self.fwd_cnt.to_le_bytes());
        for (place, byte) in bytes.iter_mut().zip(fields) {
            *place = byte;
        }
        bytes
    }
}

/// The two ports that name a connection between the host and its one guest.
///
/// The guest can reuse a pair as soon as a connection has ended, so whoever keeps one for longer
/// adds a generation to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionKey {
    /// Port on the guest's side.
    pub guest_port: u32,
    /// Port on the host's side.
    pub host_port: u32,
}

/// The directions a side gives up with a shutdown packet; once given up, for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Shutdown {
    /// The sender of the packet will not receive any more.
    pub receive: bool,
    /// The sender of the packet will not send any more.
    pub send: bool,
}

impl Shutdown {
    /// Both directions.
    pub const BOTH: Self = Self {
        receive: true,
        send: true,
    };

    /// The directions of a `flags` field; bits that the specification does not define are ignored.
    pub fn from_wire(flags: u32) -> Self {
        Self {
            receive: flags & SHUTDOWN_F_RECEIVE != 0,
            send: flags & SHUTDOWN_F_SEND != 0,
        }
    }

    /// The `flags` field.
    pub fn to_wire(self) -> u32 {
        let receive = if self.receive { SHUTDOWN_F_RECEIVE } else { 0 };
        let send = if self.send { SHUTDOWN_F_SEND } else { 0 };
        receive | send
    }

    /// What is given up when both `self` and `other` have been said.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self {
            receive: self.receive || other.receive,
            send: self.send || other.send,
        }
    }

    /// Whether nothing is left open.
    pub fn is_both(self) -> bool {
        self == Self::BOTH
    }
}

/// What the sender of a packet says about its receive buffer (virtio v1.3 §5.10.6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CreditInfo {
    /// Size of the buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes taken out of it so far, modulo 2^32.
    pub fwd_cnt: u32,
}

/// What one side of a stream connection tells the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Open the connection.
    Request,
    /// The connection is accepted.
    Response,
    /// The connection is dropped or refused.
    Reset,
    /// One or both directions end.
    Shutdown(Shutdown),
    /// So many bytes of the stream follow; at most [`MAX_PAYLOAD`].
    Data {
        /// Bytes of payload.
        len: u32,
    },
    /// The credit fields are news.
    CreditUpdate,
    /// Please say how much room there is.
    CreditRequest,
}

/// A packet that a guest may send: right addresses, stream type, known operation, sane length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// The connection it belongs to.
    pub key: ConnectionKey,
    /// What it says.
    pub message: Message,
    /// The sender's receive buffer.
    pub credit: CreditInfo,
}

/// Why a header of the guest is not a [`Packet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// Source or destination CID is not this guest's or the host's: dropped without a reply, since
    /// there is nobody to reply to.
    Address,
    /// A reset of something that is no stream socket: never answered, so that two ends cannot
    /// send resets to each other for ever.
    Silent,
    /// Answered with a reset for this connection (virtio v1.3 §5.10.6.2 and §5.10.6.4: unknown
    /// type, unknown operation, or a payload that no packet may have).
    Reset(ConnectionKey, Defect),
}

/// What is wrong with a packet that is answered with a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Defect {
    /// `type` is not that of a stream socket.
    SocketType,
    /// `op` is none that the specification defines.
    Operation,
    /// `len` is over [`MAX_PAYLOAD`].
    Length,
}

impl Packet {
    /// Decides whether `header`, written by the guest whose CID is `guest`, is a packet.
    ///
    /// `len` counts only for data; on any other operation it is ignored, as the payload is.
    ///
    /// # Errors
    /// [`Rejection`] says whether the guest gets a reset for it.
    pub fn from_guest(header: &Header, guest: GuestCid) -> Result<Self, Rejection> {
        if header.src_cid != u64::from(guest.get()) || header.dst_cid != HOST_CID {
            return Err(Rejection::Address);
        }
        let key = ConnectionKey {
            guest_port: header.src_port,
            host_port: header.dst_port,
        };
        if header.socket_type != TYPE_STREAM {
            return Err(match header.op {
                Op::Reset => Rejection::Silent,
                _ => Rejection::Reset(key, Defect::SocketType),
            });
        }
        let message = match header.op {
            Op::Request => Message::Request,
            Op::Response => Message::Response,
            Op::Reset => Message::Reset,
            Op::Shutdown => Message::Shutdown(Shutdown::from_wire(header.flags)),
            Op::Data if header.len > MAX_PAYLOAD => {
                return Err(Rejection::Reset(key, Defect::Length));
            }
            Op::Data => Message::Data { len: header.len },
            Op::CreditUpdate => Message::CreditUpdate,
            Op::CreditRequest => Message::CreditRequest,
            Op::Unknown(_) => return Err(Rejection::Reset(key, Defect::Operation)),
        };
        let credit = CreditInfo {
            buf_alloc: header.buf_alloc,
            fwd_cnt: header.fwd_cnt,
        };
        Ok(Self {
            key,
            message,
            credit,
        })
    }

    /// The header that carries this packet from the host to the guest.
    pub fn to_guest(&self, guest: GuestCid) -> Header {
        self.header(
            (HOST_CID, self.key.host_port),
            (u64::from(guest.get()), self.key.guest_port),
        )
    }

    /// The header that carries this packet from the guest to the host: what a driver writes.
    pub fn to_host(&self, guest: GuestCid) -> Header {
        self.header(
            (u64::from(guest.get()), self.key.guest_port),
            (HOST_CID, self.key.host_port),
        )
    }

    fn header(&self, src: (u64, u32), dst: (u64, u32)) -> Header {
        let (op, len, flags) = match self.message {
            Message::Request => (Op::Request, 0, 0),
            Message::Response => (Op::Response, 0, 0),
            Message::Reset => (Op::Reset, 0, 0),
            Message::Shutdown(directions) => (Op::Shutdown, 0, directions.to_wire()),
            Message::Data { len } => (Op::Data, len, 0),
            Message::CreditUpdate => (Op::CreditUpdate, 0, 0),
            Message::CreditRequest => (Op::CreditRequest, 0, 0),
        };
        Header {
            src_cid: src.0,
            dst_cid: dst.0,
            src_port: src.1,
            dst_port: dst.1,
            len,
            socket_type: TYPE_STREAM,
            op,
            flags,
            buf_alloc: self.credit.buf_alloc,
            fwd_cnt: self.credit.fwd_cnt,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: GuestCid = GuestCid::DEFAULT;

    fn header(op: Op) -> Header {
        Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 0x0102_0304,
            dst_port: 1024,
            len: 0,
            socket_type: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: 0x4_0000,
            fwd_cnt: 7,
        }
    }

    const KEY: ConnectionKey = ConnectionKey {
        guest_port: 0x0102_0304,
        host_port: 1024,
    };

    #[test]
    fn header_encoded_has_the_specified_layout() {
        let bytes = Header {
            len: 5,
            flags: 3,
            ..header(Op::Data)
        }
        .encode();
        let expected: [u8; HEADER_LEN] = [
            3, 0, 0, 0, 0, 0, 0, 0, // src_cid
            2, 0, 0, 0, 0, 0, 0, 0, // dst_cid
            4, 3, 2, 1, // src_port
            0, 4, 0, 0, // dst_port
            5, 0, 0, 0, // len
            1, 0, // type
            5, 0, // op
            3, 0, 0, 0, // flags
            0, 0, 4, 0, // buf_alloc
            7, 0, 0, 0, // fwd_cnt
        ];
        assert_eq!(bytes, expected);
    }

    #[test]
    fn header_decoded_and_encoded_is_unchanged() {
        let mut bytes = [0; HEADER_LEN];
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(n * 5 % 251).unwrap();
        }
        assert_eq!(
            Header::parse(&bytes).map(|header| header.encode()),
            Ok(bytes)
        );
    }

    #[test]
    fn op_of_every_number_keeps_its_number() {
        for op in 0..=u16::MAX {
            assert_eq!(Op::from_wire(op).to_wire(), op);
        }
        assert_eq!(Op::from_wire(0), Op::Unknown(0));
        assert_eq!(Op::from_wire(8), Op::Unknown(8));
    }

    #[test]
    fn header_one_byte_short_is_refused() {
        let bytes = header(Op::Request).encode();
        assert!(Header::parse(&bytes).is_ok());
        let error = Header::parse(&bytes[..HEADER_LEN - 1]);
        assert!(matches!(
            error,
            Err(WireError::Short {
                need: HEADER_LEN,
                got: 43,
                ..
            })
        ));
    }

    #[test]
    fn packet_from_another_cid_or_to_another_cid_is_dropped() {
        for (src_cid, dst_cid) in [(4, 2), (3, 3), (3, 0), (2, 2), (3, 2 | 1 << 32)] {
            let header = Header {
                src_cid,
                dst_cid,
                ..header(Op::Request)
            };
            assert_eq!(Packet::from_guest(&header, GUEST), Err(Rejection::Address));
        }
    }

    #[test]
    fn packet_of_unknown_type_is_answered_with_a_reset() {
        let header = Header {
            socket_type: 2,
            ..header(Op::Request)
        };
        let rejection = Rejection::Reset(KEY, Defect::SocketType);
        assert_eq!(Packet::from_guest(&header, GUEST), Err(rejection));
    }

    #[test]
    fn reset_of_unknown_type_is_not_answered() {
        let header = Header {
            socket_type: 2,
            ..header(Op::Reset)
        };
        assert_eq!(Packet::from_guest(&header, GUEST), Err(Rejection::Silent));
    }

    #[test]
    fn packet_of_unknown_operation_is_answered_with_a_reset() {
        for op in [0, 8, u16::MAX] {
            let header = header(Op::from_wire(op));
            let rejection = Rejection::Reset(KEY, Defect::Operation);
            assert_eq!(Packet::from_guest(&header, GUEST), Err(rejection));
        }
    }

    #[test]
    fn data_at_the_cap_is_accepted_and_one_past_it_is_reset() {
        let at = Header {
            len: MAX_PAYLOAD,
            ..header(Op::Data)
        };
        let message = Packet::from_guest(&at, GUEST).map(|packet| packet.message);
        assert_eq!(message, Ok(Message::Data { len: MAX_PAYLOAD }));
        let past = Header {
            len: MAX_PAYLOAD + 1,
            ..header(Op::Data)
        };
        let rejection = Rejection::Reset(KEY, Defect::Length);
        assert_eq!(Packet::from_guest(&past, GUEST), Err(rejection));
    }

    #[test]
    fn length_of_a_control_packet_is_ignored() {
        let header = Header {
            len: u32::MAX,
            ..header(Op::Request)
        };
        let message = Packet::from_guest(&header, GUEST).map(|packet| packet.message);
        assert_eq!(message, Ok(Message::Request));
    }

    #[test]
    fn shutdown_flags_map_to_directions() {
        for (flags, receive, send) in [
            (0, false, false),
            (1, true, false),
            (2, false, true),
            (3, true, true),
            (!3, false, false),
        ] {
            assert_eq!(Shutdown::from_wire(flags), Shutdown { receive, send });
            assert_eq!(Shutdown { receive, send }.to_wire(), flags & 3);
        }
    }

    #[test]
    fn packet_written_by_a_driver_is_read_by_the_device() {
        let messages = [
            Message::Request,
            Message::Response,
            Message::Reset,
            Message::Shutdown(Shutdown {
                receive: false,
                send: true,
            }),
            Message::Data { len: 9 },
            Message::CreditUpdate,
            Message::CreditRequest,
        ];
        for message in messages {
            let credit = CreditInfo {
                buf_alloc: 1,
                fwd_cnt: u32::MAX,
            };
            let packet = Packet {
                key: KEY,
                message,
                credit,
            };
            assert_eq!(
                Packet::from_guest(&packet.to_host(GUEST), GUEST),
                Ok(packet)
            );
            let reply = packet.to_guest(GUEST);
            assert_eq!((reply.src_cid, reply.src_port), (HOST_CID, KEY.host_port));
            assert_eq!((reply.dst_cid, reply.dst_port), (3, KEY.guest_port));
        }
    }
}

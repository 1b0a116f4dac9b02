// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Frames as a guest writes them to its tap: a `virtio_net_hdr` of 10 bytes (virtio v1.3 §5.1.6), then Ethernet.

use std::net::Ipv4Addr;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;

/// Whose a datagram is.
#[derive(Clone, Copy)]
pub(crate) struct Packet {
    pub(crate) macs: ([u8; 6], [u8; 6]),
    pub(crate) from: (Ipv4Addr, u16),
    pub(crate) to: (Ipv4Addr, u16),
}

/// A frame that needs nothing of the host.
pub(crate) fn whole(frame: &[u8]) -> Vec<u8> {
    [&[0; 10][..], frame].concat()
}

/// Who has `asked`? Tell `ip` (RFC 826).
pub(crate) fn arp_request(mac: [u8; 6], ip: Ipv4Addr, asked: Ipv4Addr) -> Vec<u8> {
    [
        &[0xff; 6][..],
        &mac,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &mac,
        &ip.octets(),
        &[0; 6],
        &asked.octets(),
    ]
    .concat()
}

/// A datagram whose UDP checksum the host is to complete.
pub(crate) fn checksum_left_to_the_host(packet: &Packet, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    let mut udp = [
        packet.from.1.to_be_bytes(),
        packet.to.1.to_be_bytes(),
        length.to_be_bytes(),
        [0; 2],
    ]
    .concat();
    udp.extend(payload);
    with_headers(packet, (17, 6), udp, 0)
}

/// What of a TCP segment is not the same in every one (RFC 9293 §3.1).
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    pub(crate) flags: u8,
}

pub(crate) const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;
/// Bytes of TCP's header without options.
pub(crate) const TCP_HEADER: usize = 20;

/// A TCP segment whose checksum the host is to complete, and which it is to cut into pieces with `piece` bytes of payload
/// each; 0: it is one.
pub(crate) fn tcp(packet: &Packet, segment: Segment, payload: &[u8], piece: u16) -> Vec<u8> {
    let mut tcp = [packet.from.1.to_be_bytes(), packet.to.1.to_be_bytes()].concat();
    tcp.extend(segment.sequence.to_be_bytes());
    tcp.extend(segment.acknowledged.to_be_bytes());
    // Five words of header; the largest window.
    tcp.extend([0x50, segment.flags, 0xff, 0xff, 0, 0, 0, 0]);
    tcp.extend(payload);
    with_headers(packet, (6, 16), tcp, piece)
}

/// Puts the header for the tap, Ethernet and IPv4 before a packet of a protocol, whose checksum is at an offset.
fn with_headers(
    packet: &Packet,
    (protocol, checksum_at): (u8, u16),
    mut body: Vec<u8>,
    piece: u16,
) -> Vec<u8> {
    const GSO_TCPV4: u8 = 1;
    const ETHERNET_AND_IP: u16 = 14 + 20;
    let length = u16::try_from(body.len()).unwrap();
    let mut ip = [
        &[0x45, 0][..],
        &(20 + length).to_be_bytes(),
        &[0, 0, 0, 0, 64, protocol, 0, 0],
        &packet.from.0.octets(),
        &packet.to.0.octets(),
    ]
    .concat();
    let checksum = !sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let pseudo = [
        &packet.from.0.octets()[..],
        &packet.to.0.octets(),
        &[0, protocol],
        &length.to_be_bytes(),
    ]
    .concat();
    // Where the checksum goes, the sum of the pseudo header.
    let at = usize::from(checksum_at);
    body[at..at + 2].copy_from_slice(&sum(&pseudo).to_be_bytes());
    let headers = ETHERNET_AND_IP + u16::try_from(TCP_HEADER).unwrap();
    let (gso, headers) = match piece {
        0 => (0, 0),
        _ => (GSO_TCPV4, headers),
    };
    [
        &[NEEDS_CSUM, gso][..],
        &headers.to_le_bytes(),
        &piece.to_le_bytes(),
        &ETHERNET_AND_IP.to_le_bytes(),
        &checksum_at.to_le_bytes(),
        &packet.macs.1,
        &packet.macs.0,
        &[8, 0],
        &ip,
        &body,
    ]
    .concat()
}

/// The sum of RFC 1071.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

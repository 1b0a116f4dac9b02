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
    let udp_len = u16::try_from(8 + payload.len()).unwrap();
    let mut ip = [
        &[0x45, 0][..],
        &(20 + udp_len).to_be_bytes(),
        &[0, 0, 0, 0, 64, 17, 0, 0],
        &packet.from.0.octets(),
        &packet.to.0.octets(),
    ]
    .concat();
    let checksum = !sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let pseudo = [
        &packet.from.0.octets()[..],
        &packet.to.0.octets(),
        &[0, 17],
        &udp_len.to_be_bytes(),
    ]
    .concat();
    let udp = [
        packet.from.1.to_be_bytes(),
        packet.to.1.to_be_bytes(),
        udp_len.to_be_bytes(),
        // Where the checksum goes, the sum of the pseudo header.
        sum(&pseudo).to_be_bytes(),
    ]
    .concat();
    let start = 14 + 20u16;
    let header = [
        &[NEEDS_CSUM, 0, 0, 0, 0, 0][..],
        &start.to_le_bytes(),
        &6u16.to_le_bytes(),
    ]
    .concat();
    [
        &header[..],
        &packet.macs.1,
        &packet.macs.0,
        &[8, 0],
        &ip,
        &udp,
        payload,
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

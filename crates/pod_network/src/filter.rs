// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a guest may send: a classic BPF program, made from the pod's addresses, that tc runs on every frame from the tap.
//!
//! | frame | passes if |
//! |---|---|
//! | any | source MAC is the pod's, no VLAN tag |
//! | IPv4 | source is one of the pod's |
//! | ARP | sender's MAC and address are the pod's, or the address is 0.0.0.0 (a probe, RFC 5227) |
//! | IPv6 | source is one of the pod's; no routing or destination options (they hide what follows) |
//! | neighbour advertisement | target is one of the pod's, too |
//! | router advertisement, redirect | never: a pod is no router |
//! | hop-by-hop options | only before a multicast listener report (RFC 3810) |
//! | anything else | never |
//!
//! And none goes to the metadata service of a cloud, unless that is allowed. A frame too short for its headers is dropped:
//! every load is behind a check of the length, as a load past the end would end the program with "accepted".

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Metadata;

/// Where clouds offer credentials to whoever asks: link-local IPv4, and Amazon's IPv6 address.
const METADATA_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// One instruction (Linux `include/uapi/linux/filter.h`, `struct sock_filter`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    /// Instructions to skip if the condition holds, and if not.
    pub(crate) skip_if: u8,
    pub(crate) skip_else: u8,
    pub(crate) k: u32,
}

// Linux `include/uapi/linux/bpf_common.h`.
pub(crate) const LOAD_WORD: u16 = 0x20;
pub(crate) const LOAD_HALF: u16 = 0x28;
pub(crate) const LOAD_BYTE: u16 = 0x30;
pub(crate) const LOAD_LENGTH: u16 = 0x80;
pub(crate) const JUMP: u16 = 0x05;
pub(crate) const JUMP_EQUAL: u16 = 0x15;
pub(crate) const JUMP_AT_LEAST: u16 = 0x35;
pub(crate) const RETURN: u16 = 0x06;
/// `SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT`: whether the kernel has taken a VLAN tag off the frame.
pub(crate) const VLAN_TAG_PRESENT: u32 = 0xffff_f030;

/// `TC_ACT_UNSPEC`: the next filter decides, which redirects.
pub(crate) const PASS: u32 = u32::MAX;
/// `TC_ACT_SHOT`.
pub(crate) const DROP: u32 = 2;

const ETHERTYPE: u32 = 12;
const IPV4: u32 = 0x0800;
const ARP: u32 = 0x0806;
const IPV6: u32 = 0x86dd;
/// Bytes of the Ethernet header.
const ETHERNET: u32 = 14;
/// Next headers (RFC 8200) and message types (RFC 4861, RFC 2710, RFC 3810).
const HOP_BY_HOP: u32 = 0;
const ROUTING: u32 = 43;
const ICMPV6: u32 = 58;
const DESTINATION_OPTIONS: u32 = 60;
const ROUTER_ADVERTISEMENT: u32 = 134;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const REDIRECT: u32 = 137;
const LISTENER_REPORTS: [u32; 3] = [131, 132, 143];

/// The program for a card with these addresses.
pub(crate) fn program(mac: [u8; 6], addresses: &[IpAddr], metadata: Metadata) -> Vec<Instruction> {
    let v4: Vec<u32> = addresses
        .iter()
        .filter_map(|address| match address {
            IpAddr::V4(address) => Some(address.to_bits()),
            IpAddr::V6(_) => None,
        })
        .collect();
    let v6: Vec<Ipv6Addr> = addresses
        .iter()
        .filter_map(|address| match address {
            IpAddr::V6(address) => Some(*address),
            IpAddr::V4(_) => None,
        })
        .collect();
    let mut all = at_least(ETHERNET);
    all.extend(require(LOAD_WORD, VLAN_TAG_PRESENT, 0));
    all.extend(mac_at(6, mac));
    for (ethertype, body) in [
        (IPV4, ipv4(&v4, metadata)),
        (ARP, arp(mac, &v4)),
        (IPV6, ipv6(&v6, metadata)),
    ] {
        all.extend([
            load(LOAD_HALF, ETHERTYPE),
            jump_equal(ethertype, 1, 0),
            jump(&body),
        ]);
        all.extend(body);
    }
    all.push(give(DROP));
    all
}

fn ipv4(addresses: &[u32], metadata: Metadata) -> Vec<Instruction> {
    let mut body = at_least(ETHERNET + 20);
    if metadata == Metadata::Denied {
        body.push(load(LOAD_WORD, ETHERNET + 16));
        body.extend(if_equal(METADATA_V4.to_bits(), DROP));
    }
    body.push(load(LOAD_WORD, ETHERNET + 12));
    body.extend(
        addresses
            .iter()
            .flat_map(|address| if_equal(*address, PASS)),
    );
    body.push(give(DROP));
    body
}

fn arp(mac: [u8; 6], addresses: &[u32]) -> Vec<Instruction> {
    let mut body = at_least(ETHERNET + 28);
    // Ethernet and IPv4, 6 and 4 bytes long (RFC 826).
    body.extend(require(LOAD_WORD, ETHERNET, 1 << 16 | IPV4));
    body.extend(require(LOAD_HALF, ETHERNET + 4, 6 << 8 | 4));
    body.extend(mac_at(ETHERNET + 8, mac));
    body.push(load(LOAD_WORD, ETHERNET + 14));
    let own = addresses.iter().copied().chain([0]);
    body.extend(own.flat_map(|address| if_equal(address, PASS)));
    body.push(give(DROP));
    body
}

fn ipv6(addresses: &[Ipv6Addr], metadata: Metadata) -> Vec<Instruction> {
    const SOURCE: u32 = ETHERNET + 8;
    const DESTINATION: u32 = ETHERNET + 24;
    const NEXT_HEADER: u32 = ETHERNET + 6;
    let mut body = at_least(ETHERNET + 40);
    if metadata == Metadata::Denied {
        body.extend(address_at(DESTINATION, METADATA_V6, &[give(DROP)]));
    }
    body.extend(one_of(SOURCE, addresses));
    body.push(load(LOAD_BYTE, NEXT_HEADER));
    body.extend(if_equal(ROUTING, DROP));
    body.extend(if_equal(DESTINATION_OPTIONS, DROP));
    let options = hop_by_hop();
    body.extend([jump_equal(HOP_BY_HOP, 1, 0), jump(&options)]);
    body.extend(options);
    body.push(load(LOAD_BYTE, NEXT_HEADER));
    // Only ICMPv6 is looked into.
    body.extend([jump_equal(ICMPV6, 1, 0), give(PASS)]);
    body.extend(icmpv6(addresses));
    body
}

/// One block of options, then a report of multicast listeners, nothing else.
fn hop_by_hop() -> Vec<Instruction> {
    const OPTIONS: u32 = ETHERNET + 40;
    let mut body = at_least(OPTIONS + 9);
    // Next header, and a length of 0: 8 bytes.
    body.extend(require(LOAD_HALF, OPTIONS, ICMPV6 << 8));
    body.push(load(LOAD_BYTE, OPTIONS + 8));
    body.extend(
        LISTENER_REPORTS
            .into_iter()
            .flat_map(|kind| if_equal(kind, PASS)),
    );
    body.push(give(DROP));
    body
}

fn icmpv6(addresses: &[Ipv6Addr]) -> Vec<Instruction> {
    const TYPE: u32 = ETHERNET + 40;
    const TARGET: u32 = TYPE + 8;
    let mut body = at_least(TYPE + 1);
    body.push(load(LOAD_BYTE, TYPE));
    body.extend(if_equal(ROUTER_ADVERTISEMENT, DROP));
    body.extend(if_equal(REDIRECT, DROP));
    body.extend([jump_equal(NEIGHBOUR_ADVERTISEMENT, 1, 0), give(PASS)]);
    body.extend(at_least(TARGET + 16));
    body.extend(one_of(TARGET, addresses));
    body.push(give(PASS));
    body
}

/// Goes on only if the bytes at `offset` are one of `addresses`.
fn one_of(offset: u32, addresses: &[Ipv6Addr]) -> Vec<Instruction> {
    let mut tests = vec![give(DROP)];
    for address in addresses.iter().rev() {
        let mut found = address_at(offset, *address, &[jump(&tests)]);
        found.append(&mut tests);
        tests = found;
    }
    tests
}

/// Does `found` if the bytes at `offset` are `address`, else goes on.
fn address_at(offset: u32, address: Ipv6Addr, found: &[Instruction; 1]) -> Vec<Instruction> {
    let bits = address.to_bits();
    let mut tests = Vec::new();
    // The last comparison skips `found`, each before it two instructions more.
    for (word, skip) in [(3u32, 7u8), (2, 5), (1, 3), (0, 1)] {
        let value = u32::try_from(bits >> (32 * word) & u128::from(u32::MAX)).unwrap_or(0);
        tests.push(load(LOAD_WORD, offset.saturating_add(4 * (3 - word))));
        tests.push(jump_equal(value, 0, skip));
    }
    tests.extend_from_slice(found);
    tests
}

/// Goes on only if the bytes at `offset` are `mac`.
fn mac_at(offset: u32, mac: [u8; 6]) -> Vec<Instruction> {
    let [a, b, c, d, e, f] = mac;
    let mut tests = require(LOAD_WORD, offset, u32::from_be_bytes([a, b, c, d]));
    let rest = u32::from(u16::from_be_bytes([e, f]));
    tests.extend(require(LOAD_HALF, offset.saturating_add(4), rest));
    tests
}

fn at_least(length: u32) -> Vec<Instruction> {
    let enough = Instruction {
        code: JUMP_AT_LEAST,
        skip_if: 1,
        skip_else: 0,
        k: length,
    };
    vec![load(LOAD_LENGTH, 0), enough, give(DROP)]
}

/// Goes on only if a load gives `value`.
fn require(size: u16, offset: u32, value: u32) -> Vec<Instruction> {
    vec![load(size, offset), jump_equal(value, 1, 0), give(DROP)]
}

/// Ends if what was loaded is `value`.
fn if_equal(value: u32, verdict: u32) -> [Instruction; 2] {
    [jump_equal(value, 0, 1), give(verdict)]
}

fn load(code: u16, k: u32) -> Instruction {
    Instruction {
        code,
        skip_if: 0,
        skip_else: 0,
        k,
    }
}

fn jump_equal(k: u32, skip_if: u8, skip_else: u8) -> Instruction {
    Instruction {
        code: JUMP_EQUAL,
        skip_if,
        skip_else,
        k,
    }
}

/// Past `body`.
fn jump(body: &[Instruction]) -> Instruction {
    load(JUMP, u32::try_from(body.len()).unwrap_or(u32::MAX))
}

fn give(verdict: u32) -> Instruction {
    load(RETURN, verdict)
}

#[cfg(test)]
mod tests;

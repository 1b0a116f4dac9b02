// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The program run by a small interpreter of its own, which fails on every load past the end.

use std::net::IpAddr;

use proptest::prelude::*;

use super::*;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 8];

/// What the kernel would make of the frame.
fn run(program: &[Instruction], frame: &[u8]) -> u32 {
    let mut accumulator = 0u32;
    let mut at = 0usize;
    let load = |offset: u32, bytes: usize| {
        let start = offset as usize;
        let value = frame
            .get(start..start + bytes)
            .expect("no load past the end of a frame");
        value
            .iter()
            .fold(0, |sum, byte| sum << 8 | u32::from(*byte))
    };
    loop {
        let now = program[at];
        at += 1;
        let condition = match now.code {
            RETURN => return now.k,
            JUMP => {
                at += now.k as usize;
                continue;
            }
            JUMP_EQUAL => accumulator == now.k,
            JUMP_AT_LEAST => accumulator >= now.k,
            code => {
                accumulator = match (code, now.k) {
                    (LOAD_LENGTH, _) => u32::try_from(frame.len()).unwrap(),
                    (LOAD_WORD, VLAN_TAG_PRESENT) => 0,
                    (LOAD_WORD, offset) => load(offset, 4),
                    (LOAD_HALF, offset) => load(offset, 2),
                    (LOAD_BYTE, offset) => load(offset, 1),
                    other => panic!("{other:?}"),
                };
                continue;
            }
        };
        at += usize::from(if condition {
            now.skip_if
        } else {
            now.skip_else
        });
    }
}

fn addresses() -> Vec<IpAddr> {
    ["10.1.2.3", "10.9.9.9", "fd00::3", "fe80::7"]
        .map(|text| text.parse().unwrap())
        .to_vec()
}

fn passes(frame: &[u8]) -> bool {
    let verdict = run(&program(MAC, &addresses(), Metadata::Denied), frame);
    assert!(verdict == PASS || verdict == DROP, "{verdict}");
    verdict == PASS
}

fn ethernet(source: [u8; 6], ethertype: u16, rest: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &source, &ethertype.to_be_bytes(), rest].concat()
}

fn packet4(source: &str, destination: &str) -> Vec<u8> {
    let bytes = |text: &str| text.parse::<Ipv4Addr>().unwrap().octets();
    [
        &[0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0][..],
        &bytes(source),
        &bytes(destination),
    ]
    .concat()
}

fn packet6(source: &str, next: u8, rest: &[u8]) -> Vec<u8> {
    let bytes = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
    [
        &[0x60, 0, 0, 0, 0, 0, next, 255][..],
        &bytes(source),
        &bytes("ff02::1"),
        rest,
    ]
    .concat()
}

fn arp(sender: [u8; 6], ip: &str) -> Vec<u8> {
    let ip = ip.parse::<Ipv4Addr>().unwrap().octets();
    [&[0, 1, 8, 0, 6, 4, 0, 1][..], &sender, &ip, &[0; 10]].concat()
}

#[test]
fn own_addresses_pass_and_others_do_not() {
    for (source, expected) in [
        ("10.1.2.3", true),
        ("10.9.9.9", true),
        ("10.1.2.4", false),
        ("0.0.0.0", false),
    ] {
        assert_eq!(
            passes(&ethernet(MAC, 0x0800, &packet4(source, "10.0.0.1"))),
            expected,
            "{source}"
        );
    }
    for (source, expected) in [
        ("fd00::3", true),
        ("fe80::7", true),
        ("fd00::4", false),
        ("::", false),
        ("fd00:0:0:1::3", false),
    ] {
        assert_eq!(
            passes(&ethernet(MAC, 0x86dd, &packet6(source, 17, &[]))),
            expected,
            "{source}"
        );
    }
}

#[test]
fn foreign_mac_and_unknown_protocols_are_dropped() {
    assert!(!passes(&ethernet(
        OTHER,
        0x0800,
        &packet4("10.1.2.3", "10.0.0.1")
    )));
    assert!(!passes(&ethernet(
        [2, 0, 0, 1, 0, 7],
        0x0800,
        &packet4("10.1.2.3", "10.0.0.1")
    )));
    for ethertype in [0x8100, 0x88a8, 0x88cc, 0x0026] {
        assert!(!passes(&ethernet(MAC, ethertype, &[0; 64])));
    }
}

#[test]
fn arp_speaks_for_the_pod_only() {
    assert!(passes(&ethernet(MAC, 0x0806, &arp(MAC, "10.1.2.3"))));
    assert!(passes(&ethernet(MAC, 0x0806, &arp(MAC, "0.0.0.0"))));
    assert!(!passes(&ethernet(MAC, 0x0806, &arp(OTHER, "10.1.2.3"))));
    assert!(!passes(&ethernet(MAC, 0x0806, &arp(MAC, "10.1.2.1"))));
}

#[test]
fn metadata_is_out_of_reach_unless_allowed() {
    let frame = ethernet(MAC, 0x0800, &packet4("10.1.2.3", "169.254.169.254"));
    assert!(!passes(&frame));
    let allowed = program(MAC, &addresses(), Metadata::Allowed);
    assert_eq!(run(&allowed, &frame), PASS);
    let mut six = packet6("fd00::3", 6, &[0; 20]);
    six.splice(24..40, METADATA_V6.octets());
    assert!(!passes(&ethernet(MAC, 0x86dd, &six)));
    assert_eq!(run(&allowed, &ethernet(MAC, 0x86dd, &six)), PASS);
}

#[test]
fn neighbour_discovery_speaks_for_the_pod_only() {
    let advertisement = |target: &str| {
        let target = target.parse::<Ipv6Addr>().unwrap().octets();
        let rest = [&[136, 0, 0, 0, 0, 0, 0, 0][..], &target].concat();
        passes(&ethernet(MAC, 0x86dd, &packet6("fe80::7", 58, &rest)))
    };
    assert!(advertisement("fd00::3"));
    assert!(!advertisement("fd00::1"));
    for (kind, expected) in [
        (128, true),
        (133, true),
        (134, false),
        (135, true),
        (137, false),
    ] {
        let frame = ethernet(MAC, 0x86dd, &packet6("fe80::7", 58, &[kind, 0, 0, 0]));
        assert_eq!(passes(&frame), expected, "type {kind}");
    }
}

#[test]
fn extension_headers_hide_nothing() {
    for next in [43, 60] {
        assert!(!passes(&ethernet(
            MAC,
            0x86dd,
            &packet6("fd00::3", next, &[0; 64])
        )));
    }
    let options = |next, length, kind| {
        let rest = [&[next, length, 5, 2, 0, 0, 1, 0][..], &[kind, 0, 0, 0]].concat();
        passes(&ethernet(MAC, 0x86dd, &packet6("fe80::7", 0, &rest)))
    };
    assert!(options(58, 0, 143));
    assert!(!options(58, 0, 136));
    assert!(!options(58, 1, 143));
    assert!(!options(17, 0, 143));
}

#[test]
fn program_with_the_most_addresses_fits_the_kernel() {
    let many: Vec<IpAddr> = (0..64u16)
        .map(|i| IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, i)))
        .collect();
    let program = program(MAC, &many, Metadata::Denied);
    assert!(program.len() <= 4096, "{}", program.len());
    for (last, expected) in [(0, true), (63, true), (64, false)] {
        let frame = ethernet(MAC, 0x86dd, &packet6(&format!("fd00::{last:x}"), 17, &[]));
        assert_eq!(run(&program, &frame) == PASS, expected);
    }
}

proptest! {
    /// No frame makes the program load past its end, which the kernel would take for "accepted".
    #[test]
    fn frame_of_any_length_gets_a_verdict(
        cut in 0usize..100,
        ethertype in prop::sample::select(vec![0x0800u16, 0x0806, 0x86dd, 0x8100]),
        next in any::<u8>(),
        rest in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let body = match ethertype {
            0x86dd => packet6("fd00::3", next, &rest),
            0x0800 => packet4("10.1.2.3", "10.0.0.1"),
            0x0806 => arp(MAC, "10.1.2.3"),
            _ => rest,
        };
        let frame = ethernet(MAC, ethertype, &body);
        passes(&frame[..cut.min(frame.len())]);
    }
}

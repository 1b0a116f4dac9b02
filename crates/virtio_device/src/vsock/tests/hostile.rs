// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A guest that breaks the rules hurts nobody but its own connection.

use proptest::prelude::*;
use virtio_testdriver::ChainBuilder;
use virtio_wire::vsock::{
    ConnectionKey, CreditInfo, HEADER_LEN, Header, MAX_PAYLOAD, Message, Op, Packet, TYPE_STREAM,
};

use super::guest::*;
use crate::vsock::{MAX_CONNECTIONS, MAX_PENDING_RESETS};
use crate::{Event, VirtioDevice};

const KEY: ConnectionKey = ConnectionKey {
    guest_port: 700,
    host_port: SERVED,
};

fn header(op: Op) -> Header {
    let credit = CreditInfo {
        buf_alloc: 1000,
        fwd_cnt: 0,
    };
    let packet = Packet {
        key: KEY,
        message: Message::CreditUpdate,
        credit,
    };
    Header {
        op,
        ..packet.to_host(CID)
    }
}

#[test]
fn guest_that_overruns_the_window_is_reset() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    // The socket takes some of it, so the account of what is forwarded moves; send until it must be too much.
    let chunk = noise(60_000);
    let mut sent = 0;
    while rig.counter("credit_violations") == 0 {
        assert!(sent < 4 << 20, "no bound is enforced");
        rig.send_data(key, &chunk);
        sent += chunk.len();
    }
    let packets = rig.packets();
    assert_eq!(packets.last().unwrap().header.op, Op::Reset);
    assert_eq!(rig.connections(), 0);
    while read_now(&mut host, 1 << 20).is_some() {}
}

#[test]
fn guest_that_took_what_it_was_never_sent_is_reset() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    rig.guest_reads(key, 1);
    rig.send(key, Message::CreditUpdate, &[]);
    assert_eq!(ops(&rig.packets()), [Op::Reset]);
    assert!(is_over(&mut host));
    assert_eq!(rig.counter("credit_violations"), 1);
    // The same lie in the request itself.
    rig.send(key, Message::Request, &[]);
    assert_eq!(ops(&rig.packets()), [Op::Reset]);
    assert!(rig.take_opened().is_none());
}

#[test]
fn guest_without_a_receive_buffer_is_sent_no_data() {
    let mut rig = Rig::new();
    rig.accounts.insert(KEY, Account::default());
    rig.send(KEY, Message::Request, &[]);
    assert_eq!(ops(&rig.packets()), [Op::Response]);
    let mut host = rig.take_opened().unwrap();
    write_now(&mut host, b"x");
    assert_eq!(ops(&rig.packets()), [Op::CreditRequest]);
    // Each further byte asks no further question.
    write_now(&mut host, b"x");
    rig.send(KEY, Message::CreditUpdate, &[]);
    assert!(rig.packets().is_empty());
}

#[test]
fn request_for_a_connection_that_is_open_resets_it() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    rig.send(key, Message::Request, &[]);
    assert_eq!(ops(&rig.packets()), [Op::Reset]);
    assert!(is_over(&mut host));
    assert_eq!(rig.counter("protocol_violations"), 1);
}

#[test]
fn packet_for_no_connection_is_reset_unless_it_is_a_reset() {
    let mut rig = Rig::new();
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        rig.send_raw(&[&header(op).encode()]);
        assert_eq!(ops(&rig.packets()), [Op::Reset], "{op:?}");
    }
    assert_eq!(rig.counter("unknown_connection"), 5);
    rig.send_raw(&[&header(Op::Reset).encode()]);
    assert!(rig.packets().is_empty());
}

#[test]
fn packet_of_another_guest_is_dropped_without_a_word() {
    let mut rig = Rig::new();
    for (src_cid, dst_cid) in [(4, 2), (3, 4), (2, 2), (3 | 1 << 32, 2)] {
        let header = Header {
            src_cid,
            dst_cid,
            ..header(Op::Request)
        };
        rig.send_raw(&[&header.encode()]);
    }
    assert!(rig.packets().is_empty());
    assert_eq!(rig.counter("misaddressed"), 4);
}

#[test]
fn packet_of_unknown_type_or_operation_resets_its_connection() {
    let unknown_type = Header {
        socket_type: 2,
        ..header(Op::Data)
    };
    for bad in [unknown_type, header(Op::Unknown(0)), header(Op::Unknown(8))] {
        let mut rig = Rig::new();
        let (_, mut host) = rig.open_from_guest(700);
        rig.send_raw(&[&bad.encode()]);
        assert_eq!(ops(&rig.packets()), [Op::Reset]);
        assert!(is_over(&mut host));
        assert_eq!(rig.counter("malformed"), 1);
    }
}

#[test]
fn payload_longer_than_the_cap_or_the_buffers_resets_its_connection() {
    for (len, sent) in [(MAX_PAYLOAD + 1, 65_537), (u32::MAX, 10), (11, 10), (1, 0)] {
        let mut rig = Rig::new();
        let (_, mut host) = rig.open_from_guest(700);
        let bad = Header {
            len,
            ..header(Op::Data)
        };
        let payload = noise(sent);
        if sent > 0 {
            rig.send_raw(&[&bad.encode(), &payload]);
        } else {
            rig.send_raw(&[&bad.encode()]);
        }
        assert_eq!(ops(&rig.packets()), [Op::Reset], "{len} {sent}");
        assert!(is_over(&mut host));
    }
}

#[test]
fn chain_shorter_than_a_header_is_dropped() {
    let mut rig = Rig::new();
    for len in [1, 43] {
        rig.send_raw(&[&header(Op::Request).encode()[..len]]);
    }
    assert!(rig.packets().is_empty());
    assert_eq!(rig.counter("malformed"), 2);
}

#[test]
fn chain_with_only_writable_buffers_is_dropped() {
    let mut rig = Rig::new();
    let chain = ChainBuilder::new().writable(&mut rig.mem, 100);
    rig.transmit.add(&mut rig.mem, &chain);
    rig.handle(Event::Queue(1));
    assert_eq!(rig.transmit.drain_used().len(), 1);
    assert_eq!(rig.counter("malformed"), 1);
}

#[test]
fn receive_buffer_too_small_for_a_packet_is_given_back_empty() {
    let mut rig = Rig::new();
    rig.repost = false;
    let (key, _host) = rig.open_from_guest(700);
    while rig.device.handle().dump().pending_resets == 0 {
        rig.send_raw(&[&Header {
            src_port: 9,
            ..header(Op::Data)
        }
        .encode()]);
        let _ = rig.take_received();
    }
    let small = ChainBuilder::new().writable(&mut rig.mem, HEADER_LEN);
    let readable = ChainBuilder::new().readable(&mut rig.mem, &[0; 100]);
    for chain in [small, readable] {
        rig.receive.add(&mut rig.mem, &chain);
        rig.handle(Event::Queue(0));
        assert_eq!(rig.receive.pop_used().unwrap().written, 0);
    }
    assert_eq!(rig.counter("short_buffers"), 2);
    assert!(rig.accounts.contains_key(&key));
}

#[test]
fn receive_buffer_too_small_among_good_ones_loses_no_byte() {
    let mut rig = Rig::new();
    let (_, mut host) = rig.open_from_host(5000);
    rig.repost = false;
    let bytes = noise(250_000);
    let (mut sent, mut got) = (0, Vec::new());
    while rig.device.handle().dump().ready == 0 {
        sent += write_now(&mut host, &bytes[sent..=sent]); // a buffer for each byte, until none is left
        got.extend(data(&rig.packets()));
    }
    let small = ChainBuilder::new().writable(&mut rig.mem, HEADER_LEN);
    while got.len() < bytes.len() {
        // One good, one too small, two good, all there at once.
        let before = got.len();
        for good in [true, false, true, true] {
            if good {
                let addr = rig.mem.alloc(1044, 16);
                rig.post_sized(addr, 1044);
            } else {
                rig.receive.add(&mut rig.mem, &small);
            }
        }
        sent += write_now(&mut host, &bytes[sent..]);
        rig.handle(Event::Queue(0));
        got.extend(data(&rig.take_received()));
        assert!(got.len() > before);
    }
    assert!(got == bytes, "bytes differ");
    assert!(rig.counter("short_buffers") > 0);
}

#[test]
fn guest_that_reads_nothing_makes_nothing_grow() {
    let mut rig = Rig::new();
    rig.repost = false;
    let _ = rig.take_received();
    for n in 0..5_000 {
        let key = ConnectionKey {
            guest_port: n,
            host_port: SERVED,
        };
        rig.forget(key);
        rig.send(key, Message::Request, &[]);
        rig.send(key, Message::CreditRequest, &[]);
        rig.send(key, Message::Request, &[]);
        let _ = rig.take_received();
        while rig.take_opened().is_some() {}
    }
    let dump = rig.device.handle().dump();
    assert!(dump.connections.len() <= MAX_CONNECTIONS);
    assert!(dump.ready <= MAX_CONNECTIONS);
    assert_eq!(dump.pending_resets, MAX_PENDING_RESETS);
    assert!(rig.counter("resets_dropped") > 0);
    assert!(rig.counter("resets_sent") > 0);
}

#[test]
fn every_counter_counts_something() {
    // Each is raised by a test of its own as well; this one finds a counter that nothing raises.
    let mut seen = std::collections::BTreeSet::new();
    let mut all = std::collections::BTreeSet::new();
    let mut note = |rig: &Rig| {
        for (name, value) in VirtioDevice::<crate::testing::Space>::metrics(&rig.device) {
            all.insert(name);
            if value > 0 {
                seen.insert(name);
            }
        }
    };
    let mut rig = Rig::new();
    let (key, host) = rig.open_from_guest(700);
    rig.send_data(key, b"x");
    drop(host);
    let _ = rig.packets();
    let (key, mut host) = rig.open_from_host(1);
    write_now(&mut host, b"x");
    let _ = rig.packets();
    rig.send(key, Message::Reset, &[]);
    let (_, gives_up) = rig.ask(2);
    drop(gives_up);
    let _ = rig.packets();
    let (_, _never_answered) = rig.ask(4);
    rig.after(crate::vsock::CONNECT_TIMEOUT);
    write_now(&mut rig.dial(), b"garbage\n");
    let _ = rig.packets();
    let (key, _twice) = rig.open_from_guest(701);
    rig.send(key, Message::Request, &[]);
    let _ = rig.packets();
    let (key, _liar) = rig.open_from_guest(702);
    rig.guest_reads(key, 1);
    rig.send(key, Message::CreditUpdate, &[]);
    rig.send_raw(&[&header(Op::Unknown(9)).encode()]);
    rig.send_raw(&[&Header {
        src_cid: 9,
        ..header(Op::Request)
    }
    .encode()]);
    rig.send_raw(&[&Header {
        dst_port: 9,
        ..header(Op::Request)
    }
    .encode()]);
    rig.send_raw(&[&Header {
        src_port: 9,
        ..header(Op::Data)
    }
    .encode()]);
    let _ = rig.packets();
    let _callers: Vec<_> = (0..=MAX_CONNECTIONS)
        .map(|_| {
            let caller = rig.dial();
            rig.host_events();
            caller
        })
        .collect();
    rig.repost = false;
    while rig.counter("resets_dropped") == 0 {
        rig.send_raw(&[&Header {
            src_port: 9,
            ..header(Op::Data)
        }
        .encode()]);
        let _ = rig.take_received();
    }
    let small = ChainBuilder::new().writable(&mut rig.mem, HEADER_LEN);
    rig.receive.add(&mut rig.mem, &small);
    rig.handle(Event::Queue(0));
    note(&rig);
    assert_eq!(seen, all);
}

/// Mostly sane packets, so that connections do open and the odd bad one meets them in every phase.
fn any_header() -> impl Strategy<Value = Header> {
    let rarely = |value: u64, other: u64| prop_oneof![30 => Just(value), 1 => Just(other)];
    let op = prop_oneof![
        3 => Just(Op::Request),
        3 => Just(Op::Response),
        1 => Just(Op::Reset),
        2 => Just(Op::Shutdown),
        8 => Just(Op::Data),
        2 => Just(Op::CreditUpdate),
        2 => Just(Op::CreditRequest),
        1 => any::<u16>().prop_map(Op::from_wire),
    ];
    let numbers = (
        prop_oneof![10 => 0..5000u32, 1 => any::<u32>()],
        prop_oneof![4 => 0..4u32, 1 => any::<u32>()],
        prop_oneof![10 => Just(100_000u32), 1 => any::<u32>()],
        prop_oneof![10 => Just(0u32), 2 => 0..5000u32, 1 => any::<u32>()],
    );
    let ports = (
        0..3u32,
        prop_oneof![Just(SERVED), Just(1 << 30), Just((1 << 30) + 1)],
    );
    (
        rarely(3, 9),
        rarely(2, 9),
        op,
        numbers,
        ports,
        prop_oneof![30 => Just(TYPE_STREAM), 1 => any::<u16>()],
    )
        .prop_map(
            |(
                src_cid,
                dst_cid,
                op,
                (len, flags, buf_alloc, fwd_cnt),
                (src_port, dst_port),
                socket_type,
            )| Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                socket_type,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any packets, with host processes coming and going: the device never fails, and every bound holds.
    #[test]
    fn any_packets_leave_the_device_within_its_bounds(
        steps in prop::collection::vec((any_header(), 0..6000usize, 0..4u32), 0..80),
    ) {
        let mut rig = Rig::new();
        let mut hosts = Vec::new();
        for (header, payload, action) in steps {
            match action {
                0 => {
                    let mut host = rig.dial();
                    write_now(&mut host, format!("CONNECT {}\nhello", header.src_port).as_bytes());
                    hosts.push(host);
                }
                1 => {
                    hosts.pop();
                }
                _ => {}
            }
            if payload == 0 {
                rig.send_raw(&[&header.encode()]);
            } else {
                rig.send_raw(&[&header.encode(), &noise(payload)]);
            }
            let _ = rig.packets();
            hosts.extend(rig.take_opened());
            for connection in rig.device.handle().dump().connections {
                prop_assert!(connection.buffered <= connection.window);
            }
            prop_assert!(!rig.would_wake());
        }
        // Whatever was said, a fresh connection works.
        let (key, mut host) = rig.open_from_guest(4000);
        rig.send_data(key, b"sane");
        prop_assert_eq!(read_now(&mut host, 10).unwrap(), b"sane");
    }
}

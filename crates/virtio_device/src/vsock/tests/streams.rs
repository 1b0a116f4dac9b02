// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Bytes flow, and connections begin and end as they should.

use std::io::{Read, Write};
use std::net::Shutdown as Half;
use std::time::Duration;

use virtio_wire::vsock::{ConnectionKey, Message, Op, Shutdown};

use super::guest::*;
use crate::Event;
use crate::vsock::{CLOSE_TIMEOUT, CONNECT_TIMEOUT, GREETING_TIMEOUT, MAX_CONNECTIONS, Phase};

const MIB: usize = 1 << 20;
const SEND: Shutdown = Shutdown {
    receive: false,
    send: true,
};

#[test]
fn host_that_asks_is_greeted_once_the_guest_accepts() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.ask(5000);
    assert_eq!(read_now(&mut host, 100), Some(Vec::new()));
    rig.send(key, Message::Response, &[]);
    let line = read_now(&mut host, 100).unwrap();
    assert_eq!(line, format!("OK {}\n", key.host_port).as_bytes());
    assert_eq!(rig.counter("opened_by_host"), 1);
}

#[test]
fn host_that_sends_data_behind_its_line_loses_none() {
    let mut rig = Rig::new();
    let mut host = rig.dial();
    host.write_all(b"CONNECT 5000\nearly").unwrap();
    let request = rig.packets()[0].header;
    let key = ConnectionKey {
        guest_port: 5000,
        host_port: request.src_port,
    };
    rig.accounts.get_mut(&key).unwrap().buf_alloc = 1000;
    rig.send(key, Message::Response, &[]);
    assert_eq!(data(&rig.packets()), b"early");
}

#[test]
fn host_that_asks_byte_by_byte_is_understood() {
    let mut rig = Rig::new();
    let mut host = rig.dial();
    for byte in b"CONNECT 5000" {
        host.write_all(&[*byte]).unwrap();
        assert!(rig.packets().is_empty());
    }
    host.write_all(b"\n").unwrap();
    assert_eq!(ops(&rig.packets()), [Op::Request]);
}

#[test]
fn host_that_talks_garbage_is_closed() {
    let mut rig = Rig::new();
    for line in [
        "GET / HTTP/1.1\r\n\r\n",
        "CONNECT\n",
        "CONNECT -1\n",
        "CONNECT 99999999999999",
    ] {
        let mut host = rig.dial();
        host.write_all(line.as_bytes()).unwrap();
        assert!(rig.packets().is_empty());
        assert!(is_over(&mut host), "{line}");
    }
    assert_eq!(rig.counter("bad_greetings"), 4);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn host_that_leaves_before_it_has_asked_is_forgotten() {
    let mut rig = Rig::new();
    let mut host = rig.dial();
    host.write_all(b"CONN").unwrap();
    rig.host_events();
    drop(host);
    rig.host_events();
    assert_eq!(rig.connections(), 0);
}

#[test]
fn host_that_asks_late_and_leaves_at_once_is_forgotten() {
    let mut rig = Rig::new();
    let mut host = rig.dial();
    rig.host_events();
    host.write_all(b"CONNECT 5000\n").unwrap();
    drop(host);
    assert!(rig.packets().is_empty());
    assert_eq!(rig.connections(), 0);
}

#[test]
fn host_that_never_asks_is_closed_at_the_deadline() {
    let mut rig = Rig::new();
    let mut host = rig.dial();
    host.write_all(b"CONN").unwrap();
    rig.host_events();
    rig.after(GREETING_TIMEOUT - Duration::from_millis(1));
    assert_eq!(rig.connections(), 1);
    rig.after(Duration::from_millis(1));
    assert!(is_over(&mut host));
    assert_eq!(rig.connections(), 0);
}

#[test]
fn request_refused_by_the_guest_closes_the_host() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.ask(5000);
    rig.send(key, Message::Reset, &[]);
    assert!(is_over(&mut host));
    assert_eq!(rig.counter("aborted_by_guest"), 1);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn request_never_answered_closes_the_host_and_resets_the_guest() {
    let mut rig = Rig::new();
    let (_, mut host) = rig.ask(5000);
    rig.after(CONNECT_TIMEOUT);
    assert!(is_over(&mut host));
    assert_eq!(ops(&rig.packets()), [Op::Reset]);
    assert_eq!(rig.counter("timeouts"), 1);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn request_whose_host_gives_up_resets_the_guest() {
    let mut rig = Rig::new();
    let (_, host) = rig.ask(5000);
    drop(host);
    assert_eq!(ops(&rig.packets()), [Op::Reset]);
    assert_eq!(rig.counter("aborted_by_host"), 1);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn guest_that_asks_for_a_served_port_is_answered() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    rig.send_data(key, b"ready");
    assert_eq!(read_now(&mut host, 100).unwrap(), b"ready");
    host.write_all(b"welcome").unwrap();
    assert_eq!(data(&rig.packets()), b"welcome");
    assert_eq!(rig.counter("opened_by_guest"), 1);
}

#[test]
fn guest_that_asks_for_another_port_is_reset() {
    let mut rig = Rig::new();
    for host_port in [UNSERVED, 1026, 0, u32::MAX, 1 << 30] {
        let key = ConnectionKey {
            guest_port: 700,
            host_port,
        };
        rig.send(key, Message::Request, &[]);
        let packets = rig.packets();
        assert_eq!(ops(&packets), [Op::Reset]);
        assert_eq!(packets[0].header.src_port, host_port);
        assert_eq!(packets[0].header.dst_port, 700);
    }
    assert_eq!(rig.counter("refused"), 5);
    assert!(rig.take_opened().is_none());
}

#[test]
fn mebibyte_to_a_slow_host_arrives_whole() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    let bytes = noise(MIB);
    let (mut sent, mut got) = (0, Vec::new());
    while got.len() < bytes.len() {
        let room = rig.guest_room(key).min(64 * 1024);
        let next = &bytes[sent..bytes.len().min(sent + room)];
        if !next.is_empty() {
            rig.send_data(key, next);
            sent += next.len();
        }
        let some = read_now(&mut host, 3000).unwrap();
        assert!(
            !some.is_empty() || sent < bytes.len(),
            "no byte moves any more"
        );
        got.extend(some);
        rig.packets();
        let dump = rig.device.handle().dump();
        assert!(dump.connections[0].buffered <= dump.connections[0].window);
    }
    assert!(got == bytes, "bytes differ");
    assert_eq!(rig.counter("bytes_to_host"), MIB as u64);
    assert_eq!(rig.device.handle().dump().connections[0].buffered, 0);
}

#[test]
fn mebibyte_to_a_slow_guest_arrives_whole() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_host(5000);
    let bytes = noise(MIB);
    let (mut sent, mut got) = (0, Vec::new());
    while got.len() < bytes.len() {
        sent += write_now(&mut host, &bytes[sent..]);
        let packets = rig.packets();
        let arrived = data(&packets);
        let before = rig.accounts[&key].fwd_cnt as usize;
        got.extend(arrived);
        assert!(
            got.len() - before <= 256 * 1024,
            "the device sent beyond its credit"
        );
        rig.guest_reads(key, 5000.min(got.len() - before));
        rig.send(key, Message::CreditUpdate, &[]);
    }
    assert!(got == bytes, "bytes differ");
    assert_eq!(rig.counter("bytes_to_guest"), MIB as u64);
}

#[test]
fn payload_in_many_buffers_arrives_whole() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    let credit = rig.accounts[&key];
    let packet = virtio_wire::vsock::Packet {
        key,
        message: Message::Data { len: 10 },
        credit: virtio_wire::vsock::CreditInfo {
            buf_alloc: credit.buf_alloc,
            fwd_cnt: credit.fwd_cnt,
        },
    };
    // §2.7.4.1: the device makes no assumption on where a buffer ends, not even the header's.
    let mut bytes = packet.to_host(CID).encode().to_vec();
    bytes.extend(b"0123456789 and bytes behind the length");
    rig.send_raw(&[&bytes[..7], &bytes[7..45], &bytes[45..50], &bytes[50..]]);
    assert_eq!(read_now(&mut host, 100).unwrap(), b"0123456789");
}

#[test]
fn stream_without_credit_does_not_wake_the_device() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_host(5000);
    let bytes = noise(MIB);
    let written = write_now(&mut host, &bytes);
    let mut got = data(&rig.packets()).len();
    let more = write_now(&mut host, &bytes[written..]);
    got += data(&rig.packets()).len();
    assert_eq!(got, 256 * 1024, "all the credit is used");
    assert!(written + more > got, "bytes wait in the socket");
    assert!(!rig.would_wake(), "waiting bytes keep the thread busy");
    rig.guest_reads(key, 1000);
    rig.send(key, Message::CreditUpdate, &[]);
    assert_eq!(data(&rig.packets()).len(), 1000);
}

#[test]
fn stream_whose_socket_is_full_does_not_wake_the_device() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    let chunk = noise(32 * 1024);
    while rig.guest_room(key) >= chunk.len() {
        rig.send_data(key, &chunk);
        rig.packets();
    }
    assert!(rig.device.handle().dump().connections[0].buffered > 0);
    assert!(!rig.would_wake());
    assert!(!read_now(&mut host, MIB).unwrap().is_empty());
    assert!(rig.would_wake(), "room in the socket goes unnoticed");
}

#[test]
fn slow_stream_does_not_hold_up_another() {
    let mut rig = Rig::new();
    let (slow, mut slow_host) = rig.open_from_host(5000);
    let (stuck, _stuck_host) = rig.open_from_guest(700);
    let (_, mut quick_host) = rig.open_from_host(5001);
    let (other, mut other_host) = rig.open_from_guest(701);
    write_now(&mut slow_host, &noise(MIB));
    let _ = rig.packets();
    while rig.guest_room(stuck) > 0 {
        let room = rig.guest_room(stuck).min(64 * 1024);
        rig.send_data(stuck, &noise(room));
    }
    quick_host.write_all(b"quick").unwrap();
    let packets = rig.packets();
    let quick = packets.iter().find(|packet| packet.payload == b"quick");
    assert!(quick.is_some_and(|packet| packet.header.src_port != slow.host_port));
    rig.send_data(other, b"also quick");
    assert_eq!(read_now(&mut other_host, 100).unwrap(), b"also quick");
}

#[test]
fn busy_streams_take_turns() {
    let mut rig = Rig::new();
    let (first, mut first_host) = rig.open_from_host(5000);
    let (second, mut second_host) = rig.open_from_host(5001);
    write_now(&mut first_host, &noise(200_000));
    write_now(&mut second_host, &noise(200_000));
    rig.host_events();
    let ports: Vec<u32> = rig
        .take_received()
        .iter()
        .map(|p| p.header.src_port)
        .collect();
    let turns = ports.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(ports.contains(&first.host_port) && ports.contains(&second.host_port));
    assert!(turns >= 4, "{turns} turns");
    let longest = ports.chunk_by(|a, b| a == b).map(<[u32]>::len).max();
    assert_eq!(longest, Some(16));
}

#[test]
fn host_that_ends_its_stream_can_still_read() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_host(5000);
    host.write_all(b"question").unwrap();
    host.shutdown(Half::Write).unwrap();
    let packets = rig.packets();
    assert_eq!(ops(&packets), [Op::Data, Op::Shutdown]);
    assert_eq!(packets[1].header.flags, SEND.to_wire());
    assert_eq!(data(&packets), b"question");
    let answer = noise(100_000);
    rig.send_data(key, &answer[..60_000]);
    rig.send_data(key, &answer[60_000..]);
    rig.send(key, Message::Shutdown(SEND), &[]);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert!(got == answer, "bytes differ");
    let packets = rig.packets();
    assert_eq!(
        packets.last().unwrap().header.flags,
        Shutdown::BOTH.to_wire()
    );
    rig.send(key, Message::Reset, &[]);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn guest_that_ends_its_stream_can_still_read() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    rig.send_data(key, b"question");
    rig.send(key, Message::Shutdown(SEND), &[]);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"question");
    host.write_all(b"answer").unwrap();
    assert_eq!(data(&rig.packets()), b"answer");
    drop(host);
    let packets = rig.packets();
    assert_eq!(
        packets.last().unwrap().header.flags,
        Shutdown::BOTH.to_wire()
    );
}

#[test]
fn end_of_the_guest_comes_behind_bytes_a_full_socket_refused() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    let bytes = noise(rig.guest_room(key));
    for chunk in bytes.chunks(60_000) {
        rig.send_data(key, chunk);
    }
    rig.send(key, Message::Shutdown(SEND), &[]);
    let mut got = Vec::new();
    while let Some(some) = read_now(&mut host, 10_000) {
        got.extend(some);
        rig.packets();
    }
    assert!(got == bytes, "bytes differ");
}

#[test]
fn guest_that_closes_frees_its_port_and_its_bytes_still_arrive() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    let bytes = noise(rig.guest_room(key));
    for chunk in bytes.chunks(60_000) {
        rig.send_data(key, chunk);
    }
    rig.send(key, Message::Shutdown(Shutdown::BOTH), &[]);
    assert_eq!(rig.packets().last().unwrap().header.op, Op::Reset);
    assert_eq!(
        rig.device.handle().dump().connections[0].phase,
        Phase::Draining
    );
    // The same ports serve a new connection while the old one drains.
    let (again, mut new_host) = rig.open_from_guest(700);
    rig.send_data(again, b"new");
    assert_eq!(read_now(&mut new_host, 100).unwrap(), b"new");
    let mut got = Vec::new();
    while let Some(some) = read_now(&mut host, 10_000) {
        got.extend(some);
        rig.packets();
    }
    assert!(got == bytes, "bytes differ");
    rig.send_data(again, b"still there");
    assert_eq!(read_now(&mut new_host, 100).unwrap(), b"still there");
    assert_eq!(rig.connections(), 1);
}

#[test]
fn host_that_closes_lets_the_guest_read_the_rest() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_host(5000);
    host.write_all(b"last words").unwrap();
    drop(host);
    let packets = rig.packets();
    assert_eq!(data(&packets), b"last words");
    assert_eq!(
        packets.last().unwrap().header.flags,
        Shutdown::BOTH.to_wire()
    );
    rig.send(key, Message::Reset, &[]);
    assert_eq!(rig.connections(), 0);
}

#[test]
fn close_never_answered_is_reset_at_the_deadline() {
    let mut rig = Rig::new();
    let (_, host) = rig.open_from_host(5000);
    drop(host);
    let _ = rig.packets();
    rig.after(CLOSE_TIMEOUT);
    assert_eq!(ops(&rig.packets()), [Op::Reset]);
    assert_eq!((rig.connections(), rig.counter("timeouts")), (0, 1));
}

#[test]
fn guest_that_resets_closes_the_host() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    rig.send(key, Message::Reset, &[]);
    assert!(is_over(&mut host));
    assert!(rig.packets().is_empty(), "a reset is never answered");
    assert_eq!(rig.connections(), 0);
}

#[test]
fn guest_that_does_not_receive_any_more_makes_the_host_fail_to_write() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_guest(700);
    let receive = Shutdown {
        receive: true,
        send: false,
    };
    rig.send(key, Message::Shutdown(receive), &[]);
    let error = host.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    rig.send_data(key, b"one way");
    assert_eq!(read_now(&mut host, 100).unwrap(), b"one way");
}

#[test]
fn port_reused_after_a_reset_is_a_new_connection() {
    let mut rig = Rig::new();
    let (key, mut first) = rig.open_from_guest(700);
    rig.send_data(key, b"first");
    rig.send(key, Message::Reset, &[]);
    let old = rig.device.handle().dump();
    assert!(old.connections.is_empty());
    let (key, mut second) = rig.open_from_guest(700);
    rig.send_data(key, b"second");
    assert_eq!(read_now(&mut first, 100).unwrap(), b"first");
    assert_eq!(read_now(&mut first, 100), None);
    assert_eq!(read_now(&mut second, 100).unwrap(), b"second");
    assert_eq!(rig.device.handle().dump().connections[0].generation, 1);
}

#[test]
fn reset_still_unread_does_not_refuse_a_new_request_for_the_same_ports() {
    let mut rig = Rig::new();
    let (key, _first) = rig.open_from_guest(700);
    rig.send(key, Message::Shutdown(Shutdown::BOTH), &[]);
    // The reset was sent at once; the next one waits, since no buffer is left.
    rig.repost = false;
    let _ = rig.packets();
    let mut stray = key;
    while rig.device.handle().dump().pending_resets == 0 {
        stray.guest_port += 1;
        rig.send(stray, Message::CreditUpdate, &[]);
        let _ = rig.take_received();
    }
    rig.forget(stray);
    stray.host_port = SERVED;
    rig.send(stray, Message::Request, &[]);
    assert_eq!(rig.device.handle().dump().pending_resets, 0);
    assert_eq!(rig.device.handle().dump().ready, 1);
}

#[test]
fn thousand_connections_work_at_once() {
    let mut rig = Rig::new();
    let mut ends: Vec<_> = (0..1000).map(|n| rig.open_from_host(n)).collect();
    for (n, (key, host)) in ends.iter_mut().enumerate() {
        rig.send_data(*key, format!("to host {n}").as_bytes());
        host.write_all(format!("to guest {n}").as_bytes()).unwrap();
    }
    let packets = rig.packets();
    for (n, (key, host)) in ends.iter_mut().enumerate() {
        assert_eq!(
            read_now(host, 100).unwrap(),
            format!("to host {n}").as_bytes()
        );
        let mine = packets
            .iter()
            .filter(|p| p.header.src_port == key.host_port);
        let got: Vec<u8> = mine.flat_map(|p| p.payload.clone()).collect();
        assert_eq!(got, format!("to guest {n}").as_bytes());
    }
    for (key, host) in ends {
        drop(host);
        rig.handle(Event::Source(0));
        rig.send(key, Message::Reset, &[]);
    }
    assert_eq!(rig.connections(), 0);
}

#[test]
fn connection_beyond_the_cap_is_refused_from_either_side() {
    let mut rig = Rig::new();
    let mut ends: Vec<_> = (0..MAX_CONNECTIONS)
        .map(|_| rig.open_from_host(1))
        .collect();
    let mut host = rig.dial();
    rig.host_events();
    assert!(is_over(&mut host));
    let key = ConnectionKey {
        guest_port: 700,
        host_port: SERVED,
    };
    rig.send(key, Message::Request, &[]);
    assert_eq!(ops(&rig.packets()), [Op::Reset]);
    assert_eq!(rig.counter("refused_full"), 2);
    let (key, _) = ends.pop().unwrap();
    rig.send(key, Message::Reset, &[]);
    rig.open_from_guest(700);
    let large = rig.device.handle().dump();
    let large = large
        .connections
        .iter()
        .filter(|c| c.window == crate::vsock::LARGE_WINDOW);
    assert_eq!(large.count(), crate::vsock::LARGE_WINDOWS);
}

#[test]
fn packets_of_one_wake_cause_one_interrupt() {
    let mut rig = Rig::new();
    let (_, mut host) = rig.open_from_host(5000);
    rig.receive.set_used_event(u16::MAX); // the driver's mark is far away, unless the device ignores it
    let _ = rig.interrupt.take_used(0);
    write_now(&mut host, &noise(100_000));
    rig.host_events();
    assert!(rig.interrupt.take_used(0) <= 1);
    assert!(rig.take_received().len() > 20);
}

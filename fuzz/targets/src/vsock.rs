// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Targets of the vsock parts that do no I/O; the device as a whole is in [`crate::virtio`].

use std::time::{Duration, Instant};

use ids::GuestCid;
use virtio_device::vsock::{Connection, Input as Step, Phase};
use virtio_wire::vsock::{CreditInfo, Header, MAX_PAYLOAD, Message, Packet, Shutdown};

use crate::Input;

/// A header that is taken as a packet says the same when it is written again.
pub(crate) fn packet(data: &[u8]) {
    let Ok(header) = Header::parse(data) else {
        return;
    };
    let guest = GuestCid::DEFAULT;
    let Ok(packet) = Packet::from_guest(&header, guest) else {
        return;
    };
    if let Message::Data { len } = packet.message {
        assert!(len <= MAX_PAYLOAD);
    }
    assert_eq!(
        Packet::from_guest(&packet.to_host(guest), guest),
        Ok(packet)
    );
}

/// A connection whose guest and host do whatever the bytes say, in any order.
pub(crate) fn connection(data: &[u8]) {
    let mut input = Input::new(data);
    let mut now = Instant::now();
    let window = u32::from(input.u16());
    let first = credit(&mut input);
    let mut largest = first.buf_alloc;
    let mut connection = if input.u8().is_multiple_of(2) {
        Connection::request(window, now)
    } else {
        match Connection::accept(window, first) {
            Ok(connection) => connection,
            Err(_) => return,
        }
    };
    while !input.is_empty() {
        let before = connection.phase();
        let step = step(&mut input, &mut now);
        if let Step::Guest(_, credit) = step {
            largest = largest.max(credit.buf_alloc);
        }
        let effects = connection.step(step, now);
        check(&connection, before, window);
        if effects.abort.is_some() {
            assert_eq!(connection.phase(), Phase::Closed);
        }
        for _ in 0..16 {
            let expected = connection.has_control();
            assert_eq!(connection.next_control().is_some(), expected);
            connection.credit();
        }
        assert!(!connection.has_control(), "it always has another packet");
        let room = connection.data_room();
        assert!(room <= MAX_PAYLOAD);
        connection.sent(room.min(u32::from(input.u16())));
        assert!(connection.to_guest().in_flight() <= largest);
    }
}

fn check(connection: &Connection, before: Phase, window: u32) {
    assert!(connection.from_guest().buffered() <= window);
    let phase = connection.phase();
    match before {
        Phase::Closed => assert_eq!(phase, Phase::Closed),
        Phase::Draining => assert!(matches!(phase, Phase::Draining | Phase::Closed)),
        Phase::Closing => assert!(matches!(phase, Phase::Closing | Phase::Closed)),
        Phase::Open => assert!(phase != Phase::Connecting),
        Phase::Connecting => assert!(phase != Phase::Closing),
    }
    let waits = matches!(phase, Phase::Connecting | Phase::Closing);
    assert_eq!(connection.deadline().is_some(), waits);
}

fn credit(input: &mut Input<'_>) -> CreditInfo {
    let wild = input.u8() == 255;
    CreditInfo {
        buf_alloc: if wild {
            input.u32()
        } else {
            u32::from(input.u16())
        },
        fwd_cnt: if wild {
            input.u32()
        } else {
            u32::from(input.u8())
        },
    }
}

fn step(input: &mut Input<'_>, now: &mut Instant) -> Step {
    let message = match input.u8() % 16 {
        0 => Message::Request,
        1 | 2 => Message::Response,
        3 => Message::Reset,
        4 => Message::Shutdown(Shutdown::from_wire(u32::from(input.u8()))),
        5..=7 => Message::Data {
            len: u32::from(input.u16()),
        },
        8 => Message::CreditUpdate,
        9 => Message::CreditRequest,
        10 | 11 => return Step::HostTook(u32::from(input.u16())),
        12 => return Step::HostEnded,
        13 => return Step::HostStoppedReading,
        14 => return Step::HostTook(u32::MAX),
        _ => {
            *now += Duration::from_secs(u64::from(input.u8()));
            return Step::Tick;
        }
    };
    Step::Guest(message, credit(input))
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Two connection machines talk to each other over channels that keep order and lose nothing, under any schedule.
//!
//! Checked in every run: no byte is lost, doubled or reordered; no side sends beyond its credit (the other would
//! abort); the talk ends; both machines end closed.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// A packet on its way.
struct InFlight {
    message: Message,
    credit: CreditInfo,
    payload: Vec<u8>,
}

/// One side: the machine, and the local stream at its other end.
struct Side {
    machine: Option<Connection>,
    /// What the local writer has written and the machine has not sent.
    to_send: VecDeque<u8>,
    writer_done: bool,
    /// Bytes received and not yet taken by the local reader.
    buffer: VecDeque<u8>,
    /// Everything the local reader got.
    got: Vec<u8>,
    reader_saw_end: bool,
    reader_gone: bool,
    written: Vec<u8>,
    reset_owed: bool,
    aborted: Option<Abort>,
}

impl Side {
    fn new() -> Self {
        Self {
            machine: None,
            to_send: VecDeque::new(),
            writer_done: false,
            buffer: VecDeque::new(),
            got: Vec::new(),
            reader_saw_end: false,
            reader_gone: false,
            written: Vec::new(),
            reset_owed: false,
            aborted: None,
        }
    }

    fn apply(&mut self, effects: Effects, payload: Vec<u8>) {
        if effects.deliver {
            self.buffer.extend(payload);
        }
        if effects.shutdown_host_write {
            assert!(self.buffer.is_empty(), "the end came before the last byte");
            self.reader_saw_end = true;
        }
        if effects.shutdown_host_read {
            self.writer_done = true;
            self.to_send.clear();
        }
        self.reset_owed |= effects.reset_guest;
        self.aborted = self.aborted.or(effects.abort);
    }

    fn phase(&self) -> Phase {
        self.machine
            .as_ref()
            .map_or(Phase::Closed, Connection::phase)
    }

    /// The next packet this side has for the other.
    fn next_packet(&mut self) -> Option<InFlight> {
        if std::mem::take(&mut self.reset_owed) {
            let credit = CreditInfo {
                buf_alloc: 0,
                fwd_cnt: 0,
            };
            return Some(InFlight {
                message: Message::Reset,
                credit,
                payload: Vec::new(),
            });
        }
        let machine = self.machine.as_mut()?;
        if let Some(message) = machine.next_control() {
            let credit = machine.credit();
            return Some(InFlight {
                message,
                credit,
                payload: Vec::new(),
            });
        }
        if self.to_send.is_empty() {
            return None;
        }
        let room = machine.data_room() as usize;
        let payload: Vec<u8> = self.to_send.drain(..room.min(self.to_send.len())).collect();
        if payload.is_empty() {
            return None;
        }
        let len = u32::try_from(payload.len()).unwrap();
        machine.sent(len);
        let credit = machine.credit();
        Some(InFlight {
            message: Message::Data { len },
            credit,
            payload,
        })
    }
}

/// What the schedule does next, to side 0 or 1.
#[derive(Debug, Clone)]
enum Move {
    Write(usize, u16),
    EndWriting(usize),
    Read(usize, u16),
    StopReading(usize),
    Send(usize),
    Deliver(usize),
}

struct World {
    sides: [Side; 2],
    /// What is on its way to each side.
    channels: [VecDeque<InFlight>; 2],
    now: Instant,
    window: u32,
    seed: u8,
}

impl World {
    fn new(window: u32) -> Self {
        let now = Instant::now();
        let mut sides = [Side::new(), Side::new()];
        sides[0].machine = Some(Connection::request(window, now));
        Self {
            sides,
            channels: [VecDeque::new(), VecDeque::new()],
            now,
            window,
            seed: 0,
        }
    }

    fn step(&mut self, side: usize, input: Input, payload: Vec<u8>) {
        let now = self.now;
        let side = &mut self.sides[side];
        if let Some(machine) = side.machine.as_mut() {
            let effects = machine.step(input, now);
            let closed = machine.phase() == Phase::Closed;
            side.apply(effects, payload);
            if closed && effects.abort.is_none() {
                assert!(side.buffer.is_empty(), "closed before the last byte");
                side.reader_saw_end = true;
            }
        }
    }

    /// Returns whether anything happened.
    fn apply(&mut self, next: &Move) -> bool {
        match *next {
            Move::Write(n, len) => self.write(n, len),
            Move::EndWriting(n) => {
                let news = !self.sides[n].writer_done;
                self.sides[n].writer_done = true;
                news
            }
            Move::Read(n, len) => self.read(n, len),
            Move::StopReading(n) => {
                let news = !self.sides[n].reader_gone && self.sides[n].machine.is_some();
                if news {
                    self.sides[n].reader_gone = true;
                    self.sides[n].buffer.clear();
                    self.step(n, Input::HostStoppedReading, Vec::new());
                }
                news
            }
            Move::Send(n) => self.send(n),
            Move::Deliver(n) => self.deliver(n),
        }
    }

    fn write(&mut self, n: usize, len: u16) -> bool {
        let side = &mut self.sides[n];
        if side.writer_done || side.phase() != Phase::Open {
            return false;
        }
        for _ in 0..len {
            self.seed = self.seed.wrapping_mul(5).wrapping_add(3);
            side.to_send.push_back(self.seed);
            side.written.push(self.seed);
        }
        len > 0
    }

    fn read(&mut self, n: usize, len: u16) -> bool {
        let side = &mut self.sides[n];
        let taken: Vec<u8> = side
            .buffer
            .drain(..usize::from(len).min(side.buffer.len()))
            .collect();
        if taken.is_empty() {
            return false;
        }
        side.got.extend(&taken);
        self.step(
            n,
            Input::HostTook(u32::try_from(taken.len()).unwrap()),
            Vec::new(),
        );
        true
    }

    fn send(&mut self, n: usize) -> bool {
        if let Some(packet) = self.sides[n].next_packet() {
            self.channels[1 - n].push_back(packet);
            return true;
        }
        let side = &self.sides[n];
        let ended = side.writer_done && side.to_send.is_empty();
        let machine = side.machine.as_ref();
        let told = machine.is_none_or(|machine| machine.given_up().1.send);
        if ended && !told && side.phase() == Phase::Open {
            self.step(n, Input::HostEnded, Vec::new());
            return true;
        }
        false
    }

    fn deliver(&mut self, n: usize) -> bool {
        let Some(packet) = self.channels[n].pop_front() else {
            return false;
        };
        let side = &mut self.sides[n];
        if side.machine.is_none() {
            assert_eq!(packet.message, Message::Request);
            let accepted = Connection::accept(self.window, packet.credit).unwrap();
            side.machine = Some(accepted);
        } else if side.machine.as_ref().is_some_and(Connection::holds_ports) {
            let input = Input::Guest(packet.message, packet.credit);
            self.step(n, input, packet.payload);
        } else if packet.message != Message::Reset {
            side.reset_owed = true; // what the muxer does for ports it does not know
        }
        true
    }

    /// Lets everything flow until nothing moves.
    fn settle(&mut self) {
        for _ in 0..100_000 {
            let mut moved = false;
            for n in 0..2 {
                moved |= self.apply(&Move::Deliver(n));
                moved |= self.apply(&Move::Send(n));
                moved |= self.apply(&Move::Read(n, u16::MAX));
            }
            if !moved {
                return;
            }
        }
        panic!("the two sides never come to rest");
    }

    fn check_prefix(&self) {
        for n in 0..2 {
            let (got, written) = (&self.sides[n].got, &self.sides[1 - n].written);
            assert!(written.starts_with(got), "bytes lost, doubled or reordered");
        }
    }
}

fn any_move() -> impl Strategy<Value = Move> {
    let side = 0..2usize;
    prop_oneof![
        6 => (side.clone(), 0..700u16).prop_map(|(n, len)| Move::Write(n, len)),
        6 => (side.clone(), 1..900u16).prop_map(|(n, len)| Move::Read(n, len)),
        10 => side.clone().prop_map(Move::Send),
        10 => side.clone().prop_map(Move::Deliver),
        1 => side.clone().prop_map(Move::EndWriting),
        1 => side.prop_map(Move::StopReading),
    ]
}

fn orderly_move() -> impl Strategy<Value = Move> {
    any_move().prop_map(|next| match next {
        Move::StopReading(n) => Move::Send(n),
        other => other,
    })
}

proptest! {
    /// Nobody hangs up early: every byte arrives, and neither side ever aborts.
    #[test]
    fn orderly_streams_arrive_whole(
        window in 1..2000u32,
        moves in prop::collection::vec(orderly_move(), 0..250),
    ) {
        let mut world = World::new(window);
        for next in &moves {
            world.apply(next);
            world.check_prefix();
        }
        world.settle();
        world.apply(&Move::EndWriting(0));
        world.apply(&Move::EndWriting(1));
        world.settle();
        for n in 0..2 {
            prop_assert_eq!(&world.sides[n].got, &world.sides[1 - n].written);
            prop_assert!(world.sides[n].reader_saw_end);
            prop_assert_eq!(world.sides[n].aborted, None);
            prop_assert_eq!(world.sides[n].phase(), Phase::Closed);
        }
    }

    /// Readers may hang up at any time: what arrived is a prefix, and both sides still end closed.
    #[test]
    fn streams_cut_off_leave_nothing_behind(
        window in 1..2000u32,
        moves in prop::collection::vec(any_move(), 0..250),
    ) {
        let mut world = World::new(window);
        for next in &moves {
            world.apply(next);
            world.check_prefix();
        }
        world.settle();
        for n in 0..2 {
            world.apply(&Move::EndWriting(n));
            world.apply(&Move::StopReading(n));
        }
        world.settle();
        world.check_prefix();
        for n in 0..2 {
            prop_assert_eq!(world.sides[n].phase(), Phase::Closed);
            prop_assert!(world.sides[n].buffer.is_empty());
            let credit = matches!(world.sides[n].aborted, Some(Abort::Credit | Abort::Timeout));
            prop_assert!(!credit, "aborted for {:?}", world.sides[n].aborted);
        }
    }

    /// A hostile guest: any packets in any order. The machine never panics, never sends beyond what it was granted,
    /// and never takes in more than its window.
    #[test]
    fn hostile_guest_stays_within_bounds(
        inputs in prop::collection::vec(hostile_input(), 0..200),
        window in 0..5000u32,
        accepted in any::<bool>(),
    ) {
        let now = Instant::now();
        let credit = CreditInfo { buf_alloc: 100, fwd_cnt: 0 };
        let mut machine = if accepted {
            Connection::accept(window, credit).unwrap()
        } else {
            Connection::request(window, now)
        };
        for input in inputs {
            let before = machine.phase();
            let effects = machine.step(input, now);
            prop_assert!(machine.from_guest().buffered() <= window);
            if let Some(abort) = effects.abort {
                prop_assert!(before != Phase::Closed);
                prop_assert_eq!(machine.phase(), Phase::Closed, "{:?}", abort);
            }
            while machine.next_control().is_some() {
                machine.credit();
            }
            let room = machine.data_room();
            prop_assert!(room <= MAX_PAYLOAD);
            machine.sent(room / 2);
        }
    }
}

fn hostile_input() -> impl Strategy<Value = Input> {
    let message = prop_oneof![
        1 => Just(Message::Request),
        1 => Just(Message::Response),
        1 => Just(Message::Reset),
        3 => any::<u32>().prop_map(|flags| Message::Shutdown(Shutdown::from_wire(flags))),
        6 => (0..3000u32).prop_map(|len| Message::Data { len }),
        3 => Just(Message::CreditUpdate),
        3 => Just(Message::CreditRequest),
    ];
    let credit = (any::<u32>(), prop_oneof![Just(0), 0..2000u32, any::<u32>()])
        .prop_map(|(buf_alloc, fwd_cnt)| CreditInfo { buf_alloc, fwd_cnt });
    prop_oneof![
        8 => (message, credit).prop_map(|(message, credit)| Input::Guest(message, credit)),
        2 => any::<u32>().prop_map(Input::HostTook),
        1 => Just(Input::HostEnded),
        1 => Just(Input::HostStoppedReading),
        1 => Just(Input::Tick),
    ]
}

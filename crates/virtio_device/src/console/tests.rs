// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The console from the driver's side.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;
use virtio_testdriver::{ChainBuilder, TestDriver, TestMemory};
use virtio_wire::Features;

use super::*;
use crate::testing::{Space, TestInterrupt, activation, counter, kick, queue_state};
use crate::{DeviceError, DeviceState, Event, Progress, VirtioDevice, Worker};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

struct Rig {
    mem: TestMemory,
    receive: TestDriver,
    transmit: TestDriver,
    console: Console,
    worker: Box<dyn Worker>,
    log: Arc<ConsoleLog>,
    interrupt: Arc<TestInterrupt>,
}

fn rig_with(log: ConsoleLog) -> Rig {
    let mut mem = TestMemory::new(1 << 20);
    let receive = TestDriver::new(&mut mem, 16);
    let transmit = TestDriver::new(&mut mem, 16);
    let interrupt = Arc::new(TestInterrupt::default());
    let log = Arc::new(log);
    let mut console = Console::new(Arc::clone(&log)).unwrap();
    let queues = vec![queue_state(&receive), queue_state(&transmit)];
    let worker = console
        .activate(activation(&mem, queues, Features::COMMON, &interrupt))
        .unwrap()
        .remove(0);
    Rig {
        mem,
        receive,
        transmit,
        console,
        worker,
        log,
        interrupt,
    }
}

fn rig() -> Rig {
    rig_with(ConsoleLog::new(None))
}

impl Rig {
    fn print(&mut self, text: &[u8]) {
        let chain = ChainBuilder::new().readable(&mut self.mem, text);
        self.transmit.add(&mut self.mem, &chain);
        kick(&mut *self.worker, TRANSMIT).unwrap();
        assert_eq!(self.transmit.pop_used().unwrap().written, 0);
    }

    /// Offers a receive buffer; returns its address.
    fn offer(&mut self, len: usize) -> u64 {
        let chain = ChainBuilder::new().writable(&mut self.mem, len);
        self.receive.add(&mut self.mem, &chain);
        chain.buffers()[0].addr
    }

    fn input_event(&mut self) {
        assert_eq!(
            self.worker.handle(Event::Source(0)).unwrap(),
            Progress::Idle
        );
    }

    fn input_is_readable(&self) -> bool {
        let (_, fd) = self.worker.sources()[0];
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }

    fn counter(&self, name: &str) -> u64 {
        counter(&VirtioDevice::<Space>::metrics(&self.console), name)
    }
}

fn file_content(file: &mut File) -> Vec<u8> {
    let mut content = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut content).unwrap();
    content
}

#[test]
fn output_is_kept_in_order_and_buffers_come_back() {
    let mut rig = rig();
    rig.print(b"Kernel panic - not syncing: ");
    rig.print(b"no init");
    assert_eq!(rig.log.tail(), b"Kernel panic - not syncing: no init");
    assert_eq!(rig.counter("output_bytes"), 35);
    assert_eq!(rig.counter("file_dropped_bytes"), 0);
}

proptest! {
    #[test]
    fn tail_is_the_end_of_all_output(lens in prop::collection::vec(0usize..100_000, 0..8)) {
        let log = ConsoleLog::new(None);
        let mut all = Vec::new();
        for (i, len) in lens.into_iter().enumerate() {
            let piece: Vec<u8> = (0..len).map(|j| (i * 31 + j).to_le_bytes()[0]).collect();
            log.append(&piece);
            all.extend(piece);
        }
        let oldest = all.len().saturating_sub(TAIL_BYTES);
        prop_assert_eq!(log.tail(), &all[oldest..]);
        prop_assert_eq!(log.printed(), all.len() as u64);
        // In parts, each from where the last one ended.
        let (mut next, mut parts) = (0, Vec::new());
        loop {
            let (first, part) = log.part(next, 10_000);
            prop_assert!(first >= next && part.len() <= 10_000);
            prop_assert_eq!(&all[usize::try_from(first).unwrap()..][..part.len()], &part);
            if part.is_empty() {
                break;
            }
            next = first + part.len() as u64;
            parts.extend(part);
        }
        prop_assert_eq!(parts, &all[oldest..]);
        prop_assert_eq!(log.part(u64::MAX, 1), (all.len() as u64, Vec::new()));
    }
}

#[test]
fn file_takes_output_up_to_its_cap_and_says_so() {
    let mut file = tempfile::tempfile().unwrap();
    let log = ConsoleLog::new(Some(LogFile::new(file.try_clone().unwrap(), 10)));
    let mut rig = rig_with(log);
    rig.print(b"123456");
    assert_eq!(file_content(&mut file), b"123456");
    rig.print(b"789abcdef");
    rig.print(b"more");
    assert_eq!(
        file_content(&mut file),
        b"123456789a\n[console log is full; later output is dropped]\n"
    );
    assert_eq!(rig.counter("file_dropped_bytes"), 9);
    assert_eq!(
        rig.log.tail(),
        b"123456789abcdefmore",
        "memory still has it"
    );
}

#[test]
fn file_that_fails_costs_the_file_only() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut rig = rig_with(ConsoleLog::new(Some(LogFile::new(full, 100))));
    rig.print(b"hello");
    rig.print(b"world");
    assert_eq!(rig.log.tail(), b"helloworld");
    assert_eq!(rig.counter("file_dropped_bytes"), 10);
}

#[test]
fn file_that_failed_once_is_not_tried_again() {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
    let (mut reader, mut writer) = (File::from(reader), File::from(writer));
    while writer.write(&[b'-'; 4096]).is_ok() {}
    let mut rig = rig_with(ConsoleLog::new(Some(LogFile::new(writer, u64::MAX))));
    rig.print(b"does not fit");
    while reader.read(&mut [0; 4096]).is_ok() {}
    rig.print(b"would fit");
    assert!(reader.read(&mut [0; 1]).is_err(), "nothing more is written");
    assert_eq!(rig.counter("file_dropped_bytes"), 21);
}

#[test]
fn request_at_the_cap_is_printed_and_past_it_retires_the_device() {
    let mut at_cap = rig();
    at_cap.transmit.add(
        &mut at_cap.mem,
        &ChainBuilder::new().raw(0, MAX_CHAIN_BYTES, 0),
    );
    kick(&mut *at_cap.worker, TRANSMIT).unwrap();
    assert_eq!(at_cap.counter("output_bytes"), u64::from(MAX_CHAIN_BYTES));
    let mut past = rig();
    let chain = ChainBuilder::new().raw(0, MAX_CHAIN_BYTES, 0).raw(0, 1, 0);
    past.transmit.add(&mut past.mem, &chain);
    assert!(matches!(
        kick(&mut *past.worker, TRANSMIT),
        Err(DeviceError::Chain { .. })
    ));
}

#[test]
fn input_waits_for_buffers_and_buffers_for_input() {
    let mut rig = rig();
    let input = rig.console.input();
    assert_eq!(input.send(b"ls -l\n"), 6);
    rig.input_event();
    assert!(rig.receive.pop_used().is_none());
    assert!(
        !rig.input_is_readable(),
        "the event is taken, or the I/O thread would spin"
    );

    let first = rig.offer(4);
    let second = rig.offer(16);
    kick(&mut *rig.worker, RECEIVE).unwrap();
    assert_eq!(rig.receive.pop_used().unwrap().written, 4);
    assert_eq!(rig.receive.pop_used().unwrap().written, 2);
    assert_eq!(rig.mem.read(first, 4), b"ls -");
    assert_eq!(rig.mem.read(second, 2), b"l\n");
    assert_eq!(rig.interrupt.take_used(RECEIVE), 1);

    let third = rig.offer(16);
    kick(&mut *rig.worker, RECEIVE).unwrap();
    assert!(
        rig.receive.pop_used().is_none(),
        "no input, no empty answer"
    );
    input.send(b"x");
    assert!(rig.input_is_readable());
    rig.input_event();
    assert_eq!(rig.receive.pop_used().unwrap().written, 1);
    assert_eq!(rig.mem.read(third, 1), b"x");
    assert_eq!(rig.counter("input_bytes"), 7);

    input.send(b"y");
    rig.input_event();
    assert_eq!(
        rig.receive.avail_event(),
        3,
        "the next buffer is to be kicked for"
    );
}

#[test]
fn input_at_the_cap_is_kept_and_more_is_not() {
    let input = rig().console.input();
    assert_eq!(input.send(&[1; INPUT_BYTES - 1]), INPUT_BYTES - 1);
    assert_eq!(input.send(&[1; 2]), 1);
    assert_eq!(input.send(&[1; 2]), 0);
}

#[test]
fn receive_buffer_without_room_retires_the_device() {
    let mut rig = rig();
    let chain = ChainBuilder::new().readable(&mut rig.mem, b"not writable");
    rig.receive.add(&mut rig.mem, &chain);
    rig.console.input().send(b"x");
    assert!(matches!(
        kick(&mut *rig.worker, RECEIVE),
        Err(DeviceError::Chain { .. })
    ));
}

#[test]
fn driver_with_one_queue_enabled_is_served() {
    let mut rig = rig();
    let queues = vec![Default::default(), queue_state(&rig.transmit)];
    let activation = activation(&rig.mem, queues, Features::COMMON, &rig.interrupt);
    rig.worker = rig.console.activate(activation).unwrap().remove(0);
    assert_eq!(rig.worker.queues(), [TRANSMIT]);
    rig.console.input().send(b"nobody reads this");
    rig.input_event();
    rig.print(b"ok");
}

#[test]
fn input_in_flight_survives_reset_and_output_goes_on() {
    let mut rig = rig();
    rig.console.input().send(b"typed early");
    rig.input_event();
    rig.print(b"before ");
    rig.worker.pause();
    VirtioDevice::<Space>::reset(&mut rig.console);
    rig.receive = TestDriver::new(&mut rig.mem, 16);
    rig.transmit = TestDriver::new(&mut rig.mem, 16);
    let queues = vec![queue_state(&rig.receive), queue_state(&rig.transmit)];
    let activation = activation(&rig.mem, queues, Features::COMMON, &rig.interrupt);
    rig.worker = rig.console.activate(activation).unwrap().remove(0);
    let buffer = rig.offer(32);
    kick(&mut *rig.worker, RECEIVE).unwrap();
    assert_eq!(rig.mem.read(buffer, 11), b"typed early");
    rig.print(b"after");
    assert_eq!(rig.log.tail(), b"before after");
}

#[test]
fn restored_console_prints_what_was_waiting() {
    let mut rig = rig();
    let chain = ChainBuilder::new().readable(&mut rig.mem, b"waiting");
    rig.transmit.add(&mut rig.mem, &chain);
    let queues = rig
        .worker
        .pause()
        .into_iter()
        .map(|(_, state)| state)
        .collect();
    let saved = serde_json::to_string(&VirtioDevice::<Space>::save(&rig.console)).unwrap();

    let log = Arc::new(ConsoleLog::new(None));
    let mut other = Console::new(Arc::clone(&log)).unwrap();
    let state: DeviceState = serde_json::from_str(&saved).unwrap();
    VirtioDevice::<Space>::restore(&mut other, &state).unwrap();
    let activation = activation(&rig.mem, queues, Features::COMMON, &rig.interrupt);
    let mut worker = other.activate(activation).unwrap().remove(0);
    kick(&mut *worker, TRANSMIT).unwrap();
    assert_eq!(log.tail(), b"waiting");

    for text in [r#"{"Console":{"version":9}}"#, r#"{"Rng":{"version":1}}"#] {
        let state: DeviceState = serde_json::from_str(text).unwrap();
        assert!(
            VirtioDevice::<Space>::restore(&mut other, &state).is_err(),
            "{text}"
        );
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Registers, pause, save, restore, reset.

use std::io::Write;
use std::time::Duration;

use virtio_wire::vsock::{Message, Op};
use virtio_wire::{DeviceId, Features};

use super::guest::*;
use crate::testing::Space;
use crate::vsock::CONNECT_TIMEOUT;
use crate::{DeviceState, Event, Progress, VirtioDevice};

fn as_device(rig: &mut Rig) -> &mut dyn VirtioDevice<Space> {
    &mut rig.device
}

#[test]
fn registers_say_what_the_specification_says() {
    let mut rig = Rig::new();
    let device = as_device(&mut rig);
    assert_eq!(device.kind(), DeviceId::VSOCK);
    assert_eq!(device.features(), Features::COMMON);
    assert_eq!(device.queue_sizes().len(), 3);
    let mut cid = [0xff; 10];
    device.read_config(0, &mut cid);
    assert_eq!(cid, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    device.write_config(0, &[9]);
    let mut low = [0xff; 4];
    device.read_config(0, &mut low);
    assert_eq!(low, [3, 0, 0, 0]);
}

#[test]
fn connections_live_through_a_pause() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.open_from_host(5000);
    host.write_all(b"before it").unwrap();
    rig.pause_for(Duration::from_secs(3600));
    for queue in 0..3 {
        rig.handle(Event::Queue(queue));
    }
    assert_eq!(data(&rig.packets()), b"before it");
    rig.send_data(key, b"after it");
    assert_eq!(read_now(&mut host, 100).unwrap(), b"after it");
}

#[test]
fn time_of_a_pause_does_not_count_for_deadlines() {
    let mut rig = Rig::new();
    let (key, mut host) = rig.ask(5000);
    let mut silent = rig.dial();
    silent.write_all(b"CONN").unwrap();
    rig.host_events();
    rig.pause_for(Duration::from_secs(3600));
    rig.handle(Event::Source(0));
    rig.handle(Event::Source(0));
    assert_eq!(rig.connections(), 2);
    rig.send(key, Message::Response, &[]);
    assert!(!read_now(&mut host, 100).unwrap().is_empty());
    rig.after(CONNECT_TIMEOUT);
    assert!(is_over(&mut silent));
}

#[test]
fn restored_guest_hears_of_it_before_anything_else() {
    let mut rig = Rig::new();
    let (_, mut old_host) = rig.open_from_host(5000);
    let _ = rig.interrupt.take_used(2);
    rig.restore_elsewhere();
    assert!(is_over(&mut old_host), "the old device has gone");
    let mut host = rig.dial();
    host.write_all(b"CONNECT 6000\n").unwrap();
    for queue in 0..3 {
        rig.handle(Event::Queue(queue));
    }
    assert!(
        rig.packets().is_empty(),
        "a packet before the event is taken in"
    );
    assert_eq!(rig.interrupt.take_used(2), 1);
    let event = rig.events.pop_used().unwrap();
    assert_eq!(event.written, 4);
    // Linux handles the event, gives the buffer back and kicks.
    rig.post_event_buffer();
    rig.handle(Event::Queue(2));
    assert_eq!(ops(&rig.packets()), [Op::Request]);
}

#[test]
fn restored_guest_without_an_event_buffer_hears_once_it_gives_one() {
    let mut rig = Rig::new();
    rig.restore_elsewhere();
    rig.handle(Event::Queue(2));
    assert!(rig.events.pop_used().is_some());
    // The next restore finds no buffer.
    rig.restore_elsewhere();
    rig.handle(Event::Queue(2));
    assert!(rig.events.pop_used().is_none());
    let addr = rig.post_event_buffer();
    rig.mem.write(addr, &[0xff; 8]);
    rig.handle(Event::Queue(2));
    assert!(rig.events.pop_used().is_some());
    assert_eq!(rig.mem.read(addr, 8), [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    rig.post_event_buffer();
    rig.handle(Event::Queue(2));
    rig.open_from_guest(700);
}

#[test]
fn restored_guest_that_is_paused_before_it_has_heard_still_hears() {
    let mut rig = Rig::new();
    rig.restore_elsewhere();
    rig.pause_for(Duration::from_secs(1));
    rig.handle(Event::Queue(2));
    assert_eq!(rig.events.pop_used().unwrap().written, 4);
}

#[test]
fn packets_unsent_at_the_save_are_taken_up_by_the_restored_device() {
    let mut rig = Rig::new();
    let (key, _host) = rig.open_from_guest(700);
    // In flight: the guest has published a packet that the device has not seen.
    let header = virtio_wire::vsock::Packet {
        key,
        message: Message::CreditUpdate,
        credit: virtio_wire::vsock::CreditInfo {
            buf_alloc: 1,
            fwd_cnt: 0,
        },
    };
    let bytes = header.to_host(CID).encode();
    let chain = virtio_testdriver::ChainBuilder::new().readable(&mut rig.mem, &bytes);
    rig.transmit.add(&mut rig.mem, &chain);
    rig.restore_elsewhere();
    for queue in 0..3 {
        rig.handle(Event::Queue(queue));
    }
    assert_eq!(rig.transmit.drain_used().len(), 1);
    // With EVENT_IDX the guest kicks only at this mark: it must be the next packet.
    assert_eq!(rig.transmit.avail_event(), rig.pause()[1].next_avail);
    assert!(rig.events.pop_used().is_some());
    rig.post_event_buffer();
    rig.handle(Event::Queue(2));
    assert_eq!(
        ops(&rig.packets()),
        [Op::Reset],
        "the connection has not survived"
    );
    rig.open_from_guest(701);
}

#[test]
fn state_saved_and_restored_is_the_same() {
    let mut rig = Rig::new();
    let state = as_device(&mut rig).save();
    let json = serde_json::to_string(&state).unwrap();
    let back: DeviceState = serde_json::from_str(&json).unwrap();
    as_device(&mut rig).restore(&back).unwrap();
    assert_eq!(as_device(&mut rig).save(), state);
}

#[test]
fn state_of_another_device_version_or_guest_is_refused() {
    let mut rig = Rig::new();
    let good = serde_json::to_string(&as_device(&mut rig).save()).unwrap();
    for (from, to) in [
        ("\"version\":1", "\"version\":2"),
        ("\"guest_cid\":3", "\"guest_cid\":4"),
    ] {
        let bad = good.replace(from, to);
        assert_ne!(bad, good);
        let state: DeviceState = serde_json::from_str(&bad).unwrap();
        assert!(as_device(&mut rig).restore(&state).is_err());
    }
    let log = std::sync::Arc::new(crate::console::ConsoleLog::new(None));
    let console = crate::console::Console::new(log).unwrap();
    let state = VirtioDevice::<Space>::save(&console);
    assert!(as_device(&mut rig).restore(&state).is_err());
}

#[test]
fn reset_by_the_driver_closes_every_connection() {
    let mut rig = Rig::new();
    let (_, mut first) = rig.open_from_host(5000);
    let (_, mut second) = rig.open_from_guest(700);
    rig.pause();
    as_device(&mut rig).reset();
    assert!(is_over(&mut first) && is_over(&mut second));
    assert_eq!(rig.connections(), 0);
}

#[test]
fn kicks_for_receive_buffers_are_asked_for_only_while_packets_wait() {
    let mut rig = Rig::with_features(Features::VERSION_1);
    let (_, mut host) = rig.open_from_host(5000);
    rig.repost = false;
    host.write_all(b"x").unwrap();
    let _ = rig.packets();
    assert_eq!(rig.receive.used_flags(), 1, "buffers are plenty: no kicks");
    rig.repost = true;
    write_now(&mut host, &noise(200_000));
    write_now(&mut host, &noise(200_000));
    rig.host_events();
    let before = rig.receive.used_flags();
    let starved = rig.device.handle().dump().ready > 0;
    assert_eq!(
        before == 0,
        starved,
        "kicks exactly while packets wait for buffers"
    );
    assert!(!data(&rig.packets()).is_empty());
}

#[test]
fn device_without_its_data_queues_has_no_worker() {
    let mut rig = Rig::new();
    let queues = vec![crate::QueueState::default(); 3];
    let activation = crate::testing::activation(&rig.mem, queues, Features::COMMON, &rig.interrupt);
    assert!(as_device(&mut rig).activate(activation).unwrap().is_empty());
}

#[test]
fn wake_for_nothing_does_nothing() {
    let mut rig = Rig::new();
    for event in [
        Event::Queue(0),
        Event::Queue(1),
        Event::Queue(2),
        Event::Source(0),
    ] {
        assert_eq!(rig.worker.handle(event).unwrap(), Progress::Idle);
    }
    assert!(rig.packets().is_empty());
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The device against back ends that keep to the protocol, and against those that do not. What a real one does with it is
//! tested beside the file server.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use virtio_testdriver::{Reply, TestDriver, TestMemory, Told, honest, run_back_end};
use virtio_wire::vhost_user::{Region, Request};
use virtio_wire::{DeviceId, Features};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::testing::{Space, TestInterrupt, activation, counter, queue_state};
use crate::{DeviceError, DeviceState, Event, VirtioDevice, Worker};

struct Rig {
    device: Fs,
    mem: TestMemory,
    drivers: Vec<TestDriver>,
    interrupt: Arc<TestInterrupt>,
    losses: Arc<Mutex<Vec<String>>>,
    back_end: JoinHandle<Vec<Told>>,
    kicks: Vec<Arc<EventFd>>,
}

fn rig(behaviour: impl FnMut(&Told) -> Reply + Send + 'static) -> Result<Rig, DeviceError> {
    rig_with_tag("volumes", behaviour)
}

fn rig_with_tag(
    tag: &str,
    behaviour: impl FnMut(&Told) -> Reply + Send + 'static,
) -> Result<Rig, DeviceError> {
    let (connection, theirs) = UnixStream::pair().unwrap();
    let back_end = run_back_end(theirs, behaviour);
    let mut mem = TestMemory::new(1 << 20);
    let drivers = vec![TestDriver::new(&mut mem, 16), TestDriver::new(&mut mem, 16)];
    let kicks: Vec<_> = (0..2)
        .map(|_| Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
        .collect();
    let losses = Arc::new(Mutex::new(Vec::new()));
    let device = Fs::new(FsOptions {
        tag: tag.to_owned(),
        connection,
        memory: Arc::new(File::open("/dev/null").unwrap()),
        regions: vec![Region {
            address: 0,
            len: 1 << 20,
            offset: 0,
        }],
        kicks: kicks.clone(),
        on_loss: Box::new({
            let losses = Arc::clone(&losses);
            move |text| losses.lock().unwrap().push(text)
        }),
    })?;
    Ok(Rig {
        device,
        mem,
        drivers,
        interrupt: Arc::default(),
        losses,
        back_end,
        kicks,
    })
}

impl Rig {
    fn go_live(&mut self) -> Result<Box<dyn Worker>, DeviceError> {
        let queues = self.drivers.iter().map(queue_state).collect();
        let activation = activation(&self.mem, queues, Features::COMMON, &self.interrupt);
        let mut worker = self.device.activate(activation)?.remove(0);
        worker.start()?;
        Ok(worker)
    }

    fn losses(&self) -> Vec<String> {
        self.losses.lock().unwrap().clone()
    }
}

/// `honest`, but for one request.
fn but_for(request: Request, reply: Reply) -> impl FnMut(&Told) -> Reply + Send + 'static {
    move |told| {
        if told.request == request {
            reply.clone()
        } else {
            honest(told)
        }
    }
}

fn metrics(device: &Fs) -> Vec<(&'static str, u64)> {
    VirtioDevice::<Space>::metrics(device)
}

#[test]
fn config_is_the_tag_and_features_are_what_both_know() {
    let rig = rig(honest).unwrap();
    let device: &dyn VirtioDevice<Space> = &rig.device;
    let mut config = [0xff; 44];
    device.read_config(0, &mut config);
    assert_eq!(&config[..8], b"volumes\0");
    assert_eq!(config[36..], [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(device.kind(), DeviceId::FS);
    assert_eq!(device.features(), Features::COMMON);
    assert_eq!(device.queue_sizes(), [1024, 1024]);
}

#[test]
fn queues_are_handed_over_in_order_and_kicked_once() {
    let mut rig = rig(honest).unwrap();
    let worker = rig.go_live().unwrap();
    assert_eq!(rig.kicks[0].read().unwrap(), 1);
    assert_eq!(rig.kicks[1].read().unwrap(), 1);
    assert!(
        worker.queues().is_empty(),
        "the guest's kicks are the server's"
    );
    assert_eq!(counter(&metrics(&rig.device), "losses"), 0);
    drop((worker, rig.device));
    let told: Vec<u32> = rig
        .back_end
        .join()
        .unwrap()
        .iter()
        .map(|told| told.request.0)
        .collect();
    let queue = [8, 10, 9, 13, 12, 18];
    assert_eq!(told, [&[3, 1, 15, 16, 2, 5][..], &queue, &queue].concat());
}

#[test]
fn call_of_the_server_interrupts_the_guest() {
    let mut rig = rig(honest).unwrap();
    let mut worker = rig.go_live().unwrap();
    let sources = worker.sources();
    assert_eq!(sources.len(), 3);
    nix::unistd::write(sources[1].1, &1u64.to_ne_bytes()).unwrap();
    for token in [0, 1, 7] {
        let progress = worker.handle(Event::Source(token)).unwrap();
        assert_eq!(progress, crate::Progress::Idle);
    }
    assert_eq!(
        (rig.interrupt.take_used(0), rig.interrupt.take_used(1)),
        (0, 1)
    );
    assert_eq!(counter(&metrics(&rig.device), "interrupts"), 1);
}

#[test]
fn server_that_does_not_come_to_terms_is_an_error_of_the_attachment() {
    let old = Reply::Payload(Features::VERSION_1.bits().to_le_bytes());
    let cases = [
        (
            "features that lack the protocol's",
            Request::GET_FEATURES,
            old,
        ),
        (
            "no virtio 1",
            Request::GET_FEATURES,
            Reply::Payload((1u64 << 30).to_le_bytes()),
        ),
        (
            "cannot confirm",
            Request::GET_PROTOCOL_FEATURES,
            Reply::Payload([1, 0, 0, 0, 0, 0, 0, 0]),
        ),
        (
            "another answer",
            Request::GET_FEATURES,
            Reply::Raw(vec![2; 20]),
        ),
        (
            "too long an answer",
            Request::GET_FEATURES,
            Reply::Raw(
                [1u32, 5, 1 << 30]
                    .map(u32::to_le_bytes)
                    .as_flattened()
                    .to_vec(),
            ),
        ),
        (
            "half an answer and the end",
            Request::GET_FEATURES,
            Reply::HangUp,
        ),
        ("nothing", Request::GET_PROTOCOL_FEATURES, Reply::Silence),
    ];
    for (name, request, reply) in cases {
        let result = rig(but_for(request, reply));
        assert!(matches!(result, Err(DeviceError::Host { .. })), "{name}");
    }
}

#[test]
fn tag_that_cannot_be_one_is_an_error() {
    for tag in ["", &"x".repeat(37)] {
        assert!(rig_with_tag(tag, honest).is_err());
    }
}

#[test]
fn server_that_refuses_or_lies_when_the_guest_goes_live_is_lost() {
    let cases = [
        (
            "refuses memory",
            Request::SET_MEM_TABLE,
            Reply::Payload([1; 8]),
        ),
        (
            "confirms another",
            Request::SET_VRING_KICK,
            Reply::Raw(vec![0xff; 20]),
        ),
        ("hangs up", Request::SET_VRING_ENABLE, Reply::HangUp),
        ("is silent", Request::SET_VRING_CALL, Reply::Silence),
    ];
    for (name, request, reply) in cases {
        let mut rig = rig(but_for(request, reply)).unwrap();
        assert!(rig.go_live().is_err(), "{name}");
        assert_eq!(rig.losses().len(), 1, "{name}");
        assert!(
            rig.losses()[0].starts_with("fs cannot hand its queues"),
            "{name}"
        );
        assert_eq!(counter(&metrics(&rig.device), "losses"), 1);
    }
}

#[test]
fn message_that_nobody_asked_for_is_the_end() {
    let extra = [18u32, 5, 8, 0, 0, 9, 9].map(u32::to_le_bytes).concat();
    let mut rig = rig(but_for(Request::SET_VRING_ENABLE, Reply::Raw(extra))).unwrap();
    // The second queue's first answer is what was left of the first one's last.
    assert!(rig.go_live().is_err());
    assert_eq!(rig.losses().len(), 1);
}

#[test]
fn server_that_lies_about_positions_is_lost_at_the_pause_which_ends_all_the_same() {
    for reply in [Reply::Payload([0xff; 8]), Reply::HangUp, Reply::Silence] {
        let mut rig = rig(but_for(Request::GET_VRING_BASE, reply)).unwrap();
        let mut worker = rig.go_live().unwrap();
        assert_eq!(worker.pause().len(), 2);
        assert_eq!(rig.losses().len(), 1);
        assert_eq!(worker.pause().len(), 2, "twice does nothing more");
        assert_eq!(rig.losses().len(), 1);
    }
}

#[test]
fn position_that_the_server_tells_is_kept() {
    let answer = Reply::Payload([0, 0, 0, 0, 5, 0, 0, 0]);
    let mut rig = rig(but_for(Request::GET_VRING_BASE, answer)).unwrap();
    rig.drivers.truncate(1);
    let mut worker = rig.go_live().unwrap();
    let positions = worker.pause();
    assert_eq!(
        (positions[0].1.next_avail, positions[0].1.next_used),
        (5, 5)
    );
    assert!(rig.losses().is_empty());
}

#[test]
fn rings_outside_memory_never_reach_the_server() {
    let mut rig = rig(honest).unwrap();
    let mut queues: Vec<_> = rig.drivers.iter().map(queue_state).collect();
    queues[1].used_ring = 1 << 40;
    let activation = activation(&rig.mem, queues, Features::COMMON, &rig.interrupt);
    assert!(matches!(
        rig.device.activate(activation),
        Err(DeviceError::Queue { queue: 1, .. })
    ));
}

#[test]
fn state_is_told_but_cannot_be_restored() {
    let mut rig = rig(honest).unwrap();
    let device: &mut dyn VirtioDevice<Space> = &mut rig.device;
    let state = device.save();
    assert!(matches!(state, DeviceState::Fs(_)));
    assert!(matches!(
        device.restore(&state),
        Err(DeviceError::State { .. })
    ));
}

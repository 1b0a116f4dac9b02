// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! When the thread calls a worker that has reached a limit.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use virtio_device::{DeviceError, Event, Progress, QueueState, Worker};
use vmm_sys_util::eventfd::EventFd;

use super::{IoThread, Signals, WorkerHost};

/// How long a call may take to come.
const LIMIT: Duration = Duration::from_secs(60);
const AGES: Duration = Duration::from_secs(100_000);

/// Tells of each call, and answers as it was told.
struct Scripted {
    calls: Sender<Instant>,
    answers: VecDeque<Progress>,
}

impl Worker for Scripted {
    fn queues(&self) -> &[u16] {
        &[0]
    }

    fn handle(&mut self, _event: Event) -> Result<Progress, DeviceError> {
        // The test may have seen enough.
        let _ = self.calls.send(Instant::now());
        Ok(self.answers.pop_front().unwrap_or(Progress::Idle))
    }

    fn pause(&mut self) -> Vec<(u16, QueueState)> {
        Vec::new()
    }
}

fn start(answers: &[Progress]) -> (IoThread, Arc<EventFd>, Receiver<Instant>) {
    let io = IoThread::start("io", || Ok(())).unwrap();
    let (sender, calls) = channel();
    let worker = Scripted {
        calls: sender,
        answers: answers.iter().copied().collect(),
    };
    let event = || Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let kick = event();
    let signals = Arc::new(Signals::new(event()));
    io.start(0, vec![Box::new(worker)], vec![Arc::clone(&kick)], signals);
    (io, kick, calls)
}

#[test]
fn worker_is_called_after_its_wait_and_not_before() {
    let wait = Duration::from_millis(30);
    let later = Progress::Later(wait);
    let (_io, _kick, calls) = start(&[later, later]);
    let times: Vec<_> = (0..3).map(|_| calls.recv_timeout(LIMIT).unwrap()).collect();
    for pair in times.windows(2) {
        assert!(pair[1].duration_since(pair[0]) >= wait);
    }
}

#[test]
fn worker_that_waits_is_called_when_limits_change_and_when_it_is_kicked() {
    let later = Progress::Later(AGES);
    let (io, kick, calls) = start(&[later, later]);
    calls.recv_timeout(LIMIT).unwrap();
    kick.write(1).unwrap();
    calls.recv_timeout(LIMIT).unwrap();
    io.look_again();
    calls.recv_timeout(LIMIT).unwrap();
}

#[test]
fn worker_that_waits_can_be_stopped() {
    let (io, _kick, calls) = start(&[Progress::Later(AGES)]);
    calls.recv_timeout(LIMIT).unwrap();
    io.stop(0);
    io.look_again();
    drop(io);
    assert!(
        calls.recv().is_err(),
        "it is gone, and was not called again"
    );
}

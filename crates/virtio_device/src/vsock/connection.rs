// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One stream connection between the guest and a host socket, as a pure state machine.
//!
//! # How a connection lives
//! ```text
//!  host asks ──REQUEST──> Connecting ──RESPONSE──┐                guest asks ──REQUEST──┐
//!                             │                  v                                      │
//!                             │                 Open <──────────────RESPONSE────────────┘
//!        RST, deadline,       │                  │ │
//!        host hangs up        │   RST, violation │ ├── both directions are done: SHUTDOWN(both) ──> Closing
//!                             v                  v │                                                  │
//!                           Closed <─────────────┘ └── guest: SHUTDOWN(both); it gets a RST           │
//!                             ^ ^                             │                                       │
//!                             │ └──── host took it all ── Draining                                    │
//!                             └──────────────── RST, SHUTDOWN(both) or deadline ──────────────────────┘
//! ```
//! Each direction ends by itself. The host's end of stream becomes SHUTDOWN(send) behind all its bytes; a host that
//! does not read any more becomes SHUTDOWN(receive). The guest's SHUTDOWN(send) ends the host's stream once the host
//! has taken every byte before it; SHUTDOWN(receive) makes the host's writes fail. When the guest gives up both, it
//! has nothing more to wait for: it gets its RST at once, its ports are free again, and what it sent before goes on
//! to the host while the connection is Draining. So a slow reader on the host costs the guest no byte, even though a
//! Linux guest waits only 8 seconds for that RST.
//!
//! # Flow control
//! See [`super::credit`]. A guest that sends more than its credit, or claims to have taken what it was never sent,
//! is reset.
//!
//! # Use
//! [`Connection::step`] takes an input and says what to do at the host's end; [`Connection::next_control`],
//! [`Connection::data_room`] and [`Connection::sent`] say what goes to the guest when there is room for a packet. So
//! what waits for the guest is a few flags, never a queue. No I/O, no clock: the caller passes the time.

use std::time::{Duration, Instant};

use serde::Serialize;
use virtio_wire::vsock::{CreditInfo, MAX_PAYLOAD, Message, Shutdown};

use super::credit::{CreditViolation, ReceiveWindow, SendCredit};

/// How long the guest may take to answer a connection request. Its kernel answers, not the process that listens, and
/// a Linux guest that asks waits 2 s itself; more than that because a node's processors may all be taken.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the guest may take to answer SHUTDOWN(both) with a RST: what Linux gives its own peers
/// (`VSOCK_CLOSE_TIMEOUT`).
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// Where a connection is; see the module's diagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The host has asked, the guest has not answered.
    Connecting,
    /// Bytes flow, at least in one direction.
    Open,
    /// Both directions are done; the guest still has to say so.
    Closing,
    /// Over for the guest; the host still has bytes to take.
    Draining,
    /// Over.
    Closed,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// The guest sent a packet of this connection.
    Guest(Message, CreditInfo),
    /// The host has taken so many bytes of the guest's stream.
    HostTook(u32),
    /// The host will not write any more, and all it wrote has been passed on.
    HostEnded,
    /// The host does not read any more.
    HostStoppedReading,
    /// Time has passed.
    Tick,
}

/// Why a connection was cut off instead of coming to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Abort {
    /// The guest refused or reset it.
    ByGuest,
    /// The guest sent what it may not send in this phase.
    Protocol,
    /// The guest broke flow control.
    Credit,
    /// The guest did not answer in time.
    Timeout,
    /// The host hung up before the guest had answered.
    ByHost,
}

/// What to do now at the host's end and about the guest; in the order of the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub struct Effects {
    /// Tell the host that the guest has accepted.
    pub greet_host: bool,
    /// The payload of the packet goes to the host; otherwise it is dropped.
    pub deliver: bool,
    /// The host's stream ends: it has taken every byte.
    pub shutdown_host_write: bool,
    /// Nobody will read what the host writes from here on.
    pub shutdown_host_read: bool,
    /// The guest gets a RST.
    pub reset_guest: bool,
    /// The connection was cut off.
    pub abort: Option<Abort>,
}

/// Packets without data that wait for room.
#[derive(Debug, Clone, Copy, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

/// One connection; see the module.
///
/// Invariant: `guest` and `host` only grow; bytes go to the guest only while [`Phase::Open`], within its credit, and
/// not after the packet that says the host has ended.
#[derive(Debug, Clone)]
pub struct Connection {
    phase: Phase,
    from_guest: ReceiveWindow,
    to_guest: SendCredit,
    /// What the guest has given up.
    guest: Shutdown,
    /// What the host has given up.
    host: Shutdown,
    /// What of `host` the guest has been told.
    told: Shutdown,
    owed: Owed,
    /// A credit request is unanswered.
    asked: bool,
    /// When the guest must have answered; only in `Connecting` and `Closing`.
    deadline: Option<Instant>,
}

impl Connection {
    /// The host asks the guest for a connection. `window` is the size of our receive buffer in bytes.
    pub fn request(window: u32, now: Instant) -> Self {
        let owed = Owed {
            request: true,
            ..Owed::default()
        };
        let deadline = now.checked_add(CONNECT_TIMEOUT);
        Self::new(Phase::Connecting, window, owed, deadline)
    }

    /// The guest has asked and the host has accepted. `credit` is what its request said.
    ///
    /// # Errors
    /// The request claims to have taken bytes of a stream that had none.
    pub fn accept(window: u32, credit: CreditInfo) -> Result<Self, CreditViolation> {
        let owed = Owed {
            response: true,
            ..Owed::default()
        };
        let mut connection = Self::new(Phase::Open, window, owed, None);
        connection.to_guest.learn(credit)?;
        Ok(connection)
    }

    fn new(phase: Phase, window: u32, owed: Owed, deadline: Option<Instant>) -> Self {
        Self {
            phase,
            from_guest: ReceiveWindow::new(window),
            to_guest: SendCredit::default(),
            guest: Shutdown::default(),
            host: Shutdown::default(),
            told: Shutdown::default(),
            owed,
            asked: false,
            deadline,
        }
    }

    /// Where the connection is.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the guest still knows this connection by its ports.
    pub fn holds_ports(&self) -> bool {
        matches!(self.phase, Phase::Connecting | Phase::Open | Phase::Closing)
    }

    /// When [`Input::Tick`] will have an effect.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Moves the deadline: the time `by` did not count, since nothing ran.
    pub fn postpone(&mut self, by: Duration) {
        self.deadline = self.deadline.and_then(|deadline| deadline.checked_add(by));
    }

    /// Our receive buffer.
    pub fn from_guest(&self) -> &ReceiveWindow {
        &self.from_guest
    }

    /// The guest's receive buffer.
    pub fn to_guest(&self) -> &SendCredit {
        &self.to_guest
    }

    /// What the guest and the host have given up.
    pub fn given_up(&self) -> (Shutdown, Shutdown) {
        (self.guest, self.host)
    }

    /// Advances the connection.
    pub fn step(&mut self, input: Input, now: Instant) -> Effects {
        let effects = match (self.phase, input) {
            (Phase::Closed, _) => Effects::default(),
            (Phase::Connecting, input) => self.step_connecting(input, now),
            (Phase::Open | Phase::Closing, Input::Guest(message, credit)) => {
                self.guest_says(message, credit)
            }
            (Phase::Draining, Input::Guest(..)) => Effects::default(),
            (_, Input::HostTook(len)) => {
                self.from_guest.forward(len);
                self.drained()
            }
            (_, Input::HostEnded) => {
                self.host.send = true;
                Effects::default()
            }
            (_, Input::HostStoppedReading) => {
                self.host.receive = true;
                self.from_guest.forward(u32::MAX);
                self.drained()
            }
            (_, Input::Tick) if self.expired(now) => self.abort(Abort::Timeout, true),
            (_, Input::Tick) => Effects::default(),
        };
        if self.phase == Phase::Open && self.both_done() {
            self.phase = Phase::Closing;
            self.deadline = now.checked_add(CLOSE_TIMEOUT);
        }
        effects
    }

    fn step_connecting(&mut self, input: Input, now: Instant) -> Effects {
        match input {
            Input::Guest(Message::Response, credit) => {
                if self.owed.request {
                    return self.abort(Abort::Protocol, true);
                }
                if self.to_guest.learn(credit).is_err() {
                    return self.abort(Abort::Credit, true);
                }
                self.phase = Phase::Open;
                self.deadline = None;
                Effects {
                    greet_host: true,
                    ..Effects::default()
                }
            }
            Input::Guest(Message::Reset, _) => self.abort(Abort::ByGuest, false),
            Input::Guest(..) => self.abort(Abort::Protocol, true),
            Input::HostStoppedReading => {
                let asked = !self.owed.request;
                self.abort(Abort::ByHost, asked)
            }
            Input::Tick if self.expired(now) => {
                let asked = !self.owed.request;
                self.abort(Abort::Timeout, asked)
            }
            Input::HostTook(_) | Input::HostEnded | Input::Tick => Effects::default(),
        }
    }

    fn guest_says(&mut self, message: Message, credit: CreditInfo) -> Effects {
        if message == Message::Reset {
            return self.guest_left(false);
        }
        if self.to_guest.learn(credit).is_err() {
            return self.abort(Abort::Credit, true);
        }
        if self.to_guest.available() > 0 {
            self.asked = false;
        }
        match message {
            Message::Request | Message::Response => self.abort(Abort::Protocol, true),
            Message::Data { .. } if self.guest.send => self.abort(Abort::Protocol, true),
            Message::Data { len } => self.guest_sent(len),
            Message::Shutdown(directions) => self.guest_gives_up(directions),
            Message::CreditRequest => {
                self.owed.credit_update = true;
                Effects::default()
            }
            Message::CreditUpdate | Message::Reset => Effects::default(),
        }
    }

    fn guest_sent(&mut self, len: u32) -> Effects {
        if self.from_guest.receive(len).is_err() {
            return self.abort(Abort::Credit, true);
        }
        if self.host.receive {
            self.from_guest.forward(len);
        }
        Effects {
            deliver: !self.host.receive,
            ..Effects::default()
        }
    }

    fn guest_gives_up(&mut self, directions: Shutdown) -> Effects {
        let before = self.guest;
        self.guest = before.union(directions);
        if self.guest.is_both() {
            return self.guest_left(true);
        }
        let mut effects = Effects {
            shutdown_host_read: self.guest.receive && !before.receive && !self.host.send,
            ..Effects::default()
        };
        if self.guest.send && !before.send {
            effects.shutdown_host_write = self.drained().shutdown_host_write;
        }
        effects
    }

    /// The guest has no use for the connection any more. What it has sent before an orderly end still goes to the host.
    fn guest_left(&mut self, reset_guest: bool) -> Effects {
        if !self.guest.send && self.phase != Phase::Closing {
            return self.abort(Abort::ByGuest, reset_guest);
        }
        self.deadline = None;
        let draining = self.from_guest.buffered() > 0;
        self.phase = if draining {
            Phase::Draining
        } else {
            Phase::Closed
        };
        Effects {
            shutdown_host_read: draining && !self.host.send,
            reset_guest,
            ..Effects::default()
        }
    }

    /// After the host took bytes: the end of the guest's stream may have come.
    fn drained(&mut self) -> Effects {
        if self.from_guest.buffered() > 0 {
            return Effects::default();
        }
        if self.phase == Phase::Draining {
            self.phase = Phase::Closed;
        }
        Effects {
            shutdown_host_write: self.guest.send && !self.host.receive,
            ..Effects::default()
        }
    }

    fn abort(&mut self, abort: Abort, reset_guest: bool) -> Effects {
        self.phase = Phase::Closed;
        self.deadline = None;
        Effects {
            reset_guest,
            abort: Some(abort),
            ..Effects::default()
        }
    }

    fn expired(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Whether no byte can flow any more in either direction.
    fn both_done(&self) -> bool {
        let to_guest = self.host.send || self.guest.receive;
        let to_host = self.host.receive || (self.guest.send && self.from_guest.buffered() == 0);
        to_guest && to_host
    }

    /// What the guest should hear of the host's directions, if it is news.
    fn shutdown_owed(&self) -> Option<Shutdown> {
        let say = match self.phase {
            Phase::Closing => Shutdown::BOTH,
            Phase::Open => Shutdown {
                send: self.host.send && !self.guest.receive,
                receive: self.host.receive && !self.guest.send,
            },
            Phase::Connecting | Phase::Draining | Phase::Closed => Shutdown::default(),
        };
        let all = say.union(self.told);
        (all != self.told).then_some(all)
    }

    /// Whether a packet without data waits for room.
    pub fn has_control(&self) -> bool {
        let Owed {
            request,
            response,
            credit_update,
            credit_request,
        } = self.owed;
        let live = self.holds_ports();
        let asks = request || response || credit_update || credit_request;
        live && (asks || self.shutdown_owed().is_some() || self.update_due())
    }

    fn update_due(&self) -> bool {
        self.phase == Phase::Open && !self.guest.send && self.from_guest.update_due()
    }

    /// The next packet without data for the guest; the caller sends it with [`Connection::credit`].
    pub fn next_control(&mut self) -> Option<Message> {
        if !self.holds_ports() {
            return None;
        }
        if std::mem::take(&mut self.owed.request) {
            return Some(Message::Request);
        }
        if std::mem::take(&mut self.owed.response) {
            return Some(Message::Response);
        }
        if self.phase == Phase::Connecting {
            return None;
        }
        if let Some(directions) = self.shutdown_owed() {
            self.told = directions;
            return Some(Message::Shutdown(directions));
        }
        if std::mem::take(&mut self.owed.credit_update) || self.update_due() {
            return Some(Message::CreditUpdate);
        }
        std::mem::take(&mut self.owed.credit_request).then_some(Message::CreditRequest)
    }

    /// Whether bytes of the host are of any use now: they may go, or the guest should be asked for credit.
    pub fn takes_data(&self) -> bool {
        self.to_guest_open() && (self.to_guest.available() > 0 || !self.asked)
    }

    fn to_guest_open(&self) -> bool {
        self.phase == Phase::Open && !self.owed.response && !self.host.send && !self.guest.receive
    }

    /// How many bytes the next packet of data may carry; 0 if none may go now.
    ///
    /// Call it only when the host has bytes: without credit, it makes the machine ask the guest for some, once.
    pub fn data_room(&mut self) -> u32 {
        if !self.to_guest_open() {
            return 0;
        }
        let room = self.to_guest.available().min(MAX_PAYLOAD);
        if room == 0 && !self.asked {
            self.asked = true;
            self.owed.credit_request = true;
        }
        room
    }

    /// Counts `len` bytes of data as sent to the guest.
    pub fn sent(&mut self, len: u32) {
        self.to_guest.spend(len);
    }

    /// The credit fields of a packet about to go to the guest.
    pub fn credit(&mut self) -> CreditInfo {
        self.owed.credit_update = false;
        self.from_guest.tell()
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

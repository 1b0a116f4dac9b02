// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One test per transition.

use super::*;

const WINDOW: u32 = 1000;
const SEND: Shutdown = Shutdown {
    receive: false,
    send: true,
};
const RECEIVE: Shutdown = Shutdown {
    receive: true,
    send: false,
};

/// A connection and the time it lives in.
struct Bench {
    connection: Connection,
    now: Instant,
    guest_credit: CreditInfo,
}

impl Bench {
    /// The host has asked and the guest has been told.
    fn connecting() -> Self {
        let now = Instant::now();
        let mut bench = Self {
            connection: Connection::request(WINDOW, now),
            now,
            guest_credit: CreditInfo {
                buf_alloc: 500,
                fwd_cnt: 0,
            },
        };
        assert_eq!(bench.next(), Some(Message::Request));
        bench
    }

    /// The guest has asked and has been answered.
    fn open() -> Self {
        let guest_credit = CreditInfo {
            buf_alloc: 500,
            fwd_cnt: 0,
        };
        let mut bench = Self {
            connection: Connection::accept(WINDOW, guest_credit).unwrap(),
            now: Instant::now(),
            guest_credit,
        };
        assert_eq!(bench.next(), Some(Message::Response));
        bench
    }

    fn guest(&mut self, message: Message) -> Effects {
        let input = Input::Guest(message, self.guest_credit);
        self.connection.step(input, self.now)
    }

    fn host(&mut self, input: Input) -> Effects {
        self.connection.step(input, self.now)
    }

    fn next(&mut self) -> Option<Message> {
        assert_eq!(self.connection.has_control(), {
            let mut copy = self.connection.clone();
            copy.next_control().is_some()
        });
        let message = self.connection.next_control();
        if message.is_some() {
            self.connection.credit();
        }
        message
    }

    fn phase(&self) -> Phase {
        self.connection.phase()
    }

    fn after(&mut self, time: Duration) -> Effects {
        self.now += time;
        self.host(Input::Tick)
    }
}

fn aborted(abort: Abort, reset_guest: bool) -> Effects {
    Effects {
        reset_guest,
        abort: Some(abort),
        ..Effects::default()
    }
}

const DELIVER: Effects = Effects {
    deliver: true,
    ..NOTHING
};
const NOTHING: Effects = Effects {
    greet_host: false,
    deliver: false,
    shutdown_host_write: false,
    shutdown_host_read: false,
    reset_guest: false,
    abort: None,
};

#[test]
fn request_answered_opens_and_greets_the_host() {
    let mut bench = Bench::connecting();
    let effects = bench.guest(Message::Response);
    assert_eq!(
        effects,
        Effects {
            greet_host: true,
            ..NOTHING
        }
    );
    assert_eq!(bench.phase(), Phase::Open);
    assert_eq!(bench.connection.deadline(), None);
    assert_eq!(bench.connection.data_room(), 500);
}

#[test]
fn request_refused_closes() {
    let mut bench = Bench::connecting();
    assert_eq!(bench.guest(Message::Reset), aborted(Abort::ByGuest, false));
    assert_eq!(bench.phase(), Phase::Closed);
}

#[test]
fn request_never_answered_is_reset_at_the_deadline() {
    let mut bench = Bench::connecting();
    let nearly = CONNECT_TIMEOUT - Duration::from_millis(1);
    assert_eq!(bench.after(nearly), NOTHING);
    let effects = bench.after(Duration::from_millis(1));
    assert_eq!(effects, aborted(Abort::Timeout, true));
    assert_eq!(bench.phase(), Phase::Closed);
}

#[test]
fn request_postponed_lives_longer() {
    let mut bench = Bench::connecting();
    bench.connection.postpone(Duration::from_secs(60));
    assert_eq!(bench.after(Duration::from_secs(60)), NOTHING);
    let effects = bench.after(CONNECT_TIMEOUT);
    assert_eq!(effects, aborted(Abort::Timeout, true));
}

#[test]
fn request_not_yet_sent_ends_without_a_reset() {
    let now = Instant::now();
    let mut connection = Connection::request(WINDOW, now);
    let effects = connection.step(Input::HostStoppedReading, now);
    assert_eq!(effects, aborted(Abort::ByHost, false));
    let mut connection = Connection::request(WINDOW, now);
    let effects = connection.step(Input::Tick, now + CONNECT_TIMEOUT);
    assert_eq!(effects, aborted(Abort::Timeout, false));
}

#[test]
fn host_that_hangs_up_while_connecting_resets_the_guest() {
    let mut bench = Bench::connecting();
    let effects = bench.host(Input::HostStoppedReading);
    assert_eq!(effects, aborted(Abort::ByHost, true));
}

#[test]
fn packet_other_than_an_answer_while_connecting_is_a_violation() {
    for message in [
        Message::Request,
        Message::Data { len: 1 },
        Message::Shutdown(Shutdown::BOTH),
        Message::CreditUpdate,
    ] {
        let mut bench = Bench::connecting();
        assert_eq!(bench.guest(message), aborted(Abort::Protocol, true));
        assert_eq!(bench.phase(), Phase::Closed);
    }
}

#[test]
fn answer_to_a_request_not_yet_sent_is_a_violation() {
    let now = Instant::now();
    let mut connection = Connection::request(WINDOW, now);
    let credit = CreditInfo {
        buf_alloc: 1,
        fwd_cnt: 0,
    };
    let effects = connection.step(Input::Guest(Message::Response, credit), now);
    assert_eq!(effects, aborted(Abort::Protocol, true));
}

#[test]
fn request_or_response_on_an_open_connection_is_a_violation() {
    for message in [Message::Request, Message::Response] {
        let mut bench = Bench::open();
        assert_eq!(bench.guest(message), aborted(Abort::Protocol, true));
    }
}

#[test]
fn request_that_claims_to_have_taken_bytes_is_refused() {
    let credit = CreditInfo {
        buf_alloc: 500,
        fwd_cnt: 1,
    };
    let refused = Connection::accept(WINDOW, credit);
    assert_eq!(refused.err(), Some(CreditViolation::TookTooMuch));
}

#[test]
fn no_data_goes_to_the_guest_before_its_answer() {
    let credit = CreditInfo {
        buf_alloc: 500,
        fwd_cnt: 0,
    };
    let mut connection = Connection::accept(WINDOW, credit).unwrap();
    assert_eq!(connection.data_room(), 0);
    assert_eq!(connection.next_control(), Some(Message::Response));
    assert_eq!(connection.data_room(), 500);
}

#[test]
fn data_within_the_window_is_delivered_and_past_it_reset() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::Data { len: WINDOW }), DELIVER);
    let effects = bench.guest(Message::Data { len: 1 });
    assert_eq!(effects, aborted(Abort::Credit, true));
}

#[test]
fn update_goes_to_the_guest_once_the_host_took_a_quarter() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::Data { len: 300 }), DELIVER);
    assert_eq!(bench.host(Input::HostTook(249)), NOTHING);
    assert_eq!(bench.next(), None);
    assert_eq!(bench.host(Input::HostTook(1)), NOTHING);
    assert_eq!(bench.next(), Some(Message::CreditUpdate));
    assert_eq!(bench.next(), None);
}

#[test]
fn credit_request_is_answered_with_an_update() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::CreditRequest), NOTHING);
    assert_eq!(bench.next(), Some(Message::CreditUpdate));
    assert_eq!(bench.next(), None);
}

#[test]
fn credit_used_up_is_asked_for_once_until_there_is_some() {
    let mut bench = Bench::open();
    bench.connection.sent(500);
    assert_eq!(bench.connection.data_room(), 0);
    assert_eq!(bench.next(), Some(Message::CreditRequest));
    assert_eq!(bench.connection.data_room(), 0);
    assert_eq!(bench.next(), None);
    // The answer "still nothing" is not met with another question.
    assert_eq!(bench.guest(Message::CreditUpdate), NOTHING);
    assert_eq!(bench.connection.data_room(), 0);
    assert_eq!(bench.next(), None);
    bench.guest_credit.fwd_cnt = 20;
    assert_eq!(bench.guest(Message::CreditUpdate), NOTHING);
    assert_eq!(bench.connection.data_room(), 20);
}

#[test]
fn packet_of_data_is_no_larger_than_the_cap() {
    let mut bench = Bench::open();
    bench.guest_credit.buf_alloc = 1 << 20;
    assert_eq!(bench.guest(Message::CreditUpdate), NOTHING);
    assert_eq!(bench.connection.data_room(), MAX_PAYLOAD);
}

#[test]
fn guest_that_took_what_it_was_never_sent_is_reset() {
    let mut bench = Bench::open();
    bench.connection.sent(10);
    bench.guest_credit.fwd_cnt = 11;
    let effects = bench.guest(Message::CreditUpdate);
    assert_eq!(effects, aborted(Abort::Credit, true));
}

#[test]
fn reset_of_an_open_connection_closes_it() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::Data { len: 5 }), DELIVER);
    assert_eq!(bench.guest(Message::Reset), aborted(Abort::ByGuest, false));
    assert_eq!(bench.phase(), Phase::Closed);
}

#[test]
fn end_of_the_host_is_told_and_the_guest_may_go_on() {
    let mut bench = Bench::open();
    assert_eq!(bench.host(Input::HostEnded), NOTHING);
    assert_eq!(bench.next(), Some(Message::Shutdown(SEND)));
    assert_eq!(bench.next(), None);
    assert_eq!(bench.connection.data_room(), 0);
    assert_eq!(bench.guest(Message::Data { len: 5 }), DELIVER);
    assert_eq!(bench.phase(), Phase::Open);
}

#[test]
fn end_of_the_guest_reaches_the_host_behind_the_last_byte() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::Data { len: 5 }), DELIVER);
    assert_eq!(bench.guest(Message::Shutdown(SEND)), NOTHING);
    assert_eq!(bench.host(Input::HostTook(4)), NOTHING);
    let effects = bench.host(Input::HostTook(1));
    assert_eq!(
        effects,
        Effects {
            shutdown_host_write: true,
            ..NOTHING
        }
    );
    assert_eq!(bench.phase(), Phase::Open);
    assert_eq!(bench.connection.data_room(), 500);
}

#[test]
fn data_after_the_end_of_the_guest_is_a_violation() {
    let mut bench = Bench::open();
    let _ = bench.guest(Message::Shutdown(SEND));
    let effects = bench.guest(Message::Data { len: 1 });
    assert_eq!(effects, aborted(Abort::Protocol, true));
}

#[test]
fn both_ends_reached_asks_the_guest_to_close_and_waits_for_its_reset() {
    let mut bench = Bench::open();
    let _ = bench.guest(Message::Shutdown(SEND));
    assert_eq!(bench.host(Input::HostEnded), NOTHING);
    assert_eq!(bench.phase(), Phase::Closing);
    assert_eq!(bench.next(), Some(Message::Shutdown(Shutdown::BOTH)));
    assert_eq!(bench.next(), None);
    assert_eq!(bench.guest(Message::Reset), NOTHING);
    assert_eq!(bench.phase(), Phase::Closed);
}

#[test]
fn both_ends_reached_with_bytes_left_waits_for_the_host() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::Data { len: 5 }), DELIVER);
    assert_eq!(bench.guest(Message::Shutdown(SEND)), NOTHING);
    assert_eq!(bench.host(Input::HostEnded), NOTHING);
    assert_eq!(bench.phase(), Phase::Open);
    assert_eq!(bench.next(), Some(Message::Shutdown(SEND)));
    let effects = bench.host(Input::HostTook(5));
    assert!(effects.shutdown_host_write);
    assert_eq!(bench.phase(), Phase::Closing);
    assert_eq!(bench.next(), Some(Message::Shutdown(Shutdown::BOTH)));
}

#[test]
fn close_never_answered_is_reset_at_the_deadline() {
    let mut bench = Bench::open();
    let _ = bench.host(Input::HostEnded);
    let _ = bench.host(Input::HostStoppedReading);
    assert_eq!(bench.phase(), Phase::Closing);
    let nearly = CLOSE_TIMEOUT - Duration::from_millis(1);
    assert_eq!(bench.after(nearly), NOTHING);
    let effects = bench.after(Duration::from_millis(1));
    assert_eq!(effects, aborted(Abort::Timeout, true));
}

#[test]
fn close_crossing_a_close_of_the_guest_ends_at_once() {
    let mut bench = Bench::open();
    let _ = bench.host(Input::HostEnded);
    let _ = bench.host(Input::HostStoppedReading);
    let effects = bench.guest(Message::Shutdown(Shutdown::BOTH));
    assert_eq!(
        effects,
        Effects {
            reset_guest: true,
            ..NOTHING
        }
    );
    assert_eq!(bench.phase(), Phase::Closed);
}

#[test]
fn guest_that_closes_with_nothing_left_is_reset_and_gone() {
    let mut bench = Bench::open();
    let effects = bench.guest(Message::Shutdown(Shutdown::BOTH));
    assert_eq!(
        effects,
        Effects {
            reset_guest: true,
            ..NOTHING
        }
    );
    assert_eq!(bench.phase(), Phase::Closed);
}

#[test]
fn guest_that_closes_with_bytes_left_frees_its_ports_and_drains() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::Data { len: 5 }), DELIVER);
    let effects = bench.guest(Message::Shutdown(Shutdown::BOTH));
    assert!(effects.reset_guest && effects.shutdown_host_read);
    assert_eq!(bench.phase(), Phase::Draining);
    assert!(!bench.connection.holds_ports());
    assert_eq!(bench.next(), None);
    let effects = bench.host(Input::HostTook(5));
    assert!(effects.shutdown_host_write);
    assert_eq!(bench.phase(), Phase::Closed);
}

#[test]
fn guest_that_resets_after_its_end_loses_no_byte() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::Data { len: 5 }), DELIVER);
    let _ = bench.guest(Message::Shutdown(SEND));
    let effects = bench.guest(Message::Reset);
    assert!(!effects.reset_guest);
    assert_eq!(bench.phase(), Phase::Draining);
}

#[test]
fn draining_host_that_goes_away_closes() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::Data { len: 5 }), DELIVER);
    let _ = bench.guest(Message::Shutdown(Shutdown::BOTH));
    assert_eq!(bench.host(Input::HostStoppedReading), NOTHING);
    assert_eq!(bench.phase(), Phase::Closed);
}

#[test]
fn guest_that_stops_receiving_ends_the_host_stream_only() {
    let mut bench = Bench::open();
    let effects = bench.guest(Message::Shutdown(RECEIVE));
    assert_eq!(
        effects,
        Effects {
            shutdown_host_read: true,
            ..NOTHING
        }
    );
    assert_eq!(bench.connection.data_room(), 0);
    assert_eq!(bench.guest(Message::Data { len: 5 }), DELIVER);
    let effects = bench.guest(Message::Shutdown(SEND));
    assert!(effects.reset_guest, "the two halves make a whole");
    assert_eq!(bench.phase(), Phase::Draining);
}

#[test]
fn host_that_stops_reading_is_told_and_later_bytes_are_dropped() {
    let mut bench = Bench::open();
    assert_eq!(bench.guest(Message::Data { len: 900 }), DELIVER);
    assert_eq!(bench.host(Input::HostStoppedReading), NOTHING);
    assert_eq!(bench.next(), Some(Message::Shutdown(RECEIVE)));
    assert_eq!(bench.guest(Message::Data { len: 900 }), NOTHING);
    assert_eq!(bench.connection.from_guest().buffered(), 0);
    assert_eq!(bench.connection.data_room(), 500);
}

#[test]
fn closed_connection_does_nothing_any_more() {
    let mut bench = Bench::open();
    let _ = bench.guest(Message::Reset);
    assert_eq!(bench.guest(Message::Data { len: 5 }), NOTHING);
    assert_eq!(bench.host(Input::HostEnded), NOTHING);
    assert_eq!(bench.after(Duration::from_secs(3600)), NOTHING);
    assert_eq!((bench.next(), bench.connection.data_room()), (None, 0));
}

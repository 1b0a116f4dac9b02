// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Flow control of one connection, both ways (virtio v1.3 §5.10.6.3).
//!
//! Each side counts the bytes it has sent and the bytes it has taken out of its receive buffer, modulo 2^32. The
//! sender's room is the receiver's buffer size less what is sent and not yet taken:
//!
//! ```text
//!   room = buf_alloc - (tx_cnt - fwd_cnt)        differences wrap, sizes do not
//! ```
//! Pure; what the guest writes is checked here and nowhere else.

use virtio_wire::vsock::CreditInfo;

/// The largest receive buffer a guest is believed to have, in bytes: less than half of the counters' range, so that two
/// counts can always be told to be ahead or behind. Linux' default is 256 KiB.
const MAX_GUEST_BUFFER: u32 = 1 << 30;

/// The guest broke flow control; the connection cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CreditViolation {
    /// It sent more than the buffer it was told of holds.
    Overrun,
    /// It says that it took more bytes than it was sent.
    TookTooMuch,
}

/// The guest's stream on its way to the host: our receive buffer.
///
/// Invariant: `forwarded` and `told` never pass `received`, and `received - forwarded <= size`.
#[derive(Debug, Clone)]
pub struct ReceiveWindow {
    size: u32,
    received: u32,
    forwarded: u32,
    told: u32,
}

impl ReceiveWindow {
    /// A buffer of `size` bytes, empty.
    pub fn new(size: u32) -> Self {
        Self {
            size,
            received: 0,
            forwarded: 0,
            told: 0,
        }
    }

    /// Bytes received and not yet taken by the host.
    pub fn buffered(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Size of the buffer in bytes.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Counts `len` bytes in.
    ///
    /// # Errors
    /// [`CreditViolation::Overrun`] if they do not fit; nothing is counted then.
    pub fn receive(&mut self, len: u32) -> Result<(), CreditViolation> {
        if len > self.size.saturating_sub(self.buffered()) {
            return Err(CreditViolation::Overrun);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Counts `len` bytes out, at most those that are in.
    pub fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len.min(self.buffered()));
    }

    /// Whether the guest should hear of the room made: a quarter of the buffer, so that a packet of updates goes with
    /// many packets of data, and a guest that has filled the buffer still has three quarters in flight.
    pub fn update_due(&self) -> bool {
        let made = self.forwarded.wrapping_sub(self.told);
        made > 0 && made >= self.size / 4
    }

    /// The fields of a header about to go to the guest.
    pub fn tell(&mut self) -> CreditInfo {
        self.told = self.forwarded;
        CreditInfo {
            buf_alloc: self.size,
            fwd_cnt: self.forwarded,
        }
    }
}

/// The host's stream on its way to the guest: the guest's receive buffer, as far as it told us. By default nothing is
/// sent and no buffer known.
#[derive(Debug, Clone, Default)]
pub struct SendCredit {
    buf_alloc: u32,
    sent: u32,
    taken: u32,
}

impl SendCredit {
    /// Takes in the fields of a header from the guest.
    ///
    /// A count older than the newest known is ignored: a driver may queue packets in another order than it filled
    /// them in. A smaller `buf_alloc` is honoured from here on.
    ///
    /// # Errors
    /// [`CreditViolation::TookTooMuch`] if `fwd_cnt` is ahead of what was sent; nothing is taken in then.
    pub fn learn(&mut self, info: CreditInfo) -> Result<(), CreditViolation> {
        if is_ahead(info.fwd_cnt, self.sent) {
            return Err(CreditViolation::TookTooMuch);
        }
        if is_ahead(info.fwd_cnt, self.taken) {
            self.taken = info.fwd_cnt;
        }
        self.buf_alloc = info.buf_alloc.min(MAX_GUEST_BUFFER);
        Ok(())
    }

    /// Bytes that may be sent now.
    pub fn available(&self) -> u32 {
        self.buf_alloc.saturating_sub(self.in_flight())
    }

    /// Bytes sent that the guest has not taken.
    pub fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.taken)
    }

    /// Counts `len` bytes as sent, at most those that may be.
    pub fn spend(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len.min(self.available()));
    }
}

/// Whether counter `a` has gone on from `b`, both modulo 2^32 and less than half of that apart.
fn is_ahead(a: u32, b: u32) -> bool {
    let distance = a.wrapping_sub(b);
    distance != 0 && distance < 1 << 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(buf_alloc: u32, fwd_cnt: u32) -> CreditInfo {
        CreditInfo { buf_alloc, fwd_cnt }
    }

    #[test]
    fn window_filled_exactly_is_accepted_and_one_more_byte_is_an_overrun() {
        let mut window = ReceiveWindow::new(100);
        assert_eq!(window.receive(100), Ok(()));
        assert_eq!(window.receive(1), Err(CreditViolation::Overrun));
        window.forward(1);
        assert_eq!(window.receive(1), Ok(()));
        assert_eq!(window.buffered(), 100);
    }

    #[test]
    fn window_update_is_due_at_a_quarter() {
        let mut window = ReceiveWindow::new(100);
        window.receive(100).unwrap();
        window.forward(24);
        assert!(!window.update_due());
        window.forward(1);
        assert!(window.update_due());
        assert_eq!(window.tell(), info(100, 25));
        assert!(!window.update_due());
    }

    #[test]
    fn window_counts_on_over_the_end_of_the_counter() {
        let mut window = ReceiveWindow {
            size: 100,
            received: u32::MAX - 9,
            forwarded: u32::MAX - 19,
            told: u32::MAX - 19,
        };
        assert_eq!(window.buffered(), 10);
        assert_eq!(window.receive(90), Ok(()));
        assert_eq!(window.receive(1), Err(CreditViolation::Overrun));
        window.forward(100);
        assert_eq!(window.buffered(), 0);
        assert_eq!(window.tell(), info(100, 80));
    }

    #[test]
    fn window_forwards_no_more_than_it_holds() {
        let mut window = ReceiveWindow::new(100);
        window.receive(10).unwrap();
        window.forward(11);
        assert_eq!(window.buffered(), 0);
        assert_eq!(window.tell().fwd_cnt, 10);
    }

    #[test]
    fn credit_is_what_the_guest_has_room_for() {
        let mut credit = SendCredit::default();
        assert_eq!(credit.available(), 0);
        credit.learn(info(100, 0)).unwrap();
        credit.spend(70);
        assert_eq!(credit.available(), 30);
        credit.learn(info(100, 50)).unwrap();
        assert_eq!((credit.available(), credit.in_flight()), (80, 20));
    }

    #[test]
    fn credit_over_the_end_of_the_counter_is_right() {
        let mut credit = SendCredit {
            buf_alloc: 100,
            sent: u32::MAX - 9,
            taken: u32::MAX - 9,
        };
        credit.spend(60);
        assert_eq!((credit.sent, credit.available()), (50, 40));
        credit.learn(info(100, 45)).unwrap();
        assert_eq!(credit.available(), 95);
    }

    #[test]
    fn guest_that_took_more_than_was_sent_is_caught() {
        let mut credit = SendCredit::default();
        credit.learn(info(100, 0)).unwrap();
        credit.spend(10);
        let lie = credit.learn(info(100, 11));
        assert_eq!(lie, Err(CreditViolation::TookTooMuch));
        assert_eq!(credit.learn(info(100, 10)), Ok(()));
    }

    #[test]
    fn count_older_than_the_newest_is_ignored() {
        let mut credit = SendCredit::default();
        credit.learn(info(100, 0)).unwrap();
        credit.spend(50);
        credit.learn(info(100, 40)).unwrap();
        credit.learn(info(100, 30)).unwrap();
        assert_eq!(credit.in_flight(), 10);
    }

    #[test]
    fn buffer_of_absurd_size_is_believed_up_to_the_cap() {
        let mut credit = SendCredit::default();
        credit.learn(info(u32::MAX, 0)).unwrap();
        assert_eq!(credit.available(), MAX_GUEST_BUFFER);
        credit.spend(u32::MAX);
        assert_eq!(
            (credit.available(), credit.in_flight()),
            (0, MAX_GUEST_BUFFER)
        );
    }

    #[test]
    fn buffer_that_shrank_below_what_is_in_flight_gives_no_credit() {
        let mut credit = SendCredit::default();
        credit.learn(info(100, 0)).unwrap();
        credit.spend(50);
        credit.learn(info(20, 0)).unwrap();
        assert_eq!(credit.available(), 0);
    }
}

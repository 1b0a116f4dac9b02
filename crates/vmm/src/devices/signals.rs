// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the I/O side of a device tells its driver: interrupts, and that it needs a reset.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_device::Interrupt;
use vmm_sys_util::eventfd::EventFd;

use crate::error::chain_of;

/// `InterruptStatus`: the used ring has new entries (virtio v1.3 §4.2.2).
const USED_RING: u32 = 1;
/// `InterruptStatus`: configuration has changed.
const CONFIGURATION: u32 = 2;

/// Interrupt state of one device, shared by its transport and its workers without a lock.
///
/// The event descriptor is the irqfd of the device's interrupt line, one for all devices on the line: KVM then turns
/// writes into edges one after the other. With two irqfds on one line, the edge of one could fall into the pulse of the
/// other and be lost.
pub struct Signals {
    pending: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    /// Why it last needed one, for people.
    error: Mutex<Option<String>>,
    line: Arc<EventFd>,
}

impl Signals {
    /// Nothing pending, on the line behind `line`.
    #[must_use]
    pub fn new(line: Arc<EventFd>) -> Self {
        Self {
            pending: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            error: Mutex::new(None),
            line,
        }
    }

    /// The `InterruptStatus` register.
    #[must_use]
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    /// The driver has seen `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.pending.fetch_and(!bits, Ordering::SeqCst);
    }

    /// The `ConfigGeneration` register.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Whether the device has met an error that only a reset cures.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The device cannot go on until the driver resets it (§2.1.2).
    pub fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.signal_config_change();
    }

    /// The device has met `error`, and cannot go on until the driver resets it.
    pub fn fail(&self, error: &dyn std::error::Error) {
        *self.error() = Some(chain_of(error));
        self.set_needs_reset();
    }

    /// The error that the device has met last, kept over resets.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        self.error().clone()
    }

    fn error(&self) -> MutexGuard<'_, Option<String>> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Back to nothing pending; the generation goes on.
    pub fn reset(&self) {
        self.pending.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// Takes over saved bits, and interrupts for them: the edge may have been lost with the old VM.
    pub fn restore(&self, pending: u32, generation: u32) {
        self.generation.store(generation, Ordering::SeqCst);
        self.pending.store(0, Ordering::SeqCst);
        if pending != 0 {
            self.raise(pending);
        }
    }

    /// Raises the line also if the bit is set already: an edge that came while the guest had the line masked is lost.
    fn raise(&self, bit: u32) {
        self.pending.fetch_or(bit, Ordering::SeqCst);
        // Fails only if the counter is full, and then the line is about to be raised anyway.
        let _ = self.line.write(1);
    }
}

impl Interrupt for Signals {
    fn signal_used_queue(&self, _index: u16) {
        self.raise(USED_RING);
    }

    fn signal_config_change(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(CONFIGURATION);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_signal_raises_the_line_and_sets_its_bit_until_it_is_acknowledged() {
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let signals = Signals::new(Arc::clone(&line));
        signals.signal_used_queue(0);
        signals.signal_used_queue(1);
        assert_eq!((line.read().unwrap(), signals.pending()), (2, USED_RING));
        signals.acknowledge(USED_RING);
        assert_eq!(signals.pending(), 0);
        signals.signal_used_queue(0);
        assert_eq!((line.read().unwrap(), signals.pending()), (1, USED_RING));
    }

    #[test]
    fn configuration_change_bumps_the_generation_and_interrupts() {
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let signals = Signals::new(Arc::clone(&line));
        signals.signal_used_queue(0);
        signals.set_needs_reset();
        assert_eq!((signals.pending(), signals.generation()), (3, 1));
        assert_eq!(line.read().unwrap(), 2);
        signals.reset();
        assert_eq!((signals.pending(), signals.generation()), (0, 1));
        assert!(!signals.needs_reset());
    }

    #[test]
    fn restored_bits_interrupt_again() {
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let signals = Signals::new(Arc::clone(&line));
        signals.restore(USED_RING, 7);
        assert_eq!((signals.pending(), signals.generation()), (1, 7));
        assert_eq!(line.read().unwrap(), 1);
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A split virtqueue from the device's side (virtio v1.3 §2.7), with every guest mistake an error.

use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue as Ring, QueueOwnedT, QueueT};
use virtio_wire::Features;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};

use crate::chain::ChainRules;
use crate::{Chain, DeviceError, Interrupt, Progress};

/// Largest queue any device offers; also bounds the descriptors of a chain, so that its buffers fit
/// one `preadv` (the kernel's `IOV_MAX`).
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Chains that one call of [`Queue::serve`] handles before others get their turn.
pub const MAX_CHAINS_PER_WAKE: u32 = 256;

/// Bytes after which one call of [`Queue::serve`] takes no further chain.
pub const MAX_BYTES_PER_WAKE: u64 = 8 << 20;

/// Bytes of the available ring before its entries, and of an entry (virtio v1.3 §2.7.6).
const AVAILABLE_HEADER_BYTES: u64 = 4;
const AVAILABLE_BYTES: u64 = 2;
/// Bytes of the used ring before its entries, and of an entry (virtio v1.3 §2.7.8).
const USED_HEADER_BYTES: u64 = 4;
const USED_BYTES: u64 = 8;

/// A queue's registers and position: what the driver sets up, what is saved, what activation starts from.
///
/// The transport writes the fields as the driver writes its registers; nothing is checked until
/// [`Queue::new`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries; a power of two, at most what the device offered.
    pub size: u16,
    /// Whether the driver has enabled it.
    pub ready: bool,
    /// Guest address of the descriptor table (16-byte aligned).
    pub desc_table: u64,
    /// Guest address of the available ring, the driver's area (2-byte aligned).
    pub avail_ring: u64,
    /// Guest address of the used ring, the device's area (4-byte aligned).
    pub used_ring: u64,
    /// Position in the available ring up to which chains were taken.
    pub next_avail: u16,
    /// Position in the used ring up to which chains were given back.
    pub next_used: u16,
}

/// A validated, live queue.
///
/// Invariants: the size is a power of two up to [`MAX_QUEUE_SIZE`], and the rings were inside guest
/// memory at creation; later accesses are checked again. An error from any method is final: the
/// queue must not be used again.
pub struct Queue {
    index: u16,
    ring: Ring,
    indirect: bool,
    event_index: bool,
    /// Chains given back since the driver was last considered for an interrupt.
    unannounced: u16,
    max_chain_bytes: u32,
}

impl Queue {
    /// Checks `state` against the rules and against memory.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] names the rule.
    pub fn new<M: GuestMemory>(
        index: u16,
        state: &QueueState,
        features: Features,
        max_chain_bytes: u32,
        mem: &M,
    ) -> Result<Self, DeviceError> {
        let bad = |reason| DeviceError::Queue {
            queue: index,
            reason,
        };
        let mut ring = Ring::new(MAX_QUEUE_SIZE).map_err(|_| bad("the size limit is wrong"))?;
        ring.try_set_size(state.size).map_err(|_| {
            bad("its size is zero, too large or not a power of two (virtio v1.3 §2.7)")
        })?;
        ring.try_set_desc_table_address(GuestAddress(state.desc_table))
            .map_err(|_| bad("its descriptor table is not aligned to 16 (virtio v1.3 §2.7)"))?;
        ring.try_set_avail_ring_address(GuestAddress(state.avail_ring))
            .map_err(|_| bad("its available ring is not aligned to 2 (virtio v1.3 §2.7)"))?;
        ring.try_set_used_ring_address(GuestAddress(state.used_ring))
            .map_err(|_| bad("its used ring is not aligned to 4 (virtio v1.3 §2.7)"))?;
        ring.set_ready(state.ready);
        ring.set_next_avail(state.next_avail);
        ring.set_next_used(state.next_used);
        ring.set_event_idx(features.contains(Features::RING_EVENT_IDX));
        if state.avail_ring == 0 || !ring.is_valid(mem) {
            return Err(bad(
                "it is not enabled or its rings are outside guest memory",
            ));
        }
        Ok(Self {
            index,
            ring,
            indirect: features.contains(Features::RING_INDIRECT_DESC),
            event_index: features.contains(Features::RING_EVENT_IDX),
            unannounced: 0,
            max_chain_bytes,
        })
    }

    /// Index of the queue in its device.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Takes the next available chain into `chain`; false if there is none.
    ///
    /// # Errors
    /// The ring or the chain breaks the rules.
    pub fn pop<M: GuestMemory>(&mut self, mem: &M, chain: &mut Chain) -> Result<bool, DeviceError> {
        let queue = self.index;
        let mut available = self
            .ring
            .iter(mem)
            .map_err(|source| DeviceError::Ring { queue, source })?;
        let Some(found) = available.next() else {
            return Ok(false);
        };
        let head = found.head_index();
        let rules = ChainRules {
            table: GuestAddress(self.ring.desc_table()),
            queue_size: self.ring.size(),
            indirect: self.indirect,
            max_bytes: self.max_chain_bytes,
        };
        chain
            .load(mem, &rules, head)
            .map_err(|fault| DeviceError::Chain { queue, head, fault })?;
        Ok(true)
    }

    /// Puts the chain taken last back: the next [`Queue::pop`] finds it again. Again for the one before it, and so on,
    /// as long as none of them has been completed.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Gives chain `head` back with `written` bytes in its writable buffers (virtio v1.3 §2.7.8).
    ///
    /// # Errors
    /// The used ring has left memory, or `head` is not below the queue size.
    pub fn complete<M: GuestMemory>(
        &mut self,
        mem: &M,
        head: u16,
        written: u32,
    ) -> Result<(), DeviceError> {
        self.unannounced = self.unannounced.wrapping_add(1);
        self.ring
            .add_used(mem, head, written)
            .map_err(|source| self.ring_error(source))
    }

    /// Gives chains back, each a head and the bytes written, such that the driver sees all of them or none: what a frame in
    /// several buffers needs (virtio v1.3 §5.1.6.3.2).
    ///
    /// # Errors
    /// As [`Queue::complete`].
    pub fn complete_all<M: GuestMemory>(
        &mut self,
        mem: &M,
        chains: &[(u16, u32)],
    ) -> Result<(), DeviceError> {
        let Some(((head, written), earlier)) = chains.split_last() else {
            return Ok(());
        };
        let mut position = self.ring.next_used();
        for (head, written) in earlier {
            self.write_used(mem, position, *head, *written)?;
            position = position.wrapping_add(1);
            self.unannounced = self.unannounced.wrapping_add(1);
        }
        // The last one moves the ring's index past all of them.
        self.ring.set_next_used(position);
        self.complete(mem, *head, *written)
    }

    fn write_used<M: GuestMemory>(
        &self,
        mem: &M,
        position: u16,
        head: u16,
        written: u32,
    ) -> Result<(), DeviceError> {
        let slot = position & self.ring.size().wrapping_sub(1);
        let offset = USED_HEADER_BYTES.saturating_add(u64::from(slot).saturating_mul(USED_BYTES));
        let entry = u64::from(written) << 32 | u64::from(head);
        GuestAddress(self.ring.used_ring())
            .checked_add(offset)
            .ok_or(virtio_queue::Error::AddressOverflow)
            .and_then(|at| {
                mem.write_obj(entry.to_le(), at)
                    .map_err(virtio_queue::Error::GuestMemory)
            })
            .map_err(|source| self.ring_error(source))
    }

    /// Interrupts the driver if it wants to know of what was completed since the last call (§2.7.7).
    ///
    /// # Errors
    /// The available ring has left memory.
    pub fn notify<M: GuestMemory>(
        &mut self,
        mem: &M,
        interrupt: &dyn Interrupt,
    ) -> Result<(), DeviceError> {
        let mut wanted = self
            .ring
            .needs_notification(mem)
            .map_err(|source| self.ring_error(source))?;
        let unannounced = std::mem::take(&mut self.unannounced);
        if self.event_index {
            // The ring counts what it was given one by one; this counts all.
            let event = self.used_event(mem)?;
            let past = self.ring.next_used().wrapping_sub(event).wrapping_sub(1);
            wanted = past < unannounced;
        }
        if wanted {
            interrupt.signal_used_queue(self.index);
        }
        Ok(())
    }

    /// After which used entry the driver wants an interrupt: what follows the available ring (virtio v1.3 §2.7.7).
    fn used_event<M: GuestMemory>(&self, mem: &M) -> Result<u16, DeviceError> {
        let offset = AVAILABLE_HEADER_BYTES
            .saturating_add(u64::from(self.ring.size()).saturating_mul(AVAILABLE_BYTES));
        GuestAddress(self.ring.avail_ring())
            .checked_add(offset)
            .ok_or(virtio_queue::Error::AddressOverflow)
            .and_then(|at| {
                mem.load(at, Ordering::Relaxed)
                    .map_err(virtio_queue::Error::GuestMemory)
            })
            .map(u16::from_le)
            .map_err(|source| self.ring_error(source))
    }

    /// Asks the driver for no kicks while the queue is being served (§2.7.10).
    ///
    /// # Errors
    /// The used ring has left memory.
    pub fn disable_kicks<M: GuestMemory>(&mut self, mem: &M) -> Result<(), DeviceError> {
        self.ring
            .disable_notification(mem)
            .map_err(|source| self.ring_error(source))
    }

    /// Asks for kicks again; true if chains came in the meantime, for which no kick may come.
    ///
    /// # Errors
    /// The rings have left memory.
    pub fn enable_kicks<M: GuestMemory>(&mut self, mem: &M) -> Result<bool, DeviceError> {
        self.ring
            .enable_notification(mem)
            .map_err(|source| self.ring_error(source))
    }

    /// Whether chains are waiting.
    ///
    /// # Errors
    /// The available ring has left memory.
    pub fn has_available<M: GuestMemory>(&self, mem: &M) -> Result<bool, DeviceError> {
        Ok(self.available(mem)? != 0)
    }

    /// How many chains are waiting, as the driver says it; more than the queue's size is a lie that
    /// `pop` will find.
    ///
    /// # Errors
    /// The available ring has left memory.
    pub fn available<M: GuestMemory>(&self, mem: &M) -> Result<u16, DeviceError> {
        let index = self
            .ring
            .avail_idx(mem, Ordering::Acquire)
            .map_err(|source| self.ring_error(source))?;
        Ok(index.0.wrapping_sub(self.ring.next_avail()))
    }

    /// Takes chains, lets `request` do each, and gives it back with the number of bytes written
    /// that `request` returns; interrupts once at the end. Stops at the caps per wake.
    ///
    /// For queues whose chains are requests of the driver. A device that waits for something to put
    /// into a chain uses `pop` and `complete` itself.
    ///
    /// # Errors
    /// The ring or a chain breaks the rules, or `request` fails.
    pub fn serve<M, F>(
        &mut self,
        mem: &M,
        interrupt: &dyn Interrupt,
        chain: &mut Chain,
        request: F,
    ) -> Result<Progress, DeviceError>
    where
        M: GuestMemory,
        F: FnMut(&Chain) -> Result<u32, DeviceError>,
    {
        self.serve_within(mem, interrupt, chain, (|| None, request))
    }

    /// The same, but before each chain `wait` says whether to stop until later; `request` tells the limit what passed. Chains
    /// that wait cause no kicks.
    ///
    /// # Errors
    /// As [`Queue::serve`].
    pub fn serve_within<M, W, F>(
        &mut self,
        mem: &M,
        interrupt: &dyn Interrupt,
        chain: &mut Chain,
        (wait, mut request): (W, F),
    ) -> Result<Progress, DeviceError>
    where
        M: GuestMemory,
        W: Fn() -> Option<Duration>,
        F: FnMut(&Chain) -> Result<u32, DeviceError>,
    {
        let mut bytes = 0u64;
        let mut chains = 0u32;
        // Passes, not chains: a guest that flips the available index to and fro must not keep us here.
        let mut passes = 0u32;
        self.disable_kicks(mem)?;
        let progress = loop {
            if passes >= MAX_CHAINS_PER_WAKE || bytes >= MAX_BYTES_PER_WAKE {
                break Progress::More;
            }
            passes = passes.saturating_add(1);
            if let Some(wait) = wait()
                && self.has_available(mem)?
            {
                break Progress::Later(wait);
            }
            if self.pop(mem, chain)? {
                let written = request(chain)?;
                self.complete(mem, chain.head(), written)?;
                chains = chains.saturating_add(1);
                bytes = bytes.saturating_add(u64::from(chain.total_len()));
            } else if !self.enable_kicks(mem)? {
                break Progress::Idle;
            }
        };
        if chains > 0 {
            self.notify(mem, interrupt)?;
        }
        Ok(progress)
    }

    /// Registers and position, to save or to start again from.
    #[must_use]
    pub fn state(&self) -> QueueState {
        QueueState {
            size: self.ring.size(),
            ready: self.ring.ready(),
            desc_table: self.ring.desc_table(),
            avail_ring: self.ring.avail_ring(),
            used_ring: self.ring.used_ring(),
            next_avail: self.ring.next_avail(),
            next_used: self.ring.next_used(),
        }
    }

    fn ring_error(&self, source: virtio_queue::Error) -> DeviceError {
        DeviceError::Ring {
            queue: self.index,
            source,
        }
    }
}

#[cfg(test)]
mod tests;

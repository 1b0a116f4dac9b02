// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The guest's buffers for frames that are to come.

use std::collections::VecDeque;

use virtio_wire::Features;
use virtio_wire::net::{HEADER_LEN, NUM_BUFFERS_OFFSET, NetConfig, NetHeader, feature};
use vm_memory::GuestMemory;

use super::{ETHERNET_BYTES, ETHERNET_MTU, MAX_FRAME_BYTES, VLAN_BYTES};
use crate::{
    Chain, ChainFault, DeviceError, Direction, IoSlices, MAX_CHAINS_PER_WAKE, Queue, QueueState,
};

/// The most pieces of memory that one frame is read into; fewer than the kernel takes in one call, as a piece can lie in
/// two regions.
const MAX_PIECES: usize = 1000;

/// The receive queue, and the buffers taken from it ahead of the next frame.
///
/// How long a frame is shows only when it is read, and what does not fit then is lost: so buffers for the longest are taken
/// first, and those that it did not need stay for the next.
pub(super) struct Receive {
    queue: Queue,
    taken: VecDeque<Chain>,
    taken_bytes: u32,
    taken_pieces: usize,
    spare: Vec<Chain>,
    finished: Vec<(u16, u32)>,
    form: Form,
}

/// How the driver wants frames.
#[derive(Clone, Copy)]
struct Form {
    /// Bytes of the longest frame with its header.
    longest: u32,
    /// Whether a frame may span chains.
    mergeable: bool,
    /// Whether the driver reads the header's offload fields.
    offloads: bool,
}

impl Form {
    fn new(features: Features, config: NetConfig) -> Self {
        let segments =
            features.contains(feature::GUEST_TSO4) || features.contains(feature::GUEST_TSO6);
        let mtu = u32::from(config.mtu.max(ETHERNET_MTU));
        let plain = mtu.saturating_add(HEADER_LEN + ETHERNET_BYTES + VLAN_BYTES);
        Self {
            longest: if segments {
                MAX_FRAME_BYTES.max(plain)
            } else {
                plain
            },
            mergeable: features.contains(feature::MRG_RXBUF),
            offloads: features.contains(feature::GUEST_CSUM),
        }
    }
}

impl Receive {
    pub(super) fn new(queue: Queue, features: Features, config: NetConfig) -> Self {
        Self {
            queue,
            taken: VecDeque::new(),
            taken_bytes: 0,
            taken_pieces: 0,
            spare: Vec::new(),
            finished: Vec::new(),
            form: Form::new(features, config),
        }
    }

    pub(super) fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Takes buffers for the longest frame, and puts those it takes behind `slices`; if there are too few, returns false
    /// with kicks on.
    pub(super) fn prepare<'m, M: GuestMemory>(
        &mut self,
        mem: &'m M,
        slices: &mut IoSlices<'m>,
    ) -> Result<bool, DeviceError> {
        // Passes, not chains: a guest that flips the available index to and fro must not keep us here.
        for _ in 0..=MAX_CHAINS_PER_WAKE {
            if self.is_prepared() {
                return Ok(true);
            }
            let mut chain = self.spare.pop().unwrap_or_default();
            if self.queue.pop(mem, &mut chain)? {
                append(slices, mem, &chain)?;
                self.take(chain)?;
                continue;
            }
            self.spare.push(chain);
            if !self.queue.enable_kicks(mem)? {
                return Ok(false);
            }
        }
        Ok(self.is_prepared())
    }

    fn is_prepared(&self) -> bool {
        if self.form.mergeable {
            self.taken_bytes >= self.form.longest
        } else {
            !self.taken.is_empty()
        }
    }

    fn take(&mut self, chain: Chain) -> Result<(), DeviceError> {
        // virtio v1.3 §5.1.6.3.1: room for the header, or for a whole frame where frames do not span chains.
        let least = if self.form.mergeable {
            HEADER_LEN
        } else {
            self.form.longest
        };
        let pieces = self
            .taken_pieces
            .saturating_add(chain.writable.segments().len());
        if chain.writable.len() < least || !chain.readable.is_empty() || pieces > MAX_PIECES {
            return Err(DeviceError::Chain {
                queue: self.queue.index(),
                head: chain.head(),
                fault: ChainFault::BadLayout,
            });
        }
        self.taken_bytes = self.taken_bytes.saturating_add(chain.writable.len());
        self.taken_pieces = pieces;
        self.taken.push_back(chain);
        Ok(())
    }

    /// The buffers that were taken, to read frames into.
    pub(super) fn slices<'m, M: GuestMemory>(
        &self,
        mem: &'m M,
    ) -> Result<IoSlices<'m>, DeviceError> {
        let mut all = IoSlices::empty(Direction::IntoGuest);
        for chain in &self.taken {
            append(&mut all, mem, chain)?;
        }
        Ok(all)
    }

    /// Gives the guest the frame of `len` bytes, header included, that its buffers now hold; returns the bytes of these
    /// buffers behind the frame.
    pub(super) fn deliver<M: GuestMemory>(
        &mut self,
        mem: &M,
        len: u32,
    ) -> Result<u32, DeviceError> {
        self.finished.clear();
        let before = self.taken_bytes;
        let mut left = len;
        let mut first = None;
        while left > 0 {
            let Some(chain) = self.taken.pop_front() else {
                break;
            };
            let written = left.min(chain.writable.len());
            left = left.saturating_sub(written);
            self.taken_bytes = self.taken_bytes.saturating_sub(chain.writable.len());
            self.taken_pieces = self
                .taken_pieces
                .saturating_sub(chain.writable.segments().len());
            self.finished.push((chain.head(), written));
            if first.is_none() {
                first = Some(chain);
            } else {
                self.spare.push(chain);
            }
        }
        if let Some(chain) = first {
            // §5.1.6.4.1: the number of buffers is 1 without mergeable ones; without GUEST_CSUM all else is zero.
            let header = NetHeader {
                num_buffers: u16::try_from(self.finished.len()).unwrap_or(u16::MAX),
                ..NetHeader::default()
            }
            .to_bytes();
            let at = if self.form.offloads {
                NUM_BUFFERS_OFFSET
            } else {
                0
            };
            let bytes = header.get(at as usize..).unwrap_or_default();
            chain.writable.write_at(mem, at, bytes)?;
            self.spare.push(chain);
        }
        self.queue.complete_all(mem, &self.finished)?;
        let given = before.saturating_sub(self.taken_bytes);
        Ok(given.saturating_sub(len))
    }

    /// Puts back the buffers that were taken and not used.
    pub(super) fn put_back(&mut self) -> QueueState {
        while let Some(chain) = self.taken.pop_back() {
            self.queue.undo_pop();
            self.spare.push(chain);
        }
        (self.taken_bytes, self.taken_pieces) = (0, 0);
        self.queue.state()
    }
}

fn append<'m, M: GuestMemory>(
    slices: &mut IoSlices<'m>,
    mem: &'m M,
    chain: &Chain,
) -> Result<(), DeviceError> {
    slices.append(mem, &chain.writable, 0, chain.writable.len())
}

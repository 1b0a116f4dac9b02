// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Which blocks are plugged. Pure: says what is to be done with slots, and does none of it.

use std::ops::Range;

use virtio_wire::mem::{BlockRange, BlockState, MemResponse};

use super::{BLOCK_BYTES, SLOT_BYTES};

/// Blocks of a slot: the bits of a word.
const BLOCKS_PER_SLOT: u64 = SLOT_BYTES / BLOCK_BYTES;
const _: () = assert!(BLOCKS_PER_SLOT == u64::BITS as u64);

/// The blocks of a region, one word for each slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    start: u64,
    words: Vec<u64>,
}

/// Blocks of one slot that a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    slot: usize,
    mask: u64,
}

/// What plugging asks of the host first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plug {
    parts: Vec<Part>,
    /// Slots that are not there yet.
    pub(super) new_slots: Vec<usize>,
}

impl Blocks {
    /// All unplugged; the region has whole slots.
    pub(super) fn new(region: &Range<u64>) -> Self {
        let len = region.end.saturating_sub(region.start);
        let slots = usize::try_from(len / SLOT_BYTES).unwrap_or(0);
        Self {
            start: region.start,
            words: vec![0; slots],
        }
    }

    /// Bytes of the region.
    pub(super) fn len(&self) -> u64 {
        (self.words.len() as u64).saturating_mul(SLOT_BYTES)
    }

    /// Where a slot is.
    pub(super) fn address(&self, slot: usize) -> u64 {
        self.start
            .saturating_add((slot as u64).saturating_mul(SLOT_BYTES))
    }

    /// Bytes plugged.
    pub(super) fn plugged(&self) -> u64 {
        let blocks = self.words.iter().map(|word| u64::from(word.count_ones()));
        blocks.sum::<u64>().saturating_mul(BLOCK_BYTES)
    }

    /// The slots with a plugged block, and which of their blocks are.
    pub(super) fn present(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let words = self.words.iter().copied().enumerate();
        words.filter(|(_, word)| *word != 0)
    }

    /// The blocks of a request; none if they are not whole blocks of the region (§5.15.6.1).
    fn parts(&self, range: BlockRange) -> Option<Vec<Part>> {
        let offset = range.addr.checked_sub(self.start)?;
        if range.blocks == 0 || offset % BLOCK_BYTES != 0 {
            return None;
        }
        let first = offset / BLOCK_BYTES;
        let end = first.checked_add(u64::from(range.blocks))?;
        if end > self.len() / BLOCK_BYTES {
            return None;
        }
        let slots = first / BLOCKS_PER_SLOT..end.div_ceil(BLOCKS_PER_SLOT);
        let part = |slot: u64| {
            let base = slot.saturating_mul(BLOCKS_PER_SLOT);
            let from = first.saturating_sub(base);
            let to = end.saturating_sub(base).min(BLOCKS_PER_SLOT);
            let count = to.saturating_sub(from);
            let mask =
                u64::MAX.checked_shr(u32::try_from(BLOCKS_PER_SLOT.saturating_sub(count)).ok()?)?;
            Some(Part {
                slot: usize::try_from(slot).ok()?,
                mask: mask.checked_shl(u32::try_from(from).ok()?)?,
            })
        };
        slots.map(part).collect()
    }

    fn word(&self, slot: usize) -> u64 {
        self.words.get(slot).copied().unwrap_or(0)
    }

    fn all(&self, parts: &[Part], plugged: bool) -> bool {
        parts.iter().all(|part| {
            let set = self.word(part.slot) & part.mask;
            set == if plugged { part.mask } else { 0 }
        })
    }

    /// What it takes to plug these blocks with so many bytes `requested`; or the answer that refuses it.
    pub(super) fn plan_plug(&self, range: BlockRange, requested: u64) -> Result<Plug, MemResponse> {
        let parts = self.parts(range).ok_or(MemResponse::Error)?;
        if !self.all(&parts, false) {
            return Err(MemResponse::Error);
        }
        let more = u64::from(range.blocks).saturating_mul(BLOCK_BYTES);
        if self.plugged().saturating_add(more) > requested {
            return Err(MemResponse::Nack);
        }
        let slots = parts.iter().map(|part| part.slot);
        let new_slots: Vec<usize> = slots.filter(|slot| self.word(*slot) == 0).collect();
        let slots = (self.present().count() as u64).saturating_add(new_slots.len() as u64);
        if !new_slots.is_empty() && slots > requested.div_ceil(SLOT_BYTES) {
            return Err(MemResponse::Nack);
        }
        Ok(Plug { parts, new_slots })
    }

    /// The blocks are plugged: their slots are there.
    pub(super) fn plug(&mut self, plug: &Plug) {
        for part in &plug.parts {
            if let Some(word) = self.words.get_mut(part.slot) {
                *word |= part.mask;
            }
        }
    }

    /// Unplugs these blocks and names the slots that are to go; or the answer that refuses it.
    pub(super) fn unplug(&mut self, range: BlockRange) -> Result<Vec<usize>, MemResponse> {
        let parts = self.parts(range).ok_or(MemResponse::Error)?;
        if !self.all(&parts, true) {
            return Err(MemResponse::Error);
        }
        let mut empty = Vec::new();
        for part in parts {
            if let Some(word) = self.words.get_mut(part.slot) {
                *word &= !part.mask;
                if *word == 0 {
                    empty.push(part.slot);
                }
            }
        }
        Ok(empty)
    }

    /// What these blocks are.
    pub(super) fn state(&self, range: BlockRange) -> MemResponse {
        match self.parts(range) {
            None => MemResponse::Error,
            Some(parts) if self.all(&parts, true) => MemResponse::State(BlockState::Plugged),
            Some(parts) if self.all(&parts, false) => MemResponse::State(BlockState::Unplugged),
            Some(_) => MemResponse::State(BlockState::Mixed),
        }
    }

    /// Takes over which blocks are plugged; false if a slot is not in the region, comes twice or out of order, or has no
    /// plugged block.
    pub(super) fn load(&mut self, present: &[(u32, u64)]) -> bool {
        self.words.fill(0);
        let mut next = 0;
        for (slot, blocks) in present {
            let slot = usize::try_from(*slot).unwrap_or(usize::MAX);
            let Some(word) = self
                .words
                .get_mut(slot)
                .filter(|_| slot >= next && *blocks != 0)
            else {
                return false;
            };
            *word = *blocks;
            next = slot.saturating_add(1);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: u64 = 4 << 30;
    const SLOTS: u64 = 4;

    fn blocks() -> Blocks {
        Blocks::new(&(START..START + SLOTS * SLOT_BYTES))
    }

    fn range(block: u64, blocks: u16) -> BlockRange {
        BlockRange {
            addr: START + block * BLOCK_BYTES,
            blocks,
        }
    }

    #[test]
    fn range_over_a_slots_border_has_a_part_in_each() {
        let parts = blocks().parts(range(63, 66)).unwrap();
        let mask = |slot: usize| parts[slot].mask;
        assert_eq!((mask(0), mask(1), mask(2)), (1 << 63, u64::MAX, 1));
    }

    #[test]
    fn what_is_not_whole_blocks_of_the_region_is_an_error() {
        let mut all = blocks();
        let unaligned = BlockRange {
            addr: START + 1,
            blocks: 1,
        };
        let below = BlockRange {
            addr: START - BLOCK_BYTES,
            blocks: 1,
        };
        let far = BlockRange {
            addr: !(BLOCK_BYTES - 1),
            blocks: u16::MAX,
        };
        for bad in [
            unaligned,
            below,
            far,
            range(0, 0),
            range(255, 2),
            range(256, 1),
        ] {
            assert_eq!(all.plan_plug(bad, u64::MAX), Err(MemResponse::Error));
            assert_eq!(all.unplug(bad), Err(MemResponse::Error));
            assert_eq!(all.state(bad), MemResponse::Error);
        }
        assert!(all.plan_plug(range(255, 1), u64::MAX).is_ok());
    }

    #[test]
    fn plugging_stops_at_the_requested_size_and_at_its_slots() {
        let mut all = blocks();
        let requested = 65 * BLOCK_BYTES; // two slots
        for block in [0, 64] {
            let plug = all.plan_plug(range(block, 1), requested).unwrap();
            assert_eq!(plug.new_slots.len(), 1);
            all.plug(&plug);
        }
        let third_slot = all.plan_plug(range(128, 1), requested);
        assert_eq!(third_slot, Err(MemResponse::Nack));
        assert_eq!(
            all.plan_plug(range(1, 1), requested).unwrap().new_slots,
            Vec::<usize>::new()
        );
        assert_eq!(
            all.plan_plug(range(2, 64), requested),
            Err(MemResponse::Error),
            "one of them is plugged"
        );
        assert_eq!(
            all.plan_plug(range(1, 1), 2 * BLOCK_BYTES),
            Err(MemResponse::Nack)
        );
    }

    proptest! {
        #[test]
        fn requests_in_any_order_keep_the_invariants(
            requests in prop::collection::vec((0u8..3, 0u64..260, 0u16..80, 0u64..300), 0..60)
        ) {
            let mut all = blocks();
            let mut model = [false; 256];
            for (kind, block, count, requested) in requests {
                let end = block + u64::from(count);
                let valid = count > 0 && end <= 256;
                let of = |model: &[bool], wanted: bool| {
                    valid && (block..end).all(|at| model[usize::try_from(at).unwrap()] == wanted)
                };
                let requested = requested * BLOCK_BYTES;
                if kind == 0 {
                    let before = all.plugged();
                    match all.plan_plug(range(block, count), requested) {
                        Ok(plug) => {
                            prop_assert!(of(&model, false));
                            all.plug(&plug);
                            prop_assert!(all.plugged() <= requested);
                            let slots = all.present().count() as u64;
                            prop_assert!(plug.new_slots.is_empty() || slots <= requested.div_ceil(SLOT_BYTES));
                            (block..end).for_each(|at| model[usize::try_from(at).unwrap()] = true);
                        }
                        Err(MemResponse::Nack) => prop_assert!(of(&model, false)),
                        Err(_) => prop_assert!(!of(&model, false)),
                    }
                    prop_assert!(all.plugged() >= before);
                } else if kind == 1 {
                    let done = all.unplug(range(block, count)).is_ok();
                    prop_assert_eq!(done, of(&model, true));
                    if done {
                        (block..end).for_each(|at| model[usize::try_from(at).unwrap()] = false);
                    }
                } else {
                    let expected = if !valid {
                        MemResponse::Error
                    } else if of(&model, true) {
                        MemResponse::State(BlockState::Plugged)
                    } else if of(&model, false) {
                        MemResponse::State(BlockState::Unplugged)
                    } else {
                        MemResponse::State(BlockState::Mixed)
                    };
                    prop_assert_eq!(all.state(range(block, count)), expected);
                }
                let plugged = model.iter().filter(|plugged| **plugged).count() as u64;
                prop_assert_eq!(all.plugged(), plugged * BLOCK_BYTES);
                let mut copy = blocks();
                let saved: Vec<(u32, u64)> = all
                    .present()
                    .map(|(slot, word)| (u32::try_from(slot).unwrap(), word))
                    .collect();
                prop_assert!(copy.load(&saved));
                prop_assert_eq!(&copy, &all);
            }
        }
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A bounded table whose places are reused and whose ids are not.
//!
//! An event of the kernel, or an entry of the ready list, can be about a stream that has ended since, whose place
//! another has by now. The generation in the id tells them apart.

/// Names one entry, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct EntryId {
    place: u32,
    generation: u32,
}

impl EntryId {
    /// As one number, for the kernel to hand back.
    pub(super) fn to_token(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.place)
    }

    /// From the number.
    pub(super) fn from_token(token: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = token.to_le_bytes();
        Self {
            place: u32::from_le_bytes([a, b, c, d]),
            generation: u32::from_le_bytes([e, f, g, h]),
        }
    }

    /// Tells users of one place apart.
    pub(super) fn generation(self) -> u32 {
        self.generation
    }
}

struct Place<T> {
    generation: u32,
    entry: Option<T>,
}

/// At most `capacity` entries; grows as needed and keeps its places.
pub(super) struct Table<T> {
    places: Vec<Place<T>>,
    free: Vec<u32>,
    capacity: usize,
}

impl<T> Table<T> {
    /// An empty table.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            places: Vec::new(),
            free: Vec::new(),
            capacity,
        }
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.places.len().saturating_sub(self.free.len())
    }

    /// Whether [`Table::insert`] would fail.
    pub(super) fn is_full(&self) -> bool {
        self.len() >= self.capacity
    }

    /// Adds what `make` makes of its id; `None` if the table is full.
    pub(super) fn insert(&mut self, make: impl FnOnce(EntryId) -> T) -> Option<EntryId> {
        if self.is_full() {
            return None;
        }
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                let place = u32::try_from(self.places.len()).ok()?;
                self.places.push(Place {
                    generation: 0,
                    entry: None,
                });
                place
            }
        };
        let found = self.places.get_mut(usize::try_from(place).ok()?)?;
        let id = EntryId {
            place,
            generation: found.generation,
        };
        found.entry = Some(make(id));
        Some(id)
    }

    /// The entry, if it is still there.
    pub(super) fn get(&self, id: EntryId) -> Option<&T> {
        let place = self.places.get(usize::try_from(id.place).ok()?)?;
        let entry = place.entry.as_ref()?;
        (place.generation == id.generation).then_some(entry)
    }

    /// The entry, if it is still there.
    pub(super) fn get_mut(&mut self, id: EntryId) -> Option<&mut T> {
        let place = self.places.get_mut(usize::try_from(id.place).ok()?)?;
        let entry = place.entry.as_mut()?;
        (place.generation == id.generation).then_some(entry)
    }

    /// Makes another entry of the one that is there, under the same id.
    pub(super) fn replace(&mut self, id: EntryId, make: impl FnOnce(T) -> T) {
        let place = usize::try_from(id.place).ok();
        if let Some(place) = place.and_then(|place| self.places.get_mut(place))
            && place.generation == id.generation
        {
            place.entry = place.entry.take().map(make);
        }
    }

    /// Takes the entry out; its id is never used again before 2^32 others had its place.
    pub(super) fn remove(&mut self, id: EntryId) -> Option<T> {
        let place = self.places.get_mut(usize::try_from(id.place).ok()?)?;
        if place.generation != id.generation {
            return None;
        }
        let entry = place.entry.take()?;
        place.generation = place.generation.wrapping_add(1);
        self.free.push(id.place);
        Some(entry)
    }

    /// All entries, in no order that means anything.
    pub(super) fn iter(&self) -> impl Iterator<Item = (EntryId, &T)> {
        (0u32..).zip(&self.places).filter_map(|(place, found)| {
            let generation = found.generation;
            let entry = found.entry.as_ref()?;
            Some((EntryId { place, generation }, entry))
        })
    }

    /// All entries, in no order that means anything.
    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.places
            .iter_mut()
            .filter_map(|place| place.entry.as_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_reused_does_not_answer_to_the_old_id() {
        let mut table = Table::new(4);
        let old = table.insert(|_| 'a').unwrap();
        assert_eq!(table.remove(old), Some('a'));
        let new = table.insert(|_| 'b').unwrap();
        assert_eq!(old.place, new.place);
        assert_eq!((table.get(old), table.get(new)), (None, Some(&'b')));
        assert_eq!(table.remove(old), None);
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn table_at_capacity_refuses_one_more() {
        let mut table = Table::new(2);
        let first = table.insert(|_| ()).unwrap();
        assert!(table.insert(|_| ()).is_some());
        assert!(table.is_full());
        assert!(table.insert(|_| ()).is_none());
        table.remove(first);
        assert!(table.insert(|_| ()).is_some());
    }

    #[test]
    fn id_survives_its_token() {
        let id = EntryId {
            place: 7,
            generation: u32::MAX,
        };
        assert_eq!(EntryId::from_token(id.to_token()), id);
    }
}

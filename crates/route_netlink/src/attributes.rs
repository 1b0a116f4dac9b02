// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Attributes of messages (netlink(7)): length u16, kind u16, value, padded to 4 bytes.

/// Bytes before the value.
const HEADER: usize = 4;
/// `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`, flags in the kind.
const FLAGS: u16 = 0xc000;

/// A body that is being written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes(Vec<u8>);

impl Attributes {
    /// Attributes behind `structure`, which a message begins with; nested ones have none.
    #[must_use]
    pub fn behind(structure: &[u8]) -> Self {
        let mut bytes = structure.to_vec();
        pad(&mut bytes);
        Self(bytes)
    }

    /// Adds one. A value longer than an attribute can be (64 KiB) is left out, and the kernel misses it.
    #[must_use]
    pub fn with(mut self, kind: u16, value: &[u8]) -> Self {
        if let Ok(length) = u16::try_from(HEADER.saturating_add(value.len())) {
            self.0.extend(length.to_ne_bytes());
            self.0.extend(kind.to_ne_bytes());
            self.0.extend(value);
            pad(&mut self.0);
        }
        self
    }

    /// Adds one that holds others.
    #[must_use]
    pub fn nested(self, kind: u16, inner: &Self) -> Self {
        self.with(kind, &inner.0)
    }

    /// Whether there is nothing in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The bytes.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// The kinds and values in `bytes`, up to the first that is none.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let &[l0, l1, k0, k1] = bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & !FLAGS, value))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_back() {
        let inner = Attributes::default().with(7, &[9]);
        let bytes = Attributes::behind(&[1, 2, 3])
            .with(1, b"abc")
            .nested(0x8002, &inner)
            .with(3, &[])
            .into_bytes();
        assert_eq!(bytes.len(), 4 + 8 + (4 + 8) + 4);
        let read: Vec<_> = attributes(&bytes[4..]).collect();
        assert_eq!(read[0], (1, &b"abc"[..]));
        assert_eq!(read[1].0, 2);
        assert_eq!(attributes(read[1].1).collect::<Vec<_>>(), [(7, &[9][..])]);
        assert_eq!(read[2], (3, &[][..]));
        assert_eq!(read.len(), 3);
    }

    #[test]
    fn attribute_that_is_cut_ends_the_list() {
        for bytes in [
            &[][..],
            &[4, 0, 1],
            &[3, 0, 1, 0],
            &[9, 0, 1, 0, 5, 5, 5, 5],
        ] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }
}

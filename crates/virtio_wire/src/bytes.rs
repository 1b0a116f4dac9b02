// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Little-endian reads from, and writes to, byte slices that may be shorter than hoped.

/// Why bytes could not be parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// The slice ends before the structure does.
    #[error("{what} needs {need} bytes and got {got}; the driver sent a short structure")]
    Short {
        /// Structure that was being read.
        what: &'static str,
        /// Bytes that it takes.
        need: usize,
        /// Bytes that there were.
        got: usize,
    },
    /// A field holds a value that its structure forbids.
    #[error("{what} holds {value:#x}, which virtio forbids; the driver is at fault")]
    Forbidden {
        /// Structure and field.
        what: &'static str,
        /// The value found.
        value: u64,
    },
}

/// Takes the first `N` bytes off `bytes`, or says which structure was cut short.
pub(crate) fn take<const N: usize>(
    bytes: &mut &[u8],
    what: &'static str,
) -> Result<[u8; N], WireError> {
    match bytes.split_first_chunk::<N>() {
        Some((head, rest)) => {
            *bytes = rest;
            Ok(*head)
        }
        None => Err(WireError::Short {
            what,
            need: N,
            got: bytes.len(),
        }),
    }
}

pub(crate) fn take_u16(bytes: &mut &[u8], what: &'static str) -> Result<u16, WireError> {
    take(bytes, what).map(u16::from_le_bytes)
}

pub(crate) fn take_u32(bytes: &mut &[u8], what: &'static str) -> Result<u32, WireError> {
    take(bytes, what).map(u32::from_le_bytes)
}

pub(crate) fn take_u64(bytes: &mut &[u8], what: &'static str) -> Result<u64, WireError> {
    take(bytes, what).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_slice_names_structure_and_lengths() {
        let mut bytes: &[u8] = &[1, 2, 3];
        let error = take_u32(&mut bytes, "test header").unwrap_err();
        assert_eq!(
            error,
            WireError::Short {
                what: "test header",
                need: 4,
                got: 3
            }
        );
        assert_eq!(bytes.len(), 3, "a failed read takes nothing");
    }

    #[test]
    fn fields_are_little_endian() {
        let mut bytes: &[u8] = &[2, 0, 3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(take_u16(&mut bytes, "t"), Ok(2));
        assert_eq!(take_u32(&mut bytes, "t"), Ok(3));
        assert_eq!(take_u64(&mut bytes, "t"), Ok(4));
    }
}

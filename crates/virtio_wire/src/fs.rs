// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! File system device structures (virtio v1.3 §5.11). What the queues carry is FUSE, which nothing here reads.

use crate::WireError;

/// Index of the queue for requests that go before others: FORGET, INTERRUPT (§5.11.2).
pub const HIGH_PRIORITY_QUEUE: u16 = 0;
/// Index of the one request queue; without `VIRTIO_FS_F_NOTIFICATION` it comes next (§5.11.2).
pub const REQUEST_QUEUE: u16 = 1;
/// Queues of a device with one request queue.
pub const QUEUES: usize = 2;
/// The longest tag (§5.11.4).
pub const MAX_TAG_BYTES: usize = 36;
/// Bytes of the configuration space without `VIRTIO_FS_F_NOTIFICATION` (§5.11.4).
pub const CONFIG_BYTES: usize = 40;

/// Configuration space as a driver reads it: the tag, padded with zeroes, and one request queue (§5.11.4).
///
/// # Errors
/// The tag is empty, too long or has a zero in it.
pub fn config(tag: &str) -> Result<[u8; CONFIG_BYTES], WireError> {
    let mut config = [0; CONFIG_BYTES];
    let bad = WireError::Forbidden {
        what: "length or content of a file system tag",
        value: tag.len() as u64,
    };
    if tag.is_empty() || tag.len() > MAX_TAG_BYTES || tag.contains('\0') {
        return Err(bad);
    }
    let (name, queues) = config.split_at_mut(MAX_TAG_BYTES);
    name.iter_mut()
        .zip(tag.bytes())
        .for_each(|(to, from)| *to = from);
    queues.copy_from_slice(&1u32.to_le_bytes());
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_is_the_padded_tag_and_one_queue() {
        let config = config("vol").unwrap();
        assert_eq!(&config[..4], b"vol\0");
        assert_eq!(&config[36..], &[1, 0, 0, 0]);
    }

    #[test]
    fn longest_tag_fills_its_field_and_one_byte_more_is_refused() {
        assert_eq!(&config(&"x".repeat(36)).unwrap()[..36], [b'x'; 36]);
        for bad in ["", "a\0b", &"x".repeat(37)] {
            assert!(config(bad).is_err(), "{bad:?}");
        }
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! vhost-user messages of a front end (QEMU's `docs/interop/vhost-user.rst`): what it sends, and how it reads answers.
//!
//! The back end is another process, which is not trusted: an answer is checked against what was asked. Fields are in the
//! host's byte order, which here is little-endian.

use crate::WireError;
use crate::bytes::take_u32;

/// Bytes of a header: request, flags, size of what follows.
pub const HEADER_BYTES: usize = 12;
/// Feature bit with which a back end offers protocol features.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol feature: several queues.
pub const PROTOCOL_F_MQ: u64 = 1 << 0;
/// Protocol feature: a request is confirmed if its sender asks for it.
pub const PROTOCOL_F_REPLY_ACK: u64 = 1 << 3;
/// The most regions that every back end takes.
pub const MAX_REGIONS: usize = 8;

/// Bits 0 and 1 of the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A request of a front end, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request(pub u32);

impl Request {
    /// Answered with the features that the back end offers.
    pub const GET_FEATURES: Self = Self(1);
    /// The features that the driver has accepted.
    pub const SET_FEATURES: Self = Self(2);
    /// The sender is the front end from now on.
    pub const SET_OWNER: Self = Self(3);
    /// Guest memory, a descriptor for each region.
    pub const SET_MEM_TABLE: Self = Self(5);
    /// Size of a queue.
    pub const SET_VRING_NUM: Self = Self(8);
    /// Addresses of a queue's rings.
    pub const SET_VRING_ADDR: Self = Self(9);
    /// Position in a queue's available ring.
    pub const SET_VRING_BASE: Self = Self(10);
    /// Stops a queue; answered with its position.
    pub const GET_VRING_BASE: Self = Self(11);
    /// A queue's kick, as a descriptor; starts the queue.
    pub const SET_VRING_KICK: Self = Self(12);
    /// A queue's interrupt, as a descriptor.
    pub const SET_VRING_CALL: Self = Self(13);
    /// Answered with the protocol features that the back end offers.
    pub const GET_PROTOCOL_FEATURES: Self = Self(15);
    /// The protocol features that are used.
    pub const SET_PROTOCOL_FEATURES: Self = Self(16);
    /// Enables or disables a queue.
    pub const SET_VRING_ENABLE: Self = Self(18);
}

/// Whether the back end shall confirm a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirmation {
    /// Yes; it takes [`PROTOCOL_F_REPLY_ACK`].
    Asked,
    /// No, or the request has an answer of its own.
    None,
}

/// The bytes of a request: header and payload.
///
/// # Errors
/// The payload is longer than any message may be (4 GiB).
pub fn request(
    request: Request,
    payload: &[u8],
    confirmation: Confirmation,
) -> Result<Vec<u8>, WireError> {
    let size = u32::try_from(payload.len()).map_err(|_| WireError::Forbidden {
        what: "size of a vhost-user message",
        value: payload.len() as u64,
    })?;
    let flags = match confirmation {
        Confirmation::Asked => VERSION | NEED_REPLY,
        Confirmation::None => VERSION,
    };
    let words = [request.0, flags, size];
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Checks the header of an answer to `request`, whose payload is to have 8 bytes, as all those of this front end have.
///
/// # Errors
/// It is something else.
pub fn check_reply(request: Request, header: [u8; HEADER_BYTES]) -> Result<(), WireError> {
    let mut bytes: &[u8] = &header;
    let number = take_u32(&mut bytes, "vhost-user header")?;
    let flags = take_u32(&mut bytes, "vhost-user header")?;
    let size = take_u32(&mut bytes, "vhost-user header")?;
    let forbidden = |what, value: u32| WireError::Forbidden {
        what,
        value: u64::from(value),
    };
    if number != request.0 {
        return Err(forbidden("request of a vhost-user answer", number));
    }
    if flags & (VERSION_MASK | REPLY) != VERSION | REPLY {
        return Err(forbidden("flags of a vhost-user answer", flags));
    }
    if size != 8 {
        return Err(forbidden("size of a vhost-user answer", size));
    }
    Ok(())
}

/// The payload of [`Request::GET_VRING_BASE`]'s answer: the queue and its position.
///
/// # Errors
/// It is another queue's, or no position of a ring.
pub fn vring_base(index: u16, payload: [u8; 8]) -> Result<u16, WireError> {
    let mut bytes: &[u8] = &payload;
    let queue = take_u32(&mut bytes, "vhost-user queue state")?;
    let position = take_u32(&mut bytes, "vhost-user queue state")?;
    let forbidden = |what, value: u32| WireError::Forbidden {
        what,
        value: u64::from(value),
    };
    if queue != u32::from(index) {
        return Err(forbidden("queue of a vhost-user answer", queue));
    }
    u16::try_from(position).map_err(|_| forbidden("position of a vhost-user queue", position))
}

/// The payload of an answer that is one number.
#[must_use]
pub fn number(payload: [u8; 8]) -> u64 {
    u64::from_le_bytes(payload)
}

/// The payload of requests about one queue and one number.
#[must_use]
pub fn vring_state(index: u16, value: u32) -> Vec<u8> {
    let words = [u32::from(index), value];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The payload of requests with a queue's descriptor: its index; bit 8 clear says that a descriptor comes with it.
#[must_use]
pub fn vring_descriptor(index: u16) -> Vec<u8> {
    u64::from(index).to_le_bytes().to_vec()
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its guest address. It also serves as the front end's own address of it, which nobody needs to know.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Where it begins in its descriptor's file.
    pub offset: u64,
}

/// The payload of [`Request::SET_MEM_TABLE`].
///
/// # Errors
/// There are more than [`MAX_REGIONS`].
pub fn memory_table(regions: &[Region]) -> Result<Vec<u8>, WireError> {
    let count = u32::try_from(regions.len()).unwrap_or(u32::MAX);
    if regions.len() > MAX_REGIONS {
        return Err(WireError::Forbidden {
            what: "number of vhost-user memory regions",
            value: u64::from(count),
        });
    }
    let mut bytes = head(count);
    for region in regions {
        let numbers = [region.address, region.len, region.address, region.offset];
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    }
    Ok(bytes)
}

/// The payload of [`Request::SET_VRING_ADDR`], with addresses as in [`Region::address`].
#[must_use]
pub fn vring_addresses(index: u16, descriptors: u64, used: u64, available: u64) -> Vec<u8> {
    let mut bytes = head(u32::from(index));
    let numbers = [descriptors, used, available, 0];
    bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    bytes
}

/// A number, and flags or padding of zero.
fn head(number: u32) -> Vec<u8> {
    let words = [number, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(words: [u32; 3]) -> [u8; HEADER_BYTES] {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.try_into().unwrap()
    }

    #[test]
    fn request_is_header_and_payload() {
        let bytes = request(Request::SET_VRING_NUM, &[1, 2], Confirmation::Asked).unwrap();
        assert_eq!(bytes, [8, 0, 0, 0, 9, 0, 0, 0, 2, 0, 0, 0, 1, 2]);
        let bytes = request(Request::SET_OWNER, &[], Confirmation::None).unwrap();
        assert_eq!(bytes, header([3, 1, 0]));
    }

    #[test]
    fn only_an_answer_to_what_was_asked_is_taken() {
        let asked = Request::GET_FEATURES;
        assert_eq!(check_reply(asked, header([1, 5, 8])), Ok(()));
        for bad in [[2, 5, 8], [1, 1, 8], [1, 6, 8], [1, 5, 0], [1, 5, u32::MAX]] {
            assert!(check_reply(asked, header(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn position_is_of_the_queue_that_was_asked_for() {
        let payload = |queue: u32, position: u32| {
            let [a, b, c, d] = queue.to_le_bytes();
            let [e, f, g, h] = position.to_le_bytes();
            [a, b, c, d, e, f, g, h]
        };
        assert_eq!(vring_base(1, payload(1, 0xffff)), Ok(0xffff));
        assert!(vring_base(1, payload(0, 0)).is_err());
        assert!(vring_base(1, payload(1, 0x1_0000)).is_err());
    }

    #[test]
    fn table_holds_as_many_regions_as_every_back_end_takes() {
        let region = Region {
            address: 0x1000,
            len: 2,
            offset: 3,
        };
        let bytes = memory_table(&[region]).unwrap();
        assert_eq!(bytes.len(), 8 + 32);
        assert_eq!(&bytes[8..16], &bytes[24..32], "guest address twice");
        assert!(memory_table(&[region; MAX_REGIONS]).is_ok());
        assert!(memory_table(&[region; MAX_REGIONS + 1]).is_err());
    }
}

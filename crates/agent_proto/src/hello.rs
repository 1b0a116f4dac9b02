// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The frame that opens the control connection: four bytes of length (little-endian), then an [`api::Hello`].

use protobuf::Message;

use crate::api;

/// The longest [`api::Hello`] that the host reads, in bytes. Two version strings and four numbers need far less.
pub const MAX_HELLO_LEN: u32 = 1024;

/// Why a [`api::Hello`] was refused.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The length is over [`MAX_HELLO_LEN`].
    #[error("the guest's hello is {0} bytes long, at most {MAX_HELLO_LEN} are allowed")]
    TooLong(u32),
    /// Not a protobuf message.
    #[error("the guest's hello cannot be decoded")]
    Malformed(#[source] protobuf::Error),
    /// The agent is of another release.
    #[error(
        "the guest agent speaks protocol {theirs}, the shim {}: install the initramfs of the same release",
        crate::PROTOCOL_VERSION
    )]
    Version {
        /// The agent's version.
        theirs: u32,
    },
}

/// The frame for `hello`.
///
/// # Errors
/// [`HelloError::TooLong`] if its strings are too long.
pub fn encode(hello: &api::Hello) -> Result<Vec<u8>, HelloError> {
    let body = hello.write_to_bytes().map_err(HelloError::Malformed)?;
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    if len > MAX_HELLO_LEN {
        return Err(HelloError::TooLong(len));
    }
    let mut frame = len.to_le_bytes().to_vec();
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// The body's length from the frame's first four bytes.
///
/// # Errors
/// [`HelloError::TooLong`] past [`MAX_HELLO_LEN`].
pub fn decode_len(prefix: [u8; 4]) -> Result<usize, HelloError> {
    let len = u32::from_le_bytes(prefix);
    if len > MAX_HELLO_LEN {
        return Err(HelloError::TooLong(len));
    }
    usize::try_from(len).map_err(|_| HelloError::TooLong(len))
}

/// The message from the frame's body.
///
/// # Errors
/// [`HelloError::Malformed`], or [`HelloError::Version`] if the agent is of another release.
pub fn decode(body: &[u8]) -> Result<api::Hello, HelloError> {
    let hello = api::Hello::parse_from_bytes(body).map_err(HelloError::Malformed)?;
    if hello.protocol_version != crate::PROTOCOL_VERSION {
        return Err(HelloError::Version {
            theirs: hello.protocol_version,
        });
    }
    Ok(hello)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> api::Hello {
        api::Hello {
            protocol_version: crate::PROTOCOL_VERSION,
            kernel_release: "6.12.1".to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn frame_decodes_to_what_was_encoded() {
        let frame = encode(&hello()).unwrap();
        let (prefix, body) = frame.split_at(4);
        assert_eq!(decode_len(prefix.try_into().unwrap()).unwrap(), body.len());
        assert_eq!(decode(body).unwrap(), hello());
    }

    #[test]
    fn length_one_past_the_cap_is_refused() {
        assert!(decode_len(MAX_HELLO_LEN.to_le_bytes()).is_ok());
        assert!(matches!(
            decode_len((MAX_HELLO_LEN + 1).to_le_bytes()),
            Err(HelloError::TooLong(1025))
        ));
        let long = api::Hello {
            agent_version: "x".repeat(2000),
            ..hello()
        };
        assert!(matches!(encode(&long), Err(HelloError::TooLong(_))));
    }

    #[test]
    fn another_release_is_refused_with_advice() {
        let frame = encode(&api::Hello {
            protocol_version: 7,
            ..hello()
        })
        .unwrap();
        let error = decode(&frame[4..]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the guest agent speaks protocol 7, the shim 1: install the initramfs of the same release"
        );
    }
}

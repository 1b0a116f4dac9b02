// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The header that opens a stdio connection and says whose stream it is.
//!
//! ```text
//! magic "CFS1" | kind u8 | generation u64 LE | container id: len u8, bytes | exec id: len u8 (0: init), bytes
//! ```

use ids::{ContainerId, ExecId, Generation};

const MAGIC: &[u8; 4] = b"CFS1";

/// The longest header in bytes: fixed part, and two ids with their lengths.
pub const MAX_HEADER_LEN: usize = 4 + 1 + 8 + 2 * (1 + ids::MAX_ID_LEN);

/// One of a process's three streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StreamKind {
    /// Host to guest.
    Stdin,
    /// Guest to host; carries both directions' echo where there is a terminal.
    Stdout,
    /// Guest to host.
    Stderr,
}

/// A process that one of the two ends knows, told apart from earlier ones of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessKey {
    /// The container.
    pub container: ContainerId,
    /// The exec, or `None` for the container's init.
    pub exec: Option<ExecId>,
    /// Tells a second exec of one name from the first.
    pub generation: Generation,
}

/// What a stdio connection carries.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct StreamHeader {
    /// Whose stream.
    pub process: ProcessKey,
    /// Which of the three.
    pub kind: StreamKind,
}

/// Why bytes are no header.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// More bytes are needed; not an error while the connection goes on.
    #[error("the stream header is incomplete")]
    Incomplete,
    /// The first bytes are not the magic.
    #[error("the stream header does not begin with its magic")]
    Magic,
    /// No such kind of stream.
    #[error("stream kind {0} is not known")]
    Kind(u8),
    /// An id is not valid.
    #[error("the stream header names no valid process")]
    Id(#[source] ids::InvalidId),
    /// An id is not UTF-8.
    #[error("the stream header's {0} id is not UTF-8")]
    Utf8(&'static str),
}

impl StreamKind {
    fn to_wire(self) -> u8 {
        match self {
            Self::Stdin => 1,
            Self::Stdout => 2,
            Self::Stderr => 3,
        }
    }

    fn from_wire(value: u8) -> Result<Self, HeaderError> {
        match value {
            1 => Ok(Self::Stdin),
            2 => Ok(Self::Stdout),
            3 => Ok(Self::Stderr),
            other => Err(HeaderError::Kind(other)),
        }
    }
}

impl StreamHeader {
    /// The header's bytes, at most [`MAX_HEADER_LEN`].
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.push(self.kind.to_wire());
        bytes.extend_from_slice(&self.process.generation.0.to_le_bytes());
        let exec = self.process.exec.as_ref().map_or("", ExecId::as_str);
        for id in [self.process.container.as_str(), exec] {
            // An id is at most MAX_ID_LEN (76) bytes long.
            bytes.push(u8::try_from(id.len()).unwrap_or(u8::MAX));
            bytes.extend_from_slice(id.as_bytes());
        }
        bytes
    }

    /// The header that `bytes` begin with, and its length. What follows is the stream's.
    ///
    /// # Errors
    /// [`HeaderError::Incomplete`] while more bytes are needed; any other error is final.
    pub fn decode(bytes: &[u8]) -> Result<(Self, usize), HeaderError> {
        let (magic, rest) = take(bytes, MAGIC.len()).map_err(|_| {
            if MAGIC.starts_with(bytes) {
                HeaderError::Incomplete
            } else {
                HeaderError::Magic
            }
        })?;
        if magic != MAGIC {
            return Err(HeaderError::Magic);
        }
        let (kind, rest) = take_byte(rest)?;
        let kind = StreamKind::from_wire(kind)?;
        let (generation, rest) = take(rest, 8)?;
        let generation = Generation(u64::from_le_bytes(
            generation.try_into().map_err(|_| HeaderError::Incomplete)?,
        ));
        let (container, rest) = take_text(rest, "container")?;
        let container: ContainerId = container.parse().map_err(HeaderError::Id)?;
        let (exec, rest) = take_text(rest, "exec")?;
        let exec = match exec {
            "" => None,
            text => Some(text.parse::<ExecId>().map_err(HeaderError::Id)?),
        };
        let header = Self {
            process: ProcessKey {
                container,
                exec,
                generation,
            },
            kind,
        };
        Ok((header, bytes.len().saturating_sub(rest.len())))
    }
}

fn take(bytes: &[u8], len: usize) -> Result<(&[u8], &[u8]), HeaderError> {
    bytes.split_at_checked(len).ok_or(HeaderError::Incomplete)
}

fn take_byte(bytes: &[u8]) -> Result<(u8, &[u8]), HeaderError> {
    bytes
        .split_first()
        .map(|(first, rest)| (*first, rest))
        .ok_or(HeaderError::Incomplete)
}

fn take_text<'a>(bytes: &'a [u8], what: &'static str) -> Result<(&'a str, &'a [u8]), HeaderError> {
    let (len, rest) = take_byte(bytes)?;
    let (text, rest) = take(rest, usize::from(len))?;
    Ok((
        std::str::from_utf8(text).map_err(|_| HeaderError::Utf8(what))?,
        rest,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(exec: Option<&str>) -> StreamHeader {
        StreamHeader {
            process: ProcessKey {
                container: "web-1".parse().unwrap(),
                exec: exec.map(|id| id.parse().unwrap()),
                generation: Generation(7),
            },
            kind: StreamKind::Stderr,
        }
    }

    #[test]
    fn header_decodes_to_what_was_encoded() {
        for exec in [None, Some("probe")] {
            let mut bytes = header(exec).encode();
            let len = bytes.len();
            bytes.extend_from_slice(b"payload");
            assert_eq!(StreamHeader::decode(&bytes).unwrap(), (header(exec), len));
        }
    }

    #[test]
    fn every_prefix_is_incomplete() {
        let bytes = header(Some("probe")).encode();
        for len in 0..bytes.len() {
            assert_eq!(
                StreamHeader::decode(&bytes[..len]),
                Err(HeaderError::Incomplete),
                "{len}"
            );
        }
    }

    #[test]
    fn longest_ids_fit_the_named_cap() {
        let id = "x".repeat(ids::MAX_ID_LEN);
        let header = StreamHeader {
            process: ProcessKey {
                container: id.parse().unwrap(),
                exec: Some(id.parse().unwrap()),
                generation: Generation(u64::MAX),
            },
            kind: StreamKind::Stdin,
        };
        assert_eq!(header.encode().len(), MAX_HEADER_LEN);
    }

    #[test]
    fn wrong_magic_kind_and_ids_are_refused() {
        assert_eq!(StreamHeader::decode(b"HTTP/1.1"), Err(HeaderError::Magic));
        let mut bytes = header(None).encode();
        bytes[4] = 9;
        assert_eq!(StreamHeader::decode(&bytes), Err(HeaderError::Kind(9)));
        let mut bytes = header(None).encode();
        bytes[14] = b'/';
        assert!(matches!(
            StreamHeader::decode(&bytes),
            Err(HeaderError::Id(_))
        ));
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Identifiers as containerd defines them, and the serial number of a disk.

use std::fmt;
use std::str::FromStr;

/// The longest identifier, in bytes (containerd's `identifiers.maxLength`).
pub const MAX_ID_LEN: usize = 76;

/// Why a string is no identifier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidId {
    kind: &'static str,
    reason: Reason,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Reason {
    Empty,
    TooLong { len: usize, max: usize },
    Character { character: char, at: usize },
}

impl fmt::Display for InvalidId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Reason::Empty => write!(f, "{} is empty", self.kind),
            Reason::TooLong { len, max } => {
                write!(
                    f,
                    "{} is {len} bytes long, at most {max} are allowed",
                    self.kind
                )
            }
            Reason::Character { character, at } => write!(
                f,
                "{} has {character:?} at byte {at}: only letters, digits and single '.', '_' or '-' \
                 between them are allowed",
                self.kind
            ),
        }
    }
}

impl std::error::Error for InvalidId {}

/// Letters and digits, with single separators between them: containerd's rule for ids and namespaces. It rules out
/// `/`, `..` and everything else that could leave a directory.
fn check(kind: &'static str, text: &str, max: usize) -> Result<(), InvalidId> {
    let invalid = |reason| InvalidId { kind, reason };
    if text.is_empty() {
        return Err(invalid(Reason::Empty));
    }
    if text.len() > max {
        return Err(invalid(Reason::TooLong {
            len: text.len(),
            max,
        }));
    }
    let mut after_separator = true;
    let last = text.len().saturating_sub(1);
    for (at, character) in text.char_indices() {
        let separator = matches!(character, '.' | '_' | '-');
        let allowed =
            character.is_ascii_alphanumeric() || (separator && !after_separator && at != last);
        if !allowed {
            return Err(invalid(Reason::Character { character, at }));
        }
        after_separator = separator;
    }
    Ok(())
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $max:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                check($kind, text, $max)?;
                Ok(Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                check($kind, &text, $max)?;
                Ok(Self(text))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

identifier!(
    /// A sandbox: one pod's VM, named after the pod's first container.
    SandboxId, "sandbox id", MAX_ID_LEN
);
identifier!(
    /// One OCI container in a sandbox.
    ContainerId, "container id", MAX_ID_LEN
);
identifier!(
    /// A further process in a container.
    ExecId, "exec id", MAX_ID_LEN
);
identifier!(
    /// A containerd namespace.
    Namespace, "namespace", MAX_ID_LEN
);
identifier!(
    /// The serial number by which the guest finds a disk: virtio v1.3 §5.2.6.1 gives `VIRTIO_BLK_T_GET_ID` 20 bytes.
    DiskSerial, "disk serial", 20
);

impl From<&SandboxId> for ContainerId {
    /// The sandbox container of a pod carries the pod's id.
    fn from(id: &SandboxId) -> Self {
        Self(id.0.clone())
    }
}

impl From<&ContainerId> for SandboxId {
    /// A container without a pod gets a sandbox of its own, under its own id.
    fn from(id: &ContainerId) -> Self {
        Self(id.0.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_ids_are_accepted() {
        for text in [
            "a",
            "nginx-1",
            "0f3a",
            "k8s.io",
            "a_b.c-d",
            &"x".repeat(MAX_ID_LEN),
        ] {
            assert_eq!(text.parse::<ContainerId>().unwrap().as_str(), text);
        }
    }

    #[test]
    fn paths_and_doubled_separators_are_refused() {
        for text in [
            "", ".", "..", "a/b", "../x", "a..b", "-a", "a-", "a b", "ä", "a\0",
        ] {
            assert!(text.parse::<ContainerId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn one_byte_past_the_cap_is_refused() {
        let error = "x".repeat(MAX_ID_LEN + 1).parse::<SandboxId>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "sandbox id is 77 bytes long, at most 76 are allowed"
        );
        assert!("s".repeat(20).parse::<DiskSerial>().is_ok());
        assert!("s".repeat(21).parse::<DiskSerial>().is_err());
    }

    #[test]
    fn refusal_names_character_and_place() {
        let error = "ab/c".parse::<ExecId>().unwrap_err().to_string();
        assert!(error.starts_with("exec id has '/' at byte 2"), "{error}");
    }
}

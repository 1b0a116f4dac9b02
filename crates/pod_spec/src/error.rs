// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Why a spec was refused.

use crate::sizing::VmSize;

/// A bundle that Coffer does not run. Each message names the field and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The bundle's `config.json` is larger than the cap.
    #[error("config.json is {len} bytes long, at most {max} are allowed")]
    TooLong {
        /// Its length in bytes.
        len: usize,
        /// The cap in bytes.
        max: usize,
    },
    /// Not JSON, or not an OCI runtime spec.
    #[error("config.json is no OCI runtime spec")]
    Json(#[source] serde_json::Error),
    /// The process of an exec is not one.
    #[error("the exec's spec is no OCI process")]
    ExecJson(#[source] serde_json::Error),
    /// The resources of an update are none.
    #[error("the update holds no OCI LinuxResources")]
    ResourcesJson(#[source] serde_json::Error),
    /// An update wants more than the pod's VM has and can have.
    #[error(
        "linux.resources.{field} is {wanted}, the pod's VM has {} vCPUs and {} MiB of memory and cannot have more \
         while it runs: make the pod anew with larger limits",
        .vm.vcpus.get(), .vm.memory.0
    )]
    BeyondVm {
        /// The field below `linux.resources`.
        field: &'static str,
        /// What was asked, with its unit.
        wanted: String,
        /// What there is.
        vm: VmSize,
    },
    /// A field that the OCI runtime spec requires is missing.
    #[error("config.json has no {0}: the OCI runtime spec requires it for a Linux container")]
    Missing(&'static str),
    /// An annotation's value is not what it must be.
    #[error("annotation {key} is {value:?}: {expected}")]
    Annotation {
        /// The annotation's key.
        key: &'static str,
        /// What it holds.
        value: String,
        /// What was expected.
        expected: String,
    },
    /// An annotation with Coffer's prefix that Coffer does not know.
    #[error("unknown annotation {key}{}", did_you_mean(.nearest))]
    UnknownAnnotation {
        /// Its key, cut.
        key: String,
        /// The nearest that there is.
        nearest: Option<&'static str>,
    },
    /// An annotation of Coffer's that the node does not allow.
    #[error(
        "annotation {0} is not allowed on this node: leave it out, or have the operator add it to annotations.allow in \
         the node's config"
    )]
    AnnotationNotAllowed(&'static str),
    /// An id is not valid.
    #[error("config.json names no valid sandbox")]
    Id(#[source] ids::InvalidId),
    /// The pod wants a namespace of the host.
    #[error(
        "the pod asks for the host's {0} namespace, which a VM does not have: run pods with {1} under a runtime class of \
         runc"
    )]
    HostNamespace(&'static str, &'static str),
    /// A feature that Coffer does not have.
    #[error("{field}: {reason}")]
    Unsupported {
        /// The field, as in config.json.
        field: String,
        /// Why it is refused and what to do instead.
        reason: String,
    },
    /// The pod is larger than the node's config allows.
    #[error(
        "the pod wants {wanted} {unit}, the node's config allows {limit}: lower the pod's limits or raise {key}"
    )]
    TooLarge {
        /// What was asked.
        wanted: u64,
        /// "vCPUs" or "MiB of memory".
        unit: &'static str,
        /// The config's limit.
        limit: u64,
        /// The config's key.
        key: &'static str,
    },
}

/// The most characters of a text of the pod's author that go into an error.
const MAX_SHOWN: usize = 64;

/// A text of the pod's author, cut for an error.
pub(crate) fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

fn did_you_mean(nearest: &Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |nearest| format!(": did you mean {nearest}?"))
}

impl SpecError {
    pub(crate) fn unsupported(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

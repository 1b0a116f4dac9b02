// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The annotations by which a pod changes its VM, as far as the node's config lets it. Pure.
//!
//! They are the one way by which whoever writes a pod spec speaks to Coffer, so the list is closed and short: a key of
//! [`PREFIX`] that is not in it is refused, one that is in it is refused unless the node allows that very key, and each
//! value has bounds that no key can move. None names a path, a program, a kernel argument or a border's strength.

use std::collections::HashMap;

use ids::{Mib, VcpuCount};

use crate::config::{Guest, MIN_VM_MEMORY, RuntimeConfig};
use crate::config_text;
use crate::error::{SpecError, shown};

/// How every annotation of Coffer's begins.
pub const PREFIX: &str = "io.coffer.";

/// An annotation that Coffer knows.
#[derive(Debug)]
pub struct Annotation {
    /// The whole key.
    pub key: &'static str,
    /// What the value is.
    pub value: &'static str,
    /// The bounds of the value, for people; both are included.
    pub bounds: &'static str,
    /// What it does.
    pub meaning: &'static str,
}

/// All that Coffer knows.
pub const ANNOTATIONS: &[Annotation] = &[
    Annotation {
        key: VCPUS,
        value: "a whole number",
        bounds: "1 to `guest.max_vcpus`",
        meaning: "virtual CPUs of the pod's VM, in place of the pod's CPU limit rounded up; the limit itself stays",
    },
    Annotation {
        key: MEMORY,
        value: "a whole number of MiB",
        bounds: "96 to `guest.max_memory_mib`; with a memory limit, to that limit plus `guest.overhead_memory_mib`",
        meaning: "memory of the pod's VM, its guest kernel and agent included",
    },
];

const VCPUS: &str = "io.coffer.vm.vcpus";
const MEMORY: &str = "io.coffer.vm.memory_mib";

/// What a pod's annotations change.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Overrides {
    pub(crate) vcpus: Option<VcpuCount>,
    pub(crate) memory: Option<Mib>,
}

/// The annotation with this very key.
pub(crate) fn find(key: &str) -> Option<&'static Annotation> {
    ANNOTATIONS.iter().find(|known| known.key == key)
}

/// The key that `key` was most likely meant to be.
pub(crate) fn nearest(key: &str) -> Option<&'static str> {
    let known = || ANNOTATIONS.iter().map(|known| known.key);
    let found = config_text::nearest(ending(&shown(key)), known().map(ending))?;
    known().find(|key| ending(key) == found)
}

/// What tells one annotation from another.
fn ending(key: &str) -> &str {
    key.strip_prefix(PREFIX).unwrap_or(key)
}

impl Overrides {
    /// What a pod's annotations change of its VM on a node with this config.
    ///
    /// # Errors
    /// [`SpecError::UnknownAnnotation`], [`SpecError::AnnotationNotAllowed`] or [`SpecError::Annotation`].
    pub fn read(
        annotations: Option<&HashMap<String, String>>,
        config: &RuntimeConfig,
    ) -> Result<Self, SpecError> {
        let mut own: Vec<(&String, &String)> = annotations
            .into_iter()
            .flatten()
            .filter(|(key, _)| key.starts_with(PREFIX))
            .collect();
        // The same one is complained of each time.
        own.sort();
        let mut overrides = Self::default();
        for (key, value) in own {
            let known = find(key).ok_or_else(|| SpecError::UnknownAnnotation {
                key: shown(key),
                nearest: nearest(key),
            })?;
            if !config.annotations.allow.contains(known.key) {
                return Err(SpecError::AnnotationNotAllowed(known.key));
            }
            overrides.set(known.key, value, &config.guest)?;
        }
        Ok(overrides)
    }

    fn set(&mut self, key: &'static str, value: &str, guest: &Guest) -> Result<(), SpecError> {
        match key {
            VCPUS => {
                let number = number(
                    key,
                    value,
                    (1, guest.max_vcpus.get().into()),
                    "guest.max_vcpus",
                )?;
                self.vcpus = u8::try_from(number).ok().and_then(VcpuCount::new);
            }
            MEMORY => {
                let bounds = (MIN_VM_MEMORY.0, guest.max_memory.0);
                self.memory = Some(Mib(number(key, value, bounds, "guest.max_memory_mib")?));
            }
            // Each of `ANNOTATIONS` has its place above, as a test sees.
            _ => {}
        }
        Ok(())
    }

    /// The memory that is asked for, if it is no more than the pod's limit gives.
    ///
    /// # Errors
    /// [`SpecError::Annotation`].
    pub(crate) fn memory_within(&self, limit: Mib) -> Result<Option<Mib>, SpecError> {
        match self.memory {
            Some(memory) if memory > limit => Err(SpecError::Annotation {
                key: MEMORY,
                value: memory.0.to_string(),
                expected: format!(
                    "at most {} MiB are allowed, which is the pod's memory limit plus guest.overhead_memory_mib: raise \
                     the limit, or leave the annotation out",
                    limit.0
                ),
            }),
            memory => Ok(memory),
        }
    }

    /// A container's own: containerd gives it the pod's, and what else it asks for can no more be had.
    ///
    /// # Errors
    /// [`SpecError::Annotation`] if it differs from the pod's.
    pub fn check_within(&self, pod: &Self) -> Result<(), SpecError> {
        let differs = |key, value: Option<String>| match value {
            None => Ok(()),
            Some(value) => Err(SpecError::Annotation {
                key,
                value,
                expected: "the pod's VM is made without it: annotate the pod, not its container"
                    .to_owned(),
            }),
        };
        differs(
            VCPUS,
            self.vcpus
                .filter(|_| self.vcpus != pod.vcpus)
                .map(|vcpus| vcpus.get().to_string()),
        )?;
        differs(
            MEMORY,
            self.memory
                .filter(|_| self.memory != pod.memory)
                .map(|memory| memory.0.to_string()),
        )
    }
}

/// A whole number in plain digits within `bounds`; `limit` is the config's key of the upper one.
fn number(
    key: &'static str,
    value: &str,
    bounds: (u32, u32),
    limit: &str,
) -> Result<u32, SpecError> {
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    let number = value.parse().ok().filter(|_| digits);
    number
        .filter(|number| (bounds.0..=bounds.1).contains(number))
        .ok_or_else(|| SpecError::Annotation {
            key,
            value: shown(value),
            expected: format!(
                "a whole number from {} to {} was expected; {limit} in the node's config says the latter",
                bounds.0, bounds.1
            ),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)], allowed: &[&'static str]) -> Result<Overrides, String> {
        let text = "[guest]\nmax_vcpus = 8\nmax_memory_mib = 4096";
        let mut config = RuntimeConfig::parse(text).unwrap();
        config.annotations.allow = allowed.iter().copied().collect();
        let annotations: HashMap<String, String> = pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        Overrides::read(Some(&annotations), &config).map_err(|error| error.to_string())
    }

    #[test]
    fn every_known_annotation_has_an_effect_and_a_row_of_the_page() {
        let page = include_str!("../../../docs/annotations.md");
        let rows: Vec<&str> = page
            .lines()
            .filter(|line| line.starts_with("| `"))
            .collect();
        let wanted: Vec<String> = ANNOTATIONS
            .iter()
            .map(|known| {
                format!(
                    "| `{}` | {} | {} | {} |",
                    known.key, known.value, known.bounds, known.meaning
                )
            })
            .collect();
        assert_eq!(rows, wanted, "docs/annotations.md");
        for known in ANNOTATIONS {
            assert!(known.key.starts_with(PREFIX));
            // A number that is in the bounds of all of them.
            let value = if known.key == MEMORY { "128" } else { "2" };
            let overrides = read(&[(known.key, value)], &[known.key]).unwrap();
            assert_ne!(overrides, Overrides::default(), "{}", known.key);
        }
    }

    #[test]
    fn annotation_that_the_node_does_not_allow_is_refused_with_the_key_to_set() {
        let error = read(&[(VCPUS, "2")], &[MEMORY]).unwrap_err();
        assert_eq!(
            error,
            "annotation io.coffer.vm.vcpus is not allowed on this node: leave it out, or have the operator add it to \
             annotations.allow in the node's config"
        );
    }

    #[test]
    fn unknown_annotation_of_ours_is_refused_with_the_nearest() {
        let all = [VCPUS, MEMORY];
        assert_eq!(
            read(&[("io.coffer.vm.vcpu", "2")], &all).unwrap_err(),
            "unknown annotation io.coffer.vm.vcpu: did you mean io.coffer.vm.vcpus?"
        );
        let long = format!("{PREFIX}{}", "x".repeat(1000));
        let error = read(&[(&long, "2")], &all).unwrap_err();
        assert!(
            error.starts_with("unknown annotation io.coffer.xxx"),
            "{error}"
        );
        assert!(error.len() < 200, "{error}");
    }

    #[test]
    fn keys_match_exactly() {
        for key in [
            "io.coffer.vm.vcpus ",
            "io.coffer.VM.vcpus",
            "io.coffer.vm.vcpus/x",
            "io.coffer.",
        ] {
            assert!(read(&[(key, "2")], &[VCPUS]).is_err(), "{key:?}");
        }
        // Others' annotations are not ours to judge.
        for key in [
            "io.coffer",
            "io.cofferx.vm",
            "kubernetes.io/io.coffer.vm.vcpus",
            "xio.coffer.vm.vcpus",
        ] {
            assert_eq!(
                read(&[(key, "2")], &[]).unwrap(),
                Overrides::default(),
                "{key:?}"
            );
        }
    }

    #[test]
    fn values_out_of_bounds_are_refused_with_the_bounds() {
        let all = [VCPUS, MEMORY];
        assert_eq!(
            read(&[(VCPUS, "9")], &all).unwrap_err(),
            "annotation io.coffer.vm.vcpus is \"9\": a whole number from 1 to 8 was expected; guest.max_vcpus in the \
             node's config says the latter"
        );
        for (least, most, key) in [(1, 8, VCPUS), (96, 4096, MEMORY)] {
            for good in [least, most] {
                read(&[(key, &good.to_string())], &all).unwrap();
            }
            for bad in [(least - 1).to_string(), (most + 1).to_string()] {
                assert!(read(&[(key, &bad)], &all).is_err(), "{key} {bad}");
            }
        }
        for bad in [
            "",
            "+2",
            "-1",
            " 2",
            "2 ",
            "0x2",
            "2.0",
            "2Gi",
            "99999999999999999999",
            "\u{0662}",
        ] {
            assert!(read(&[(VCPUS, bad)], &all).is_err(), "{bad:?}");
        }
        let error = read(&[(VCPUS, &"9".repeat(100_000))], &all).unwrap_err();
        assert!(error.len() < 300, "{error}");
    }

    #[test]
    fn container_may_repeat_what_its_pod_has_and_nothing_else() {
        let all = [VCPUS, MEMORY];
        let pod = read(&[(VCPUS, "2")], &all).unwrap();
        Overrides::default().check_within(&pod).unwrap();
        pod.check_within(&pod).unwrap();
        for other in [(VCPUS, "3"), (MEMORY, "128")] {
            let container = read(&[other], &all).unwrap();
            let error = container.check_within(&pod).unwrap_err().to_string();
            assert!(
                error.ends_with("annotate the pod, not its container"),
                "{error}"
            );
        }
    }
}

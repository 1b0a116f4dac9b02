// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a pod's traffic is held to: the node's limits, and the pod's own below them.

use std::collections::HashMap;
use std::num::NonZeroU64;

use ids::{Limit, Limits, Rate};

use crate::config::Traffic;
use crate::error::SpecError;

/// Frames to the pod, in bits per second, as the CNI's bandwidth plugin understands it too.
const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
/// Frames from the pod.
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// What Kubernetes itself accepts: from 1k to 1P bits per second.
const BITS: std::ops::RangeInclusive<u128> = 1_000..=1_000_000_000_000_000;

impl Traffic {
    /// The limits of a pod with these annotations. Of the node's rate and the pod's, the lower one holds.
    ///
    /// # Errors
    /// [`SpecError::Annotation`] for a bandwidth that is no quantity from 1k to 1P.
    pub fn limits(&self, annotations: &HashMap<String, String>) -> Result<Limits, SpecError> {
        let mut limits = Limits {
            ingress: Limit {
                bytes: self.rate(self.ingress_bytes),
                operations: self.rate(self.ingress_packets),
            },
            egress: Limit {
                bytes: self.rate(self.egress_bytes),
                operations: self.rate(self.egress_packets),
            },
            disk: Limit {
                bytes: self.rate(self.disk_bytes),
                operations: self.rate(self.disk_operations),
            },
        };
        for (key, bytes) in [
            (INGRESS, &mut limits.ingress.bytes),
            (EGRESS, &mut limits.egress.bytes),
        ] {
            if let Some(wanted) = bandwidth(annotations, key)? {
                let of_the_node = bytes.map(|rate| rate.per_second.get());
                let lower = of_the_node.map_or(wanted, |most| most.min(wanted));
                *bytes = self.rate(lower);
            }
        }
        Ok(limits)
    }

    /// The rate with the node's burst; none for zero.
    fn rate(&self, per_second: u64) -> Option<Rate> {
        let burst = u128::from(per_second).saturating_mul(u128::from(self.burst_ms)) / 1000;
        let burst = NonZeroU64::new(u64::try_from(burst).unwrap_or(u64::MAX));
        Rate::new(per_second).map(|rate| rate.with_burst(burst.unwrap_or(NonZeroU64::MIN)))
    }
}

/// Whether an update has a say in a pod's limits.
pub fn is_traffic_annotation(key: &str) -> bool {
    [INGRESS, EGRESS].contains(&key)
}

/// Bytes per second.
fn bandwidth(
    annotations: &HashMap<String, String>,
    key: &'static str,
) -> Result<Option<u64>, SpecError> {
    let Some(value) = annotations.get(key) else {
        return Ok(None);
    };
    quantity(value)
        .filter(|bits| BITS.contains(bits))
        .and_then(|bits| u64::try_from(bits / 8).ok())
        .map(Some)
        .ok_or_else(|| SpecError::Annotation {
            key,
            value: value.clone(),
            expected: "bits per second from 1k to 1P were expected, such as 10M".to_owned(),
        })
}

/// A Kubernetes quantity, rounded down to a whole number: digits, perhaps a fraction, and a suffix.
fn quantity(text: &str) -> Option<u128> {
    let end = text
        .find(|character: char| !character.is_ascii_digit() && character != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at_checked(end)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let scale = match suffix {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => exponent(suffix)?,
    };
    let digits = |text: &str| match text {
        "" => Some(0),
        _ => text.parse::<u128>().ok(),
    };
    let fraction_scale = 10_u128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let part = digits(fraction)?
        .checked_mul(scale)?
        .checked_div(fraction_scale)?;
    digits(whole)?.checked_mul(scale)?.checked_add(part)
}

/// `e6` and `E6`.
fn exponent(suffix: &str) -> Option<u128> {
    let digits = suffix.strip_prefix(['e', 'E'])?;
    10_u128.checked_pow(digits.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RuntimeConfig;

    fn traffic(text: &str) -> Traffic {
        RuntimeConfig::parse(text).unwrap().limits
    }

    fn with(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    fn per_second(rate: Option<Rate>) -> u64 {
        rate.map_or(0, |rate| rate.per_second.get())
    }

    #[test]
    fn nothing_is_limited_unless_somebody_says_so() {
        let limits = traffic("").limits(&with(&[("other", "1k")])).unwrap();
        assert_eq!(limits, Limits::default());
    }

    #[test]
    fn limits_of_the_node_hold_for_every_pod() {
        let text = "[limits]\ningress_mbit = 8\negress_mbit = 16\ningress_packets = 1000\negress_packets = 2000\n\
                    disk_mib = 3\ndisk_operations = 500\nburst_ms = 50";
        let limits = traffic(text).limits(&HashMap::new()).unwrap();
        let found = [
            limits.ingress.bytes,
            limits.egress.bytes,
            limits.ingress.operations,
            limits.egress.operations,
            limits.disk.bytes,
            limits.disk.operations,
        ];
        let wanted = [1_000_000, 2_000_000, 1000, 2000, 3 << 20, 500];
        assert_eq!(found.map(per_second), wanted);
        assert_eq!(limits.ingress.bytes.unwrap().burst.get(), 50_000);
        assert_eq!(limits.disk.operations.unwrap().burst.get(), 25);
    }

    #[test]
    fn bandwidth_of_the_pod_counts_where_it_is_lower() {
        let annotations = with(&[(INGRESS, "8M"), (EGRESS, "1G")]);
        let free = traffic("").limits(&annotations).unwrap();
        assert_eq!(per_second(free.ingress.bytes), 1_000_000);
        assert_eq!(per_second(free.egress.bytes), 125_000_000);
        let held = traffic("[limits]\ningress_mbit = 100\negress_mbit = 100")
            .limits(&annotations)
            .unwrap();
        assert_eq!(per_second(held.ingress.bytes), 1_000_000);
        assert_eq!(per_second(held.egress.bytes), 12_500_000);
    }

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for (text, bits) in [
            ("1000", 1000),
            ("10M", 10_000_000),
            ("1.5G", 1_500_000_000),
            (".5M", 500_000),
            ("1e6", 1_000_000),
            ("2E3", 2000),
            ("1Mi", 1 << 20),
        ] {
            assert_eq!(quantity(text), Some(bits), "{text}");
        }
        for text in [
            "",
            "M",
            ".",
            "-1M",
            "+1M",
            "1 M",
            "1m",
            "1MM",
            "1.2.3",
            "1e",
            "1e99",
            "0x10",
            "ten",
            "1.5.k",
            "١M",
            "99999999999999999999999999999999999999999",
            "1e-3",
        ] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }

    #[test]
    fn bandwidth_that_is_none_is_refused_by_name() {
        for value in ["", "fast", "999", "2P", "10m"] {
            let error = traffic("").limits(&with(&[(EGRESS, value)])).unwrap_err();
            let text = error.to_string();
            assert!(
                text.starts_with("annotation kubernetes.io/egress-bandwidth is "),
                "{text}"
            );
        }
    }
}

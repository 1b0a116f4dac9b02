// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the pod's traffic is held to, as it is and as updates change it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use ids::Limits;
use pod_spec::{SpecError, Traffic, is_traffic_annotation};

/// The node's limits, and what the pod has said of its own.
#[derive(Debug)]
pub(crate) struct PodTraffic {
    node: Traffic,
    annotations: Mutex<HashMap<String, String>>,
}

impl PodTraffic {
    /// The traffic of a pod with these annotations.
    pub(crate) fn new(node: Traffic, annotations: HashMap<String, String>) -> Self {
        Self {
            node,
            annotations: Mutex::new(annotations),
        }
    }

    /// The limits after an update with these annotations; `None` if they say nothing of limits. What they leave out stays.
    ///
    /// # Errors
    /// [`SpecError::Annotation`]; nothing has changed.
    pub(crate) fn update(
        &self,
        changes: &HashMap<String, String>,
    ) -> Result<Option<Limits>, SpecError> {
        if !changes.keys().any(|key| is_traffic_annotation(key)) {
            return Ok(None);
        }
        let mut annotations = self
            .annotations
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut changed = annotations.clone();
        let changes = changes.iter().filter(|(key, _)| is_traffic_annotation(key));
        changed.extend(changes.map(|(key, value)| (key.clone(), value.clone())));
        let limits = self.node.limits(&changed)?;
        *annotations = changed;
        Ok(Some(limits))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
    const EGRESS: &str = "kubernetes.io/egress-bandwidth";

    fn with(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn update_changes_what_it_names_and_nothing_when_it_is_wrong() {
        let node = pod_spec::RuntimeConfig::parse("[limits]\nburst_ms = 50").unwrap();
        let traffic = PodTraffic::new(node.limits, with(&[(INGRESS, "8M")]));
        assert_eq!(traffic.update(&with(&[("other", "x")])).unwrap(), None);
        let rates = |limits: Option<Limits>| {
            let limits = limits.unwrap();
            [limits.ingress, limits.egress]
                .map(|limit| limit.bytes.map_or(0, |rate| rate.per_second.get()))
        };
        let both = traffic.update(&with(&[(EGRESS, "16M")])).unwrap();
        assert_eq!(rates(both), [1_000_000, 2_000_000]);
        traffic.update(&with(&[(INGRESS, "fast")])).unwrap_err();
        let again = traffic.update(&with(&[(EGRESS, "24M")])).unwrap();
        assert_eq!(rates(again), [1_000_000, 3_000_000]);
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a pod's containers may use, and how large its VM has to be for it. Pure.
//!
//! The size follows from what there is, never from what has changed: the limits of the containers that exist, each
//! counted once by its id. So a container that crashes and is made again a thousand times leaves no trace.
//!
//! | | wanted |
//! |---|---|
//! | until the first update | what the VM was started with, or more if the containers need it |
//! | limits for the pod as a whole | these |
//! | every container has a limit | the sum |
//! | one has none | the sum, but at least what the VM was started with |
//!
//! Memory is that plus the containers' huge pages and the overhead. All of it stays between the smallest VM and the largest that this one can become.

use std::collections::BTreeMap;

use ids::{Bytes, ContainerId, Mib, VcpuCount};

use crate::config::MIN_VM_MEMORY;
use crate::sizing::{Limits, PodSize, VmSize};
use crate::update::LimitChanges;

/// CPU time is added up in these, so that the sum of what Kubernetes writes (thousandths) is exact.
const CPU_PARTS: u64 = 1_000_000;

/// The limits in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    size: PodSize,
    pod: Limits,
    containers: BTreeMap<ContainerId, Limits>,
    /// Somebody has said what the pod may use since the VM was started.
    updated: bool,
}

impl Ledger {
    /// No container yet, in a VM of this size.
    #[must_use]
    pub fn new(size: PodSize) -> Self {
        Self {
            size,
            pod: Limits::default(),
            containers: BTreeMap::new(),
            updated: false,
        }
    }

    /// A container is made with these limits.
    pub fn add(&mut self, container: ContainerId, limits: Limits) {
        self.containers.insert(container, limits);
    }

    /// A container is gone; an unknown one is not an error.
    pub fn remove(&mut self, container: &ContainerId) {
        self.containers.remove(container);
    }

    /// A container gets other limits.
    pub fn update(&mut self, container: &ContainerId, changes: &LimitChanges) {
        self.updated = true;
        if let Some(limits) = self.containers.get_mut(container) {
            changes.apply(limits);
        }
    }

    /// The pod as a whole gets other limits.
    pub fn update_pod(&mut self, changes: &LimitChanges) {
        self.updated = true;
        changes.apply(&mut self.pod);
    }

    /// The VM that this wants, which is one that it can become.
    #[must_use]
    pub fn wanted(&self) -> VmSize {
        let PodSize {
            started_with,
            largest,
            ..
        } = self.size;
        VmSize {
            vcpus: self
                .vcpus()
                .unwrap_or(started_with.vcpus)
                .min(largest.vcpus),
            memory: self.memory().clamp(MIN_VM_MEMORY, largest.memory),
        }
    }

    /// Whether a sum over all containers says what the pod may use.
    fn all<T>(&self, limit: impl Fn(&Limits) -> Option<T>) -> bool {
        let all = self
            .containers
            .values()
            .all(|limits| limit(limits).is_some());
        self.updated && all && !self.containers.is_empty()
    }

    /// `None` if nobody limits them.
    fn vcpus(&self) -> Option<VcpuCount> {
        let parts = |limits: &Limits| {
            let (quota, period) = limits.cpu?;
            let parts = u128::from(quota).saturating_mul(u128::from(CPU_PARTS));
            u64::try_from(parts.div_ceil(u128::from(period.max(1)))).ok()
        };
        let whole = |parts: u64| {
            let vcpus = u8::try_from(parts.div_ceil(CPU_PARTS).max(1)).unwrap_or(u8::MAX);
            VcpuCount::new(vcpus)
        };
        if let Some(pod) = parts(&self.pod) {
            return whole(pod);
        }
        let sum = self.containers.values().filter_map(parts);
        let sum = whole(sum.fold(0, u64::saturating_add))?;
        if self.all(parts) {
            Some(sum)
        } else {
            Some(sum.max(self.size.started_with.vcpus))
        }
    }

    fn memory(&self) -> Mib {
        // They come beside the memory limits.
        let huge_pages = self.containers.values().map(|limits| limits.huge_pages.0);
        let huge_pages = huge_pages.fold(0, u64::saturating_add);
        let with_overhead = |limit: Bytes| {
            let all = Bytes(limit.0.saturating_add(huge_pages));
            let mib = all.to_mib_ceil().unwrap_or(Mib(u32::MAX));
            Mib(mib.0.saturating_add(self.size.overhead.0))
        };
        if let Some(pod) = self.pod.memory {
            return with_overhead(pod);
        }
        let limits = self.containers.values().filter_map(|limits| limits.memory);
        let sum = limits.fold(0, |sum: u64, limit| sum.saturating_add(limit.0));
        let sum = with_overhead(Bytes(sum));
        if self.all(|limits| limits.memory) {
            sum
        } else {
            sum.max(self.size.started_with.memory)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ResourceUpdate;

    fn size(vcpus: u8, memory: u32) -> VmSize {
        VmSize {
            vcpus: VcpuCount::new(vcpus).unwrap(),
            memory: Mib(memory),
        }
    }

    fn ledger() -> Ledger {
        Ledger::new(PodSize {
            started_with: size(2, 512),
            largest: size(8, 4096),
            overhead: Mib(64),
        })
    }

    fn id(name: &str) -> ContainerId {
        name.parse().unwrap()
    }

    fn limits(millis: u64, mib: u64) -> Limits {
        Limits {
            cpu: (millis != 0).then_some((millis * 100, 100_000)),
            memory: (mib != 0).then_some(Bytes(mib << 20)),
            huge_pages: Bytes(0),
        }
    }

    fn changes(millis: i64, mib: i64) -> LimitChanges {
        let json = serde_json::json!({
            "cpu": { "quota": millis * 100, "period": 100_000 },
            "memory": { "limit": if mib < 0 { -1 } else { mib << 20 } },
        });
        let update = ResourceUpdate::parse(json.to_string().as_bytes()).unwrap();
        update.limit_changes()
    }

    #[test]
    fn nothing_shrinks_before_somebody_asks() {
        let mut ledger = ledger();
        assert_eq!(ledger.wanted(), size(2, 512));
        ledger.add(id("a"), limits(500, 100));
        assert_eq!(ledger.wanted(), size(2, 512));
        ledger.add(id("b"), limits(2000, 600));
        assert_eq!(ledger.wanted(), size(3, 764), "more than the VM has");
    }

    #[test]
    fn limits_add_up_and_are_rounded_once() {
        let mut ledger = ledger();
        for name in ["a", "b", "c"] {
            ledger.add(id(name), limits(600, 100));
        }
        ledger.update(&id("a"), &changes(600, 200));
        assert_eq!(ledger.wanted(), size(2, 464), "1.8 CPUs");
        ledger.update(&id("b"), &changes(900, 200));
        assert_eq!(ledger.wanted(), size(3, 564), "2.1 CPUs");
        ledger.update(&id("b"), &changes(-1, -1));
        assert_eq!(ledger.wanted(), size(2, 512), "one is without a limit");
        ledger.remove(&id("b"));
        assert_eq!(ledger.wanted(), size(2, 364));
    }

    #[test]
    fn limits_of_the_pod_come_first_and_no_size_is_beyond_the_possible() {
        let mut ledger = ledger();
        ledger.add(id("a"), limits(600, 100));
        ledger.update_pod(&changes(4000, 1000));
        assert_eq!(ledger.wanted(), size(4, 1064));
        ledger.update_pod(&changes(900_000, 1 << 30));
        assert_eq!(ledger.wanted(), size(8, 4096));
        ledger.update_pod(&changes(1, 1));
        assert_eq!(ledger.wanted(), size(1, 96));
        ledger.update_pod(&changes(-1, -1));
        assert_eq!(ledger.wanted(), size(1, 164), "the containers' again");
    }

    #[test]
    fn huge_pages_come_beside_the_limits() {
        let mut ledger = ledger();
        let pages = Limits {
            huge_pages: Bytes(128 << 20),
            ..limits(500, 400)
        };
        ledger.add(id("a"), pages);
        assert_eq!(ledger.wanted(), size(2, 592));
        ledger.update(&id("a"), &changes(500, 100));
        assert_eq!(ledger.wanted(), size(1, 292));
    }

    #[test]
    fn what_an_update_leaves_out_stays() {
        let mut ledger = ledger();
        ledger.add(id("a"), limits(3000, 1000));
        let memory = ResourceUpdate::parse(br#"{"memory":{"limit":1073741824}}"#).unwrap();
        ledger.update(&id("a"), &memory.limit_changes());
        assert_eq!(ledger.wanted(), size(3, 1088));
        let neither =
            ResourceUpdate::parse(br#"{"memory":{"limit":0},"pids":{"limit":5}}"#).unwrap();
        ledger.update(&id("a"), &neither.limit_changes());
        assert_eq!(ledger.wanted(), size(3, 1088));
    }

    proptest! {
        #[test]
        fn crash_loops_leave_no_trace(
            steps in prop::collection::vec((0u8..3, 0usize..4, -1i64..3000, -1i64..2000), 0..80),
        ) {
            let mut ledger = ledger();
            let mut last = BTreeMap::new();
            for (round, (kind, which, millis, mib)) in steps.into_iter().enumerate() {
                let name = format!("c{which}");
                let own = limits(millis.max(0).unsigned_abs(), mib.max(0).unsigned_abs());
                match kind {
                    // A container ends and is made again, under another id.
                    0 => {
                        if let Some((old, _)) = last.remove(&name) {
                            ledger.remove(&old);
                        }
                        let new = id(&format!("{name}-{round}"));
                        ledger.add(new.clone(), own);
                        last.insert(name, (new, own));
                    }
                    1 => {
                        if let Some((known, kept)) = last.get_mut(&name) {
                            let changes = changes(millis, mib);
                            ledger.update(known, &changes);
                            changes.apply(kept);
                        }
                    }
                    _ => {
                        if let Some((old, _)) = last.remove(&name) {
                            ledger.remove(&old);
                        }
                    }
                }
                let wanted = ledger.wanted();
                prop_assert!(wanted.vcpus <= size(8, 0).vcpus);
                prop_assert!((MIN_VM_MEMORY..=Mib(4096)).contains(&wanted.memory));
            }
            // The same containers, made once each, want the same.
            let mut fresh = Ledger { containers: BTreeMap::new(), ..ledger.clone() };
            for (container, own) in last.into_values() {
                fresh.add(container, own);
            }
            prop_assert_eq!(fresh.wanted(), ledger.wanted());
        }
    }
}

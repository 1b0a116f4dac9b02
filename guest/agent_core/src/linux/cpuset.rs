// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A container's cpuset in a VM.
//!
//! The kubelet's CPU manager and other callers name the node's processors, of which the guest has none: it has vCPUs, from 0
//! on. What a list means can still be kept, that the container runs on so many processors:
//!
//! | list | vCPUs |
//! |---|---|
//! | names vCPUs of the guest only | these |
//! | is at least as long as the guest has vCPUs | all, also those that come later |
//! | another | as many, each its number modulo the vCPUs, or the next that is free |

use std::collections::BTreeSet;
use std::fs;

/// The kernel's largest `NR_CPUS` on x86-64.
const MAX_CPUS: u32 = 8192;

/// The guest's vCPUs.
#[derive(Debug)]
pub(super) struct Vcpus {
    /// How many there are at present, numbered from 0.
    pub(super) online: u32,
    /// A list of all that there may ever be. A cpuset with processes in it takes no empty list, which would say the same.
    pub(super) all: String,
}

impl Vcpus {
    pub(super) fn now() -> Self {
        let online = std::thread::available_parallelism().map_or(1, usize::from);
        let possible = fs::read_to_string("/sys/devices/system/cpu/possible");
        Self {
            online: u32::try_from(online).unwrap_or(u32::MAX),
            all: possible.map_or_else(|_| "0".to_owned(), |list| list.trim().to_owned()),
        }
    }
}

/// The value for `cpuset.cpus`.
///
/// # Errors
/// A text that says what is wrong with the list.
pub(super) fn for_guest(list: &str, guest: &Vcpus) -> Result<String, String> {
    let vcpus = guest.online;
    let asked = parse(list).ok_or_else(|| format!("{list:?} is no list of processors"))?;
    if asked.iter().all(|cpu| *cpu < vcpus) {
        return Ok(list.trim().to_owned());
    }
    let count = u32::try_from(asked.len()).unwrap_or(u32::MAX);
    if count >= vcpus {
        return Ok(guest.all.clone());
    }
    let mut chosen = BTreeSet::new();
    for cpu in asked {
        let start = cpu.checked_rem(vcpus).unwrap_or(0);
        let free = (start..vcpus)
            .chain(0..start)
            .find(|vcpu| !chosen.contains(vcpu));
        chosen.extend(free);
    }
    let numbers: Vec<String> = chosen.iter().map(ToString::to_string).collect();
    Ok(numbers.join(","))
}

/// A list like "0-2,7" (cpuset(7)).
fn parse(list: &str) -> Option<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= MAX_CPUS {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn for_guest(list: &str, online: u32) -> Result<String, String> {
        let all = "0-15".to_owned();
        super::for_guest(list, &Vcpus { online, all })
    }

    #[test]
    fn list_of_vcpus_is_kept() {
        assert_eq!(for_guest("0", 1).unwrap(), "0");
        assert_eq!(for_guest("1-2,0\n", 4).unwrap(), "1-2,0");
    }

    #[test]
    fn list_as_long_as_the_vcpus_is_all_of_them() {
        assert_eq!(for_guest("7", 1).unwrap(), "0-15");
        assert_eq!(for_guest("0-63", 2).unwrap(), "0-15");
    }

    #[test]
    fn shorter_list_of_the_nodes_is_as_many_vcpus() {
        assert_eq!(for_guest("4", 2).unwrap(), "0");
        assert_eq!(for_guest("2,34", 4).unwrap(), "2,3");
        assert_eq!(for_guest("3,35", 4).unwrap(), "0,3");
        assert_eq!(for_guest("8-10", 4).unwrap(), "0,1,2");
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for list in ["", "a", "3-1", "1,,2", "-1", "1-", "8192", "0-4294967296"] {
            let error = for_guest(list, 2).unwrap_err();
            assert!(error.contains("is no list"), "{error}");
        }
        for_guest("8191", 2).unwrap();
    }
}

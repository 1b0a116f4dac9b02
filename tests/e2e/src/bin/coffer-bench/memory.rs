// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What an idle pod costs the host, in memory.

use std::fs;

use e2e::{Container, eventually, named, parent_of};

use crate::result::Results;

/// Two readings this close are of a pod at rest, in KiB.
const AT_REST_KIB: f64 = 64.0;

/// The proportional set size of each host process of an idle pod, and the VMM's memory without its guest's.
pub(crate) fn idle_pod(results: &mut Results) {
    let _container = Container::start("idle", &["sleep", "infinity"]);
    let vmm = *named("coffer-vmm").first().unwrap();
    let shim = parent_of(vmm).unwrap();
    // A guest settles: pages that it frees come back to the host.
    let mut last = f64::INFINITY;
    eventually("the pod is at rest", || {
        std::thread::sleep(std::time::Duration::from_secs(2));
        let now = rollup(vmm, "Pss");
        let settled = (last - now).abs() < AT_REST_KIB;
        last = now;
        settled.then_some(())
    });
    let mib = |kib: f64| kib / 1024.0;
    let (vmm_pss, shim_pss) = (mib(rollup(vmm, "Pss")), mib(rollup(shim, "Pss")));
    results.add("idle shim PSS", "coffer", "MiB", shim_pss);
    results.add("idle VMM PSS, with guest", "coffer", "MiB", vmm_pss);
    results.add("idle pod PSS", "coffer", "MiB", shim_pss + vmm_pss);
    results.add("VMM's own RSS", "coffer", "MiB", mib(own_rss(vmm)));
    results.add(
        "VMM's RSS, with guest",
        "coffer",
        "MiB",
        mib(rollup(vmm, "Rss")),
    );
}

/// A field of `smaps_rollup`, in KiB.
fn rollup(pid: i32, field: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    text.lines().find_map(|line| value(line, field)).unwrap()
}

/// The resident memory of a VMM without its guest's, in KiB: the guest's memory is what core files leave out (the flag `dd`,
/// proc(5)).
fn own_rss(pid: i32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut sum, mut rss) = (0.0, 0.0);
    for line in text.lines() {
        if let Some(kib) = value(line, "Rss") {
            rss = kib;
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && !flags.split(' ').any(|flag| flag == "dd")
        {
            sum += rss;
        }
    }
    sum
}

fn value(line: &str, field: &str) -> Option<f64> {
    line.strip_prefix(field)?
        .strip_prefix(':')?
        .trim()
        .strip_suffix(" kB")?
        .parse()
        .ok()
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The texts of cgroup v2's files as [`api::ContainerStats`] (Linux, Documentation/admin-guide/cgroup-v2.rst). Pure.
//!
//! The agent reads a container's cgroup with it, the shim the pod's on the host: one parser for both, so that a figure
//! means the same in each.

use std::collections::HashMap;

use crate::api;

/// The most devices in [`api::ContainerStats::io`].
pub const MAX_DEVICES: usize = 64;

/// The most page sizes in [`api::ContainerStats::hugetlb`]; an architecture has two to four.
pub const MAX_PAGE_SIZES: usize = 8;

/// The longest name of a page size.
const MAX_PAGE_SIZE_NAME: usize = 16;

/// What a cgroup uses and may use. `read` gives a file of the cgroup's directory, `None` if it is not there; `files` are
/// the names in the directory, for the huge pages.
pub fn parse<'a>(
    read: impl Fn(&str) -> Option<String>,
    files: impl IntoIterator<Item = &'a str>,
) -> api::ContainerStats {
    let text = |file: &str| read(file).unwrap_or_default();
    let io = text("io.stat");
    let stats = api::ContainerStats {
        cpu: Some(cpu(&text("cpu.stat"))).into(),
        memory: Some(memory(&read)).into(),
        memory_events: Some(memory_events(&text("memory.events"))).into(),
        pids: Some(api::PidsStats {
            current: number(&read, "pids.current"),
            limit: number(&read, "pids.max"),
            ..Default::default()
        })
        .into(),
        io: io.lines().filter_map(device).collect(),
        hugetlb: files
            .into_iter()
            .filter_map(|file| hugetlb(&read, file))
            .collect(),
        cpu_pressure: read("cpu.pressure").as_deref().map(pressure).into(),
        memory_pressure: read("memory.pressure").as_deref().map(pressure).into(),
        io_pressure: read("io.pressure").as_deref().map(pressure).into(),
        ..Default::default()
    };
    bounded(stats)
}

/// The same within the caps: what is beyond them is left out. For what a guest has sent.
pub fn bounded(mut stats: api::ContainerStats) -> api::ContainerStats {
    stats.io.truncate(MAX_DEVICES);
    stats.hugetlb.retain(|pages| is_page_size(&pages.page_size));
    stats.hugetlb.truncate(MAX_PAGE_SIZES);
    stats
}

fn is_page_size(name: &str) -> bool {
    (1..=MAX_PAGE_SIZE_NAME).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// A number, or "max" for the largest.
fn value(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        digits => digits.parse().ok(),
    }
}

fn number(read: &impl Fn(&str) -> Option<String>, file: &str) -> u64 {
    read(file).and_then(|text| value(&text)).unwrap_or(0)
}

/// A flat keyed file: a name and a number in each line.
struct Flat<'a>(HashMap<&'a str, u64>);

impl<'a> Flat<'a> {
    fn parse(text: &'a str) -> Self {
        let lines = text.lines().filter_map(|line| {
            let (name, number) = line.split_once(' ')?;
            Some((name, value(number)?))
        });
        Self(lines.collect())
    }

    fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

/// A message whose fields are named as in the file.
macro_rules! named {
    ($flat:expr, $message:ident { $($field:ident),+ $(,)? }) => {
        api::$message { $($field: $flat.get(stringify!($field)),)+ ..Default::default() }
    };
}

fn cpu(text: &str) -> api::CpuStats {
    let flat = Flat::parse(text);
    named!(
        flat,
        CpuStats {
            usage_usec,
            user_usec,
            system_usec,
            nr_periods,
            nr_throttled,
            throttled_usec,
            nr_bursts,
            burst_usec,
        }
    )
}

fn memory_events(text: &str) -> api::MemoryEvents {
    let flat = Flat::parse(text);
    named!(
        flat,
        MemoryEvents {
            low,
            high,
            max,
            oom,
            oom_kill,
            oom_group_kill,
        }
    )
}

fn memory(read: &impl Fn(&str) -> Option<String>) -> api::MemoryStats {
    let text = read("memory.stat").unwrap_or_default();
    let flat = Flat::parse(&text);
    let both = |one: &str, other: &str| flat.get(one).saturating_add(flat.get(other));
    api::MemoryStats {
        // The names that the kernel has split since 5.9.
        workingset_refault: both("workingset_refault_anon", "workingset_refault_file"),
        workingset_activate: both("workingset_activate_anon", "workingset_activate_file"),
        usage: number(read, "memory.current"),
        usage_limit: number(read, "memory.max"),
        max_usage: number(read, "memory.peak"),
        swap_usage: number(read, "memory.swap.current"),
        swap_limit: number(read, "memory.swap.max"),
        swap_max_usage: number(read, "memory.swap.peak"),
        ..named!(
            flat,
            MemoryStats {
                anon,
                file,
                kernel_stack,
                slab,
                sock,
                shmem,
                file_mapped,
                file_dirty,
                file_writeback,
                anon_thp,
                inactive_anon,
                active_anon,
                inactive_file,
                active_file,
                unevictable,
                slab_reclaimable,
                slab_unreclaimable,
                pgfault,
                pgmajfault,
                workingset_nodereclaim,
                pgrefill,
                pgscan,
                pgsteal,
                pgactivate,
                pgdeactivate,
                pglazyfree,
                pglazyfreed,
                thp_fault_alloc,
                thp_collapse_alloc,
            }
        )
    }
}

/// A line of `io.stat`: "8:16 rbytes=1459200 wbytes=314773504 rios=192 wios=353 dbytes=0 dios=0".
fn device(line: &str) -> Option<api::IoStats> {
    let (device, counters) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let pairs = counters
        .split(' ')
        .filter_map(|pair| pair.split_once('='))
        .filter_map(|(name, number)| Some((name, value(number)?)));
    let flat = Flat(pairs.collect());
    Some(api::IoStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..named!(
            flat,
            IoStats {
                rbytes,
                wbytes,
                rios,
                wios,
            }
        )
    })
}

/// The pages of the size that `file`, "hugetlb.SIZE.current", is about.
fn hugetlb(read: &impl Fn(&str) -> Option<String>, file: &str) -> Option<api::HugetlbStats> {
    let size = file.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
    // "hugetlb.2MB.rsvd.current" is about reservations.
    if !is_page_size(size) {
        return None;
    }
    let events = read(&format!("hugetlb.{size}.events")).unwrap_or_default();
    Some(api::HugetlbStats {
        page_size: size.to_owned(),
        current: number(read, file),
        max: number(read, &format!("hugetlb.{size}.max")),
        failures: Flat::parse(&events).get("max"),
        ..Default::default()
    })
}

/// "some avg10=0.00 avg60=0.12 avg300=0.05 total=1234", and the same for "full" (Documentation/accounting/psi.rst).
fn pressure(text: &str) -> api::Pressure {
    let line = |kind: &str| {
        let fields = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let field = |name: &str| {
            fields
                .split_whitespace()
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        };
        Some(api::PressureLine {
            avg10: field("avg10").and_then(hundredths).unwrap_or(0),
            avg60: field("avg60").and_then(hundredths).unwrap_or(0),
            avg300: field("avg300").and_then(hundredths).unwrap_or(0),
            total: field("total").and_then(value).unwrap_or(0),
            ..Default::default()
        })
    };
    api::Pressure {
        some: line("some ").into(),
        full: line("full ").into(),
        ..Default::default()
    }
}

/// "12.34" is 1234.
fn hundredths(text: &str) -> Option<u32> {
    let (whole, fraction) = text.split_once('.')?;
    let whole: u32 = whole.parse().ok()?;
    let fraction: u32 = (fraction.len() == 2).then(|| fraction.parse().ok())??;
    whole.checked_mul(100)?.checked_add(fraction)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(files: &[(&str, &str)]) -> api::ContainerStats {
        parse(
            |name| {
                let found = files.iter().find(|(file, _)| *file == name);
                found.map(|(_, text)| (*text).to_owned())
            },
            files.iter().map(|(file, _)| *file),
        )
    }

    #[test]
    fn files_of_a_kernel_become_their_figures() {
        let all = stats(&[
            (
                "cpu.stat",
                "usage_usec 2500\nuser_usec 2000\nsystem_usec 500\nnr_periods 9\nnr_throttled 3\nthrottled_usec 70\n\
                 nr_bursts 1\nburst_usec 2\ncore_sched.force_idle_usec 0\n",
            ),
            (
                "memory.stat",
                "anon 4096\nfile 8192\nkernel_stack 16384\ninactive_file 12\nworkingset_refault_anon 2\n\
                 workingset_refault_file 3\npgmajfault 5\nthp_collapse_alloc 6\n",
            ),
            ("memory.current", "65536\n"),
            ("memory.max", "max\n"),
            ("memory.peak", "70000\n"),
            (
                "memory.events",
                "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n",
            ),
            ("pids.current", "7\n"),
            ("pids.max", "100\n"),
            (
                "io.stat",
                "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:1 \n254:16 rbytes=9\n",
            ),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "4194304\n"),
            ("hugetlb.2MB.events", "max 8\n"),
            ("hugetlb.2MB.rsvd.current", "1\n"),
            (
                "cpu.pressure",
                "some avg10=12.34 avg60=0.05 avg300=100.00 total=99\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
            ),
        ]);
        assert_eq!(
            (all.cpu.usage_usec, all.cpu.nr_throttled, all.cpu.burst_usec),
            (2500, 3, 2)
        );
        assert_eq!(
            (
                all.memory.anon,
                all.memory.inactive_file,
                all.memory.thp_collapse_alloc
            ),
            (4096, 12, 6)
        );
        assert_eq!(all.memory.workingset_refault, 5);
        assert_eq!(
            (
                all.memory.usage,
                all.memory.usage_limit,
                all.memory.max_usage
            ),
            (65536, u64::MAX, 70000)
        );
        assert_eq!((all.memory_events.oom_kill, all.memory_events.low), (4, 0));
        assert_eq!((all.pids.current, all.pids.limit), (7, 100));
        let devices: Vec<_> = all
            .io
            .iter()
            .map(|io| (io.major, io.minor, io.rbytes, io.wios))
            .collect();
        assert_eq!(devices, [(254, 0, 1, 4), (7, 1, 0, 0), (254, 16, 9, 0)]);
        assert_eq!(all.hugetlb.len(), 1, "reservations are no pages");
        let pages = all.hugetlb.first().unwrap();
        assert_eq!(
            (
                pages.page_size.as_str(),
                pages.current,
                pages.max,
                pages.failures
            ),
            ("2MB", 2_097_152, 4_194_304, 8)
        );
        let some = &all.cpu_pressure.some;
        assert_eq!(
            (some.avg10, some.avg60, some.avg300, some.total),
            (1234, 5, 10_000, 99)
        );
        assert_eq!(all.cpu_pressure.full.total, 1);
        assert!(all.io_pressure.is_none());
    }

    #[test]
    fn files_that_are_not_there_are_zeros() {
        let all = stats(&[]);
        assert_eq!((all.cpu.usage_usec, all.memory.usage), (0, 0));
        assert!(all.io.is_empty() && all.hugetlb.is_empty());
    }

    #[test]
    fn garbage_is_left_out() {
        let all = stats(&[
            (
                "cpu.stat",
                "usage_usec\nuser_usec -1\nsystem_usec 99999999999999999999\n\n \n",
            ),
            (
                "io.stat",
                "x:y rbytes=1\n8 rbytes=1\n8:99999999999 rbytes=1\n",
            ),
            ("memory.current", "much"),
            (
                "io.pressure",
                "some avg10=1 avg60=99999999.00 avg300=1.234 total=x\n",
            ),
        ]);
        assert_eq!(
            (all.cpu.usage_usec, all.cpu.user_usec, all.cpu.system_usec),
            (0, 0, 0)
        );
        assert!(all.io.is_empty());
        assert_eq!(all.memory.usage, 0);
        assert_eq!(all.io_pressure.some.avg60, 0);
    }

    #[test]
    fn caps_hold() {
        let device = || api::IoStats::default();
        let pages = |name: String| api::HugetlbStats {
            page_size: name,
            ..Default::default()
        };
        let fits = bounded(api::ContainerStats {
            io: vec![device(); MAX_DEVICES],
            hugetlb: (0..MAX_PAGE_SIZES)
                .map(|size| pages(format!("{size}MB")))
                .collect(),
            ..Default::default()
        });
        assert_eq!(
            (fits.io.len(), fits.hugetlb.len()),
            (MAX_DEVICES, MAX_PAGE_SIZES)
        );
        let mut over = fits.clone();
        over.io.push(device());
        over.hugetlb.push(pages("9MB".to_owned()));
        assert_eq!(bounded(over), fits);
        let names = [
            "a".repeat(16),
            "a".repeat(17),
            String::new(),
            "../".to_owned(),
        ];
        let kept = bounded(api::ContainerStats {
            hugetlb: names.into_iter().map(pages).collect(),
            ..Default::default()
        });
        assert_eq!(kept.hugetlb.len(), 1);
    }
}

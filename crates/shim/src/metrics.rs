// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Figures as containerd reads them: `io.containerd.cgroups.v2.Metrics`, and `v1` for the host's cgroups of version 1.
//!
//! A container's come from its cgroup in the guest. The sandbox container stands for the pod's host processes: its
//! figures are those of the cgroup that this shim and its VMM are in.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_proto::{api, stats};
use containerd_shim_protos::cgroups::metrics as v1;
use containerd_shim_protos::cgroups_v2::metrics as v2;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MetricsError {
    /// A file could not be read.
    #[error("read {path}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// No cgroup file system.
    #[error("this process is in no cgroup that is mounted: mount cgroup2 at /sys/fs/cgroup")]
    NoCgroup,
    /// A message could not be encoded, which none of these can.
    #[error("encode metrics")]
    Encode(#[from] protobuf::Error),
}

fn any<M: Message>(package: &str, message: &M) -> Result<Any, MetricsError> {
    Ok(Any {
        type_url: format!("{package}.{}", M::NAME),
        value: message.write_to_bytes()?,
        ..Any::default()
    })
}

/// A cgroup of version 2.
///
/// # Errors
/// [`MetricsError::Encode`].
pub(crate) fn of_cgroup_v2(stats: &api::ContainerStats) -> Result<Any, MetricsError> {
    any("io.containerd.cgroups.v2", &v2_metrics(stats))
}

/// A message of cgroup version 2 whose fields are named as in another message.
macro_rules! same {
    ($from:expr, $message:ident { $($field:ident),+ $(,)? }) => {
        v2::$message { $($field: $from.$field,)+ ..Default::default() }
    };
}

fn v2_metrics(stats: &api::ContainerStats) -> v2::Metrics {
    let io = stats.io.iter().map(|io| v2::IOEntry {
        major: io.major.into(),
        minor: io.minor.into(),
        ..same!(
            io,
            IOEntry {
                rbytes,
                wbytes,
                rios,
                wios,
            }
        )
    });
    let hugetlb = stats.hugetlb.iter().map(|pages| v2::HugeTlbStat {
        current: pages.current,
        max: pages.max,
        pagesize: pages.page_size.clone(),
        failcnt: pages.failures,
        ..Default::default()
    });
    v2::Metrics {
        pids: MessageField::some(same!(stats.pids, PidsStat { current, limit })),
        cpu: MessageField::some(v2::CPUStat {
            psi: psi(stats.cpu_pressure.as_ref()),
            ..same!(
                stats.cpu,
                CPUStat {
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
        }),
        memory: MessageField::some(v2::MemoryStat {
            psi: psi(stats.memory_pressure.as_ref()),
            ..memory(&stats.memory)
        }),
        io: MessageField::some(v2::IOStat {
            usage: io.collect(),
            psi: psi(stats.io_pressure.as_ref()),
            ..Default::default()
        }),
        hugetlb: hugetlb.collect(),
        memory_events: MessageField::some(same!(
            stats.memory_events,
            MemoryEvents {
                low,
                high,
                max,
                oom,
                oom_kill,
                oom_group_kill,
            }
        )),
        ..Default::default()
    }
}

fn memory(memory: &api::MemoryStats) -> v2::MemoryStat {
    same!(
        memory,
        MemoryStat {
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
            workingset_refault,
            workingset_activate,
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
            usage,
            usage_limit,
            max_usage,
            swap_usage,
            swap_limit,
            swap_max_usage,
        }
    )
}

fn psi(pressure: Option<&api::Pressure>) -> MessageField<v2::PSIStats> {
    let line = |line: Option<&api::PressureLine>| {
        let line = line.map(|line| v2::PSIData {
            avg10: percent(line.avg10),
            avg60: percent(line.avg60),
            avg300: percent(line.avg300),
            total: line.total,
            ..Default::default()
        });
        MessageField::from_option(line)
    };
    MessageField::from_option(pressure.map(|pressure| v2::PSIStats {
        some: line(pressure.some.as_ref()),
        full: line(pressure.full.as_ref()),
        ..Default::default()
    }))
}

fn percent(hundredths: u32) -> f64 {
    f64::from(hundredths) / 100.0
}

/// The cgroup that this process is in, with everything else that is in it: the pod on the host.
///
/// # Errors
/// [`MetricsError::Read`] or [`MetricsError::NoCgroup`].
pub(crate) fn of_this_process() -> Result<Any, MetricsError> {
    let (mountinfo, own) = (read("/proc/self/mountinfo")?, read("/proc/self/cgroup")?);
    let dir = |controller: &str| directory(&mountinfo, &own, controller);
    // Where version 1 has the memory controller, version 2 has not.
    if dir("memory").is_some() {
        return any("io.containerd.cgroups.v1", &v1_metrics(dir));
    }
    let dir = dir("").ok_or(MetricsError::NoCgroup)?;
    let entries = fs::read_dir(&dir).map_err(|source| MetricsError::Read {
        path: dir.clone(),
        source,
    })?;
    let files: Vec<String> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    of_cgroup_v2(&stats::parse(
        |file| fs::read_to_string(dir.join(file)).ok(),
        files.iter().map(String::as_str),
    ))
}

fn read(path: &str) -> Result<String, MetricsError> {
    fs::read_to_string(path).map_err(|source| MetricsError::Read {
        path: path.into(),
        source,
    })
}

/// Where a process is in the hierarchy of `controller`, or in that of version 2 if it is empty, from its
/// `/proc/PID/cgroup` and `mountinfo` (cgroups(7), proc(5)).
fn directory(mountinfo: &str, own: &str, controller: &str) -> Option<PathBuf> {
    let has = |list: &str| list.split(',').any(|name| name == controller);
    let place = own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let controllers = fields.nth(1)?;
        let found = if controller.is_empty() {
            controllers.is_empty()
        } else {
            has(controllers)
        };
        fields.next().filter(|_| found)
    })?;
    let mount = mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let found = match after.next()? {
            "cgroup2" => controller.is_empty(),
            "cgroup" => !controller.is_empty() && has(after.nth(1)?),
            _ => false,
        };
        before.split(' ').nth(4).filter(|_| found)
    })?;
    Some(Path::new(mount).join(place.trim_start_matches('/')))
}

/// A flat keyed file, as far as it has numbers.
struct Flat(String);

impl Flat {
    fn get(&self, name: &str) -> u64 {
        let lines = self.0.lines();
        let mut found = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        found
            .next()
            .and_then(|number| number.trim().parse().ok())
            .unwrap_or(0)
    }
}

fn v1_metrics(dir: impl Fn(&str) -> Option<PathBuf>) -> v1::Metrics {
    let text = |controller: &str, file: &str| {
        dir(controller)
            .and_then(|dir| fs::read_to_string(dir.join(file)).ok())
            .unwrap_or_default()
    };
    let number = |controller: &str, file: &str| match text(controller, file).trim() {
        "max" => 0,
        digits => digits.parse().unwrap_or(0),
    };
    let throttling = Flat(text("cpu", "cpu.stat"));
    let usage = v1::CPUUsage {
        total: number("cpuacct", "cpuacct.usage"),
        user: number("cpuacct", "cpuacct.usage_user"),
        kernel: number("cpuacct", "cpuacct.usage_sys"),
        per_cpu: text("cpuacct", "cpuacct.usage_percpu")
            .split_whitespace()
            .filter_map(|number| number.parse().ok())
            .collect(),
        ..Default::default()
    };
    let oom = Flat(text("memory", "memory.oom_control"));
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: number("pids", "pids.current"),
            limit: number("pids", "pids.max"),
            ..Default::default()
        }),
        cpu: MessageField::some(v1::CPUStat {
            usage: MessageField::some(usage),
            throttling: MessageField::some(v1::Throttle {
                periods: throttling.get("nr_periods"),
                throttled_periods: throttling.get("nr_throttled"),
                throttled_time: throttling.get("throttled_time"),
                ..Default::default()
            }),
            ..Default::default()
        }),
        memory: MessageField::some(v1::MemoryStat {
            usage: MessageField::some(v1::MemoryEntry {
                limit: number("memory", "memory.limit_in_bytes"),
                usage: number("memory", "memory.usage_in_bytes"),
                max: number("memory", "memory.max_usage_in_bytes"),
                failcnt: number("memory", "memory.failcnt"),
                ..Default::default()
            }),
            ..v1_memory(&Flat(text("memory", "memory.stat")))
        }),
        memory_oom_control: MessageField::some(v1::MemoryOomControl {
            oom_kill_disable: oom.get("oom_kill_disable"),
            under_oom: oom.get("under_oom"),
            oom_kill: oom.get("oom_kill"),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// `memory.stat` of version 1; the totals have the cgroups below in them.
fn v1_memory(stat: &Flat) -> v1::MemoryStat {
    v1::MemoryStat {
        cache: stat.get("cache"),
        rss: stat.get("rss"),
        rss_huge: stat.get("rss_huge"),
        mapped_file: stat.get("mapped_file"),
        dirty: stat.get("dirty"),
        writeback: stat.get("writeback"),
        pg_fault: stat.get("pgfault"),
        pg_maj_fault: stat.get("pgmajfault"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        hierarchical_memory_limit: stat.get("hierarchical_memory_limit"),
        total_cache: stat.get("total_cache"),
        total_rss: stat.get("total_rss"),
        total_rss_huge: stat.get("total_rss_huge"),
        total_mapped_file: stat.get("total_mapped_file"),
        total_pg_fault: stat.get("total_pgfault"),
        total_pg_maj_fault: stat.get("total_pgmajfault"),
        total_inactive_anon: stat.get("total_inactive_anon"),
        total_active_anon: stat.get("total_active_anon"),
        total_inactive_file: stat.get("total_inactive_file"),
        total_active_file: stat.get("total_active_file"),
        total_unevictable: stat.get("total_unevictable"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_urls_are_containerds() {
        let v2 = of_cgroup_v2(&api::ContainerStats::default()).unwrap();
        assert_eq!(v2.type_url, "io.containerd.cgroups.v2.Metrics");
        let v1 = any("io.containerd.cgroups.v1", &v1_metrics(|_| None)).unwrap();
        assert_eq!(v1.type_url, "io.containerd.cgroups.v1.Metrics");
    }

    #[test]
    fn figures_keep_their_names() {
        let files = |name: &str| {
            let text = match name {
                "cpu.stat" => "usage_usec 5\nthrottled_usec 6",
                "memory.stat" => "anon 7\nthp_collapse_alloc 8",
                "memory.current" => "9",
                "memory.max" => "max",
                "memory.events" => "oom_kill 10",
                "pids.current" => "11",
                "pids.max" => "12",
                "io.stat" => "254:16 rbytes=13 wios=14",
                "io.pressure" => "some avg10=1.50 avg60=0.00 avg300=0.00 total=15",
                "hugetlb.2MB.current" => "16",
                _ => return None,
            };
            Some(text.to_owned())
        };
        let metrics = v2_metrics(&stats::parse(files, ["hugetlb.2MB.current"]));
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.throttled_usec), (5, 6));
        assert_eq!(
            (metrics.memory.anon, metrics.memory.thp_collapse_alloc),
            (7, 8)
        );
        assert_eq!(
            (metrics.memory.usage, metrics.memory.usage_limit),
            (9, u64::MAX)
        );
        assert_eq!(metrics.memory_events.oom_kill, 10);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (11, 12));
        let io = metrics.io.usage.first().unwrap();
        assert_eq!((io.major, io.minor, io.rbytes, io.wios), (254, 16, 13, 14));
        let some = &metrics.io.psi.some;
        assert!((some.avg10 - 1.5).abs() < f64::EPSILON && some.total == 15);
        assert!(metrics.io.psi.full.is_none() && metrics.cpu.psi.is_none());
        let pages = metrics.hugetlb.first().unwrap();
        assert_eq!((pages.pagesize.as_str(), pages.current), ("2MB", 16));
    }

    #[test]
    fn process_is_found_in_each_hierarchy() {
        let mountinfo = "\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";
        let own = "4:memory:/pod/a\n2:cpu,cpuacct:/pod:x\n1:name=systemd:/s\n0::/\n";
        let of = |controller| directory(mountinfo, own, controller);
        assert_eq!(of("memory"), Some("/sys/fs/cgroup/memory/pod/a".into()));
        assert_eq!(
            of("cpuacct"),
            Some("/sys/fs/cgroup/cpu,cpuacct/pod:x".into())
        );
        assert_eq!(of(""), Some("/sys/fs/cgroup/unified/".into()));
        assert_eq!(of("pids"), None);
        assert_eq!(directory("", own, "memory"), None);
    }

    #[test]
    fn cgroup_of_version_1_becomes_its_figures() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            (
                "memory.stat",
                "cache 1\ntotal_cache 2\ntotal_inactive_file 3\npgfault 4\n",
            ),
            ("memory.usage_in_bytes", "5\n"),
            ("memory.limit_in_bytes", "9223372036854771712\n"),
            ("cpuacct.usage", "7000\n"),
            ("cpuacct.usage_percpu", "3000 4000 \n"),
            (
                "cpu.stat",
                "nr_periods 8\nnr_throttled 9\nthrottled_time 10\n",
            ),
            ("pids.current", "11\n"),
            ("pids.max", "max\n"),
            (
                "memory.oom_control",
                "oom_kill_disable 0\nunder_oom 0\noom_kill 12\n",
            ),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let all = v1_metrics(|_| Some(dir.path().to_owned()));
        assert_eq!(
            (
                all.memory.cache,
                all.memory.total_inactive_file,
                all.memory.pg_fault
            ),
            (1, 3, 4)
        );
        assert_eq!(
            (all.memory.usage.usage, all.memory.usage.limit),
            (5, 9_223_372_036_854_771_712)
        );
        assert_eq!(
            (all.cpu.usage.total, all.cpu.usage.per_cpu.len()),
            (7000, 2)
        );
        assert_eq!(all.cpu.throttling.throttled_time, 10);
        assert_eq!((all.pids.current, all.pids.limit), (11, 0));
        assert_eq!(all.memory_oom_control.oom_kill, 12);
    }

    #[test]
    fn this_process_has_figures() {
        let metrics = of_this_process().unwrap();
        let (version, usage) = if metrics.type_url.contains("v1") {
            let parsed = v1::Metrics::parse_from_bytes(&metrics.value).unwrap();
            (1, parsed.memory.usage.usage)
        } else {
            let parsed = v2::Metrics::parse_from_bytes(&metrics.value).unwrap();
            (2, parsed.memory.usage)
        };
        assert!(usage > 1 << 20, "version {version}: {usage}");
    }
}

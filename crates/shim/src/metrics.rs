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
use sandbox::InterfaceCounters;

/// The most lines of a file of version 1's blkio controller, which has six for each device.
const MAX_BLKIO_ENTRIES: usize = 6 * stats::MAX_DEVICES;

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

/// The interfaces in the messages of either version, which are the same.
macro_rules! network {
    ($interfaces:expr, $message:ty) => {
        $interfaces
            .iter()
            .map(|interface| {
                let mut stat = <$message>::new();
                stat.name.clone_from(&interface.name);
                stat.rx_bytes = interface.received.bytes;
                stat.rx_packets = interface.received.packets;
                stat.rx_errors = interface.received.errors;
                stat.rx_dropped = interface.received.dropped;
                stat.tx_bytes = interface.sent.bytes;
                stat.tx_packets = interface.sent.packets;
                stat.tx_errors = interface.sent.errors;
                stat.tx_dropped = interface.sent.dropped;
                stat
            })
            .collect()
    };
}

/// A cgroup of version 2.
///
/// # Errors
/// [`MetricsError::Encode`].
pub(crate) fn of_cgroup_v2(
    stats: &api::ContainerStats,
    interfaces: &[InterfaceCounters],
) -> Result<Any, MetricsError> {
    let mut metrics = v2_metrics(stats);
    metrics.network = network!(interfaces, v2::NetworkStat);
    any("io.containerd.cgroups.v2", &metrics)
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
pub(crate) fn of_this_process(interfaces: &[InterfaceCounters]) -> Result<Any, MetricsError> {
    let (mountinfo, own) = (read("/proc/self/mountinfo")?, read("/proc/self/cgroup")?);
    let dir = |controller: &str| directory(&mountinfo, &own, controller);
    // Where version 1 has the memory controller, version 2 has not.
    if dir("memory").is_some() {
        let mut metrics = v1_metrics(dir);
        metrics.network = network!(interfaces, v1::NetworkStat);
        return any("io.containerd.cgroups.v1", &metrics);
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
    let stats = stats::parse(
        |file| fs::read_to_string(dir.join(file)).ok(),
        files.iter().map(String::as_str),
    );
    of_cgroup_v2(&stats, interfaces)
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
        blkio: MessageField::some(v1::BlkIOStat {
            io_service_bytes_recursive: v1_blkio(&text("blkio", "blkio.throttle.io_service_bytes")),
            io_serviced_recursive: v1_blkio(&text("blkio", "blkio.throttle.io_serviced")),
            ..Default::default()
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

/// A file of version 1's blkio controller, of lines like "8:0 Read 4096"; its last line is their sum.
fn v1_blkio(text: &str) -> Vec<v1::BlkIOEntry> {
    let lines = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        Some(v1::BlkIOEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            op: words.next()?.to_owned(),
            value: words.next()?.parse().ok()?,
            ..Default::default()
        })
    });
    lines.take(MAX_BLKIO_ENTRIES).collect()
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
        let v2 = of_cgroup_v2(&api::ContainerStats::default(), &[]).unwrap();
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

    /// Every number of a message, and what it is called.
    fn numbers(message: &dyn protobuf::MessageDyn) -> Vec<(String, u64)> {
        let descriptor = message.descriptor_dyn();
        descriptor
            .fields()
            .filter(|field| field.is_singular())
            .filter_map(|field| match field.get_singular_field_or_default(message) {
                protobuf::reflect::ReflectValueRef::U64(number) => {
                    Some((field.name().to_owned(), number))
                }
                _ => None,
            })
            .collect()
    }

    /// One number for each name, never the same twice.
    fn number(names: &[String], name: &str) -> u64 {
        let at = names.iter().position(|known| known == name);
        1000 + u64::try_from(at.unwrap()).unwrap()
    }

    #[test]
    fn every_figure_of_the_kernel_has_its_field() {
        let of = |message: &dyn protobuf::MessageDyn| -> Vec<String> {
            numbers(message).into_iter().map(|(name, _)| name).collect()
        };
        let (cpu, memory) = (of(&v2::CPUStat::new()), of(&v2::MemoryStat::new()));
        let events = of(&v2::MemoryEvents::new());
        let flat = |names: &[String]| {
            let lines = names
                .iter()
                .map(|name| format!("{name} {}\n", number(names, name)));
            lines.collect::<String>()
        };
        // What has a file of its own, or another name in the kernel.
        let files = |name: &str| {
            let own = |field| Some(format!("{}\n", number(&memory, field)));
            match name {
                "cpu.stat" => Some(flat(&cpu)),
                "memory.stat" => Some(
                    flat(&memory)
                        .replace("workingset_refault ", "workingset_refault_file ")
                        .replace("workingset_activate ", "workingset_activate_anon "),
                ),
                "memory.events" => Some(flat(&events)),
                "memory.current" => own("usage"),
                "memory.max" => own("usage_limit"),
                "memory.peak" => own("max_usage"),
                "memory.swap.current" => own("swap_usage"),
                "memory.swap.max" => own("swap_limit"),
                "memory.swap.peak" => own("swap_max_usage"),
                _ => None,
            }
        };
        let metrics = v2_metrics(&stats::parse(files, []));
        for (names, message) in [
            (&cpu, &*metrics.cpu as &dyn protobuf::MessageDyn),
            (&memory, &*metrics.memory),
            (&events, &*metrics.memory_events),
        ] {
            for (name, found) in numbers(message) {
                assert_eq!(found, number(names, &name), "{name}");
            }
        }
        assert!(
            memory.contains(&"inactive_file".to_owned()),
            "the working set needs it"
        );
    }

    #[test]
    fn interfaces_are_told_of_in_both_versions() {
        let traffic = |first| sandbox::Traffic {
            bytes: first,
            packets: first + 1,
            errors: first + 2,
            dropped: first + 3,
        };
        let eth0 = InterfaceCounters {
            name: "eth0".to_owned(),
            received: traffic(1),
            sent: traffic(5),
        };
        let metrics = of_cgroup_v2(&api::ContainerStats::default(), std::slice::from_ref(&eth0));
        let metrics = v2::Metrics::parse_from_bytes(&metrics.unwrap().value).unwrap();
        let of_v1: Vec<v1::NetworkStat> = network!([&eth0], v1::NetworkStat);
        let (two, one) = (&metrics.network[0], &of_v1[0]);
        assert_eq!((two.name.as_str(), one.name.as_str()), ("eth0", "eth0"));
        let wanted = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(
            [
                two.rx_bytes,
                two.rx_packets,
                two.rx_errors,
                two.rx_dropped,
                two.tx_bytes,
                two.tx_packets,
                two.tx_errors,
                two.tx_dropped,
            ],
            wanted
        );
        assert_eq!(
            [
                one.rx_bytes,
                one.rx_packets,
                one.rx_errors,
                one.rx_dropped,
                one.tx_bytes,
                one.tx_packets,
                one.tx_errors,
                one.tx_dropped,
            ],
            wanted
        );
    }

    #[test]
    fn blkio_of_version_1_is_read_by_device_and_operation() {
        let text =
            "8:0 Read 4096\n8:0 Write 8192\n253:1 Read 1\nTotal 12289\n8 Read 1\n8:0 Read x\n";
        let entries: Vec<_> = v1_blkio(text)
            .into_iter()
            .map(|entry| (entry.major, entry.minor, entry.op, entry.value))
            .collect();
        let entry = |major, minor, op: &str, value| (major, minor, op.to_owned(), value);
        assert_eq!(
            entries,
            [
                entry(8, 0, "Read", 4096),
                entry(8, 0, "Write", 8192),
                entry(253, 1, "Read", 1)
            ]
        );
        let many = "8:0 Read 1\n".repeat(MAX_BLKIO_ENTRIES + 1);
        assert_eq!(v1_blkio(&many).len(), MAX_BLKIO_ENTRIES);
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
        let metrics = of_this_process(&[]).unwrap();
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

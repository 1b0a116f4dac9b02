// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `stats`: what containers use, as their shim tells containerd.

use anyhow::{Context, Result, bail};
use containerd_shim_protos::cgroups::metrics::Metrics as MetricsV1;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as MetricsV2;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde::Serialize;

use crate::node::Sandbox;
use crate::output::{Table, size};
use crate::shim::Shim;

/// cgroup version 1 has no word for "no limit", only a number that no machine reaches.
const NO_LIMIT_V1: u64 = 1 << 62;

/// A line of `stats`. What is not known is left out.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Figures {
    namespace: String,
    sandbox_id: String,
    container_id: String,
    /// CPU time since the container's start.
    cpu_usage_us: u64,
    memory_bytes: u64,
    memory_limit_bytes: Option<u64>,
    pids: u64,
    pids_limit: Option<u64>,
    io_read_bytes: Option<u64>,
    io_write_bytes: Option<u64>,
}

/// The figures of every container of `sandboxes`, and what kept others from being measured.
pub(crate) async fn figures(sandboxes: &[Sandbox]) -> (Vec<Figures>, Vec<anyhow::Error>) {
    let (mut measured, mut failed) = (Vec::new(), Vec::new());
    for sandbox in sandboxes {
        match of_sandbox(sandbox).await {
            Ok(all) => {
                for figures in all {
                    match figures {
                        Ok(figures) => measured.push(figures),
                        Err(error) => failed.push(error),
                    }
                }
            }
            Err(error) => failed.push(error),
        }
    }
    (measured, failed)
}

async fn of_sandbox(sandbox: &Sandbox) -> Result<Vec<Result<Figures>>> {
    let shim = Shim::connect(sandbox).await?;
    let mut all = Vec::new();
    for process in shim.state().await?.processes {
        if process.exec_id.is_some() {
            continue;
        }
        let metrics = shim.metrics(&process.container_id).await;
        let figures = metrics.and_then(|metrics| read(&metrics));
        all.push(figures.map(|figures| Figures {
            namespace: sandbox.namespace.clone(),
            sandbox_id: sandbox.id.clone(),
            container_id: process.container_id,
            ..figures
        }));
    }
    Ok(all)
}

fn read(metrics: &Any) -> Result<Figures> {
    match metrics.type_url.as_str() {
        "io.containerd.cgroups.v2.Metrics" => {
            let metrics = MetricsV2::parse_from_bytes(&metrics.value).context("read metrics")?;
            Ok(of_v2(&metrics))
        }
        "io.containerd.cgroups.v1.Metrics" => {
            let metrics = MetricsV1::parse_from_bytes(&metrics.value).context("read metrics")?;
            Ok(of_v1(&metrics))
        }
        other => bail!("metrics of type {other:?}, which cofferctl does not know"),
    }
}

fn of_v2(metrics: &MetricsV2) -> Figures {
    let limit = |limit: u64| (limit != u64::MAX).then_some(limit);
    let io = |bytes: fn(&containerd_shim_protos::cgroups_v2::metrics::IOEntry) -> u64| {
        let devices = metrics.io.usage.iter().map(bytes);
        Some(devices.fold(0, u64::saturating_add))
    };
    Figures {
        cpu_usage_us: metrics.cpu.usage_usec,
        memory_bytes: metrics.memory.usage,
        memory_limit_bytes: limit(metrics.memory.usage_limit),
        pids: metrics.pids.current,
        pids_limit: limit(metrics.pids.limit),
        io_read_bytes: io(|device| device.rbytes),
        io_write_bytes: io(|device| device.wbytes),
        ..Figures::default()
    }
}

fn of_v1(metrics: &MetricsV1) -> Figures {
    let memory = &metrics.memory.usage;
    Figures {
        cpu_usage_us: metrics.cpu.usage.total / 1000,
        memory_bytes: memory.usage,
        memory_limit_bytes: (memory.limit < NO_LIMIT_V1).then_some(memory.limit),
        pids: metrics.pids.current,
        pids_limit: (metrics.pids.limit != 0).then_some(metrics.pids.limit),
        ..Figures::default()
    }
}

/// The figures for people.
pub(crate) fn table(all: &[Figures]) -> String {
    let mut table = Table::new(&[
        "NAMESPACE",
        "SANDBOX",
        "CONTAINER",
        "CPU TIME",
        "MEMORY",
        "LIMIT",
        "PIDS",
        "READ",
        "WRITTEN",
    ]);
    let bytes = |bytes: Option<u64>| bytes.map(size).unwrap_or_default();
    for figures in all {
        table.row([
            figures.namespace.clone(),
            short(&figures.sandbox_id),
            short(&figures.container_id),
            seconds(figures.cpu_usage_us),
            size(figures.memory_bytes),
            bytes(figures.memory_limit_bytes),
            figures.pids.to_string(),
            bytes(figures.io_read_bytes),
            bytes(figures.io_write_bytes),
        ]);
    }
    table.text()
}

/// Of CRI's ids of 64 digits as many as `crictl` shows.
fn short(id: &str) -> String {
    let digits = id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    id.chars()
        .take(if digits { 13 } else { usize::MAX })
        .collect()
}

fn seconds(us: u64) -> String {
    format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000)
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::cgroups::metrics as v1;
    use containerd_shim_protos::cgroups_v2::metrics as v2;
    use containerd_shim_protos::protobuf::MessageField;

    use super::*;

    fn any(type_url: &str, message: &impl Message) -> Any {
        Any {
            type_url: type_url.to_owned(),
            value: message.write_to_bytes().unwrap(),
            ..Any::default()
        }
    }

    #[test]
    fn both_versions_of_containerds_metrics_are_read() {
        let io = |rbytes, wbytes| v2::IOEntry {
            rbytes,
            wbytes,
            ..Default::default()
        };
        let second = v2::Metrics {
            cpu: MessageField::some(v2::CPUStat {
                usage_usec: 5,
                ..Default::default()
            }),
            memory: MessageField::some(v2::MemoryStat {
                usage: 6,
                usage_limit: u64::MAX,
                ..Default::default()
            }),
            pids: MessageField::some(v2::PidsStat {
                current: 7,
                limit: 8,
                ..Default::default()
            }),
            io: MessageField::some(v2::IOStat {
                usage: vec![io(1, 2), io(10, 20)],
                ..Default::default()
            }),
            ..Default::default()
        };
        let expected = Figures {
            cpu_usage_us: 5,
            memory_bytes: 6,
            pids: 7,
            pids_limit: Some(8),
            io_read_bytes: Some(11),
            io_write_bytes: Some(22),
            ..Figures::default()
        };
        let read_back = read(&any("io.containerd.cgroups.v2.Metrics", &second)).unwrap();
        assert_eq!(read_back, expected);

        let first = v1::Metrics {
            cpu: MessageField::some(v1::CPUStat {
                usage: MessageField::some(v1::CPUUsage {
                    total: 5999,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            memory: MessageField::some(v1::MemoryStat {
                usage: MessageField::some(v1::MemoryEntry {
                    usage: 6,
                    limit: 9_223_372_036_854_771_712,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let expected = Figures {
            cpu_usage_us: 5,
            memory_bytes: 6,
            ..Figures::default()
        };
        let read_back = read(&any("io.containerd.cgroups.v1.Metrics", &first)).unwrap();
        assert_eq!(read_back, expected);
        assert!(read(&Any::default()).is_err());
    }

    #[test]
    fn table_shortens_ids_and_has_units() {
        let figures = Figures {
            namespace: "k8s.io".to_owned(),
            sandbox_id: "0123456789abcdef".repeat(4),
            container_id: "c1".to_owned(),
            cpu_usage_us: 61_234_567,
            memory_bytes: 3 << 20,
            pids: 4,
            ..Figures::default()
        };
        let text = table(&[figures]);
        let row = text.lines().nth(1).unwrap();
        let cells: Vec<&str> = row.split("  ").filter(|cell| !cell.is_empty()).collect();
        let cells: Vec<&str> = cells.iter().map(|cell| cell.trim()).collect();
        assert_eq!(
            cells,
            [
                "k8s.io",
                "0123456789abc",
                "c1",
                "61.23 s",
                "3.0 MiB",
                "-",
                "4",
                "-",
                "-"
            ]
        );
    }
}

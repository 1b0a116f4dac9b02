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
    /// For how long a CPU limit has held it back.
    cpu_throttled_us: u64,
    memory_bytes: u64,
    /// What the kernel cannot take back at once, as the kubelet counts it: usage less inactive file pages.
    memory_working_set_bytes: u64,
    memory_limit_bytes: Option<u64>,
    pids: u64,
    pids_limit: Option<u64>,
    io_read_bytes: Option<u64>,
    io_write_bytes: Option<u64>,
    /// What the pod has received, for the container that stands for it.
    network_receive_bytes: Option<u64>,
    network_transmit_bytes: Option<u64>,
}

/// The figures of every container of `sandboxes`, and what kept others from being measured. The shims are asked beside each
/// other.
pub(crate) async fn figures(sandboxes: Vec<Sandbox>) -> (Vec<Figures>, Vec<anyhow::Error>) {
    let asked: Vec<_> = sandboxes
        .into_iter()
        .map(|sandbox| tokio::spawn(async move { of_sandbox(&sandbox).await }))
        .collect();
    let (mut measured, mut failed) = (Vec::new(), Vec::new());
    for all in asked {
        match all.await.context("ask a shim").and_then(|all| all) {
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
    let interfaces = &metrics.network;
    let network = |bytes: fn(&containerd_shim_protos::cgroups_v2::metrics::NetworkStat) -> u64| {
        let sum = || interfaces.iter().map(bytes).fold(0, u64::saturating_add);
        (!interfaces.is_empty()).then(sum)
    };
    Figures {
        cpu_usage_us: metrics.cpu.usage_usec,
        cpu_throttled_us: metrics.cpu.throttled_usec,
        memory_bytes: metrics.memory.usage,
        memory_working_set_bytes: metrics
            .memory
            .usage
            .saturating_sub(metrics.memory.inactive_file),
        network_receive_bytes: network(|interface| interface.rx_bytes),
        network_transmit_bytes: network(|interface| interface.tx_bytes),
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
    let io = |op: &str| {
        let entries = metrics.blkio.io_service_bytes_recursive.iter();
        let entries = entries.filter(|entry| entry.op.eq_ignore_ascii_case(op));
        Some(
            entries
                .map(|entry| entry.value)
                .fold(0, u64::saturating_add),
        )
    };
    let interfaces = &metrics.network;
    let network = |bytes: fn(&containerd_shim_protos::cgroups::metrics::NetworkStat) -> u64| {
        let sum = || interfaces.iter().map(bytes).fold(0, u64::saturating_add);
        (!interfaces.is_empty()).then(sum)
    };
    Figures {
        cpu_usage_us: metrics.cpu.usage.total / 1000,
        cpu_throttled_us: metrics.cpu.throttling.throttled_time / 1000,
        memory_bytes: memory.usage,
        memory_working_set_bytes: memory
            .usage
            .saturating_sub(metrics.memory.total_inactive_file),
        memory_limit_bytes: (memory.limit < NO_LIMIT_V1).then_some(memory.limit),
        pids: metrics.pids.current,
        pids_limit: (metrics.pids.limit != 0).then_some(metrics.pids.limit),
        io_read_bytes: io("read"),
        io_write_bytes: io("write"),
        network_receive_bytes: network(|interface| interface.rx_bytes),
        network_transmit_bytes: network(|interface| interface.tx_bytes),
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
        "WORKING SET",
        "LIMIT",
        "PIDS",
        "READ",
        "WRITTEN",
        "RECEIVED",
        "SENT",
    ]);
    let bytes = |bytes: Option<u64>| bytes.map(size).unwrap_or_default();
    for figures in all {
        table.row([
            figures.namespace.clone(),
            short(&figures.sandbox_id),
            short(&figures.container_id),
            seconds(figures.cpu_usage_us),
            size(figures.memory_bytes),
            size(figures.memory_working_set_bytes),
            bytes(figures.memory_limit_bytes),
            figures.pids.to_string(),
            bytes(figures.io_read_bytes),
            bytes(figures.io_write_bytes),
            bytes(figures.network_receive_bytes),
            bytes(figures.network_transmit_bytes),
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
                throttled_usec: 9,
                ..Default::default()
            }),
            memory: MessageField::some(v2::MemoryStat {
                usage: 6,
                inactive_file: 2,
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
            network: vec![
                v2::NetworkStat {
                    rx_bytes: 30,
                    tx_bytes: 40,
                    ..Default::default()
                };
                2
            ],
            ..Default::default()
        };
        let expected = Figures {
            cpu_usage_us: 5,
            cpu_throttled_us: 9,
            memory_bytes: 6,
            memory_working_set_bytes: 4,
            pids: 7,
            pids_limit: Some(8),
            io_read_bytes: Some(11),
            io_write_bytes: Some(22),
            network_receive_bytes: Some(60),
            network_transmit_bytes: Some(80),
            ..Figures::default()
        };
        let read_back = read(&any("io.containerd.cgroups.v2.Metrics", &second)).unwrap();
        assert_eq!(read_back, expected);

        let entry = |op: &str, value| v1::BlkIOEntry {
            op: op.to_owned(),
            value,
            ..Default::default()
        };
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
                total_inactive_file: 7,
                ..Default::default()
            }),
            blkio: MessageField::some(v1::BlkIOStat {
                io_service_bytes_recursive: vec![
                    entry("Read", 3),
                    entry("Write", 4),
                    entry("Read", 5),
                ],
                ..Default::default()
            }),
            ..Default::default()
        };
        let expected = Figures {
            cpu_usage_us: 5,
            memory_bytes: 6,
            memory_working_set_bytes: 0,
            io_read_bytes: Some(8),
            io_write_bytes: Some(4),
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
            memory_working_set_bytes: 2 << 20,
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
                "2.0 MiB",
                "-",
                "4",
                "-",
                "-",
                "-",
                "-"
            ]
        );
    }
}

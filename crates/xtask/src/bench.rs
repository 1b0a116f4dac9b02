// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask bench`: Coffer beside runc on one node in one run, what a start costs in instructions, and the VMM's own
//! start on this machine. Every raw sample is kept in one JSON file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::node::{Job, Machine, Place, Work};
use crate::step::step;
use crate::{build, images, process, workspace};

/// The longest time for the measurements in the node.
const NODE_LIMIT: Duration = Duration::from_secs(40 * 60);
/// The longest time for one start on a node that counts instructions, which is slower still.
const COUNTED_LIMIT: Duration = Duration::from_secs(15 * 60);

/// One container, on a node whose clock counts instructions: what its guest says of itself.
const COUNTED_SCRIPT: &str =
    "ctr run --rm --runtime io.containerd.coffer.v2 coffer.test/busybox:latest warm true
ctr run --rm --runtime io.containerd.coffer.v2 coffer.test/busybox:latest counted true
grep agent_ready_us /run/containerd.log > /job/counted.log
";

/// What `cargo xtask bench` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Repetitions of each measurement, the runtimes in turn.
    #[arg(long, default_value_t = 10)]
    repetitions: u32,
    /// Leaves out the measurement in instructions.
    #[arg(long)]
    without_instructions: bool,
}

/// Runs the verb.
///
/// # Errors
/// When something does not build, or a measured container fails.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    build::run()?;
    build::images(&[images::small()?])?;
    build::bench(&workspace::dist())?;
    let folder = workspace::target().join("coffer/bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;

    let native = step("the VMM on this machine", || native(&workspace::dist()))?;
    let place = Place::choose()?;
    let tree = Tree {
        dist: workspace::dist(),
        source: workspace::root(),
    };
    let node = in_node(&place, &tree, &folder, arguments.repetitions)?;
    let instructions = match (&place, arguments.without_instructions) {
        (Place::Nested(_), false) => Some(counted(&place, &tree, &folder)?),
        _ => None,
    };
    if let Some(count) = instructions {
        println!(
            "kernel entry to agent ready [million instructions] {:>10.1}",
            count / 1e6
        );
    }
    for vmm in ["coffer-vmm", "cloud-hypervisor"] {
        match native.pointer(&format!("/{vmm}/median_us")) {
            Some(median) => println!("{vmm}, start to exit on this machine [us] {median:>10}"),
            None => println!("{vmm} is not on PATH: not measured"),
        }
    }
    let report = json!({
        "machine": machine(&place)?,
        "node": node,
        "native": native,
        "kernel_entry_to_agent_ready_instructions": instructions,
    });
    let path = folder.join("bench.json");
    let text = serde_json::to_string_pretty(&report).context("cannot write the report")?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("all samples: {}", path.display());
    Ok(ExitCode::SUCCESS)
}

fn in_node(place: &Place, tree: &Tree, folder: &Path, repetitions: u32) -> Result<Value> {
    let script =
        format!("COFFER_E2E=1 /opt/coffer/tests/coffer-bench {repetitions} /job/node.json");
    let job = tree.job(
        &script,
        folder,
        Machine {
            limit: Some(NODE_LIMIT),
            ..Machine::default()
        },
    );
    let code = step("measurements in the node", || {
        place.run(&job, &mut io::stdout(), &mut io::stderr())
    })?;
    if code != 0 {
        bail!(
            "the measurements ended with {code}; the logs are in {}",
            folder.display()
        );
    }
    let path = folder.join("node.json");
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).context("the node's results are not JSON")
}

/// Instructions from the guest kernel's entry to the agent's readiness: with one instruction a nanosecond, the guest's
/// clock since boot counts them.
fn counted(place: &Place, tree: &Tree, folder: &Path) -> Result<f64> {
    let folder = folder.join("counted");
    let machine = Machine {
        limit: Some(COUNTED_LIMIT),
        count_instructions: true,
        ..Machine::default()
    };
    let job = tree.job(COUNTED_SCRIPT, &folder, machine);
    let code = step("one start in instructions", || {
        place.run(&job, &mut io::sink(), &mut io::stderr())
    })?;
    let log = fs::read_to_string(folder.join("counted.log")).unwrap_or_default();
    let last = log.lines().last().and_then(|line| {
        let (_, rest) = line.split_once("agent_ready_us=")?;
        let microseconds: f64 = rest.split_whitespace().next()?.parse().ok()?;
        Some(microseconds * 1000.0)
    });
    last.with_context(|| {
        format!(
            "no start was counted (exit code {code}); the logs are in {}",
            folder.display()
        )
    })
}

/// Where a job's folders are.
struct Tree {
    dist: PathBuf,
    source: PathBuf,
}

impl Tree {
    fn job<'a>(&'a self, script: &'a str, folder: &'a Path, machine: Machine) -> Job<'a> {
        Job {
            work: Work::Script(script),
            folder,
            dist: &self.dist,
            source: &self.source,
            images: &[("default", images::SMALL)],
            machine,
        }
    }
}

/// The VMM from its start to its guest's end, in microseconds, on this machine's KVM, which need not run a stock guest
/// for that.
fn native(dist: &Path) -> Result<Value> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(workspace::root()).args([
        "run",
        "--quiet",
        "--release",
        "-p",
        "vmm",
        "--example",
        "start_to_exit",
        "--",
    ]);
    let output = process::output(cargo.arg(dist.join("bin/coffer-vmm")))?;
    serde_json::from_str(&output).context("the VMM's samples are not JSON")
}

/// What the numbers were taken on.
fn machine(place: &Place) -> Result<Value> {
    let cpu = fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")
        .context("cannot read the kernel's release")?;
    let revision = process::output(
        Command::new("git")
            .current_dir(workspace::root())
            .args(["rev-parse", "HEAD"]),
    )?;
    Ok(json!({
        "cpu": model.trim_start_matches(['\t', ' ', ':']),
        "cores": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "kernel": kernel.trim(),
        "node": match place { Place::Host => "this machine", Place::Nested(_) => "nested, QEMU TCG, 1 vCPU" },
        "revision": revision.trim(),
    }))
}

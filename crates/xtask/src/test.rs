// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask test`: everything that must hold. Builds, checks, the tests of each crate on this machine, those that
//! need KVM and the end-to-end suite where VMs can run; then one line with the sum.

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::statvfs::statvfs;

use crate::build::{KVM_TESTED_PACKAGES, SUITE, TestKind, TestProgram};
use crate::node::{Job, Machine, Place, Work};
use crate::step::{seconds, section, step};
use crate::tally::{Outcome, Tally};
use crate::{apt, build, check, images, kernel, kernel_selftest, process, workspace};

/// The longest time for the tests of all crates, compilation included.
const CRATE_TESTS_LIMIT: Duration = Duration::from_secs(20 * 60);
/// The longest time for what runs in the node; on 2 cores under emulation.
const NODE_TESTS_LIMIT: Duration = Duration::from_secs(30 * 60);
/// The same when they soak.
const SOAK_LIMIT: Duration = Duration::from_secs(4 * 60 * 60);
/// What a run from nothing writes below the checkout and into the cache, in MiB.
const WHOLE_RUN_MIB: u64 = 6 * 1024;
/// The most nodes beside each other; each has 4 GiB of memory.
const MAX_NODES: usize = 4;

/// What `cargo xtask test` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only the tests that run in the node.
    #[arg(long)]
    only_node: bool,
    /// Take the built programs as they are.
    #[arg(long)]
    no_build: bool,
    /// Only tests for the node whose names contain this; may be given several times.
    #[arg(long)]
    filter: Vec<String>,
    /// Tests that repeat something do it as often as in a soak, or this part of that often.
    #[arg(long, value_name = "PERCENT", num_args = 0..=1, default_missing_value = "100")]
    soak: Option<u32>,
    /// The seed of what is random in the tests, as one that failed has printed it.
    #[arg(long)]
    seed: Option<u64>,
}

impl Arguments {
    /// Whether a test that runs in the node was asked for.
    fn wants(&self, name: &str) -> bool {
        self.filter.is_empty() || self.filter.iter().any(|part| name.contains(part.as_str()))
    }

    /// The tests' environment; it runs in the node's shell.
    fn environment(&self) -> String {
        let soak = self.soak.map(|percent| format!(" COFFER_SOAK={percent}"));
        let seed = self.seed.map(|seed| format!(" COFFER_SEED={seed}"));
        format!(
            "export COFFER_E2E=1 COFFER_E2E_ARTIFACTS=/job/artifacts COFFER_VMM=/opt/coffer/bin/coffer-vmm{}{}",
            soak.unwrap_or_default(),
            seed.unwrap_or_default()
        )
    }

    /// The longest time for what runs in the node.
    fn limit(&self) -> Duration {
        if self.soak.is_some() {
            SOAK_LIMIT
        } else {
            NODE_TESTS_LIMIT
        }
    }
}

/// Runs the verb. The exit code is 0 only if nothing failed.
///
/// # Errors
/// When the tests cannot be built or the node does not run to its end.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    tell_free_space()?;
    // What the images are made with, too.
    apt::ensure(kernel::PACKAGES)?;
    let place = thread::scope(|scope| {
        // Waits for a network, so beside the build, which waits for the processor.
        let archives = scope.spawn(|| {
            anyhow::Ok([
                images::software()?,
                images::postgres()?,
                images::gcc()?,
                images::small()?,
            ])
        });
        if !arguments.no_build {
            build::run()?;
        }
        let archives = archives
            .join()
            .map_err(|_| anyhow::anyhow!("making the images panicked"))??;
        build::images(&archives)?;
        Place::choose()
    })?;
    let programs = build::tests()?;
    let mut sum = Tally::default();
    if !arguments.only_node {
        sum += check::run()?;
        sum += test_crates()?;
        sum += test_kernel();
    }
    sum += test_in_node(&place, &programs, arguments)?;
    println!("{sum}");
    Ok(if sum.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Says so at once when the disk will not do: what fails later, for want of space, names other causes.
fn tell_free_space() -> Result<()> {
    let root = workspace::root();
    let disk = statvfs(&root).with_context(|| format!("cannot look at {}", root.display()))?;
    let free = disk.blocks_available().saturating_mul(disk.fragment_size()) >> 20;
    if free < WHOLE_RUN_MIB {
        println!("==> disk: {free} MiB free, and a run from nothing takes {WHOLE_RUN_MIB} MiB");
    }
    Ok(())
}

/// The guest kernel's self test, under emulation on this machine.
fn test_kernel() -> Tally {
    match kernel::build().and_then(|image| kernel_selftest::run(&image)) {
        Ok(()) => Tally::one(Outcome::Passed),
        Err(error) => {
            eprintln!("{error:#}");
            Tally::one(Outcome::Failed)
        }
    }
}

/// Unit and component tests of every crate, on this machine.
fn test_crates() -> Result<Tally> {
    let log = workspace::logs().join("crate-tests.log");
    let passed = step("tests of every crate", || {
        let mut cargo = Command::new("timeout");
        cargo
            .arg("--kill-after=10")
            .arg(CRATE_TESTS_LIMIT.as_secs().to_string())
            .arg(env!("CARGO"));
        cargo.args(["test", "--workspace", "--no-fail-fast", "--exclude", SUITE]);
        cargo.args(
            KVM_TESTED_PACKAGES
                .iter()
                .flat_map(|package| ["--exclude", package]),
        );
        cargo
            .current_dir(workspace::root())
            .env("CARGO_TERM_COLOR", "never");
        process::logged(&mut cargo, &log)
    });
    let output = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
    let output = String::from_utf8_lossy(&output);
    let mut tally = Tally::of_libtest(&output);
    if let Err(error) = passed {
        if tally.failed == 0 {
            // Not a test that failed: what does not compile or hangs is one failure of its own.
            eprintln!("{error:#}");
            tally += Tally::one(Outcome::Failed);
        }
        println!("{}", failures(&output));
    }
    Ok(tally)
}

/// What libtest programs say about their failed tests, and about those that hang.
fn failures(output: &str) -> String {
    let mut inside = false;
    let wanted = output.lines().filter(|line| {
        inside = (inside || line.starts_with("failures:")) && !line.starts_with("test result:");
        inside || line.contains(" has been running for over ")
    });
    wanted.collect::<Vec<_>>().join("\n")
}

/// The tests that need KVM and the end-to-end suite, where VMs run: in as many nested nodes beside each other as this
/// machine has processors.
fn test_in_node(place: &Place, programs: &[TestProgram], arguments: &Arguments) -> Result<Tally> {
    let artifacts = workspace::target().join("coffer/artifacts");
    if artifacts.exists() {
        fs::remove_dir_all(&artifacts)
            .with_context(|| format!("cannot empty {}", artifacts.display()))?;
    }
    let count = match place {
        Place::Host => 1,
        Place::Nested(_) => thread::available_parallelism().map_or(1, |n| n.get().min(MAX_NODES)),
    };
    let scripts = node_scripts(&workspace::root(), programs, arguments, count)?;
    let one = |(number, script): (usize, &String)| {
        let folder = artifacts.join(format!("node-{number}"));
        let mut out = Lines::default();
        let job = Job {
            work: Work::Script(script),
            folder: &folder,
            dist: &workspace::dist(),
            source: &workspace::root(),
            images: &[
                ("default", images::SMALL),
                ("k8s.io", images::SMALL),
                ("default", images::SOFTWARE),
            ],
            machine: Machine {
                memory_mib: 4096,
                limit: Some(arguments.limit()),
                ..Machine::default()
            },
        };
        let code = place.run(&job, &mut out, &mut io::stderr())?;
        anyhow::Ok((code, Tally::of_libtest(&String::from_utf8_lossy(&out.all))))
    };
    let ended = section("tests that need VMs", || {
        thread::scope(|scope| {
            let nodes: Vec<_> = scripts
                .iter()
                .enumerate()
                .map(|numbered| scope.spawn(move || one(numbered)))
                .collect();
            let join = |node: thread::ScopedJoinHandle<'_, _>| {
                node.join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("a node's thread panicked")))
            };
            Ok(nodes.into_iter().map(join).collect::<Vec<_>>())
        })
    })?;
    let mut sum = Tally::default();
    for node in ended {
        let (code, tally) = node.unwrap_or_else(|error| {
            // The others' results count all the same.
            eprintln!("{error:#}");
            (1, Tally::one(Outcome::Failed))
        });
        sum += tally;
        if code != 0 {
            eprintln!(
                "==> logs of the nodes and of their failed tests: {}",
                artifacts.display()
            );
        }
    }
    Ok(sum)
}

/// The tests of every program, dealt out to `count` nodes, the suite's last; a program that says nothing of its end counts
/// as one failed test.
fn node_scripts(
    root: &Path,
    programs: &[TestProgram],
    arguments: &Arguments,
    count: usize,
) -> Result<Vec<String>> {
    let shown = root.display();
    let environment = arguments.environment();
    let head = format!(
        "{environment}\nmkdir -p /job/artifacts\n\
         # The tests know the checkout by the name it has where they were built.\n\
         [ -e '{shown}' ] || {{ mkdir -p '{shown}' && rmdir '{shown}' && ln -s /src '{shown}'; }}\n\
         code=0\n\
         run() {{\n    \"$@\" && return\n    status=$?; code=1\n    [ $status -eq 101 ] || \
         echo \"$1 ended with $status: test result: FAILED. 0 passed; 1 failed; 0 ignored\"\n}}\n"
    );
    let mut scripts = vec![head; count];
    let of_kind = |kind| programs.iter().filter(move |program| program.kind == kind);
    for program in of_kind(TestKind::Kvm).chain(of_kind(TestKind::EndToEnd)) {
        let path = program.path.display();
        if !program.path.starts_with(workspace::root()) {
            bail!("the node does not see {path}: set CARGO_TARGET_DIR to a folder in the checkout");
        }
        let listed =
            process::output(Command::new(&program.path).args(["--list", "--format", "terse"]))?;
        let names: Vec<&str> = listed
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .filter(|name| arguments.wants(name))
            .collect();
        for (script, dealt) in scripts.iter_mut().zip(deal(&names, count)) {
            if !dealt.is_empty() {
                let dealt = dealt.join(" ");
                script.push_str(&format!("run '{path}' --test-threads=1 --exact {dealt}\n"));
            }
        }
    }
    for script in &mut scripts {
        script.push_str("exit $code\n");
    }
    Ok(scripts)
}

/// Deals tests out to `count` nodes. Those of one module in a module stay together, for they may share what is dear to make.
fn deal<'a>(names: &[&'a str], count: usize) -> Vec<Vec<&'a str>> {
    let module = |name: &'a str| {
        let (module, _) = name.rsplit_once("::")?;
        module.contains("::").then_some(module)
    };
    let together = |one: &&'a str, other: &&'a str| {
        module(one).is_some_and(|of_one| module(other) == Some(of_one))
    };
    let mut dealt = vec![Vec::new(); count];
    for (hand, group) in (0..count).cycle().zip(names.chunk_by(together)) {
        if let Some(hand) = dealt.get_mut(hand) {
            hand.extend_from_slice(group);
        }
    }
    dealt
}

/// Passes on whole lines, so that those of several nodes do not mix, and keeps a copy. A line that ends a test is passed on
/// with the time since the line before.
struct Lines {
    all: Vec<u8>,
    /// How much of it was passed on.
    shown: usize,
    last: Instant,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            shown: 0,
            last: Instant::now(),
        }
    }
}

impl Lines {
    fn pass_on(&mut self, line: &[u8]) -> io::Result<()> {
        let took = self.last.elapsed();
        self.last = Instant::now();
        let mut out = io::stdout().lock();
        match line.strip_suffix(b"\n") {
            Some(test) if line.starts_with(b"test ") && contains(line, b" ... ") => {
                out.write_all(test)?;
                writeln!(out, " ({})", seconds(took))
            }
            _ => out.write_all(line),
        }
    }
}

fn contains(line: &[u8], part: &[u8]) -> bool {
    line.windows(part.len()).any(|window| window == part)
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.all.extend_from_slice(bytes);
        let unseen = self.all.get(self.shown..).unwrap_or_default();
        if let Some(end) = unseen.iter().rposition(|byte| *byte == b'\n') {
            let lines = unseen.get(..=end).unwrap_or_default().to_vec();
            self.shown = self.shown.saturating_add(lines.len());
            for line in lines.split_inclusive(|byte| *byte == b'\n') {
                self.pass_on(line)?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn soak_and_seed_reach_the_tests_and_filters_are_alternatives() {
        let arguments = Arguments {
            only_node: true,
            no_build: true,
            filter: vec!["churn".to_owned(), "truth".to_owned()],
            soak: Some(20),
            seed: Some(7),
        };
        assert!(
            arguments
                .environment()
                .ends_with(" COFFER_SOAK=20 COFFER_SEED=7")
        );
        assert!(arguments.wants("truth::one") && !arguments.wants("faults::one"));
    }

    #[test]
    fn tests_that_may_share_something_stay_together() {
        let names = [
            "a::one",
            "a::two",
            "k::x::one",
            "k::x::two",
            "k::y::one",
            "z",
        ];
        assert_eq!(
            deal(&names, 2),
            [
                vec!["a::one", "k::x::one", "k::x::two", "z"],
                vec!["a::two", "k::y::one"]
            ]
        );
    }

    #[test]
    fn only_failed_and_hanging_tests_are_shown() {
        let output = "test a ... ok\ntest b ... FAILED\n\nfailures:\n\n---- b stdout ----\nwhy\n\n\
                      test result: FAILED. 1 passed; 1 failed; 0 ignored\nrunning 1 test\n\
                      test c has been running for over 60 seconds\n";
        assert_eq!(
            failures(output),
            "failures:\n\n---- b stdout ----\nwhy\n\ntest c has been running for over 60 seconds"
        );
    }
}

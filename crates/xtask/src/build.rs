// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask build`: the tree of everything that a node runs, at `target/coffer/dist`, laid out as under
//! `/opt/coffer` on a node:
//!
//! ```text
//! bin/                    containerd-shim-coffer-v2, coffer-vmm, coffer-virtiofsd, cofferctl
//! share/coffer/           vmlinux, initramfs
//! images/                 container images for demo and tests
//! ```
//!
//! Programs are static, so that they run in the nested node, on any node and in the initramfs. They have a target
//! folder of their own, because other flags in the same one would rebuild everything at each change of verb.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cpio::Archive;
use crate::step::step;
use crate::{apt, images, kernel, process, workspace};

/// With it, `-C target-feature` leaves build scripts and procedural macros alone, which cannot be static.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// The programs in `bin/`: profile, package and name of each.
const HOST_PROGRAMS: &[(&str, &str, &str)] = &[
    (SMALL, "shim", "containerd-shim-coffer-v2"),
    (SMALL, "cofferctl", "cofferctl"),
    (FAST, "vmm", "coffer-vmm"),
    (FAST, "coffer_virtiofsd", "coffer-virtiofsd"),
];
/// The profile of programs that move bytes.
const FAST: &str = "release";
/// The profile of programs whose size counts.
const SMALL: &str = "small";
/// Packages whose tests need KVM: they run where it is usable, all others on this machine.
pub(crate) const KVM_TESTED_PACKAGES: &[&str] = &["kvm_probe", "vmm", "driver_embedded"];
/// The package, and its test program, that is the end-to-end suite.
pub(crate) const SUITE: &str = "e2e";
/// The most that the initramfs may hold, in bytes: every pod has a copy in its memory.
const MAX_INITRAMFS: u64 = 6 << 20;

/// Installs what is needed and builds the tree, without tests and images.
///
/// # Errors
/// When a package is missing or a step of the build fails.
pub(crate) fn run() -> Result<()> {
    apt::ensure(kernel::PACKAGES)?;
    let dist = workspace::dist();
    let vmlinux = step("guest kernel", kernel::build)?;
    install(&vmlinux, &dist.join("share/coffer/vmlinux"))?;
    step("programs of the node", || build_host_programs(&dist))?;
    step("guest agent and initramfs", || build_initramfs(&dist))
}

/// A test program that runs in the node, from the checkout that the node sees.
pub(crate) struct TestProgram {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// Whether it is the end-to-end suite, which needs containerd, or a crate's own tests, which need only KVM.
    pub(crate) kind: TestKind,
}

/// What a test program needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TestKind {
    /// A usable KVM.
    Kvm,
    /// A node.
    EndToEnd,
}

/// Builds the end-to-end tests and those of single crates that need KVM.
///
/// # Errors
/// When the tests do not compile.
pub(crate) fn tests() -> Result<Vec<TestProgram>> {
    step("test programs for the node", || {
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .current_dir(workspace::root())
            .env("CARGO_TERM_COLOR", "never");
        cargo.args([
            "test",
            "--no-run",
            "--message-format=json-render-diagnostics",
            "--package",
            SUITE,
        ]);
        cargo.args(
            KVM_TESTED_PACKAGES
                .iter()
                .flat_map(|package| ["--package", package]),
        );
        cargo.args(["--lib", "--bins", "--tests"]);
        Ok(test_programs(&messages(&mut cargo)?))
    })
}

/// Builds the program that measures in the node into `tests/`.
///
/// # Errors
/// When it does not compile.
pub(crate) fn bench(dist: &Path) -> Result<()> {
    step("measuring program for the node", || {
        let mut cargo = cargo_static("build");
        cargo.args(["--release", "-p", "e2e", "--bin", "coffer-bench"]);
        process::logged(&mut cargo, &workspace::logs().join("bench.log"))?;
        install(
            &built("release", "coffer-bench"),
            &dist.join("tests/coffer-bench"),
        )
    })
}

fn build_host_programs(dist: &Path) -> Result<()> {
    for profile in [FAST, SMALL] {
        let programs = HOST_PROGRAMS.iter().filter(|(of, ..)| *of == profile);
        let mut cargo = cargo_static("build");
        cargo
            .args(["--profile", profile, "--bins"])
            .args(programs.clone().flat_map(|(_, package, _)| ["-p", package]));
        let log = workspace::logs().join(format!("programs-{profile}.log"));
        process::logged(&mut cargo, &log)?;
        for (_, _, name) in programs {
            install(&built(profile, name), &dist.join("bin").join(name))?;
        }
    }
    Ok(())
}

fn build_initramfs(dist: &Path) -> Result<()> {
    let made = initramfs("agent", "coffer-agent")?;
    let size = fs::metadata(&made)
        .context("cannot read the initramfs' size")?
        .len();
    if size > MAX_INITRAMFS {
        bail!(
            "the initramfs has {size} bytes, more than {MAX_INITRAMFS}; look for what the agent links"
        );
    }
    install(&made, &dist.join("share/coffer/initramfs"))
}

/// An initramfs with nothing in it but a program of a package, as init.
///
/// # Errors
/// When the program does not compile or the file cannot be written.
pub(crate) fn initramfs(package: &str, program: &str) -> Result<PathBuf> {
    let mut cargo = cargo_static("build");
    cargo.args(["--profile", SMALL, "--bins", "-p", package]);
    process::logged(
        &mut cargo,
        &workspace::logs().join(format!("{package}.log")),
    )?;
    let program = built(SMALL, program);
    let init = fs::read(&program).with_context(|| format!("cannot read {}", program.display()))?;
    let made = workspace::target().join(format!("coffer/initramfs-{package}"));
    let file = File::create(&made).with_context(|| format!("cannot create {}", made.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    archive
        .directory("dev")
        .and_then(|()| archive.character_device("dev/console", 5, 1))?;
    archive.file("init", 0o755, &init)?;
    archive
        .finish()?
        .into_inner()
        .context("cannot write the initramfs")?;
    Ok(made)
}

/// Cargo with the flags for static programs.
fn cargo_static(verb: &str) -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    cargo
        .current_dir(workspace::root())
        .args([verb, "--target", TARGET, "--target-dir"])
        .arg(target());
    cargo
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_TERM_COLOR", "never");
    cargo
}

fn target() -> PathBuf {
    workspace::target().join("static")
}

fn built(profile: &str, name: &str) -> PathBuf {
    target().join(TARGET).join(profile).join(name)
}

/// Runs cargo and returns its messages (cargo book, "External tools").
fn messages(cargo: &mut Command) -> Result<Vec<Value>> {
    let output = cargo
        .stdin(Stdio::null())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!(
            "cargo ended with {}\n{}",
            output.status,
            process::last_lines(&String::from_utf8_lossy(&output.stderr))
        );
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .map(|line| serde_json::from_str(line).context("cargo wrote something that is not JSON"))
        .collect()
}

/// The test programs that cargo built.
fn test_programs(messages: &[Value]) -> Vec<TestProgram> {
    let test_program = |message: &Value| {
        let path = PathBuf::from(message.get("executable")?.as_str()?);
        message.pointer("/profile/test")?.as_bool()?.then_some(())?;
        let text = |pointer| message.pointer(pointer).and_then(Value::as_str);
        let suite = (text("/target/name"), text("/target/kind/0")) == (Some(SUITE), Some("test"));
        Some(TestProgram {
            path,
            kind: if suite {
                TestKind::EndToEnd
            } else {
                TestKind::Kvm
            },
        })
    };
    messages.iter().filter_map(test_program).collect()
}

/// Puts a file into the tree by a rename: a node that is running keeps the one it has open.
fn install(from: &Path, to: &Path) -> Result<()> {
    let describe = || format!("cannot put {} at {}", from.display(), to.display());
    let folder = to.parent().with_context(describe)?;
    fs::create_dir_all(folder).with_context(describe)?;
    let partial = to.with_added_extension("partial");
    fs::copy(from, &partial).with_context(describe)?;
    fs::rename(&partial, to).with_context(describe)
}

/// Puts the container images into the tree.
///
/// # Errors
/// When one cannot be made.
pub(crate) fn images(archives: &[PathBuf]) -> Result<()> {
    archives
        .iter()
        .try_for_each(|archive| images::install(archive, &workspace::dist()))
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn only_test_programs_are_taken() {
        let messages = [
            r#"{"target":{"name":"e2e","kind":["test"]},"profile":{"test":true},"executable":"/t/e2e-1"}"#,
            r#"{"target":{"name":"e2e","kind":["lib"]},"profile":{"test":true},"executable":"/t/e2e-2"}"#,
            r#"{"target":{"name":"vmm","kind":["bin"]},"profile":{"test":false},"executable":"/t/vmm"}"#,
            r#"{"target":{"name":"ids","kind":["lib"]},"profile":{"test":true},"executable":null}"#,
            r#"{"reason":"build-finished","success":true}"#,
        ];
        let messages: Vec<Value> = messages
            .iter()
            .map(|text| serde_json::from_str(text).unwrap())
            .collect();
        let programs: Vec<_> = test_programs(&messages)
            .into_iter()
            .map(|program| (program.path, program.kind))
            .collect();
        assert_eq!(
            programs,
            [
                ("/t/e2e-1".into(), TestKind::EndToEnd),
                ("/t/e2e-2".into(), TestKind::Kvm)
            ]
        );
    }
}

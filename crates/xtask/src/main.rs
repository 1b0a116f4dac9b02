// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Builds, tests, checks and benchmarks the project: `cargo xtask --help`.

mod apt;
mod bench;
mod build;
mod cache;
mod check;
mod cpio;
mod demo;
mod images;
mod kernel;
mod kernel_config;
mod kernel_image;
mod kernel_selftest;
mod node;
mod node_verb;
mod process;
mod step;
mod tally;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, tests, checks and benchmarks Coffer.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Builds the guest kernel and prints where it is.
    Kernel {
        /// Then boots it in QEMU, as a virtio-mmio and as a PCI machine, and checks it from inside.
        #[arg(long)]
        test: bool,
    },
    /// Builds everything that a node runs.
    Build,
    /// Checks format, lints, documentation, dependencies, licences and sizes.
    Check,
    /// Runs a container in a microVM, from nothing but this checkout.
    Demo,
    /// Measures Coffer beside runc.
    Bench(bench::Arguments),
    /// Runs every check and every test; ends with their number.
    Test(test::Arguments),
    /// Opens a shell in the nested-KVM node, or runs a command there.
    Node(node_verb::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().verb {
        Verb::Kernel { test } => build_kernel(test).map(|()| ExitCode::SUCCESS),
        Verb::Build => build::run().map(|()| ExitCode::SUCCESS),
        Verb::Check => run_checks(),
        Verb::Demo => demo::run(),
        Verb::Bench(arguments) => bench::run(&arguments),
        Verb::Test(arguments) => test::run(&arguments),
        Verb::Node(arguments) => node_verb::run(&arguments),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run_checks() -> anyhow::Result<ExitCode> {
    let tally = check::run()?;
    println!("{tally}");
    Ok(if tally.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn build_kernel(test: bool) -> anyhow::Result<()> {
    apt::ensure(kernel::PACKAGES)?;
    let image = step::step("guest kernel", kernel::build)?;
    println!("{}", image.display());
    if test {
        kernel_selftest::run(&image)
    } else {
        Ok(())
    }
}

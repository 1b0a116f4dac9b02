// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Builds, tests, checks and benchmarks the project: `cargo xtask --help`.

mod apt;
mod cache;
mod cpio;
mod images;
mod node;
mod node_verb;
mod process;
mod step;
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
    /// Opens a shell in the nested-KVM node, or runs a command there.
    Node(node_verb::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().verb {
        Verb::Node(arguments) => node_verb::run(&arguments),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

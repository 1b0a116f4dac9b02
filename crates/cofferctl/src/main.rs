// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The operator's tool for a Coffer node.
//!
//! Exit codes: 0 all is well, 1 a check failed, 2 the command line is wrong.
#![forbid(unsafe_code)]

mod check;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(
    name = "cofferctl",
    version,
    about = "The operator's tool for a Coffer node"
)]
struct Arguments {
    /// The node's config file; it need not exist if it is the default one
    #[arg(long, global = true, default_value = pod_spec::RuntimeConfig::DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Checks everything that a node needs to run pods, and says for each failure what to do
    Check {
        /// How to print the result
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Table,
    Json,
}

fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    match arguments.verb {
        Verb::Check { output } => {
            let results = check::node(&arguments.config);
            let text = match output {
                Output::Table => check::table(&results),
                Output::Json => serde_json::to_string_pretty(&results)? + "\n",
            };
            print(&text)?;
            let failed = results.iter().any(|result| result.outcome.is_failure());
            Ok(if failed {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            })
        }
    }
}

/// Prints, and takes a reader that has gone away (`cofferctl check | head -1`) as success.
fn print(text: &str) -> std::io::Result<()> {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

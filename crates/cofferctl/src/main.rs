// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The operator's tool for a Coffer node.
//!
//! What it shows of sandboxes it reads from the directories that their shims keep ([`node`]) and asks of the shims
//! themselves ([`shim`]). It changes nothing but by [`exec`].
//!
//! Exit codes: 0 all is well, 1 a check failed or something else did, 2 the command line is wrong.
#![forbid(unsafe_code)]

mod check;
mod cli;
mod config;
mod exec;
mod follow;
mod list;
mod node;
mod output;
mod shim;
mod stats;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};

use crate::cli::{Arguments, Target, Verb};
use crate::node::Sandbox;
use crate::output::{Output, print};
use crate::shim::Lines;

fn main() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("cofferctl: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    match &arguments.verb {
        Verb::Check { output } => return check(&arguments, *output),
        Verb::Config { default, output } => {
            let file = (!default).then_some(arguments.config.as_path());
            let config = config::effective(file)?;
            print(&output.text(&config, config::Config::table)?)?;
        }
        Verb::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut Arguments::command(), "cofferctl", &mut text);
            print(&String::from_utf8(text)?)?;
        }
        Verb::Man { dir } => clap_mangen::generate_to(Arguments::command(), dir)
            .with_context(|| format!("write man pages into {}", dir.display()))?,
        _ => {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            return runtime.block_on(of_sandboxes(&arguments));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check(arguments: &Arguments, output: Output) -> Result<ExitCode> {
    let results = check::node(&arguments.config);
    print(&output.text(&results, |results| check::table(results))?)?;
    let failed = results.iter().any(|result| result.outcome.is_failure());
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// The verbs that ask shims.
async fn of_sandboxes(arguments: &Arguments) -> Result<ExitCode> {
    let root = &arguments.state_dir;
    let find = |target: &Target| node::find(root, target.namespace.as_deref(), &target.sandbox);
    match &arguments.verb {
        Verb::List { namespace, output } => {
            let rows = list::rows(node::sandboxes(root, namespace.as_deref())?).await?;
            print(&output.text(&rows, |rows| list::table(rows))?)?;
        }
        Verb::Inspect { target, output } => {
            let dump = list::inspect(&find(target)?).await?;
            print(&output.text(&dump, list::inspect_table)?)?;
        }
        Verb::Console { target, follow } => {
            follow::console(&find(target)?, *follow).await?;
        }
        Verb::Logs { target, follow } => {
            let show = |line: &str| Ok(format!("{line}\n"));
            follow::run(&find(target)?, Lines::Logs, *follow, show).await?;
        }
        Verb::Events {
            target,
            follow,
            output,
        } => {
            let show = |line: &str| follow::event(line, *output);
            follow::run(&find(target)?, Lines::Events, *follow, show).await?;
        }
        Verb::Exec { target, command } => return exec::run(&find(target)?, command).await,
        Verb::Stats {
            sandbox,
            namespace,
            output,
        } => {
            let namespace = namespace.as_deref();
            let sandboxes = match sandbox {
                Some(id) => vec![node::find(root, namespace, id)?],
                None => node::sandboxes(root, namespace)?,
            };
            return stats(sandboxes, *output).await;
        }
        Verb::Check { .. } | Verb::Config { .. } | Verb::Completions { .. } | Verb::Man { .. } => {}
    }
    Ok(ExitCode::SUCCESS)
}

async fn stats(sandboxes: Vec<Sandbox>, output: Output) -> Result<ExitCode> {
    let (figures, failed) = stats::figures(sandboxes).await;
    print(&output.text(&figures, |figures| stats::table(figures))?)?;
    for error in &failed {
        eprintln!("{error:#}");
    }
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

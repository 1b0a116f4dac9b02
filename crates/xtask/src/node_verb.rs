// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask node`: a shell or a command in the nested node.

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::node::{Job, Machine, Place, Work};
use crate::{apt, build, images, workspace};

/// What `cargo xtask node` takes.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Take the built tree as it is.
    #[arg(long)]
    no_build: bool,
    /// Run the command on this machine, in namespaces of its own, in place of the nested node.
    #[arg(long)]
    host: bool,
    /// Also import the images of nginx, redis and python.
    #[arg(long)]
    software: bool,
    /// The node's memory in MiB.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
    /// End the node after this many seconds.
    #[arg(long)]
    timeout: Option<u64>,
    /// A command and its arguments in place of a shell.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs the verb; the command's exit code is ours.
///
/// # Errors
/// When the node cannot be made or does not run to its end.
pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    apt::ensure(&[])?;
    if !arguments.no_build {
        build::run()?;
    }
    let place = if arguments.host {
        Place::Host
    } else {
        Place::nested()?
    };
    let mut archives = vec![images::small()?];
    let mut imports = vec![("default", images::SMALL), ("k8s.io", images::SMALL)];
    if arguments.software {
        archives.push(images::software()?);
        imports.push(("default", images::SOFTWARE));
    }
    build::images(&archives)?;
    let folder = tempfile::tempdir().context("cannot create a temporary folder")?;
    let script = arguments
        .command
        .iter()
        .map(|word| quoted(word))
        .collect::<Vec<_>>()
        .join(" ");
    let terminal = arguments.command.is_empty() && io::stdin().is_terminal();
    let job = Job {
        work: if terminal {
            Work::Terminal
        } else {
            Work::Script(&script)
        },
        folder: folder.path(),
        dist: &workspace::dist(),
        source: &workspace::root(),
        images: &imports,
        machine: Machine {
            memory_mib: arguments.memory,
            limit: arguments.timeout.map(Duration::from_secs),
            ..Machine::default()
        },
    };
    let code = place.run(&job, &mut io::stdout(), &mut io::stderr())?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

/// A word as the shell reads it back unchanged.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_words_survive_the_shell() {
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}

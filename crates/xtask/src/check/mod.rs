// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask check`: what can be said about the code without running it.

mod dependencies;
mod source;

use std::process::Command;

use anyhow::Result;

use crate::step::step;
use crate::tally::{Outcome, Tally};
use crate::{process, workspace};

/// Makes every check, says what is wrong, and counts.
///
/// # Errors
/// When a check cannot be made at all.
pub(crate) fn run() -> Result<Tally> {
    let mut sum = Tally::default();
    let deny_warnings = &[("RUSTDOCFLAGS", "-D warnings")];
    sum += made(
        "format",
        cargo(&["fmt", "--all", "--", "--check", "--color=never"], &[]),
    );
    sum += made(
        "clippy",
        cargo(
            &[
                "clippy",
                "--workspace",
                "--keep-going",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
            &[],
        ),
    );
    sum += made(
        "rustdoc",
        cargo(
            &[
                "doc",
                "--workspace",
                "--no-deps",
                "--document-private-items",
            ],
            deny_warnings,
        ),
    );
    sum += made("licence headers", source::licence_headers);
    sum += made("size limits", source::size_limits);
    sum += made("dependency direction", dependencies::direction);
    sum += if process::output(Command::new(env!("CARGO")).args(["deny", "--version"])).is_ok() {
        made(
            "licences and sources of dependencies",
            cargo(&["deny", "check", "bans", "licenses", "sources"], &[]),
        )
    } else {
        eprintln!("==> licences and sources of dependencies: skipped, cargo-deny is not installed");
        Tally::one(Outcome::Skipped)
    };
    Ok(sum)
}

/// Counts a check, whose error is what is wrong.
fn made(name: &str, check: impl FnOnce() -> Result<()>) -> Tally {
    match step(name, check) {
        Ok(()) => Tally::one(Outcome::Passed),
        Err(error) => {
            eprintln!("{error:#}");
            Tally::one(Outcome::Failed)
        }
    }
}

/// Runs cargo in the workspace, quiet unless it fails.
fn cargo(
    arguments: &'static [&str],
    environment: &'static [(&str, &str)],
) -> impl FnOnce() -> Result<()> {
    move || {
        let mut cargo = Command::new(env!("CARGO"));
        cargo
            .args(arguments)
            .current_dir(workspace::root())
            .env("CARGO_TERM_COLOR", "never");
        cargo.envs(environment.iter().copied());
        let verb = arguments.first().copied().unwrap_or_default();
        process::logged(
            &mut cargo,
            &workspace::logs().join(format!("check-{verb}.log")),
        )
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Debian packages: those that are missing are installed, and only then.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{process, step, workspace};

/// All packages that xtask needs, with the reason for each.
const PACKAGES: &str = include_str!("../../../ci/node/packages");

/// Installs what is missing of `ci/node/packages` and of `more`.
///
/// # Errors
/// When packages are missing and apt cannot install them (it needs root and a network).
pub(crate) fn ensure(more: &[&str]) -> Result<()> {
    let wanted: Vec<&str> = listed(PACKAGES).chain(more.iter().copied()).collect();
    let missing: Vec<&str> = wanted
        .into_iter()
        .filter(|package| version(package).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "as root, install the missing Debian packages: apt-get install {}",
            missing.join(" ")
        );
    }
    step::step(
        &format!("install {} Debian packages", missing.len()),
        || {
            let log = workspace::logs().join("apt.log");
            let mut install = apt_get(&["install", "-y", "--no-install-recommends"]);
            install.args(&missing);
            // The package lists may be missing or old: try, refresh, try again.
            if process::logged(&mut install, &log).is_ok() {
                return Ok(());
            }
            process::logged(&mut apt_get(&["update"]), &log)?;
            process::logged(&mut install, &log)
        },
    )
}

/// The installed version of a package.
pub(crate) fn version(package: &str) -> Option<String> {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${db:Status-Abbrev}${Version}", package]);
    process::output(&mut query)
        .ok()?
        .strip_prefix("ii ")
        .map(str::to_owned)
}

/// Downloads a package that is better not installed (a kernel would become the machine's own), with the package it
/// depends on whose name starts with `dependency`, and unpacks the latter into `into`.
///
/// # Errors
/// When apt does not know the package or cannot download it.
pub(crate) fn unpack_dependency(package: &str, dependency: &str, into: &Path) -> Result<()> {
    let show =
        || process::output(Command::new("apt-cache").args(["depends", "--important", package]));
    let depends = show().or_else(|_| {
        process::logged(
            &mut apt_get(&["update"]),
            &workspace::logs().join("apt.log"),
        )?;
        show()
    })?;
    let concrete = depends
        .split_whitespace()
        .find(|word| word.starts_with(dependency) && *word != package)
        .with_context(|| format!("apt knows no {dependency}* that {package} depends on"))?;
    let folder = tempfile::tempdir().context("cannot create a temporary folder")?;
    // apt downloads as a user of its own where it can; the folder is root's, so it says so and goes on.
    process::output(apt_get(&["download", concrete]).current_dir(folder.path()))?;
    let archive: PathBuf = std::fs::read_dir(folder.path())
        .context("cannot list a temporary folder")?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {concrete} left no .deb"))?;
    process::output(Command::new("dpkg-deb").arg("-x").arg(archive).arg(into)).map(drop)
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .arg("-q")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// The first word of each line that is not a comment.
pub(crate) fn listed(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|word| !word.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_not_packages() {
        let words: Vec<&str> = listed("# a\nrunc  # why\n\nlsof\n").collect();
        assert_eq!(words, ["runc", "lsof"]);
    }

    #[test]
    fn unknown_package_has_no_version() {
        assert_eq!(version("no-such-package-anywhere"), None);
    }
}

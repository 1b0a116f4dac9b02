// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Checks that read the source: licence headers and the limits on the sizes of files and traits. (The limits on
//! functions and parameters are clippy's, see `clippy.toml`.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{process, workspace};

/// Lines of code in a file, tests aside.
const MAX_LINES: usize = 500;
/// Methods of a trait.
const MAX_METHODS: usize = 10;

const HEADER: [&str; 2] = [
    "Copyright The Coffer Authors",
    "SPDX-License-Identifier: Apache-2.0",
];

/// Every program text begins with the copyright and the licence.
pub(crate) fn licence_headers() -> Result<()> {
    let missing = |text: &str| {
        let head: Vec<&str> = text.lines().take(4).collect();
        let has = |wanted: &&str| head.iter().any(|line| line.ends_with(wanted));
        (!HEADER.iter().all(has)).then(|| format!("does not begin with {HEADER:?}"))
    };
    report(
        &files(&[
            "*.rs",
            "*.proto",
            "ci/node/boot",
            "ci/node/host",
            "ci/node/init",
            "ci/node/job",
            ".ci/run",
        ])?,
        missing,
    )
}

/// No file and no trait is too long.
pub(crate) fn size_limits() -> Result<()> {
    // Tests may be longer than the code.
    let code = files(&["*.rs", ":!**/*tests.rs", ":!**/tests/**"])?;
    report(&code, |text| {
        let lines = code_lines(text);
        let long = (lines > MAX_LINES)
            .then(|| format!("has {lines} lines of code, more than {MAX_LINES}"));
        long.or_else(|| long_trait(text))
    })
}

/// The files of the repository that match git's patterns.
fn files(patterns: &[&str]) -> Result<Vec<PathBuf>> {
    let mut git = Command::new("git");
    git.current_dir(workspace::root()).args([
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
    ]);
    let listing = process::output(git.args(patterns))?;
    let files: Vec<PathBuf> = listing
        .lines()
        .map(PathBuf::from)
        .filter(|file| workspace::root().join(file).exists())
        .collect();
    if files.is_empty() {
        bail!("git lists no file for {patterns:?}");
    }
    Ok(files)
}

/// Fails with every file that has something wrong.
fn report(files: &[PathBuf], wrong: impl Fn(&str) -> Option<String>) -> Result<()> {
    let mut found = Vec::new();
    for file in files {
        if let Some(what) = wrong(&read(file)?) {
            found.push(format!("{} {what}", file.display()));
        }
    }
    if found.is_empty() {
        Ok(())
    } else {
        bail!("{}", found.join("\n"))
    }
}

fn read(file: &Path) -> Result<String> {
    let path = workspace::root().join(file);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// Lines before the tests that are neither empty nor only a comment.
fn code_lines(text: &str) -> usize {
    let tests = |line: &&str| line.trim_start().starts_with("#[cfg(test)]");
    let code = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with("//");
    let lines: Vec<&str> = text.lines().collect();
    // The last one, which is the module of tests: an earlier one may be on a single item.
    let end = lines.iter().rposition(tests).unwrap_or(lines.len());
    lines.iter().take(end).filter(|line| code(line)).count()
}

/// A trait with too many methods.
fn long_trait(text: &str) -> Option<String> {
    let mut current: Option<(&str, usize)> = None;
    for line in text.lines() {
        let begins = ["trait ", "pub trait ", "pub(crate) trait "]
            .iter()
            .find_map(|word| line.strip_prefix(word));
        if let Some(rest) = begins {
            current = Some((rest.split([':', '<', ' ', '{']).next().unwrap_or(rest), 0));
        } else if line == "}" {
            if let Some((name, methods)) = current.take()
                && methods > MAX_METHODS
            {
                return Some(format!(
                    "has the trait {name} with {methods} methods, more than {MAX_METHODS}"
                ));
            }
        } else if let Some((_, methods)) = &mut current {
            let method = line
                .strip_prefix("    ")
                .is_some_and(|line| line.starts_with("fn ") || line.starts_with("async fn "));
            *methods = usize::from(method).saturating_add(*methods);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_tests_are_not_code() {
        assert_eq!(
            code_lines("// a\n\nfn a() {}\n    // b\nfn b() {}\n#[cfg(test)]\nmod tests {\n}\n"),
            2
        );
    }

    #[test]
    fn trait_past_the_limit_is_named() {
        let text = |methods| {
            format!(
                "pub trait Driver: Send {{\n{}}}\n",
                "    fn a();\n".repeat(methods)
            )
        };
        assert_eq!(long_trait(&text(MAX_METHODS)), None);
        assert!(
            long_trait(&text(MAX_METHODS + 1))
                .unwrap()
                .contains("Driver")
        );
    }
}

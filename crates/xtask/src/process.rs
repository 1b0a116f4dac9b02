// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Runs other programs: quiet when they succeed, with the end of their output when they fail.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// So many last lines of a failed program's output are shown.
const SHOWN_LINES: usize = 30;

/// Runs a program and returns its standard output.
///
/// # Errors
/// When it cannot be started (the hint names the program) or does not exit with 0.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| cannot_run(command))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        bail!(
            "{} ended with {}\n{}",
            describe(command),
            output.status,
            last_lines(&String::from_utf8_lossy(&said))
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("{} wrote something that is not text", describe(command)))
}

/// Runs a program with both outputs in the file `log`.
///
/// # Errors
/// As [`output`]; the end of the log is in the error.
pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<()> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    let both = file.try_clone().context("cannot duplicate a file handle")?;
    let status = command
        .stdin(Stdio::null())
        .stdout(file)
        .stderr(both)
        .status()
        .with_context(|| cannot_run(command))?;
    if !status.success() {
        let said = fs::read(log).unwrap_or_default();
        let end = last_lines(&String::from_utf8_lossy(&said));
        bail!(
            "{} ended with {status}; all of its output is in {}\n{end}",
            describe(command),
            log.display()
        );
    }
    Ok(())
}

/// The last lines of a text.
pub(crate) fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(SHOWN_LINES)..)
        .unwrap_or_default()
        .join("\n")
}

fn cannot_run(command: &Command) -> String {
    format!("cannot run {}", command.get_program().display())
}

fn describe(command: &Command) -> String {
    let arguments = command
        .get_args()
        .take(4)
        .map(|argument| argument.to_string_lossy());
    let words: Vec<_> = std::iter::once(command.get_program().to_string_lossy())
        .chain(arguments)
        .collect();
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failing_program_shows_its_output() {
        let error = output(Command::new("sh").args(["-c", "echo reason >&2; exit 3"])).unwrap_err();
        assert!(format!("{error:#}").contains("reason"), "{error:#}");
    }

    #[test]
    fn only_the_last_lines_are_shown() {
        let text: String = (0..100).map(|n| format!("{n}\n")).collect();
        let shown = last_lines(&text);
        assert!(
            shown.starts_with("70\n") && shown.ends_with("\n99"),
            "{shown}"
        );
    }
}

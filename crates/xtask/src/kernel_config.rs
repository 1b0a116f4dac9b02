// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Kconfig fragments: reading them, merging them, and comparing what was asked for with what Kconfig made of it.
//!
//! Kconfig drops in silence what its dependencies do not allow. So every line of every fragment is looked up in the
//! resolved configuration, and an option may be set in one place only.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

/// The options that `kernel-config/*.config` ask for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Fragments {
    options: BTreeMap<String, Option<String>>,
}

/// Reads all fragments of a directory.
///
/// # Errors
/// An unreadable file, a line that is neither an option nor a comment, an option that is set twice.
pub(crate) fn read_fragments(directory: &Path) -> Result<Fragments> {
    let mut fragments = Fragments::default();
    for entry in fs::read_dir(directory).with_context(|| format!("read {}", directory.display()))? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "config")
        {
            let text =
                fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            fragments
                .add(&text)
                .with_context(|| path.display().to_string())?;
        }
    }
    ensure!(
        !fragments.options.is_empty(),
        "{} holds no *.config file",
        directory.display()
    );
    Ok(fragments)
}

impl Fragments {
    /// Adds the options of one fragment.
    fn add(&mut self, text: &str) -> Result<()> {
        for line in text.lines() {
            let Some((name, value)) = parse_line(line)? else {
                continue;
            };
            let old = self
                .options
                .insert(name.to_owned(), value.map(str::to_owned));
            ensure!(
                old.is_none(),
                "CONFIG_{name} is already set; an option has one place"
            );
        }
        Ok(())
    }

    /// All options as one file for `KCONFIG_ALLCONFIG`, sorted by name: comments and files do not change it.
    pub(crate) fn merged(&self) -> String {
        self.options
            .iter()
            .map(|(name, value)| format_line(name, value.as_deref()) + "\n")
            .collect()
    }

    /// The options that `resolved` (a `.config`) holds otherwise than asked for, one message each.
    pub(crate) fn refused_by(&self, resolved: &str) -> Vec<String> {
        let have: BTreeMap<&str, &str> = resolved
            .lines()
            .filter_map(|line| line.strip_prefix("CONFIG_")?.split_once('='))
            .collect();
        let differs = |(name, value): (&String, &Option<String>)| {
            let got = have.get(name.as_str()).copied();
            (got != value.as_deref()).then(|| {
                format!(
                    "wanted {}, got {}",
                    format_line(name, value.as_deref()),
                    format_line(name, got)
                )
            })
        };
        self.options.iter().filter_map(differs).collect()
    }
}

/// One line of a fragment: an option with its value, an option that must be off (`None`), or nothing.
fn parse_line(line: &str) -> Result<Option<(&str, Option<&str>)>> {
    let line = line.trim();
    if let Some(name) = line
        .strip_prefix("# CONFIG_")
        .and_then(|rest| rest.strip_suffix(" is not set"))
    {
        return Ok(Some((name, None)));
    }
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    match line
        .strip_prefix("CONFIG_")
        .and_then(|rest| rest.split_once('='))
    {
        Some((name, value)) if value != "m" => Ok(Some((name, Some(value)))),
        _ => bail!("not an option that is built in or off: {line}"),
    }
}

fn format_line(name: &str, value: Option<&str>) -> String {
    match value {
        Some(value) => format!("CONFIG_{name}={value}"),
        None => format!("# CONFIG_{name} is not set"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragments(text: &str) -> Fragments {
        let mut fragments = Fragments::default();
        fragments.add(text).unwrap();
        fragments
    }

    #[test]
    fn options_and_comments_merge_sorted() {
        let merged =
            fragments("# why\nCONFIG_B=y\n\n# CONFIG_A is not set\nCONFIG_C=\"x=y\"\n").merged();
        assert_eq!(
            merged,
            "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=\"x=y\"\n"
        );
    }

    #[test]
    fn option_set_twice_is_an_error() {
        let mut fragments = fragments("CONFIG_A=y\n");
        assert!(fragments.add("# CONFIG_A is not set\n").is_err());
    }

    #[test]
    fn module_or_stray_text_is_an_error() {
        for text in ["CONFIG_A=m", "CONFIG_A", "A=y"] {
            assert!(Fragments::default().add(text).is_err(), "{text}");
        }
    }

    #[test]
    fn resolved_as_asked_refuses_nothing() {
        let wanted =
            fragments("CONFIG_A=y\nCONFIG_N=64\n# CONFIG_B is not set\n# CONFIG_C is not set\n");
        assert!(
            wanted
                .refused_by("CONFIG_A=y\nCONFIG_N=64\n# CONFIG_B is not set\nCONFIG_OTHER=y\n")
                .is_empty()
        );
    }

    #[test]
    fn resolved_otherwise_names_each_option() {
        let wanted = fragments("CONFIG_A=y\nCONFIG_N=64\n# CONFIG_B is not set\n");
        let refused = wanted.refused_by("CONFIG_B=y\nCONFIG_N=8\n");
        assert_eq!(refused.len(), 3);
        assert_eq!(refused[0], "wanted CONFIG_A=y, got # CONFIG_A is not set");
        assert_eq!(refused[1], "wanted # CONFIG_B is not set, got CONFIG_B=y");
        assert_eq!(refused[2], "wanted CONFIG_N=64, got CONFIG_N=8");
    }

    #[test]
    fn shipped_fragments_parse() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernel-config");
        assert!(read_fragments(&directory).is_ok());
    }
}

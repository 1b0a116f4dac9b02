// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Reads a TOML table key by key: remembers what each key was and where that is from, and collects every mistake, so that
//! one report names them all.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use crate::annotations;

/// One thing that is wrong in a config file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigMistake {
    /// A key that no version of Coffer knows.
    Unknown {
        /// The key with its section.
        key: String,
        /// The nearest key that there is.
        nearest: Option<String>,
    },
    /// An annotation in a list of them that no version of Coffer knows.
    UnknownAnnotation {
        /// The key with its section.
        key: String,
        /// What stands there.
        annotation: String,
        /// The nearest annotation that there is.
        nearest: Option<&'static str>,
    },
    /// A value of the wrong type or out of its bounds.
    Value {
        /// The key with its section.
        key: String,
        /// What it must be.
        expected: String,
        /// What it is.
        found: String,
    },
}

impl fmt::Display for ConfigMistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown {
                key,
                nearest: Some(nearest),
            } => {
                write!(f, "unknown key {key}: did you mean {nearest}?")
            }
            Self::Unknown { key, nearest: None } => write!(f, "unknown key {key}"),
            Self::UnknownAnnotation {
                key,
                annotation,
                nearest,
            } => {
                write!(
                    f,
                    "{key} has {annotation:?}, which is no annotation of Coffer's"
                )?;
                match nearest {
                    Some(nearest) => write!(f, ": did you mean {nearest}?"),
                    None => Ok(()),
                }
            }
            Self::Value {
                key,
                expected,
                found,
            } => write!(f, "{key} must be {expected}, not {found}"),
        }
    }
}

/// Why a config file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML.
    #[error("the config is not valid TOML")]
    Toml(#[source] Box<toml::de::Error>),
    /// Valid TOML with mistakes in it: all of them.
    #[error("the config has {} mistake(s): {}", .0.len(), join(.0))]
    Mistakes(Vec<ConfigMistake>),
}

fn join(mistakes: &[ConfigMistake]) -> String {
    mistakes
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join("; ")
}

/// Where a value of the config is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigOrigin {
    /// The file does not say.
    Default,
    /// The file.
    File,
}

/// A key of the config with the value that it has.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigEntry {
    /// With its section: "guest.kernel".
    pub key: &'static str,
    /// `None` for a key that is not set and has no default.
    pub value: Option<toml::Value>,
    /// Who says so.
    pub origin: ConfigOrigin,
}

/// A config file while it is read: what is taken out is known, what is left at the end is a mistake.
#[derive(Default)]
pub(crate) struct ConfigText {
    values: BTreeMap<String, toml::Value>,
    entries: Vec<ConfigEntry>,
    mistakes: Vec<ConfigMistake>,
}

impl ConfigText {
    pub(crate) fn parse(text: &str) -> Result<Self, ConfigError> {
        let table: toml::Table = text
            .parse()
            .map_err(|error| ConfigError::Toml(Box::new(error)))?;
        let mut values = BTreeMap::new();
        for (section, value) in table {
            match value {
                toml::Value::Table(keys) => {
                    values.extend(
                        keys.into_iter()
                            .map(|(key, value)| (format!("{section}.{key}"), value)),
                    );
                }
                other => {
                    values.insert(section, other);
                }
            }
        }
        Ok(Self {
            values,
            ..Self::default()
        })
    }

    /// What the file says of `key`.
    fn take(&mut self, key: &'static str, default: Option<toml::Value>) -> Option<toml::Value> {
        let given = self.values.remove(key);
        self.entries.push(ConfigEntry {
            key,
            origin: match given {
                Some(_) => ConfigOrigin::File,
                None => ConfigOrigin::Default,
            },
            value: given.clone().or(default),
        });
        given
    }

    fn mistake<T>(
        &mut self,
        key: &str,
        expected: impl Into<String>,
        found: &toml::Value,
        default: T,
    ) -> T {
        let expected = expected.into();
        self.mistakes.push(ConfigMistake::Value {
            key: key.to_owned(),
            expected,
            found: found.to_string(),
        });
        default
    }

    /// An absolute path.
    pub(crate) fn path(&mut self, key: &'static str, default: &str) -> PathBuf {
        match self.take(key, Some(default.into())) {
            None => PathBuf::from(default),
            Some(toml::Value::String(text)) if text.starts_with('/') => PathBuf::from(text),
            Some(other) => self.mistake(key, "an absolute path", &other, PathBuf::from(default)),
        }
    }

    /// An absolute path that need not be given.
    pub(crate) fn optional_path(&mut self, key: &'static str) -> Option<PathBuf> {
        let absolute = |text: &str| text.starts_with('/').then(|| PathBuf::from(text));
        self.optional(key, "an absolute path", absolute)
    }

    /// A string that `read` understands, and that need not be given.
    pub(crate) fn optional<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Option<T> {
        let value = self.take(key, None)?;
        match value.as_str().and_then(read) {
            Some(read) => Some(read),
            None => self.mistake(key, expected, &value, None),
        }
    }

    /// A whole number within `bounds`, both included.
    pub(crate) fn number<T>(&mut self, key: &'static str, default: T, bounds: (T, T)) -> T
    where
        T: TryFrom<i64> + TryInto<i64> + PartialOrd + fmt::Display + Copy,
    {
        let shown = default.try_into().ok().map(toml::Value::Integer);
        let Some(value) = self.take(key, shown) else {
            return default;
        };
        let number = value
            .as_integer()
            .and_then(|number| T::try_from(number).ok());
        match number {
            Some(number) if number >= bounds.0 && number <= bounds.1 => number,
            _ => self.mistake(
                key,
                format!("a whole number from {} to {}", bounds.0, bounds.1),
                &value,
                default,
            ),
        }
    }

    /// A list of strings.
    pub(crate) fn strings(&mut self, key: &'static str) -> Vec<String> {
        let Some(value) = self.take(key, Some(toml::Value::Array(Vec::new()))) else {
            return Vec::new();
        };
        let strings: Option<Vec<String>> = value.as_array().and_then(|items| {
            items
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect()
        });
        match strings {
            Some(strings) => strings,
            None => self.mistake(key, "a list of strings", &value, Vec::new()),
        }
    }

    /// A list of Coffer's own annotations.
    pub(crate) fn annotations(&mut self, key: &'static str) -> BTreeSet<&'static str> {
        let mut all = BTreeSet::new();
        for annotation in self.strings(key) {
            match annotations::find(&annotation) {
                Some(known) => {
                    all.insert(known.key);
                }
                None => self.mistakes.push(ConfigMistake::UnknownAnnotation {
                    key: key.to_owned(),
                    nearest: annotations::nearest(&annotation),
                    annotation,
                }),
            }
        }
        all
    }

    /// One of `choices`.
    pub(crate) fn choice<T: Copy + PartialEq>(
        &mut self,
        key: &'static str,
        choices: &[(&str, T)],
        default: T,
    ) -> T {
        let name = choices.iter().find(|(_, choice)| *choice == default);
        let Some(value) = self.take(key, name.map(|(name, _)| (*name).into())) else {
            return default;
        };
        match choices
            .iter()
            .find(|(name, _)| value.as_str() == Some(name))
        {
            Some((_, choice)) => *choice,
            None => {
                let names: Vec<String> = choices
                    .iter()
                    .map(|(name, _)| format!("{name:?}"))
                    .collect();
                self.mistake(key, format!("one of {}", names.join(", ")), &value, default)
            }
        }
    }

    /// Every key with its value, in the order of the documentation; or all mistakes at once.
    pub(crate) fn finish(mut self) -> Result<Vec<ConfigEntry>, ConfigError> {
        for key in std::mem::take(&mut self.values).into_keys() {
            let known = self.entries.iter().map(|entry| entry.key);
            let nearest = nearest(&key, known).map(str::to_owned);
            self.mistakes.push(ConfigMistake::Unknown { key, nearest });
        }
        if self.mistakes.is_empty() {
            Ok(self.entries)
        } else {
            Err(ConfigError::Mistakes(self.mistakes))
        }
    }
}

/// The one of `known` that `key` was most likely meant to be, if any is near.
pub(crate) fn nearest<'a>(key: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|known| (strsim::damerau_levenshtein(known, key), known))
        .filter(|(distance, known)| *distance <= known.len() / 2)
        .min()
        .map(|(_, known)| known)
}

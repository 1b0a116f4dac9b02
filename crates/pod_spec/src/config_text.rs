// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Reads a TOML table key by key and collects every mistake, so that one report names them all.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

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

/// A config file while it is read: what is taken out is known, what is left at the end is a mistake.
pub(crate) struct ConfigText {
    values: BTreeMap<String, toml::Value>,
    known: Vec<String>,
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
            known: Vec::new(),
            mistakes: Vec::new(),
        })
    }

    /// A file without a key.
    pub(crate) fn empty() -> Self {
        Self {
            values: BTreeMap::new(),
            known: Vec::new(),
            mistakes: Vec::new(),
        }
    }

    /// The keys that were asked for.
    #[cfg(test)]
    pub(crate) fn known(&self) -> &[String] {
        &self.known
    }

    fn take(&mut self, key: &str) -> Option<toml::Value> {
        self.known.push(key.to_owned());
        self.values.remove(key)
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
    pub(crate) fn path(&mut self, key: &str, default: &str) -> PathBuf {
        match self.take(key) {
            None => PathBuf::from(default),
            Some(toml::Value::String(text)) if text.starts_with('/') => PathBuf::from(text),
            Some(other) => self.mistake(key, "an absolute path", &other, PathBuf::from(default)),
        }
    }

    /// An absolute path that need not be given.
    pub(crate) fn optional_path(&mut self, key: &str) -> Option<PathBuf> {
        match self.take(key)? {
            toml::Value::String(text) if text.starts_with('/') => Some(PathBuf::from(text)),
            other => self.mistake(key, "an absolute path", &other, None),
        }
    }

    /// A whole number within `bounds`, both included.
    pub(crate) fn number<T>(&mut self, key: &str, default: T, bounds: (T, T)) -> T
    where
        T: TryFrom<i64> + PartialOrd + fmt::Display + Copy,
    {
        let Some(value) = self.take(key) else {
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
    pub(crate) fn strings(&mut self, key: &str) -> Vec<String> {
        let Some(value) = self.take(key) else {
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

    /// One of `choices`; the first one is the default.
    pub(crate) fn choice<T: Copy>(&mut self, key: &str, choices: &[(&str, T)], default: T) -> T {
        let Some(value) = self.take(key) else {
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

    /// All mistakes at once, or nothing.
    pub(crate) fn finish(mut self) -> Result<(), ConfigError> {
        for key in std::mem::take(&mut self.values).into_keys() {
            let nearest = self
                .known
                .iter()
                .map(|known| (strsim::damerau_levenshtein(known, &key), known))
                .filter(|(distance, known)| *distance <= known.len() / 2)
                .min()
                .map(|(_, known)| known.clone());
            self.mistakes.push(ConfigMistake::Unknown { key, nearest });
        }
        if self.mistakes.is_empty() {
            Ok(())
        } else {
            Err(ConfigError::Mistakes(self.mistakes))
        }
    }
}

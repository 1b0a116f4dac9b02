// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `config`: the node's config as it is in effect.

use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use pod_spec::{ConfigEntry, ConfigOrigin, RuntimeConfig};
use serde::Serialize;
use serde_json::Value;

/// The config and where it was read.
#[derive(Debug, Serialize)]
pub(crate) struct Config {
    /// `None`: there is none, every value is the default.
    file: Option<String>,
    #[serde(serialize_with = "keys")]
    keys: Vec<ConfigEntry>,
}

#[derive(Serialize)]
struct Key {
    key: &'static str,
    value: Value,
    from: &'static str,
}

fn keys<S: serde::Serializer>(entries: &[ConfigEntry], serializer: S) -> Result<S::Ok, S::Error> {
    let shown = entries.iter().map(|entry| {
        let value = serde_json::to_value(&entry.value).map_err(serde::ser::Error::custom)?;
        let from = match entry.origin {
            ConfigOrigin::Default => "default",
            ConfigOrigin::File => "file",
        };
        let key = entry.key;
        Ok(Key { key, value, from })
    });
    shown.collect::<Result<Vec<_>, _>>()?.serialize(serializer)
}

/// The config of `file`, which need not exist if it is the usual one; the defaults without one.
pub(crate) fn effective(file: Option<&Path>) -> Result<Config> {
    let (text, file) = match file {
        None => (String::new(), None),
        Some(file) => match fs::read_to_string(file) {
            Ok(text) => (text, Some(file.display().to_string())),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    && file == Path::new(RuntimeConfig::DEFAULT_PATH) =>
            {
                (String::new(), None)
            }
            Err(error) => {
                return Err(error).with_context(|| format!("read {}", file.display()));
            }
        },
    };
    let keys = RuntimeConfig::entries(&text).with_context(|| file.clone().unwrap_or_default())?;
    Ok(Config { file, keys })
}

impl Config {
    /// As a config file.
    pub(crate) fn table(&self) -> String {
        pod_spec::print_config(&self.keys, self.file.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_file_and_defaults_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        fs::write(&path, "[guest]\ndefault_vcpus = 2").unwrap();
        let config = effective(Some(&path)).unwrap();
        let json = serde_json::to_value(&config).unwrap();
        let key = |name: &str| {
            let keys = json["keys"].as_array().unwrap();
            keys.iter().find(|key| key["key"] == name).unwrap().clone()
        };
        assert_eq!(json["file"], path.display().to_string());
        assert_eq!(
            key("guest.default_vcpus"),
            serde_json::json!({ "key": "guest.default_vcpus", "value": 2, "from": "file" })
        );
        assert_eq!(key("debug.rootfs")["value"], Value::Null);
        assert_eq!(key("log.level")["from"], "default");
        assert!(config.table().contains("default_vcpus = 2 # "));
        assert_eq!(effective(None).unwrap().file, None);
    }

    #[test]
    fn file_with_mistakes_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        assert!(effective(Some(&path)).is_err(), "named, and not there");
        fs::write(&path, "[guest]\nvcpus = 2").unwrap();
        let error = format!("{:#}", effective(Some(&path)).unwrap_err());
        assert!(
            error.contains("c.toml") && error.contains("unknown key guest.vcpus"),
            "{error}"
        );
    }
}

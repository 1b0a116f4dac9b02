// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The config in effect as a config file: every key, its value, and where that is from. Pure.

use crate::config_text::{ConfigEntry, ConfigOrigin};

/// The entries as TOML, which can be a config file in turn; `file` is what they were read from, `None` if there is none.
pub fn print_config(entries: &[ConfigEntry], file: Option<&str>) -> String {
    let mut text = match file {
        Some(file) => format!("# {file}, and the defaults of what it leaves out\n"),
        None => "# no config file: the defaults\n".to_owned(),
    };
    let mut section = "";
    for entry in entries {
        let (of, name) = entry.key.split_once('.').unwrap_or(("", entry.key));
        if of != section {
            section = of;
            text.push_str(&format!("\n[{section}]\n"));
        }
        let line = match (&entry.value, entry.origin) {
            (None, _) => format!("# {name} is not set\n"),
            (Some(value), ConfigOrigin::Default) => format!("{name} = {value} # default\n"),
            (Some(value), ConfigOrigin::File) => {
                format!("{name} = {value} # {}\n", file.unwrap_or("file"))
            }
        };
        text.push_str(&line);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RuntimeConfig;

    const FILE: &str = "[guest]\ndefault_vcpus = 2\nkernel_arguments = [\"a=\\\"b\\\"\", \"#c\"]\n\
                        [annotations]\nallow = [\"io.coffer.vm.vcpus\"]\n";

    #[test]
    fn what_is_printed_is_a_config_file_with_the_same_values() {
        for text in ["", FILE] {
            let printed = print_config(&RuntimeConfig::entries(text).unwrap(), Some("/c.toml"));
            let again = RuntimeConfig::parse(&printed).unwrap();
            assert_eq!(again, RuntimeConfig::parse(text).unwrap(), "{printed}");
        }
    }

    #[test]
    fn each_value_says_where_it_is_from() {
        let printed = print_config(&RuntimeConfig::entries(FILE).unwrap(), Some("/c.toml"));
        assert!(
            printed.starts_with(
                "# /c.toml, and the defaults of what it leaves out\n\n[guest]\nkernel = \"/opt/"
            ),
            "{printed}"
        );
        for line in [
            "default_vcpus = 2 # /c.toml\n",
            "max_vcpus = 64 # default\n",
            "level = \"info\" # default\n",
            "# rootfs is not set\n",
        ] {
            assert!(printed.contains(line), "{line}{printed}");
        }
        assert!(
            print_config(&RuntimeConfig::entries("").unwrap(), None)
                .starts_with("# no config file: the defaults\n")
        );
    }
}

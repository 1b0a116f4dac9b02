// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The command line: containerd's flags in Go's style, and one verb.
//!
//! Go's flag package takes `-flag value`, `-flag=value` and both with two dashes; a bool is on unless `=false` follows.
//! Flags stop at the first word that is none: the verb, after which nothing may follow. Pure.

use std::path::PathBuf;

use ids::{ContainerId, InvalidId, Namespace};

/// What the program was called for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Invocation {
    /// `-v`: name the version.
    Version,
    /// `-info`: describe the runtime.
    Info,
    /// `-print-config`: print the node's config as it is in effect, from this file or from the usual one.
    PrintConfig(Option<PathBuf>),
    /// `start`: find or make the shim that serves a container.
    Start(ShimArgs),
    /// `delete`: remove what a container has left on the host.
    Delete(ShimArgs),
    /// `serve`: be the shim. Only `start` calls this.
    Serve(ShimArgs),
}

/// The flags that go with a verb.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShimArgs {
    /// `-namespace`: containerd's namespace.
    pub(crate) namespace: Namespace,
    /// `-id`: the container, which is a sandbox if it leads its group.
    pub(crate) id: ContainerId,
    /// `-address`: containerd's gRPC socket. Empty if not given.
    pub(crate) address: String,
    /// `-bundle`: the container's bundle; the current directory if not given.
    pub(crate) bundle: Option<PathBuf>,
    /// `-config`: the node's config file; its usual place if not given. `start` passes it on to `serve`.
    pub(crate) config: Option<PathBuf>,
    /// `-debug`: write debug lines.
    pub(crate) debug: bool,
}

/// Why a command line was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ArgsError {
    /// Nothing to do.
    #[error(
        "no command: containerd calls this program with start, delete, -info or -v, an operator with -print-config"
    )]
    NoVerb,
    /// A word that is no command.
    #[error("unknown command {0:?}: start, delete, -info, -v and -print-config are known")]
    UnknownVerb(String),
    /// A flag that containerd does not have.
    #[error(
        "unknown flag {0:?}: -namespace, -id, -address, -publish-binary, -bundle, -debug, -info, -v, -print-config and \
         -config are known"
    )]
    UnknownFlag(String),
    /// A flag that needs a value stands last.
    #[error("flag -{0} needs a value")]
    NoValue(String),
    /// A bool flag with a value that is none.
    #[error("flag -{name} is on or off, not {value:?}")]
    NoBool {
        /// The flag.
        name: String,
        /// What it was set to.
        value: String,
    },
    /// More words after the verb.
    #[error("{0:?} follows the command: flags come before it")]
    Trailing(String),
    /// A flag that the verb needs is missing.
    #[error("flag -{0} is required")]
    Missing(&'static str),
    /// An id that containerd would not give.
    #[error("flag -{flag}")]
    Id {
        /// The flag.
        flag: &'static str,
        /// Why it is none.
        source: InvalidId,
    },
}

#[derive(Default)]
struct Flags {
    namespace: Option<String>,
    id: Option<String>,
    address: Option<String>,
    bundle: Option<String>,
    config: Option<String>,
    debug: bool,
    info: bool,
    version: bool,
    print_config: bool,
}

/// What a command line, without the program's name, asks for.
///
/// # Errors
/// Every [`ArgsError`]; the program then ends with exit code 2.
pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Invocation, ArgsError> {
    let mut words = words.into_iter();
    let mut flags = Flags::default();
    let verb = loop {
        let Some(word) = words.next() else { break None };
        let Some(flag) = word.strip_prefix('-') else {
            break Some(word);
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        flags.set(name, value, &word, &mut words)?;
    };
    if let Some(word) = words.next() {
        return Err(ArgsError::Trailing(word));
    }
    if flags.version {
        return Ok(Invocation::Version);
    }
    if flags.info {
        return Ok(Invocation::Info);
    }
    if flags.print_config {
        return Ok(Invocation::PrintConfig(flags.config.map(PathBuf::from)));
    }
    match verb.as_deref() {
        Some("start") => flags.finish().map(Invocation::Start),
        Some("delete") => flags.finish().map(Invocation::Delete),
        Some("serve") => flags.finish().map(Invocation::Serve),
        Some(other) => Err(ArgsError::UnknownVerb(other.to_owned())),
        None => Err(ArgsError::NoVerb),
    }
}

impl Flags {
    fn set(
        &mut self,
        name: &str,
        value: Option<String>,
        word: &str,
        rest: &mut impl Iterator<Item = String>,
    ) -> Result<(), ArgsError> {
        let text = match name {
            "namespace" => &mut self.namespace,
            "id" => &mut self.id,
            "address" => &mut self.address,
            "bundle" => &mut self.bundle,
            "config" => &mut self.config,
            // The program that published events before ttrpc did: nothing calls it any more.
            "publish-binary" => &mut None,
            "debug" => return switch(&mut self.debug, name, value),
            "info" => return switch(&mut self.info, name, value),
            "print-config" => return switch(&mut self.print_config, name, value),
            "v" | "version" => return switch(&mut self.version, name, value),
            _ => return Err(ArgsError::UnknownFlag(word.to_owned())),
        };
        let value = value.or_else(|| rest.next());
        *text = Some(value.ok_or_else(|| ArgsError::NoValue(name.to_owned()))?);
        Ok(())
    }

    fn finish(self) -> Result<ShimArgs, ArgsError> {
        let namespace = self.namespace.ok_or(ArgsError::Missing("namespace"))?;
        let id = self.id.ok_or(ArgsError::Missing("id"))?;
        let invalid = |flag| move |source| ArgsError::Id { flag, source };
        Ok(ShimArgs {
            namespace: namespace.parse().map_err(invalid("namespace"))?,
            id: id.parse().map_err(invalid("id"))?,
            address: self.address.unwrap_or_default(),
            bundle: self.bundle.map(PathBuf::from),
            config: self.config.map(PathBuf::from),
            debug: self.debug,
        })
    }
}

/// Go's `strconv.ParseBool`, as far as anybody writes it.
fn switch(flag: &mut bool, name: &str, value: Option<String>) -> Result<(), ArgsError> {
    *flag = match value.as_deref() {
        None | Some("true" | "1") => true,
        Some("false" | "0") => false,
        Some(other) => {
            return Err(ArgsError::NoBool {
                name: name.to_owned(),
                value: other.to_owned(),
            });
        }
    };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Result<Invocation, ArgsError> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    fn args(debug: bool, bundle: Option<&str>) -> ShimArgs {
        ShimArgs {
            namespace: "k8s.io".parse().unwrap(),
            id: "abc".parse().unwrap(),
            address: "/run/containerd/containerd.sock".to_owned(),
            bundle: bundle.map(PathBuf::from),
            config: None,
            debug,
        }
    }

    #[test]
    fn containerds_own_command_lines_are_taken() {
        let start = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd \
                     -id abc";
        assert_eq!(
            words(&format!("{start} start")).unwrap(),
            Invocation::Start(args(false, None))
        );
        assert_eq!(
            words(&format!("{start} -debug start")).unwrap(),
            Invocation::Start(args(true, None))
        );
        assert_eq!(
            words(&format!("{start} -bundle /b delete")).unwrap(),
            Invocation::Delete(args(false, Some("/b")))
        );
        assert_eq!(words("-v").unwrap(), Invocation::Version);
        assert_eq!(words("-info").unwrap(), Invocation::Info);
    }

    #[test]
    fn operators_print_the_config_of_a_file() {
        assert_eq!(
            words("--print-config").unwrap(),
            Invocation::PrintConfig(None)
        );
        assert_eq!(
            words("-print-config -config /c.toml").unwrap(),
            Invocation::PrintConfig(Some("/c.toml".into()))
        );
    }

    #[test]
    fn every_go_form_of_a_flag_is_taken() {
        let expected = Invocation::Start(args(true, Some("/b")));
        let address = "/run/containerd/containerd.sock";
        for line in [
            format!("-namespace=k8s.io -id=abc -address={address} -bundle=/b -debug=true start"),
            format!(
                "--namespace k8s.io --id abc --address {address} --bundle /b --debug serve start"
            )
            .replace(" serve", ""),
            format!("--namespace=k8s.io --id=abc --address={address} --bundle=/b --debug=1 start"),
        ] {
            assert_eq!(words(&line).unwrap(), expected, "{line}");
        }
        assert_eq!(
            words(&format!(
                "-debug=false -namespace k8s.io -id abc -address {address} start"
            ))
            .unwrap(),
            Invocation::Start(args(false, None))
        );
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            (
                "",
                "no command: containerd calls this program with start, delete, -info or -v, an operator with \
                 -print-config",
            ),
            (
                "-id a -namespace n stop",
                "unknown command \"stop\": start, delete, -info, -v and -print-config are known",
            ),
            (
                "-socket x start",
                "unknown flag \"-socket\": -namespace, -id, -address, -publish-binary, -bundle, -debug, -info, -v, \
                 -print-config and -config are known",
            ),
            ("-namespace n -id", "flag -id needs a value"),
            (
                "-debug=maybe start",
                "flag -debug is on or off, not \"maybe\"",
            ),
            ("-id a start", "flag -namespace is required"),
            ("-namespace n start", "flag -id is required"),
            (
                "-namespace n -id a start -debug",
                "\"-debug\" follows the command: flags come before it",
            ),
            ("-namespace n -id ../a start", "flag -id"),
        ];
        for (line, expected) in cases {
            assert_eq!(words(line).unwrap_err().to_string(), expected, "{line}");
        }
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Whose pid namespace a container is in.

use std::path::Path;

use agent_proto::layout;
use oci_spec::runtime::Spec;

use crate::Error;

/// A container's pid namespace. `P` names another container's init: its pid in a request, its pidfd once it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PidNamespace<P> {
    /// As the spec says: a new one, or none where there is no path.
    Own,
    /// The one that the pod's containers share.
    Pod,
    /// Another container's.
    Of(P),
}

impl PidNamespace<u32> {
    /// By the path in the spec, see [`layout::POD_PID_NAMESPACE`] and [`layout::pid_namespace_of`].
    ///
    /// # Errors
    /// [`Error::BadRequest`] for another path.
    pub fn parse(spec: &Spec) -> Result<Self, Error> {
        let Some(path) = oci_process::shared_pid_namespace(spec) else {
            return Ok(Self::Own);
        };
        if path == Path::new(layout::POD_PID_NAMESPACE) {
            return Ok(Self::Pod);
        }
        path.to_str()
            .and_then(|path| path.strip_prefix("/proc/")?.strip_suffix("/ns/pid"))
            .and_then(|pid| pid.parse().ok())
            .map(Self::Of)
            .ok_or_else(|| {
                let problem = format!("{} is no pid namespace of the pod", path.display());
                Error::bad("linux.namespaces[pid].path", problem)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(path: &str) -> Result<PidNamespace<u32>, Error> {
        let json = format!(
            r#"{{"ociVersion":"1.1.0","linux":{{"namespaces":[{{"type":"pid"{path}}}]}}}}"#
        );
        PidNamespace::parse(&serde_json::from_str(&json).unwrap())
    }

    fn with(path: &str) -> Result<PidNamespace<u32>, Error> {
        parse(&format!(r#","path":"{path}""#))
    }

    #[test]
    fn path_says_whose_the_namespace_is() {
        assert_eq!(parse("").unwrap(), PidNamespace::Own);
        assert_eq!(with("").unwrap(), PidNamespace::Own);
        let pods = with(layout::POD_PID_NAMESPACE).unwrap();
        assert_eq!(pods, PidNamespace::Pod);
        let containers = with(&layout::pid_namespace_of(43)).unwrap();
        assert_eq!(containers, PidNamespace::Of(43));
    }

    #[test]
    fn any_other_path_is_refused() {
        for path in [
            "/proc/self/ns/pid",
            "/proc/1/ns/net",
            "/proc/-1/ns/pid",
            "x",
        ] {
            let error = with(path).unwrap_err().to_string();
            assert!(error.contains(path), "{error}");
        }
    }
}

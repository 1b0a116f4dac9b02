// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What `-v` and `-info` say.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

/// The runtime's name in containerd's config.
pub(crate) const RUNTIME: &str = "io.containerd.coffer.v2";

/// The program's name, which containerd derives from [`RUNTIME`].
pub(crate) const PROGRAM: &str = "containerd-shim-coffer-v2";

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The type of the OCI runtime's features (runtime-spec, features.md), encoded as JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The answer to `-v`.
pub(crate) fn version() -> String {
    format!("{PROGRAM}:\n  Version: {VERSION}\n")
}

/// The options of mounts that are known (features.md, `mountOptions`): those of runc's that the guest's kernel is told. "rro"
/// among them has containerd say that recursive read-only mounts can be had. Without those that are refused or are not for
/// a guest's mounts: propagation to the host, and the file systems' own, which are passed on unread.
const MOUNT_OPTIONS: &str = "\
    atime bind defaults dev diratime exec noatime nodev nodiratime noexec norelatime nostrictatime nosuid nosymfollow \
    private ratime rbind rdev rdiratime relatime rexec rnoatime rnodev rnodiratime rnoexec rnorelatime rnostrictatime \
    rnosuid rnosymfollow ro rprivate rrelatime rro rrw rslave rstrictatime rsuid rsymfollow runbindable rw slave \
    strictatime suid symfollow unbindable";

/// The answer to `-info`. User namespaces are not claimed, so that kubelet does not send pods that need them.
pub(crate) fn runtime_info() -> Result<Vec<u8>, protobuf::Error> {
    let features = serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": MOUNT_OPTIONS.split(' ').collect::<Vec<_>>(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
        },
    });
    let mut info = RuntimeInfo::new();
    info.name = RUNTIME.to_owned();
    let mut version = RuntimeVersion::new();
    version.version = VERSION.to_owned();
    info.version = MessageField::some(version);
    let mut any = Any::new();
    any.type_url = FEATURES_TYPE.to_owned();
    any.value = features.to_string().into_bytes();
    info.features = MessageField::some(any);
    info.write_to_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_json_of_the_type_that_cri_reads() {
        let info = RuntimeInfo::parse_from_bytes(&runtime_info().unwrap()).unwrap();
        assert_eq!(
            (info.name.as_str(), info.version.version.as_str()),
            (RUNTIME, VERSION)
        );
        assert_eq!(info.features.type_url, FEATURES_TYPE);
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
        let options = features["mountOptions"].as_array().unwrap();
        for option in ["ro", "rro", "rbind", "rslave"] {
            assert!(options.iter().any(|known| known == option), "{option}");
        }
        for refused in ["shared", "rshared"] {
            assert!(!options.iter().any(|known| known == refused), "{refused}");
        }
        let namespaces = features["linux"]["namespaces"].as_array().unwrap();
        assert!(!namespaces.iter().any(|known| known == "user"));
    }
}

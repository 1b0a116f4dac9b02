// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The spec of a debugging shell: a container that is set apart by its files alone.
//!
//! It has every capability and the guest's own processes, network, names and IPC. The files of the guest are at
//! `/proc/1/root`, those of a container at `/proc/PID/root`: nothing is mounted for the shell that would keep a disk of
//! another container in use. It is the operator's, never a tenant's: no bundle becomes one.

use serde_json::json;

/// Every capability that Linux 6.12 has (linux/capability.h).
const CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The OCI runtime spec, for the guest, of a debugging shell that runs `args`. `term` is the variable `TERM`; empty for
/// none.
pub fn shell_spec(args: &[String], terminal: bool, term: &str) -> Vec<u8> {
    let mut env = vec![
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        "HOME=/".to_owned(),
    ];
    if !term.is_empty() {
        env.push(format!("TERM={term}"));
    }
    let spec = json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": terminal,
            "user": { "uid": 0, "gid": 0 },
            "args": args,
            "env": env,
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind"] },
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
            },
        ],
        "linux": {
            "namespaces": [{ "type": "mount" }],
            "resources": { "devices": [{ "allow": true, "access": "rwm" }] },
        },
    });
    spec.to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxNamespaceType, Spec};

    use super::*;

    #[test]
    fn shell_shares_everything_but_its_files() {
        let args = ["sh".to_owned(), "-l".to_owned()];
        let spec: Spec = serde_json::from_slice(&shell_spec(&args, true, "xterm")).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.terminal(), Some(true));
        assert_eq!(process.args().as_ref().unwrap(), &args);
        assert!(
            process
                .env()
                .iter()
                .flatten()
                .any(|variable| variable == "TERM=xterm")
        );
        let namespaces = spec.linux().as_ref().unwrap().namespaces();
        let kinds = namespaces.iter().flatten();
        let kinds: Vec<_> = kinds.map(|namespace| namespace.typ()).collect();
        assert_eq!(kinds, [LinuxNamespaceType::Mount]);
        let plain: Spec = serde_json::from_slice(&shell_spec(&args, false, "")).unwrap();
        let env = plain.process().as_ref().unwrap().env().clone().unwrap();
        assert!(!env.iter().any(|variable| variable.starts_with("TERM")));
    }
}

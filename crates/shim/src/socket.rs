// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The socket on which a shim serves: where it is, and who gets to listen on it.
//!
//! Its name follows from containerd's address, the namespace and the sandbox, so that every `start` of a pod's containers
//! finds the one shim.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use ids::{Namespace, SandboxId};
use sha2::{Digest, Sha256};

/// The longest path of a socket, in bytes: `sun_path` holds 108 with the final zero, and containerd's Go client takes one
/// less.
pub(crate) const MAX_SOCKET_PATH: usize = 106;

/// Where the socket of a sandbox's shim is: `<dir>/<sha256 of "address/namespace/sandbox">`.
pub(crate) fn socket_path(
    dir: &Path,
    address: &str,
    namespace: &Namespace,
    sandbox: &SandboxId,
) -> PathBuf {
    let digest = Sha256::digest(format!("{address}/{namespace}/{sandbox}"));
    let name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    dir.join(name)
}

/// The address that containerd dials.
pub(crate) fn socket_address(path: &Path) -> String {
    format!("unix://{}", path.display())
}

/// Listens at `path`; a socket that a dead shim has left is replaced.
///
/// # Errors
/// Those of the file system, and [`io::ErrorKind::InvalidInput`] for a path that is too long.
pub(crate) fn listen(path: &Path) -> io::Result<UnixListener> {
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        let message = format!(
            "{} is longer than a socket's path can be ({MAX_SOCKET_PATH} bytes)",
            path.display()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let dir = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    remove_socket(path)?;
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whether somebody listens at `path`.
///
/// # Errors
/// Those of connecting, other than that nobody listens.
pub(crate) fn is_served(path: &Path) -> io::Result<bool> {
    match UnixStream::connect(path) {
        Ok(_) => Ok(true),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Removes a socket; that there is none is not an error.
///
/// # Errors
/// Those of the file system.
pub(crate) fn remove_socket(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_is_the_digest_that_containerds_own_shims_use() {
        let path = socket_path(
            Path::new("/run/containerd/s"),
            "/run/containerd/containerd.sock",
            &"k8s.io".parse().unwrap(),
            &"abc".parse().unwrap(),
        );
        // printf /run/containerd/containerd.sock/k8s.io/abc | sha256sum
        assert_eq!(
            path.to_str().unwrap(),
            "/run/containerd/s/a99a1752d3a0fadfb1f869026f16760475df03a572e20f4ccea9e6c1e5470b72"
        );
        assert!(path.as_os_str().len() <= MAX_SOCKET_PATH);
    }

    #[test]
    fn socket_of_a_dead_shim_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s/one");
        assert!(!is_served(&path).unwrap());
        let listener = listen(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&dir.path().join("s"))), (0o600, 0o700));
        assert!(is_served(&path).unwrap());
        drop(listener);
        assert!(!is_served(&path).unwrap());
        let _second = listen(&path).unwrap();
        assert!(is_served(&path).unwrap());
    }

    #[test]
    fn path_one_byte_past_the_cap_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fill = MAX_SOCKET_PATH - dir.path().as_os_str().len() - 1;
        assert!(listen(&dir.path().join("x".repeat(fill))).is_ok());
        let error = listen(&dir.path().join("x".repeat(fill + 1))).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

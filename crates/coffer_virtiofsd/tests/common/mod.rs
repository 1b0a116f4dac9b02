// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Starts file servers for tests.
#![expect(clippy::unwrap_used, reason = "test support that panics on misuse")]

use std::fs::File;
use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use file_server::{Access, FileServer, Propagation, Share, ShareName};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_coffer-virtiofsd");

/// A generous end of every wait.
const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) async fn bounded<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap()
}

pub(crate) fn share(name: &str, path: &Path, access: Access) -> Share {
    Share {
        name: ShareName::new(name).unwrap(),
        source: OwnedFd::from(
            File::options()
                .read(true)
                .custom_flags(libc::O_PATH)
                .open(path)
                .unwrap(),
        ),
        access,
        propagation: Propagation::Private,
    }
}

pub(crate) async fn spawn(shares: &[Share]) -> (FileServer, UnixStream) {
    bounded(FileServer::spawn(Path::new(PROGRAM), shares))
        .await
        .unwrap()
}

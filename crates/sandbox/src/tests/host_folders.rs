// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The host's own directories where no file server can be started. What one does is tested beside it and end to end.

use driver_fake::Script;
use pod_spec::{FolderAccess, FolderPropagation, HostFolder};

use super::pod::{FILE_SERVER, Known, Pod};
use crate::SandboxErrorKind;

#[tokio::test]
async fn container_without_its_file_server_is_refused_and_its_pod_goes_on() {
    let pod = Pod::new(&Script::new());
    let folder = HostFolder {
        name: "rw-1".to_owned(),
        source: pod.dir.path().to_owned(),
        access: FolderAccess::ReadWrite,
        propagation: FolderPropagation::Private,
        writable: Vec::new(),
    };
    for _ in 0..2 {
        let known = Known::Sharer(vec![folder.clone()]);
        let error = pod.create_as("data", known).await.unwrap_err();
        assert_eq!(error.kind(), SandboxErrorKind::FailedPrecondition);
        let report = error.report();
        assert!(
            report.contains(FILE_SERVER) && report.contains("file_server.path"),
            "{report}"
        );
    }
    assert!(pod.vm().disks().is_empty(), "nothing of it is left");
    pod.create("web", &["sleep"]).await.unwrap();
    pod.clean_up(&["web"]).await;
}

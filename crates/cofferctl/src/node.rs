// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The sandboxes of this node, from the directories that their shims keep.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use shim_api::{ProcessRecord, REMOVED, SHIM_FILE, SOCKET_FILE, VMM_FILE};

/// A sandbox that has a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sandbox {
    pub(crate) namespace: String,
    pub(crate) id: String,
    dir: PathBuf,
}

impl Sandbox {
    /// Where its shim listens, once that is recorded.
    pub(crate) fn socket(&self) -> io::Result<String> {
        fs::read_to_string(self.dir.join(SOCKET_FILE))
    }

    /// The process of its shim, once that is recorded.
    pub(crate) fn shim_pid(&self) -> Option<i32> {
        self.pid(SHIM_FILE)
    }

    /// The process of its VMM, once there is one.
    pub(crate) fn vmm_pid(&self) -> Option<i32> {
        self.pid(VMM_FILE)
    }

    fn pid(&self, file: &str) -> Option<i32> {
        let bytes = fs::read(self.dir.join(file)).ok()?;
        let record: ProcessRecord = serde_json::from_slice(&bytes).ok()?;
        Some(record.pid)
    }

    /// For how long it has been there.
    pub(crate) fn age(&self) -> Option<Duration> {
        let recorded = fs::metadata(self.dir.join(SOCKET_FILE)).ok()?;
        recorded.modified().ok()?.elapsed().ok()
    }
}

/// The sandboxes of every namespace, or of one, in the order of their names.
pub(crate) fn sandboxes(root: &Path, namespace: Option<&str>) -> Result<Vec<Sandbox>> {
    let mut found = Vec::new();
    for of in directories(root)? {
        if namespace.is_some_and(|wanted| wanted != of) {
            continue;
        }
        for id in directories(&root.join(&of))? {
            let dir = root.join(&of).join(&id);
            if !id.contains(REMOVED) {
                found.push(Sandbox {
                    namespace: of.clone(),
                    id,
                    dir,
                });
            }
        }
    }
    Ok(found)
}

/// The sandbox with this id, or the only one whose id begins so.
pub(crate) fn find(root: &Path, namespace: Option<&str>, id: &str) -> Result<Sandbox> {
    let all = sandboxes(root, namespace)?;
    let mut exact = all.iter().filter(|sandbox| sandbox.id == id).peekable();
    let candidates: Vec<&Sandbox> = if exact.peek().is_some() {
        exact.collect()
    } else {
        all.iter()
            .filter(|sandbox| !id.is_empty() && sandbox.id.starts_with(id))
            .collect()
    };
    match candidates.as_slice() {
        [one] => Ok((*one).clone()),
        [] => bail!("no sandbox {id:?} is on this node: `cofferctl list` shows those that are"),
        many => {
            let names: Vec<String> = many
                .iter()
                .map(|sandbox| format!("{}/{}", sandbox.namespace, sandbox.id))
                .collect();
            bail!(
                "{id:?} could be {}: give more of the id, or --namespace",
                names.join(" or ")
            )
        }
    }
}

/// The names of the directories in `dir`. A directory that is not there has none: nothing runs, or it has just gone.
fn directories(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(error).context(format!("read {}: be root", dir.display()));
        }
        Err(error) => return Err(error).context(format!("read {}", dir.display())),
    };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(sandboxes: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for sandbox in sandboxes {
            fs::create_dir_all(root.path().join(sandbox)).unwrap();
        }
        root
    }

    fn found(root: &tempfile::TempDir, namespace: Option<&str>, id: &str) -> String {
        match find(root.path(), namespace, id) {
            Ok(sandbox) => format!("{}/{}", sandbox.namespace, sandbox.id),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn sandbox_is_found_by_the_beginning_of_its_id() {
        let root = root(&[
            "k8s.io/abc1",
            "k8s.io/abd2",
            "default/abc",
            "k8s.io/x..removed",
        ]);
        assert_eq!(found(&root, None, "abd"), "k8s.io/abd2");
        assert_eq!(
            found(&root, None, "abc"),
            "default/abc",
            "the whole id wins"
        );
        assert_eq!(found(&root, Some("k8s.io"), "abc"), "k8s.io/abc1");
        assert_eq!(
            found(&root, None, "ab"),
            "\"ab\" could be default/abc or k8s.io/abc1 or k8s.io/abd2: give more of the id, or --namespace"
        );
        for id in ["x", "", "zz"] {
            let message = found(&root, None, id);
            assert!(
                message.starts_with(&format!("no sandbox {id:?}")),
                "{message}"
            );
        }
    }

    #[test]
    fn node_without_sandboxes_has_none() {
        let root = root(&[]);
        assert_eq!(sandboxes(&root.path().join("no"), None).unwrap(), []);
        assert_eq!(sandboxes(root.path(), None).unwrap(), []);
    }

    #[test]
    fn processes_are_those_that_were_recorded() {
        let root = root(&["default/a"]);
        let dir = root.path().join("default/a");
        fs::write(dir.join("socket"), "/run/s/1").unwrap();
        fs::write(dir.join("shim.json"), r#"{"pid":7,"start_time":9}"#).unwrap();
        let sandbox = find(root.path(), None, "a").unwrap();
        assert_eq!((sandbox.shim_pid(), sandbox.vmm_pid()), (Some(7), None));
        assert_eq!(sandbox.socket().unwrap(), "/run/s/1");
        assert!(sandbox.age().is_some());
    }
}

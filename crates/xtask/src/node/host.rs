// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A job on this machine, in namespaces of its own, for a machine whose KVM can run guests (`ci/node/host`).

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use super::{Job, Running, Work, child};
use crate::workspace;

/// Folders that only this job uses; removed when it is over.
pub(crate) struct Folders {
    work: TempDir,
    data: TempDir,
}

/// Starts the job. It, and whatever it started, dies with the calling thread.
pub(crate) fn start(job: &Job) -> Result<(Running, Folders)> {
    if matches!(job.work, Work::Terminal) {
        bail!(
            "this machine has a usable KVM: a shell here needs no node; or give a command after --"
        );
    }
    let cache = workspace::cache();
    std::fs::create_dir_all(&cache)
        .with_context(|| format!("cannot create {}", cache.display()))?;
    let work = tempfile::tempdir().context("cannot create a temporary folder")?;
    let data =
        tempfile::tempdir_in(&cache).context("cannot create a temporary folder in the cache")?;
    let (out, out_end) = io::pipe().context("cannot make a pipe")?;
    let (err, err_end) = io::pipe().context("cannot make a pipe")?;
    let (control, control_end) = io::pipe().context("cannot make a pipe")?;
    let mut unshare = Command::new("unshare");
    unshare.args([
        "--mount",
        "--net",
        "--pid",
        "--ipc",
        "--uts",
        "--fork",
        "--kill-child",
        "--propagation",
        "private",
    ]);
    unshare.arg("sh").arg(job.source.join("ci/node/host"));
    unshare
        .arg(work.path())
        .arg(job.folder)
        .arg(job.dist)
        .arg(job.source)
        .arg(data.path());
    unshare.arg(control_end.as_raw_fd().to_string());
    unshare.stdin(Stdio::null()).stdout(out_end).stderr(err_end);
    let process = child::spawn(&mut unshare, &[control_end.as_fd()])?;
    Ok((
        Running {
            process,
            out,
            err,
            control,
        },
        Folders { work, data },
    ))
}

impl Folders {
    /// Removes the folders; nothing uses them any more.
    pub(crate) fn remove(self) -> Result<()> {
        self.data
            .close()
            .and_then(|()| self.work.close())
            .context("cannot remove a job's folders")
    }
}

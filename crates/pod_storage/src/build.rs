// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Runs `mkfs.erofs` and `mkfs.ext4`.
//!
//! Several layers are merged by the kernel: a thread takes a mount namespace of its own, mounts a read-only overlay
//! there and runs `mkfs.erofs` in it. The mount is gone when the program and the thread are, whatever ends them.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::error::StorageError;
use crate::image::{proc_path, unnamed_file};

/// How much of a program's complaints an error holds, in bytes.
const MAX_STDERR: usize = 2048;

/// An EROFS image, in an unnamed file, of the merged `directories`, topmost first.
pub(crate) fn erofs(
    config: &pod_spec::Storage,
    directories: &[PathBuf],
) -> Result<File, StorageError> {
    let file = unnamed_file(&config.cache_dir)?;
    let output = proc_path(&file);
    let mut command = Command::new(&config.mkfs_erofs);
    command.arg("--quiet").arg(&output);
    let what = describe(directories);
    match directories {
        [one] => run(config, command.arg(one), &what)?,
        several => {
            let merge = || {
                merge_here(&config.cache_dir, several)?;
                run(config, command.arg(&config.cache_dir), &what)
            };
            std::thread::scope(|scope| {
                let thread = std::thread::Builder::new().name("merge-layers".to_owned());
                let thread = thread.spawn_scoped(scope, merge).map_err(StorageError::io(
                    "start a thread to build in",
                    &config.cache_dir,
                ))?;
                thread.join().unwrap_or_else(|_| {
                    Err(StorageError::io("merge layers for", &config.cache_dir)(
                        io::Error::other("the thread panicked"),
                    ))
                })
            })?;
        }
    }
    Ok(file)
}

/// Runs a program that builds a file system, and waits for it. It dies with this thread.
pub(crate) fn run(
    config: &pod_spec::Storage,
    command: &mut Command,
    what: &str,
) -> Result<(), StorageError> {
    let program = command.get_program().to_owned();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    die_with_this_thread(command);
    let output = command
        .output()
        .map_err(StorageError::io("run", Path::new(&program)))?;
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("No space left on device") || stderr.contains("ENOSPC") {
        return Err(StorageError::NoSpace {
            directory: config.cache_dir.clone(),
            what: what.to_owned(),
        });
    }
    let tail_start = stderr.len().saturating_sub(MAX_STDERR);
    let tail: String = stderr
        .char_indices()
        .filter(|(at, _)| *at >= tail_start)
        .map(|(_, c)| c)
        .collect();
    Err(StorageError::Tool {
        program: program.to_string_lossy().into_owned(),
        what: what.to_owned(),
        status: output.status.to_string(),
        stderr: tail.trim().to_owned(),
    })
}

/// Mounts the merged layers on `target`, seen by this thread and its children alone.
fn merge_here(target: &Path, layers: &[PathBuf]) -> Result<(), StorageError> {
    let error = |operation| StorageError::errno::<nix::errno::Errno>(operation, target);
    unshare(CloneFlags::CLONE_NEWNS).map_err(error("take a mount namespace to merge layers on"))?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(error("make mounts private to merge layers on"))?;
    // The kernel reads at most one page of options: name the layers from the directory that they share.
    let base = common_parent(layers);
    nix::unistd::chdir(&base).map_err(StorageError::errno("enter", &base))?;
    let names: Vec<String> = layers
        .iter()
        .map(|layer| {
            layer
                .strip_prefix(&base)
                .unwrap_or(layer)
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let options = format!("lowerdir={}", names.join(":"));
    mount(
        Some("overlay"),
        target,
        Some("overlay"),
        MsFlags::MS_RDONLY,
        Some(options.as_str()),
    )
    .map_err(error("mount the merged layers on"))
}

fn common_parent(layers: &[PathBuf]) -> PathBuf {
    let mut parent = layers
        .first()
        .and_then(|layer| layer.parent())
        .unwrap_or(Path::new("/"));
    while !layers
        .iter()
        .all(|layer| layer.starts_with(parent) && layer != parent)
    {
        parent = parent.parent().unwrap_or(Path::new("/"));
    }
    parent.to_owned()
}

fn describe(directories: &[PathBuf]) -> String {
    match directories {
        [] => "nothing".to_owned(),
        [one] => one.display().to_string(),
        [top, rest @ ..] => format!("{} and {} layers below it", top.display(), rest.len()),
    }
}

#[expect(unsafe_code, reason = "std offers no other hook between fork and exec")]
fn die_with_this_thread(command: &mut Command) {
    let set = || {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(io::Error::from)
    };
    // SAFETY: between fork and exec the closure makes one system call, prctl(2), which is async-signal-safe; it
    // allocates nothing and takes no lock.
    unsafe { command.pre_exec(set) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_named_from_what_they_share() {
        let layers = [
            PathBuf::from("/c/snapshots/2/fs"),
            PathBuf::from("/c/snapshots/10/fs"),
        ];
        assert_eq!(common_parent(&layers), Path::new("/c/snapshots"));
        assert_eq!(common_parent(&["/a".into(), "/b/c".into()]), Path::new("/"));
        assert_eq!(common_parent(&["/a/b".into(), "/a".into()]), Path::new("/"));
    }
}

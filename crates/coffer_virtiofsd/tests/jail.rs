// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the file server sees and may, read from /proc. Needs root.
#![expect(clippy::unwrap_used, reason = "helpers outside the test functions")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::{PROGRAM, bounded, share, spawn};
use file_server::{Access, FileServer, FileServerError, Propagation, ShareName};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

fn seqpacket() -> (OwnedFd, OwnedFd) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID (Linux `include/uapi/linux/capability.h`).
const CAPABILITIES: u64 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7;

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(':'))
        .map_or("missing", |(_, value)| value.trim())
}

/// The server's root as it sees it itself.
fn root(server: &FileServer) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root", server.pid()))
}

fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[tokio::test]
async fn every_thread_has_the_few_capabilities_and_a_filter() {
    let (server, _connection) = spawn(&[]).await;
    let tasks = format!("/proc/{}/task", server.pid());
    let mut threads = 0;
    for task in fs::read_dir(tasks).unwrap() {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let expected = format!("{CAPABILITIES:016x}");
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            assert_eq!(field(&status, set), expected, "{set}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
        assert_eq!(field(&status, "Groups"), "");
        assert_eq!(field(&status, "NoNewPrivs"), "1");
        assert_eq!(field(&status, "Seccomp"), "2", "2 is a filter");
        assert!(
            field(&status, "NStgid").ends_with("\t1"),
            "first of its PID namespace"
        );
        threads += 1;
    }
    assert_eq!(threads, 3, "main, connection, queues");
}

#[tokio::test]
async fn namespaces_are_its_own_and_the_root_holds_the_shares_alone() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("inside"), "1").unwrap();
    let shares = [share("data", folder.path(), Access::ReadWrite)];
    let (server, _connection) = spawn(&shares).await;
    for namespace in ["mnt", "ipc", "uts", "net", "pid"] {
        let theirs = fs::read_link(format!("/proc/{}/ns/{namespace}", server.pid())).unwrap();
        let ours = fs::read_link(format!("/proc/self/ns/{namespace}")).unwrap();
        assert_ne!(theirs, ours, "{namespace}");
    }
    let root = root(&server);
    assert_eq!(names(&root), BTreeSet::from(["data".to_owned()]));
    assert_eq!(
        names(&root.join("data")),
        BTreeSet::from(["inside".to_owned()])
    );
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", server.pid())).unwrap();
    assert_eq!(mounts.lines().count(), 2, "{mounts}");
    let options = |point: &str| {
        let line = mounts
            .lines()
            .find(|line| line.split(' ').nth(4) == Some(point));
        line.unwrap().split(' ').nth(5).unwrap().to_owned()
    };
    assert!(options("/").starts_with("ro,"), "{mounts}");
    assert!(
        options("/data").starts_with("rw,nosuid,nodev,noexec"),
        "{mounts}"
    );
}

#[tokio::test]
async fn descriptors_lead_to_no_file_but_the_root_and_its_own_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let shares = [share("data", folder.path(), Access::ReadWrite)];
    let (server, _connection) = spawn(&shares).await;
    let own = format!("/proc/{}/fd", server.pid());
    for entry in fs::read_dir(&own).unwrap() {
        let path = entry.unwrap().path();
        let target = fs::read_link(&path).unwrap();
        let name = target.to_string_lossy().into_owned();
        let anonymous = ["anon_inode:", "socket:", "pipe:"];
        let known = anonymous.iter().any(|prefix| name.starts_with(prefix))
            || matches!(&*name, "/" | "/dev/null");
        assert!(known, "{name}");
        // Upwards there is nothing either: each is the root of its mount.
        let metadata = fs::metadata(&path).unwrap();
        if metadata.is_dir() {
            let above = fs::metadata(path.join("..")).unwrap();
            assert_eq!(
                (above.dev(), above.ino()),
                (metadata.dev(), metadata.ino()),
                "{name}"
            );
        } else {
            assert!(!metadata.file_type().is_block_device());
        }
    }
}

#[tokio::test]
async fn read_only_means_read_only_here_or_below_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let below = folder.path().join("below");
    fs::create_dir(&below).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "none"])
        .arg(&below)
        .status()
        .unwrap();
    assert!(mounted.success());
    let shares = [
        share("rw", folder.path(), Access::ReadWrite),
        share("ro", folder.path(), Access::ReadOnly),
        share("rro", folder.path(), Access::RecursiveReadOnly),
    ];
    let (server, _connection) = spawn(&shares).await;
    let root = root(&server);
    let writable = |path: &str| fs::write(root.join(path), "x").is_ok();
    let found = [
        "rw/a",
        "rw/below/a",
        "ro/b",
        "ro/below/b",
        "rro/c",
        "rro/below/c",
    ]
    .map(writable);
    server.kill().await;
    assert!(
        Command::new("umount")
            .arg(&below)
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(found, [true, true, false, true, false, false]);
}

#[tokio::test]
async fn shares_come_and_go_while_it_runs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "content").unwrap();
    let (server, _connection) = spawn(&[]).await;
    server
        .add(&share("dir", folder.path(), Access::ReadOnly))
        .unwrap();
    server.add(&share("one", &file, Access::ReadWrite)).unwrap();
    let root = root(&server);
    assert_eq!(fs::read_to_string(root.join("one")).unwrap(), "content");
    assert_eq!(
        fs::read_to_string(root.join("dir/file")).unwrap(),
        "content"
    );
    let twice = server.add(&share("dir", folder.path(), Access::ReadOnly));
    assert!(matches!(twice, Err(FileServerError::Exists { .. })));
    server.remove(&ShareName::new("dir").unwrap()).unwrap();
    server.remove(&ShareName::new("dir").unwrap()).unwrap();
    server.remove(&ShareName::new("one").unwrap()).unwrap();
    assert_eq!(names(&root), BTreeSet::new());
    assert_eq!(
        fs::read_to_string(&file).unwrap(),
        "content",
        "only the mounts went"
    );
    server
        .add(&share("dir", folder.path(), Access::ReadOnly))
        .unwrap();
    assert_eq!(names(&root), BTreeSet::from(["dir".to_owned()]));
}

#[tokio::test]
async fn later_mounts_of_the_host_arrive_only_if_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str], path: &Path| {
        let status = Command::new(arguments[0])
            .args(&arguments[1..])
            .arg(path)
            .status();
        assert!(status.unwrap().success(), "{arguments:?}");
    };
    run(&["mount", "-t", "tmpfs", "none"], folder.path());
    run(&["mount", "--make-shared"], folder.path());
    fs::create_dir(folder.path().join("later")).unwrap();
    let mut slave = share("slave", folder.path(), Access::ReadWrite);
    slave.propagation = Propagation::FromHost;
    let private = share("private", folder.path(), Access::ReadWrite);
    let (server, _connection) = spawn(&[slave, private]).await;
    run(
        &["mount", "-t", "tmpfs", "none"],
        &folder.path().join("later"),
    );
    fs::write(folder.path().join("later/file"), "").unwrap();
    let root = root(&server);
    let found = ["slave", "private"].map(|share| root.join(share).join("later/file").exists());
    server.kill().await;
    run(&["umount", "-R"], folder.path());
    assert_eq!(found, [true, false]);
}

#[tokio::test]
async fn sockets_and_devices_of_the_host_are_not_shared() {
    let folder = tempfile::tempdir().unwrap();
    let _socket = UnixListener::bind(folder.path().join("socket")).unwrap();
    let (server, _connection) = spawn(&[]).await;
    for path in [folder.path().join("socket"), PathBuf::from("/dev/null")] {
        let result = server.add(&share("x", &path, Access::ReadOnly));
        assert!(
            matches!(result, Err(FileServerError::Kind { .. })),
            "{result:?}"
        );
    }
}

#[tokio::test]
async fn killed_server_is_told_and_cannot_be_added_to() {
    let folder = tempfile::tempdir().unwrap();
    let (server, _connection) = spawn(&[]).await;
    let exit = bounded(server.kill()).await;
    assert_eq!((exit.code, exit.signal), (None, Some(9)));
    assert_eq!(exit.to_string(), "the file server was ended by signal 9");
    assert_eq!(server.kill().await, exit);
    let late = server.add(&share("x", folder.path(), Access::ReadOnly));
    assert!(matches!(late, Err(FileServerError::Mount { .. })));
}

#[tokio::test]
async fn server_ends_when_its_connection_closes_or_its_handle_is_dropped() {
    let (server, connection) = spawn(&[]).await;
    drop(connection);
    let exit = bounded(server.wait()).await;
    assert_eq!((exit.code, exit.message.as_str()), (Some(0), ""));

    let (server, mut connection) = spawn(&[]).await;
    drop(server);
    let closed = tokio::task::spawn_blocking(move || connection.read(&mut [0]).unwrap());
    assert_eq!(bounded(closed).await.unwrap(), 0);
}

/// The test starts itself a second time as the shim, which is then killed.
#[tokio::test]
async fn server_dies_with_its_shim() {
    const AS_SHIM: &str = "COFFER_TEST_AS_SHIM";
    const NAME: &str = "server_dies_with_its_shim";
    if std::env::var_os(AS_SHIM).is_some() {
        let (server, _connection) = spawn(&[]).await;
        println!("\nserver {}", server.pid());
        bounded(std::future::pending::<()>()).await;
    }
    let mut shim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture"])
        .env(AS_SHIM, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(shim.stdout.take().unwrap()).lines();
    let pid = lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix("server ")?.parse::<i32>().ok());
    let pid = pid.and_then(Pid::from_raw).unwrap();
    let server = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    shim.kill().unwrap();
    shim.wait().unwrap();
    let deadline = Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(&server, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&deadline)), Ok(1), "it lives on");
}

#[tokio::test]
async fn program_that_is_no_server_is_an_error_with_its_words() {
    let missing = FileServer::spawn(Path::new("/nonexistent"), &[]).await;
    assert!(matches!(missing, Err(FileServerError::Start { .. })));
    let other = FileServer::spawn(Path::new("/bin/false"), &[]).await;
    let text = other.unwrap_err().to_string();
    assert!(text.contains("exit code 1"), "{text}");
}

#[test]
fn it_does_not_run_outside_its_jail() {
    let run = |stdin: Stdio| {
        let output = Command::new(PROGRAM).stdin(stdin).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), text)
    };
    let (code, text) = run(Stdio::null());
    assert_eq!(code, Some(2), "{text}");
    let (socket, _other) = seqpacket();
    let (code, text) = run(Stdio::from(socket));
    assert_eq!(code, Some(1));
    assert!(text.contains("cannot do without a PID namespace"), "{text}");
}

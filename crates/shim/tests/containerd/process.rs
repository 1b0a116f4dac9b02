// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The shim's verbs as containerd runs them, as processes of their own.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::support::{
    Containerd, PATIENCE, Watched, address, client, complaint, eventually, options, words,
};
use containerd_shim_protos::api;
use containerd_shim_protos::bootstrap_api::BootstrapResult;
use containerd_shim_protos::protobuf::Message;
use rustix::fs::{CWD, FileType, FlockOperation, Mode, flock, mknodat};
use rustix::mount::{MountFlags, mount};
use rustix::process::Signal;
use ttrpc::context::with_duration;

const CRI_SANDBOX: &[(&str, &str)] = &[
    ("io.kubernetes.cri.container-type", "sandbox"),
    ("io.kubernetes.cri.sandbox-id", "pod1"),
];
const CRI_MEMBER: &[(&str, &str)] = &[
    ("io.kubernetes.cri.container-type", "container"),
    ("io.kubernetes.cri.sandbox-id", "pod1"),
];

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn version_is_printed() {
    let said = words(&["-v"]);
    assert!(said.status.success());
    assert_eq!(
        text(&said.stdout),
        "containerd-shim-coffer-v2:\n  Version: 0.1.0\n"
    );
    assert_eq!(text(&said.stderr), "");
}

#[test]
fn info_is_a_message_and_nothing_else() {
    let said = words(&["-info"]);
    assert!(said.status.success());
    assert_eq!(text(&said.stderr), "");
    let info =
        containerd_shim_protos::types::introspection::RuntimeInfo::parse_from_bytes(&said.stdout)
            .unwrap();
    assert_eq!(info.name, "io.containerd.coffer.v2");
}

#[test]
fn config_is_printed_with_where_each_value_is_from_and_can_be_fed_back() {
    let containerd = Containerd::new();
    let file = containerd.path("config.toml");
    fs::write(&file, "[guest]\ndefault_vcpus = 2").unwrap();
    let file = file.to_str().unwrap();
    let said = words(&["--print-config", "-config", file]);
    assert!(said.status.success(), "{said:?}");
    let printed = text(&said.stdout);
    assert!(
        printed.contains(&format!("default_vcpus = 2 # {file}\n"))
            && printed.contains("max_vcpus = 64 # default\n"),
        "{printed}"
    );
    fs::write(file, printed).unwrap();
    let again = words(&["-print-config", "-config", file]);
    assert!(again.status.success(), "{again:?}");
    fs::write(file, "[guest]\ndefault_vcpu = 2").unwrap();
    assert_eq!(
        complaint(&words(&["-print-config", "-config", file])),
        format!(
            "containerd-shim-coffer-v2: config file {file}: the config has 1 mistake(s): unknown key \
             guest.default_vcpu: did you mean guest.default_vcpus?\n"
        )
    );
}

#[test]
fn command_line_that_is_none_ends_with_code_2() {
    let cases: &[(&[&str], &str)] = &[
        (
            &[],
            "no command: containerd calls this program with start, delete, -info or -v, an operator with \
             -print-config\n",
        ),
        (
            &["-namespace", "n", "-id", "a", "stop"],
            "unknown command \"stop\": start, delete, -info, -v and -print-config are known\n",
        ),
        (
            &["-sokcet", "start"],
            "unknown flag \"-sokcet\": -namespace, -id, -address, -publish-binary, -bundle, -debug, -info, -v, \
             -print-config and -config are known\n",
        ),
        (
            &["-namespace", "n", "-id", "a/b", "start"],
            "flag -id: container id has '/' at byte 1: only letters, digits and single '.', '_' or '-' between them are \
             allowed\n",
        ),
    ];
    for (line, expected) in cases {
        let said = words(line);
        assert_eq!(said.status.code(), Some(2), "{line:?}");
        assert_eq!(text(&said.stdout), "");
        assert_eq!(
            text(&said.stderr),
            format!("containerd-shim-coffer-v2: {expected}")
        );
    }
}

#[test]
fn serve_by_hand_is_refused() {
    let said = words(&["-namespace", "n", "-id", "a", "serve"]);
    assert_eq!(
        complaint(&said),
        "containerd-shim-coffer-v2: standard input is no socket of start: serve is called by start, never by hand\n"
    );
}

#[test]
fn start_answers_with_an_address_and_leaves_a_daemon() {
    let containerd = Containerd::new();
    let bundle = containerd.plain_bundle("c1");
    let address = address(&containerd.start("c1", &bundle));
    let socket = PathBuf::from(address.strip_prefix("unix://").unwrap());
    assert_eq!(socket.parent().unwrap(), containerd.path("s"));
    assert_eq!(socket.file_name().unwrap().len(), 64);
    assert_eq!(
        fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
        0o600
    );
    assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);

    let pid = containerd.shim("c1");
    let proc = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    assert_eq!(
        fs::read_link(proc.join("cwd")).unwrap(),
        bundle.canonicalize().unwrap()
    );
    // The kernel keeps 15 bytes of a program's name.
    assert_eq!(
        fs::read_to_string(proc.join("comm")).unwrap(),
        "shim_with_fake_\n"
    );
    for fd in ["0", "1", "2"] {
        assert_eq!(
            fs::read_link(proc.join("fd").join(fd)).unwrap(),
            Path::new("/dev/null")
        );
    }
    let stat = fs::read_to_string(proc.join("stat")).unwrap();
    let session = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .nth(3)
        .unwrap();
    assert_eq!(
        session,
        pid.as_raw_nonzero().to_string(),
        "a session of its own"
    );
    containerd.delete("c1", &bundle);
}

#[test]
fn members_join_the_shim_of_their_sandbox() {
    let containerd = Containerd::new();
    let pod = containerd.bundle("pod1", CRI_SANDBOX, "");
    let member = containerd.bundle("c1", CRI_MEMBER, "");
    let refused = complaint(&containerd.start("c1", &member));
    assert!(refused.contains("sandbox pod1 has no shim"), "{refused}");

    let leader = address(&containerd.start("pod1", &pod));
    let shim = Watched::new(containerd.shim("pod1"));
    assert_eq!(address(&containerd.start("c1", &member)), leader);
    assert_eq!(address(&containerd.start("pod1", &pod)), leader);
    assert_eq!(fs::read_to_string(member.join("address")).unwrap(), leader);

    let deleted = containerd.delete("c1", &member);
    assert!(deleted.status.success(), "{deleted:?}");
    assert!(
        !shim.ended_within(Duration::ZERO),
        "a member's delete leaves the pod alone"
    );
    let deleted = containerd.delete("pod1", &pod);
    assert!(deleted.status.success(), "{deleted:?}");
    assert!(shim.ended_within(Duration::ZERO));
    assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
}

#[test]
fn second_containerd_cannot_take_a_sandbox_of_the_same_name() {
    let containerd = Containerd::new();
    let bundle = containerd.plain_bundle("c1");
    address(&containerd.start("c1", &bundle));
    let shim = Watched::new(containerd.shim("c1"));
    let mut params = containerd.bootstrap_params("c1");
    params.containerd_grpc_address = "/run/other/containerd.sock".to_owned();
    let said = complaint(&containerd.start_with("c1", &bundle, &params.write_to_bytes().unwrap()));
    assert!(
        said.contains("sandbox c1 of another containerd runs on this node"),
        "{said}"
    );
    assert!(!shim.ended_within(Duration::ZERO));
    containerd.delete("c1", &bundle);
    assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
}

#[test]
fn bootstrap_params_are_answered_in_kind() {
    let containerd = Containerd::new();
    let bundle = containerd.plain_bundle("c1");
    let mut params = containerd.bootstrap_params("c1");
    params.socket_dir = Some(containerd.path("sd").to_str().unwrap().to_owned());
    let reply = containerd.start_with("c1", &bundle, &params.write_to_bytes().unwrap());
    assert_eq!(text(&reply.stderr), "");
    let result = BootstrapResult::parse_from_bytes(&reply.stdout).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    let dir = format!("unix://{}/", containerd.path("sd").display());
    assert!(result.address.starts_with(&dir), "{}", result.address);
    containerd.delete("c1", &bundle);
    assert_eq!(fs::read_dir(containerd.path("sd")).unwrap().count(), 0);
    assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
}

#[test]
fn start_that_fails_says_why_and_leaves_nothing() {
    let containerd = Containerd::new();
    let bundle = containerd.plain_bundle("c1");
    let config = containerd.path("config.toml");
    let cases: [(Vec<u8>, &str); 3] = [
        (
            vec![0xff; 8],
            "standard input is neither runtime options nor bootstrap parameters",
        ),
        (
            options("containerd.runc.v1.Options", "x"),
            "\"containerd.runc.v1.Options\" are another runtime's",
        ),
        (
            options("runtimeoptions.v1.Options", "/nowhere/coffer.toml"),
            "config file /nowhere/coffer.toml: No such file",
        ),
    ];
    for (input, expected) in cases {
        let said = complaint(&containerd.start_with("c1", &bundle, &input));
        assert!(said.contains(expected), "{said}");
    }
    fs::write(&config, "[guest]\ndefault_vcpu = 2").unwrap();
    let said = complaint(&containerd.start("c1", &bundle));
    assert!(
        said.contains("unknown key guest.default_vcpu: did you mean guest.default_vcpus?"),
        "{said}"
    );
    fs::write(&config, "").unwrap();
    fs::write(bundle.join("config.json"), "{").unwrap();
    let said = complaint(&containerd.start("c1", &bundle));
    assert!(
        said.contains("config.json is no OCI runtime spec"),
        "{said}"
    );
    let bad_cgroup = containerd.bundle("c2", &[], "/../../escape");
    let said = complaint(&containerd.start("c2", &bad_cgroup));
    assert!(
        said.contains("linux.cgroupsPath \"/../../escape\" is neither"),
        "{said}"
    );
    assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
}

#[test]
fn killed_shim_leaves_nothing_that_delete_does_not_remove() {
    let containerd = Containerd::new();
    let cgroup = format!("/coffer-process-test-{}/c1", std::process::id());
    let bundle = containerd.bundle("c1", &[], &cgroup);
    address(&containerd.start("c1", &bundle));
    let pid = containerd.shim("c1");
    let placed = fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_nonzero())).unwrap();
    assert!(
        placed.lines().any(|line| line.ends_with(&cgroup)),
        "{placed}"
    );
    mount(
        "none",
        bundle.join("rootfs"),
        c"tmpfs",
        MountFlags::empty(),
        c"",
    )
    .unwrap();

    for process in containerd.processes("c1") {
        process.signal(Signal::KILL);
        assert!(process.ended_within(PATIENCE));
    }
    for _ in 0..2 {
        let began = Instant::now();
        let deleted = containerd.delete("c1", &bundle);
        assert!(deleted.status.success(), "{deleted:?}");
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "containerd's limit"
        );
        let response = api::DeleteResponse::parse_from_bytes(&deleted.stdout).unwrap();
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.seconds > 0);
    }
    assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
    assert!(
        !fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains(bundle.to_str().unwrap())
    );
    assert!(!cgroup_exists(&cgroup));
}

#[test]
fn shim_killed_before_containerd_knew_it_leaves_nothing() {
    let containerd = Containerd::new();
    let cgroup = format!("/coffer-keeper-test-{}/c1", std::process::id());
    let bundle = containerd.bundle("c1", &[], &cgroup);
    for _ in 0..2 {
        address(&containerd.start("c1", &bundle));
        let shim = Watched::new(containerd.shim("c1"));
        shim.signal(Signal::KILL);
        // What containerd 1.6 does when it cannot connect: nothing, not even `delete`.
        eventually("the keeper has cleaned up", || {
            (containerd.leftovers().is_empty() && !cgroup_exists(&cgroup)).then_some(())
        });
    }
}

#[test]
fn start_killed_half_way_leaves_nothing() {
    let containerd = Containerd::new();
    let bundle = containerd.plain_bundle("c1");
    fs::create_dir(containerd.path("state")).unwrap();
    // `start` waits for it, with keeper and shim at its side.
    let lock = File::open(containerd.path("state")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let mut start = containerd.start_in_background("c1", &bundle);
    let family = eventually("keeper and shim", || {
        let family = containerd.processes("c1");
        (family.len() == 3).then_some(family)
    });
    start.kill().unwrap();
    start.wait().unwrap();
    drop(lock);
    for process in family {
        assert!(process.ended_within(PATIENCE));
    }
    assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
}

#[test]
fn what_a_killed_keeper_has_left_is_removed_by_the_next_start() {
    let containerd = Containerd::new();
    let cgroup = format!("/coffer-sweep-test-{}/c1", std::process::id());
    let bundle = containerd.bundle("c1", &[], &cgroup);
    address(&containerd.start("c1", &bundle));
    containerd.shim("c1");
    let family = containerd.processes("c1");
    assert_eq!(family.len(), 2, "keeper and shim");
    for process in &family {
        process.signal(Signal::STOP);
    }
    for process in &family {
        process.signal(Signal::KILL);
        assert!(process.ended_within(PATIENCE));
    }
    fs::remove_dir_all(&bundle).unwrap();
    assert!(!containerd.leftovers().is_empty());

    let other = containerd.plain_bundle("c2");
    address(&containerd.start("c2", &other));
    assert!(containerd.delete("c2", &other).status.success());
    assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
    assert!(!cgroup_exists(&cgroup));
}

/// Whether any hierarchy has the first part of `cgroup`.
fn cgroup_exists(cgroup: &str) -> bool {
    let group = cgroup.split('/').nth(1).unwrap();
    walk(Path::new("/sys/fs/cgroup"), 2)
        .iter()
        .any(|path| path.ends_with(group))
}

/// The directories below `root`, to `depth`.
fn walk(root: &Path, depth: usize) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
            if depth > 1 {
                found.extend(walk(&entry.path(), depth - 1));
            }
        }
    }
    found
}

#[test]
fn socket_of_a_killed_shim_is_taken_over() {
    let containerd = Containerd::new();
    let bundle = containerd.plain_bundle("c1");
    let first = address(&containerd.start("c1", &bundle));
    let shim = Watched::new(containerd.shim("c1"));
    shim.signal(Signal::KILL);
    assert!(shim.ended_within(PATIENCE));
    assert_eq!(address(&containerd.start("c1", &bundle)), first);
    containerd.delete("c1", &bundle);
    assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
}

#[test]
fn signal_ends_the_shim_cleanly() {
    for signal in [Signal::TERM, Signal::INT] {
        let containerd = Containerd::new();
        let cgroup = format!("/coffer-signal-test-{}/c1", std::process::id());
        let bundle = containerd.bundle("c1", &[], &cgroup);
        address(&containerd.start("c1", &bundle));
        let shim = Watched::new(containerd.shim("c1"));
        shim.signal(signal);
        assert!(shim.ended_within(PATIENCE));
        assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
        let group = cgroup.split('/').nth(1).unwrap();
        assert!(
            !walk(Path::new("/sys/fs/cgroup"), 2)
                .iter()
                .any(|path| path.ends_with(group))
        );
        let deleted = containerd.delete("c1", &bundle);
        assert!(deleted.status.success(), "{deleted:?}");
    }
}

#[tokio::test]
async fn shutdown_of_a_sandbox_without_tasks_ends_the_shim() {
    let containerd = Containerd::new();
    let bundle = containerd.plain_bundle("c1");
    let address = address(&containerd.start("c1", &bundle));
    let shim = Watched::new(containerd.shim("c1"));
    let task = client(&address).await;
    let request = api::ShutdownRequest {
        id: "c1".to_owned(),
        ..api::ShutdownRequest::default()
    };
    task.shutdown(with_duration(PATIENCE), &request)
        .await
        .unwrap();
    assert!(shim.ended_within(PATIENCE));
    assert_eq!(containerd.leftovers(), [] as [PathBuf; 0]);
}

#[test]
fn log_goes_to_the_fifo_of_the_bundle() {
    let containerd = Containerd::new();
    let bundle = containerd.plain_bundle("c1");
    let fifo = bundle.join("log");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let mut reader = fs::File::options()
        .read(true)
        .write(true)
        .open(&fifo)
        .unwrap();
    address(&containerd.start("c1", &bundle));
    let mut line = [0; 4096];
    let count = std::io::Read::read(&mut reader, &mut line).unwrap();
    let line = text(&line[..count]).to_owned();
    assert!(
        line.contains("level=info")
            && line.contains("sandbox_id=c1")
            && line.contains("namespace=coffer-test"),
        "{line}"
    );
    containerd.delete("c1", &bundle);
}

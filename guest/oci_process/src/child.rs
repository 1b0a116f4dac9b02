// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The child's side: a helper process that the agent starts afresh for each process, and the process-to-be that it clones.
//!
//! The helper has one thread and its own copy of the program, so nothing here can disturb the agent. It clones once, into
//! the namespaces and the cgroup, tells the pid and ends.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use oci_spec::runtime::{
    Linux, LinuxNamespaceType, LinuxPersonality, LinuxPersonalityDomain, LinuxSeccomp, Process,
    Spec,
};
use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::channel::{Channel, PROCEED, START, Tag};
use crate::error::Context as _;
use crate::process::{Prepared, prepare};
use crate::rootfs;
use crate::sys::{self, Cloned, clone_sibling};
use crate::terminal::open_terminal;

/// What the agent asks of the helper. With it come, in this order: for an exec the pidfd of the container's init, for an init
/// that joins a pid namespace that of a process in it, then the streams that [`Request::streams`] says are there.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) kind: Kind,
    /// The cgroup's directory.
    pub(crate) cgroup: PathBuf,
    pub(crate) terminal: bool,
    /// Whether standard input, output and error follow.
    pub(crate) streams: [bool; 3],
}

/// The two kinds of process.
#[derive(Debug, Serialize, Deserialize)]
#[expect(
    clippy::large_enum_variant,
    reason = "one value in the life of a process"
)]
pub(crate) enum Kind {
    /// The container's init.
    Init {
        id: String,
        spec: Spec,
        rootfs: PathBuf,
    },
    /// A further process in the namespaces of a running container.
    Exec {
        process: Process,
        /// Types of the namespaces that the container has of its own.
        namespaces: Vec<LinuxNamespaceType>,
        seccomp: Option<LinuxSeccomp>,
        personality: Option<LinuxPersonality>,
    },
}

/// The helper's whole life: the request is on standard input. Called by the program's `main` and by nothing else.
pub fn helper_main() -> ExitCode {
    let Ok(socket) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else {
        return ExitCode::FAILURE;
    };
    let channel = Channel::new(socket);
    match serve(&channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Without the agent there is nobody left to tell.
            let _ = channel.send(Tag::Failed, error.chain().as_bytes(), &[]);
            ExitCode::FAILURE
        }
    }
}

fn serve(channel: &Channel) -> Result<(), Error> {
    let message = channel
        .receive()
        .step(|| "reading the request".to_owned())?
        .filter(|message| message.tag == Tag::Request)
        .ok_or(Error::Protocol("the request"))?;
    let request: Request = serde_json::from_slice(&message.payload)
        .map_err(|_| Error::Protocol("the request's JSON"))?;
    let mut descriptors = message.descriptors.into_iter();
    let cgroup = rustix::fs::open(
        &request.cgroup,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .step(|| format!("opening the cgroup {}", request.cgroup.display()))?;
    // No process of a container may look into this one, which still knows the guest's own files.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .step(|| "hiding the process".to_owned())?;
    set_oom_score(
        request
            .kind
            .process()
            .and_then(Process::oom_score_adj)
            .unwrap_or(0),
    )?;
    let (flags, init) = match &request.kind {
        Kind::Init { spec, .. } => {
            if shared_pid_namespace(spec).is_some() {
                let process = descriptors
                    .next()
                    .ok_or(Error::Protocol("the pid namespace's process"))?;
                // It is the clone's to be in, not the helper's.
                join_namespaces(&process, &[LinuxNamespaceType::Pid])?;
            }
            (new_namespaces(spec), None)
        }
        Kind::Exec { namespaces, .. } => {
            let init = descriptors
                .next()
                .ok_or(Error::Protocol("the init's pidfd"))?;
            let others: Vec<_> = namespaces
                .iter()
                .copied()
                .filter(|kind| *kind != LinuxNamespaceType::Cgroup)
                .collect();
            join_namespaces(&init, &others)?;
            (0, Some(init))
        }
    };
    let streams = take_streams(&request, descriptors)?;
    match clone_sibling(flags, &cgroup).step(|| "making the process (clone3)".to_owned())? {
        Cloned::Parent(pid) => {
            let pid = pid.as_raw_nonzero().get().to_le_bytes();
            channel
                .send(Tag::Pid, &pid, &[])
                .step(|| "telling the process's pid".to_owned())
        }
        Cloned::Child => {
            drop(cgroup);
            let error = become_process(channel, request, streams, init);
            let _ = channel.send(Tag::Failed, error.chain().as_bytes(), &[]);
            // 127 is what a shell says of a program that cannot be run.
            std::process::exit(127)
        }
    }
}

impl Kind {
    fn process(&self) -> Option<&Process> {
        match self {
            Self::Init { spec, .. } => spec.process().as_ref(),
            Self::Exec { process, .. } => Some(process),
        }
    }
}

/// Runs in the new process. Comes back only with an error, or with [`Error::Vanished`] when the agent has given up.
fn become_process(
    channel: &Channel,
    request: Request,
    streams: [Option<OwnedFd>; 3],
    init: Option<OwnedFd>,
) -> Error {
    match channel.wait_for(PROCEED) {
        Ok(true) => {}
        Ok(false) => return Error::Vanished("waiting for the agent"),
        Err(_) => return Error::Protocol("going on"),
    }
    let prepared = match &request.kind {
        Kind::Init { spec, rootfs, .. } => {
            prepare_init(channel, spec, rootfs, request.terminal, streams)
        }
        Kind::Exec {
            process,
            seccomp,
            personality,
            namespaces,
        } => enter_session()
            .and_then(|()| join_cgroup_namespace(init, namespaces))
            .and_then(|()| connect_streams(channel, request.terminal, streams, false))
            .and_then(|()| set_personality(personality.as_ref()))
            .and_then(|()| prepare(process, seccomp.as_ref())),
    };
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return error,
    };
    if let Err(source) = channel.send(Tag::Ready, &[], &[]) {
        return Error::Step {
            step: "telling that the process is ready".to_owned(),
            source,
        };
    }
    match channel.wait_for(START) {
        Ok(true) => {}
        Ok(false) => std::process::exit(0),
        Err(_) => return Error::Protocol("starting"),
    }
    if let Kind::Init { id, spec, .. } = &request.kind
        && let Err(error) = crate::hooks::run_start_container(spec, id, prepared.environment())
    {
        return error;
    }
    if let Err(source) = sys::close_on_exec_from_3() {
        return Error::Step {
            step: "closing descriptors".to_owned(),
            source,
        };
    }
    prepared.run()
}

fn prepare_init(
    channel: &Channel,
    spec: &Spec,
    rootfs: &Path,
    terminal: bool,
    streams: [Option<OwnedFd>; 3],
) -> Result<Prepared, Error> {
    let linux = spec.linux().as_ref();
    enter_session()?;
    own_namespaces(spec)?;
    let root = rootfs::build(spec, rootfs)?;
    for (key, value) in linux
        .and_then(|linux| linux.sysctl().as_ref())
        .into_iter()
        .flatten()
    {
        write_sysctl(key, value)?;
    }
    rootfs::enter(
        root,
        linux.and_then(|linux| linux.rootfs_propagation().as_deref()),
    )?;
    connect_streams(channel, terminal, streams, true)?;
    rootfs::restrict(spec)?;
    set_personality(linux.and_then(|linux| linux.personality().as_ref()))?;
    let process = spec
        .process()
        .as_ref()
        .ok_or(Error::Protocol("the process"))?;
    prepare(process, linux.and_then(|linux| linux.seccomp().as_ref()))
}

fn enter_session() -> Result<(), Error> {
    rustix::process::setsid().step(|| "starting a session".to_owned())?;
    sys::new_session_keyring().step(|| "making a session keyring".to_owned())?;
    sys::default_signals();
    Ok(())
}

fn has(linux: Option<&Linux>, kind: LinuxNamespaceType) -> bool {
    linux
        .and_then(|linux| linux.namespaces().as_ref())
        .is_some_and(|list| list.iter().any(|namespace| namespace.typ() == kind))
}

/// The path of the spec's pid namespace, if the namespace is another's.
pub fn shared_pid_namespace(spec: &Spec) -> Option<&Path> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Pid)
        .and_then(|namespace| namespace.path().as_deref())
        .filter(|path| !path.as_os_str().is_empty())
}

/// The `CLONE_NEW*` flags of a spec. The cgroup namespace is not among them: clone3 would root it at the helper's cgroup.
fn new_namespaces(spec: &Spec) -> libc::c_int {
    let linux = spec.linux().as_ref();
    let own_pids = if shared_pid_namespace(spec).is_none() {
        libc::CLONE_NEWPID
    } else {
        0
    };
    [
        (LinuxNamespaceType::Mount, libc::CLONE_NEWNS),
        (LinuxNamespaceType::Pid, own_pids),
        (LinuxNamespaceType::Uts, libc::CLONE_NEWUTS),
        (LinuxNamespaceType::Ipc, libc::CLONE_NEWIPC),
        (LinuxNamespaceType::Network, libc::CLONE_NEWNET),
    ]
    .into_iter()
    .filter(|(kind, _)| has(linux, *kind))
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// What a new namespace needs from inside.
fn own_namespaces(spec: &Spec) -> Result<(), Error> {
    let linux = spec.linux().as_ref();
    if has(linux, LinuxNamespaceType::Cgroup) {
        unshare_cgroup().step(|| "making a cgroup namespace".to_owned())?;
    }
    if has(linux, LinuxNamespaceType::Network) {
        sys::loopback_up().step(|| "bringing the loopback interface up".to_owned())?;
    }
    let own_names = has(linux, LinuxNamespaceType::Uts);
    let current = rustix::system::uname();
    for (field, wanted, is) in [
        ("hostname", spec.hostname(), current.nodename()),
        ("domainname", spec.domainname(), current.domainname()),
    ] {
        let Some(wanted) = wanted
            .as_deref()
            .filter(|name| !name.is_empty() && name.as_bytes() != is.to_bytes())
        else {
            continue;
        };
        if !own_names {
            return Err(Error::invalid(
                field,
                format!("is {wanted:?}, but the pod's name is shared by its containers"),
            ));
        }
        let set = match field {
            "hostname" => rustix::system::sethostname(wanted.as_bytes()),
            _ => rustix::system::setdomainname(wanted.as_bytes()),
        };
        set.step(|| format!("setting the {field}"))?;
    }
    Ok(())
}

#[expect(unsafe_code, reason = "rustix leaves unshare to its caller's care")]
fn unshare_cgroup() -> rustix::io::Result<()> {
    // SAFETY: NEWCGROUP changes no descriptor and no memory of the process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }
}

fn join_namespaces(init: &OwnedFd, kinds: &[LinuxNamespaceType]) -> Result<(), Error> {
    let all = kinds
        .iter()
        .fold(ThreadNameSpaceType::empty(), |all, kind| {
            all | match kind {
                LinuxNamespaceType::Mount => ThreadNameSpaceType::MOUNT,
                LinuxNamespaceType::Cgroup => ThreadNameSpaceType::CONTROL_GROUP,
                LinuxNamespaceType::Uts => ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME,
                LinuxNamespaceType::Ipc => ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION,
                LinuxNamespaceType::User => ThreadNameSpaceType::USER,
                LinuxNamespaceType::Pid => ThreadNameSpaceType::PROCESS_ID,
                LinuxNamespaceType::Network => ThreadNameSpaceType::NETWORK,
                LinuxNamespaceType::Time => ThreadNameSpaceType::TIME,
            }
        });
    move_into_thread_name_spaces(init.as_fd(), all)
        .step(|| "entering the container's namespaces".to_owned())
}

/// Only from inside the container's cgroup: from outside, clone3 into it is refused where cgroups are delegated by
/// namespace (cgroup-v2.rst, "nsdelegate").
fn join_cgroup_namespace(init: Option<OwnedFd>, kinds: &[LinuxNamespaceType]) -> Result<(), Error> {
    match init {
        Some(init) if kinds.contains(&LinuxNamespaceType::Cgroup) => {
            join_namespaces(&init, &[LinuxNamespaceType::Cgroup])
        }
        _ => Ok(()),
    }
}

fn take_streams(
    request: &Request,
    mut descriptors: impl Iterator<Item = OwnedFd>,
) -> Result<[Option<OwnedFd>; 3], Error> {
    let mut streams = [None, None, None];
    for (stream, present) in streams.iter_mut().zip(request.streams) {
        if present {
            *stream = Some(
                descriptors
                    .next()
                    .ok_or(Error::Protocol("the standard streams"))?,
            );
        }
    }
    Ok(streams)
}

/// Connects descriptors 0 to 2: to a terminal, to the streams given, or to the container's `/dev/null`.
fn connect_streams(
    channel: &Channel,
    terminal: bool,
    mut streams: [Option<OwnedFd>; 3],
    console: bool,
) -> Result<(), Error> {
    if terminal {
        let terminal = open_terminal()?;
        if console {
            terminal.become_console()?;
        }
        channel
            .send(Tag::Terminal, &[], &[terminal.controller.as_fd()])
            .step(|| "handing the terminal over".to_owned())?;
        rustix::process::ioctl_tiocsctty(&terminal.user)
            .step(|| "taking the terminal".to_owned())?;
        for stream in &mut streams {
            *stream =
                Some(rustix::io::dup(&terminal.user).step(|| "doubling the terminal".to_owned())?);
        }
    }
    let null = rustix::fs::open(
        "/dev/null",
        OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )
    .step(|| "opening the container's /dev/null".to_owned())?;
    let step = || "connecting a standard stream".to_owned();
    let [input, output, errors] = streams;
    rustix::stdio::dup2_stdin(input.as_ref().unwrap_or(&null)).step(step)?;
    rustix::stdio::dup2_stdout(output.as_ref().unwrap_or(&null)).step(step)?;
    rustix::stdio::dup2_stderr(errors.as_ref().unwrap_or(&null)).step(step)
}

fn set_personality(personality: Option<&LinuxPersonality>) -> Result<(), Error> {
    match personality.map(LinuxPersonality::domain) {
        Some(LinuxPersonalityDomain::PerLinux32) => {
            sys::set_personality_32_bit().step(|| "setting the personality".to_owned())
        }
        Some(LinuxPersonalityDomain::PerLinux) | None => Ok(()),
    }
}

/// Seen through the agent's own /proc, which is still there. The agent itself is protected from the OOM killer, so every
/// process gets a value of its own.
fn set_oom_score(score: i32) -> Result<(), Error> {
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
        .step(|| format!("setting oom_score_adj to {score}"))
}

/// Writes a kernel parameter, by its name with dots, in the calling process's namespaces.
///
/// # Errors
/// [`Error::Invalid`] for a name that is no parameter's, [`Error::Step`] if the kernel refuses.
pub fn write_sysctl(key: &str, value: &str) -> Result<(), Error> {
    let valid = !key.is_empty()
        && key.split(['.', '/']).all(|part| !part.is_empty())
        && key
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-./".contains(&byte));
    if !valid {
        return Err(Error::invalid(
            format!("linux.sysctl[{key}]"),
            "is no kernel parameter's name",
        ));
    }
    // sysctl(8): a dot in an interface's name is written as a slash.
    let path: String = key
        .chars()
        .map(|character| match character {
            '.' => '/',
            '/' => '.',
            other => other,
        })
        .collect();
    let path = Path::new("/proc/sys").join(path);
    let written: io::Result<()> = std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    written.step(|| format!("setting the kernel parameter {key} to {value:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_that_leaves_proc_sys_is_refused() {
        for key in [
            "",
            "..",
            "kernel..x",
            "../kernel",
            "a/../b",
            "kernel.shmmax\n",
            "/etc/passwd",
        ] {
            assert!(
                matches!(write_sysctl(key, "1"), Err(Error::Invalid { .. })),
                "{key:?}"
            );
        }
    }

    #[test]
    fn unknown_sysctl_is_named() {
        let error = write_sysctl("net.no_such_parameter", "1")
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "setting the kernel parameter net.no_such_parameter to \"1\""
        );
    }

    #[test]
    fn namespaces_of_the_spec_become_flags() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion": "1.1.0", "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}]}}"#,
        )
        .unwrap();
        assert_eq!(
            new_namespaces(&spec),
            libc::CLONE_NEWNS | libc::CLONE_NEWPID
        );
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion": "1.1.0", "linux": {"namespaces": [{"type": "mount"}, {"type": "pid", "path": "/x"}]}}"#,
        )
        .unwrap();
        assert_eq!(new_namespaces(&spec), libc::CLONE_NEWNS);
    }
}

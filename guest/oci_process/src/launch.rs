// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The agent's side: start a helper, learn the pid, let the process get ready, let it run.
//!
//! ```text
//! launch() -> Launched --ready()--> Ready --start()--> running
//! ```
//! Each step consumes the one before it. A value dropped on the way closes the channel, and the process ends by itself.
//! The calls block; the caller gives them a thread.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::channel::{Channel, Message, PROCEED, START, Tag};
use crate::child::{Kind, Request, shared_pid_namespace};
use crate::error::Context as _;
use crate::{Error, check};

/// What the new process is connected to. A missing stream is `/dev/null`.
#[derive(Debug, Default)]
pub struct Streams {
    /// Gives the process a terminal instead of the three streams.
    pub terminal: bool,
    /// The process's standard input.
    pub stdin: Option<OwnedFd>,
    /// The process's standard output.
    pub stdout: Option<OwnedFd>,
    /// The process's standard error.
    pub stderr: Option<OwnedFd>,
}

/// A process to make.
#[derive(Debug)]
pub struct Job<'a> {
    /// How the helper is run: this program and argument must end up in [`crate::helper_main`].
    pub helper: (&'a Path, &'a str),
    /// The directory of the cgroup that the process starts in.
    pub cgroup: PathBuf,
    /// Its streams.
    pub streams: Streams,
}

/// A process that waits and has a pid.
#[derive(Debug)]
pub struct Launched {
    channel: Channel,
    pid: Pid,
    pidfd: OwnedFd,
    terminal: bool,
}

/// A process that lacks only its program.
#[derive(Debug)]
pub struct Ready {
    channel: Channel,
}

/// Makes the init of a container with the id `id`, whose root file system is mounted at `rootfs`. A spec whose pid namespace
/// has a path goes with the pidfd of a process in that namespace, which the init joins.
///
/// # Errors
/// [`Error`]; nothing is left of the process.
pub fn launch_init(
    job: Job<'_>,
    id: &str,
    spec: &Spec,
    rootfs: &Path,
    shares_pids_with: Option<OwnedFd>,
) -> Result<Launched, Error> {
    check::check_spec(spec)?;
    if shared_pid_namespace(spec).is_some() != shares_pids_with.is_some() {
        return Err(Error::invalid(
            "linux.namespaces[pid].path",
            "is for a namespace of the pod, which is not known here",
        ));
    }
    let kind = Kind::Init {
        id: id.to_owned(),
        spec: spec.clone(),
        rootfs: rootfs.to_owned(),
    };
    launch(job, kind, shares_pids_with)
}

/// Makes a further process in the container that `spec` describes and whose init is `init`.
///
/// # Errors
/// [`Error`]; nothing is left of the process.
pub fn launch_exec(
    job: Job<'_>,
    spec: &Spec,
    init: impl AsFd,
    mut process: Process,
) -> Result<Launched, Error> {
    check::check_process(&process)?;
    let linux = spec.linux().as_ref();
    if let Some(container) = spec.process() {
        if process.capabilities().is_none() {
            process.set_capabilities(container.capabilities().clone());
        }
        if process.oom_score_adj().is_none() {
            process.set_oom_score_adj(container.oom_score_adj());
        }
    }
    let namespaces: Vec<LinuxNamespaceType> = linux
        .and_then(|linux| linux.namespaces().as_ref())
        .into_iter()
        .flatten()
        .map(oci_spec::runtime::LinuxNamespace::typ)
        .collect();
    let kind = Kind::Exec {
        process,
        namespaces,
        seccomp: linux.and_then(|linux| linux.seccomp().clone()),
        personality: linux.and_then(|linux| linux.personality().clone()),
    };
    launch(
        job,
        kind,
        Some(
            init.as_fd()
                .try_clone_to_owned()
                .step(|| "doubling a pidfd".to_owned())?,
        ),
    )
}

fn launch(job: Job<'_>, kind: Kind, joined: Option<OwnedFd>) -> Result<Launched, Error> {
    let streams = job.streams;
    let request = Request {
        kind,
        cgroup: job.cgroup,
        terminal: streams.terminal,
        streams: [
            streams.stdin.is_some(),
            streams.stdout.is_some(),
            streams.stderr.is_some(),
        ],
    };
    let json = serde_json::to_vec(&request).map_err(|_| Error::Protocol("the request's JSON"))?;
    let (ours, theirs) = UnixStream::pair().step(|| "making a pair of sockets".to_owned())?;
    let (program, argument) = job.helper;
    // The child is reaped with all others of the agent, by pid.
    drop(
        Command::new(program)
            .arg(argument)
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .step(|| format!("starting {}", program.display()))?,
    );
    let channel = Channel::new(ours.into());
    let descriptors: Vec<OwnedFd> = joined
        .into_iter()
        .chain(streams.stdin)
        .chain(streams.stdout)
        .chain(streams.stderr)
        .collect();
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let sent = channel.send(Tag::Request, &json, &borrowed);
    drop(borrowed);
    drop(descriptors);
    match sent {
        // The helper says why before it goes.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        other => other.step(|| "sending the request".to_owned())?,
    }
    let message = expect(&channel, "the process was being made")?;
    let pid = <[u8; 4]>::try_from(message.payload.as_slice())
        .ok()
        .filter(|_| message.tag == Tag::Pid)
        .and_then(|bytes| Pid::from_raw(i32::from_le_bytes(bytes)))
        .ok_or(Error::Protocol("the process's pid"))?;
    let pidfd = pidfd_open(pid, PidfdFlags::NONBLOCK).step(|| "opening a pidfd".to_owned())?;
    Ok(Launched {
        channel,
        pid,
        pidfd,
        terminal: request.terminal,
    })
}

/// The next message, unless it is an error's text or the other end is gone.
fn expect(channel: &Channel, during: &'static str) -> Result<Message, Error> {
    let message = channel
        .receive()
        .step(|| "listening to the child process".to_owned())?;
    let message = message.ok_or(Error::Vanished(during))?;
    if message.tag == Tag::Failed {
        return Err(Error::Child(
            String::from_utf8_lossy(&message.payload).into_owned(),
        ));
    }
    Ok(message)
}

impl Launched {
    /// The pid in the caller's namespace. The process does not end by itself before [`Self::ready`] is called.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// A pidfd of the process.
    pub fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Lets the process get ready, and gives its terminal's controlling end if it was asked for.
    ///
    /// # Errors
    /// [`Error`]; the process has ended or is about to.
    pub fn ready(self) -> Result<(Ready, Option<OwnedFd>), Error> {
        const DURING: &str = "it was getting ready";
        match self.channel.send_byte(PROCEED) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            other => other.step(|| "letting the process go on".to_owned())?,
        }
        let mut terminal = None;
        loop {
            let message = expect(&self.channel, DURING)?;
            match message.tag {
                Tag::Terminal => terminal = message.descriptors.into_iter().next(),
                Tag::Ready if self.terminal == terminal.is_some() => {
                    return Ok((
                        Ready {
                            channel: self.channel,
                        },
                        terminal,
                    ));
                }
                _ => return Err(Error::Protocol("the order of messages")),
            }
        }
    }
}

impl Ready {
    /// Runs the program, and comes back when it has been loaded.
    ///
    /// # Errors
    /// [`Error`]; the process has ended or is about to.
    pub fn start(self) -> Result<(), Error> {
        match self.channel.send_byte(START) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Err(Error::Vanished("waiting to be started"));
            }
            other => other.step(|| "letting the process start".to_owned())?,
        }
        match self
            .channel
            .receive()
            .step(|| "listening to the child process".to_owned())?
        {
            None => Ok(()),
            Some(message) if message.tag == Tag::Failed => Err(Error::Child(
                String::from_utf8_lossy(&message.payload).into_owned(),
            )),
            Some(_) => Err(Error::Protocol("the order of messages")),
        }
    }
}

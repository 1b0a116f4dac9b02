// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Where jobs with VMs run: on this machine if its KVM can run a guest, else in the nested node, a machine emulated by
//! QEMU with AMD SVM, in which Debian's kernel offers a real `/dev/kvm`.
//!
//! Both give a job the same paths and a containerd of its own. A node runs one job and ends. Nodes are independent of
//! each other: no fixed ports, no fixed paths, a data disk that nobody else sees. A node ends at the latest when the
//! thread that started it does.

mod child;
mod host;
mod image;
mod modules;
mod qemu;
mod tsc;

use std::fs;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use self::image::Image;
use crate::process;
use crate::step::seconds;

/// From QEMU's start to a running containerd. About 8 s on an idle machine of 2 cores; a busy one gets time.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
/// From a job's end to QEMU's.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Where jobs run.
pub(crate) enum Place {
    /// On this machine.
    Host,
    /// In an emulated machine.
    Nested(Image),
}

/// The pipes of a job that was started.
struct Running {
    process: Child,
    out: PipeReader,
    err: PipeReader,
    control: PipeReader,
}

/// What a node does.
pub(crate) enum Work<'a> {
    /// Runs a script with `sh`, its outputs apart.
    Script(&'a str),
    /// Gives the user a shell on this terminal.
    Terminal,
}

/// A job for a node.
pub(crate) struct Job<'a> {
    /// What to do.
    pub(crate) work: Work<'a>,
    /// Seen by the job as `/job`, writable: artefacts go here, and the node's own logs.
    pub(crate) folder: &'a Path,
    /// The built tree, seen as `/opt/coffer`.
    pub(crate) dist: &'a Path,
    /// The checkout, seen as `/src`.
    pub(crate) source: &'a Path,
    /// Images imported before the job starts: containerd's namespace, and the file's name in `dist/images`.
    pub(crate) images: &'a [(&'a str, &'a str)],
    /// The machine.
    pub(crate) machine: Machine,
}

/// The size of a node and how long it may take.
#[derive(Clone, Copy)]
pub(crate) struct Machine {
    /// Memory in MiB.
    pub(crate) memory_mib: u32,
    /// The longest time a job may take; a job on a terminal has none.
    pub(crate) limit: Option<Duration>,
    /// Counts instructions in place of time (`-icount`): slower, on one thread, and the same every time.
    pub(crate) count_instructions: bool,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            memory_mib: 3072,
            limit: None,
            count_instructions: false,
        }
    }
}

impl Place {
    /// This machine if a probe guest runs on its KVM, else the nested node. Says which, and why.
    ///
    /// # Errors
    /// When the nested node cannot be made.
    pub(crate) fn choose() -> Result<Self> {
        match kvm_probe::probe(Path::new("/dev/kvm")) {
            Ok(report) => {
                eprintln!(
                    "==> this machine's KVM runs guests (probed in {})",
                    seconds(report.elapsed)
                );
                Ok(Self::Host)
            }
            Err(reason) => {
                eprintln!(
                    "==> using the nested node, for this machine's KVM cannot run guests: {reason}"
                );
                Self::nested()
            }
        }
    }

    /// The nested node, whatever this machine can do.
    ///
    /// # Errors
    /// When its image cannot be made.
    pub(crate) fn nested() -> Result<Self> {
        Ok(Self::Nested(image::ensure()?))
    }

    /// Runs `job` to its end and returns its exit code. What it writes arrives at `out` and `err` as it is written.
    ///
    /// # Errors
    /// When the node does not boot or the job does not end in time; the end of the node's console is in the error.
    pub(crate) fn run(
        &self,
        job: &Job,
        out: &mut (dyn Write + Send),
        err: &mut (dyn Write + Send),
    ) -> Result<i32> {
        prepare(job)?;
        match self {
            Self::Host => {
                let (running, folders) = host::start(job)?;
                let code = follow(running, job, out, err)?;
                folders.remove()?;
                Ok(code)
            }
            Self::Nested(image) => {
                let running = qemu::start(image, job)?;
                follow(running, job, out, err).with_context(|| {
                    let console = job.folder.join("console.log");
                    let text = fs::read(&console).unwrap_or_default();
                    let end = process::last_lines(&String::from_utf8_lossy(&text));
                    format!(
                        "nested node; its console is in {} and ends:\n{end}\n",
                        console.display()
                    )
                })
            }
        }
    }
}

/// Relays the job's output until it ends; its exit code.
fn follow(
    mut running: Running,
    job: &Job,
    out: &mut (dyn Write + Send),
    err: &mut (dyn Write + Send),
) -> Result<i32> {
    let (job_out, job_err) = (running.out, running.err);
    thread::scope(|scope| {
        scope.spawn(move || relay(job_out, out));
        scope.spawn(move || relay(job_err, err));
        let ended = watch(&mut running.control, job.machine.limit);
        if ended.is_err() {
            ask_where_it_hangs(&mut running.process, &running.control);
        }
        // Also what ends the two threads above: their pipes have no writer any more.
        stop(&mut running.process);
        ended
    })
}

/// Leaves in the job's folder what `ci/node/boot` looks for.
fn prepare(job: &Job) -> Result<()> {
    let write = |name: &str, text: &str| {
        let path = job.folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    fs::create_dir_all(job.folder)
        .with_context(|| format!("cannot create {}", job.folder.display()))?;
    let images: String = job
        .images
        .iter()
        .map(|(namespace, archive)| format!("{namespace} {archive}\n"))
        .collect();
    write("images", &images)?;
    match job.work {
        Work::Script(text) => write("script", text),
        Work::Terminal => {
            let size = process::output(
                std::process::Command::new("stty").args(["-F", "/dev/tty", "size"]),
            );
            let size = size.unwrap_or_default();
            let (rows, columns) = size.trim().split_once(' ').unwrap_or(("24", "80"));
            write("terminal", &format!("stty rows {rows} cols {columns}\n"))
        }
    }
}

/// Copies until nobody can write any more. A reader that has gone away is no reason to stop the job.
fn relay(mut from: PipeReader, to: &mut (dyn Write + Send)) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = buffer.get(..count).unwrap_or_default();
        to.write_all(bytes).and_then(|()| to.flush()).ok();
    }
}

/// Follows what the node says on its control port (see `ci/node/boot`) until it ends; the job's exit code.
fn watch(control: &mut PipeReader, limit: Option<Duration>) -> Result<i32> {
    let begin = Instant::now();
    let mut deadline = Some(begin + BOOT_LIMIT);
    let mut phase = "boot";
    let mut said = String::new();
    let mut code = None;
    loop {
        while let Some((line, rest)) = said.split_once('\n') {
            if line.starts_with("ready") {
                eprintln!("==> node: ready after {}", seconds(begin.elapsed()));
                (deadline, phase) = (limit.map(|limit| Instant::now() + limit), "finish its job");
            } else if let Some(number) = line.strip_prefix("exit ") {
                code = Some(
                    number
                        .parse()
                        .with_context(|| format!("the node said {line:?}"))?,
                );
                (deadline, phase) = (Some(Instant::now() + STOP_LIMIT), "stop");
            }
            said = rest.to_owned();
        }
        if !readable(control, deadline)? {
            bail!(
                "the node did not {phase} in time, {} after its start",
                seconds(begin.elapsed())
            );
        }
        let mut buffer = [0; 256];
        match control
            .read(&mut buffer)
            .context("cannot read the node's control port")?
        {
            0 => return code.context("the node ended before its job did"),
            count => said.push_str(&String::from_utf8_lossy(
                buffer.get(..count).unwrap_or_default(),
            )),
        }
    }
}

/// Whether there is something to read before the deadline.
fn readable(pipe: &PipeReader, deadline: Option<Instant>) -> Result<bool> {
    loop {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(io::Error::from(error)).context("cannot wait for the node"),
        }
    }
}

/// Has a nested node's processor show its registers and its kernel panic, which leaves in `monitor.log` and on the console
/// what it was at.
fn ask_where_it_hangs(process: &mut Child, control: &PipeReader) {
    let Some(mut monitor) = process.stdin.take() else {
        return;
    };
    // Best effort: the job has failed already. QEMU ends with its kernel.
    let _unheard = monitor.write_all(b"info registers\ninfo pic\nnmi\n");
    let _still_there = readable(control, Some(Instant::now() + STOP_LIMIT));
}

fn stop(process: &mut Child) {
    // Its control port has ended or its time is over: it has either gone or has to.
    process.kill().ok();
    process.wait().ok();
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The pumps: one task for each stream, which owns both of its ends.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use agent_proto::{ProcessKey, api};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::ioctl_fionread;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use super::fifo::{splice, watch};
use super::streams::{FlowGuard, Stdin};
use crate::client::AgentClient;

/// The buffer of a stream that cannot be spliced, in bytes.
const BUFFER_LEN: usize = 64 << 10;

/// Where output goes on the host.
pub(super) enum Sink {
    /// A FIFO, open for reading and writing, non-blocking.
    Fifo(OwnedFd),
    /// Any other file, appended to.
    File(tokio::fs::File),
}

/// How often a FIFO that nobody reads is looked at.
const READER_CHECK: Duration = Duration::from_millis(100);

/// Passes on a process's output until as much has come as the guest announced, or the connection ends. The FIFO is closed
/// then; if nobody has it open, as while containerd restarts, that waits for a reader.
pub(super) async fn output(socket: UnixStream, sink: Sink, mut flow: FlowGuard) {
    let result = match sink {
        Sink::Fifo(fifo) => to_fifo(socket, fifo, &mut flow).await,
        Sink::File(file) => to_file(socket, file, &mut flow).await.map(|()| None),
    };
    match result {
        Ok(Some(unread)) => {
            // All has been passed on: nobody waits for this.
            drop(flow);
            read_by_somebody(&unread).await;
        }
        Ok(None) => {}
        Err(error) => tracing::warn!(kind = ?flow.kind(), %error, "an output stream broke off"),
    }
}

/// Ends with the FIFO closed, or with what keeps its contents if there are any and nobody reads.
async fn to_fifo(
    socket: UnixStream,
    fifo: OwnedFd,
    flow: &mut FlowGuard,
) -> io::Result<Option<OwnedFd>> {
    let socket = watch(Arc::new(socket.into_std()?.into()), Interest::READABLE)?;
    let fifo = Arc::new(fifo);
    flow.show(&fifo);
    let fifo = watch(fifo, Interest::WRITABLE)?;
    while !flow.is_complete() {
        let moved = tokio::select! {
            moved = splice(&socket, &fifo) => moved?,
            () = flow.announced() => continue,
        };
        if moved == 0 {
            break;
        }
        flow.count(moved);
    }
    Ok(unread(fifo.into_inner()))
}

/// The kernel throws away what is in a FIFO when nobody has it open. Closes our end, which reads too, unless that would be
/// so; then what is left is open for writing alone.
fn unread(fifo: Arc<OwnedFd>) -> Option<OwnedFd> {
    if !matches!(ioctl_fionread(&fifo), Ok(1..)) {
        return None;
    }
    let path = format!("/proc/self/fd/{}", fifo.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let writer = open(path, flags, Mode::empty()).ok()?;
    drop(fifo);
    (!has_reader(&writer)).then_some(writer)
}

async fn read_by_somebody(writer: &OwnedFd) {
    while !has_reader(writer) {
        tokio::time::sleep(READER_CHECK).await;
    }
}

/// poll(2): a writer of a FIFO without readers is told of an error.
fn has_reader(writer: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(writer, PollFlags::empty())];
    match poll(&mut fds, Some(&Timespec::default())) {
        Ok(_) => fds.iter().all(|fd| !fd.revents().contains(PollFlags::ERR)),
        // Nothing to wait for.
        Err(_) => true,
    }
}

async fn to_file(
    mut socket: UnixStream,
    mut file: tokio::fs::File,
    flow: &mut FlowGuard,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_LEN];
    while !flow.is_complete() {
        let len = tokio::select! {
            len = socket.read(&mut buffer) => len?,
            () = flow.announced() => continue,
        };
        let Some(bytes) = buffer.get(..len).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        file.write_all(bytes).await?;
        flow.count(len);
    }
    file.flush().await
}

/// Passes on stdin, from the process's start until its FIFO has no writer any more, then tells the guest how much there
/// was. The connection stays open until the task is aborted: what is still under way in it must not be cut off.
pub(super) async fn input(
    stdin: Arc<Stdin>,
    socket: UnixStream,
    process: ProcessKey,
    client: Arc<AgentClient>,
) {
    let fifo = match stdin.opened().await {
        Ok(fifo) => fifo,
        Err(error) => {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the process has no stdin"
            );
            return;
        }
    };
    match from_fifo(fifo, socket, &stdin).await {
        Ok(_socket) => {
            let request = api::CloseStdinRequest {
                process: Some(process_ref(&process)).into(),
                bytes: stdin.passed(),
                ..Default::default()
            };
            if let Err(error) = client.close_stdin(&request).await {
                // The process has mostly ended by then.
                tracing::debug!(%error, "stdin was not closed in the guest");
            }
            std::future::pending::<()>().await;
        }
        // The process closed its end: nothing is read any more, and the writer gets EPIPE.
        Err(error) => tracing::debug!(%error, "stdin broke off"),
    }
}

async fn from_fifo(
    fifo: OwnedFd,
    socket: UnixStream,
    stdin: &Stdin,
) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    let fifo = Arc::new(fifo);
    stdin.show(&fifo);
    let fifo = watch(fifo, Interest::READABLE)?;
    let socket = watch(Arc::new(socket.into_std()?.into()), Interest::WRITABLE)?;
    loop {
        let moved = splice(&fifo, &socket).await?;
        if moved == 0 {
            return Ok(socket);
        }
        stdin.count(moved);
    }
}

/// The wire form of a process's name.
pub(super) fn process_ref(process: &ProcessKey) -> api::ProcessRef {
    api::ProcessRef {
        container_id: process.container.to_string(),
        exec_id: process
            .exec
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        generation: process.generation.0,
        ..Default::default()
    }
}

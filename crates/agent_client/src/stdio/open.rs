// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Opens containerd's ends. Never waits for a peer, and never blocks later because one has gone away.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_proto::{ProcessKey, STDIO_PORT, StreamHeader, StreamKind, api};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tracing::Instrument;

use super::pump::{self, Sink};
use super::streams::{FlowGuard, Streams};
use super::{StdioPaths, StreamConnector, TerminalSize};
use crate::client::AgentClient;

/// How much an output FIFO holds, in bytes. Measured from a socket through a FIFO to a reader: 2.6 GiB/s, and 1.7 GiB/s
/// with the kernel's default of 64 KiB.
const FIFO_LEN: usize = 256 << 10;

/// How long a stream's header may take to go into its connection, which is empty.
const HEADER_DEADLINE: Duration = Duration::from_secs(5);

/// Why a stream cannot be.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The URI's scheme is not known here.
    #[error("stdio {uri:?} cannot be served: use a FIFO's path or a file:// URI")]
    Scheme {
        /// The URI.
        uri: String,
    },
    /// stdin must be a FIFO, so that it can be waited for.
    #[error("stdin {} is no FIFO", path.display())]
    NotFifo {
        /// The path.
        path: PathBuf,
    },
    /// A file cannot be opened.
    #[error("open stdio {}", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The guest did not take a stream's connection.
    #[error("connect {kind:?} to the guest")]
    Connect {
        /// Which stream.
        kind: StreamKind,
        /// Why not.
        source: io::Error,
    },
}

/// containerd's ends of a process's streams, before they are connected. Dropping it closes them.
pub struct HostStdio {
    terminal: bool,
    outputs: Vec<(StreamKind, Sink, FlowGuard)>,
    streams: Arc<Streams>,
}

impl HostStdio {
    /// Opens what `paths` name.
    ///
    /// * Output FIFOs are opened for reading too, which makes the open return at once and keeps the FIFO alive while
    ///   containerd restarts: no EPIPE for us, no end of file for the next reader.
    /// * Stdin's FIFO is looked at now and opened by [`Streams::begin_stdin`].
    ///
    /// # Errors
    /// Any [`StdioError`] but [`StdioError::Connect`].
    pub fn open(paths: &StdioPaths) -> Result<Self, StdioError> {
        let stdin = match paths.stdin.as_str() {
            "" => None,
            uri => {
                let path = host_path(uri)?;
                if !is_fifo(&open_at(&path, OFlags::PATH)?, &path)? {
                    return Err(StdioError::NotFifo { path });
                }
                Some(path)
            }
        };
        let mut named = vec![(StreamKind::Stdout, paths.stdout.as_str())];
        if !paths.terminal {
            named.push((StreamKind::Stderr, paths.stderr.as_str()));
        }
        named.retain(|(_, uri)| !uri.is_empty());
        let kinds = named.iter().map(|(kind, _)| *kind);
        let streams = Arc::new(Streams::new(stdin, kinds));
        let outputs = named
            .into_iter()
            .map(|(kind, uri)| Ok((kind, open_sink(uri)?, FlowGuard::new(&streams, kind))))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            terminal: paths.terminal,
            outputs,
            streams,
        })
    }

    /// The handle by which the streams are seen and steered, now and later.
    pub fn streams(&self) -> Arc<Streams> {
        Arc::clone(&self.streams)
    }

    /// What the guest is to make of it; `size` is the terminal's.
    pub fn wanted(&self, size: TerminalSize) -> api::Stdio {
        let has = |kind| self.outputs.iter().any(|(have, ..)| *have == kind);
        api::Stdio {
            terminal: self.terminal,
            stdin: self.streams.stdin().is_some(),
            stdout: has(StreamKind::Stdout),
            stderr: has(StreamKind::Stderr),
            columns: size.columns,
            rows: size.rows,
            ..Default::default()
        }
    }

    /// Connects every stream of a process that exists in the guest, and starts to pump.
    ///
    /// # Errors
    /// [`StdioError::Connect`]; everything is closed then.
    pub async fn connect(
        self,
        process: &ProcessKey,
        connector: &dyn StreamConnector,
        client: &Arc<AgentClient>,
    ) -> Result<(), StdioError> {
        let streams = self.streams;
        // Of the highest level, so that its ids are on every line.
        let span = tracing::error_span!(
            "stdio",
            container_id = process.container.as_str(),
            exec_id = process.exec.as_ref().map(|exec| exec.as_str()),
        );
        for (kind, sink, flow) in self.outputs {
            let socket = connect_one(process, kind, connector).await?;
            let task = tokio::spawn(pump::output(socket, sink, flow).instrument(span.clone()));
            streams.own(task.abort_handle());
        }
        if let Some(stdin) = streams.stdin() {
            let socket = connect_one(process, StreamKind::Stdin, connector).await?;
            let pump = pump::input(stdin, socket, process.clone(), Arc::clone(client));
            let task = tokio::spawn(pump.instrument(span));
            streams.own(task.abort_handle());
        }
        Ok(())
    }
}

async fn connect_one(
    process: &ProcessKey,
    kind: StreamKind,
    connector: &dyn StreamConnector,
) -> Result<UnixStream, StdioError> {
    let failed = |source| StdioError::Connect { kind, source };
    let header = StreamHeader {
        process: process.clone(),
        kind,
    };
    let mut socket = connector.connect(STDIO_PORT).await.map_err(failed)?;
    let header = header.encode();
    match timeout(HEADER_DEADLINE, socket.write_all(&header)).await {
        Ok(written) => written.map_err(failed)?,
        Err(elapsed) => return Err(failed(elapsed.into())),
    }
    Ok(socket)
}

fn host_path(uri: &str) -> Result<PathBuf, StdioError> {
    let path = match uri.split_once("://") {
        None => uri,
        Some(("file" | "fifo", path)) => path,
        Some(_) => "",
    };
    if !path.starts_with('/') {
        let uri = uri.to_owned();
        return Err(StdioError::Scheme { uri });
    }
    Ok(PathBuf::from(path))
}

fn open_sink(uri: &str) -> Result<Sink, StdioError> {
    let path = host_path(uri)?;
    if uri.starts_with("file://") {
        let file = open_file(&path)?;
        return Ok(Sink::File(file.into()));
    }
    let fd = open_at(&path, OFlags::RDWR)?;
    if is_fifo(&fd, &path)? {
        // Fewer wake-ups; a node that has used up its pipe memory goes on with the kernel's default.
        if let Err(error) = rustix::pipe::fcntl_setpipe_size(&fd, FIFO_LEN) {
            tracing::debug!(%error, "a FIFO stays as small as it is");
        }
        return Ok(Sink::Fifo(fd));
    }
    let file = open_file(&path)?;
    Ok(Sink::File(file.into()))
}

fn open_file(path: &Path) -> Result<std::fs::File, StdioError> {
    let opened = std::fs::File::options()
        .create(true)
        .append(true)
        .open(path);
    opened.map_err(|source| StdioError::Open {
        path: path.to_owned(),
        source,
    })
}

pub(super) fn open_at(path: &Path, access: OFlags) -> Result<OwnedFd, StdioError> {
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    open(path, flags, Mode::empty()).map_err(|error| StdioError::Open {
        path: path.to_owned(),
        source: error.into(),
    })
}

fn is_fifo(fd: &OwnedFd, path: &Path) -> Result<bool, StdioError> {
    let stat = fstat(fd).map_err(|error| StdioError::Open {
        path: path.to_owned(),
        source: error.into(),
    })?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Fifo)
}

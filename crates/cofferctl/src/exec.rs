// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `exec`: a debugging shell in a guest, on this program's own terminal or streams.
//!
//! The shell's streams are FIFOs in a directory for root alone, which goes with this program. Both ends of each are held
//! from before the call: what is written before the shim opens its end is not lost, and the end of a stream is that of
//! its writer.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use shim_api::SHELL_PREFIX;
use shim_api::api::{ExecRequest, Terminal};
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::node::Sandbox;
use crate::shim::Shim;

/// As much as a FIFO holds.
const BUFFER_LEN: usize = 64 << 10;

/// Runs `command` in the guest to its end. The exit code is its own.
pub(crate) async fn run(sandbox: &Sandbox, command: &[String]) -> Result<ExitCode> {
    let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
    let shim = Shim::connect(sandbox).await?;
    let streams = Streams::make(terminal)?;
    let mut request = ExecRequest {
        id: format!("{SHELL_PREFIX}{}", std::process::id()),
        args: command.to_vec(),
        stdin: text(&streams.path("stdin")),
        stdout: text(&streams.path("stdout")),
        ..ExecRequest::default()
    };
    if terminal {
        request.terminal = Some(own_terminal()).into();
    } else {
        request.stderr = text(&streams.path("stderr"));
    }
    let (copies, _stdin) = streams.connect(terminal)?;
    let raw = terminal.then(RawTerminal::enter).transpose()?;
    let status = attend(&shim, &request, copies).await;
    drop(raw);
    // 128 and more are a shell's way of telling of a signal; statuses are of one byte.
    Ok(ExitCode::from(u8::try_from(status?).unwrap_or(u8::MAX)))
}

/// Waits for the shell's end and then for that of its output. This program's own end is the shell's: the shim ends it
/// when the connection does.
async fn attend(shim: &Shim, request: &ExecRequest, copies: Vec<Copied>) -> Result<u32> {
    let mut resized = signal(SignalKind::window_change())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut hung_up = signal(SignalKind::hangup())?;
    let ended = async {
        let status = shim.exec(request).await?;
        for copied in copies {
            copied.await.context("the output was not read")??;
        }
        Ok(status)
    };
    tokio::pin!(ended);
    loop {
        tokio::select! {
            ended = &mut ended => return ended,
            _ = resized.recv(), if request.terminal.is_some() => {
                let size = own_terminal();
                // One that has not begun or has ended has no size.
                let _gone = shim.resize(&request.id, size.columns, size.rows).await;
            }
            _ = interrupted.recv() => bail!("interrupted"),
            _ = terminated.recv() => bail!("terminated"),
            _ = hung_up.recv() => bail!("hung up"),
        }
    }
}

fn own_terminal() -> Terminal {
    let size = tcgetwinsize(io::stdout()).ok();
    Terminal {
        term: std::env::var("TERM").unwrap_or_default(),
        columns: size.map_or(0, |size| size.ws_col.into()),
        rows: size.map_or(0, |size| size.ws_row.into()),
        ..Terminal::default()
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Tells that an output stream was copied to its end.
type Copied = oneshot::Receiver<io::Result<()>>;

/// The FIFOs of a shell.
struct Streams {
    dir: TempDir,
}

impl Streams {
    fn make(terminal: bool) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("cofferctl-")
            .tempdir()
            .context("make a directory for the shell's streams")?;
        let streams = Self { dir };
        for name in Self::names(terminal) {
            let path = streams.path(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
                .with_context(|| format!("make {}", path.display()))?;
        }
        Ok(streams)
    }

    fn names(terminal: bool) -> &'static [&'static str] {
        if terminal {
            &["stdin", "stdout"]
        } else {
            &["stdin", "stdout", "stderr"]
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Begins to copy. The threads end with their streams, or with this program. The file is for keeping: a reader that
    /// never reads, it keeps what is in stdin's FIFO until the shim has opened it.
    fn connect(&self, terminal: bool) -> Result<(Vec<Copied>, File)> {
        let holder = self.reader("stdin")?;
        let path = self.path("stdin");
        let mut writer = OpenOptions::new()
            .write(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        thread::spawn(move || {
            // A shell that has ended takes no more.
            let _ended = io::copy(&mut io::stdin().lock(), &mut writer);
        });
        let mut copies = vec![copy(self.reader("stdout")?, io::stdout())];
        if !terminal {
            copies.push(copy(self.reader("stderr")?, io::stderr()));
        }
        Ok((copies, holder))
    }

    /// Opens without waiting for a writer.
    fn reader(&self, name: &str) -> Result<File> {
        let path = self.path(name);
        let flags = i32::try_from(OFlags::NONBLOCK.bits())?;
        OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))
    }
}

fn copy(from: File, to: impl Write + Send + 'static) -> Copied {
    let (sender, copied) = oneshot::channel();
    thread::spawn(move || {
        // With nobody to hear it there is nobody to tell.
        let _gone = sender.send(copy_to_end(from, to));
    });
    copied
}

/// A FIFO that never had a writer has no end yet: `poll` waits for the first.
fn copy_to_end(mut from: File, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        match poll(&mut [PollFd::new(&from, PollFlags::IN)], None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        };
        to.write_all(buffer.get(..count).unwrap_or_default())?;
        to.flush()?;
    }
}

/// This program's terminal with every key going to the shell, until it is dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Result<Self> {
        let before = tcgetattr(io::stdin()).context("read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).context("set the terminal")?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that has gone needs no settings.
        let _gone = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

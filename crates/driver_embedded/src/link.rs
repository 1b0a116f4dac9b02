// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Calls and answers over the control socket, and what the VMM says unasked.

use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hypervisor::{DriverError, DriverErrorKind};
use ids::VsockPort;
use nix::sys::socket::MsgFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use vmm::control::{
    Answer, Call, ControlSocket, Message, Received, Refusal, RefusalKind, Request, parse_message,
};

/// Connections of the guest that wait for [`hypervisor::RunningVm::accept`]; further ones are refused.
pub(crate) const WAITING_CONNECTIONS: usize = 64;

/// What a call gets back.
type Outcome = Result<Answer, Refusal>;

/// Why nothing more comes from a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Silence {
    /// It has closed its end: it is on its way out.
    Closed,
    /// It has broken the protocol, and must not go on.
    Violation,
}

/// This process's end of the control socket.
#[derive(Debug)]
pub(crate) struct Link {
    socket: AsyncFd<ControlSocket>,
    calls: Mutex<Calls>,
}

#[derive(Debug, Default)]
struct Calls {
    next_id: u64,
    waiting: HashMap<u64, oneshot::Sender<Outcome>>,
    /// The VMM's end is closed: nothing will be answered.
    closed: bool,
    last_words: Option<LastWords>,
}

/// What a VMM says before it exits.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastWords {
    pub(crate) text: String,
    pub(crate) console: String,
}

impl Link {
    /// Takes the socket over; must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The runtime cannot watch it.
    pub(crate) fn new(socket: ControlSocket) -> io::Result<Self> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        #[expect(
            unsafe_code,
            reason = "tokio wants to be told that the descriptor stays"
        )]
        // SAFETY: a `ControlSocket` owns its descriptor and never exchanges it.
        let socket = unsafe { AsyncFd::register_with_interest(socket, interest) }
            .map_err(io::Error::from)?;
        Ok(Self {
            socket,
            calls: Mutex::default(),
        })
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the VMM and waits for its answer, at most `deadline`.
    ///
    /// # Errors
    /// The VMM's refusal, [`DriverErrorKind::Gone`] or [`DriverErrorKind::Timeout`].
    pub(crate) async fn call(
        &self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<Answer, DriverError> {
        let (id, answer) = self.register()?;
        let exchange = async {
            self.send(&Call { id, request }, descriptors).await?;
            answer.await.map_err(|_| gone())
        };
        let outcome = timeout(deadline, exchange).await;
        self.calls().waiting.remove(&id);
        match outcome {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(refusal))) => Err(refused(refusal)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(DriverError::new(
                DriverErrorKind::Timeout,
                format!("the VMM has not answered within {deadline:?}"),
            )),
        }
    }

    fn register(&self) -> Result<(u64, oneshot::Receiver<Outcome>), DriverError> {
        let mut calls = self.calls();
        if calls.closed {
            return Err(gone());
        }
        let id = calls.next_id;
        calls.next_id = id.wrapping_add(1);
        let (send, answer) = oneshot::channel();
        calls.waiting.insert(id, send);
        Ok((id, answer))
    }

    async fn send(&self, call: &Call, descriptors: &[BorrowedFd<'_>]) -> Result<(), DriverError> {
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                socket.send(call, descriptors, MsgFlags::MSG_DONTWAIT)
            })
            .await
            .map_err(|source| match source.kind() {
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => gone(),
                _ => {
                    DriverError::new(DriverErrorKind::Failed, "cannot call the VMM").because(source)
                }
            })
    }

    /// Takes in what the VMM says until it closes its end, or says what is no message.
    pub(crate) async fn listen(
        &self,
        connections: mpsc::Sender<(VsockPort, UnixStream)>,
    ) -> Silence {
        let silence = loop {
            let received = self
                .socket
                .async_io(Interest::READABLE, |socket| {
                    socket.receive(MsgFlags::MSG_DONTWAIT)
                })
                .await;
            match received {
                Ok(Received::Message(bytes, descriptors)) => match parse_message(&bytes) {
                    Ok(message) => self.take(message, descriptors, &connections),
                    Err(error) => {
                        tracing::error!(%error, "the VMM has sent what is no message");
                        break Silence::Violation;
                    }
                },
                Ok(Received::Closed) => break Silence::Closed,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    break Silence::Closed;
                }
                Err(error) => {
                    tracing::error!(%error, "the control socket has failed");
                    break Silence::Violation;
                }
            }
        };
        let mut calls = self.calls();
        calls.closed = true;
        calls.waiting.clear();
        silence
    }

    fn take(
        &self,
        message: Message,
        descriptors: Vec<OwnedFd>,
        connections: &mpsc::Sender<(VsockPort, UnixStream)>,
    ) {
        match message {
            Message::Answer { id, result } => {
                let waiting = self.calls().waiting.remove(&id);
                if let Some(waiting) = waiting {
                    let _ = waiting.send(result); // the caller may have given up
                }
            }
            Message::GuestConnection { port } => {
                if let Some(stream) = descriptors.into_iter().next().and_then(into_stream) {
                    // If nobody accepts, dropping the stream refuses the connection.
                    let _ = connections.try_send((VsockPort(port), stream));
                }
            }
            Message::Ended { text, console, .. } => {
                self.calls().last_words = Some(LastWords { text, console });
            }
        }
    }

    /// What the VMM said last.
    pub(crate) fn last_words(&self) -> Option<LastWords> {
        self.calls().last_words.clone()
    }
}

fn into_stream(fd: OwnedFd) -> Option<UnixStream> {
    let stream = StdStream::from(fd);
    stream.set_nonblocking(true).ok()?;
    UnixStream::from_std(stream).ok()
}

/// The VM has ended.
pub(crate) fn gone() -> DriverError {
    DriverError::new(DriverErrorKind::Gone, "the VM has ended")
}

fn refused(refusal: Refusal) -> DriverError {
    let kind = match refusal.kind {
        RefusalKind::Config => DriverErrorKind::Unsupported,
        RefusalKind::Artifact => DriverErrorKind::Artifact,
        RefusalKind::Kvm => DriverErrorKind::Node,
        RefusalKind::Exhausted => DriverErrorKind::Exhausted,
        RefusalKind::Conflict => DriverErrorKind::Conflict,
        RefusalKind::Failed => DriverErrorKind::Failed,
    };
    DriverError::new(kind, refusal.text)
}

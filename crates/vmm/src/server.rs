// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The control thread: speaks with the shim, and ends the VM.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use ids::{Mib, VsockPort};
use kvm_ioctls::Kvm;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::MsgFlags;
use virtio_device::vsock::HostPorts;

use crate::control::{
    self, Answer, Call, Config, ControlSocket, MAX_CONSOLE_BYTES, MAX_CONSOLE_TAIL_BYTES, Message,
    Received, Request,
};
use crate::machine::{FileSystemParts, Machine, Resources, ThreadSetup};
use crate::{End, Ends, ExitCode, VmmError, jail};

/// Runs one VM over `socket`, from its configuration to its end, and says how the process shall exit.
pub fn serve(socket: ControlSocket) -> ExitCode {
    let socket = Arc::new(socket);
    match start(&socket) {
        Ok(Some(mut server)) => {
            let code = server.run();
            // The process ends now, and the kernel takes the VM apart.
            std::mem::forget(server);
            code
        }
        Ok(None) => ExitCode::Orphaned,
        Err(error) => end(&socket, error.exit_code(), error.chain(), String::new()),
    }
}

/// Sends the last message.
fn end(socket: &ControlSocket, code: ExitCode, text: String, console: String) -> ExitCode {
    let message = Message::Ended {
        code: code as u8,
        text,
        console,
    };
    // If the shim is gone there is nobody to tell.
    let _ = socket.send(&message, &[], MsgFlags::MSG_DONTWAIT);
    code
}

struct Server {
    socket: Arc<ControlSocket>,
    ends: Arc<Ends>,
    machine: Machine,
}

/// Whether to go on.
enum Next {
    Serve,
    Exit(ExitCode),
}

/// Waits for the configuration and starts the VM; `None` if the shim has gone.
fn start(socket: &Arc<ControlSocket>) -> Result<Option<Server>, VmmError> {
    let Some((call, descriptors)) = receive(socket)? else {
        return Ok(None);
    };
    let Request::Start(config) = call.request else {
        return Err(VmmError::Control {
            reason: "came before the configuration",
            source: None,
        });
    };
    let result = build(socket, &config, descriptors);
    let answer = match &result {
        Ok(_) => Ok(Answer::Done),
        Err(error) => Err(error.into()),
    };
    if let Ok((machine, _)) = &result {
        machine.boot();
    }
    reply(socket, call.id, answer)?;
    let (machine, ends) = result?;
    Ok(Some(Server {
        socket: Arc::clone(socket),
        ends,
        machine,
    }))
}

fn build(
    socket: &Arc<ControlSocket>,
    config: &Config,
    descriptors: Vec<OwnedFd>,
) -> Result<(Machine, Arc<Ends>), VmmError> {
    let host_ports = Box::new(ShimPorts {
        socket: Arc::clone(socket),
    });
    let resources = resources(config, descriptors, host_ports)?;
    if let Some(jail) = &config.jail {
        jail::enter(jail)?;
    }
    let ends = Arc::new(Ends::new()?);
    let setup = match config.jail {
        Some(_) => ThreadSetup {
            io: jail::confine_io,
            vcpu: jail::confine_vcpu,
            spare: jail::confine_spare_vcpu,
        },
        None => ThreadSetup {
            io: || Ok(()),
            vcpu: || Ok(()),
            spare: || Ok(()),
        },
    };
    let machine = Machine::build(config, resources, Arc::clone(&ends), setup)?;
    if config.jail.is_some() {
        jail::confine_control()?;
    }
    Ok((machine, ends))
}

/// Hands connections of the guest to the shim.
struct ShimPorts {
    socket: Arc<ControlSocket>,
}

impl HostPorts for ShimPorts {
    fn open(&mut self, port: VsockPort) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let message = Message::GuestConnection { port: port.0 };
        // A shim that does not keep up refuses, and the guest's flood stays the guest's problem.
        self.socket
            .send(&message, &[theirs.as_fd()], MsgFlags::MSG_DONTWAIT)?;
        Ok(ours)
    }
}

/// Sorts the descriptors of [`Request::Start`].
fn resources(
    config: &Config,
    descriptors: Vec<OwnedFd>,
    host_ports: Box<dyn HostPorts>,
) -> Result<Resources, VmmError> {
    let expected = config
        .disks
        .len()
        .saturating_add(config.networks.len())
        .saturating_add(4)
        .saturating_add(usize::from(config.console_log));
    if descriptors.len() != expected {
        return Err(VmmError::Config {
            reason: format!(
                "{} descriptors came with the configuration, {expected} belong to it",
                descriptors.len()
            ),
        });
    }
    let mut descriptors = descriptors.into_iter();
    let mut next = || {
        descriptors.next().ok_or(VmmError::Control {
            reason: "has too few descriptors",
            source: None,
        })
    };
    let kvm = next()?.into_raw_fd();
    #[expect(unsafe_code, reason = "taking over a descriptor")]
    // SAFETY: the descriptor was just released, so `Kvm` is its only owner.
    let kvm = unsafe { Kvm::from_raw_fd(kvm) };
    let kernel = File::from(next()?);
    let initramfs = File::from(next()?);
    let vsock = UnixListener::from(next()?);
    let console_log = if config.console_log {
        Some(File::from(next()?))
    } else {
        None
    };
    let taps = config
        .networks
        .iter()
        .map(|_| next())
        .collect::<Result<_, _>>()?;
    Ok(Resources {
        kvm,
        kernel,
        initramfs,
        vsock,
        host_ports,
        console_log,
        taps,
        disks: descriptors.map(File::from).collect(),
    })
}

/// One call; `None` if the shim has gone.
fn receive(socket: &ControlSocket) -> Result<Option<(Call, Vec<OwnedFd>)>, VmmError> {
    match socket.receive(MsgFlags::empty()) {
        Ok(Received::Closed) => Ok(None),
        Ok(Received::Message(bytes, descriptors)) => {
            let call = control::parse_call(&bytes).map_err(|error| VmmError::Control {
                reason: "cannot be read",
                source: Some(error.into()),
            })?;
            Ok(Some((call, descriptors)))
        }
        Err(error) => Err(VmmError::Control {
            reason: "cannot be received",
            source: Some(error),
        }),
    }
}

fn reply(
    socket: &ControlSocket,
    id: u64,
    result: Result<Answer, control::Refusal>,
) -> Result<(), VmmError> {
    let message = Message::Answer { id, result };
    socket
        .send(&message, &[], MsgFlags::empty())
        .map_err(|error| VmmError::Control {
            reason: "cannot be sent",
            source: Some(error),
        })
}

impl Server {
    fn run(&mut self) -> ExitCode {
        loop {
            let next = self.wait().and_then(|(ended, called)| {
                if ended {
                    Ok(self.take_end())
                } else if called {
                    self.serve_call()
                } else {
                    Ok(Next::Serve)
                }
            });
            match next {
                Ok(Next::Serve) => {}
                Ok(Next::Exit(code)) => return code,
                Err(error) => {
                    let console = self.console_tail();
                    return end(&self.socket, error.exit_code(), error.chain(), console);
                }
            }
        }
    }

    /// Waits until the VM has ended, or the shim calls.
    fn wait(&self) -> Result<(bool, bool), VmmError> {
        let mut fds = [
            PollFd::new(self.ends.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(VmmError::host("wait for events")(error)),
        }
        let [ended, called] = fds.map(|fd| fd.any().unwrap_or(false));
        Ok((ended, called))
    }

    fn take_end(&self) -> Next {
        let (code, text) = match self.ends.take() {
            None => return Next::Serve,
            Some(End::Guest) => (ExitCode::Guest, ExitCode::Guest.meaning().to_owned()),
            Some(End::Failed(error)) => (error.exit_code(), error.chain()),
        };
        Next::Exit(end(&self.socket, code, text, self.console_tail()))
    }

    fn console_tail(&self) -> String {
        self.console(None, MAX_CONSOLE_TAIL_BYTES).2
    }

    /// The number of the first byte, that of the byte after the last, and the text.
    fn console(&self, from: Option<u64>, most: usize) -> (u64, u64, String) {
        let console = self.machine.console();
        let from = from.unwrap_or_else(|| console.printed().saturating_sub(most as u64));
        let (first, bytes) = console.part(from, most);
        let next = first.saturating_add(bytes.len() as u64);
        (first, next, printable(&bytes))
    }

    fn serve_call(&mut self) -> Result<Next, VmmError> {
        let Some((call, descriptors)) = receive(&self.socket)? else {
            return Ok(Next::Exit(ExitCode::Orphaned));
        };
        let result = self.obey(call.request, descriptors);
        reply(
            &self.socket,
            call.id,
            result.map_err(|error| (&error).into()),
        )?;
        Ok(Next::Serve)
    }

    fn obey(&mut self, request: Request, descriptors: Vec<OwnedFd>) -> Result<Answer, VmmError> {
        match request {
            Request::Start(_) => Err(VmmError::Config {
                reason: "the VM has been started already".to_owned(),
            }),
            Request::AttachDisk(disk) => {
                let file = descriptors.into_iter().next().ok_or(VmmError::Control {
                    reason: "has too few descriptors",
                    source: None,
                })?;
                let device = self.machine.attach_disk(&disk, File::from(file))?;
                Ok(Answer::Attached { device })
            }
            Request::DetachDisk { serial } => {
                self.machine.detach_disk(&serial)?;
                Ok(Answer::Done)
            }
            Request::AttachFileSystem { tag } => {
                let parts = file_system_parts(descriptors)?;
                let device = self.machine.attach_file_system(&tag, parts, &self.ends)?;
                Ok(Answer::Attached { device })
            }
            Request::SetLimits(limits) => {
                self.machine.set_limits(limits);
                Ok(Answer::Done)
            }
            Request::Resize { vcpus, memory_mib } => {
                let size = self.machine.resize(vcpus, Mib(memory_mib))?;
                Ok(Answer::Size(size))
            }
            Request::Console { from } => {
                let most = match from {
                    Some(_) => MAX_CONSOLE_BYTES,
                    None => MAX_CONSOLE_TAIL_BYTES,
                };
                let (from, next, text) = self.console(from, most);
                Ok(Answer::Console { from, next, text })
            }
            Request::Dump => Ok(Answer::Text(self.machine.dump().to_string())),
            Request::Pause => {
                self.machine.pause();
                Ok(Answer::Done)
            }
            Request::Resume => {
                self.machine.resume();
                Ok(Answer::Done)
            }
        }
    }
}

/// Sorts the descriptors of [`Request::AttachFileSystem`].
fn file_system_parts(descriptors: Vec<OwnedFd>) -> Result<FileSystemParts, VmmError> {
    let parts = <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| VmmError::Control {
        reason: "has not the descriptors that belong to it",
        source: None,
    })?;
    let [connection, memory, pagemap] = parts;
    Ok(FileSystemParts {
        connection: UnixStream::from(connection),
        memory: File::from(memory),
        pagemap: File::from(pagemap),
    })
}

/// Guest output as text: what is not printable ASCII or a line end becomes a dot, so that it cannot steer a terminal.
fn printable(bytes: &[u8]) -> String {
    bytes
        .iter()
        .filter(|byte| **byte != b'\r')
        .map(|byte| match byte {
            b'\n' | b'\t' | b' '..=b'~' => char::from(*byte),
            _ => '.',
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_do_not_reach_the_reader() {
        assert_eq!(printable(b"ok\r\n\x1b[2J\xff"), "ok\n.[2J.");
    }
}

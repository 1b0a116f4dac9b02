// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A `coffer-vmm` process under test, driven by hand over its control socket.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test support that panics on misuse"
)]

mod pvh_kernel;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{MsgFlags, setsockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use vmm::boot::BootProtocol;
use vmm::control::{
    Answer, Call, Config, ControlSocket, JailConfig, Message, Received, Refusal, Request,
    parse_message,
};

pub(crate) use pvh_kernel::pvh_kernel;

/// A running VMM; killed on drop.
pub(crate) struct Vmm {
    pub(crate) child: Child,
    pub(crate) socket: Option<ControlSocket>,
    next_id: u64,
}

/// What a VMM is started with besides its configuration.
pub(crate) struct Files {
    pub(crate) kernel: File,
    pub(crate) initramfs: File,
    pub(crate) taps: Vec<OwnedFd>,
    pub(crate) disks: Vec<File>,
}

pub(crate) fn file_with(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

pub(crate) fn files(kernel: &[u8]) -> Files {
    Files {
        kernel: file_with(kernel),
        initramfs: file_with(b""),
        taps: Vec::new(),
        disks: Vec::new(),
    }
}

pub(crate) fn config() -> Config {
    Config {
        vcpus: 1,
        memory_mib: 128,
        boot: BootProtocol::Auto,
        kernel_arguments: String::new(),
        cid: 3,
        host_ports: Vec::new(),
        console_log: false,
        disks: Vec::new(),
        networks: Vec::new(),
        disk_slots: 24,
        jail: Some(JailConfig {
            uid: 64999,
            gid: 64998,
        }),
    }
}

impl Vmm {
    pub(crate) fn spawn() -> Self {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        // A VMM that does not answer is a failed test and not one that hangs.
        setsockopt(&ours, ReceiveTimeout, &TimeVal::seconds(60)).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_coffer-vmm"))
            .stdin(Stdio::from(theirs.into_fd()))
            .spawn()
            .unwrap();
        Self {
            child,
            socket: Some(ours),
            next_id: 1,
        }
    }

    /// Spawns a VMM and starts the VM.
    pub(crate) fn start(config: &Config, files: &Files) -> (Self, Result<Answer, Refusal>) {
        let mut vmm = Self::spawn();
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .unwrap();
        let mut fds = vec![
            kvm.as_fd(),
            files.kernel.as_fd(),
            files.initramfs.as_fd(),
            listener.as_fd(),
        ];
        fds.extend(files.taps.iter().map(AsFd::as_fd));
        fds.extend(files.disks.iter().map(AsFd::as_fd));
        let result = vmm.call(Request::Start(Box::new(config.clone())), &fds);
        (vmm, result)
    }

    pub(crate) fn send(&mut self, request: Request, fds: &[BorrowedFd<'_>]) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let socket = self.socket.as_ref().unwrap();
        socket
            .send(&Call { id, request }, fds, MsgFlags::empty())
            .unwrap();
        id
    }

    pub(crate) fn receive(&self) -> Option<Message> {
        match self
            .socket
            .as_ref()
            .unwrap()
            .receive(MsgFlags::empty())
            .unwrap()
        {
            Received::Message(bytes, _) => Some(parse_message(&bytes).unwrap()),
            Received::Closed => None,
        }
    }

    pub(crate) fn call(
        &mut self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Answer, Refusal> {
        let sent = self.send(request, fds);
        loop {
            match self.receive() {
                Some(Message::Answer { id, result }) => {
                    assert_eq!(id, sent);
                    return result;
                }
                Some(Message::GuestConnection { .. }) => {}
                other => panic!("no answer but {other:?}"),
            }
        }
    }

    /// Code and text of the last message, and how the process ended.
    pub(crate) fn end(&mut self) -> (u8, String, ExitStatus) {
        let (code, text, _) = self.last_words();
        (code, text, self.child.wait().unwrap())
    }

    /// Code, text and console of the last message.
    pub(crate) fn last_words(&mut self) -> (u8, String, String) {
        loop {
            match self.receive() {
                Some(Message::Ended {
                    code,
                    text,
                    console,
                }) => return (code, text, console),
                Some(_) => {}
                None => panic!("no last words: {:?}", self.child.wait()),
            }
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

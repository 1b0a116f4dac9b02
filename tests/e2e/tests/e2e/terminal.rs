// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Containers with a terminal: `ctr run -t` under a terminal of the test's own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use e2e::{BUSYBOX, DEADLINE, Node, RUNTIME};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How often something is done again while waiting for its effect.
const PAUSE: Duration = Duration::from_secs(1);

/// `ctr` on a terminal that the test holds the other end of.
struct Terminal {
    ctr: Child,
    screen: Receiver<Vec<u8>>,
    seen: String,
    keyboard: File,
    slave: OwnedFd,
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

nix::ioctl_write_ptr_bad!(set_size, nix::libc::TIOCSWINSZ, Winsize);

impl Terminal {
    fn run(id: &str, command: &[&str]) -> Self {
        let pty = openpty(Some(&size(24, 80)), None).unwrap();
        let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
        let ctr = Command::new("ctr")
            .args(["run", "--rm", "-t", "--runtime", RUNTIME, BUSYBOX, id])
            .args(command)
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap();
        let keyboard = File::from(pty.master);
        let mut reader = keyboard.try_clone().unwrap();
        let (sender, screen) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            ctr,
            screen,
            seen: String::new(),
            keyboard,
            slave: pty.slave,
        }
    }

    /// Waits until the screen has shown `text`, and forgets what came before it.
    fn expect(&mut self, text: &str) {
        self.expect_while(text, |_| ());
    }

    /// The same, doing something again and again meanwhile.
    fn expect_while(&mut self, text: &str, action: impl Fn(&Self)) {
        let deadline = Instant::now() + DEADLINE;
        while !self.seen.contains(text) {
            assert!(
                Instant::now() < deadline,
                "{text:?} was not shown, but {:?}",
                self.seen
            );
            action(self);
            if let Ok(bytes) = self.screen.recv_timeout(PAUSE) {
                self.seen.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        let end = self.seen.find(text).unwrap() + text.len();
        self.seen.drain(..end);
    }

    fn type_line(&mut self, line: &str) {
        self.keyboard
            .write_all(format!("{line}\n").as_bytes())
            .unwrap();
    }

    #[expect(unsafe_code, reason = "std and nix have no safe call for TIOCSWINSZ")]
    fn resize(&self, rows: u16, columns: u16) {
        use std::os::fd::AsRawFd;
        // SAFETY: the descriptor is an open terminal and the argument a whole winsize.
        unsafe { set_size(self.slave.as_fd().as_raw_fd(), &size(rows, columns)) }.unwrap();
        kill(
            Pid::from_raw(i32::try_from(self.ctr.id()).unwrap()),
            Signal::SIGWINCH,
        )
        .unwrap();
    }
}

#[test]
fn terminal_has_the_users_size_and_follows_it() {
    let _node = Node::new("terminal_has_the_users_size_and_follows_it");
    let script = "stty size; while [ \"$(stty size)\" = '24 80' ]; do sleep 0.1; done; stty size; \
                  read line; echo got-$line; exit 7";
    let mut terminal = Terminal::run("terminal", &["sh", "-c", script]);
    terminal.expect("24 80");
    // ctr hears of it once it listens, which is after the process has started.
    terminal.expect_while("50 132", |terminal| terminal.resize(50, 132));
    terminal.type_line("hello");
    terminal.expect("got-hello");
    assert_eq!(terminal.ctr.wait().unwrap().code(), Some(7));
}

#[test]
fn interrupt_key_reaches_the_foreground_process() {
    let _node = Node::new("interrupt_key_reaches_the_foreground_process");
    let mut terminal = Terminal::run(
        "interrupt",
        &[
            "sh",
            "-c",
            "trap 'exit 9' INT; echo up; while :; do sleep 0.1; done",
        ],
    );
    terminal.expect("up");
    terminal.keyboard.write_all(&[3]).unwrap();
    assert_eq!(terminal.ctr.wait().unwrap().code(), Some(9));
}

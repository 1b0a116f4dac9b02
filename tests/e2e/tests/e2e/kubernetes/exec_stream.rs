// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The streams of an exec or an attach as `kubectl` has them, apart by channel (`v4.channel.k8s.io`).

use std::collections::HashMap;

use crate::web_socket::WebSocket;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// An exec or attach whose streams go through containerd's streaming server.
pub(crate) struct Stream {
    socket: WebSocket,
    received: HashMap<u8, Vec<u8>>,
}

impl Stream {
    pub(crate) fn open(url: &str) -> Self {
        Self {
            socket: WebSocket::open(url),
            received: HashMap::new(),
        }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.socket.send(STDIN, bytes);
    }

    /// Gives the terminal another size.
    pub(crate) fn resize(&mut self, columns: u16, rows: u16) {
        let size = format!("{{\"Width\":{columns},\"Height\":{rows}}}");
        self.socket.send(RESIZE, size.as_bytes());
    }

    /// Waits until stdout has this in it, and gives all that it has had.
    pub(crate) fn expect(&mut self, wanted: &str) -> String {
        loop {
            let seen = self.text(STDOUT);
            if seen.contains(wanted) {
                return seen;
            }
            let more = self.receive();
            let (stderr, status) = (self.text(STDERR), self.text(STATUS));
            assert!(
                more,
                "the stream has ended without {wanted:?}: {seen:?} {stderr:?} {status}"
            );
        }
    }

    /// Takes the stream to its end.
    pub(crate) fn finish(mut self) -> Finished {
        while self.receive() {}
        Finished {
            stdout: self.received.remove(&STDOUT).unwrap_or_default(),
            stderr: self.text(STDERR),
            status: self.text(STATUS),
        }
    }

    fn text(&self, channel: u8) -> String {
        let bytes = self.received.get(&channel).map(Vec::as_slice);
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    }

    /// Takes one message. Gives whether there may be more.
    fn receive(&mut self) -> bool {
        let Some((channel, bytes)) = self.socket.receive() else {
            return false;
        };
        self.received.entry(channel).or_default().extend(bytes);
        true
    }
}

/// What a stream has brought in all.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    /// Kubernetes' Status as JSON: whether it has succeeded, and the exit code if not.
    pub(crate) status: String,
}

impl Finished {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The exit code of the process.
    pub(crate) fn code(&self) -> i32 {
        let status: serde_json::Value = serde_json::from_str(&self.status).unwrap();
        if status["status"] == "Success" {
            return 0;
        }
        let cause = &status["details"]["causes"][0];
        assert_eq!(cause["reason"], "ExitCode", "{status}");
        cause["message"].as_str().unwrap().parse().unwrap()
    }
}

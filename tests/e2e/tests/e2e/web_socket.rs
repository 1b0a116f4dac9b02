// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A client of the streams that containerd serves at a URL: as much of RFC 6455 as that takes, with Kubernetes' channels.

use std::io::{Read, Write};
use std::net::TcpStream;

use e2e::DEADLINE;

/// Every message begins with the number of its channel.
const PROTOCOL: &str = "v4.channel.k8s.io";

/// RFC 6455 §5.2.
const FINAL: u8 = 0x80;
const MASKED: u8 = 0x80;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;

/// An open stream.
pub(crate) struct WebSocket(TcpStream);

impl WebSocket {
    /// Opens what `url` names.
    pub(crate) fn open(url: &str) -> Self {
        let rest = url.strip_prefix("http://").unwrap();
        let (host, path) = rest.split_once('/').unwrap();
        let mut socket = TcpStream::connect(host).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.set_write_timeout(Some(DEADLINE)).unwrap();
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\
             Sec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n"
        );
        socket.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            socket.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.starts_with("HTTP/1.1 101"), "{url}: {answer}");
        Self(socket)
    }

    /// Sends bytes on a channel, at most 64 KiB less one.
    pub(crate) fn send(&mut self, channel: u8, bytes: &[u8]) {
        let len = u16::try_from(bytes.len() + 1).unwrap();
        let mut frame = vec![FINAL | BINARY, MASKED | 126];
        frame.extend(len.to_be_bytes());
        // A mask of zeroes leaves the bytes as they are.
        frame.extend([0; 4]);
        frame.push(channel);
        frame.extend(bytes);
        self.0.write_all(&frame).unwrap();
    }

    /// The next message and its channel; none at the end.
    pub(crate) fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let (kind, mut payload) = self.frame()?;
            match kind {
                CLOSE => return None,
                PING => {}
                _ if payload.is_empty() => {}
                _ => {
                    let channel = payload.remove(0);
                    return Some((channel, payload));
                }
            }
        }
    }

    /// Everything up to `wanted` on a channel; what comes on others is passed over.
    pub(crate) fn receive_until(&mut self, channel: u8, wanted: &str) -> String {
        let mut text = String::new();
        while !text.contains(wanted) {
            let message = self.receive();
            assert!(message.is_some(), "no {wanted:?} after {text:?}");
            if let Some((from, bytes)) = message
                && from == channel
            {
                text.push_str(&String::from_utf8_lossy(&bytes));
            }
        }
        text
    }

    /// A server's frames are not masked, and containerd's are not in parts.
    fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        // The end of the connection without a word is an end, too.
        self.0.read_exact(&mut head).ok()?;
        assert_eq!(head[0] & FINAL, FINAL);
        let len = match head[1] {
            126 => {
                let mut len = [0; 2];
                self.0.read_exact(&mut len).unwrap();
                u64::from(u16::from_be_bytes(len))
            }
            127 => {
                let mut len = [0; 8];
                self.0.read_exact(&mut len).unwrap();
                u64::from_be_bytes(len)
            }
            len => u64::from(len),
        };
        let mut payload = vec![0; usize::try_from(len).unwrap()];
        self.0.read_exact(&mut payload).unwrap();
        Some((head[0] & 0x0f, payload))
    }
}

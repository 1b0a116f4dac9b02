// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! One HTTP/1.1 POST (RFC 9112), on a connection of its own. Blocks, for at most [`LIMIT`] at each step.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use pod_spec::Endpoint;

/// How long a collector may take for each step: to accept, to read some, to answer.
const LIMIT: Duration = Duration::from_secs(2);

/// The most of an answer that is read. Its first line says all that is wanted.
const MAX_ANSWER: u64 = 4 << 10;

/// Why a collector did not take it.
#[derive(Debug, thiserror::Error)]
pub(super) enum PostError {
    /// It is not there, or went away.
    #[error("send to the collector")]
    Io(#[from] io::Error),
    /// It does not want it.
    #[error("the collector answers {0:?}")]
    Refused(String),
}

/// Posts JSON.
pub(super) fn post(endpoint: &Endpoint, body: &[u8]) -> Result<(), PostError> {
    let mut stream = TcpStream::connect_timeout(&endpoint.address, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let head = format!(
        "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        endpoint.path,
        endpoint.address,
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut answer = Vec::new();
    let mut limited = stream.take(MAX_ANSWER);
    // To the end of the first line; the rest is of no use.
    let mut buffer = [0; 256];
    while !answer.contains(&b'\n') {
        let count = limited.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        answer.extend_from_slice(buffer.get(..count).unwrap_or_default());
    }
    let line = String::from_utf8_lossy(&answer);
    let line = line.lines().next().unwrap_or_default().trim_end();
    // "HTTP/1.1 200 OK": RFC 9112, section 4.
    let mut words = line.split(' ');
    let version = words.next().unwrap_or_default();
    let status = words.next().unwrap_or_default();
    if version.starts_with("HTTP/1.") && status.len() == 3 && status.starts_with('2') {
        Ok(())
    } else {
        Err(PostError::Refused(line.chars().take(100).collect()))
    }
}

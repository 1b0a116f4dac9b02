// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A TCP connection's way between host and guest, for both ends of it.
//!
//! ```text
//! client ──TCP── shim: relay ── vsock: header, then frames each way ── agent: relay ──TCP── 127.0.0.1:port
//!
//! header  magic "CFP1" | port u16 LE                       from the host, once
//! frame   len u16 LE, 1 to MAX_FRAME_LEN | bytes           data
//! frame   0 u16 LE                                         this direction has ended
//! ```
//!
//! * Each direction ends by itself. A connection that breaks off without the frame that says so was reset, and the TCP
//!   connection on the other side is reset too: what is cut off never looks whole. That is why there are frames; a VMM's
//!   vsock device tells neither a reset nor a half-close reliably.
//! * A guest that cannot connect closes the vsock connection: to the client, a reset.
//! * A direction holds one frame at a time and reads no further before it is passed on: a slow reader stops its own
//!   connection only.
#![forbid(unsafe_code)]

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The most connections of a pod at once.
pub const MAX_CONNECTIONS: usize = 128;

/// The most bytes of data in a frame. With its length it is within what the agent writes in one piece.
pub const MAX_FRAME_LEN: usize = 24 << 10;

/// How long a connection goes on when one of its directions has ended: longer than any answer, and yet nobody's place is
/// taken for ever.
const HALF_CLOSED_LIMIT: Duration = Duration::from_secs(3600);

const MAGIC: &[u8; 4] = b"CFP1";
const HEADER_LEN: usize = 6;
const LEN_LEN: usize = 2;

/// What a connection has moved, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moved {
    /// From the TCP connection.
    pub from_tcp: u64,
    /// To it.
    pub to_tcp: u64,
}

/// Says which port of the guest the connection is for. The host's first word.
///
/// # Errors
/// The channel's own.
pub async fn write_header(channel: &mut (impl AsyncWrite + Unpin), port: u16) -> io::Result<()> {
    let [m0, m1, m2, m3] = *MAGIC;
    let [p0, p1] = port.to_le_bytes();
    let header: [u8; HEADER_LEN] = [m0, m1, m2, m3, p0, p1];
    channel.write_all(&header).await
}

/// Reads which port the connection is for, and no byte behind it.
///
/// # Errors
/// The channel's own; [`io::ErrorKind::InvalidData`] if that is no header.
pub async fn read_header(channel: &mut (impl AsyncRead + Unpin)) -> io::Result<u16> {
    let mut header = [0; HEADER_LEN];
    channel.read_exact(&mut header).await?;
    match header {
        [m0, m1, m2, m3, p0, p1] if [m0, m1, m2, m3] == *MAGIC => Ok(u16::from_le_bytes([p0, p1])),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Passes on bytes both ways until both directions have ended. Dropping the future resets the TCP connection.
///
/// # Errors
/// Whatever broke the connection off on either side; the TCP connection has been reset then.
pub fn relay(
    tcp: TcpStream,
    channel: impl AsyncRead + AsyncWrite,
) -> impl Future<Output = io::Result<Moved>> {
    // Before the first poll: it may never come.
    let mut tcp = ResetOnDrop(Some(tcp));
    async move {
        let mut moved = Moved::default();
        if let Some(tcp) = &mut tcp.0 {
            // Small answers must not wait for more.
            tcp.set_nodelay(true)?;
            pass_on(tcp, channel, &mut moved).await?;
        }
        // All has been said on it: closed, not reset.
        drop(tcp.0.take());
        Ok(moved)
    }
}

async fn pass_on(
    tcp: &mut TcpStream,
    channel: impl AsyncRead + AsyncWrite,
    moved: &mut Moved,
) -> io::Result<()> {
    let (mut source, mut sink) = tcp.split();
    let (mut frames_in, mut frames_out) = tokio::io::split(channel);
    let mut out = std::pin::pin!(to_frames(&mut source, &mut frames_out));
    let mut back = std::pin::pin!(from_frames(&mut frames_in, &mut sink));
    tokio::select! {
        result = &mut out => {
            moved.from_tcp = result?;
            moved.to_tcp = timeout(HALF_CLOSED_LIMIT, back).await??;
        }
        result = &mut back => {
            moved.to_tcp = result?;
            moved.from_tcp = timeout(HALF_CLOSED_LIMIT, out).await??;
        }
    }
    Ok(())
}

/// Resets a connection: its peer sees an error, not an end.
pub fn reset(tcp: TcpStream) {
    drop(ResetOnDrop(Some(tcp)));
}

struct ResetOnDrop(Option<TcpStream>);

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if let Some(tcp) = self.0.take() {
            // tcp(7): with a linger time of zero, close sends RST. Only a broken descriptor refuses it.
            let _ = tcp.set_zero_linger();
        }
    }
}

async fn to_frames(
    source: &mut (impl AsyncRead + Unpin),
    channel: &mut (impl AsyncWrite + Unpin),
) -> io::Result<u64> {
    // One write for a frame with its length in front.
    let mut frame = vec![0; LEN_LEN.saturating_add(MAX_FRAME_LEN)];
    let mut moved = 0_u64;
    loop {
        let read = source
            .read(frame.get_mut(LEN_LEN..).unwrap_or_default())
            .await?;
        let len = u16::try_from(read).map_err(|_| io::ErrorKind::InvalidData)?;
        if let Some(prefix) = frame.get_mut(..LEN_LEN) {
            prefix.copy_from_slice(&len.to_le_bytes());
        }
        let whole = LEN_LEN.saturating_add(read);
        channel
            .write_all(frame.get(..whole).unwrap_or_default())
            .await?;
        channel.flush().await?;
        if len == 0 {
            return Ok(moved);
        }
        moved = moved.saturating_add(u64::from(len));
    }
}

async fn from_frames(
    channel: &mut (impl AsyncRead + Unpin),
    sink: &mut (impl AsyncWrite + Unpin),
) -> io::Result<u64> {
    let mut buffer = vec![0; MAX_FRAME_LEN];
    let mut moved = 0_u64;
    loop {
        let mut prefix = [0; LEN_LEN];
        channel.read_exact(&mut prefix).await?;
        let len = u16::from_le_bytes(prefix);
        if len == 0 {
            sink.shutdown().await?;
            return Ok(moved);
        }
        let data = buffer
            .get_mut(..usize::from(len))
            .ok_or(io::ErrorKind::InvalidData)?;
        channel.read_exact(data).await?;
        sink.write_all(data).await?;
        moved = moved.saturating_add(u64::from(len));
    }
}

#[cfg(test)]
mod tests;

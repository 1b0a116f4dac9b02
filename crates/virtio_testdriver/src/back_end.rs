// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A vhost-user back end that does as it is told, for tests of front ends.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use virtio_wire::Features;
use virtio_wire::vhost_user::{
    F_PROTOCOL_FEATURES, HEADER_BYTES, PROTOCOL_F_MQ, PROTOCOL_F_REPLY_ACK, Request,
};

const REPLY_FLAGS: u32 = 5;
const NEED_REPLY: u32 = 8;

/// What a back end answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// An answer as the protocol wants it, with this payload.
    Payload([u8; 8]),
    /// These bytes, whatever they are.
    Raw(Vec<u8>),
    /// Nothing.
    Silence,
    /// The end of the connection.
    HangUp,
}

/// What a front end has sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// Which request.
    pub request: Request,
    /// Whether it asks for a confirmation.
    pub confirm: bool,
    /// What came with it; descriptors are closed.
    pub payload: Vec<u8>,
}

/// What a back end that keeps to the protocol, but serves nothing, answers.
#[must_use]
pub fn honest(told: &Told) -> Reply {
    match told.request {
        Request::GET_FEATURES => {
            let features = Features::COMMON.bits() | F_PROTOCOL_FEATURES;
            Reply::Payload(features.to_le_bytes())
        }
        Request::GET_PROTOCOL_FEATURES => {
            Reply::Payload((PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK).to_le_bytes())
        }
        Request::GET_VRING_BASE => {
            let payload = told.payload.as_slice().try_into();
            Reply::Payload(payload.unwrap_or_default())
        }
        _ if told.confirm => Reply::Payload([0; 8]),
        _ => Reply::Silence,
    }
}

/// Runs a back end on `stream` until either side closes it; answers everything that it was told.
///
/// # Panics
/// The host has no thread.
#[must_use]
pub fn run_back_end(
    mut stream: UnixStream,
    mut behaviour: impl FnMut(&Told) -> Reply + Send + 'static,
) -> JoinHandle<Vec<Told>> {
    let serve = move || {
        let mut all = Vec::new();
        while let Some(told) = receive(&mut stream) {
            let reply = behaviour(&told);
            let request = told.request;
            all.push(told);
            let bytes = match reply {
                Reply::Payload(payload) => {
                    let words = [request.0, REPLY_FLAGS, 8].map(u32::to_le_bytes);
                    [words.as_flattened(), &payload].concat()
                }
                Reply::Raw(bytes) => bytes,
                Reply::Silence => Vec::new(),
                Reply::HangUp => break,
            };
            if stream.write_all(&bytes).is_err() {
                break;
            }
        }
        all
    };
    thread::spawn(serve)
}

fn receive(stream: &mut UnixStream) -> Option<Told> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).ok()?;
    let (words, _) = header.as_chunks::<4>();
    let [request, flags, size] = words else {
        return None;
    };
    let size = usize::try_from(u32::from_le_bytes(*size)).ok()?;
    let mut payload = vec![0; size.min(4096)];
    stream.read_exact(&mut payload).ok()?;
    Some(Told {
        request: Request(u32::from_le_bytes(*request)),
        confirm: u32::from_le_bytes(*flags) & NEED_REPLY != 0,
        payload,
    })
}

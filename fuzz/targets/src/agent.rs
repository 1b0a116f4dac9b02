// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the guest's agent sends: its hello, its events, and the header that both ends read.

use std::time::SystemTime;

use agent_client::{AgentEvent, parse_events};
use agent_proto::{HeaderError, MAX_EVENTS, StreamHeader, api, hello};
use protobuf::Message;

/// A hello frame, a stream header or an answer to `NextEvents`, as the first byte says.
pub(crate) fn messages(data: &[u8]) {
    let Some((selector, bytes)) = data.split_first() else {
        return;
    };
    match selector % 3 {
        0 => frame(bytes),
        1 => header(bytes),
        _ => events(bytes),
    }
}

fn frame(bytes: &[u8]) {
    let Some((prefix, body)) = bytes.split_first_chunk() else {
        return;
    };
    let Ok(len) = hello::decode_len(*prefix) else {
        return;
    };
    if let Some(body) = body.get(..len)
        && let Ok(said) = hello::decode(body)
    {
        // Unknown fields are kept, so that the frame may be longer than the one that was read, up to its cap.
        if let Ok(again) = hello::encode(&said) {
            let (_, body) = again.split_first_chunk::<4>().expect("a length");
            assert_eq!(hello::decode(body).expect("and read again"), said);
        }
    }
}

fn header(bytes: &[u8]) {
    match StreamHeader::decode(bytes) {
        Ok((header, len)) => {
            assert!(len <= agent_proto::MAX_HEADER_LEN);
            assert_eq!(bytes.get(..len), Some(header.encode().as_slice()));
        }
        Err(HeaderError::Incomplete) => assert!(bytes.len() < agent_proto::MAX_HEADER_LEN),
        Err(_) => {}
    }
}

fn events(bytes: &[u8]) {
    let Ok(answer) = api::Events::parse_from_bytes(bytes) else {
        return;
    };
    let count = answer.events.len();
    let Ok(events) = parse_events(answer, 0, SystemTime::UNIX_EPOCH) else {
        return;
    };
    assert!(count <= MAX_EVENTS && events.len() == count);
    for event in events {
        if let AgentEvent::Exited { status, .. } = event {
            assert!(status <= 255);
        }
    }
}

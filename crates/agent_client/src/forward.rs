// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! TCP connections to the pod's loopback, from the socket that takes them on the host to the guest's agent.
//!
//! A connection is accepted before it is known whether anybody in the guest listens on its port; if nobody does, it is reset.
//! At most [`MAX_CONNECTIONS`] of a pod are open at once; those past them are reset, too.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use agent_proto::FORWARD_PORT;
use port_forward::MAX_CONNECTIONS;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::stdio::StreamConnector;

/// How long nothing is accepted when the host has no descriptors or memory left.
const SHORTAGE: Duration = Duration::from_millis(200);

/// A pod's forwarded ports: what they carry now, and have carried.
#[derive(Debug)]
pub struct ForwardedPorts {
    places: Arc<Semaphore>,
    served: AtomicU64,
    broken_off: AtomicU64,
    refused: AtomicU64,
    bytes: AtomicU64,
}

impl Default for ForwardedPorts {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            served: AtomicU64::default(),
            broken_off: AtomicU64::default(),
            refused: AtomicU64::default(),
            bytes: AtomicU64::default(),
        }
    }
}

impl ForwardedPorts {
    /// Carries every connection that comes to `listener` to the port of the guest's loopback that it was made for, for ever.
    /// Dropping the future closes the listener and resets every connection.
    pub async fn serve(
        self: Arc<Self>,
        listener: std::net::TcpListener,
        guest: Arc<dyn StreamConnector>,
    ) {
        let listener = match TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(%error, "no port of this pod can be forwarded");
                return std::future::pending().await;
            }
        };
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
            };
            match accepted {
                Ok((tcp, _)) => {
                    let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
                        count(&self.refused, 1);
                        tracing::warn!(
                            limit = MAX_CONNECTIONS,
                            "a connection to a forwarded port was refused: as many are open as may be"
                        );
                        port_forward::reset(tcp);
                        continue;
                    };
                    let (ports, guest) = (Arc::clone(&self), Arc::clone(&guest));
                    connections.spawn(async move {
                        ports.carry(tcp, guest.as_ref()).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept a connection to a forwarded port");
                    tokio::time::sleep(SHORTAGE).await;
                }
            }
        }
    }

    async fn carry(&self, tcp: TcpStream, guest: &dyn StreamConnector) {
        match forward(tcp, guest).await {
            Ok(bytes) => {
                count(&self.served, 1);
                count(&self.bytes, bytes);
            }
            Err(error) => {
                count(&self.broken_off, 1);
                tracing::debug!(%error, "a connection to a forwarded port broke off");
            }
        }
    }

    /// Connections and bytes, as JSON for people.
    pub fn dump(&self) -> Value {
        let open = MAX_CONNECTIONS.saturating_sub(self.places.available_permits());
        json!({
            "open": open,
            "served": self.served.load(Ordering::Relaxed),
            "broken_off": self.broken_off.load(Ordering::Relaxed),
            "refused": self.refused.load(Ordering::Relaxed),
            "bytes": self.bytes.load(Ordering::Relaxed),
        })
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

async fn forward(tcp: TcpStream, guest: &dyn StreamConnector) -> io::Result<u64> {
    let dialled = tcp.local_addr()?;
    if !dialled.ip().to_canonical().is_loopback() {
        port_forward::reset(tcp);
        return Err(io::ErrorKind::AddrNotAvailable.into());
    }
    let channel = match connect(guest, dialled.port()).await {
        Ok(channel) => channel,
        Err(error) => {
            port_forward::reset(tcp);
            return Err(error);
        }
    };
    let moved = port_forward::relay(tcp, channel).await?;
    Ok(moved.from_tcp.saturating_add(moved.to_tcp))
}

async fn connect(guest: &dyn StreamConnector, port: u16) -> io::Result<tokio::net::UnixStream> {
    let mut channel = guest.connect(FORWARD_PORT).await?;
    port_forward::write_header(&mut channel, port).await?;
    Ok(channel)
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the host does to the muxer: processes connect, say what they want, read, write and leave; deadlines pass.

use std::io;
use std::os::unix::net::UnixStream;

use ids::VsockPort;

use super::GREETING_TIMEOUT;
use super::connection::{Connection, Input};
use super::host::{Edges, Greeting, Source};
use super::muxer::{Entry, Muxer};
use super::stream::Stream;
use super::table::EntryId;
use crate::Progress;

/// Most host processes accepted in one wake.
const MAX_ACCEPTS_PER_WAKE: usize = 32;

impl Muxer {
    /// Takes in what has happened on the host's side since the last call, up to a bound. Events beyond it keep the
    /// poller's descriptor readable; callers beyond it do not (their edge has passed), hence the answer.
    ///
    /// # Errors
    /// The host's epoll fails.
    pub(super) fn host_events(&mut self) -> io::Result<Progress> {
        for (source, edges) in self.parts.poller.events()? {
            match source {
                Source::Listener => self.acceptable = true,
                Source::Timer => {} // what it is for is below
                Source::Stream(token) => self.stream_event(EntryId::from_token(token), edges),
            }
        }
        let more = self.accept_callers();
        self.expire();
        Ok(if more { Progress::More } else { Progress::Idle })
    }

    fn stream_event(&mut self, id: EntryId, edges: Edges) {
        match self.table.get_mut(id) {
            None => {} // it has ended since
            Some(Entry::Greeting { .. }) if edges.hung_up => self.turn_away(id),
            Some(Entry::Greeting { .. }) => self.hear(id),
            Some(Entry::Stream(stream)) => {
                stream.readable |= edges.readable;
                if edges.hung_up {
                    self.host_stopped_reading(id);
                } else if edges.writable && stream.has_backlog() {
                    let taken = stream.flush();
                    self.host_took(id, taken);
                }
                self.schedule(id);
            }
        }
    }

    /// Returns whether there may be more.
    fn accept_callers(&mut self) -> bool {
        for _ in 0..MAX_ACCEPTS_PER_WAKE {
            if !self.acceptable {
                return false;
            }
            match self.parts.listener.accept() {
                Ok((socket, _)) => self.welcome(socket),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.acceptable = false,
                // Out of descriptors, or the caller is gone already: the next wake tries again.
                Err(_) => return false,
            }
        }
        true
    }

    fn welcome(&mut self, socket: UnixStream) {
        let deadline = self.now.checked_add(GREETING_TIMEOUT).unwrap_or(self.now);
        let ready = socket.set_nonblocking(true).is_ok();
        let entry = Entry::Greeting { socket, deadline };
        match ready.then(|| self.add(entry)).flatten() {
            Some(id) => {
                self.note_deadline(Some(deadline));
                self.hear(id);
            }
            None => self.parts.metrics.refused_full.increment(),
        }
    }

    /// Reads what a host process wants, as far as it has said it.
    fn hear(&mut self, id: EntryId) {
        let Some(Entry::Greeting { socket, .. }) = self.table.get(id) else {
            return;
        };
        match Greeting::receive(socket) {
            Ok(Greeting::Connect(port, _)) => self.connect(id, port),
            Ok(Greeting::Partial) => {}
            Ok(Greeting::Bad) | Err(_) => self.turn_away(id),
        }
    }

    fn turn_away(&mut self, id: EntryId) {
        self.parts.metrics.bad_greetings.increment();
        self.remove(id);
    }

    /// A host process asks for a port of the guest.
    fn connect(&mut self, id: EntryId, port: VsockPort) {
        let Some(key) = self.ephemeral_key(port) else {
            return self.turn_away(id);
        };
        let (window, large) = self.window();
        let machine = Connection::request(window, self.now);
        self.table.replace(id, |entry| match entry {
            Entry::Greeting { socket, .. } => {
                let mut stream = Stream::new(key, machine, socket, large);
                stream.readable = true; // the edge of what came behind the line may have passed
                Entry::Stream(stream)
            }
            stream @ Entry::Stream(_) => stream,
        });
        self.added(id);
    }

    /// Acts on every deadline that has passed.
    fn expire(&mut self) {
        if self.timer.is_none_or(|timer| self.now < timer) {
            return;
        }
        let now = self.now;
        let passed = |entry: &Entry| entry.deadline().is_some_and(|deadline| deadline <= now);
        let late = self.table.iter().filter(|(_, entry)| passed(entry));
        for id in late.map(|(id, _)| id).collect::<Vec<_>>() {
            match self.table.get(id) {
                Some(Entry::Greeting { .. }) => self.turn_away(id),
                Some(Entry::Stream(_)) => self.step(id, Input::Tick),
                None => {}
            }
        }
        self.timer = None;
        let earliest = self.earliest_deadline();
        self.note_deadline(earliest);
    }
}

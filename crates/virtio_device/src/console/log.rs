// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the guest has printed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::TAIL_BYTES;

/// Ends a log file that is full.
const TRUNCATED: &[u8] = b"\n[console log is full; later output is dropped]\n";

/// A file with room for so many bytes.
pub struct LogFile {
    file: File,
    /// Bytes that may still be written.
    room: AtomicU64,
}

impl LogFile {
    /// Takes an open file and the number of bytes it may grow by.
    #[must_use]
    pub fn new(file: File, max_bytes: u64) -> Self {
        Self {
            file,
            room: AtomicU64::new(max_bytes),
        }
    }

    /// Writes what fits, and once a note that it was all; returns the bytes dropped. The worker is
    /// the only caller.
    fn append(&self, bytes: &[u8]) -> usize {
        let room = self.room.load(Ordering::Relaxed);
        if room == 0 {
            return bytes.len();
        }
        let fits = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
        let (now, dropped) = bytes.split_at_checked(fits).unwrap_or((bytes, &[]));
        let mut file = &self.file;
        let left = room.saturating_sub(now.len() as u64);
        let written = file.write_all(now).and_then(|()| {
            if left == 0 {
                file.write_all(TRUNCATED)
            } else {
                Ok(())
            }
        });
        match written {
            Ok(()) => {
                self.room.store(left, Ordering::Relaxed);
                dropped.len()
            }
            Err(_) => {
                self.room.store(0, Ordering::Relaxed); // a broken file is not tried again
                bytes.len()
            }
        }
    }
}

/// The end of the guest's output in memory, and all of it, up to a cap, in a file.
///
/// Written by the console's worker, read by the control thread. No lock is held across I/O.
#[derive(Default)]
pub struct ConsoleLog {
    tail: Mutex<VecDeque<u8>>,
    file: Option<LogFile>,
}

impl ConsoleLog {
    /// An empty log; with `file`, output also goes there.
    #[must_use]
    pub fn new(file: Option<LogFile>) -> Self {
        Self {
            tail: Mutex::default(),
            file,
        }
    }

    /// The last bytes printed, at most [`TAIL_BYTES`].
    #[must_use]
    pub fn tail(&self) -> Vec<u8> {
        self.lock().iter().copied().collect()
    }

    /// Adds output to what is kept in memory, and not to the file: for threads that do no I/O.
    pub fn append_to_tail(&self, bytes: &[u8]) {
        let mut tail = self.lock();
        let kept = bytes.len().saturating_sub(TAIL_BYTES);
        let new = bytes.get(kept..).unwrap_or_default();
        let excess = tail
            .len()
            .saturating_add(new.len())
            .saturating_sub(TAIL_BYTES)
            .min(tail.len());
        tail.drain(..excess);
        tail.extend(new);
    }

    /// Adds output; returns the bytes that did not reach the file though there is one.
    pub(super) fn append(&self, bytes: &[u8]) -> usize {
        self.append_to_tail(bytes);
        self.file.as_ref().map_or(0, |file| file.append(bytes))
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // Bytes cannot be half written: a panic elsewhere does not spoil them.
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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
    tail: Mutex<Tail>,
    file: Option<LogFile>,
}

#[derive(Default)]
struct Tail {
    bytes: VecDeque<u8>,
    /// How many bytes went before these.
    gone: u64,
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
        self.lock().bytes.iter().copied().collect()
    }

    /// How many bytes have been printed.
    #[must_use]
    pub fn printed(&self) -> u64 {
        let tail = self.lock();
        tail.gone.saturating_add(tail.bytes.len() as u64)
    }

    /// At most `most` bytes from number `from` on, or from the oldest that is kept, and the number of the first of them.
    #[must_use]
    pub fn part(&self, from: u64, most: usize) -> (u64, Vec<u8>) {
        let tail = self.lock();
        let skipped = usize::try_from(from.saturating_sub(tail.gone))
            .unwrap_or(usize::MAX)
            .min(tail.bytes.len());
        let bytes = tail.bytes.iter().skip(skipped).take(most);
        let first = tail.gone.saturating_add(skipped as u64);
        (first, bytes.copied().collect())
    }

    /// Adds output to what is kept in memory, and not to the file: for threads that do no I/O.
    pub fn append_to_tail(&self, bytes: &[u8]) {
        let mut tail = self.lock();
        let kept = bytes.len().saturating_sub(TAIL_BYTES);
        let new = bytes.get(kept..).unwrap_or_default();
        let excess = tail
            .bytes
            .len()
            .saturating_add(new.len())
            .saturating_sub(TAIL_BYTES)
            .min(tail.bytes.len());
        tail.bytes.drain(..excess);
        tail.bytes.extend(new);
        let gone = excess.saturating_add(kept) as u64;
        tail.gone = tail.gone.saturating_add(gone);
    }

    /// Adds output; returns the bytes that did not reach the file though there is one.
    pub(super) fn append(&self, bytes: &[u8]) -> usize {
        self.append_to_tail(bytes);
        self.file.as_ref().map_or(0, |file| file.append(bytes))
    }

    fn lock(&self) -> MutexGuard<'_, Tail> {
        // Bytes cannot be half written: a panic elsewhere does not spoil them.
        self.tail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

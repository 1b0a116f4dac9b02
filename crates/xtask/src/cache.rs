// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A cache of folders named by what they were made from.
//!
//! Invariants: an entry exists whole or not at all (it is made beside its place and renamed); two processes that
//! want the same entry make it once (a file lock); an entry is never changed after it was made.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::workspace;

/// What an entry is made from. Equal keys mean interchangeable entries.
#[derive(Default)]
pub(crate) struct Key(Sha256);

impl Key {
    /// Adds a named part; order matters.
    pub(crate) fn part(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        for bytes in [name.as_bytes(), value.as_ref()] {
            self.0.update(bytes.len().to_le_bytes());
            self.0.update(bytes);
        }
        self
    }

    /// Adds a file by its content.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn file(self, path: &Path) -> Result<Self> {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(self.part("file", content))
    }

    /// The first 128 bits, in hexadecimal.
    pub(crate) fn name(self) -> String {
        self.0
            .finalize()
            .iter()
            .take(16)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// The folder of `kind` for `key`. If there is none, `make` fills an empty folder that then becomes it.
///
/// # Errors
/// When `make` fails or the cache cannot be written; then nothing is kept.
pub(crate) fn entry(
    kind: &str,
    key: Key,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let name = key.name();
    let shelf = workspace::cache().join(kind);
    let place = shelf.join(&name);
    if place.exists() {
        return Ok(place);
    }
    fs::create_dir_all(&shelf)
        .with_context(|| format!("cannot create {}; is COFFER_CACHE right?", shelf.display()))?;
    let lock = File::create(shelf.join(format!("{name}.lock")))
        .context("cannot create a lock in the cache")?;
    lock.lock().context("cannot lock an entry of the cache")?;
    if place.exists() {
        return Ok(place);
    }
    // Under the lock, so what is there was left by a run that was killed.
    let partial = shelf.join(format!("{name}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    fs::create_dir(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    if let Err(error) = make(&partial) {
        fs::remove_dir_all(&partial).ok();
        return Err(error);
    }
    fs::rename(&partial, &place).with_context(|| format!("cannot rename {}", partial.display()))?;
    Ok(place)
}

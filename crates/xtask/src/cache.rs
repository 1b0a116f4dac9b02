// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A cache of folders named by what they were made from.
//!
//! Invariants: an entry exists whole or not at all (it is made beside its place and renamed); two processes that
//! want the same entry make it once (a file lock); an entry is never changed after it was made. The modification time of
//! its lock is when it was last asked for: the entries longest unused go when a new one comes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::workspace;

/// How many entries of a kind are kept, besides those [in use](IN_USE).
const KEPT: usize = 6;
/// For so long after it was asked for, an entry may be in use and is not removed.
const IN_USE: Duration = Duration::from_secs(3 * 60 * 60);

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
    fs::create_dir_all(&shelf)
        .with_context(|| format!("cannot create {}; is COFFER_CACHE right?", shelf.display()))?;
    let lock = File::create(shelf.join(format!("{name}.lock")))
        .context("cannot create a lock in the cache")?;
    lock.set_modified(SystemTime::now())
        .context("cannot mark an entry of the cache as used")?;
    if place.exists() {
        return Ok(place);
    }
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
    prune(&shelf)?;
    Ok(place)
}

/// Removes the entries of a kind that were not asked for for longest. The locks stay: they are empty, and removing one
/// that somebody waits for would let two make the same entry.
fn prune(shelf: &Path) -> Result<()> {
    let mut entries = Vec::new();
    for found in fs::read_dir(shelf).with_context(|| format!("cannot read {}", shelf.display()))? {
        let place = found?.path();
        let lock = place.with_extension("lock");
        if place.extension().is_none() && lock.exists() {
            entries.push((fs::metadata(&lock)?.modified()?, place));
        }
    }
    entries.sort();
    let surplus = entries.len().saturating_sub(KEPT);
    for (used, place) in entries.into_iter().take(surplus) {
        if used.elapsed().is_ok_and(|unused| unused > IN_USE) {
            fs::remove_dir_all(&place)
                .with_context(|| format!("cannot remove {}", place.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shelf_with(entries: usize, age: Duration) -> tempfile::TempDir {
        let shelf = tempfile::tempdir().unwrap();
        for index in 0..entries {
            let index = u64::try_from(index).unwrap();
            let name = format!("{index:02}");
            fs::create_dir(shelf.path().join(&name)).unwrap();
            let lock = File::create(shelf.path().join(format!("{name}.lock"))).unwrap();
            let used = SystemTime::now() - age + Duration::from_secs(index);
            lock.set_modified(used).unwrap();
        }
        shelf
    }

    fn directories(shelf: &Path) -> Vec<PathBuf> {
        let mut found: Vec<_> = fs::read_dir(shelf)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.is_dir())
            .collect();
        found.sort();
        found
    }

    #[test]
    fn entries_longest_unused_are_removed() {
        let shelf = shelf_with(KEPT + 2, IN_USE * 2);
        prune(shelf.path()).unwrap();
        let left = directories(shelf.path());
        assert_eq!(left.len(), KEPT);
        assert_eq!(left[0], shelf.path().join("02"));
    }

    #[test]
    fn entries_that_may_be_in_use_stay() {
        let shelf = shelf_with(KEPT + 2, Duration::from_secs(60));
        prune(shelf.path()).unwrap();
        assert_eq!(directories(shelf.path()).len(), KEPT + 2);
    }
}

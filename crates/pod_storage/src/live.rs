// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Volumes whose files the kubelet writes and keeps current: ConfigMap, Secret, projected and downward API volumes.
//!
//! The kubelet writes them with its atomic writer: a new directory `..<time>` gets the files, the link `..data` is
//! renamed over to it, and what users see are links through `..data`. So a reader that finds `..data` the same before and
//! after has one state, and the guest can be changed over in the same way.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use agent_proto::api;
use sha2::{Digest, Sha256};

use crate::copies::{self, Budget, Within};
use crate::error::StorageError;

/// The most bytes that one such volume may have. A ConfigMap or Secret has 1 MiB at most; a projected volume joins
/// several.
pub const MAX_VOLUME_BYTES: u64 = 16 << 20;

/// The most files, folders and links that one such volume may have.
pub const MAX_VOLUME_ENTRIES: usize = 8192;

/// The most such volumes that a pod may have.
pub const MAX_LIVE_VOLUMES: usize = 128;

/// The most bytes of files in one message: a quarter of what a message may have.
const PART_BYTES: usize = 1 << 20;

/// What an entry takes in a message beside its path and contents, generously.
const ENTRY_BYTES: usize = 64;

/// How often a volume is read again that changes while it is read.
const ATTEMPTS: u32 = 8;

/// The link that the atomic writer renames.
const DATA: &str = "..data";

/// What the atomic writer calls things that no user is to see.
const HIDDEN: &str = "..";

/// A volume as it was at one time.
#[derive(Debug, Clone, PartialEq)]
pub struct LiveTree {
    entries: Vec<api::CopiedFile>,
    digest: [u8; 32],
    written: bool,
}

impl LiveTree {
    /// Reads the volume at `source`, in one state of it.
    ///
    /// # Errors
    /// [`StorageError::CopyTooLarge`] past [`MAX_VOLUME_BYTES`] or [`MAX_VOLUME_ENTRIES`], [`StorageError::CopyKind`],
    /// [`StorageError::NameNotUtf8`]; [`StorageError::Io`] if it cannot be read, or never stays as it is.
    pub fn read(source: &Path) -> Result<Self, StorageError> {
        let mut attempt = 1;
        loop {
            let before = data(source)?;
            let read = read_once(source, before.as_deref());
            let after = data(source)?;
            match read {
                Ok(tree) if before == after => return Ok(tree),
                // What it was read from was taken away meanwhile.
                Err(StorageError::Io { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && attempt < ATTEMPTS => {}
                Ok(_) if attempt < ATTEMPTS => {}
                Ok(_) => {
                    let error = io::Error::other("it changes all the time");
                    return Err(StorageError::io("read", source)(error));
                }
                Err(error) => return Err(error),
            }
            attempt = attempt.saturating_add(1);
        }
    }

    /// Whether the kubelet has written it, and not begun to take it away.
    pub fn is_written(&self) -> bool {
        self.written
    }

    /// Says of two trees whether they are the same.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The messages that put the tree into the guest as the volume `name`, in their order.
    pub fn into_messages(self, name: &str) -> Vec<api::PutFilesRequest> {
        let mut parts = Vec::new();
        let mut entries = Vec::new();
        let mut room = PART_BYTES;
        for entry in self.entries {
            for piece in pieces(entry) {
                let len = match &piece.content {
                    Some(api::copied_file::Content::Data(data)) => data.len(),
                    _ => 0,
                };
                let len = len
                    .saturating_add(piece.path.len())
                    .saturating_add(ENTRY_BYTES);
                if len > room && !entries.is_empty() {
                    parts.push(std::mem::take(&mut entries));
                    room = PART_BYTES;
                }
                room = room.saturating_sub(len);
                entries.push(piece);
            }
        }
        parts.push(entries);
        let last = parts.len().saturating_sub(1);
        let numbered = parts.into_iter().enumerate();
        numbered
            .map(|(number, entries)| api::PutFilesRequest {
                volume: name.to_owned(),
                part: u32::try_from(number).unwrap_or(u32::MAX),
                last: number == last,
                entries,
                ..Default::default()
            })
            .collect()
    }
}

/// Where `..data` leads to, if there is one.
fn data(source: &Path) -> Result<Option<PathBuf>, StorageError> {
    let path = source.join(DATA);
    match fs::read_link(&path) {
        Ok(target) => Ok(Some(target)),
        // No such link, or something else of that name.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::InvalidInput
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(StorageError::io("read the link", &path)(error)),
    }
}

fn read_once(source: &Path, data: Option<&Path>) -> Result<LiveTree, StorageError> {
    if !fs::metadata(source)
        .map_err(StorageError::io("read", source))?
        .is_dir()
    {
        return Err(StorageError::NotADirectory(source.to_owned()));
    }
    let mut budget = Budget::new(MAX_VOLUME_BYTES, MAX_VOLUME_ENTRIES);
    let mut entries = Vec::new();
    // Of what is hidden, only the present state counts.
    let wanted = |path: &Path| {
        let top = path.components().nth(1).is_none();
        let hidden = top && path.to_string_lossy().starts_with(HIDDEN);
        !hidden || path == Path::new(DATA) || Some(path) == data
    };
    let within = Within {
        root: source,
        wanted: &wanted,
    };
    copies::read_tree(within, &mut budget, &mut entries)?;
    // The order of a directory's entries means nothing.
    entries.sort_by(|one, other| one.path.cmp(&other.path));
    let mut digest = Sha256::new();
    for entry in &entries {
        hash(&mut digest, entry);
    }
    Ok(LiveTree {
        entries,
        digest: digest.finalize().into(),
        written: data.is_some(),
    })
}

fn hash(digest: &mut Sha256, entry: &api::CopiedFile) {
    let (kind, content): (u8, &[u8]) = match &entry.content {
        Some(api::copied_file::Content::Data(data)) => (1, data),
        Some(api::copied_file::Content::Symlink(target)) => (2, target.as_bytes()),
        _ => (3, &[]),
    };
    for text in [entry.path.as_bytes(), content] {
        digest.update(u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes());
        digest.update(text);
    }
    for number in [entry.mode, entry.uid, entry.gid, u32::from(kind)] {
        digest.update(number.to_le_bytes());
    }
}

/// A file that is too large for one message in pieces that are not; anything else as it is.
fn pieces(entry: api::CopiedFile) -> Vec<api::CopiedFile> {
    let data = match &entry.content {
        Some(api::copied_file::Content::Data(data)) if data.len() > PART_BYTES => data,
        _ => return vec![entry],
    };
    let piece = |(number, data): (usize, &[u8])| api::CopiedFile {
        path: entry.path.clone(),
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        content: Some(api::copied_file::Content::Data(data.to_vec())),
        offset: u64::try_from(number.saturating_mul(PART_BYTES)).unwrap_or(u64::MAX),
        ..Default::default()
    };
    data.chunks(PART_BYTES).enumerate().map(piece).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// Writes a volume as kubelet's atomic writer does.
    fn write(volume: &Path, state: &str, files: &[(&str, &[u8])]) {
        let folder = volume.join(state);
        fs::create_dir(&folder).unwrap();
        for (name, content) in files {
            fs::write(folder.join(name), content).unwrap();
            fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o640)).unwrap();
        }
        let old = fs::read_link(volume.join(DATA));
        symlink(state, volume.join("..data_tmp")).unwrap();
        fs::rename(volume.join("..data_tmp"), volume.join(DATA)).unwrap();
        for (name, _) in files {
            let link = volume.join(name);
            if fs::symlink_metadata(&link).is_err() {
                symlink(Path::new(DATA).join(name), link).unwrap();
            }
        }
        if let Ok(old) = old {
            fs::remove_dir_all(volume.join(old)).unwrap();
        }
    }

    fn paths(messages: &[api::PutFilesRequest]) -> Vec<(String, u64)> {
        let entries = messages.iter().flat_map(|message| &message.entries);
        entries
            .map(|entry| (entry.path.clone(), entry.offset))
            .collect()
    }

    #[test]
    fn volume_is_read_with_its_links_and_without_what_is_unfinished() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "..1", &[("key", b"value")]);
        fs::create_dir(dir.path().join("..2")).unwrap();
        symlink("..2", dir.path().join("..data_tmp")).unwrap();
        let messages = LiveTree::read(dir.path()).unwrap().into_messages("u.v");
        assert_eq!(messages.len(), 1);
        assert!(LiveTree::read(dir.path()).unwrap().is_written());
        let message = messages.first().unwrap();
        assert_eq!(
            (message.volume.as_str(), message.part, message.last),
            ("u.v", 0, true)
        );
        let entries: Vec<&str> = message
            .entries
            .iter()
            .map(|entry| entry.path.as_str())
            .collect();
        assert_eq!(entries, ["", "..1", "..1/key", "..data", "key"]);
        assert!(message.entries.iter().all(|entry| entry.content.is_some()));
    }

    #[test]
    fn digest_tells_one_state_from_another() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "..1", &[("key", b"one")]);
        let digest = || LiveTree::read(dir.path()).unwrap().digest();
        let first = digest();
        assert_eq!(digest(), first);
        write(dir.path(), "..2", &[("key", b"one")]);
        let second = digest();
        assert_ne!(second, first);
        fs::set_permissions(
            dir.path().join("..2/key"),
            fs::Permissions::from_mode(0o600),
        )
        .unwrap();
        assert_ne!(digest(), second);
    }

    #[test]
    fn large_files_go_in_pieces_of_one_message_each() {
        let dir = tempfile::tempdir().unwrap();
        let large = vec![7; 2 * PART_BYTES + 5];
        write(dir.path(), "..1", &[("a", b"small"), ("b", &large)]);
        let messages = LiveTree::read(dir.path()).unwrap().into_messages("v");
        let parts: Vec<(u32, bool)> = messages
            .iter()
            .map(|message| (message.part, message.last))
            .collect();
        assert_eq!(parts.first(), Some(&(0, false)));
        assert_eq!(parts.last().map(|last| last.1), Some(true));
        assert_eq!(parts.iter().filter(|part| part.1).count(), 1);
        let offsets: Vec<u64> = paths(&messages)
            .into_iter()
            .filter(|(path, _)| path == "..1/b")
            .map(|(_, offset)| offset)
            .collect();
        assert_eq!(offsets, [0, PART_BYTES as u64, 2 * PART_BYTES as u64]);
        for message in messages {
            let len = protobuf::Message::compute_size(&message);
            assert!(len < 2 * PART_BYTES as u64, "{len}");
        }
    }

    #[test]
    fn volume_at_the_cap_is_read_and_past_it_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        let max = usize::try_from(MAX_VOLUME_BYTES).unwrap();
        fs::write(&file, vec![0; max]).unwrap();
        LiveTree::read(dir.path()).unwrap();
        fs::write(&file, vec![0; max + 1]).unwrap();
        let error = LiveTree::read(dir.path()).unwrap_err();
        assert!(
            matches!(error, StorageError::CopyTooLarge { .. }),
            "{error}"
        );
    }

    #[test]
    fn reader_beside_a_busy_writer_sees_one_state_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "..0", &[("a", b"0"), ("b", b"0")]);
        let writer = std::thread::spawn({
            let volume = dir.path().to_owned();
            move || {
                for state in 1..200 {
                    let text = state.to_string();
                    let content = text.as_bytes();
                    write(
                        &volume,
                        &format!("..{text}"),
                        &[("a", content), ("b", content)],
                    );
                }
            }
        });
        while !writer.is_finished() {
            // A writer without a pause may outrun every attempt; what is read is whole all the same.
            let Ok(tree) = LiveTree::read(dir.path()) else {
                continue;
            };
            let texts: Vec<&Vec<u8>> = tree
                .entries
                .iter()
                .filter_map(|entry| match &entry.content {
                    Some(api::copied_file::Content::Data(data)) => Some(data),
                    _ => None,
                })
                .collect();
            assert_eq!(texts.len(), 2);
            assert_eq!(texts.first(), texts.last());
        }
        writer.join().unwrap();
    }
}

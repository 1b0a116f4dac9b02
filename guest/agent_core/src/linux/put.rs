// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Volumes whose files the host keeps current. A new state is put together beside the volume and then taken over as a
//! kubelet does it: new directories first, then `..data` is renamed over the old one, then the other links and files, and
//! last what is no more goes. Whoever reads through `..data` sees one state or the other, and inotify in a container wakes
//! as it would without a VM.
//!
//! Directories are never changed once they are there: the atomic writer gives each state a new one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs::{self, FileType};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use agent_proto::layout;

use super::copied;
use crate::Error;
use crate::error::Context as _;
use crate::plan::MAX_COPIED_FILES;
use crate::volume_plan::PutPlan;

/// The link that decides which state is seen.
const DATA: &str = "..data";

/// States that are being put together, by volume.
#[derive(Debug)]
pub(super) struct Puts {
    begun: Mutex<HashMap<String, Begun>>,
    /// Where they are put together: on the file system of the volumes, so that a rename does.
    incoming: PathBuf,
    volumes: PathBuf,
}

#[derive(Debug, Default)]
struct Begun {
    parts: u32,
    entries: usize,
}

impl Default for Puts {
    fn default() -> Self {
        Self::new(Path::new(layout::RUN_DIR))
    }
}

impl Puts {
    fn new(run: &Path) -> Self {
        Self {
            begun: Mutex::default(),
            incoming: run.join("incoming"),
            volumes: run.join("volumes"),
        }
    }

    /// Takes one part; with the last one, the volume becomes what the parts say. On failure the parts are forgotten and
    /// the volume is as it was, or, if the very change over failed, between two states of which one is seen.
    ///
    /// # Errors
    /// [`Error::BadRequest`] for a part that is not the next one or past the caps, [`Error::Step`].
    pub(super) fn put(&self, plan: &PutPlan) -> Result<(), Error> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        let staging = self.incoming.join(&plan.volume);
        if plan.part == 0 {
            begun.insert(plan.volume.clone(), Begun::default());
            remove_tree(&staging).step(|| format!("removing {}", staging.display()))?;
        }
        let result = begun
            .get_mut(&plan.volume)
            .ok_or_else(|| Error::bad("part", "0 was never sent"))
            .and_then(|begun| begun.take(plan))
            .and_then(|()| copied::write(&staging, &plan.entries))
            .and_then(|()| {
                if plan.last {
                    self.take_over(plan, &staging)
                } else {
                    Ok(())
                }
            });
        if result.is_err() || plan.last {
            begun.remove(&plan.volume);
            let removed = remove_tree(&staging);
            result.and(removed.step(|| format!("removing {}", staging.display())))
        } else {
            result
        }
    }

    fn take_over(&self, plan: &PutPlan, staging: &Path) -> Result<(), Error> {
        let place = self.volumes.join(&plan.volume);
        let step = || format!("changing the volume {}", plan.volume);
        let root = fs::symlink_metadata(staging).step(step)?;
        if !root.is_dir() {
            return Err(Error::bad("entries", "are of no directory"));
        }
        if place.exists() {
            return change_over(staging, &place).step(step);
        }
        fs::create_dir_all(&self.volumes).step(step)?;
        fs::rename(staging, &place).step(step)
    }
}

impl Begun {
    fn take(&mut self, plan: &PutPlan) -> Result<(), Error> {
        if plan.part != self.parts {
            let problem = format!("{} came instead of {}", plan.part, self.parts);
            return Err(Error::bad("part", problem));
        }
        self.parts = self.parts.saturating_add(1);
        self.entries = self.entries.saturating_add(plan.entries.len());
        if self.entries > MAX_COPIED_FILES {
            let problem = format!("are more than {MAX_COPIED_FILES}");
            return Err(Error::bad("entries", problem));
        }
        Ok(())
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes `place` what `new` is.
fn change_over(new: &Path, place: &Path) -> io::Result<()> {
    let (wanted, present) = (list(new)?, list(place)?);
    for (name, _) in wanted.iter().filter(|(_, kind)| kind.is_dir()) {
        match present.get(name) {
            Some(there) if there.is_dir() => continue,
            Some(_) => fs::remove_file(place.join(name))?,
            None => {}
        }
        fs::rename(new.join(name), place.join(name))?;
    }
    let data = OsString::from(DATA);
    let others = wanted.keys().filter(|name| **name != data);
    for name in wanted
        .get_key_value(&data)
        .map(|(name, _)| name)
        .into_iter()
        .chain(others)
    {
        if wanted.get(name).is_some_and(|kind| !kind.is_dir()) {
            replace(&new.join(name), &place.join(name))?;
        }
    }
    let gone: BTreeSet<_> = present
        .keys()
        .filter(|name| !wanted.contains_key(*name))
        .collect();
    // What users see goes before what it leads to.
    for directories in [false, true] {
        for name in &gone {
            if present
                .get(*name)
                .is_some_and(|kind| kind.is_dir() == directories)
            {
                remove_tree(&place.join(name))?;
            }
        }
    }
    let (from, to) = (fs::symlink_metadata(new)?, fs::symlink_metadata(place)?);
    if (from.mode(), from.uid(), from.gid()) != (to.mode(), to.uid(), to.gid()) {
        std::os::unix::fs::lchown(place, Some(from.uid()), Some(from.gid()))?;
        fs::set_permissions(place, fs::Permissions::from_mode(from.mode() & 0o7777))?;
    }
    Ok(())
}

/// Renames a link or file over the old one, unless it is the same link.
fn replace(new: &Path, old: &Path) -> io::Result<()> {
    let there = fs::symlink_metadata(old);
    if there.as_ref().is_ok_and(fs::Metadata::is_dir) {
        fs::remove_dir_all(old)?;
    } else if there.is_ok_and(|there| there.is_symlink())
        && fs::read_link(new).ok() == fs::read_link(old).ok()
    {
        return Ok(());
    }
    fs::rename(new, old)
}

fn list(directory: &Path) -> io::Result<BTreeMap<OsString, FileType>> {
    fs::read_dir(directory)?
        .map(|entry| {
            let entry = entry?;
            Ok((entry.file_name(), entry.file_type()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{CopiedContent, CopiedFile};
    use rustix::fs::inotify;

    fn entry(path: &str, content: CopiedContent) -> CopiedFile {
        let owner = fs::metadata("/proc/self").unwrap();
        CopiedFile {
            path: path.into(),
            mode: if content == CopiedContent::Directory {
                0o755
            } else {
                0o640
            },
            uid: owner.uid(),
            gid: owner.gid(),
            content,
            offset: 0,
        }
    }

    fn link(path: &str, target: &str) -> CopiedFile {
        entry(path, CopiedContent::Symlink(target.to_owned()))
    }

    fn state(name: &str, files: &[(&str, &str)]) -> Vec<CopiedFile> {
        let mut entries = vec![
            entry("", CopiedContent::Directory),
            entry(name, CopiedContent::Directory),
            link(DATA, name),
        ];
        for (key, text) in files {
            let data = CopiedContent::Data(text.as_bytes().to_vec());
            entries.push(entry(&format!("{name}/{key}"), data));
            entries.push(link(key, &format!("{DATA}/{key}")));
        }
        entries
    }

    fn plan(part: u32, last: bool, entries: Vec<CopiedFile>) -> PutPlan {
        PutPlan {
            volume: "u.v".to_owned(),
            part,
            last,
            entries,
        }
    }

    fn names(place: &Path) -> Vec<String> {
        let names = list(place).unwrap().into_keys();
        names.map(|name| name.into_string().unwrap()).collect()
    }

    #[test]
    fn next_state_replaces_the_one_before() {
        let run = tempfile::tempdir().unwrap();
        let puts = Puts::new(run.path());
        let place = run.path().join("volumes/u.v");
        puts.put(&plan(0, true, state("..1", &[("a", "old"), ("b", "goes")])))
            .unwrap();
        assert_eq!(fs::read(place.join("a")).unwrap(), b"old");
        let inode = fs::metadata(&place).unwrap().ino();
        puts.put(&plan(
            0,
            true,
            state("..2", &[("a", "new"), ("c", "comes")]),
        ))
        .unwrap();
        assert_eq!(names(&place), ["..2", "..data", "a", "c"]);
        assert_eq!(fs::read(place.join("a")).unwrap(), b"new");
        assert_eq!(
            fs::metadata(place.join("a")).unwrap().mode() & 0o7777,
            0o640
        );
        assert_eq!(
            fs::metadata(&place).unwrap().ino(),
            inode,
            "what is mounted stays"
        );
        assert_eq!(names(&run.path().join("incoming")), Vec::<String>::new());
    }

    #[test]
    fn file_comes_in_pieces_and_shows_when_it_is_whole() {
        let run = tempfile::tempdir().unwrap();
        let puts = Puts::new(run.path());
        let place = run.path().join("volumes/u.v");
        puts.put(&plan(0, false, state("..1", &[("a", "one ")])))
            .unwrap();
        assert!(!place.exists());
        let mut rest = entry("..1/a", CopiedContent::Data(b"two".to_vec()));
        rest.offset = 4;
        puts.put(&plan(1, true, vec![rest])).unwrap();
        assert_eq!(fs::read(place.join("a")).unwrap(), b"one two");
    }

    #[test]
    fn part_out_of_order_or_past_the_cap_is_refused_and_the_volume_stays() {
        let run = tempfile::tempdir().unwrap();
        let puts = Puts::new(run.path());
        let place = run.path().join("volumes/u.v");
        puts.put(&plan(0, true, state("..1", &[("a", "old")])))
            .unwrap();
        puts.put(&plan(1, true, Vec::new())).unwrap_err();
        puts.put(&plan(0, false, state("..2", &[]))).unwrap();
        puts.put(&plan(2, true, Vec::new())).unwrap_err();
        puts.put(&plan(1, true, Vec::new())).unwrap_err();
        let mut hole = entry("..3/a", CopiedContent::Data(Vec::new()));
        hole.offset = 9;
        puts.put(&plan(0, false, state("..3", &[("a", "x")])))
            .unwrap();
        puts.put(&plan(1, true, vec![hole])).unwrap_err();
        let many = vec![entry("x", CopiedContent::Directory); MAX_COPIED_FILES + 1];
        puts.put(&plan(0, true, many)).unwrap_err();
        puts.put(&plan(0, true, vec![link("", "/etc")]))
            .unwrap_err();
        assert_eq!(names(&place), ["..1", "..data", "a"]);
        assert_eq!(names(&run.path().join("incoming")), Vec::<String>::new());
    }

    #[test]
    fn folder_for_a_nested_mount_stays() {
        let run = tempfile::tempdir().unwrap();
        let puts = Puts::new(run.path());
        let place = run.path().join("volumes/u.v");
        let with_folder = |name: &str| {
            let mut entries = state(name, &[("a", name)]);
            entries.push(entry("nested", CopiedContent::Directory));
            plan(0, true, entries)
        };
        puts.put(&with_folder("..1")).unwrap();
        let inode = fs::metadata(place.join("nested")).unwrap().ino();
        puts.put(&with_folder("..2")).unwrap();
        assert_eq!(fs::metadata(place.join("nested")).unwrap().ino(), inode);
        assert_eq!(fs::read(place.join("a")).unwrap(), b"..2");
    }

    #[test]
    fn watcher_of_the_volume_wakes_when_the_data_is_renamed() {
        let run = tempfile::tempdir().unwrap();
        let puts = Puts::new(run.path());
        puts.put(&plan(0, true, state("..1", &[("a", "old")])))
            .unwrap();
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        let flags = inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&watch, run.path().join("volumes/u.v"), flags).unwrap();
        puts.put(&plan(0, true, state("..2", &[("a", "new")])))
            .unwrap();
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&watch, &mut buffer);
        let mut moved = Vec::new();
        while let Ok(event) = reader.next() {
            moved.push(event.file_name().unwrap().to_str().unwrap().to_owned());
        }
        assert_eq!(moved, ["..2", "..data"]);
    }

    #[test]
    fn reader_sees_one_state_or_the_other() {
        let run = tempfile::tempdir().unwrap();
        let place = run.path().join("volumes/u.v");
        let puts = Puts::new(run.path());
        let numbered = |number: u32| {
            let text = number.to_string();
            plan(
                0,
                true,
                state(&format!("..{text}"), &[("a", &text), ("b", &text)]),
            )
        };
        puts.put(&numbered(0)).unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for number in 1..200 {
                    puts.put(&numbered(number)).unwrap();
                }
            });
            while !writer.is_finished() {
                // As a careful reader does: the directory behind ..data is one state.
                let Ok(folder) = fs::File::open(place.join(DATA)) else {
                    continue;
                };
                let read = |name: &str| {
                    let flags = rustix::fs::OFlags::RDONLY;
                    let mode = rustix::fs::Mode::empty();
                    let file = rustix::fs::openat(&folder, name, flags, mode).ok()?;
                    io::read_to_string(fs::File::from(file)).ok()
                };
                if let (Some(a), Some(b)) = (read("a"), read("b")) {
                    assert_eq!(a, b);
                }
            }
        });
    }
}

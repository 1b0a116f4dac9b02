// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The host's mounts, as `/proc/self/mountinfo` lists them (proc_pid_mountinfo(5)). They tell what a kubelet has put at
//! a path: which medium an emptyDir has, and of which volume a subPath is a part.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use ids::Bytes;

/// One mount of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostMount {
    /// Major and minor number of the file system: the same for all mounts of it.
    pub(crate) device: String,
    /// The directory of the file system that is mounted.
    pub(crate) root: PathBuf,
    /// Where it is mounted.
    pub(crate) place: PathBuf,
    /// The file system's type.
    pub(crate) fs_type: String,
    /// Whether this mount of it is read-only.
    read_only: bool,
    /// The file system's own options.
    options: String,
}

/// The host's mounts, in the order in which they were made: of two at one place, the later one is seen. And what some
/// paths are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostMounts {
    mounts: Vec<HostMount>,
    directories: BTreeSet<PathBuf>,
    filled: BTreeSet<PathBuf>,
}

impl HostMounts {
    /// The mounts from the text of `/proc/self/mountinfo`. A line that is none is left out.
    pub fn parse(mountinfo: &[u8]) -> Self {
        Self {
            mounts: mountinfo
                .split(|byte| *byte == b'\n')
                .filter_map(parse_line)
                .collect(),
            directories: BTreeSet::new(),
            filled: BTreeSet::new(),
        }
    }

    /// The same, with those of the sources of a container's bind mounts ([`crate::Bundle::bind_sources`]) that are
    /// directories.
    #[must_use]
    pub fn with_directories(self, directories: impl IntoIterator<Item = PathBuf>) -> Self {
        Self {
            directories: directories.into_iter().collect(),
            ..self
        }
    }

    /// The same, with those of the emptyDirs of medium Disk ([`crate::disk_empty_dirs`]) that somebody on the host has put
    /// files into.
    #[must_use]
    pub fn with_filled(self, filled: BTreeSet<PathBuf>) -> Self {
        Self { filled, ..self }
    }

    /// Whether `path` is known to be an emptyDir with files of the host's.
    pub(crate) fn is_filled(&self, path: &Path) -> bool {
        self.filled.contains(path)
    }

    /// Whether `path` is known to be a directory.
    pub(crate) fn is_directory(&self, path: &Path) -> bool {
        self.directories.contains(path)
    }

    /// The mounts below `folder` that may be written, relative to it, parents first; at most `max` of them.
    pub(crate) fn writable_below(&self, folder: &Path, max: usize) -> Vec<PathBuf> {
        let below: BTreeSet<&Path> = self
            .mounts
            .iter()
            // What is behind an autofs is mounted by who looks at it.
            .filter(|mount| !mount.read_only && mount.fs_type != "autofs")
            .filter_map(|mount| mount.place.strip_prefix(folder).ok())
            .filter(|below| !below.as_os_str().is_empty())
            .collect();
        below.into_iter().take(max).map(Path::to_owned).collect()
    }

    /// All mounts, the last one first.
    pub(crate) fn latest_first(&self) -> impl Iterator<Item = &HostMount> {
        self.mounts.iter().rev()
    }

    /// The paths by which what is mounted by `mount` can be reached through other mounts of the same file system.
    pub(crate) fn other_paths(&self, mount: &HostMount) -> impl Iterator<Item = PathBuf> {
        self.latest_first()
            .filter(move |other| other.device == mount.device && other.place != mount.place)
            .filter_map(move |other| {
                let below = mount.root.strip_prefix(&other.root).ok()?;
                Some(joined(&other.place, below))
            })
    }
}

impl HostMount {
    /// The number of bytes that an option of the file system gives, as in `size=65536k`.
    pub(crate) fn bytes(&self, key: &str) -> Option<Bytes> {
        let value = self
            .options
            .split(',')
            .find_map(|option| option.strip_prefix(key)?.strip_prefix('='))?;
        parse_bytes(value)
    }
}

/// `place` itself if there is nothing below: joining an empty path would add a slash.
fn joined(place: &Path, below: &Path) -> PathBuf {
    if below.as_os_str().is_empty() {
        place.to_owned()
    } else {
        place.join(below)
    }
}

/// A number of bytes as the kernel writes it: with a k, M or G behind it, or without.
fn parse_bytes(text: &str) -> Option<Bytes> {
    let (number, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (text.get(..text.len().checked_sub(1)?)?, 10),
        b'm' | b'M' => (text.get(..text.len().checked_sub(1)?)?, 20),
        b'g' | b'G' => (text.get(..text.len().checked_sub(1)?)?, 30),
        _ => (text, 0),
    };
    number
        .parse::<u64>()
        .ok()?
        .checked_mul(1_u64.checked_shl(shift)?)
        .map(Bytes)
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`: any number of optional fields comes
/// before the dash.
fn parse_line(line: &[u8]) -> Option<HostMount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = text(fields.nth(2)?)?;
    let root = unescaped(fields.next()?);
    let place = unescaped(fields.next()?);
    let read_only = fields
        .next()?
        .split(|byte| *byte == b',')
        .any(|option| option == b"ro");
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = text(fields.next()?)?;
    let options = text(fields.nth(1)?)?;
    Some(HostMount {
        device,
        root,
        place,
        fs_type,
        read_only,
        options,
    })
}

fn text(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.to_vec()).ok()
}

/// The kernel writes space, tab, newline and backslash as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        match (first, behind) {
            (
                b'\\',
                [
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    behind @ ..,
                ],
            ) => {
                let digit = |byte: u8| byte & 7;
                bytes.push(digit(*a) << 6 | digit(*b) << 3 | digit(*c));
                rest = behind;
            }
            _ => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &[u8] = b"22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
        90 22 0:45 / /var/lib/my\\040kubelet/x rw shared:7 master:2 - tmpfs tmpfs rw,size=65536k,mode=755\n\
        91 22 0:45 /sub /elsewhere rw - tmpfs tmpfs rw,size=65536k\n\
        no mount at all\n";

    #[test]
    fn mounts_are_read_with_optional_fields_and_escapes() {
        let mounts = HostMounts::parse(MOUNTINFO);
        assert_eq!(mounts.mounts.len(), 3);
        let tmpfs = mounts.mounts.get(1).unwrap();
        assert_eq!(tmpfs.place, Path::new("/var/lib/my kubelet/x"));
        assert_eq!(tmpfs.fs_type, "tmpfs");
        assert_eq!(tmpfs.bytes("size"), Some(Bytes(64 << 20)));
        assert_eq!(tmpfs.bytes("nr_inodes"), None);
    }

    #[test]
    fn bind_mount_is_found_in_the_file_system_that_it_is_of() {
        let mounts = HostMounts::parse(MOUNTINFO);
        let bind = mounts.mounts.get(2).unwrap();
        let paths: Vec<PathBuf> = mounts.other_paths(bind).collect();
        assert_eq!(paths, [PathBuf::from("/var/lib/my kubelet/x/sub")]);
    }

    #[test]
    fn writable_mounts_below_a_folder_are_found_parents_first() {
        let text = b"1 0 8:1 / /srv rw - ext4 /dev/sda1 rw\n\
            2 1 8:2 / /srv/a/b/c rw - ext4 /dev/sdb1 rw\n\
            3 1 8:2 / /srv/a rw,relatime - ext4 /dev/sdb1 ro\n\
            4 1 8:2 / /srv/fixed ro,relatime - ext4 /dev/sdb1 rw\n\
            5 1 8:2 / /srv/trap rw - autofs systemd-1 rw\n\
            6 1 8:2 / /srvother/a rw - ext4 /dev/sdb1 rw\n";
        let mounts = HostMounts::parse(text);
        let below = |max| mounts.writable_below(Path::new("/srv"), max);
        assert_eq!(below(9), ["a", "a/b/c"].map(PathBuf::from));
        assert_eq!(below(1), [PathBuf::from("a")]);
    }

    #[test]
    fn sizes_are_read_with_and_without_a_unit() {
        for (text, bytes) in [
            ("4096", 4096),
            ("65536k", 64 << 20),
            ("2M", 2 << 20),
            ("1G", 1 << 30),
        ] {
            assert_eq!(parse_bytes(text), Some(Bytes(bytes)), "{text}");
        }
        for text in ["", "k", "50%", "-1", "99999999999999999999G"] {
            assert_eq!(parse_bytes(text), None, "{text}");
        }
    }
}

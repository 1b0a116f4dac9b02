// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The options of a spec's mount, in the words of mount(8) and of the OCI runtime specification's table, as values for the
//! kernel's mount interface (`mount_setattr(2)`, `fsconfig(2)`).

use libc::{
    MOUNT_ATTR__ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME,
    MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY,
    MOUNT_ATTR_RELATIME, MOUNT_ATTR_STRICTATIME, MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_UNBINDABLE,
};

/// The kind of a bind mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bind {
    /// Only the mount at the source.
    One,
    /// The mounts below it too.
    Recursive,
}

/// A mount's options, sorted by what the kernel does with them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    pub(crate) bind: Option<Bind>,
    /// Attributes of the mount itself.
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// Attributes of the mount and of everything below it.
    pub(crate) recursive_set: u64,
    pub(crate) recursive_clear: u64,
    /// The propagation type, and whether it goes for everything below.
    pub(crate) propagation: Option<(u64, bool)>,
    /// The file system's own: `key` or `key=value`.
    pub(crate) data: Vec<(String, Option<String>)>,
}

/// What each word sets and clears.
const ATTRIBUTES: &[(&str, u64, u64)] = &[
    ("ro", MOUNT_ATTR_RDONLY, 0),
    ("rw", 0, MOUNT_ATTR_RDONLY),
    ("nosuid", MOUNT_ATTR_NOSUID, 0),
    ("suid", 0, MOUNT_ATTR_NOSUID),
    ("nodev", MOUNT_ATTR_NODEV, 0),
    ("dev", 0, MOUNT_ATTR_NODEV),
    ("noexec", MOUNT_ATTR_NOEXEC, 0),
    ("exec", 0, MOUNT_ATTR_NOEXEC),
    ("nodiratime", MOUNT_ATTR_NODIRATIME, 0),
    ("diratime", 0, MOUNT_ATTR_NODIRATIME),
    ("nosymfollow", MOUNT_ATTR_NOSYMFOLLOW, 0),
    ("symfollow", 0, MOUNT_ATTR_NOSYMFOLLOW),
    ("noatime", MOUNT_ATTR_NOATIME, MOUNT_ATTR__ATIME),
    ("relatime", MOUNT_ATTR_RELATIME, MOUNT_ATTR__ATIME),
    ("strictatime", MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME),
    ("atime", MOUNT_ATTR_RELATIME, MOUNT_ATTR__ATIME),
    ("norelatime", MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME),
    ("nostrictatime", MOUNT_ATTR_RELATIME, MOUNT_ATTR__ATIME),
];

const PROPAGATION: &[(&str, u64, bool)] = &[
    ("private", MS_PRIVATE, false),
    ("rprivate", MS_PRIVATE, true),
    ("slave", MS_SLAVE, false),
    ("rslave", MS_SLAVE, true),
    ("shared", MS_SHARED, false),
    ("rshared", MS_SHARED, true),
    ("unbindable", MS_UNBINDABLE, false),
    ("runbindable", MS_UNBINDABLE, true),
];

impl MountOptions {
    /// Sorts `options`; later ones win. `kind` is the mount's type, of which "bind" is itself an option.
    pub(crate) fn parse<'a>(
        kind: Option<&str>,
        options: impl IntoIterator<Item = &'a str>,
    ) -> Self {
        let mut parsed = Self {
            bind: (kind == Some("bind")).then_some(Bind::One),
            ..Self::default()
        };
        for option in options {
            parsed.add(option);
        }
        parsed
    }

    fn add(&mut self, option: &str) {
        if let Some((_, set, clear)) = ATTRIBUTES.iter().find(|(word, ..)| *word == option) {
            change(&mut self.set, &mut self.clear, *set, *clear);
            return;
        }
        let recursive = option.strip_prefix('r').filter(|word| !word.is_empty());
        if let Some((_, set, clear)) = ATTRIBUTES
            .iter()
            .find(|(word, ..)| Some(*word) == recursive)
        {
            change(
                &mut self.recursive_set,
                &mut self.recursive_clear,
                *set,
                *clear,
            );
            return;
        }
        if let Some((_, kind, all)) = PROPAGATION.iter().find(|(word, ..)| *word == option) {
            self.propagation = Some((*kind, *all));
            return;
        }
        match option {
            "bind" => self.bind = Some(Bind::One),
            "rbind" => self.bind = Some(Bind::Recursive),
            "" | "defaults" => {}
            // Kernel interfaces of their own: writes reach the disk before they return, or not.
            other => {
                let (key, value) = match other.split_once('=') {
                    Some((key, value)) => (key, Some(value.to_owned())),
                    None => (other, None),
                };
                self.data.push((key.to_owned(), value));
            }
        }
    }
}

fn change(all_set: &mut u64, all_clear: &mut u64, set: u64, clear: u64) {
    *all_set = (*all_set & !clear) | set;
    *all_clear = (*all_clear & !set) | clear;
}

/// What a propagation word of `linux.rootfsPropagation` means; `None` for an unknown word.
pub(crate) fn propagation(word: &str) -> Option<(u64, bool)> {
    PROPAGATION
        .iter()
        .find(|(known, ..)| *known == word)
        .map(|(_, kind, all)| (*kind, *all))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> MountOptions {
        MountOptions::parse(Some("tmpfs"), options.iter().copied())
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let options = parse(&[
            "nosuid",
            "strictatime",
            "mode=755",
            "size=65536k",
            "newinstance",
        ]);
        assert_eq!(options.set, MOUNT_ATTR_NOSUID | MOUNT_ATTR_STRICTATIME);
        // mount_setattr(2): the whole time field is cleared, or nothing of it.
        assert_eq!(options.clear, MOUNT_ATTR__ATIME);
        assert_eq!(
            options.data,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("65536k".to_owned())),
                ("newinstance".to_owned(), None)
            ]
        );
    }

    #[test]
    fn later_option_wins() {
        let options = parse(&["ro", "rw"]);
        assert_eq!((options.set, options.clear), (0, MOUNT_ATTR_RDONLY));
        let options = parse(&["rw", "ro"]);
        assert_eq!((options.set, options.clear), (MOUNT_ATTR_RDONLY, 0));
    }

    #[test]
    fn recursive_words_are_kept_apart() {
        let options = parse(&["rbind", "rro", "rnosuid", "rprivate"]);
        assert_eq!(options.bind, Some(Bind::Recursive));
        assert_eq!(options.recursive_set, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID);
        assert_eq!(options.set, 0);
        assert_eq!(options.propagation, Some((MS_PRIVATE, true)));
        // "relatime" begins with an r and is no recursive word.
        assert_eq!(parse(&["relatime"]).clear, MOUNT_ATTR__ATIME);
    }

    #[test]
    fn bind_is_a_type_and_an_option() {
        assert_eq!(MountOptions::parse(Some("bind"), []).bind, Some(Bind::One));
        assert_eq!(
            MountOptions::parse(None, ["rbind"]).bind,
            Some(Bind::Recursive)
        );
    }
}

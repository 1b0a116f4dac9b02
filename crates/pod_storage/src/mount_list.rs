// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The mounts of containerd's erofs snapshotter as it makes them, for a runtime that puts them together itself: images of
//! layers, perhaps a writable file system, and an overlay that names the mounts before it by templates
//! (containerd core/mount/manager, since 2.2). Pure.
//!
//! ```text
//! ext4   rwlayer.img                        the writable layer: not used, a pod writes to its scratch disk
//! erofs  layer.erofs  ro,loop               one for each layer
//! format/mkdir/overlay  lowerdir={{ overlay 1 3 }}  or  lowerdir={{ mount 1 }}:{{ mount 2 }}
//! ```

use std::ops::RangeInclusive;
use std::path::PathBuf;

use crate::error::StorageError;
use crate::plan::RootfsMount;

/// The most images of one container: each is a disk, of which a VM has 24.
pub(crate) const MAX_IMAGES: usize = 12;

/// The images of `mounts`, topmost first.
///
/// # Errors
/// [`StorageError::UnknownRootfs`], [`StorageError::Overlay`] or [`StorageError::TooManyImages`].
pub(crate) fn images(mounts: &[RootfsMount]) -> Result<Vec<PathBuf>, StorageError> {
    let unknown = || {
        let types: Vec<&str> = mounts.iter().map(|mount| mount.fs_type.as_str()).collect();
        StorageError::UnknownRootfs(types.join("+"))
    };
    let (overlay, parts) = mounts.split_last().ok_or_else(unknown)?;
    let known = parts
        .iter()
        .all(|mount| matches!(mount.fs_type.as_str(), "erofs" | "ext4" | "mkfs/ext4"));
    if !known || overlay.fs_type.rsplit('/').next() != Some("overlay") {
        return Err(unknown());
    }
    let lowerdir = overlay
        .options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
        .unwrap_or_default();
    let invalid = || StorageError::Overlay {
        option: "lowerdir",
        value: lowerdir.to_owned(),
    };
    let mut images = Vec::new();
    for template in lowerdir.split(':') {
        let named = named(template).ok_or_else(invalid)?;
        for index in named.in_order() {
            let part = parts.get(index).ok_or_else(invalid)?;
            // One image over several files (`device=`) is not made by any snapshotter of containerd's.
            let several = part
                .options
                .iter()
                .any(|option| option.starts_with("device="));
            if part.fs_type != "erofs" || several {
                return Err(invalid());
            }
            images.push(PathBuf::from(&part.source));
            if images.len() > MAX_IMAGES {
                return Err(StorageError::TooManyImages { max: MAX_IMAGES });
            }
        }
    }
    Ok(images)
}

/// The mounts that a template names, from the first to the last.
#[derive(Debug, PartialEq, Eq)]
struct Named {
    range: RangeInclusive<usize>,
    downwards: bool,
}

impl Named {
    fn in_order(self) -> Box<dyn Iterator<Item = usize>> {
        if self.downwards {
            Box::new(self.range.rev())
        } else {
            Box::new(self.range)
        }
    }
}

/// What `{{ mount 1 }}` or `{{ overlay 1 3 }}` names.
fn named(template: &str) -> Option<Named> {
    let inner = template.trim().strip_prefix("{{")?.strip_suffix("}}")?;
    let words: Vec<&str> = inner.split_whitespace().collect();
    let (first, last) = match words.as_slice() {
        ["mount", one] => (one.parse().ok()?, one.parse().ok()?),
        ["overlay", first, last] => (first.parse().ok()?, last.parse().ok()?),
        _ => return None,
    };
    let downwards = first > last;
    let range = if downwards {
        last..=first
    } else {
        first..=last
    };
    Some(Named { range, downwards })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(fs_type: &str, source: &str, option: &str) -> RootfsMount {
        RootfsMount {
            fs_type: fs_type.to_owned(),
            source: source.to_owned(),
            options: vec!["ro".to_owned(), option.to_owned()],
        }
    }

    fn three(lowerdir: &str) -> Vec<RootfsMount> {
        vec![
            mount("ext4", "/rwlayer.img", "loop"),
            mount("erofs", "/top.erofs", "loop"),
            mount("erofs", "/bottom.erofs", "loop"),
            mount(
                "format/mkdir/overlay",
                "overlay",
                &format!("lowerdir={lowerdir}"),
            ),
        ]
    }

    fn found(mounts: &[RootfsMount]) -> Vec<String> {
        let images = images(mounts).unwrap();
        let shown = images.iter().map(|path| path.display().to_string());
        shown.collect()
    }

    #[test]
    fn templates_name_the_images_in_their_order() {
        for lowerdir in [
            "{{ mount 1 }}:{{ mount 2 }}",
            "{{ overlay 1 2 }}",
            "{{overlay 1 2}}",
        ] {
            assert_eq!(found(&three(lowerdir)), ["/top.erofs", "/bottom.erofs"]);
        }
        assert_eq!(
            found(&three("{{ overlay 2 1 }}")),
            ["/bottom.erofs", "/top.erofs"]
        );
        assert_eq!(found(&three("{{ mount 2 }}")), ["/bottom.erofs"]);
    }

    #[test]
    fn templates_that_name_no_image_are_refused() {
        for lowerdir in [
            "",
            "/plain",
            "{{ mount 0 }}",
            "{{ mount 3 }}",
            "{{ mount x }}",
            "{{ overlay 1 18446744073709551615 }}",
            "{{ source 1 }}",
        ] {
            assert!(
                matches!(images(&three(lowerdir)), Err(StorageError::Overlay { .. })),
                "{lowerdir}"
            );
        }
        let mut merged = three("{{ overlay 1 2 }}");
        merged[1].options.push("device=/blob".to_owned());
        assert!(images(&merged).is_err());
    }

    #[test]
    fn more_images_than_fit_are_refused() {
        for (count, fits) in [(MAX_IMAGES, true), (MAX_IMAGES + 1, false)] {
            let mut mounts = vec![mount("erofs", "/layer", "loop"); count];
            let lowerdir = format!("lowerdir={{{{ overlay 0 {} }}}}", count - 1);
            mounts.push(mount("format/overlay", "overlay", &lowerdir));
            assert_eq!(images(&mounts).is_ok(), fits, "{count}");
        }
    }
}

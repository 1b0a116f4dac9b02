// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Writes OCI image layouts as one tar file (OCI image specification, image-layout.md), uncompressed: quicker to make
//! and to import. The same input gives the same bytes.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::process;

/// A layer: a tar file and its digest.
pub(crate) struct Layer {
    tar: PathBuf,
    blob: Blob,
}

/// Something named by its digest.
#[derive(Clone)]
struct Blob {
    sha256: String,
    size: u64,
}

impl Blob {
    fn descriptor(&self, media_type: &str) -> Value {
        json!({"mediaType": media_type, "digest": format!("sha256:{}", self.sha256), "size": self.size})
    }
}

impl Layer {
    /// Packs a folder into `tar`, all of it root's.
    ///
    /// # Errors
    /// When tar fails.
    pub(crate) fn pack(folder: &Path, tar: &Path) -> Result<Self> {
        pack(folder, tar)?;
        Self::of_tar(tar)
    }

    /// Takes a tar file as it is.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn of_tar(tar: &Path) -> Result<Self> {
        let mut file = File::open(tar).with_context(|| format!("cannot open {}", tar.display()))?;
        let mut hash = Sha256::new();
        let mut size: u64 = 0;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file
                .read(&mut buffer)
                .with_context(|| format!("cannot read {}", tar.display()))?
            {
                0 => break,
                count => {
                    hash.update(buffer.get(..count).unwrap_or_default());
                    size = size.saturating_add(u64::try_from(count)?);
                }
            }
        }
        Ok(Self {
            tar: tar.to_path_buf(),
            blob: Blob {
                sha256: hexadecimal(hash),
                size,
            },
        })
    }
}

/// An image to write.
pub(crate) struct Image<'a> {
    /// Its full reference.
    pub(crate) name: &'a str,
    /// Its layers, the lowest first.
    pub(crate) layers: &'a [&'a Layer],
    /// The `config` object of the OCI image configuration: Cmd, Entrypoint, Env, User, WorkingDir.
    pub(crate) config: Value,
}

/// Writes images into one archive; layers that they share are in it once. Removes the layers' tar files.
///
/// # Errors
/// When the archive cannot be written.
pub(crate) fn write_archive(images: &[Image], to: &Path) -> Result<()> {
    let staging = tempfile::tempdir_in(to.parent().unwrap_or(Path::new(".")))
        .context("cannot stage an image")?;
    let layout = Layout {
        folder: staging.path(),
    };
    fs::create_dir_all(layout.folder.join("blobs/sha256")).context("cannot stage an image")?;
    let manifests = images
        .iter()
        .map(|image| layout.add(image))
        .collect::<Result<Vec<_>>>()?;
    let index = json!({"schemaVersion": 2, "manifests": manifests});
    for (name, content) in [
        ("index.json", index),
        ("oci-layout", json!({"imageLayoutVersion": "1.0.0"})),
    ] {
        fs::write(layout.folder.join(name), content.to_string())
            .context("cannot stage an image")?;
    }
    pack(layout.folder, to)
}

struct Layout<'a> {
    folder: &'a Path,
}

impl Layout<'_> {
    /// Adds an image's blobs; its entry for the index.
    fn add(&self, image: &Image) -> Result<Value> {
        let mut layers = Vec::new();
        for layer in image.layers {
            let place = self.place(&layer.blob);
            if !place.exists() {
                fs::rename(&layer.tar, &place)
                    .with_context(|| format!("cannot move {}", layer.tar.display()))?;
            }
            layers.push(&layer.blob);
        }
        let diff_ids: Vec<_> = layers
            .iter()
            .map(|blob| format!("sha256:{}", blob.sha256))
            .collect();
        let config = self.write(&json!({
            "architecture": "amd64", "os": "linux", "config": image.config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }))?;
        let manifest = self.write(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config.descriptor("application/vnd.oci.image.config.v1+json"),
            "layers": layers.iter().map(|blob| blob.descriptor("application/vnd.oci.image.layer.v1.tar")).collect::<Vec<_>>(),
        }))?;
        let mut entry = manifest.descriptor("application/vnd.oci.image.manifest.v1+json");
        if let Some(entry) = entry.as_object_mut() {
            // containerd takes an image's name from this annotation.
            entry.insert(
                "annotations".to_owned(),
                json!({"io.containerd.image.name": image.name}),
            );
        }
        Ok(entry)
    }

    fn write(&self, content: &Value) -> Result<Blob> {
        let text = content.to_string();
        let hash = Sha256::new_with_prefix(&text);
        let blob = Blob {
            sha256: hexadecimal(hash),
            size: u64::try_from(text.len())?,
        };
        fs::write(self.place(&blob), text).context("cannot stage an image")?;
        Ok(blob)
    }

    fn place(&self, blob: &Blob) -> PathBuf {
        self.folder.join("blobs/sha256").join(&blob.sha256)
    }
}

fn pack(folder: &Path, to: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args([
        "--sort=name",
        "--mtime=@0",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--format=gnu",
        "-C",
    ]);
    tar.arg(folder).arg("-cf").arg(to).arg(".");
    process::output(&mut tar).map(drop)
}

fn hexadecimal(hash: Sha256) -> String {
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(folder: &Path) -> Vec<u8> {
        let content = folder.join("content");
        fs::create_dir_all(&content).unwrap();
        fs::write(content.join("file"), "text").unwrap();
        let layer = Layer::pack(&content, &folder.join("layer.tar")).unwrap();
        let layers = [&layer];
        let image = |name| Image {
            name,
            layers: &layers,
            config: json!({"Cmd": ["sh"]}),
        };
        let to = folder.join("out.tar");
        write_archive(&[image("a/b:1"), image("a/c:1")], &to).unwrap();
        fs::read(&to).unwrap()
    }

    #[test]
    fn same_content_gives_same_archive() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(archive(one.path()), archive(two.path()));
    }

    #[test]
    fn every_digest_names_its_blob() {
        let folder = tempfile::tempdir().unwrap();
        archive(folder.path());
        process::output(
            Command::new("tar")
                .args(["-xf", "out.tar"])
                .current_dir(folder.path()),
        )
        .unwrap();
        let blobs: Vec<_> = fs::read_dir(folder.path().join("blobs/sha256"))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert_eq!(
            blobs.len(),
            3,
            "a layer and, the same for both names, a configuration and a manifest"
        );
        for blob in blobs {
            let hash = Sha256::new_with_prefix(fs::read(blob.path()).unwrap());
            assert_eq!(hexadecimal(hash), blob.file_name().to_string_lossy());
        }
    }
}

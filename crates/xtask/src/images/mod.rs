// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Container images for demo and tests, made on this machine without a registry.
//!
//! Archives, which `ctr images import` reads: [`small`], a few images on Debian's static busybox, and software from
//! Debian packages: [`software`], servers on one root file system, [`postgres`] and [`gcc`]. All are cached by what they
//! are made from.

mod debian;
mod oci;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use self::oci::{Image, Layer};
use crate::{cache, process, step};

pub(crate) use self::debian::{SOFTWARE, gcc, postgres, software};

/// The file name of [`small`]'s archive.
pub(crate) const SMALL: &str = "small.tar";

const BUSYBOX: &str = "/bin/busybox";
/// Part of the cache key: a change of these files is a change of the images.
const RECIPE: &str = concat!(include_str!("mod.rs"), include_str!("oci.rs"));

/// An archive with `coffer.test/busybox`, `busybox-user` (with a user, a working directory and a variable),
/// `busybox-layers` (two layers, the upper one with a whiteout) and `pause`.
///
/// # Errors
/// When busybox is missing or the cache cannot be written.
pub(crate) fn small() -> Result<PathBuf> {
    let key = cache::Key::default()
        .part("recipe", RECIPE)
        .file(Path::new(BUSYBOX))?;
    let folder = cache::entry("images", key, |folder| {
        step::step("busybox images", || make_small(folder))
    })?;
    Ok(folder.join(SMALL))
}

/// Puts an archive into the built tree, without a copy where one file system holds both.
///
/// # Errors
/// When the built tree cannot be written.
pub(crate) fn install(archive: &Path, dist: &Path) -> Result<()> {
    let folder = dist.join("images");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let place = folder.join(archive.file_name().context("an archive has a name")?);
    fs::remove_file(&place).ok();
    fs::hard_link(archive, &place)
        .or_else(|_| fs::copy(archive, &place).map(drop))
        .with_context(|| format!("cannot put an image at {}", place.display()))
}

fn make_small(folder: &Path) -> Result<()> {
    let staging = tempfile::tempdir_in(folder).context("cannot stage an image")?;
    let base = staging.path().join("base");
    for directory in [
        "bin", "dev", "etc", "home/app", "proc", "root", "sys", "tmp",
    ] {
        fs::create_dir_all(base.join(directory)).context("cannot stage busybox")?;
    }
    fs::set_permissions(base.join("tmp"), fs::Permissions::from_mode(0o1777))
        .context("cannot set a mode")?;
    fs::copy(BUSYBOX, base.join("bin/busybox")).context("cannot copy busybox")?;
    for applet in process::output(Command::new(BUSYBOX).arg("--list"))?
        .lines()
        .filter(|name| *name != "busybox")
    {
        symlink("busybox", base.join("bin").join(applet)).context("cannot link an applet")?;
    }
    let text =
        |path: &str, text: &str| fs::write(base.join(path), text).context("cannot stage busybox");
    text(
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n",
    )?;
    text("etc/group", "root:x:0:\napp:x:1000:\nextra:x:2000:app\n")?;
    let upper = staging.path().join("upper");
    fs::create_dir_all(upper.join("etc")).context("cannot stage a layer")?;
    fs::create_dir_all(upper.join("bin")).context("cannot stage a layer")?;
    fs::write(upper.join("etc/layer"), "upper\n").context("cannot stage a layer")?;
    // OCI image specification, layer.md, "Whiteouts": removes bin/nslookup of the layer below.
    fs::write(upper.join("bin/.wh.nslookup"), "").context("cannot stage a layer")?;

    let base = Layer::pack(&base, &staging.path().join("base.tar"))?;
    let upper = Layer::pack(&upper, &staging.path().join("upper.tar"))?;
    let path = "PATH=/bin";
    let images = [
        Image {
            name: "coffer.test/busybox:latest",
            layers: &[&base],
            config: json!({"Cmd": ["sh"], "Env": [path]}),
        },
        Image {
            name: "coffer.test/busybox-user:latest",
            layers: &[&base],
            config: json!({"Cmd": ["sh"], "Env": [path, "COLOUR=green"], "User": "app", "WorkingDir": "/home/app"}),
        },
        Image {
            name: "coffer.test/busybox-layers:latest",
            layers: &[&base, &upper],
            config: json!({"Cmd": ["sh"], "Env": [path]}),
        },
        Image {
            name: "coffer.test/pause:latest",
            layers: &[&base],
            config: json!({"Entrypoint": ["/bin/sleep", "infinity"]}),
        },
    ];
    oci::write_archive(&images, &folder.join(SMALL))
}

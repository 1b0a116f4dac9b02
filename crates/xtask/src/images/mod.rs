// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Container images for demo and tests, made on this machine without a registry.
//!
//! Two archives, which `ctr images import` reads: [`small`], a few images on Debian's static busybox, and
//! [`software`], servers from Debian packages on one root file system. Both are cached by what they are made from.

mod oci;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use self::oci::{Image, Layer};
use crate::{apt, cache, process, step};

/// The file name of [`small`]'s archive.
pub(crate) const SMALL: &str = "small.tar";
/// The file name of [`software`]'s archive.
pub(crate) const SOFTWARE: &str = "software.tar";

const BUSYBOX: &str = "/bin/busybox";
/// Part of each cache key: a change of these files is a change of the images.
const RECIPE: &str = concat!(include_str!("mod.rs"), include_str!("oci.rs"));

/// Packages on the root file system of [`software`].
const SOFTWARE_PACKAGES: &str = "nginx-light,redis-server,python3,busybox-static,base-passwd";
/// What no container of the tests reads; a third of the bytes.
const NOT_UNPACKED: &[&str] = &[
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/perl*",
    "/usr/lib/x86_64-linux-gnu/perl*",
    "/usr/share/lintian/*",
    "/usr/share/vim/*",
    "/usr/lib/x86_64-linux-gnu/gconv/*",
];
/// What the packages' own scripts would have done, which do not run when packages are only unpacked.
const SET_UP: &str = r#"set -e; cd "$1"
cp usr/share/base-passwd/passwd.master etc/passwd; cp usr/share/base-passwd/group.master etc/group
mkdir -p etc/nginx/sites-enabled var/lib/nginx var/log/nginx run tmp proc sys dev srv; chmod 1777 tmp
ln -s busybox bin/sh; ln -s busybox bin/wget
echo 'server { listen 127.0.0.1:80; location / { return 200 "served by nginx\n"; } }' > etc/nginx/sites-enabled/default
rm -rf var/cache/apt var/lib/apt var/lib/dpkg"#;
/// A server that stops on SIGTERM with an exit code of its own; a program that is PID 1 must ask for the signal.
const PYTHON_SERVER: &str = "import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
http.server.HTTPServer(('127.0.0.1', 8000), http.server.SimpleHTTPRequestHandler).serve_forever()";

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

/// An archive with `coffer.test/nginx`, `redis` and `python`.
///
/// # Errors
/// When Debian's packages cannot be downloaded.
pub(crate) fn software() -> Result<PathBuf> {
    let packages = apt::version("mmdebstrap").unwrap_or_default();
    let key = cache::Key::default()
        .part("recipe", RECIPE)
        .part("mmdebstrap", packages);
    let name = "images of nginx, redis and python from Debian packages";
    let folder = cache::entry("images", key, |folder| {
        step::step(name, || make_software(folder))
    })?;
    Ok(folder.join(SOFTWARE))
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

fn make_software(folder: &Path) -> Result<()> {
    let staging = tempfile::tempdir_in(folder).context("cannot stage an image")?;
    let root = staging.path().join("root.tar");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args([
        "--variant=extract",
        "--aptopt=APT::Install-Recommends \"false\"",
    ]);
    mmdebstrap
        .arg(format!("--include={SOFTWARE_PACKAGES}"))
        .arg(format!("--extract-hook={SET_UP}"));
    mmdebstrap.args(
        NOT_UNPACKED
            .iter()
            .map(|pattern| format!("--dpkgopt=path-exclude={pattern}")),
    );
    mmdebstrap
        .arg("bookworm")
        .arg(&root)
        .env("SOURCE_DATE_EPOCH", "0");
    process::logged(
        &mut mmdebstrap,
        &crate::workspace::logs().join("mmdebstrap.log"),
    )?;

    let layer = Layer::of_tar(&root)?;
    let layers = [&layer];
    let environment = json!(["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]);
    let image = |name, command: serde_json::Value| Image {
        name,
        layers: &layers,
        config: json!({"Cmd": command, "Env": environment, "WorkingDir": "/srv"}),
    };
    let images = [
        image(
            "coffer.test/nginx:latest",
            json!(["nginx", "-g", "daemon off;"]),
        ),
        image(
            "coffer.test/redis:latest",
            json!(["redis-server", "--save", "", "--bind", "127.0.0.1"]),
        ),
        image(
            "coffer.test/python:latest",
            json!(["python3", "-c", PYTHON_SERVER]),
        ),
    ];
    oci::write_archive(&images, &folder.join(SOFTWARE))
}

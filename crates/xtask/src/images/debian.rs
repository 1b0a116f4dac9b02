// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Images of software from Debian packages. The packages are only unpacked: what their own scripts would have done is in
//! a hook of each recipe, and what no test reads is left out, for a node unpacks it all under emulation.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::oci::{self, Image, Layer};
use crate::kernel::SOURCE_TAR;
use crate::{apt, cache, process, step};

/// The file name of [`software`]'s archive.
pub(crate) const SOFTWARE: &str = "software.tar";

/// Part of each cache key: a change of these files is a change of the images.
const RECIPE: &str = concat!(include_str!("debian.rs"), include_str!("oci.rs"));

/// What no container of the tests reads; a third of the bytes and more.
const NOT_UNPACKED: &[&str] = &[
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/i18n/*",
    "/usr/share/zoneinfo/right/*",
    "/usr/share/lintian/*",
    "/usr/share/vim/*",
    "/usr/share/perl*",
    "/usr/bin/perl*",
    "/usr/lib/x86_64-linux-gnu/libperl*",
    "/usr/lib/x86_64-linux-gnu/perl*",
    "/usr/lib/x86_64-linux-gnu/gconv/*",
    "/usr/lib/x86_64-linux-gnu/libLLVM*",
    "/usr/lib/x86_64-linux-gnu/libgprofng*",
    "/usr/lib/x86_64-linux-gnu/lib*san.so*",
    "/usr/lib/x86_64-linux-gnu/libc.a",
    "/usr/lib/x86_64-linux-gnu/libm-*.a",
    "/usr/lib/x86_64-linux-gnu/libmvec.a",
    "/usr/lib/gcc/x86_64-linux-gnu/12/lto1",
    "/usr/lib/gcc/x86_64-linux-gnu/12/lib*san*",
    "/usr/bin/x86_64-linux-gnu-lto-dump-12",
    "/usr/lib/postgresql/15/lib/bitcode/*",
    "/usr/lib/postgresql/15/lib/llvmjit*",
];

/// What every root file system has beside its packages.
const BASE: &str = r#"set -e; cd "$1"
cp usr/share/base-passwd/passwd.master etc/passwd; cp usr/share/base-passwd/group.master etc/group
mkdir -p run tmp proc sys dev srv; chmod 1777 tmp
for applet in $(bin/busybox --list); do
    [ -e bin/$applet ] || [ -e usr/bin/$applet ] || [ -e sbin/$applet ] || [ -e usr/sbin/$applet ] || ln -s busybox bin/$applet
done
rm -rf var/cache/apt var/lib/apt var/lib/dpkg"#;

const SET_UP_NGINX: &str = r#"set -e; cd "$1"
mkdir -p etc/nginx/sites-enabled var/lib/nginx var/log/nginx
echo 'server { listen 127.0.0.1:80; location / { return 200 "served by nginx\n"; } }' > etc/nginx/sites-enabled/default"#;
/// Compiles what the tests import, as the package's own script would; else every start of Python does. By content, for an
/// image's files have no times.
const SET_UP_PYTHON: &str = r#"chroot "$1" python3 -c '
import ctypes, errno, fcntl, http.server, mmap, py_compile, signal, socket, stat, struct, sys, threading
sources = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
for source in sources:
    if source.endswith(".py"):
        py_compile.compile(source, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)'"#;
const SET_UP_POSTGRES: &str = r#"echo postgres:x:999:999::/srv:/bin/sh >> "$1/etc/passwd""#;

/// A server that stops on SIGTERM with an exit code of its own; a program that is PID 1 must ask for the signal.
const PYTHON_SERVER: &str = "import http.server, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
http.server.HTTPServer(('127.0.0.1', 8000), http.server.SimpleHTTPRequestHandler).serve_forever()";

/// A root file system, and the images on it: name, command, the user it runs as.
struct Recipe {
    archive: &'static str,
    packages: &'static str,
    /// Shell, with the root file system as its first argument.
    set_up: String,
    path: &'static str,
    images: Vec<(&'static str, Value, &'static str)>,
}

/// An archive with `coffer.test/nginx`, `redis` and `python`.
///
/// # Errors
/// When Debian's packages cannot be downloaded.
pub(crate) fn software() -> Result<PathBuf> {
    make(&Recipe {
        archive: SOFTWARE,
        packages: "nginx-light,redis-server,python3,busybox-static,base-passwd",
        set_up: format!("{SET_UP_NGINX}\n{SET_UP_PYTHON}"),
        path: "/usr/sbin:/usr/bin:/sbin:/bin",
        images: vec![
            (
                "coffer.test/nginx:latest",
                json!(["nginx", "-g", "daemon off;"]),
                "",
            ),
            (
                "coffer.test/redis:latest",
                json!(["redis-server", "--save", "", "--bind", "127.0.0.1"]),
                "",
            ),
            (
                "coffer.test/python:latest",
                json!(["python3", "-c", PYTHON_SERVER]),
                "",
            ),
        ],
    })
}

/// An archive with `coffer.test/postgres`: the programs, and the user they run as.
///
/// # Errors
/// When Debian's packages cannot be downloaded.
pub(crate) fn postgres() -> Result<PathBuf> {
    make(&Recipe {
        archive: "postgres.tar",
        packages: "postgresql-15,busybox-static,base-passwd",
        set_up: SET_UP_POSTGRES.to_owned(),
        path: "/usr/lib/postgresql/15/bin:/usr/bin:/bin",
        images: vec![("coffer.test/postgres:latest", json!(["sh"]), "postgres")],
    })
}

/// An archive with `coffer.test/gcc`: a compiler, and the source of a library (libfdt, of Debian's kernel source) in
/// `/usr/src/libfdt`.
///
/// # Errors
/// When Debian's packages cannot be downloaded.
pub(crate) fn gcc() -> Result<PathBuf> {
    let library = "scripts/dtc/libfdt";
    make(&Recipe {
        archive: "gcc.tar",
        packages: "gcc,libc6-dev,busybox-static,base-passwd",
        set_up: format!(
            "set -e; mkdir -p \"$1/usr/src\"; \
             tar -xJf {SOURCE_TAR} -C \"$1/usr/src\" --strip-components=3 --wildcards '*/{library}/*'"
        ),
        path: "/usr/bin:/bin",
        images: vec![("coffer.test/gcc:latest", json!(["sh"]), "")],
    })
}

/// The archive of a recipe.
fn make(recipe: &Recipe) -> Result<PathBuf> {
    let packages = apt::version("mmdebstrap").unwrap_or_default();
    let key = cache::Key::default()
        .part("recipe", RECIPE)
        .part("archive", recipe.archive)
        .part("mmdebstrap", packages);
    let name = format!("images of {} from Debian packages", recipe.packages);
    let folder = cache::entry("images", key, |folder| {
        step::step(&name, || write(recipe, folder))
    })?;
    Ok(folder.join(recipe.archive))
}

fn write(recipe: &Recipe, folder: &Path) -> Result<()> {
    let staging = tempfile::tempdir_in(folder).context("cannot stage an image")?;
    let root = staging.path().join("root.tar");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args([
        "--variant=extract",
        "--aptopt=APT::Install-Recommends \"false\"",
    ]);
    mmdebstrap
        .arg(format!("--include={}", recipe.packages))
        .arg(format!("--extract-hook={BASE}"))
        .arg(format!("--extract-hook={}", recipe.set_up));
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
        &crate::workspace::logs().join(format!("mmdebstrap-{}.log", recipe.archive)),
    )?;

    let layer = Layer::of_tar(&root)?;
    let layers = [&layer];
    let environment = json!([format!("PATH={}", recipe.path)]);
    let images: Vec<Image> = recipe
        .images
        .iter()
        .map(|(name, command, user)| Image {
            name,
            layers: &layers,
            config: json!({"Cmd": command, "Env": environment, "WorkingDir": "/srv", "User": user}),
        })
        .collect();
    oci::write_archive(&images, &folder.join(recipe.archive))
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What the nested node boots: Debian's kernel as an ELF file, an initramfs that mounts the root, and a read-only
//! EROFS root with the few programs a node needs, copied from the packages installed on this machine.
//!
//! Made once and cached by the versions of those packages and by the text of this recipe.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::modules::Modules;
use crate::cpio::Archive;
use crate::{apt, cache, process, step};

/// The programs of the node, beside those of busybox. A program comes with the libraries it is linked with.
const PROGRAMS: &[&str] = &[
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "runc",
    "dash",
    "mkfs.ext4",
    "e2fsck",
    "dumpe2fs",
    "mkfs.erofs",
    "ip",
    "tc",
    "ss",
    "nft",
    "lsof",
    "ps",
    "pgrep",
    "unshare",
    "nsenter",
    "losetup",
    "findmnt",
    "mount",
    "umount",
    "/usr/lib/cni/bridge",
    "/usr/lib/cni/host-local",
    "/usr/lib/cni/loopback",
];

/// Libraries that no program of the node has but Rust's test programs do.
const LIBRARIES: &[&str] = &[
    "/lib/x86_64-linux-gnu/libgcc_s.so.1",
    "/lib/x86_64-linux-gnu/libm.so.6",
];

/// Files of the recipe: where they go, their mode and text.
const FILES: &[(&str, u32, &str)] = &[
    (
        "usr/sbin/boot",
        0o755,
        include_str!("../../../../ci/node/boot"),
    ),
    (
        "usr/lib/coffer-node/job",
        0o644,
        include_str!("../../../../ci/node/job"),
    ),
    (
        "etc/containerd/config.toml",
        0o644,
        include_str!("../../../../ci/node/containerd.toml"),
    ),
    (
        "etc/coffer/config.toml",
        0o644,
        include_str!("../../../../ci/node/config.toml"),
    ),
    (
        "etc/cni/net.d/10-bridge.conflist",
        0o644,
        include_str!("../../../../ci/node/cni.conflist"),
    ),
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    ("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n"),
    ("etc/hosts", 0o644, "127.0.0.1 localhost coffer-node\n"),
    ("etc/resolv.conf", 0o644, ""),
];

/// A program of the recipe, see there.
const HOLD_KVM: &str = include_str!("../../../../ci/node/hold_kvm.rs");
const INIT: &str = include_str!("../../../../ci/node/init");
const MODULES: &str = include_str!("../../../../ci/node/modules");
/// Packages whose files are copied; their versions name the image.
const COPIED: &[&str] = &[
    "containerd",
    "runc",
    "containernetworking-plugins",
    "busybox-static",
    "dash",
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "nftables",
    "lsof",
    "procps",
    "util-linux",
    "libc6",
];

/// Files to start a node from; never changed by a node.
pub(crate) struct Image {
    /// Debian's kernel, uncompressed: it starts 1.5 s sooner under emulation than the bzImage that unpacks itself.
    pub(crate) kernel: PathBuf,
    /// Mounts the root.
    pub(crate) initramfs: PathBuf,
    /// The read-only root file system.
    pub(crate) root: PathBuf,
}

/// The image, made now if this machine has none for the packages it has.
///
/// # Errors
/// When a package, a program or a module is missing, or a tool fails.
pub(crate) fn ensure() -> Result<Image> {
    let kernel = installed_kernel()?.map_or_else(downloaded_kernel, Ok)?;
    let mut key = cache::Key::default()
        .part("recipe", include_str!("image.rs"))
        .part("recipe", include_str!("modules.rs"))
        .part("init", INIT)
        .part("modules", MODULES)
        .part("hold_kvm", HOLD_KVM)
        .part("kernel", &kernel.release);
    for package in COPIED {
        key = key.part(package, apt::version(package).unwrap_or_default());
    }
    for (path, _, text) in FILES {
        key = key.part(path, text);
    }
    let folder = cache::entry("node", key, |folder| {
        step::step("node image", || make(&kernel, folder))
    })?;
    Ok(Image {
        kernel: folder.join("vmlinux"),
        initramfs: folder.join("initramfs"),
        root: folder.join("root.erofs"),
    })
}

/// A Debian kernel package's files, installed or unpacked.
struct DebianKernel {
    root: PathBuf,
    release: String,
}

impl DebianKernel {
    /// The newest 6.12 under `root`, if it is there with its modules.
    fn under(root: &Path) -> Result<Option<Self>> {
        let modules = root.join("lib/modules");
        if !modules.exists() {
            return Ok(None);
        }
        let mut releases = Vec::new();
        for entry in
            fs::read_dir(&modules).with_context(|| format!("cannot list {}", modules.display()))?
        {
            let release = entry?.file_name().to_string_lossy().into_owned();
            // The cloud flavour lacks 9p.
            let usable = release.starts_with("6.12.")
                && release.ends_with("-amd64")
                && !release.contains("cloud");
            if usable
                && root
                    .join("boot")
                    .join(format!("vmlinuz-{release}"))
                    .exists()
            {
                releases.push(release);
            }
        }
        releases.sort();
        Ok(releases.pop().map(|release| Self {
            root: root.to_path_buf(),
            release,
        }))
    }
}

fn installed_kernel() -> Result<Option<DebianKernel>> {
    DebianKernel::under(Path::new("/"))
}

/// Not installed, because installing a kernel changes what the machine boots next.
fn downloaded_kernel() -> Result<DebianKernel> {
    let folder = cache::entry(
        "node-kernel",
        cache::Key::default().part("series", "6.12"),
        |folder| {
            step::step("download the node's kernel", || {
                apt::unpack_dependency("linux-image-6.12-amd64", "linux-image-6.12", folder)
            })
        },
    )?;
    let found = DebianKernel::under(&folder)?;
    found.with_context(|| {
        format!(
            "no kernel in Debian's package; remove {} and try again",
            folder.display()
        )
    })
}

fn make(kernel: &DebianKernel, folder: &Path) -> Result<()> {
    let bzimage = kernel
        .root
        .join("boot")
        .join(format!("vmlinuz-{}", kernel.release));
    unpack_kernel(&bzimage, &folder.join("vmlinux"))?;
    let modules = Modules::find(
        &kernel.root.join("lib/modules").join(&kernel.release),
        MODULES,
    )?;
    write_initramfs(&modules, &folder.join("initramfs"))?;
    let staging = folder.join("staging");
    stage_root(&modules, &staging)?;
    let mut mkfs = Command::new("mkfs.erofs");
    mkfs.args(["-T0", "-x-1", "--all-root"])
        .arg(folder.join("root.erofs"))
        .arg(&staging);
    process::output(&mut mkfs)?;
    fs::remove_dir_all(&staging).context("cannot remove the staged root")
}

/// Takes the ELF file out of a bzImage (Linux, Documentation/arch/x86/boot.rst: `payload_offset`, `payload_length`).
fn unpack_kernel(bzimage: &Path, to: &Path) -> Result<()> {
    let image = fs::read(bzimage).with_context(|| format!("cannot read {}", bzimage.display()))?;
    let field = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at.checked_add(4)?)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let payload = || -> Option<&[u8]> {
        let setup_sectors = usize::from(*image.get(0x1f1)?).checked_add(1)?;
        let begin = setup_sectors.checked_mul(512)?.checked_add(field(0x248)?)?;
        // The payload ends with its unpacked size, which zstd would take for another frame.
        image.get(begin..begin.checked_add(field(0x24c)?)?.checked_sub(4)?)
    };
    let payload = payload().with_context(|| format!("{} is not a bzImage", bzimage.display()))?;
    if !payload.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        bail!(
            "{} is not compressed with zstd; this recipe knows Debian's linux-image-6.12",
            bzimage.display()
        );
    }
    let packed = to.with_extension("zst");
    fs::write(&packed, payload).context("cannot write the packed kernel")?;
    process::output(
        Command::new("zstd")
            .args(["-q", "-d", "--rm", "-o"])
            .arg(to)
            .arg(&packed),
    )
    .map(drop)
}

fn write_initramfs(modules: &Modules, to: &Path) -> Result<()> {
    let file = File::create(to).context("cannot create the node's initramfs")?;
    let mut archive = Archive::new(BufWriter::new(file));
    for folder in ["bin", "dev", "lower", "modules", "root", "upper"] {
        archive.directory(folder)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, INIT.as_bytes())?;
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read(program("busybox")?).context("cannot read busybox")?,
    )?;
    for module in &modules.early {
        archive.file(
            &format!("modules/{}.ko", module.name),
            0o644,
            &module.unpacked()?,
        )?;
    }
    archive.file(
        "modules/order",
        0o644,
        Modules::order(&modules.early).as_bytes(),
    )?;
    archive.finish()?;
    Ok(())
}

fn stage_root(modules: &Modules, root: &Path) -> Result<()> {
    for folder in [
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "root",
        "var/lib",
    ] {
        fs::create_dir_all(root.join(folder)).context("cannot stage the node's root")?;
    }
    // As on every Debian: containerd names pods' network namespaces by this path, ip(8) by the other.
    symlink("/run", root.join("var/run")).context("cannot stage the node's root")?;
    for link in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{link}"), root.join(link)).context("cannot stage the node's root")?;
    }
    let mut copied = BTreeSet::new();
    for library in LIBRARIES.iter().map(PathBuf::from) {
        copy(&library, root, &library)?;
        copied.insert(library);
    }
    for name in PROGRAMS.iter().chain(&["busybox"]) {
        let path = program(name)?;
        for library in libraries(&path)? {
            if copied.insert(library.clone()) {
                copy(&library, root, &library)?;
            }
        }
        // Both of Debian's layouts, with and without merged /usr, become the merged one.
        let place = if path.starts_with("/usr") {
            path.clone()
        } else {
            Path::new("/usr").join(path.strip_prefix("/")?)
        };
        copy(&path, root, &place)?;
    }
    for applet in process::output(Command::new("busybox").arg("--list"))?.lines() {
        let missing = ["usr/bin", "usr/sbin"]
            .iter()
            .all(|folder| !root.join(folder).join(applet).exists());
        if missing && applet != "sh" {
            symlink("busybox", root.join("usr/bin").join(applet))
                .context("cannot stage busybox")?;
        }
    }
    // Busybox's own shell would run its applets in place of the real programs on PATH.
    symlink("dash", root.join("usr/bin/sh")).context("cannot stage the shell")?;
    for (path, mode, text) in FILES {
        write(&root.join(path), *mode, text.as_bytes())?;
    }
    let source = root.join("hold_kvm.rs");
    write(&source, 0o644, HOLD_KVM.as_bytes())?;
    let mut rustc = Command::new("rustc");
    rustc.args([
        "--edition=2024",
        "-O",
        "-Cstrip=symbols",
        "-Ctarget-feature=+crt-static",
        "-o",
    ]);
    process::output(
        rustc
            .arg(root.join("usr/lib/coffer-node/hold_kvm"))
            .arg(&source),
    )?;
    fs::remove_file(&source).context("cannot remove a staged source")?;
    for module in &modules.late {
        write(
            &root
                .join("usr/lib/modules")
                .join(format!("{}.ko", module.name)),
            0o644,
            &module.unpacked()?,
        )?;
    }
    write(
        &root.join("usr/lib/modules/order"),
        0o644,
        Modules::order(&modules.late).as_bytes(),
    )
}

/// Where a program is; a name with a slash is its own answer.
fn program(name: &str) -> Result<PathBuf> {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.exists())
        .with_context(|| format!("{name} is not installed, though its package is; reinstall it"))
}

/// The libraries a program is linked with, and its loader.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .context("cannot run ldd")?;
    let listing = String::from_utf8_lossy(&output.stdout);
    if listing.contains("not found") {
        bail!("{} lacks a library:\n{listing}", program.display());
    }
    // Of a static program ldd says so, in words without a slash.
    Ok(listing
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

fn copy(from: &Path, root: &Path, to: &Path) -> Result<()> {
    let place = root.join(to.strip_prefix("/").unwrap_or(to));
    if let Some(folder) = place.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    fs::copy(from, &place)
        .with_context(|| format!("cannot copy {}", from.display()))
        .map(drop)
}

fn write(path: &Path, mode: u32, content: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).context("cannot set a mode")
}

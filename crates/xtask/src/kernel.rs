// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Builds the guest kernel from `kernel-config/` and Debian's kernel source package.
//!
//! The fragments, the source package's version, the compiler and [`RECIPE`] decide the bytes of the image, so they
//! name its place in the cache. What is not there yet is unpacked, configured, checked against the fragments,
//! compiled, packed and checked again.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::kernel_config::{Fragments, read_fragments};
use crate::{apt, cache, kernel_image, process, workspace};

/// Debian packages that the build calls for.
pub(crate) const PACKAGES: &[&str] = &[
    "bc",
    "bison",
    "build-essential",
    "flex",
    "libelf-dev",
    "libssl-dev",
    SOURCE_PACKAGE,
    "xz-utils",
];

const SOURCE_PACKAGE: &str = "linux-source-6.12";
pub(crate) const SOURCE_TAR: &str = "/usr/src/linux-source-6.12.tar.xz";

/// The image's cap in bytes: every pod has a copy in its memory.
const MAX_IMAGE: u64 = 12 << 20;

/// Objects that a build compiles, counted once; only the progress line uses it.
const OBJECTS: usize = 1690;

/// How often the progress line is printed.
const PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// What decides the bytes of the image besides configuration, source and compiler.
struct Recipe {
    /// What is not unpacked (patterns of `tar --exclude`): most of the source's bytes, nothing that the build reads.
    exclude: &'static [&'static str],
    /// Variables of every `make`, so that nothing of the machine, the user or the time gets into the image.
    make: &'static [&'static str],
}

const RECIPE: Recipe = Recipe {
    exclude: &[
        "*/Documentation/*.rst",
        "*/Documentation/devicetree/*",
        "*/Documentation/translations/*",
        "*/drivers/gpu/*.[ch]",
        "*/drivers/infiniband/*.[ch]",
        "*/drivers/media/*.[ch]",
        "*/drivers/net/ethernet/*.[ch]",
        "*/drivers/net/wireless/*.[ch]",
        "*/drivers/scsi/*.[ch]",
        "*/drivers/staging/*.[ch]",
        "*/sound/*.[ch]",
        "*/tools/perf/*",
        "*/tools/testing/*",
    ],
    make: &[
        "KBUILD_BUILD_TIMESTAMP=1970-01-01",
        "KBUILD_BUILD_USER=coffer",
        "KBUILD_BUILD_HOST=coffer",
        "KBUILD_BUILD_VERSION=1",
    ],
};

/// Returns the uncompressed ELF image of the guest kernel, built if the cache does not have it.
///
/// # Errors
/// A missing Debian package, a fragment that contradicts another or that the kernel's own rules override, a failed
/// build (its last lines are in the error), an image that is too big or has no PVH entry.
pub(crate) fn build() -> Result<PathBuf> {
    let fragments = read_fragments(&workspace::root().join("kernel-config"))?;
    let entry = cache::entry("kernel", key(&fragments)?, |folder| {
        make_entry(folder, &fragments)
    })?;
    Ok(entry.join("vmlinux"))
}

/// Everything that decides the bytes of the image.
fn key(fragments: &Fragments) -> Result<cache::Key> {
    let source = apt::version(SOURCE_PACKAGE).with_context(|| {
        format!(
            "the kernel's source is missing: apt-get install {}",
            PACKAGES.join(" ")
        )
    })?;
    let mut key = cache::Key::default()
        .part("fragments", fragments.merged())
        .part("source", source);
    for tool in ["gcc", "ld"] {
        key = key.part(tool, process::output(Command::new(tool).arg("--version"))?);
    }
    let recipe = RECIPE.exclude.iter().chain(RECIPE.make);
    let key = recipe.fold(key, |key, item| key.part("recipe", item));
    Ok(key.part("packing", include_str!("kernel_image.rs")))
}

/// Fills a folder of the cache: the image, the configuration that it was built from, and its symbols' addresses.
fn make_entry(folder: &Path, fragments: &Fragments) -> Result<()> {
    let source = folder.join("source");
    fs::create_dir(&source).with_context(|| format!("cannot create {}", source.display()))?;
    let mut tar = Command::new("tar");
    tar.args(["-xJf", SOURCE_TAR, "--strip-components=1", "-C"])
        .arg(&source);
    tar.args(
        RECIPE
            .exclude
            .iter()
            .map(|pattern| format!("--exclude={pattern}")),
    );
    process::output(&mut tar)?;

    configure(&source, fragments)?;
    compile(&source, &workspace::logs().join("kernel.log"))?;

    let linked = fs::read(source.join("vmlinux")).context("cannot read the linked kernel")?;
    let image = folder.join("vmlinux");
    fs::write(&image, kernel_image::pack(&linked)?)
        .with_context(|| format!("cannot write {}", image.display()))?;
    check_image(&image)?;
    for (from, to) in [(".config", "config"), ("System.map", "System.map")] {
        fs::copy(source.join(from), folder.join(to))
            .with_context(|| format!("cannot keep the kernel's {from}"))?;
    }
    fs::remove_dir_all(&source).with_context(|| format!("cannot remove {}", source.display()))
}

/// Writes `.config`: everything off but what the fragments ask for, and proof that they got it.
fn configure(source: &Path, fragments: &Fragments) -> Result<()> {
    let wanted = source.join(".wanted");
    fs::write(&wanted, fragments.merged())
        .with_context(|| format!("cannot write {}", wanted.display()))?;
    process::output(
        make(source)
            .arg("allnoconfig")
            .env("KCONFIG_ALLCONFIG", ".wanted"),
    )?;
    let resolved =
        fs::read_to_string(source.join(".config")).context("cannot read the kernel's .config")?;
    let refused = fragments.refused_by(&resolved);
    ensure!(
        refused.is_empty(),
        "the kernel's own rules override {} options; change kernel-config/:\n  {}",
        refused.len(),
        refused.join("\n  ")
    );
    Ok(())
}

/// Runs the long part of the build, with a line of progress every few seconds.
fn compile(source: &Path, log: &Path) -> Result<()> {
    if let Some(folder) = log.parent() {
        fs::create_dir_all(folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
    }
    let mut written =
        File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    let errors = written
        .try_clone()
        .context("cannot duplicate a file handle")?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut child = make(source)
        .arg(format!("-j{jobs}"))
        .arg("vmlinux")
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .context("cannot run make")?;
    let started = Instant::now();
    let (mut objects, mut reported) = (0_usize, started);
    for line in BufReader::new(child.stdout.take().context("make's output is not piped")?).lines() {
        let line = line.context("cannot read make's output")?;
        writeln!(written, "{line}").with_context(|| format!("cannot write {}", log.display()))?;
        objects = objects.saturating_add(usize::from(
            line.starts_with("  CC ") || line.starts_with("  AS "),
        ));
        if reported.elapsed() >= PROGRESS_EVERY {
            reported = Instant::now();
            eprintln!(
                "    kernel: {objects} of about {OBJECTS} objects after {} s",
                started.elapsed().as_secs()
            );
        }
    }
    let status = child.wait().context("cannot wait for make")?;
    if !status.success() {
        let said = fs::read(log).unwrap_or_default();
        let end = process::last_lines(&String::from_utf8_lossy(&said));
        bail!(
            "the kernel does not compile ({status}); all of make's output is in {}\n{end}",
            log.display()
        );
    }
    Ok(())
}

/// Checks what the VMMs rely on: the size and the PVH entry (note 18 of owner "Xen", `XEN_ELFNOTE_PHYS32_ENTRY`).
fn check_image(image: &Path) -> Result<()> {
    let size = fs::metadata(image)
        .with_context(|| format!("cannot read {}", image.display()))?
        .len();
    ensure!(
        size <= MAX_IMAGE,
        "the kernel has {size} bytes, more than {MAX_IMAGE}: trim kernel-config/"
    );
    let notes = process::output(
        Command::new("readelf")
            .args(["--notes", "--wide"])
            .arg(image),
    )?;
    ensure!(
        has_pvh_note(&notes),
        "the kernel has no PVH entry: CONFIG_PVH must be on, and the packing must keep the notes"
    );
    Ok(())
}

/// Whether `readelf --notes --wide` shows the PVH entry.
fn has_pvh_note(notes: &str) -> bool {
    notes
        .lines()
        .any(|line| line.trim_start().starts_with("Xen ") && line.contains("(0x00000012)"))
}

/// `make` in the source tree, at low priority.
fn make(source: &Path) -> Command {
    let mut command = Command::new("nice");
    command
        .args(["-n", "10", "make"])
        .args(RECIPE.make)
        .current_dir(source)
        .stdin(Stdio::null());
    // What a user's shell or a make above this one sets must not change the image.
    for variable in [
        "MAKEFLAGS",
        "MAKELEVEL",
        "ARCH",
        "CROSS_COMPILE",
        "KCFLAGS",
        "KAFLAGS",
        "KBUILD_OUTPUT",
        "LLVM",
    ] {
        command.env_remove(variable);
    }
    command.env("LC_ALL", "C");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_xens_note_18_is_the_pvh_entry() {
        let note = "  Xen                  0x00000008\tUnknown note type: (0x00000012)\t   description data: 50 03";
        assert!(has_pvh_note(note));
        assert!(!has_pvh_note(&note.replace("12)", "06)")));
        assert!(!has_pvh_note(&note.replace("Xen", "GNU")));
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Kernel modules of the nested node, with what they depend on, in an order in which they load.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;

/// A module's file, as Debian ships it (compressed with xz).
pub(crate) struct Module {
    /// Its file's name without suffixes.
    pub(crate) name: String,
    file: PathBuf,
}

impl Module {
    /// The module as the kernel loads it, without what it does not need: under emulation that halves the time.
    ///
    /// # Errors
    /// When it cannot be unpacked.
    pub(crate) fn unpacked(&self) -> Result<Vec<u8>> {
        let module = tempfile::NamedTempFile::new().context("cannot create a temporary file")?;
        let output = module.reopen().context("cannot open a temporary file")?;
        let unpacked = Command::new("xz")
            .arg("-dc")
            .arg(&self.file)
            .stdout(output)
            .status();
        if !unpacked.context("cannot run xz")?.success() {
            bail!("cannot unpack {}", self.file.display());
        }
        let strip = ["--strip-unneeded", "--remove-section=.BTF"];
        process::output(Command::new("strip").args(strip).arg(module.path()))?;
        fs::read(module.path()).with_context(|| format!("cannot read {}", module.path().display()))
    }
}

/// The modules of a node: those that mount its disks, and the others.
pub(crate) struct Modules {
    /// Loaded by the initramfs.
    pub(crate) early: Vec<Module>,
    /// Loaded by `boot`.
    pub(crate) late: Vec<Module>,
}

impl Modules {
    /// Finds the modules of `list` (one a line, `*` before those that mount the disks) and what they need, under
    /// `/lib/modules/<release>`.
    ///
    /// # Errors
    /// When a module is neither in `modules.dep` nor built in.
    pub(crate) fn find(folder: &Path, list: &str) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let (dependencies, built_in) = (read("modules.dep")?, read("modules.builtin")?);
        let graph = Graph::parse(&dependencies, &built_in);
        let (mut early, mut late) = (Vec::new(), Vec::new());
        for name in crate::apt::listed(list) {
            if let Some(name) = name.strip_prefix('*') {
                graph.load(name, &mut early)?;
            } else {
                graph.load(name, &mut late)?;
            }
        }
        late.retain(|path| !early.contains(path));
        let modules = |paths: Vec<&str>| {
            paths
                .into_iter()
                .map(|path| Module {
                    name: name_of(path),
                    file: folder.join(path),
                })
                .collect()
        };
        Ok(Self {
            early: modules(early),
            late: modules(late),
        })
    }

    /// The names of `modules`, one a line.
    pub(crate) fn order(modules: &[Module]) -> String {
        modules
            .iter()
            .map(|module| format!("{}\n", module.name))
            .collect()
    }
}

struct Graph<'a> {
    /// By name: the module's path and what it depends on, in modprobe's order (the last loads first).
    modules: HashMap<String, (&'a str, Vec<&'a str>)>,
    built_in: Vec<String>,
}

impl<'a> Graph<'a> {
    fn parse(dependencies: &'a str, built_in: &str) -> Self {
        let modules = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(path, needs)| {
                let needs = needs.split_whitespace().collect();
                (name_of(path), (path, needs))
            });
        Self {
            modules: modules.collect(),
            built_in: built_in.lines().map(name_of).collect(),
        }
    }

    fn load(&self, name: &str, order: &mut Vec<&'a str>) -> Result<()> {
        let name = name.replace('-', "_");
        let Some((path, needs)) = self.modules.get(&name) else {
            if self.built_in.contains(&name) {
                return Ok(());
            }
            bail!("the node's kernel has no module {name}");
        };
        for path in needs.iter().rev().chain([path]) {
            if !order.contains(path) {
                order.push(path);
            }
        }
        Ok(())
    }
}

/// The kernel's name of the module in a file: `kernel/arch/x86/kvm/kvm-amd.ko.xz` is `kvm_amd`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/kvm/kvm-amd.ko.xz: kernel/ccp.ko.xz kernel/kvm/kvm.ko.xz kernel/irq.ko.xz\n\
                                kernel/kvm/kvm.ko.xz: kernel/irq.ko.xz\nkernel/irq.ko.xz:\nkernel/ccp.ko.xz:\n";

    fn order_of(names: &[&str]) -> Result<Vec<String>> {
        let graph = Graph::parse(DEPENDENCIES, "kernel/fs/fuse/fuse.ko\n");
        let mut order = Vec::new();
        for name in names {
            graph.load(name, &mut order)?;
        }
        Ok(order.into_iter().map(name_of).collect())
    }

    #[test]
    fn needed_modules_load_first_and_once() {
        assert_eq!(
            order_of(&["kvm", "kvm-amd"]).unwrap(),
            ["irq", "kvm", "ccp", "kvm_amd"]
        );
    }

    #[test]
    fn built_in_module_needs_no_file() {
        assert_eq!(order_of(&["fuse"]).unwrap(), [""; 0]);
    }

    #[test]
    fn unknown_module_is_an_error() {
        assert!(order_of(&["floppy9"]).is_err());
    }
}

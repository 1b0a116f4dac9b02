// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! vCPUs that come up and go down, and the device by which memory is plugged.
//!
//! All vCPUs that the VM can ever have are in the MP table, and the kernel knows them from the start; `maxcpus=` keeps those
//! down that it is not to have yet. cgroups need nothing done: without a `cpuset.cpus` of its own a container may use all
//! that are up.

use std::fs;
use std::io;
use std::path::Path;

use super::{Linux, disk};
use crate::Error;
use crate::error::Context as _;
use crate::system::Hardware;

/// Where the kernel has its processors (Linux, Documentation/core-api/cpu_hotplug.rst).
const PROCESSORS: &str = "/sys/devices/system/cpu";

impl Hardware for Linux {
    fn resize(&self, vcpus: u32, memory_device: Option<&str>) -> Result<u32, Error> {
        if let Some(device) = memory_device {
            disk::bind_slot(device)?;
        }
        set_online(Path::new(PROCESSORS), vcpus)
    }
}

/// Has the first `wanted` processors up, and the others down as far as the kernel lets them. Gives how many are up.
fn set_online(processors: &Path, wanted: u32) -> Result<u32, Error> {
    let numbers = numbers(processors).step(|| format!("reading {}", processors.display()))?;
    let state = |number: u32| processors.join(format!("cpu{number}/online"));
    for number in numbers.iter().copied().filter(|number| *number < wanted) {
        bring(&state(number), "1").step(|| format!("bringing vCPU {number} up"))?;
    }
    for number in numbers
        .iter()
        .rev()
        .copied()
        .filter(|number| *number >= wanted)
    {
        if let Err(error) = bring(&state(number), "0") {
            crate::log::warn(&format!("vCPU {number} stays up: {error}"));
        }
    }
    let up = numbers.iter().filter(|number| is_up(&state(**number)));
    Ok(u32::try_from(up.count()).unwrap_or(u32::MAX))
}

/// The numbers of all processors, rising.
fn numbers(processors: &Path) -> io::Result<Vec<u32>> {
    let mut numbers: Vec<u32> = fs::read_dir(processors)?
        .flatten()
        .filter_map(|entry| {
            entry
                .file_name()
                .to_str()?
                .strip_prefix("cpu")?
                .parse()
                .ok()
        })
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

/// The boot processor has no such file: it is always up.
fn is_up(state: &Path) -> bool {
    fs::read_to_string(state).map_or(true, |text| text.trim() == "1")
}

fn bring(state: &Path, wanted: &str) -> io::Result<()> {
    match fs::read_to_string(state) {
        Ok(text) if text.trim() != wanted => fs::write(state, wanted),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processors(states: &[Option<&str>]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (number, state) in states.iter().enumerate() {
            let processor = folder.path().join(format!("cpu{number}"));
            fs::create_dir(&processor).unwrap();
            if let Some(state) = state {
                fs::write(processor.join("online"), format!("{state}\n")).unwrap();
            }
        }
        fs::create_dir(folder.path().join("cpufreq")).unwrap();
        folder
    }

    #[test]
    fn processors_come_up_from_the_first_and_go_down_from_the_last() {
        let folder = processors(&[None, Some("1"), Some("0"), Some("0")]);
        let state = |number| {
            let path = folder.path().join(format!("cpu{number}/online"));
            fs::read_to_string(path).unwrap().trim().to_owned()
        };
        assert_eq!(set_online(folder.path(), 3).unwrap(), 3);
        assert_eq!([state(1), state(2), state(3)], ["1", "1", "0"]);
        assert_eq!(set_online(folder.path(), 1).unwrap(), 1);
        assert_eq!([state(1), state(2), state(3)], ["0", "0", "0"]);
        assert_eq!(
            set_online(folder.path(), 9).unwrap(),
            4,
            "there are no more"
        );
    }

    #[test]
    fn processor_that_cannot_come_up_is_an_error_and_one_that_stays_up_none() {
        let folder = processors(&[None]);
        // A directory can be read by nobody.
        fs::create_dir_all(folder.path().join("cpu1/online")).unwrap();
        let error = set_online(folder.path(), 2).unwrap_err();
        assert!(error.to_string().contains("vCPU 1"), "{error}");
        set_online(folder.path(), 1).unwrap();
    }
}

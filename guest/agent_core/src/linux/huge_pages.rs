// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Huge pages: a guest has none until a container with a limit for them comes, and gives them back when it goes
//! (Linux, Documentation/admin-guide/mm/hugetlbpage.rst).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use oci_spec::runtime::LinuxHugepageLimit;

use crate::Error;
use crate::error::Context as _;

/// The kernel's pools, one for each size.
const POOLS: &str = "/sys/kernel/mm/hugepages";

/// What of the guest's memory is available, among other things.
const MEMORY: &str = "/proc/meminfo";

/// No limit is written as the largest number there is, and reserves nothing.
const NO_LIMIT: u64 = i64::MAX.unsigned_abs();

/// Only one change of a pool at a time: each is a read and a write.
static CHANGE: Mutex<()> = Mutex::new(());

/// Pages that a container has reserved.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reserved {
    pool: PathBuf,
    pages: u64,
}

/// Reserves what a container may use by its limits. What was reserved when one fails is in `reserved` all the same.
///
/// # Errors
/// [`Error::Resource`] for pages that the guest's memory does not have.
pub(super) fn reserve(
    limits: &[LinuxHugepageLimit],
    reserved: &mut Vec<Reserved>,
) -> Result<(), Error> {
    reserve_in(Path::new(POOLS), Path::new(MEMORY), limits, reserved)
}

fn reserve_in(
    pools: &Path,
    memory: &Path,
    limits: &[LinuxHugepageLimit],
    reserved: &mut Vec<Reserved>,
) -> Result<(), Error> {
    for limit in limits {
        let bytes = u64::try_from(limit.limit()).unwrap_or(u64::MAX);
        if bytes == 0 || bytes >= NO_LIMIT {
            continue;
        }
        let size = limit.page_size();
        let refuse = |problem: String| Error::resource(format!("hugepageLimits[{size}]"), problem);
        let page = page_bytes(size).ok_or_else(|| refuse("is no page size".to_owned()))?;
        let pages = bytes.div_ceil(page);
        let pool = pools.join(format!("hugepages-{}kB/nr_hugepages", page >> 10));
        if !pool.exists() {
            return Err(refuse("the guest has no pages of this size".to_owned()));
        }
        let step = || format!("reserving {pages} huge pages of {size}");
        let room = available(memory).step(step)?.checked_div(page).unwrap_or(0);
        // A kernel that is asked for more than there is looks for it for minutes, and takes what others need meanwhile.
        let got = if pages > room {
            room
        } else {
            let got = change(&pool, |before| before.saturating_add(pages)).step(step)?;
            reserved.push(Reserved { pool, pages: got });
            got
        };
        if got < pages {
            return Err(refuse(format!(
                "the guest's memory has room for {got} of {pages} pages: raise the pod's memory limit"
            )));
        }
    }
    Ok(())
}

/// Gives reserved pages back.
///
/// # Errors
/// [`Error::Step`] for the first pool that cannot be written.
pub(super) fn release(reserved: &[Reserved]) -> Result<(), Error> {
    for Reserved { pool, pages } in reserved {
        change(pool, |before| before.saturating_sub(*pages))
            .step(|| format!("giving back {pages} huge pages"))?;
    }
    Ok(())
}

/// Sets a pool's size and says by how much it has grown.
fn change(pool: &Path, size: impl FnOnce(u64) -> u64) -> std::io::Result<u64> {
    let _one = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = read(pool)?;
    fs::write(pool, size(before).to_string())?;
    Ok(read(pool)?.saturating_sub(before))
}

/// The bytes that programs can still have (proc_meminfo(5), `MemAvailable`).
fn available(memory: &Path) -> std::io::Result<u64> {
    let text = fs::read_to_string(memory)?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let bytes = kib.and_then(|kib| kib.checked_mul(1 << 10));
    bytes.ok_or_else(|| std::io::Error::other(format!("{} has no MemAvailable", memory.display())))
}

fn read(pool: &Path) -> std::io::Result<u64> {
    fs::read_to_string(pool)?
        .trim()
        .parse()
        .map_err(std::io::Error::other)
}

/// "2MB" and "1GB", as the OCI runtime spec writes page sizes.
fn page_bytes(text: &str) -> Option<u64> {
    let (number, shift) = [("KB", 10_u32), ("MB", 20), ("GB", 30)]
        .into_iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, shift)))?;
    let bytes = number.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (bytes > 0).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(pages: &str) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let pool = dir.path().join("hugepages-2048kB/nr_hugepages");
        fs::create_dir(pool.parent().unwrap()).unwrap();
        fs::write(&pool, pages).unwrap();
        // Five pages of 2 MiB.
        let memory = "MemFree:           512 kB\nMemAvailable:      10240 kB\n";
        fs::write(dir.path().join("meminfo"), memory).unwrap();
        (dir, pool)
    }

    fn reserve_in(
        dir: &Path,
        limits: &[LinuxHugepageLimit],
        reserved: &mut Vec<Reserved>,
    ) -> Result<(), Error> {
        super::reserve_in(dir, &dir.join("meminfo"), limits, reserved)
    }

    fn limits(size: &str, limit: u64) -> Vec<LinuxHugepageLimit> {
        let json = serde_json::json!([{"pageSize": size, "limit": limit}]);
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn pages_are_reserved_for_a_limit_and_given_back() {
        let (dir, pool) = pools("3\n");
        let mut reserved = Vec::new();
        reserve_in(dir.path(), &limits("2MB", 5 << 20), &mut reserved).unwrap();
        assert_eq!(fs::read(&pool).unwrap(), b"6");
        release(&reserved).unwrap();
        assert_eq!(fs::read(&pool).unwrap(), b"3");
    }

    #[test]
    fn more_than_the_memory_has_is_refused_before_the_kernel_looks_for_it() {
        let (dir, pool) = pools("0");
        let mut reserved = Vec::new();
        reserve_in(dir.path(), &limits("2MB", 10 << 20), &mut reserved).unwrap();
        assert_eq!(fs::read(&pool).unwrap(), b"5");
        let error = reserve_in(dir.path(), &limits("2MB", 12 << 20), &mut reserved).unwrap_err();
        assert!(error.to_string().contains("5 of 6 pages"), "{error}");
        assert_eq!(
            (fs::read(&pool).unwrap(), reserved.len()),
            (b"5".to_vec(), 1)
        );
    }

    #[test]
    fn no_limit_reserves_nothing() {
        let (dir, pool) = pools("0");
        let mut reserved = Vec::new();
        for limit in [0, NO_LIMIT] {
            reserve_in(dir.path(), &limits("1GB", limit), &mut reserved).unwrap();
        }
        assert_eq!(
            (fs::read(&pool).unwrap(), reserved.len()),
            (b"0".to_vec(), 0)
        );
    }

    #[test]
    fn size_that_the_guest_does_not_have_is_refused() {
        let (dir, _) = pools("0");
        for size in ["1GB", "big", "0MB"] {
            let error = reserve_in(dir.path(), &limits(size, 1 << 30), &mut Vec::new());
            assert!(error.unwrap_err().to_string().contains(size), "{size}");
        }
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Where random bytes come from.
#![expect(
    unsafe_code,
    reason = "getrandom(2) has no safe wrapper in std, and a jailed VMM has no /dev/urandom"
)]

use std::io;

/// A source of random bytes; the seam at which tests make them known or missing.
///
/// Caller: the device's worker, one call per request.
pub trait EntropySource: Send + Sync {
    /// Fills all of `to`.
    ///
    /// # Errors
    /// The source's; `to` is then undefined.
    fn fill(&self, to: &mut [u8]) -> io::Result<()>;
}

/// The host kernel's generator.
pub struct HostEntropy;

impl EntropySource for HostEntropy {
    fn fill(&self, to: &mut [u8]) -> io::Result<()> {
        let mut rest = to;
        while !rest.is_empty() {
            // SAFETY: the pointer and length are those of a live, writable slice.
            let n = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
            match usize::try_from(n) {
                Ok(n) => {
                    rest = rest
                        .split_at_mut_checked(n)
                        .map_or(&mut [], |(_, later)| later)
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The few system calls that no crate wraps safely. Everything here is called by a process with one thread.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::process::Pid;

/// `clone3(2)`; libc's constant is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// A new process that shares nothing with its maker but its parent.
pub(crate) enum Cloned {
    /// In the maker, with the child's pid as the maker sees it.
    Parent(Pid),
    /// In the child.
    Child,
}

/// Makes a process in the namespaces of `flags` (`CLONE_NEW*`) and in the cgroup of the directory `cgroup`; its parent is
/// the caller's parent, so that the caller can end and the agent alone waits for the child.
///
/// # Errors
/// Those of `clone3(2)`.
pub(crate) fn clone_sibling(flags: libc::c_int, cgroup: impl AsFd) -> io::Result<Cloned> {
    let flags = flags | libc::CLONE_PARENT;
    let arguments = libc::clone_args {
        flags: u64::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)? | CLONE_INTO_CGROUP,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: u64::try_from(cgroup.as_fd().as_raw_fd())
            .map_err(|_| io::ErrorKind::InvalidInput)?,
    };
    // SAFETY: without CLONE_VM and with no stack given this is a fork: the child has its own copy of memory and goes on
    // at this place. The process has one thread (module rule), so no lock of another thread is held in the copy.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of_val(&arguments),
        )
    };
    match i32::try_from(result) {
        Ok(0) => Ok(Cloned::Child),
        Ok(pid) => Pid::from_raw(pid)
            .filter(|_| pid > 0)
            .map(Cloned::Parent)
            .ok_or_else(io::Error::last_os_error),
        Err(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// What `mount_setattr(2)` changes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct AttributeChange {
    /// `MOUNT_ATTR_*`.
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// One of `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0.
    pub(crate) propagation: u64,
    pub(crate) recursive: bool,
}

/// Changes the mount at `mount`, which may be detached.
///
/// # Errors
/// Those of `mount_setattr(2)`.
pub(crate) fn mount_setattr(mount: impl AsFd, change: AttributeChange) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: change.set,
        attr_clr: change.clear,
        propagation: change.propagation,
        userns_fd: 0,
    };
    let mut flags = libc::AT_EMPTY_PATH;
    if change.recursive {
        flags |= libc::AT_RECURSIVE;
    }
    // SAFETY: the path is an empty C string and `attributes` lives over the call; both sizes are right.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    check(result)
}

/// Every descriptor from 3 on is closed by the next `execve(2)`.
///
/// # Errors
/// Those of `close_range(2)`.
pub(crate) fn close_on_exec_from_3() -> io::Result<()> {
    // SAFETY: no pointer is passed; no descriptor is closed now.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(result)
}

/// The kernel's number of signals, and the size of a set of them in bytes.
const SIGNALS: libc::c_int = 64;
const SIGNAL_SET_BYTES: usize = 8;

/// Gives every signal its default action and unblocks all: Rust's runtime ignores SIGPIPE, the kernel starts its init with
/// libc's own two signals ignored, and an ignored signal stays so over `execve(2)`.
pub(crate) fn default_signals() {
    // The kernel's struct, not libc's: handler (SIG_DFL is 0), flags, restorer, mask.
    let default = [0u64; 4];
    for signal in 1..=SIGNALS {
        // SAFETY: the kernel reads `default`, which has the size of its struct. SIGKILL and SIGSTOP are refused, which is
        // harmless.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                SIGNAL_SET_BYTES,
            )
        };
    }
    // SAFETY: both calls write to `none`, which is valid and lives over them.
    unsafe {
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// A session keyring of the process's own, where the kernel has keyrings.
///
/// # Errors
/// Those of `keyctl(2)`; a kernel without keyrings is none.
pub(crate) fn new_session_keyring() -> io::Result<()> {
    // SAFETY: a null name asks for an anonymous keyring.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
    match check(result) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => other,
    }
}

/// Sets the I/O priority of the calling process: `class` as `IOPRIO_CLASS_*`, `level` 0 to 7.
///
/// # Errors
/// Those of `ioprio_set(2)`.
pub(crate) fn set_io_priority(class: u16, level: u16) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_SHIFT: u32 = 13;
    let value = (libc::c_uint::from(class) << IOPRIO_CLASS_SHIFT) | libc::c_uint::from(level);
    // SAFETY: no pointer is passed.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, value) })
}

/// Runs the process as a 32-bit one sees the system (`PER_LINUX32`).
///
/// # Errors
/// Those of `personality(2)`.
pub(crate) fn set_personality_32_bit() -> io::Result<()> {
    const PER_LINUX32: libc::c_ulong = 0x0008;
    // SAFETY: no pointer is passed.
    check(unsafe { libc::personality(PER_LINUX32) }.into())
}

/// Brings the loopback interface of the calling process's network namespace up.
///
/// # Errors
/// Those of `socket(2)` and `SIOCSIFFLAGS`.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: `ifreq` is plain data; zeroes are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(c"lo".to_bytes_with_nul()) {
        *to = libc::c_char::try_from(*from).unwrap_or(0);
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(0);
    // SAFETY: the request is a valid `ifreq` with a terminated name, and lives over the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    check(result.into())
}

/// Puts a seccomp filter in force for the calling thread, for good.
///
/// # Errors
/// Those of `seccomp(2)`.
pub(crate) fn load_seccomp(program: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads `len` instructions at `filter` and writes none; both live over the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })
}

/// Makes a system call without arguments.
///
/// # Errors
/// The call's.
#[cfg(test)]
pub(crate) fn call(number: libc::c_long) -> io::Result<()> {
    // SAFETY: the tests make calls that do not exist or that a filter answers.
    check(unsafe { libc::syscall(number) })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

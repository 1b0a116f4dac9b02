// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Mounts in the server's namespace, made from outside.
#![expect(
    unsafe_code,
    reason = "mount_setattr has no wrapper; entering a namespace needs unshare"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use crate::{Access, FileServerError, Propagation, Share, ShareName};

/// `struct mount_attr` (Linux `include/uapi/linux/mount.h`).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_NOEXEC: u64 = 0x8;
const MS_PRIVATE: u64 = 1 << 18;
const MS_SLAVE: u64 = 1 << 19;
const AT_RECURSIVE: libc::c_uint = 0x8000;

/// What a mount point in the server's root is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Directory,
    File,
}

fn failed(
    operation: &'static str,
    name: &ShareName,
) -> impl FnOnce(io::Error) -> FileServerError + use<> {
    let name = name.clone();
    move |source| FileServerError::Mount {
        operation,
        name,
        source,
    }
}

/// Mounts `share` in the namespace of `server`.
pub(crate) fn add(server: BorrowedFd<'_>, share: &Share) -> Result<(), FileServerError> {
    let name = &share.name;
    let stat = rustix::fs::fstat(&share.source)
        .map_err(|error| failed("look at the source", name)(error.into()))?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Directory,
        FileType::RegularFile => Kind::File,
        _ => return Err(FileServerError::Kind { name: name.clone() }),
    };
    let tree = tree(share).map_err(failed("clone the mount", name))?;
    inside(server, || {
        let root = writable_root()?;
        make_mount_point(root.as_fd(), name.as_str(), kind)?;
        put(&tree, name.as_str()).inspect_err(|_| {
            let _ = remove_mount_point(root.as_fd(), name.as_str());
        })
    })
    .map_err(failed("enter the server's namespace and mount", name))
}

/// Unmounts what [`add`] has mounted. Files that the guest has open stay open until it lets go of them.
pub(crate) fn remove(server: BorrowedFd<'_>, name: &ShareName) -> Result<(), FileServerError> {
    inside(server, || {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        rustix::mount::unmount(name.as_str(), flags)?;
        remove_mount_point(writable_root()?.as_fd(), name.as_str())
    })
    .map_err(failed("enter the server's namespace and unmount", name))
}

/// A detached copy of the source's mount and of those below it, as the server shall have it.
fn tree(share: &Share) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(&share.source, "", flags)?;
    // Nothing on it means anything to the server but bytes and names.
    let everywhere = MountAttr {
        set: MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC,
        propagation: match share.propagation {
            Propagation::Private => MS_PRIVATE,
            Propagation::FromHost => MS_SLAVE,
        },
        ..MountAttr::default()
    };
    set_attributes(tree.as_fd(), AT_RECURSIVE, &everywhere)?;
    let read_only = MountAttr {
        set: MOUNT_ATTR_RDONLY,
        ..MountAttr::default()
    };
    match share.access {
        Access::ReadWrite => {}
        Access::ReadOnly => set_attributes(tree.as_fd(), 0, &read_only)?,
        Access::RecursiveReadOnly => set_attributes(tree.as_fd(), AT_RECURSIVE, &read_only)?,
    }
    Ok(tree)
}

fn set_attributes(
    mount: BorrowedFd<'_>,
    flags: libc::c_uint,
    attributes: &MountAttr,
) -> io::Result<()> {
    let flags = flags | AtFlags::EMPTY_PATH.bits();
    // SAFETY: the path is a C string, the structure has the layout and the size that are given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<MountAttr>(),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Runs `work` in the mount namespace of `server`, on a thread of its own, which ends with it: its root and working
/// directory are those of the server.
fn inside<F>(server: BorrowedFd<'_>, work: F) -> io::Result<()>
where
    F: FnOnce() -> io::Result<()> + Send,
{
    let enter = || {
        // SAFETY: unshares root and working directory, not descriptors.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        rustix::thread::move_into_thread_name_spaces(server, ThreadNameSpaceType::MOUNT)?;
        work()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("share-mounts".to_owned())
            .spawn_scoped(scope, enter)?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the mounting thread has panicked")))
    })
}

/// The server's root by a mount of its own, which is writable and seen by nobody else.
fn writable_root() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let root = rustix::mount::open_tree(CWD, "/", flags)?;
    let writable = MountAttr {
        clear: MOUNT_ATTR_RDONLY,
        ..MountAttr::default()
    };
    set_attributes(root.as_fd(), 0, &writable)?;
    Ok(root)
}

fn make_mount_point(root: BorrowedFd<'_>, name: &str, kind: Kind) -> io::Result<()> {
    match kind {
        Kind::Directory => rustix::fs::mkdirat(root, name, Mode::from_raw_mode(0o755))?,
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(root, name, flags, Mode::from_raw_mode(0o644))?;
        }
    }
    Ok(())
}

fn remove_mount_point(root: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(root, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTDIR) => rustix::fs::unlinkat(root, name, AtFlags::empty())?,
        result => result?,
    }
    Ok(())
}

/// Attaches `tree` at `name` of the root that the server sees.
fn put(tree: &OwnedFd, name: &str) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let at = rustix::fs::openat(CWD, name, flags, Mode::empty())?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", &at, "", flags)?;
    Ok(())
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The file server through the file system device: FUSE requests in the queues, files on the host. Needs root, no KVM.
#![expect(clippy::unwrap_used, reason = "a helper outside the test functions")]

mod common;
#[path = "common/guest.rs"]
mod guest;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};

use common::{bounded, share, spawn};
use file_server::{Access, FileServer};
use guest::{Guest, ROOT, c_string, opcode};
use tempfile::TempDir;

struct Rig {
    server: FileServer,
    guest: Guest,
    folder: TempDir,
}

/// A guest that has mounted a server of one empty folder, as `data`.
async fn rig(access: Access) -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let (server, connection) = spawn(&[share("data", folder.path(), access)]).await;
    let mut guest = Guest::boot(connection);
    guest.init();
    Rig {
        server,
        guest,
        folder,
    }
}

#[tokio::test]
async fn guest_reads_what_the_host_wrote_and_the_host_what_the_guest_wrote() {
    let Rig {
        server: _server,
        mut guest,
        folder,
    } = rig(Access::ReadWrite).await;
    fs::write(folder.path().join("from-host"), "hello guest").unwrap();
    let data = guest.lookup(ROOT, "data").unwrap();
    let file = guest.lookup(data, "from-host").unwrap();
    let handle = guest.open(file, 0).unwrap();
    assert_eq!(guest.read(file, handle, 100).unwrap(), b"hello guest");

    let (file, handle) = guest.create(data, "from-guest", 0o640).unwrap();
    guest.write(file, handle, b"hello host").unwrap();
    assert_eq!(
        fs::read(folder.path().join("from-guest")).unwrap(),
        b"hello host"
    );
    // The answer is in memory a moment before its interrupt.
    while guest.interrupts() == 0 {
        guest.wait().unwrap();
    }
    assert_eq!(*guest.losses.lock().unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn files_belong_to_the_guests_user_and_others_can_be_read_by_root() {
    let Rig {
        server: _server,
        mut guest,
        folder,
    } = rig(Access::ReadWrite).await;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let data = guest.lookup(ROOT, "data").unwrap();
    guest.user = (1234, 5678);
    guest.create(data, "mine", 0o600).unwrap();
    let metadata = fs::metadata(folder.path().join("mine")).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1234, 5678));
    assert_eq!(metadata.mode() & 0o7777, 0o600);

    let other = folder.path().join("other");
    fs::write(&other, "secret").unwrap();
    std::os::unix::fs::chown(&other, Some(999), Some(999)).unwrap();
    fs::set_permissions(&other, fs::Permissions::from_mode(0o000)).unwrap();
    guest.user = (0, 0);
    let node = guest.lookup(data, "other").unwrap();
    let handle = guest.open(node, 0).unwrap();
    assert_eq!(guest.read(node, handle, 100).unwrap(), b"secret");
}

#[tokio::test]
async fn read_only_share_cannot_be_written_whatever_the_guest_is() {
    let Rig {
        server: _server,
        mut guest,
        folder,
    } = rig(Access::RecursiveReadOnly).await;
    fs::write(folder.path().join("file"), "content").unwrap();
    let data = guest.lookup(ROOT, "data").unwrap();
    assert_eq!(guest.create(data, "new", 0o600), Err(libc::EROFS));
    let node = guest.lookup(data, "file").unwrap();
    assert_eq!(
        guest.open(node, libc::O_RDWR.cast_unsigned()),
        Err(libc::EROFS)
    );
    assert_eq!(
        guest.create(ROOT, "new", 0o600),
        Err(libc::EROFS),
        "the root too"
    );
}

#[tokio::test]
async fn no_name_leads_out_of_the_root() {
    let Rig {
        server: _server,
        mut guest,
        folder,
    } = rig(Access::ReadWrite).await;
    symlink("/etc", folder.path().join("link")).unwrap();
    let data = guest.lookup(ROOT, "data").unwrap();
    for parent in [ROOT, data] {
        for name in [
            "../etc",
            "/etc/passwd",
            "/proc/self/fd",
            "link/passwd",
            "data/link/passwd",
        ] {
            assert!(guest.lookup(parent, name).is_err(), "{name}");
        }
        // What leads upwards, if it is answered at all, ends at the root.
        for name in ["..", "../..", "data/../.."] {
            if let Ok(above) = guest.lookup(parent, name) {
                assert_eq!(guest.lookup(above, "etc"), Err(libc::ENOENT), "{name}");
            }
        }
    }
    let link = guest.lookup(data, "link").unwrap();
    assert!(
        guest.lookup(link, "passwd").is_err(),
        "links are the guest's to follow"
    );
}

#[tokio::test]
async fn devices_and_file_capabilities_cannot_be_made_but_pipes_and_attributes_can() {
    let Rig {
        server: _server,
        mut guest,
        folder,
    } = rig(Access::ReadWrite).await;
    let data = guest.lookup(ROOT, "data").unwrap();
    let null = guest.mknod(data, "null", libc::S_IFCHR | 0o666, 0x103);
    assert_eq!(null, Err(libc::EPERM));
    guest.mknod(data, "pipe", libc::S_IFIFO | 0o600, 0).unwrap();
    let pipe = fs::symlink_metadata(folder.path().join("pipe")).unwrap();
    assert!(pipe.file_type().is_fifo());

    let (file, _) = guest.create(data, "file", 0o700).unwrap();
    let mut set = |name: &str, value: &[u8]| {
        let size = u32::try_from(value.len()).unwrap();
        let mut payload = [size.to_le_bytes(), [0; 4]].concat();
        payload.extend(c_string(name));
        payload.extend(value);
        guest.call(opcode::SETXATTR, file, &payload)
    };
    let all_capabilities = [[1, 0, 0, 2], [0xff; 4], [0; 4], [0xff; 4], [0; 4]].concat();
    assert_eq!(
        set("security.capability", &all_capabilities),
        Err(libc::EPERM)
    );
    assert_eq!(set("trusted.overlay.opaque", b"y"), Err(libc::EPERM));
    let user = set("user.note", b"x");
    assert!(matches!(user, Ok(_) | Err(libc::EOPNOTSUPP)), "{user:?}");
}

/// Fields of a request, little-endian.
fn fields(fields: &[(u64, usize)]) -> Vec<u8> {
    let bytes = fields
        .iter()
        .flat_map(|(value, len)| value.to_le_bytes().into_iter().take(*len));
    bytes.collect()
}

/// A missing line in the filter is a dead pod, so every request is tried at least once.
#[tokio::test]
async fn every_request_that_linux_makes_is_served_under_the_filter() {
    let Rig {
        server: _server,
        mut guest,
        folder,
    } = rig(Access::ReadWrite).await;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let data = guest.lookup(ROOT, "data").unwrap();
    let names = |names: &[&str]| {
        names
            .iter()
            .flat_map(|name| c_string(name))
            .collect::<Vec<u8>>()
    };
    for user in [(0, 0), (1234, 5678)] {
        guest.user = user;
        let (file, _) = guest.create(data, "file", 0o644).unwrap();
        let fh = guest.open(file, libc::O_RDWR.cast_unsigned()).unwrap();
        guest.write(file, fh, b"some content").unwrap();
        let setattr = |valid: u64| {
            let times = [(1, 8), (2, 8), (3, 8), (4, 4), (5, 4), (6, 4)];
            let head = [(valid, 4), (0, 4), (fh, 8), (5, 8), (0, 8)];
            let tail = [
                (0o600, 4),
                (0, 4),
                (user.0.into(), 4),
                (user.1.into(), 4),
                (0, 4),
            ];
            fields(&[&head[..], &times, &tail].concat())
        };
        let dir = |guest: &mut Guest, opcode, payload: &[u8]| guest.call(opcode, data, payload);
        let mkdir = [fields(&[(0o755, 4), (0, 4)]), names(&["dir"])].concat();
        dir(&mut guest, 9, &mkdir).unwrap();
        dir(&mut guest, 6, &names(&["link", "file"])).unwrap(); // SYMLINK
        dir(
            &mut guest,
            13,
            &[fields(&[(file, 8)]), names(&["hard"])].concat(),
        )
        .unwrap();
        let link = guest.lookup(data, "link").unwrap();
        let sub = guest.lookup(data, "dir").unwrap();
        guest.call(5, link, &[]).unwrap(); // READLINK
        guest.call(3, file, &fields(&[(0, 8), (fh, 8)])).unwrap(); // GETATTR
        for valid in [1, 2 | 4, 8, 8 | 64, 16 | 32, 1 << 7 | 1 << 8] {
            guest.call(4, file, &setattr(valid)).unwrap();
        }
        guest.call(17, data, &[]).unwrap(); // STATFS
        guest.call(20, file, &fields(&[(fh, 8), (0, 8)])).unwrap(); // FSYNC
        guest.call(20, file, &fields(&[(fh, 8), (1, 8)])).unwrap();
        for node in [file, link, sub] {
            let set = [fields(&[(1, 4), (0, 4)]), names(&["user.a"]), b"x".to_vec()].concat();
            let _ = guest.call(21, node, &set); // SETXATTR: not every file system has them
            let _ = guest.call(
                22,
                node,
                &[fields(&[(100, 8)]), names(&["user.a"])].concat(),
            );
            let _ = guest.call(23, node, &fields(&[(100, 8)])); // LISTXATTR
            let _ = guest.call(24, node, &names(&["user.a"])); // REMOVEXATTR
        }
        guest
            .call(25, file, &fields(&[(fh, 8), (0, 8), (0, 8)]))
            .unwrap(); // FLUSH
        let dh = guest.call(27, data, &fields(&[(0, 8)])).unwrap(); // OPENDIR
        let dh = u64::from_le_bytes(dh[..8].try_into().unwrap());
        let read_dir = fields(&[(dh, 8), (0, 8), (4096, 8), (0, 8), (0, 8)]);
        for opcode in [28, 44] {
            let entries = dir(&mut guest, opcode, &read_dir).unwrap(); // READDIR, READDIRPLUS
            assert!(entries.windows(4).any(|window| window == b"file"));
        }
        dir(&mut guest, 30, &fields(&[(dh, 8), (0, 8)])).unwrap(); // FSYNCDIR
        dir(&mut guest, 29, &[fields(&[(dh, 8)]), vec![0; 16]].concat()).unwrap(); // RELEASEDIR
        let _ = guest.call(31, file, &[fields(&[(fh, 8)]), vec![0; 40]].concat()); // GETLK
        let _ = guest.call(32, file, &[fields(&[(fh, 8)]), vec![0; 40]].concat()); // SETLK
        guest.call(34, file, &fields(&[(4, 8)])).unwrap(); // ACCESS
        let _ = guest.call(39, file, &[fields(&[(fh, 8)]), vec![0; 24]].concat()); // IOCTL
        let _ = guest.call(43, file, &fields(&[(fh, 8), (0, 8), (8192, 8), (0, 8)])); // FALLOCATE
        let _ = guest.call(43, file, &fields(&[(fh, 8), (0, 8), (4096, 8), (3, 8)]));
        for whence in [3, 4] {
            let _ = guest.call(46, file, &fields(&[(fh, 8), (0, 8), (whence, 8)])); // LSEEK
        }
        let copy = [
            (fh, 8),
            (0, 8),
            (file, 8),
            (fh, 8),
            (100, 8),
            (5, 8),
            (0, 8),
        ];
        let _ = guest.call(47, file, &fields(&copy)); // COPY_FILE_RANGE
        let _ = guest.call(50, data, &fields(&[(0, 8)])); // SYNCFS
        let tmpfile = [fields(&[(2, 4), (0o600, 4), (0, 8)]), names(&["tmp"])].concat();
        let _ = dir(&mut guest, 51, &tmpfile); // TMPFILE
        dir(
            &mut guest,
            12,
            &[fields(&[(sub, 8)]), names(&["hard", "moved"])].concat(),
        )
        .unwrap();
        let rename2 = [fields(&[(data, 8), (1, 8)]), names(&["link", "other"])].concat();
        dir(&mut guest, 45, &rename2).unwrap();
        guest.call(10, sub, &names(&["moved"])).unwrap(); // UNLINK
        dir(&mut guest, 10, &names(&["other"])).unwrap();
        guest
            .call(18, file, &[fields(&[(fh, 8)]), vec![0; 16]].concat())
            .unwrap(); // RELEASE
        dir(&mut guest, 10, &names(&["file"])).unwrap();
        dir(&mut guest, 11, &names(&["dir"])).unwrap(); // RMDIR
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn share_that_comes_later_is_found_by_a_running_guest() {
    let Rig {
        server,
        mut guest,
        folder: _folder,
    } = rig(Access::ReadWrite).await;
    let later = tempfile::tempdir().unwrap();
    fs::write(later.path().join("file"), "late").unwrap();
    assert_eq!(guest.lookup(ROOT, "later"), Err(libc::ENOENT));
    server
        .add(&share("later", later.path(), Access::ReadOnly))
        .unwrap();
    let later = guest.lookup(ROOT, "later").unwrap();
    let file = guest.lookup(later, "file").unwrap();
    let handle = guest.open(file, 0).unwrap();
    assert_eq!(guest.read(file, handle, 100).unwrap(), b"late");
}

#[tokio::test]
async fn queues_stop_at_a_pause_and_go_on_where_they_were() {
    let Rig {
        server: _server,
        mut guest,
        folder,
    } = rig(Access::ReadWrite).await;
    fs::write(folder.path().join("file"), "content").unwrap();
    let data = guest.lookup(ROOT, "data").unwrap();
    let file = guest.lookup(data, "file").unwrap();
    let handle = guest.open(file, 0).unwrap();
    guest.pause();
    assert_eq!(guest.position(), 4, "INIT, two LOOKUPs, OPEN");
    guest.resume().unwrap();
    assert_eq!(guest.read(file, handle, 100).unwrap(), b"content");
}

#[tokio::test]
async fn request_of_a_paused_guest_is_served_when_it_resumes() {
    let Rig {
        server: _server,
        mut guest,
        folder: _folder,
    } = rig(Access::ReadWrite).await;
    guest.pause();
    guest.send(opcode::LOOKUP, ROOT, &c_string("data"));
    guest.resume().unwrap();
    guest.wait().unwrap();
    guest.pause();
    assert_eq!(guest.position(), 2);
}

#[tokio::test]
async fn death_of_the_server_is_an_error_and_a_report() {
    let Rig {
        server,
        mut guest,
        folder: _folder,
    } = rig(Access::ReadWrite).await;
    bounded(server.kill()).await;
    let error = guest.wait().unwrap_err();
    assert_eq!(
        error.to_string(),
        "fs cannot go on without the file server; see the cause, then the host's limits"
    );
    assert_eq!(guest.losses.lock().unwrap().len(), 1);
    guest.pause(); // a reset of the device after it must not hang or panic
    assert!(guest.resume().is_err());
}

#[tokio::test]
async fn guest_that_breaks_its_ring_harms_no_one_else() {
    let Rig {
        server,
        mut guest,
        folder,
    } = rig(Access::ReadWrite).await;
    fs::write(folder.path().join("file"), "content").unwrap();
    guest.break_ring();
    // Whatever the server does now: the files are there, and it can be ended.
    bounded(server.kill()).await;
    assert_eq!(
        fs::read_to_string(folder.path().join("file")).unwrap(),
        "content"
    );
}

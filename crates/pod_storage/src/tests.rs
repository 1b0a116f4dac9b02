// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Real images with the real tools, in a directory of their own.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::process::Command;

use ids::{Bytes, Mib};
use tempfile::TempDir;

use super::*;

struct Node {
    dir: TempDir,
    store: Store,
}

fn node() -> Node {
    let dir = TempDir::new().unwrap();
    let text = format!(
        "[storage]\ncache_dir = \"{}\"\nscratch_mib = 256",
        dir.path().join("cache").display()
    );
    let config = pod_spec::RuntimeConfig::parse(&text).unwrap().storage;
    Node {
        store: Store::open(&config).unwrap(),
        dir,
    }
}

impl Node {
    fn layer(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let path = self.dir.path().join(name).join("fs");
        fs::create_dir_all(&path).unwrap();
        for (name, text) in files {
            fs::write(path.join(name), text).unwrap();
        }
        path
    }

    fn overlay(&self, lowers: &[&PathBuf], upper: &Path) -> Vec<RootfsMount> {
        let lowers: Vec<String> = lowers
            .iter()
            .map(|lower| lower.display().to_string())
            .collect();
        let options = vec![
            format!("workdir={}", self.dir.path().join("work").display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", lowers.join(":")),
        ];
        vec![RootfsMount {
            fs_type: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options,
        }]
    }

    fn images(&self) -> usize {
        let images = self.dir.path().join("cache/images");
        let is_image =
            |entry: &fs::DirEntry| entry.path().extension().is_some_and(|end| end == "erofs");
        fs::read_dir(images)
            .unwrap()
            .map(Result::unwrap)
            .filter(is_image)
            .count()
    }

    fn rootfs(&self, mounts: &[RootfsMount]) -> Result<Rootfs, StorageError> {
        self.store
            .rootfs(&"c1".parse().unwrap(), mounts, Path::new("/nowhere"))
    }
}

/// What `dump.erofs` says of a path in an image.
fn dump(disk: &Disk, path: &str) -> String {
    let output = Command::new("dump.erofs")
        .arg(format!("--path={path}"))
        .arg(image::proc_path(&disk.file))
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn layers_are_merged_into_one_image_that_is_built_once() {
    let node = node();
    let lower = node.layer("1", &[("a", "below"), ("b", "b")]);
    let top = node.layer("2", &[("a", "on top")]);
    let upper = node.layer("3", &[]);
    let mounts = node.overlay(&[&top, &lower], &upper);

    let first = node.rootfs(&mounts).unwrap();
    assert_eq!(first.disks.len(), 1);
    assert!(
        dump(&first.disks[0], "/a").contains("Size: 6"),
        "{}",
        dump(&first.disks[0], "/a")
    );
    assert!(dump(&first.disks[0], "/b").contains("Size: 1"));

    let second = node.rootfs(&mounts).unwrap();
    let inode = |rootfs: &Rootfs| rootfs.disks[0].file.metadata().unwrap().ino();
    assert_eq!(inode(&first), inode(&second));
    assert_eq!(first.disks[0].serial, second.disks[0].serial);
    assert_eq!(node.images(), 1);
}

#[test]
fn parallel_first_uses_build_the_image_once() {
    let node = node();
    let (lower, top, upper) = (
        node.layer("1", &[("a", "1")]),
        node.layer("2", &[]),
        node.layer("3", &[]),
    );
    let mounts = node.overlay(&[&top, &lower], &upper);
    let inodes: Vec<u64> = std::thread::scope(|scope| {
        let build = || {
            node.rootfs(&mounts).unwrap().disks[0]
                .file
                .metadata()
                .unwrap()
                .ino()
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(build)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
    assert_eq!(node.images(), 1);
}

#[test]
fn another_directory_of_the_same_name_is_another_image() {
    let node = node();
    let upper = node.layer("3", &[]);
    let lower = node.layer("1", &[("a", "old")]);
    let first = node.rootfs(&node.overlay(&[&lower], &upper)).unwrap();
    fs::remove_dir_all(&lower).unwrap();
    let lower = node.layer("1", &[("a", "newer")]);
    let second = node.rootfs(&node.overlay(&[&lower], &upper)).unwrap();
    assert_ne!(first.disks[0].serial, second.disks[0].serial);
    assert!(dump(&second.disks[0], "/a").contains("Size: 5"));
}

#[test]
fn filled_upper_directory_is_a_layer_of_its_own() {
    let node = node();
    let (lower, upper) = (
        node.layer("1", &[("a", "1")]),
        node.layer("2", &[("kept", "x")]),
    );
    let rootfs = node.rootfs(&node.overlay(&[&lower], &upper)).unwrap();
    assert_eq!(rootfs.disks.len(), 2);
    assert!(dump(&rootfs.disks[0], "/kept").contains("Size: 1"));
    assert_eq!(node.images(), 1, "only the chain is cached");
}

#[test]
fn damaged_image_is_built_again() {
    let node = node();
    let (lower, upper) = (node.layer("1", &[("a", "1")]), node.layer("2", &[]));
    let mounts = node.overlay(&[&lower], &upper);
    drop(node.rootfs(&mounts).unwrap());
    let images = node.dir.path().join("cache/images");
    let image = fs::read_dir(images)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    for path in image.filter(|path| path.extension().is_some()) {
        fs::write(path, "").unwrap();
    }
    let rootfs = node.rootfs(&mounts).unwrap();
    assert!(dump(&rootfs.disks[0], "/a").contains("Size: 1"));
}

#[test]
fn writable_directory_becomes_an_image_without_a_name() {
    let node = node();
    let directory = node.layer("native", &[("a", "12345")]);
    let source = directory.display().to_string();
    let mount = RootfsMount {
        fs_type: "bind".to_owned(),
        source,
        options: vec!["rw".to_owned()],
    };
    let rootfs = node.rootfs(&[mount]).unwrap();
    assert!(dump(&rootfs.disks[0], "/a").contains("Size: 5"));
    assert_eq!(node.images(), 0);
    assert!(
        rootfs.disks[0].file.write_at(b"x", 0).is_err(),
        "the descriptor must not be writable"
    );
}

#[test]
fn missing_tool_is_named() {
    let node = node();
    let mut config = node.store.config.clone();
    config.mkfs_erofs = "/nowhere/mkfs.erofs".into();
    let store = Store { config };
    let (lower, upper) = (node.layer("1", &[]), node.layer("2", &[]));
    let mounts = node.overlay(&[&lower], &upper);
    let error = store
        .rootfs(&"c1".parse().unwrap(), &mounts, Path::new("/"))
        .unwrap_err();
    assert_eq!(error.to_string(), "run /nowhere/mkfs.erofs");
    assert_eq!(node.images(), 0);
}

#[test]
fn missing_layer_is_named() {
    let node = node();
    let upper = node.layer("2", &[]);
    let error = node
        .rootfs(&node.overlay(&[&"/nowhere/fs".into()], &upper))
        .unwrap_err();
    assert_eq!(error.to_string(), "read the identity of /nowhere/fs");
}

#[test]
fn scratch_disks_are_sparse_and_apart() {
    let node = node();
    let first = node.store.scratch_disk().unwrap();
    let second = node.store.scratch_disk().unwrap();
    let metadata = first.file.metadata().unwrap();
    assert_eq!(metadata.len(), Bytes::from(Mib(256)).0);
    assert!(
        metadata.blocks() * 512 < 2 << 20,
        "{} bytes in use",
        metadata.blocks() * 512
    );
    assert_eq!(metadata.nlink(), 0, "a scratch disk has no name");
    let mut magic = [0; 2];
    first.file.read_exact_at(&mut magic, 1024 + 56).unwrap();
    assert_eq!(u16::from_le_bytes(magic), 0xEF53, "ext4");
    first.file.write_all_at(b"mine", 1 << 20).unwrap();
    let mut theirs = [0; 4];
    second.file.read_exact_at(&mut theirs, 1 << 20).unwrap();
    assert_ne!(&theirs, b"mine");
}

#[test]
fn files_folders_and_links_are_copied_with_mode_and_owner() {
    let node = node();
    let source = node.layer("config", &[("key", "value")]);
    symlink("key", source.join("link")).unwrap();
    fs::create_dir(source.join("dir")).unwrap();
    fs::write(source.join("dir/inner"), "i").unwrap();
    let copies = [HostCopy {
        index: 3,
        source: source.clone(),
        back: None,
    }];
    let mounts = node.store.copy_files(&copies).unwrap();
    assert_eq!(mounts[0].index, 3);
    let mut seen: Vec<(String, u32)> = mounts[0]
        .entries
        .iter()
        .map(|entry| (entry.path.clone(), entry.mode))
        .collect();
    seen.sort();
    let paths: Vec<&str> = seen.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["", "dir", "dir/inner", "key", "link"]);
    assert_eq!(seen[3].1, 0o644);
    let parent = |path: &str| {
        mounts[0]
            .entries
            .iter()
            .position(|entry| entry.path == path)
            .unwrap()
    };
    assert!(
        parent("dir") < parent("dir/inner"),
        "a folder comes before what is in it"
    );
}

#[test]
fn copy_past_the_cap_is_refused_and_at_the_cap_is_not() {
    let node = node();
    let cap = usize::try_from(MAX_COPY_BYTES).unwrap();
    let source = node.layer("big", &[("f", &"x".repeat(cap))]);
    let copies = [HostCopy {
        index: 0,
        source: source.clone(),
        back: None,
    }];
    assert!(node.store.copy_files(&copies).is_ok());
    fs::write(source.join("g"), "x").unwrap();
    assert!(
        matches!(node.store.copy_files(&copies), Err(StorageError::CopyTooLarge { path, .. }) if path == source)
    );
}

#[test]
fn socket_is_refused_by_kind() {
    let node = node();
    let source = node.layer("s", &[]);
    let _socket = std::os::unix::net::UnixListener::bind(source.join("sock")).unwrap();
    let error = node
        .store
        .copy_files(&[HostCopy {
            index: 0,
            source,
            back: None,
        }])
        .unwrap_err()
        .to_string();
    assert!(error.contains("is a socket"), "{error}");
}

#[test]
fn device_image_is_passed_as_it_is() {
    let node = node();
    let path = node.dir.path().join("disk.img");
    fs::write(&path, "disk").unwrap();
    let mount = RootfsMount {
        fs_type: "ext4".to_owned(),
        source: path.display().to_string(),
        options: vec!["loop".to_owned()],
    };
    let mut rootfs = node.rootfs(&[mount]).unwrap();
    let mut text = String::new();
    rootfs.disks[0].file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "disk");
    assert!(matches!(rootfs.form, RootfsForm::Disk { ref fs_type, .. } if fs_type == "ext4"));
}

#[test]
fn images_of_a_snapshotter_are_handed_over_as_they_are() {
    let node = node();
    let layer = node.layer("one", &[("file", "x")]);
    let image = node.dir.path().join("layer.erofs");
    let made = Command::new("mkfs.erofs").arg(&image).arg(&layer).output();
    assert!(made.unwrap().status.success());
    let mounts = |source: &Path| {
        let mount = |fs_type: &str, source: &Path, option: &str| RootfsMount {
            fs_type: fs_type.to_owned(),
            source: source.display().to_string(),
            options: vec![option.to_owned()],
        };
        [
            mount("erofs", source, "loop"),
            mount(
                "format/mkdir/overlay",
                Path::new("overlay"),
                "lowerdir={{ mount 0 }}",
            ),
        ]
    };
    let rootfs = |id: &str, source: &Path| {
        let id = id.parse().unwrap();
        node.store
            .rootfs(&id, &mounts(source), Path::new("/nowhere"))
    };
    let one = rootfs("c1", &image).unwrap();
    let two = rootfs("c2", &image).unwrap();
    assert_eq!(one.form, two.form, "containers share it");
    assert!(matches!(&one.form, RootfsForm::Layered(serials) if serials.len() == 1));
    let text = rootfs("c3", &layer.join("file")).unwrap_err();
    assert!(matches!(text, StorageError::Io { .. }), "{text}");
}

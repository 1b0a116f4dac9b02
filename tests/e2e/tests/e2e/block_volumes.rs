// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Block devices of the host in containers: PersistentVolumeClaims with volumeMode Block.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::{Node, run};
use k8s_cri::v1;

use crate::cri_client::{Kubelet, Pod};
use crate::volumes::{IDLE, PodDir, output, sh};

const SIZE: u64 = 16 << 20;

/// A loop device over a file, which it is read through: it goes at the end of its test.
struct LoopDevice {
    path: String,
    file: PathBuf,
}

impl LoopDevice {
    fn new(dir: &PodDir, name: &str) -> Self {
        let file = dir.path.join(name);
        File::create(&file).unwrap().set_len(SIZE).unwrap();
        let shown = run("losetup", &["--find", "--show", file.to_str().unwrap()]).success();
        Self {
            path: shown.stdout.trim().to_owned(),
            file,
        }
    }

    fn write(&self, text: &str, at: u64) {
        let device = File::options().write(true).open(&self.path).unwrap();
        device.write_all_at(text.as_bytes(), at).unwrap();
        device.sync_all().unwrap();
    }

    fn read(&self, len: usize, at: u64) -> String {
        let mut bytes = vec![0; len];
        let device = File::open(&self.path).unwrap();
        device.read_exact_at(&mut bytes, at).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.path]);
        let _ = fs::remove_file(&self.file);
    }
}

fn device(host: &str, container: &str, permissions: &str) -> v1::Device {
    v1::Device {
        host_path: host.to_owned(),
        container_path: container.to_owned(),
        permissions: permissions.to_owned(),
    }
}

fn try_with(
    kubelet: &Kubelet,
    pod: &Pod,
    name: &str,
    devices: Vec<v1::Device>,
) -> Result<String, tonic::Status> {
    let id = kubelet.create_with(pod, name, 0, &IDLE, |config| config.devices = devices)?;
    kubelet.try_start(&id)?;
    Ok(id)
}

fn number(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    let device = fs::metadata(path).unwrap().rdev();
    format!(
        "{}:{}",
        nix::sys::stat::major(device),
        nix::sys::stat::minor(device)
    )
}

#[test]
fn block_claim_is_a_disk_of_the_container_and_keeps_what_is_written() {
    let _node = Node::new("block_claim_is_a_disk_of_the_container_and_keeps_what_is_written");
    let dir = PodDir::new("block");
    let disk = LoopDevice::new(&dir, "disk");
    disk.write("from the host", 4096);
    let mut kubelet = Kubelet::new("block");
    let pod = kubelet.run_pod("block");
    let writes = |name: &str| {
        let devices = vec![device(&disk.path, "/dev/xvda", "mrw")];
        try_with(&kubelet, &pod, name, devices).unwrap()
    };
    let main = writes("main");
    let script = "test -b /dev/xvda && dd if=/dev/xvda bs=1 skip=4096 count=13 2>/dev/null; \
                  echo; blockdev --getsize64 /dev/xvda";
    let expected = format!("from the host\n{SIZE}\n");
    assert_eq!(output(&kubelet, &main, script), expected);
    let script = "printf 'from the guest' | dd of=/dev/xvda bs=1 seek=8192 conv=notrunc,fsync";
    output(&kubelet, &main, script);
    assert_eq!(disk.read(14, 8192), "from the guest");
    // The file system on it is the container's affair; here it is one of the node's own.
    kubelet.stop(&main, Duration::ZERO);
    kubelet.remove(&main);
    let again = writes("again");
    let script = "dd if=/dev/xvda bs=1 skip=8192 count=14 2>/dev/null";
    assert_eq!(output(&kubelet, &again, script), "from the guest");
}

#[test]
fn read_only_block_claim_cannot_be_written() {
    let _node = Node::new("read_only_block_claim_cannot_be_written");
    let dir = PodDir::new("block-ro");
    let disk = LoopDevice::new(&dir, "disk");
    disk.write("fixed", 0);
    let mut kubelet = Kubelet::new("block-ro");
    let pod = kubelet.run_pod("block-ro");
    let devices = vec![device(&disk.path, "/dev/claim/disk", "mr")];
    let main = try_with(&kubelet, &pod, "main", devices).unwrap();
    let read = "dd if=/dev/claim/disk bs=1 count=5 2>/dev/null";
    assert_eq!(output(&kubelet, &main, read), "fixed");
    let refused = kubelet.exec(&main, &sh("echo x > /dev/claim/disk"));
    assert_ne!(refused.code, 0, "{refused:?}");
    assert_eq!(disk.read(5, 0), "fixed");
}

#[test]
fn block_claim_is_one_for_the_containers_of_a_pod_and_no_others_disk() {
    let _node = Node::new("block_claim_is_one_for_the_containers_of_a_pod_and_no_others_disk");
    let dir = PodDir::new("block-two");
    let [one, two] = ["one", "two"].map(|name| LoopDevice::new(&dir, name));
    one.write("first", 0);
    two.write("second", 0);
    let mut kubelet = Kubelet::new("block-two");
    let pod = kubelet.run_pod("block-two");
    let both = vec![
        device(&one.path, "/dev/xvda", "mrw"),
        device(&two.path, "/dev/xvdb", "mrw"),
    ];
    let main = try_with(&kubelet, &pod, "main", both).unwrap();
    let side = vec![device(&one.path, "/dev/xvda", "mrw")];
    let side = try_with(&kubelet, &pod, "side", side).unwrap();
    let read = "head -c 5 /dev/xvda; head -c 6 /dev/xvdb";
    assert_eq!(output(&kubelet, &main, read), "firstsecond");
    output(
        &kubelet,
        &main,
        "printf other | dd of=/dev/xvda conv=notrunc,fsync",
    );
    assert_eq!(output(&kubelet, &side, "head -c 5 /dev/xvda"), "other");
    // A device file that it makes for itself opens no disk that it was not given.
    let script = "number=$(cat /sys/class/block/vda/dev | tr : ' '); mknod /dev/mine b $number; head -c 1 /dev/mine";
    let refused = kubelet.exec(&side, &sh(script));
    assert!(refused.stderr.contains("not permitted"), "{refused:?}");
    // Stopped before the first; the other goes on.
    kubelet.stop(&side, Duration::ZERO);
    kubelet.remove(&side);
    assert_eq!(output(&kubelet, &main, "head -c 5 /dev/xvda"), "other");
}

#[test]
fn device_of_the_host_that_is_no_block_device_is_refused_by_its_path() {
    let _node = Node::new("device_of_the_host_that_is_no_block_device_is_refused_by_its_path");
    let mut kubelet = Kubelet::new("character");
    let pod = kubelet.run_pod("character");
    assert_ne!(number(Path::new("/dev/kvm")), "0:0");
    let devices = vec![device("/dev/kvm", "/dev/kvm", "mrw")];
    let error = try_with(&kubelet, &pod, "main", devices).unwrap_err();
    assert!(error.message().contains("/dev/kvm"), "{}", error.message());
}

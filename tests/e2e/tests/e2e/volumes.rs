// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Volumes of pods, on the paths where a kubelet puts them.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};

use e2e::{Node, eventually, run};
use k8s_cri::v1;

use crate::cri_client::{Kubelet, Pod};

pub(crate) const IDLE: [&str; 2] = ["sleep", "infinity"];

pub(crate) fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// A kubelet's directory of one pod; it goes at the end of its test, with what is mounted in it.
pub(crate) struct PodDir {
    pub(crate) path: PathBuf,
    mounts: Vec<PathBuf>,
}

impl PodDir {
    pub(crate) fn new(name: &str) -> Self {
        let path = PathBuf::from("/var/lib/kubelet/pods").join(format!("uid-{name}"));
        fs::create_dir_all(&path).unwrap();
        Self {
            path,
            mounts: Vec::new(),
        }
    }

    /// A volume that kubelet writes; `plugin` is "configmap", "secret" or the like.
    pub(crate) fn written(&self, plugin: &str, name: &str) -> PathBuf {
        let plugin = format!("kubernetes.io~{plugin}");
        let path = self.path.join("volumes").join(plugin).join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// A PersistentVolumeClaim as a CSI driver mounts it, but that there is no mount.
    pub(crate) fn claim(&self, name: &str) -> PathBuf {
        let path = self
            .path
            .join("volumes/kubernetes.io~csi")
            .join(name)
            .join("mount");
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Makes `path` a mount whose later mounts others see, as the node's root is where systemd runs.
    pub(crate) fn make_shared(&mut self, path: &Path) {
        let path = path.to_str().unwrap();
        run("mount", &["--bind", path, path]).success();
        self.mounts.push(path.into());
        run("mount", &["--make-shared", path]).success();
    }

    /// A mount of the host's own.
    pub(crate) fn mount_tmpfs(&mut self, path: &Path, options: &str) {
        let place = path.to_str().unwrap();
        run("mount", &["-t", "tmpfs", "-o", options, "tmpfs", place]).success();
        self.mounts.push(path.into());
    }

    /// Something that the test has unmounted itself.
    pub(crate) fn forget_mount(&mut self, path: &Path) {
        self.mounts.retain(|mounted| mounted != path);
    }

    /// The file for a container's termination message as kubelet makes it.
    pub(crate) fn termination_log(&self, container: &str) -> PathBuf {
        let path = self
            .path
            .join("containers")
            .join(container)
            .join("1f2e3d4c");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        path
    }

    /// An emptyDir as kubelet makes it: open to all.
    pub(crate) fn empty_dir(&self, name: &str) -> PathBuf {
        let path = self.path.join("volumes/kubernetes.io~empty-dir").join(name);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        path
    }

    /// An emptyDir of medium Memory with a sizeLimit.
    pub(crate) fn memory_dir(&mut self, name: &str, size: &str) -> PathBuf {
        let path = self.empty_dir(name);
        self.mount_tmpfs(&path, &format!("size={size},mode=0777"));
        path
    }

    /// An emptyDir of medium HugePages.
    pub(crate) fn huge_page_dir(&mut self, name: &str) -> PathBuf {
        let path = self.empty_dir(name);
        let place = path.to_str().unwrap();
        let options = ["-t", "hugetlbfs", "-o", "pagesize=2M", "none", place];
        run("mount", &options).success();
        self.mounts.push(path.clone());
        path
    }

    /// A subPath as kubelet binds it.
    pub(crate) fn sub_path(&mut self, of: &Path, path: &str, volume: &str, number: u32) -> PathBuf {
        let source = of.join(path);
        if !source.exists() {
            fs::create_dir_all(&source).unwrap();
        }
        let place = self
            .path
            .join("volume-subpaths")
            .join(volume)
            .join("main")
            .join(number.to_string());
        if source.is_dir() {
            fs::create_dir_all(&place).unwrap();
        } else {
            fs::create_dir_all(place.parent().unwrap()).unwrap();
            fs::write(&place, "").unwrap();
        }
        let paths = [source.to_str().unwrap(), place.to_str().unwrap()];
        run("mount", &["--bind", paths[0], paths[1]]).success();
        self.mounts.push(place.clone());
        place
    }
}

impl Drop for PodDir {
    fn drop(&mut self) {
        for place in self.mounts.iter().rev() {
            run("umount", &[place.to_str().unwrap()]);
        }
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Gives a volume its next state as kubelet's atomic writer does: a directory of its own, and a link that is renamed
/// over the old one.
pub(crate) fn write(volume: &Path, state: &str, files: &[(&str, &str)]) {
    let folder = volume.join(state);
    fs::create_dir(&folder).unwrap();
    for (name, content) in files {
        fs::write(folder.join(name), content).unwrap();
        fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o640)).unwrap();
    }
    let old = fs::read_link(volume.join("..data"));
    symlink(state, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    for (name, _) in files {
        if fs::symlink_metadata(volume.join(name)).is_err() {
            symlink(Path::new("..data").join(name), volume.join(name)).unwrap();
        }
    }
    if let Ok(old) = old {
        fs::remove_dir_all(volume.join(old)).unwrap();
    }
}

pub(crate) fn mount(host: &Path, container: &str, readonly: bool) -> v1::Mount {
    v1::Mount {
        container_path: container.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Default::default()
    }
}

/// Makes and starts a container with these mounts.
pub(crate) fn run_with(
    kubelet: &Kubelet,
    pod: &Pod,
    name: &str,
    command: &[&str],
    mounts: Vec<v1::Mount>,
) -> String {
    let change = |config: &mut v1::ContainerConfig| config.mounts = mounts;
    let id = kubelet.create_with(pod, name, 0, command, change).unwrap();
    kubelet.start(&id);
    id
}

pub(crate) fn output(kubelet: &Kubelet, container: &str, script: &str) -> String {
    let executed = kubelet.exec(container, &sh(script));
    assert_eq!(executed.code, 0, "{script}: {executed:?}");
    executed.stdout
}

#[test]
fn empty_dir_is_shared_by_the_containers_of_a_pod() {
    let _node = Node::new("empty_dir_is_shared_by_the_containers_of_a_pod");
    let dir = PodDir::new("shared-dir");
    let mut kubelet = Kubelet::new("shared-dir");
    let pod = kubelet.run_pod("shared-dir");
    let volume = dir.empty_dir("cache");
    let one = run_with(
        &kubelet,
        &pod,
        "one",
        &IDLE,
        vec![mount(&volume, "/a", false)],
    );
    let two = run_with(
        &kubelet,
        &pod,
        "two",
        &IDLE,
        vec![mount(&volume, "/b", true)],
    );
    output(&kubelet, &one, "echo written by one > /a/note");
    assert_eq!(output(&kubelet, &two, "cat /b/note"), "written by one\n");
    let refused = kubelet.exec(&two, &sh("echo x > /b/other"));
    assert!(refused.stderr.contains("Read-only"), "{refused:?}");
}

#[test]
fn empty_dir_survives_the_restart_of_its_container() {
    let _node = Node::new("empty_dir_survives_the_restart_of_its_container");
    let dir = PodDir::new("kept-dir");
    let mut kubelet = Kubelet::new("kept-dir");
    let pod = kubelet.run_pod("kept-dir");
    let volume = dir.empty_dir("data");
    for attempt in 0..2 {
        let command = sh("cat /data/note; echo from before > /data/note");
        let mounts = vec![mount(&volume, "/data", false)];
        let id = kubelet
            .create_with(&pod, "main", attempt, &command, |config| {
                config.mounts = mounts
            })
            .unwrap();
        kubelet.start(&id);
        assert_eq!(kubelet.exit_code(&id), 0);
        kubelet.remove(&id);
    }
    eventually("the second run has read what the first wrote", || {
        (kubelet.log("main", 1, "stdout") == "from before\n").then_some(())
    });
}

#[test]
fn empty_dir_in_memory_is_a_tmpfs_of_its_size_limit() {
    let _node = Node::new("empty_dir_in_memory_is_a_tmpfs_of_its_size_limit");
    let mut dir = PodDir::new("memory-dir");
    let mut kubelet = Kubelet::new("memory-dir");
    let pod = kubelet.run_pod("memory-dir");
    let volume = dir.memory_dir("fast", "1m");
    let one = run_with(
        &kubelet,
        &pod,
        "one",
        &IDLE,
        vec![mount(&volume, "/fast", false)],
    );
    let two = run_with(
        &kubelet,
        &pod,
        "two",
        &IDLE,
        vec![mount(&volume, "/fast", false)],
    );
    let script = "grep ' /fast ' /proc/mounts | cut -d' ' -f3; df -k /fast | tail -1 | tr -s ' ' | cut -d' ' -f2";
    assert_eq!(output(&kubelet, &one, script), "tmpfs\n1024\n");
    output(&kubelet, &one, "echo shared > /fast/note");
    assert_eq!(output(&kubelet, &two, "cat /fast/note"), "shared\n");
    let full = kubelet.exec(&one, &sh("dd if=/dev/zero of=/fast/fill bs=64k count=32"));
    assert!(full.stderr.contains("No space left"), "{full:?}");
}

#[test]
fn unix_socket_in_an_empty_dir_joins_two_containers() {
    let _node = Node::new("unix_socket_in_an_empty_dir_joins_two_containers");
    let mut dir = PodDir::new("socket");
    let mut kubelet = Kubelet::new("socket");
    let pod = kubelet.run_pod("socket");
    for (number, volume) in [dir.empty_dir("disk"), dir.memory_dir("memory", "1m")]
        .iter()
        .enumerate()
    {
        let name = |role: &str| format!("{role}{number}");
        let run = |name: &str, script: &str| {
            let mounts = vec![mount(volume, "/s", false)];
            run_with(&kubelet, &pod, name, &sh(script), mounts)
        };
        // A busybox's syslog daemon and its client meet at /dev/log, which may be a link.
        let server = run(
            &name("server"),
            "ln -s /s/socket /dev/log; exec syslogd -n -O /log",
        );
        let client = run(
            &name("client"),
            "until [ -S /s/socket ]; do sleep 0.1; done; ln -s /s/socket /dev/log; logger through the socket",
        );
        assert_eq!(kubelet.exit_code(&client), 0);
        eventually("the message has arrived", || {
            let log = kubelet.exec(&server, &sh("cat /log")).stdout;
            log.contains("through the socket").then_some(())
        });
    }
}

#[test]
fn sub_path_of_an_empty_dir_is_that_part_of_it() {
    let _node = Node::new("sub_path_of_an_empty_dir_is_that_part_of_it");
    let mut dir = PodDir::new("sub-path");
    let mut kubelet = Kubelet::new("sub-path");
    let pod = kubelet.run_pod("sub-path");
    let disk = dir.empty_dir("disk");
    let memory = dir.memory_dir("memory", "1m");
    let mounts = vec![
        mount(&disk, "/disk", false),
        mount(&memory, "/memory", false),
        mount(&dir.sub_path(&disk, "logs/app", "disk", 2), "/logs", false),
        mount(&dir.sub_path(&memory, "part", "memory", 3), "/part", true),
    ];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    output(
        &kubelet,
        &main,
        "echo log > /logs/one; echo part > /memory/part/two",
    );
    assert_eq!(
        output(&kubelet, &main, "cat /disk/logs/app/one /part/two"),
        "log\npart\n"
    );
    assert_ne!(kubelet.exec(&main, &sh("echo x > /part/three")).code, 0);
    kubelet.stop(&main, std::time::Duration::ZERO);
    kubelet.remove(&main);
    let mounts = vec![mount(&disk, "/disk", false)];
    let after = run_with(&kubelet, &pod, "after", &IDLE, mounts);
    assert_eq!(
        output(&kubelet, &after, "cat /disk/logs/app/one"),
        "log\n",
        "a container's end takes nothing of the volume"
    );
}

#[test]
fn termination_message_is_on_the_host_when_the_container_has_exited() {
    let _node = Node::new("termination_message_is_on_the_host_when_the_container_has_exited");
    let dir = PodDir::new("message");
    let mut kubelet = Kubelet::new("message");
    let pod = kubelet.run_pod("message");
    for (name, place, code) in [
        ("fails", "/dev/termination-log", 1),
        ("succeeds", "/custom/message", 0),
    ] {
        let log = dir.termination_log(name);
        let script = format!("printf 'the end of {name}' > {place}; exit {code}");
        let mounts = vec![mount(&log, place, false)];
        let id = kubelet
            .create_with(&pod, name, 0, &sh(&script), |config| {
                config.mounts = mounts;
                let user = v1::Int64Value { value: 1000 };
                let linux = config.linux.as_mut().unwrap();
                linux.security_context.as_mut().unwrap().run_as_user = Some(user);
            })
            .unwrap();
        kubelet.start(&id);
        assert_eq!(kubelet.exit_code(&id), code);
        assert_eq!(
            fs::read_to_string(&log).unwrap(),
            format!("the end of {name}")
        );
    }
}

#[test]
fn long_termination_message_keeps_its_end() {
    let _node = Node::new("long_termination_message_keeps_its_end");
    let dir = PodDir::new("long");
    let mut kubelet = Kubelet::new("long");
    let pod = kubelet.run_pod("long");
    let log = dir.termination_log("main");
    let mounts = vec![mount(&log, "/dev/termination-log", false)];
    let script = sh("seq 1 100000 > /dev/termination-log");
    let main = run_with(&kubelet, &pod, "main", &script, mounts);
    assert_eq!(kubelet.exit_code(&main), 0);
    let message = fs::read_to_string(&log).unwrap();
    assert_eq!(message.len(), 4096);
    assert!(message.ends_with("\n99999\n100000\n"));
}

#[test]
fn hosts_file_of_the_kubelet_is_the_containers() {
    let _node = Node::new("hosts_file_of_the_kubelet_is_the_containers");
    let dir = PodDir::new("hosts");
    let mut kubelet = Kubelet::new("hosts");
    let pod = kubelet.run_pod("hosts");
    let hosts = dir.path.join("etc-hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n10.1.2.3 alias\n").unwrap();
    let mounts = vec![mount(&hosts, "/etc/hosts", false)];
    let script = sh("cat /etc/hosts; echo 10.9.9.9 added >> /etc/hosts");
    let main = run_with(&kubelet, &pod, "main", &script, mounts);
    assert_eq!(kubelet.exit_code(&main), 0);
    eventually("the log is whole", || {
        kubelet
            .log("main", 0, "stdout")
            .contains("10.1.2.3 alias")
            .then_some(())
    });
    assert!(
        fs::read_to_string(&hosts)
            .unwrap()
            .ends_with("10.9.9.9 added\n")
    );
}

/// Whether a script prints this at some time.
pub(crate) fn becomes(kubelet: &Kubelet, container: &str, script: &str, wanted: &str) {
    eventually(&format!("{script} prints {wanted:?}"), || {
        (kubelet.exec(container, &sh(script)).stdout == wanted).then_some(())
    });
}

#[test]
fn config_map_that_changes_changes_in_the_container() {
    let _node = Node::new("config_map_that_changes_changes_in_the_container");
    let dir = PodDir::new("config-map");
    let mut kubelet = Kubelet::new("config-map");
    let pod = kubelet.run_pod("config-map");
    for plugin in ["configmap", "secret", "projected", "downward-api"] {
        let volume = dir.written(plugin, plugin);
        write(&volume, "..1", &[("key", "one"), ("gone", "x")]);
        let mounts = vec![mount(&volume, "/config", true)];
        let main = run_with(&kubelet, &pod, plugin, &IDLE, mounts);
        assert_eq!(
            output(
                &kubelet,
                &main,
                "cat /config/key; readlink /config/key; stat -Lc ' %a' /config/key"
            ),
            "one..data/key\n 640\n"
        );
        write(&volume, "..2", &[("key", "two"), ("new", "y")]);
        fs::remove_file(volume.join("gone")).unwrap();
        becomes(
            &kubelet,
            &main,
            "cat /config/key; ls /config",
            "twokey\nnew\n",
        );
        let refused = kubelet.exec(&main, &sh("echo x > /config/key"));
        assert!(refused.stderr.contains("Read-only"), "{refused:?}");
        kubelet.stop(&main, std::time::Duration::ZERO);
    }
}

#[test]
fn config_map_that_changes_wakes_inotify_in_the_container() {
    let _node = Node::new("config_map_that_changes_wakes_inotify_in_the_container");
    import_python();
    let dir = PodDir::new("inotify");
    let mut kubelet = Kubelet::new("inotify");
    let pod = kubelet.run_pod("inotify");
    let volume = dir.written("configmap", "config");
    write(&volume, "..1", &[("key", "one")]);
    let mounts = vec![mount(&volume, "/config", true)];
    let main = kubelet
        .create_with(&pod, "main", 0, &["python3", "-uc", WATCHER], |config| {
            config.mounts = mounts;
            config.image.as_mut().unwrap().image = PYTHON.to_owned();
        })
        .unwrap();
    kubelet.start(&main);
    let log = |wanted: &str| {
        eventually(wanted, || {
            kubelet
                .log("main", 0, "stdout")
                .contains(wanted)
                .then_some(())
        });
    };
    log("watching one");
    write(&volume, "..2", &[("key", "two")]);
    log("woken by ..data: two");
    assert_eq!(kubelet.exit_code(&main), 0);
}

/// Waits in inotify, without a look in between, until `..data` has been renamed.
const WATCHER: &str = "import ctypes, os, struct
libc = ctypes.CDLL(None)
fd = libc.inotify_init()
assert libc.inotify_add_watch(fd, b'/config', 0x80) >= 0
print('watching', open('/config/key').read())
while True:
    events = os.read(fd, 4096)
    while events:
        length = struct.unpack('iIII', events[:16])[3]
        name = events[16:16 + length].rstrip(b'\\0').decode()
        events = events[16 + length:]
        if name == '..data':
            print('woken by ..data:', open('/config/key').read())
            raise SystemExit
";

pub(crate) const PYTHON: &str = "coffer.test/python:latest";

/// The image with Python, for CRI too. The first that wants it waits for it.
pub(crate) fn import_python() {
    let there = run("ctr", &["-n", "k8s.io", "images", "ls", "-q"]).success();
    if there.stdout.lines().any(|name| name == PYTHON) {
        return;
    }
    let pass = format!("ctr -n default images export - {PYTHON} | ctr -n k8s.io images import -");
    run("sh", &["-c", &pass]).success();
}

#[test]
fn sub_path_of_a_config_map_does_not_change() {
    let _node = Node::new("sub_path_of_a_config_map_does_not_change");
    let mut dir = PodDir::new("config-part");
    let mut kubelet = Kubelet::new("config-part");
    let pod = kubelet.run_pod("config-part");
    let volume = dir.written("configmap", "config");
    write(&volume, "..1", &[("key", "one")]);
    let part = dir.sub_path(&volume, "..1/key", "config", 0);
    let mounts = vec![
        mount(&volume, "/whole", true),
        mount(&part, "/etc/app/key", true),
    ];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    assert_eq!(output(&kubelet, &main, "cat /etc/app/key"), "one");
    write(&volume, "..2", &[("key", "two")]);
    becomes(&kubelet, &main, "cat /whole/key", "two");
    assert_eq!(output(&kubelet, &main, "cat /etc/app/key"), "one");
}

#[test]
fn service_account_token_is_rotated() {
    let _node = Node::new("service_account_token_is_rotated");
    let dir = PodDir::new("token");
    let mut kubelet = Kubelet::new("token");
    let pod = kubelet.run_pod("token");
    let volume = dir.written("projected", "kube-api-access-x2x4z");
    let token = "/var/run/secrets/kubernetes.io/serviceaccount";
    let files =
        |token: &'static str| [("token", token), ("ca.crt", "ca"), ("namespace", "default")];
    write(&volume, "..1", &files("first"));
    let mounts = vec![mount(&volume, token, true)];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    let read = format!("cat {token}/token");
    assert_eq!(output(&kubelet, &main, &read), "first");
    write(&volume, "..2", &files("second"));
    becomes(&kubelet, &main, &read, "second");
}

#[test]
fn secret_may_be_mounted_inside_a_config_map() {
    let _node = Node::new("secret_may_be_mounted_inside_a_config_map");
    let dir = PodDir::new("nested");
    let mut kubelet = Kubelet::new("nested");
    let pod = kubelet.run_pod("nested");
    let config = dir.written("configmap", "config");
    write(&config, "..1", &[("key", "config")]);
    // Kubelet makes the place for the nested mount.
    fs::create_dir(config.join("nested")).unwrap();
    let secret = dir.written("secret", "secret");
    write(&secret, "..1", &[("key", "secret")]);
    let mounts = vec![
        mount(&config, "/config", true),
        mount(&secret, "/config/nested", true),
    ];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    let read = "cat /config/key /config/nested/key";
    assert_eq!(output(&kubelet, &main, read), "configsecret");
    write(&config, "..2", &[("key", "other config")]);
    write(&secret, "..2", &[("key", "other secret")]);
    becomes(&kubelet, &main, read, "other configother secret");
}

#[test]
fn config_maps_of_a_mebibyte_each_are_whole() {
    let _node = Node::new("config_maps_of_a_mebibyte_each_are_whole");
    let dir = PodDir::new("large");
    let mut kubelet = Kubelet::new("large");
    let pod = kubelet.run_pod("large");
    let content = "0123456789abcdef".repeat((1 << 20) / 16);
    let mut mounts = Vec::new();
    for number in 0..4 {
        let volume = dir.written("configmap", &format!("config{number}"));
        write(&volume, "..1", &[("key", &content)]);
        mounts.push(mount(&volume, &format!("/config{number}"), true));
    }
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    let all = output(
        &kubelet,
        &main,
        "cat /config*/key | wc -c; cat /config3/key | md5sum",
    );
    let lines: Vec<&str> = all.lines().collect();
    assert_eq!(lines[0], (4 << 20).to_string());
    let sum = run(
        "md5sum",
        &[dir
            .path
            .join("volumes/kubernetes.io~configmap/config3/key")
            .to_str()
            .unwrap()],
    );
    assert_eq!(lines[1].split(' ').next(), sum.stdout.split(' ').next());
}

#[test]
fn empty_config_map_is_an_empty_folder() {
    let _node = Node::new("empty_config_map_is_an_empty_folder");
    let dir = PodDir::new("empty");
    let mut kubelet = Kubelet::new("empty");
    let pod = kubelet.run_pod("empty");
    let volume = dir.written("configmap", "optional");
    let mounts = vec![mount(&volume, "/config", true)];
    let main = run_with(&kubelet, &pod, "main", &IDLE, mounts);
    assert_eq!(output(&kubelet, &main, "ls -A /config"), "");
    write(&volume, "..1", &[("key", "made later")]);
    becomes(&kubelet, &main, "cat /config/key", "made later");
}

#[test]
fn files_keep_owner_and_mode_for_a_user_who_is_not_root() {
    let _node = Node::new("files_keep_owner_and_mode_for_a_user_who_is_not_root");
    let dir = PodDir::new("owner");
    let mut kubelet = Kubelet::new("owner");
    let pod = kubelet.run_pod("owner");
    let volume = dir.written("secret", "secret");
    write(&volume, "..1", &[("mine", "readable"), ("roots", "hidden")]);
    for (name, group) in [("mine", 2000), ("roots", 0)] {
        let file = volume.join("..1").join(name);
        chown(&file, Some(0), Some(group)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o440)).unwrap();
    }
    let mounts = vec![mount(&volume, "/secret", true)];
    let main = kubelet
        .create_with(&pod, "main", 0, &IDLE, |config| {
            config.mounts = mounts;
            let linux = config.linux.as_mut().unwrap();
            let security = linux.security_context.as_mut().unwrap();
            security.run_as_user = Some(v1::Int64Value { value: 1000 });
            security.supplemental_groups = vec![2000];
        })
        .unwrap();
    kubelet.start(&main);
    let script = "cat /secret/mine; stat -Lc ' %a %u %g' /secret/mine";
    assert_eq!(output(&kubelet, &main, script), "readable 440 0 2000\n");
    let refused = kubelet.exec(&main, &["cat", "/secret/roots"]);
    assert!(refused.stderr.contains("Permission denied"), "{refused:?}");
}

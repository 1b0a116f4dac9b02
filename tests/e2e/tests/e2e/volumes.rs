// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Volumes of pods, on the paths where a kubelet puts them.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use e2e::{Node, eventually, run};
use k8s_cri::v1;

use crate::cri_client::{Kubelet, Pod};

const IDLE: [&str; 2] = ["sleep", "infinity"];

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// A kubelet's directory of one pod; it goes at the end of its test, with what is mounted in it.
struct PodDir {
    path: PathBuf,
    mounts: Vec<PathBuf>,
}

impl PodDir {
    fn new(name: &str) -> Self {
        let path = PathBuf::from("/var/lib/kubelet/pods").join(format!("uid-{name}"));
        fs::create_dir_all(&path).unwrap();
        Self {
            path,
            mounts: Vec::new(),
        }
    }

    /// The file for a container's termination message as kubelet makes it.
    fn termination_log(&self, container: &str) -> PathBuf {
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
    fn empty_dir(&self, name: &str) -> PathBuf {
        let path = self.path.join("volumes/kubernetes.io~empty-dir").join(name);
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        path
    }

    /// An emptyDir of medium Memory with a sizeLimit.
    fn memory_dir(&mut self, name: &str, size: &str) -> PathBuf {
        let path = self.empty_dir(name);
        let options = format!("size={size},mode=0777");
        let place = path.to_str().unwrap();
        run("mount", &["-t", "tmpfs", "-o", &options, "tmpfs", place]).success();
        self.mounts.push(path.clone());
        path
    }

    /// A subPath as kubelet binds it.
    fn sub_path(&mut self, of: &Path, path: &str, volume: &str, number: u32) -> PathBuf {
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

fn mount(host: &Path, container: &str, readonly: bool) -> v1::Mount {
    v1::Mount {
        container_path: container.to_owned(),
        host_path: host.display().to_string(),
        readonly,
        ..Default::default()
    }
}

/// Makes and starts a container with these mounts.
fn run_with(
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

fn output(kubelet: &Kubelet, container: &str, script: &str) -> String {
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
    assert_eq!(
        fs::read_dir(&volume).unwrap().count(),
        0,
        "the files are in the guest alone"
    );
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
fn empty_dir_has_the_pods_fs_group() {
    let _node = Node::new("empty_dir_has_the_pods_fs_group");
    let dir = PodDir::new("fs-group");
    let mut kubelet = Kubelet::new("fs-group");
    let pod = kubelet.run_pod("fs-group");
    let volume = dir.empty_dir("data");
    chown(&volume, None, Some(2000)).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o2777)).unwrap();
    let main = run_with(
        &kubelet,
        &pod,
        "main",
        &IDLE,
        vec![mount(&volume, "/data", false)],
    );
    let script = "stat -c '%a %u %g' /data; touch /data/x; stat -c %g /data/x";
    assert_eq!(output(&kubelet, &main, script), "2777 0 2000\n2000\n");
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
fn host_path_that_is_writable_is_refused_by_name() {
    let _node = Node::new("host_path_that_is_writable_is_refused_by_name");
    let mut kubelet = Kubelet::new("host-path");
    let pod = kubelet.run_pod("host-path");
    let refused = kubelet.create_with(&pod, "main", 0, &IDLE, |config| {
        config.mounts = vec![mount(Path::new("/srv"), "/data", false)];
    });
    let started = refused.and_then(|id| kubelet.try_start(&id));
    let message = started.unwrap_err().message().to_owned();
    assert!(
        message.contains("mounts[/data]: /srv is a directory of the host"),
        "{message}"
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

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! What a container finds around it: command, variables, directories, names, devices.

use k8s_cri::v1;

use super::client::{Running, image};
use super::shared::Shared;

const USER_IMAGE: &str = "coffer.test/busybox-user:latest";
const PAUSE_IMAGE: &str = "coffer.test/pause:latest";

/// Variables as a pod spec may have them.
const VARIABLES: [(&str, &str); 5] = [
    ("PLAIN", "value"),
    ("SPACED", "two  words, \"quoted\" and $PLAIN"),
    ("LINES", "one\ntwo"),
    ("EMPTY", ""),
    ("UNICODE", "grüße ✓"),
];

static POD: Shared<Running> = Shared::new(|| {
    Running::with(
        "env-pod",
        |config| {
            config.dns_config = Some(v1::DnsConfig {
                servers: vec!["10.96.0.10".to_owned(), "10.96.0.11".to_owned()],
                searches: vec!["a.svc.cluster.local".to_owned(), "cluster.local".to_owned()],
                options: vec!["ndots:5".to_owned(), "timeout:2".to_owned()],
            });
        },
        |config| {
            config.envs = VARIABLES.map(|(key, value)| variable(key, value)).to_vec();
            config.working_dir = "/made/for/it".to_owned();
        },
    )
});

fn variable(key: &str, value: &str) -> v1::KeyValue {
    v1::KeyValue {
        key: key.to_owned(),
        value: value.to_owned(),
    }
}

/// The command line of the first process of a container made by `change`.
fn command_line(
    pod: &Running,
    name: &str,
    change: impl FnOnce(&mut v1::ContainerConfig),
) -> String {
    let id = pod.kubelet.run_with(&pod.pod, name, &[], change);
    let script = ["sh", "-c", "tr '\\0' ' ' < /proc/1/cmdline"];
    let line = pod.kubelet.exec(&id, &script).stdout;
    pod.discard(&id);
    line.trim_end().to_owned()
}

#[test]
fn variables_of_the_spec_are_set_as_they_are_written() {
    let pod = POD.case();
    let environment = pod.output("cat /proc/1/environ");
    let variables: Vec<&str> = environment.split('\0').collect();
    for (key, value) in VARIABLES {
        let wanted = format!("{key}={value}");
        assert!(
            variables.contains(&wanted.as_str()),
            "{wanted}: {variables:?}"
        );
    }
}

#[test]
fn variable_of_the_spec_wins_over_the_images() {
    let pod = POD.case();
    let ended = pod.script("colour", "echo $COLOUR", |config| {
        image(config, USER_IMAGE);
        config.envs = vec![variable("COLOUR", "blue")];
    });
    assert_eq!(ended.stdout, "blue\n");
}

#[test]
fn variables_of_the_image_are_kept_beside_those_of_the_spec() {
    let pod = POD.case();
    let ended = pod.script("kept", "echo $COLOUR $SHAPE", |config| {
        image(config, USER_IMAGE);
        config.envs = vec![variable("SHAPE", "round")];
    });
    assert_eq!(ended.stdout, "green round\n");
}

#[test]
fn variables_for_the_services_of_a_large_namespace_all_arrive() {
    let pod = POD.case();
    let script = "env | grep -c ^SERVICE_; echo $SERVICE_2999";
    let ended = pod.script("services", script, |config| {
        config.envs = (0..3000)
            .map(|number| {
                variable(
                    &format!("SERVICE_{number}"),
                    &format!("tcp://10.0.0.1:{number}"),
                )
            })
            .collect();
    });
    assert_eq!(ended.stdout, "3000\ntcp://10.0.0.1:2999\n");
}

#[test]
fn hostname_variable_names_the_pod() {
    let pod = POD.case();
    assert_eq!(pod.output("echo $HOSTNAME"), "env-pod\n");
}

#[test]
fn hostname_is_the_pods_everywhere() {
    let pod = POD.case();
    assert_eq!(
        pod.output("hostname; uname -n; cat /etc/hostname /proc/sys/kernel/hostname"),
        "env-pod\n".repeat(4)
    );
}

#[test]
fn home_is_that_of_the_containers_user() {
    let pod = POD.case();
    assert_eq!(
        pod.output("tr '\\0' '\\n' < /proc/1/environ | grep ^HOME="),
        "HOME=/root\n"
    );
    assert_eq!(pod.output("echo $HOME"), "/root\n", "of an exec");
    let ended = pod.script("home", "echo $HOME", |config| image(config, USER_IMAGE));
    assert_eq!(ended.stdout, "/home/app\n");
}

#[test]
fn terminal_has_a_type() {
    let pod = POD.case();
    let ended = pod.script("terminal", "echo $TERM; tty", |config| config.tty = true);
    assert_eq!(ended.stdout, "xterm\n/dev/pts/0\n");
}

#[test]
fn args_of_the_spec_replace_the_images_cmd() {
    let pod = POD.case();
    let line = command_line(&pod, "args", |config| {
        config.args = vec!["sleep".to_owned(), "1000".to_owned()];
    });
    assert_eq!(line, "sleep 1000");
}

#[test]
fn args_of_the_spec_follow_the_images_entrypoint() {
    let pod = POD.case();
    let line = command_line(&pod, "follow", |config| {
        image(config, PAUSE_IMAGE);
        config.args = vec!["1000".to_owned()];
    });
    assert_eq!(line, "/bin/sleep infinity 1000");
}

#[test]
fn command_of_the_spec_replaces_the_images_entrypoint() {
    let pod = POD.case();
    let line = command_line(&pod, "replace", |config| {
        image(config, PAUSE_IMAGE);
        config.command = vec!["sleep".to_owned()];
        config.args = vec!["2000".to_owned()];
    });
    assert_eq!(line, "sleep 2000");
}

#[test]
fn entrypoint_of_the_image_runs_if_the_spec_has_no_command() {
    let pod = POD.case();
    let line = command_line(&pod, "entrypoint", |config| image(config, PAUSE_IMAGE));
    assert_eq!(line, "/bin/sleep infinity");
}

#[test]
fn argument_of_100_kb_arrives_whole() {
    let pod = POD.case();
    let long = "x".repeat(100_000);
    let ended = pod.script("long", "echo ${#LONG}", |config| {
        config.envs = vec![variable("LONG", &long)];
    });
    assert_eq!(ended.stdout, "100000\n");
    let executed = pod
        .kubelet
        .exec(&pod.main, &["sh", "-c", "echo ${#0}", &long]);
    assert_eq!(executed.stdout, "100000\n");
}

#[test]
fn working_directory_of_the_spec_is_made_if_the_image_has_none() {
    let pod = POD.case();
    assert_eq!(
        pod.output("readlink /proc/1/cwd; pwd"),
        "/made/for/it\n/made/for/it\n"
    );
}

#[test]
fn working_directory_is_the_images_if_the_spec_has_none() {
    let pod = POD.case();
    let ended = pod.script("directory", "pwd", |config| image(config, USER_IMAGE));
    assert_eq!(ended.stdout, "/home/app\n");
}

#[test]
fn resolv_conf_is_made_of_the_pods_dns_config() {
    let pod = POD.case();
    assert_eq!(
        pod.output("cat /etc/resolv.conf"),
        "search a.svc.cluster.local cluster.local\nnameserver 10.96.0.10\nnameserver 10.96.0.11\n\
         options ndots:5 timeout:2\n"
    );
}

#[test]
fn devices_of_every_container_are_there() {
    let pod = POD.case();
    let script = "cd /dev && stat -c '%n %F %t:%T %a' null zero full random urandom tty";
    assert_eq!(
        pod.output(script),
        "null character special file 1:3 666\nzero character special file 1:5 666\n\
         full character special file 1:7 666\nrandom character special file 1:8 666\n\
         urandom character special file 1:9 666\ntty character special file 5:0 666\n"
    );
    let links = pod.output("cd /dev && for l in fd stdin stdout stderr ptmx; do readlink $l; done");
    assert_eq!(
        links,
        "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\n"
    );
}

#[test]
fn devices_do_what_they_are_for() {
    let pod = POD.case();
    assert_eq!(
        pod.output("head -c 4 /dev/zero | xxd -p; wc -c < /dev/null"),
        "00000000\n0\n"
    );
    let full = pod.exec("echo x > /dev/full");
    assert!(full.stderr.contains("No space left on device"), "{full:?}");
    let random = pod.output("head -c 16 /dev/urandom | xxd -p; head -c 16 /dev/random | xxd -p");
    let (one, two) = random.trim().split_once('\n').unwrap();
    assert_eq!((one.len(), two.len()), (32, 32));
    assert_ne!(one, two);
}

#[test]
fn file_systems_of_every_container_are_mounted() {
    let pod = POD.case();
    let mounts = pod.output("cut -d' ' -f2,3 /proc/mounts");
    for wanted in [
        "/ overlay",
        "/proc proc",
        "/dev tmpfs",
        "/dev/pts devpts",
        "/dev/mqueue mqueue",
        "/dev/shm tmpfs",
        "/sys sysfs",
        "/sys/fs/cgroup cgroup2",
    ] {
        assert!(
            mounts.lines().any(|line| line == wanted),
            "{wanted}: {mounts}"
        );
    }
}

#[test]
fn process_limits_are_those_of_a_service() {
    let pod = POD.case();
    // CRI has no field for them.
    let script = "ulimit -Sn; ulimit -Hn; ulimit -u";
    assert_eq!(pod.output(script), "1024\n524288\nunlimited\n");
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! securityContext: users, groups, capabilities, seccomp, what is hidden and what cannot be written.

use std::fs;
use std::path::PathBuf;

use k8s_cri::v1;
use v1::security_profile::ProfileType;

use super::client::{Ended, Running, field, image, security};
use super::shared::Shared;
use crate::volumes::{IDLE, PYTHON, PodDir, import_python, mount, sh};

const USER_IMAGE: &str = "coffer.test/busybox-user:latest";

/// containerd's default: chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw,
/// sys_chroot, mknod, audit_write, setfcap (its `oci/spec.go`, as `capabilities(7)` numbers them).
const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;
const CAP_CHOWN: u64 = 1 << 0;
const CAP_NET_BIND_SERVICE: u64 = 1 << 10;
const CAP_NET_ADMIN: u64 = 1 << 12;
/// All 41 of Linux 6.12.
const ALL_CAPABILITIES: u64 = 0x1ff_ffff_ffff;

static POD: Shared<Running> = Shared::new(|| Running::new("security"));

fn number(value: i64) -> Option<v1::Int64Value> {
    Some(v1::Int64Value { value })
}

fn identity(pod: &Running, name: &str, change: impl FnOnce(&mut v1::ContainerConfig)) -> String {
    pod.script(name, "id -u; id -g; id -G", change).stdout
}

/// The effective capabilities of a container's first process.
fn capabilities(pod: &Running, name: &str, add: &[&str], drop: &[&str]) -> u64 {
    let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let ended = pod.script(name, "cat /proc/self/status", |config| {
        security(config).capabilities = Some(v1::Capability {
            add_capabilities: list(add),
            drop_capabilities: list(drop),
            ..Default::default()
        });
    });
    let of = |set: &str| u64::from_str_radix(&field(&ended.stdout, set), 16).unwrap();
    assert_eq!(of("CapEff"), of("CapBnd"), "{ended:?}");
    of("CapEff")
}

#[test]
fn run_as_user_is_the_processs_user() {
    let pod = POD.case();
    let seen = identity(&pod, "user", |config| {
        security(config).run_as_user = number(1001)
    });
    assert_eq!(seen, "1001\n0\n0\n");
}

#[test]
fn run_as_user_name_is_looked_up_in_the_image() {
    let pod = POD.case();
    let seen = identity(&pod, "user-name", |config| {
        "app".clone_into(&mut security(config).run_as_username);
    });
    assert_eq!(seen, "1000\n1000\n1000 2000\n");
}

#[test]
fn run_as_group_is_the_processs_group() {
    let pod = POD.case();
    let seen = identity(&pod, "group", |config| {
        security(config).run_as_user = number(1001);
        security(config).run_as_group = number(2002);
    });
    assert_eq!(seen, "1001\n2002\n2002\n");
}

#[test]
fn group_without_a_user_is_refused() {
    let pod = POD.case();
    let refused = pod
        .kubelet
        .create_with(&pod.pod, "group-alone", 0, &IDLE, |config| {
            security(config).run_as_group = number(2002);
        });
    let message = refused.unwrap_err().message().to_owned();
    assert!(message.contains("specified without user"), "{message}");
}

#[test]
fn supplemental_groups_are_added_to_the_users_own() {
    let pod = POD.case();
    let seen = identity(&pod, "groups", |config| {
        image(config, USER_IMAGE);
        security(config).supplemental_groups = vec![5001, 5002];
    });
    let groups: Vec<&str> = seen.lines().last().unwrap().split(' ').collect();
    for group in ["1000", "5001", "5002"] {
        assert!(groups.contains(&group), "{group}: {seen}");
    }
}

#[test]
fn user_of_the_image_is_the_processs_user() {
    let pod = POD.case();
    let seen = identity(&pod, "image-user", |config| image(config, USER_IMAGE));
    // Which further groups of the image the user has, containerd 1.6 does not look up.
    assert!(seen.starts_with("1000\n1000\n1000"), "{seen}");
}

#[test]
fn files_of_root_are_closed_to_another_user() {
    let pod = POD.case();
    let script = "touch /file; mkdir /folder; id -u";
    let ended = pod.script("other-user", &format!("({script}) 2>&1"), |config| {
        security(config).run_as_user = number(65_532);
    });
    assert_eq!(
        ended.stdout.matches("Permission denied").count(),
        2,
        "{ended:?}"
    );
    assert!(ended.stdout.ends_with("65532\n"), "{ended:?}");
}

#[test]
fn read_only_rootfs_is_read_only_save_for_its_volumes() {
    let pod = POD.case();
    let dir = PodDir::new("security");
    let volume = dir.empty_dir("tmp");
    let script = "(touch /file; touch /etc/file; echo x > /tmp/file; cat /tmp/file; echo > /dev/null && echo fine) 2>&1";
    let ended = pod.script("read-only", script, |config| {
        security(config).readonly_rootfs = true;
        config.mounts = vec![mount(&volume, "/tmp", false)];
    });
    assert_eq!(
        ended.stdout.matches("Read-only file system").count(),
        2,
        "{ended:?}"
    );
    assert!(ended.stdout.ends_with("x\nfine\n"), "{ended:?}");
}

#[test]
fn rootfs_is_writable_unless_it_is_asked_for() {
    let pod = POD.case();
    assert_eq!(
        pod.output("echo written > /etc/file; cat /etc/file"),
        "written\n"
    );
}

#[test]
fn capabilities_are_containerds_defaults() {
    let pod = POD.case();
    assert_eq!(capabilities(&pod, "caps", &[], &[]), DEFAULT_CAPABILITIES);
}

#[test]
fn capability_that_is_added_can_be_used() {
    let pod = POD.case();
    let added = capabilities(&pod, "added", &["NET_ADMIN"], &[]);
    assert_eq!(added, DEFAULT_CAPABILITIES | CAP_NET_ADMIN);
    let add_address =
        "ip addr add 127.77.0.1/32 dev lo && ip addr del 127.77.0.1/32 dev lo && echo done";
    let with = pod.script("with-admin", add_address, |config| {
        security(config).capabilities = Some(v1::Capability {
            add_capabilities: vec!["NET_ADMIN".to_owned()],
            ..Default::default()
        });
    });
    assert_eq!(with.stdout, "done\n");
    let without = pod.exec(add_address);
    assert!(
        without.stderr.contains("Operation not permitted"),
        "{without:?}"
    );
}

#[test]
fn capability_that_is_dropped_is_missed() {
    let pod = POD.case();
    let dropped = capabilities(&pod, "dropped", &[], &["CHOWN"]);
    assert_eq!(dropped, DEFAULT_CAPABILITIES & !CAP_CHOWN);
    let script = "touch /file; chown 1 /file 2>&1";
    let ended = pod.script("no-chown", script, |config| {
        security(config).capabilities = Some(v1::Capability {
            drop_capabilities: vec!["CHOWN".to_owned()],
            ..Default::default()
        });
    });
    assert!(
        ended.stdout.contains("Operation not permitted"),
        "{ended:?}"
    );
}

#[test]
fn all_capabilities_are_dropped_but_the_one_that_is_added() {
    let pod = POD.case();
    let left = capabilities(&pod, "one-left", &["NET_BIND_SERVICE"], &["ALL"]);
    assert_eq!(left, CAP_NET_BIND_SERVICE);
}

#[test]
fn all_capabilities_are_added() {
    let pod = POD.case();
    let all = capabilities(&pod, "all", &["ALL"], &[]);
    let last: u32 = pod
        .output("cat /proc/sys/kernel/cap_last_cap")
        .trim()
        .parse()
        .unwrap();
    // Those that the node's containerd knows; 1.6 knows all of a 5.9 kernel's.
    assert!(
        last >= 40 && all & ALL_CAPABILITIES == ALL_CAPABILITIES,
        "{all:x}"
    );
}

#[test]
fn no_new_privileges_is_set_if_it_is_asked_for() {
    let pod = POD.case();
    for (name, asked) in [("privileges", false), ("no-privileges", true)] {
        let ended = pod.script(name, "cat /proc/self/status", |config| {
            security(config).no_new_privs = asked;
        });
        assert_eq!(
            field(&ended.stdout, "NoNewPrivs"),
            u8::from(asked).to_string()
        );
    }
}

#[test]
fn masked_paths_are_empty() {
    let pod = POD.case();
    let script = "wc -c < /proc/meminfo; ls -A /sys/kernel | wc -l; wc -c < /etc/passwd";
    let ended = pod.script("masked", script, |config| {
        let paths = ["/proc/meminfo", "/sys/kernel", "/etc/passwd", "/not/there"];
        security(config).masked_paths = paths.map(str::to_owned).to_vec();
    });
    assert_eq!(ended.stdout, "0\n0\n0\n");
    assert_ne!(pod.output("ls /sys/kernel"), "", "of another container");
}

#[test]
fn read_only_paths_cannot_be_written() {
    let pod = POD.case();
    let script = "(echo 1 > /proc/sys/kernel/core_uses_pid; touch /etc/file; touch /home/file && echo elsewhere) 2>&1";
    let ended = pod.script("read-only-paths", script, |config| {
        let paths = ["/proc/sys", "/etc", "/not/there"];
        security(config).readonly_paths = paths.map(str::to_owned).to_vec();
    });
    assert_eq!(
        ended.stdout.matches("Read-only file system").count(),
        2,
        "{ended:?}"
    );
    assert!(ended.stdout.ends_with("elsewhere\n"), "{ended:?}");
    pod.output("echo 1 > /proc/sys/kernel/shm_rmid_forced");
}

/// A script's end under a seccomp profile.
fn under(
    pod: &Running,
    name: &str,
    kind: ProfileType,
    file: Option<PathBuf>,
    script: &str,
) -> Ended {
    pod.script(name, script, |config| {
        security(config).seccomp = Some(v1::SecurityProfile {
            profile_type: i32::from(kind),
            localhost_ref: file.map_or_else(String::new, |file| file.display().to_string()),
        });
    })
}

#[test]
fn default_seccomp_profile_refuses_a_user_namespace() {
    let pod = POD.case();
    let script = "grep ^Seccomp: /proc/self/status; unshare -U true 2>&1 || echo refused";
    let ended = under(
        &pod,
        "seccomp-default",
        ProfileType::RuntimeDefault,
        None,
        script,
    );
    assert!(ended.stdout.starts_with("Seccomp:\t2\n"), "{ended:?}");
    assert!(
        ended.stdout.contains("Operation not permitted"),
        "{ended:?}"
    );
    assert!(ended.stdout.ends_with("refused\n"), "{ended:?}");
}

#[test]
fn unconfined_container_has_no_seccomp_filter() {
    let pod = POD.case();
    let script = "grep ^Seccomp: /proc/self/status; unshare -U true && echo allowed";
    let ended = under(
        &pod,
        "seccomp-unconfined",
        ProfileType::Unconfined,
        None,
        script,
    );
    assert_eq!(ended.stdout, "Seccomp:\t0\nallowed\n");
}

/// A profile as a node's administrator writes it: everything is allowed but mkdir and links.
const WITHOUT_MKDIR: &str = r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86_64"],
    "syscalls":[{"names":["mkdir","mkdirat","no_such_call"],"action":"SCMP_ACT_ERRNO","errnoRet":95},
                {"names":["symlink","symlinkat"],"action":"SCMP_ACT_KILL_PROCESS"}]}"#;

/// A profile that leaves it to a program of the node's.
const ASKS: &str = r#"{"defaultAction":"SCMP_ACT_ALLOW",
    "syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_NOTIFY"}]}"#;

#[test]
fn seccomp_profile_of_the_node_is_applied() {
    let pod = POD.case();
    let dir = PodDir::new("seccomp");
    let profile = dir.path.join("no-mkdir.json");
    fs::write(&profile, WITHOUT_MKDIR).unwrap();
    let script = "grep ^Seccomp: /proc/self/status; mkdir /folder 2>&1; ln -s /a /b; echo $?; touch /file && echo others";
    let ended = under(
        &pod,
        "seccomp-node",
        ProfileType::Localhost,
        Some(profile),
        script,
    );
    assert!(ended.stdout.starts_with("Seccomp:\t2\n"), "{ended:?}");
    // errno 95 is EOPNOTSUPP, which nothing else gives here.
    assert!(
        ended.stdout.contains("Operation not supported"),
        "{ended:?}"
    );
    assert!(ended.stdout.ends_with("159\nothers\n"), "SIGSYS: {ended:?}");
}

#[test]
fn seccomp_profile_that_is_missing_or_asks_the_node_is_refused() {
    let pod = POD.case();
    let dir = PodDir::new("seccomp-refused");
    let asks = dir.path.join("asks.json");
    fs::write(&asks, ASKS).unwrap();
    for (name, profile, reason) in [
        (
            "seccomp-missing",
            "/no/such/profile.json",
            "/no/such/profile.json",
        ),
        ("seccomp-asks", asks.to_str().unwrap(), "SCMP_ACT_NOTIFY"),
    ] {
        let refused = pod.kubelet.create_with(&pod.pod, name, 0, &IDLE, |config| {
            security(config).seccomp = Some(v1::SecurityProfile {
                profile_type: i32::from(ProfileType::Localhost),
                localhost_ref: profile.to_owned(),
            });
        });
        // Some releases of containerd make the task only at the start.
        let started = refused.and_then(|id| pod.kubelet.try_start(&id));
        let message = started.unwrap_err().message().to_owned();
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn seccomp_filter_is_that_of_execs_too() {
    let pod = POD.case();
    let id = pod
        .kubelet
        .run_with(&pod.pod, "seccomp-exec", &IDLE, |config| {
            security(config).seccomp = Some(v1::SecurityProfile {
                profile_type: i32::from(ProfileType::RuntimeDefault),
                ..Default::default()
            });
        });
    let executed = pod.kubelet.exec(
        &id,
        &sh("grep ^Seccomp: /proc/self/status; unshare -U true"),
    );
    assert_eq!(executed.stdout, "Seccomp:\t2\n");
    assert!(
        executed.stderr.contains("Operation not permitted"),
        "{executed:?}"
    );
    pod.discard(&id);
}

#[test]
fn container_cannot_mount_nor_change_the_kernel() {
    let pod = POD.case();
    let mounted = pod.exec("mount -t tmpfs tmpfs /mnt || mount -t tmpfs tmpfs /tmp");
    assert!(
        mounted.code != 0 && mounted.stderr.contains("ermi"),
        "{mounted:?}"
    );
    let kernel = pod.exec("echo 1 > /sys/kernel/mm/ksm/run || echo x > /sys/kernel/uevent_helper");
    assert!(kernel.code != 0, "{kernel:?}");
    let cgroup = pod.exec("mkdir /sys/fs/cgroup/own");
    assert!(
        cgroup.stderr.contains("Read-only file system"),
        "{cgroup:?}"
    );
    let clock = pod.exec("date -s 2001-01-01");
    assert!(
        clock.stderr.contains("Operation not permitted"),
        "{clock:?}"
    );
}

#[test]
fn device_that_a_container_may_not_use_cannot_be_opened() {
    let pod = POD.case();
    // Major 254 to 240 are for local use; the guest's disks are there. 1:1 is its memory.
    for (name, kind, major, minor) in [
        ("mem", "c", 1, 1),
        ("kmsg", "c", 1, 11),
        ("disk", "b", 254, 0),
    ] {
        let opened = pod.exec(&format!(
            "mknod /{name} {kind} {major} {minor} && head -c 1 /{name}"
        ));
        assert!(
            opened.stderr.contains("Operation not permitted"),
            "{name}: {opened:?}"
        );
    }
}

#[test]
fn privileged_container_has_all_of_the_guest_and_nothing_of_the_host() {
    let _pod = POD.case();
    import_python();
    let mut kubelet = crate::cri_client::Kubelet::new("privileged");
    let privileged_pod = kubelet
        .run_pod_with("privileged", |config| {
            let linux = config.linux.as_mut().unwrap();
            linux.security_context.as_mut().unwrap().privileged = true;
        })
        .unwrap();
    let id = kubelet.run_with(&privileged_pod, "main", &IDLE, |config| {
        security(config).privileged = true;
    });
    let output = |script: &str| {
        let executed = kubelet.exec(&id, &sh(script));
        assert_eq!(executed.code, 0, "{script}: {executed:?}");
        executed.stdout
    };
    let status = output("cat /proc/self/status");
    assert_eq!(
        u64::from_str_radix(&field(&status, "CapEff"), 16),
        Ok(ALL_CAPABILITIES)
    );
    assert_eq!(field(&status, "Seccomp"), "0");

    assert!(fs::exists("/dev/kvm").unwrap(), "the node has one");
    let devices = output("ls /dev /dev/net");
    for hosts in ["kvm", "vda", "vhost-net", "loop-control"] {
        assert!(!devices.lines().any(|name| name == hosts), "{devices}");
    }
    for guests in ["null", "kmsg", "fuse", "tun"] {
        assert!(devices.lines().any(|name| name == guests), "{devices}");
    }
    let kernel = output("head -c 1 /dev/kmsg > /dev/null && uname -r");
    assert!(kernel.ends_with("-coffer\n"), "the guest's: {kernel}");
    let tunnel = ["python3", "-c", TUNNEL];
    let tunnel = kubelet.run_with(&privileged_pod, "tunnel", &tunnel, |config| {
        image(config, PYTHON);
        security(config).privileged = true;
    });
    assert_eq!(kubelet.exit_code(&tunnel), 0);
    kubelet.logs("tunnel", 0, "through the tunnel\n");

    let swappiness = "/proc/sys/vm/swappiness";
    let hosts = fs::read_to_string(swappiness).unwrap();
    output(
        "mkdir /m && mount -t tmpfs tmpfs /m && mknod /m/zero c 1 5 && head -c 1 /m/zero > /dev/null && \
         echo 17 > /proc/sys/vm/swappiness && mkdir /sys/fs/cgroup/own && ip link add dummy0 type dummy",
    );
    assert_eq!(fs::read_to_string(swappiness).unwrap(), hosts);
    assert_eq!(
        e2e::run("ip", &["link", "show", "dummy0"]).code,
        1,
        "the node has none of it"
    );
    let processes = output("cat /proc/[0-9]*/comm");
    assert!(!processes.contains("containerd"), "{processes}");

    let plain = kubelet.run(&privileged_pod, "plain", &IDLE);
    for refused in ["mount -t tmpfs none /tmp", "head -c 1 /dev/kmsg"] {
        assert_ne!(kubelet.exec(&plain, &sh(refused)).code, 0, "{refused}");
    }
}

/// Makes a network interface as a VPN's client does (`TUNSETIFF`, Documentation/networking/tuntap.rst), and takes from
/// it what is sent to an address behind it.
const TUNNEL: &str = "import fcntl, os, socket, struct
tun = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tun, 0x400454ca, struct.pack('16sH22x', b'tun7', 0x1001))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
address = lambda text: struct.pack('16sHH4s8x', b'tun7', socket.AF_INET, 0, socket.inet_aton(text))
fcntl.ioctl(udp, 0x8916, address('10.99.0.1'))
fcntl.ioctl(udp, 0x891c, address('255.255.255.0'))
fcntl.ioctl(udp, 0x8914, struct.pack('16sH22x', b'tun7', 1))
udp.sendto(b'through the tunnel', ('10.99.0.2', 7))
while True:
    packet = os.read(tun, 2000)
    if packet[0] >> 4 == 4 and packet[9] == 17:
        print(packet[28:].decode())
        break
";

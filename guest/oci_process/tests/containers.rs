// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Real containers, made on the machine that runs the tests. Needs root, a cgroup v2 mount and `/bin/busybox`; where one of
//! them is missing it says so and passes. It has its own `main`, because a helper must have one thread.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test"
)]

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use oci_process::{Job, Launched, Streams, launch_exec, launch_init};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use serde_json::{Value, json};

fn main() -> ExitCode {
    if std::env::args().next().as_deref() == Some(oci_process::PAUSE) {
        return oci_process::pause_main();
    }
    if std::env::args().nth(1).as_deref() == Some("helper") {
        return oci_process::helper_main();
    }
    let cgroups = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| {
            path.join("cgroup.procs").exists() && path.join("cgroup.controllers").exists()
        });
    let Some(cgroups) = cgroups else {
        println!("skipped: no cgroup v2 mount");
        return ExitCode::SUCCESS;
    };
    if !rustix::process::geteuid().is_root() || !Path::new("/bin/busybox").exists() {
        println!("skipped: needs root and /bin/busybox");
        return ExitCode::SUCCESS;
    }
    let bed = Bed::new(&cgroups);
    for (name, test) in TESTS {
        test(&bed);
        println!("{name} ... ok");
    }
    ExitCode::SUCCESS
}

type Test = fn(&Bed);

const TESTS: &[(&str, Test)] = &[
    ("init_runs_with_its_exit_code", init_runs_with_its_exit_code),
    ("container_sees_its_own_world", container_sees_its_own_world),
    ("mounts_are_as_the_spec_says", mounts_are_as_the_spec_says),
    (
        "user_and_limits_are_as_the_spec_says",
        user_and_limits_are_as_the_spec_says,
    ),
    (
        "seccomp_holds_for_init_and_exec",
        seccomp_holds_for_init_and_exec,
    ),
    (
        "missing_program_fails_before_start",
        missing_program_fails_before_start,
    ),
    (
        "program_that_is_none_fails_at_start",
        program_that_is_none_fails_at_start,
    ),
    ("exec_joins_the_container", exec_joins_the_container),
    (
        "debugging_shell_sees_all_of_the_machine",
        debugging_shell_sees_all_of_the_machine,
    ),
    (
        "pid_namespace_is_shared_and_its_orphans_are_reaped",
        pid_namespace_is_shared_and_its_orphans_are_reaped,
    ),
    ("terminal_is_handed_over", terminal_is_handed_over),
    ("masked_paths_are_empty", masked_paths_are_empty),
    (
        "dropped_launch_leaves_nothing",
        dropped_launch_leaves_nothing,
    ),
];

struct Bed {
    folder: tempfile::TempDir,
    cgroup: PathBuf,
}

impl Bed {
    fn new(cgroups: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("rootfs");
        for path in ["bin", "etc", "tmp", "secret"] {
            std::fs::create_dir_all(root.join(path)).unwrap();
        }
        std::fs::set_permissions(root.join("tmp"), std::fs::Permissions::from_mode(0o1777))
            .unwrap();
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
        for tool in [
            "sh", "cat", "echo", "id", "ls", "mkdir", "touch", "sleep", "stat", "tty", "grep",
            "hostname", "stty", "kill",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(tool)).unwrap();
        }
        std::fs::write(
            root.join("etc/passwd"),
            "web:x:1000:1000::/home/web:/bin/sh\n",
        )
        .unwrap();
        std::fs::write(root.join("etc/script"), "no program\n").unwrap();
        std::fs::set_permissions(
            root.join("etc/script"),
            std::fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        std::fs::write(root.join("secret/key"), "s3cret").unwrap();
        let cgroup = cgroups.join(format!("coffer-test-{}", std::process::id()));
        std::fs::create_dir(&cgroup).unwrap();
        Self { folder, cgroup }
    }

    fn root(&self) -> PathBuf {
        self.folder.path().join("rootfs")
    }

    fn job(&self, streams: Streams) -> Job<'_> {
        Job {
            helper: (Path::new("/proc/self/exe"), "helper"),
            cgroup: self.cgroup.clone(),
            streams,
        }
    }

    fn launch(&self, spec: &Spec) -> (Result<Launched, oci_process::Error>, std::fs::File) {
        self.launch_with(spec, None)
    }

    fn launch_with(
        &self,
        spec: &Spec,
        shares_pids_with: Option<OwnedFd>,
    ) -> (Result<Launched, oci_process::Error>, std::fs::File) {
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let errors = writer.try_clone().unwrap();
        let streams = Streams {
            stdout: Some(writer),
            stderr: Some(errors),
            ..Streams::default()
        };
        (
            launch_init(
                self.job(streams),
                "test",
                spec,
                &self.root(),
                shares_pids_with,
            ),
            reader.into(),
        )
    }

    /// Runs a container to its end: exit code and output.
    fn run(&self, change: Value) -> (i32, String) {
        self.run_with(&spec(change), None)
    }

    fn run_with(&self, spec: &Spec, shares_pids_with: Option<OwnedFd>) -> (i32, String) {
        let (launched, mut output) = self.launch_with(spec, shares_pids_with);
        let launched = launched.unwrap();
        let pid = launched.pid();
        let (ready, _) = launched
            .ready()
            .unwrap_or_else(|error| panic!("{}", error.chain()));
        ready
            .start()
            .unwrap_or_else(|error| panic!("{}", error.chain()));
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        (wait(pid), text)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        while waitid(WaitId::All, WaitIdOptions::EXITED).is_ok() {}
        std::fs::remove_dir(&self.cgroup).unwrap();
    }
}

fn wait(pid: Pid) -> i32 {
    let status = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED)
        .unwrap()
        .unwrap();
    status
        .exit_status()
        .unwrap_or_else(|| 128 + status.terminating_signal().unwrap())
}

fn spec(change: Value) -> Spec {
    let mut value = json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", "exit 0"], "cwd": "/",
            "env": ["PATH=/bin"],
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]}
        },
        "root": {"path": "rootfs"},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]}
        ],
        "linux": {"namespaces": [
            {"type": "mount"}, {"type": "pid"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"}, {"type": "cgroup"}
        ]}
    });
    merge(&mut value, change);
    serde_json::from_value(value).unwrap()
}

fn merge(to: &mut Value, from: Value) {
    match (to, from) {
        (Value::Object(to), Value::Object(from)) => {
            for (key, value) in from {
                merge(to.entry(key).or_insert(Value::Null), value);
            }
        }
        (Value::Array(to), Value::Array(from)) if from.first().is_some_and(Value::is_object) => {
            to.extend(from)
        }
        (to, from) => *to = from,
    }
}

fn shell(script: &str) -> Value {
    json!({"process": {"args": ["sh", "-c", script]}})
}

fn shell_with(script: &str, change: Value) -> Value {
    let mut value = shell(script);
    merge(&mut value, change);
    value
}

fn init_runs_with_its_exit_code(bed: &Bed) {
    assert_eq!(
        bed.run(shell("echo hello; exit 77")),
        (77, "hello\n".to_owned())
    );
}

fn container_sees_its_own_world(bed: &Bed) {
    let (code, text) = bed.run(shell(
        "echo $$; hostname; ls /; cat /proc/self/cgroup; cat /proc/net/dev | grep -c :; ls -d /proc/[0-9]* | grep -c .; ls /dev; ls -l /proc/self/fd | grep -c socket",
    ));
    assert_eq!(code, 1, "no socket is left open: {text}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["1", "box"]);
    assert!(text.contains("\nsecret\n"), "{text}");
    assert!(
        lines.contains(&"0::/"),
        "the cgroup is the root of its namespace: {text}"
    );
    for device in [
        "null", "zero", "full", "random", "urandom", "tty", "ptmx", "fd", "stdin", "stdout",
        "stderr",
    ] {
        assert!(lines.contains(&device), "{device}: {text}");
    }
}

fn debugging_shell_sees_all_of_the_machine(bed: &Bed) {
    let script = "cat /proc/1/comm; readlink /proc/self/ns/net; \
                  ls /sys/class >/dev/null && echo sysfs; test -e /dev/null && echo dev; \
                  touch /own && echo written; exit 7";
    let args = ["/bin/sh", "-c", script].map(str::to_owned);
    let mut value: Value = serde_json::from_slice(&pod_spec::shell_spec(&args, false, "")).unwrap();
    // The machine of a test need not have them all, as the guest has.
    let capabilities = ["CAP_CHOWN", "CAP_DAC_OVERRIDE"];
    for set in ["bounding", "effective", "permitted"] {
        value["process"]["capabilities"][set] = json!(capabilities);
    }
    let spec: Spec = serde_json::from_value(value).unwrap();
    let (launched, mut output) = bed.launch(&spec);
    let launched = launched.unwrap();
    let pid = launched.pid();
    let (ready, _) = launched
        .ready()
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    ready
        .start()
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(wait(pid), 7, "{text}");
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let network = std::fs::read_link("/proc/self/ns/net").unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[..4],
        [
            read("/proc/1/comm").trim(),
            network.to_str().unwrap(),
            "sysfs",
            "dev"
        ],
        "{text}"
    );
    assert_eq!(lines[4], "written", "{text}");
    std::fs::remove_file(bed.root().join("own")).unwrap();
}

fn mounts_are_as_the_spec_says(bed: &Bed) {
    let shared = tempfile::tempdir().unwrap();
    std::fs::write(shared.path().join("file"), "from outside").unwrap();
    let change = json!({
        "root": {"readonly": true},
        "mounts": [
            {"destination": "/data/deep", "type": "bind", "source": shared.path(), "options": ["rbind", "ro", "nosuid"]},
            {"destination": "/etc/one", "type": "bind", "source": shared.path().join("file"), "options": ["bind"]},
            {"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m", "mode=1777"]}
        ]
    });
    let (code, text) = bed.run(shell_with(
        "cat /data/deep/file; echo; cat /etc/one; echo; touch /data/deep/x; touch /x; touch /scratch/x && echo written; echo more > /etc/one",
        change,
    ));
    assert_eq!(code, 0, "{text}");
    assert_eq!(text.matches("from outside").count(), 2, "{text}");
    assert_eq!(text.matches("Read-only file system").count(), 2, "{text}");
    assert!(text.contains("written"), "{text}");
    assert_eq!(
        std::fs::read_to_string(shared.path().join("file")).unwrap(),
        "more\n"
    );
    let missing =
        json!({"mounts": [{"destination": "/m", "type": "bind", "source": "/no/such/place"}]});
    let (launched, _output) = bed.launch(&spec(missing));
    let error = launched.unwrap().ready().unwrap_err().chain();
    assert_eq!(
        error,
        "mounting bind /no/such/place at /m: No such file or directory (os error 2)"
    );
    let unknown = json!({"mounts": [{"destination": "/m", "type": "tmpfs", "source": "tmpfs", "options": ["nonsense=1"]}]});
    let (launched, _output) = bed.launch(&spec(unknown));
    let error = launched.unwrap().ready().unwrap_err().chain();
    assert!(
        error.contains("nonsense"),
        "the kernel's words are passed on: {error}"
    );
}

fn user_and_limits_are_as_the_spec_says(bed: &Bed) {
    let change = json!({"process": {
        "user": {"uid": 1000, "gid": 1000, "additionalGids": [2000], "umask": 0o077},
        "cwd": "/work/dir",
        "noNewPrivileges": true,
        "oomScoreAdj": 321,
        "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88}],
        "capabilities": {"bounding": ["CAP_CHOWN", "CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"],
                         "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]}
    }});
    let (code, text) = bed.run(shell_with(
        "id -u; id -g; id -G; pwd; echo $HOME; umask; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj; \
         grep -E 'Cap|NoNewPrivs|SigIgn' /proc/self/status; echo through > /dev/stdout",
        change,
    ));
    assert_eq!(code, 0, "{text}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        lines[..9],
        [
            "1000",
            "1000",
            "1000 2000",
            "/work/dir",
            "/home/web",
            "0077",
            "77",
            "88",
            "321"
        ],
        "{text}"
    );
    // libc keeps signals 32 and 33 for itself, and a test runner may have left them ignored.
    let ignored = lines
        .iter()
        .find_map(|line| line.strip_prefix("SigIgn:\t"))
        .unwrap();
    assert_eq!(
        u64::from_str_radix(ignored, 16).unwrap() & 0x7fff_ffff,
        0,
        "{text}"
    );
    for line in [
        "CapInh:\t0000000000000020",
        "CapPrm:\t0000000000000020",
        "CapEff:\t0000000000000020",
        "CapBnd:\t0000000000000021",
        "CapAmb:\t0000000000000020",
        "NoNewPrivs:\t1",
        "through",
    ] {
        assert!(lines.contains(&line), "{line}: {text}");
    }
}

fn seccomp_profile() -> Value {
    json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
           "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]})
}

fn seccomp_holds_for_init_and_exec(bed: &Bed) {
    for no_new_privileges in [false, true] {
        let change = json!({"process": {"noNewPrivileges": no_new_privileges}, "linux": {"seccomp": seccomp_profile()}});
        let (code, text) = bed.run(shell_with(
            "grep Seccomp: /proc/self/status; mkdir /tmp/x",
            change.clone(),
        ));
        assert_eq!(code, 1, "{text}");
        assert!(
            text.contains("Seccomp:\t2") && text.contains("Function not implemented"),
            "{text}"
        );
        let (code, text) = exec_in(
            bed,
            &spec(shell_with("sleep 1000", change)),
            json!({
                "args": ["sh", "-c", "grep Seccomp: /proc/self/status; mkdir /tmp/x"],
                "noNewPrivileges": no_new_privileges,
            }),
        );
        assert_eq!(code, 1, "{text}");
        assert!(
            text.contains("Seccomp:\t2") && text.contains("Function not implemented"),
            "{text}"
        );
    }
}

/// Starts a container, runs a further process in it, and ends the container.
fn exec_in(bed: &Bed, spec: &Spec, change: Value) -> (i32, String) {
    let (launched, _output) = bed.launch(spec);
    let launched = launched.unwrap();
    let init = launched.pid();
    let pidfd: OwnedFd = launched.pidfd().try_clone().unwrap();
    launched
        .ready()
        .unwrap_or_else(|error| panic!("{}", error.chain()))
        .0
        .start()
        .unwrap();
    let mut process =
        json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"], "args": []});
    merge(&mut process, change);
    let process: Process = serde_json::from_value(process).unwrap();
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let streams = Streams {
        stdout: Some(writer.try_clone().unwrap()),
        stderr: Some(writer),
        ..Streams::default()
    };
    let launched = launch_exec(bed.job(streams), spec, &pidfd, process).unwrap();
    let pid = launched.pid();
    let ended = match launched.ready() {
        Ok((ready, _)) => {
            ready.start().unwrap();
            let mut text = String::new();
            std::fs::File::from(reader)
                .read_to_string(&mut text)
                .unwrap();
            (wait(pid), text)
        }
        // The kernel lets an init end only after all others of its pid namespace are reaped.
        Err(error) => (wait(pid), error.chain()),
    };
    rustix::process::kill_process(init, rustix::process::Signal::KILL).unwrap();
    assert_eq!(wait(init), 137);
    ended
}

fn missing_program_fails_before_start(bed: &Bed) {
    let (launched, _output) = bed.launch(&spec(json!({"process": {"args": ["nosuch"]}})));
    let error = launched.unwrap().ready().unwrap_err();
    assert_eq!(
        error.chain(),
        "exec: \"nosuch\": executable file not found in $PATH"
    );
    let ended = exec_in(
        bed,
        &spec(shell("sleep 1000")),
        json!({"args": ["/bin/nosuch"]}),
    );
    assert_eq!(
        ended.1,
        "exec: \"/bin/nosuch\": stat /bin/nosuch: no such file or directory"
    );
}

fn program_that_is_none_fails_at_start(bed: &Bed) {
    let (launched, _output) = bed.launch(&spec(json!({"process": {"args": ["/etc/script"]}})));
    let launched = launched.unwrap();
    let pid = launched.pid();
    let error = launched.ready().unwrap().0.start().unwrap_err();
    assert_eq!(error.chain(), "exec: \"/etc/script\": exec format error");
    assert_eq!(wait(pid), 127);
}

fn exec_joins_the_container(bed: &Bed) {
    let (code, text) = exec_in(
        bed,
        &spec(shell("sleep 1000")),
        json!({"args": ["sh", "-c", "hostname; cat /proc/1/cmdline; cat /proc/self/cgroup; id -u; grep CapBnd /proc/self/status"],
               "user": {"uid": 1000, "gid": 1000}}),
    );
    assert_eq!(code, 0, "{text}");
    assert!(
        text.starts_with("box\nsh\0-c\0sleep 1000\0") || text.starts_with("box\nsleep\0"),
        "{text:?}"
    );
    assert!(
        text.contains("0::/\n1000\nCapBnd:\t0000000000000001\n"),
        "{text:?}"
    );
}

fn pid_namespace_is_shared_and_its_orphans_are_reaped(bed: &Bed) {
    let program = bed.root().join("pause");
    std::fs::copy("/proc/self/exe", &program).unwrap();
    // The test's program is not static.
    let libraries = json!([
        {"destination": "/lib", "type": "bind", "source": "/usr/lib", "options": ["rbind", "ro"]},
        {"destination": "/lib64", "type": "bind", "source": "/usr/lib64", "options": ["rbind", "ro"]}
    ]);
    let change = json!({
        "process": {"args": [oci_process::PAUSE], "user": {"uid": 65535, "gid": 65535}, "noNewPrivileges": true},
        "mounts": libraries
    });
    let (launched, _output) = bed.launch(&spec(change));
    let launched = launched.unwrap();
    let _pause = Ended(launched.pid());
    let pidfd: OwnedFd = launched.pidfd().try_clone().unwrap();
    launched.ready().unwrap().0.start().unwrap();

    let sharing = |script: &str| {
        let mut spec = spec(shell(script));
        let namespaces = spec.linux_mut().as_mut().unwrap().namespaces_mut();
        for namespace in namespaces.iter_mut().flatten() {
            if namespace.typ() == LinuxNamespaceType::Pid {
                namespace.set_path(Some("/shared".into()));
            }
        }
        spec
    };
    let script = "cat /proc/1/cmdline; kill -9 1 2> /tmp/no; [ $$ != 1 ] || echo first
        orphan=$(sh -c 'sleep 0 > /tmp/orphan & echo $!')
        for i in $(echo 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20); do
            [ -d /proc/$orphan ] || exec echo reaped; sleep 0.5
        done";
    for _ in 0..2 {
        let shared = Some(pidfd.try_clone().unwrap());
        let (code, text) = bed.run_with(&sharing(script), shared);
        assert_eq!((code, text.as_str()), (0, "/pause\0reaped\n"));
    }

    let own = spec(json!({}));
    for (spec, process) in [(&sharing("exit 0"), None), (&own, Some(pidfd))] {
        let error = bed.launch_with(spec, process).0.unwrap_err().to_string();
        assert!(error.starts_with("linux.namespaces[pid].path"), "{error}");
    }
}

/// A process that is ended with the test, however the test ends.
struct Ended(Pid);

impl Drop for Ended {
    fn drop(&mut self) {
        rustix::process::kill_process(self.0, rustix::process::Signal::KILL).unwrap();
        assert_eq!(wait(self.0), 137);
    }
}

fn terminal_is_handed_over(bed: &Bed) {
    let spec = spec(
        json!({"process": {"terminal": true, "args": ["sh", "-c", "tty; ls -l /dev/console; cat < /dev/console"]}}),
    );
    let launched = launch_init(
        bed.job(Streams {
            terminal: true,
            ..Streams::default()
        }),
        "test",
        &spec,
        &bed.root(),
        None,
    )
    .unwrap();
    let pid = launched.pid();
    let (ready, terminal) = launched
        .ready()
        .unwrap_or_else(|error| panic!("{}", error.chain()));
    ready.start().unwrap();
    let mut terminal = std::fs::File::from(terminal.unwrap());
    terminal.write_all(b"typed\n\x04").unwrap();
    let mut text = Vec::new();
    let mut part = [0; 256];
    // A terminal that all processes have left answers EIO.
    while let Ok(len @ 1..) = terminal.read(&mut part) {
        text.extend_from_slice(&part[..len]);
    }
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("/dev/pts/0"), "{text:?}");
    assert_eq!(
        text.matches("typed").count(),
        2,
        "echo and output: {text:?}"
    );
    assert_eq!(wait(pid), 0);
}

fn masked_paths_are_empty(bed: &Bed) {
    let change = json!({"linux": {"maskedPaths": ["/secret", "/etc/passwd", "/no/such"], "readonlyPaths": ["/tmp", "/no/such"]}});
    let (code, text) = bed.run(shell_with(
        "ls -A /secret; cat /etc/passwd; touch /tmp/x; touch /secret/x; touch /free",
        change,
    ));
    assert_eq!(code, 0, "{text}");
    assert_eq!(text.matches("Read-only file system").count(), 2, "{text}");
    assert_eq!(text.lines().count(), 2, "{text}");
}

fn dropped_launch_leaves_nothing(bed: &Bed) {
    let (launched, _output) = bed.launch(&spec(json!({})));
    let launched = launched.unwrap();
    let pid = launched.pid();
    drop(launched);
    assert_eq!(wait(pid), 127);
    let (launched, _output) = bed.launch(&spec(json!({})));
    let launched = launched.unwrap();
    let pid = launched.pid();
    drop(launched.ready().unwrap());
    assert_eq!(wait(pid), 0);
}

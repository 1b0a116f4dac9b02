// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Real software as people run it: with volumes, probed every second, restarted and killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::chown;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use e2e::{DEADLINE, Node, count, eventually, kill_9, metrics, named, run, spawn};
use k8s_cri::v1;

use crate::cri_client::{Kubelet, Pod};
use crate::volumes::{PodDir, mount, output, sh, write};

const PYTHON: &str = "coffer.test/python:latest";
const REDIS: &str = "coffer.test/redis:latest";
const NGINX: &str = "coffer.test/nginx:latest";
const POSTGRES: &str = "coffer.test/postgres:latest";
const COMPILER: &str = "coffer.test/gcc:latest";

/// Has an archive's images for CRI, once on a node.
fn import(image: &str, archive: &str) {
    let listed = run("ctr", &["-n", "k8s.io", "images", "ls", "-q"]).stdout;
    if !listed.lines().any(|line| line == image) {
        let path = format!("/opt/coffer/images/{archive}");
        run("ctr", &["-n", "k8s.io", "images", "import", &path]).success();
    }
}

/// Makes and starts a container of an image with these mounts.
fn start(
    kubelet: &Kubelet,
    pod: &Pod,
    (name, attempt, image): (&str, u32, &str),
    command: &[&str],
    mounts: Vec<v1::Mount>,
) -> String {
    let change = |config: &mut v1::ContainerConfig| {
        config.mounts = mounts;
        config.image.as_mut().unwrap().image = image.to_owned();
    };
    let id = kubelet
        .create_with(pod, name, attempt, command, change)
        .unwrap();
    kubelet.start(&id);
    id
}

/// A kubelet's exec probe of a container: every second, until it is told to end.
struct Probe {
    over: Arc<AtomicBool>,
    thread: JoinHandle<u32>,
}

impl Probe {
    fn every_second(container: &str, command: &'static [&'static str]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (ends, container) = (Arc::clone(&over), container.to_owned());
        let thread = thread::spawn(move || {
            let kubelet = Kubelet::new(&format!("probe-{container}"));
            let mut probed = 0;
            while !ends.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let executed = kubelet.try_exec(&container, command);
                assert!(
                    executed.as_ref().is_ok_and(|done| done.code == 0)
                        || ends.load(Ordering::Relaxed),
                    "probe {probed}: {executed:?}"
                );
                probed += 1;
                // A kubelet's periodSeconds of 1, not a wait for anything.
                thread::sleep(Duration::from_secs(1).saturating_sub(begun.elapsed()));
            }
            probed
        });
        Self { over, thread }
    }

    /// Ends it before the container does; all probes were answered with 0.
    fn end(self) {
        self.over.store(true, Ordering::Relaxed);
        assert!(self.thread.join().unwrap() > 0);
    }
}

/// What of a server's answer follows the headers, if it answers at all.
fn http_get(address: &str, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect((address, 80)).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: pod\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.contains(" 200 ").then(|| body.to_owned())
}

/// An empty database in a directory of its owner's. By runc: it is minutes of work for a VM in an emulated machine.
fn make_database(claim: &Path) {
    let mount = format!(
        "type=bind,src={},dst=/data,options=rbind:rw",
        claim.display()
    );
    let runc = ["run", "--rm", "--runtime", "io.containerd.runc.v2"];
    let initdb = [
        "initdb",
        "-N",
        "-D",
        "/data/base",
        "--no-locale",
        "-A",
        "trust",
    ];
    let mut arguments = vec!["-n", "k8s.io"];
    arguments.extend(runc);
    arguments.extend(["--mount", &mount, POSTGRES, "initdb"]);
    arguments.extend(initdb);
    run("ctr", &arguments).success();
}

#[test]
fn postgres_on_a_claim_survives_the_restarts_of_its_pod() {
    const START: &str = "exec postgres -D /data/base -k /tmp -c listen_addresses=127.0.0.1";
    const OWNER: u32 = 999;
    let _node = Node::new("postgres_on_a_claim_survives_the_restarts_of_its_pod");
    import(POSTGRES, "postgres.tar");
    let dir = PodDir::new("postgres");
    let claim = dir.claim("pvc-1");
    chown(&claim, Some(OWNER), Some(OWNER)).unwrap();
    make_database(&claim);
    let mut acknowledged = 0;
    for restart in 0..count(3, 12) {
        let mut kubelet = Kubelet::new("postgres");
        let pod = kubelet.run_pod("postgres");
        let mounts = vec![mount(&claim, "/data", false)];
        let database = start(&kubelet, &pod, ("db", 0, POSTGRES), &sh(START), mounts);
        let sql = |text: &str| kubelet.exec(&database, &["psql", "-h", "/tmp", "-qAtc", text]);
        eventually("postgres takes connections", || {
            (sql("select 1").stdout == "1\n").then_some(())
        });
        let probe = Probe::every_second(&database, &["pg_isready", "-q", "-h", "/tmp"]);
        if restart == 0 {
            let made = sql("create table rows (number int, filling text)");
            assert_eq!(made.code, 0, "{made:?}");
        }
        let kept = sql("select count(*), count(distinct number) from rows").stdout;
        assert_eq!(
            kept,
            format!("{acknowledged}|{acknowledged}\n"),
            "restart {restart}"
        );
        let insert = format!(
            "insert into rows select {acknowledged} + n, repeat('x', 1000) from generate_series(1, 200) n"
        );
        let inserted = sql(&insert);
        assert_eq!(inserted.code, 0, "{inserted:?}");
        acknowledged += 200;
        probe.end();
        // By turns as a kubelet stops it, and as a node loses it.
        if restart % 2 == 0 {
            kill_9(named("coffer-vmm")[0]);
            assert_eq!(kubelet.exit_code(&database), 137);
        } else {
            kubelet.stop(&database, Duration::from_secs(60));
            assert_eq!(kubelet.exit_code(&database), 0);
        }
    }
}

/// Increments a counter for ever and prints each number once redis has acknowledged it.
const INCREMENT: &str = "import socket
server = socket.create_connection(('127.0.0.1', 6379))
answers = server.makefile('rb')
while True:
    server.sendall(b'INCR n\\r\\n')
    print(int(answers.readline()[1:]), flush=True)
";

#[test]
fn redis_loses_no_acknowledged_write_when_it_is_killed() {
    const SERVER: [&str; 9] = [
        "redis-server",
        "--dir",
        "/data",
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
        "--save",
        "",
    ];
    let _node = Node::new("redis_loses_no_acknowledged_write_when_it_is_killed");
    import(REDIS, "software.tar");
    let dir = PodDir::new("redis");
    let claim = dir.claim("pvc-1");
    let mut acknowledged: u64 = 0;
    for life in 0..count(1, 10) {
        let mut kubelet = Kubelet::new("redis");
        let pod = kubelet.run_pod("redis");
        for attempt in 0..2 {
            let mounts = vec![mount(&claim, "/data", false)];
            let redis = start(&kubelet, &pod, ("db", attempt, REDIS), &SERVER, mounts);
            eventually("redis answers", || {
                let ping = kubelet.exec(&redis, &["redis-cli", "ping"]);
                (ping.stdout == "PONG\n").then_some(())
            });
            let kept = kubelet.exec(&redis, &["redis-cli", "get", "n"]).stdout;
            let kept = kept.trim().parse::<u64>().unwrap_or(0);
            assert!(kept >= acknowledged, "{kept} of {acknowledged} are left");
            let probe = Probe::every_second(&redis, &["redis-cli", "ping"]);

            let exec = format!("increment-{attempt}");
            let arguments = ["-n", "k8s.io", "task", "exec", "--exec-id", &exec, &redis];
            let arguments = [&arguments[..], &["python3", "-c", INCREMENT]].concat();
            let mut client = spawn("ctr", &arguments);
            let mut numbers = BufReader::new(client.stdout.take().unwrap()).lines();
            for _ in 0..200 {
                acknowledged = numbers.next().unwrap().unwrap().parse().unwrap();
            }
            probe.end();
            // In the middle of its writes: first the container, then the VM under the next one.
            if attempt == 0 {
                let arguments = ["-n", "k8s.io", "task", "kill", "-s", "SIGKILL", &redis];
                run("ctr", &arguments).success();
            } else {
                kill_9(named("coffer-vmm")[0]);
            }
            for line in numbers.map_while(Result::ok) {
                acknowledged = line.parse().unwrap();
            }
            client.wait().unwrap();
            assert_eq!(kubelet.exit_code(&redis), 137, "life {life}");
            kubelet.remove(&redis);
        }
    }
    assert!(acknowledged > 0);
}

#[test]
fn nginx_serves_a_config_map_that_changes_under_it() {
    const CONFIG: &str = "user root; daemon off; error_log stderr; pid /tmp/pid; events {}
        http { access_log off; server { listen 80; root /content; } }";
    let _node = Node::new("nginx_serves_a_config_map_that_changes_under_it");
    import(NGINX, "software.tar");
    let dir = PodDir::new("nginx");
    let mut kubelet = Kubelet::new("nginx");
    let pod = kubelet.run_pod("nginx");
    let address = kubelet.pod_ip(&pod);
    let config = dir.written("configmap", "config");
    write(&config, "..1", &[("nginx.conf", CONFIG)]);
    let content = dir.written("configmap", "content");
    // Each page is long enough to be seen torn, if it were.
    let page = |number: u32| format!("{number} ").repeat(20_000);
    write(&content, "..0", &[("page", &page(0))]);
    let mounts = vec![
        mount(&config, "/config", true),
        mount(&content, "/content", true),
    ];
    let command = ["nginx", "-c", "/config/nginx.conf"];
    let nginx = start(&kubelet, &pod, ("web", 0, NGINX), &command, mounts);
    eventually("nginx serves", || http_get(&address, "/page"));
    let probe = Probe::every_second(
        &nginx,
        &["wget", "-q", "-O", "/dev/null", "http://127.0.0.1/page"],
    );
    for state in 1..=count(5, 50) {
        write(&content, &format!("..{state}"), &[("page", &page(state))]);
        let (old, new) = (page(state - 1), page(state));
        eventually("the new page is served", || {
            let served = http_get(&address, "/page").expect("nginx answers all the time");
            assert!(
                served == old || served == new,
                "a page that never was: {} bytes",
                served.len()
            );
            (served == new).then_some(())
        });
    }
    probe.end();
    kubelet.stop(&nginx, Duration::from_secs(60));
    assert_eq!(kubelet.exit_code(&nginx), 0);
}

/// Forks 500 children, each of which forks one of its own and leaves it to init; says what it has seen of their ends.
const FORKS: &str = "import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(5))
hold, let_go = os.pipe()
children = {}
for number in range(500):
    pid = os.fork()
    if pid == 0:
        os.close(let_go)
        os.read(hold, 1)
        if os.fork() == 0:
            os._exit(0)
        os._exit(number % 256)
    children[pid] = number % 256
print('forked', len(children), min(children) > 1, os.getpid(), flush=True)
while not os.path.exists('/go'):
    time.sleep(0.1)
os.close(let_go)
right, orphans = 0, 0
while right + orphans < 1000:
    pid, status = os.wait()
    if pid in children:
        right += os.waitstatus_to_exitcode(status) == children.pop(pid)
    else:
        orphans += 1
print('reaped', right, orphans, flush=True)
signal.pause()
";

#[test]
fn python_with_500_children_reaps_them_all() {
    let _node = Node::new("python_with_500_children_reaps_them_all");
    import(PYTHON, "software.tar");
    let mut kubelet = Kubelet::new("forks");
    let pod = kubelet.run_pod("forks");
    let main = start(
        &kubelet,
        &pod,
        ("main", 0, PYTHON),
        &["python3", "-c", FORKS],
        Vec::new(),
    );
    let logged = |line: &str| {
        eventually(line, || {
            kubelet
                .log("main", 0, "stdout")
                .contains(line)
                .then_some(())
        });
    };
    // In a pid namespace of its own it is process 1, and so the parent of whoever loses his.
    logged("forked 500 True 1\n");
    assert_eq!(metrics("k8s.io", &main)["pids.current"], 501);
    let processes = || output(&kubelet, &main, "ls /proc | grep -c '^[0-9]'");
    let probe = Probe::every_second(&main, &["test", "-d", "/proc/1"]);
    output(&kubelet, &main, "touch /go");
    logged("reaped 500 500\n");
    probe.end();
    eventually("none is left but init", || {
        (metrics("k8s.io", &main)["pids.current"] == 1).then_some(())
    });
    // Init, the shell, ls and grep.
    assert!(
        ["3\n", "4\n"].contains(&processes().as_str()),
        "no zombie is left"
    );
    let listed = run("ctr", &["-n", "k8s.io", "task", "ps", &main]).success();
    assert_eq!(
        listed.stdout.lines().count(),
        2,
        "a heading and init: {listed:?}"
    );
    kubelet.stop(&main, Duration::from_secs(60));
    assert_eq!(kubelet.exit_code(&main), 5);
}

/// Uses what the build has made.
const PROGRAM: &str = r#"#include <libfdt.h>
#include <stdio.h>
int main(void) {
    static char tree[4096];
    fdt_create_empty_tree(tree, sizeof tree);
    int node = fdt_add_subnode(tree, 0, "pod");
    fdt_setprop_string(tree, node, "runtime", "coffer");
    printf("%s %d\n", (const char *)fdt_getprop(tree, fdt_path_offset(tree, "/pod"), "runtime", NULL), fdt_check_header(tree));
}
"#;

#[test]
fn gcc_builds_a_library_on_an_empty_dir() {
    let _node = Node::new("gcc_builds_a_library_on_an_empty_dir");
    import(COMPILER, "gcc.tar");
    let dir = PodDir::new("build");
    let mut kubelet = Kubelet::new("build");
    let pod = kubelet.run_pod("build");
    let mounts = vec![mount(&dir.empty_dir("work"), "/work", false)];
    let script = format!(
        "set -e; cp /usr/src/libfdt/* /work; cd /work; cat > main.c <<'END'\n{PROGRAM}END\n\
         for file in *.c; do gcc -Wall -I. -c $file; done\n\
         /usr/bin/ar rcs libfdt.a fdt*.o; gcc main.o libfdt.a -o program; ls *.o | wc -l; ./program; exec sleep infinity"
    );
    let build = start(&kubelet, &pod, ("build", 0, COMPILER), &sh(&script), mounts);
    let probe = Probe::every_second(&build, &["test", "-d", "/work"]);
    let exited = i32::from(v1::ContainerState::ContainerExited);
    eventually("the program has run", || {
        let done = kubelet.log("build", 0, "stdout").contains("coffer 0\n");
        assert!(
            done || kubelet.status(&build).state != exited,
            "{}",
            kubelet.log("build", 0, "stderr")
        );
        done.then_some(())
    });
    probe.end();
    assert_eq!(kubelet.log("build", 0, "stdout"), "10\ncoffer 0\n");
}

/// A pod as a CronJob's: it does its work, says so, and ends; then it is removed.
fn short_pod(name: &str, number: u32) {
    let mut kubelet = Kubelet::new(name);
    let pod = kubelet.run_pod(name);
    let code = i32::try_from(number % 256).unwrap();
    let script = format!("echo job {number}; exit {code}");
    let job = kubelet.run(&pod, "job", &sh(&script));
    assert_eq!(kubelet.exit_code(&job), code);
    eventually("the log is whole", || {
        (kubelet.log("job", 0, "stdout") == format!("job {number}\n")).then_some(())
    });
    kubelet.stop_pod(&pod);
    kubelet.remove_pod(&pod);
}

#[test]
fn short_pods_in_a_row_come_and_go() {
    let _node = Node::new("short_pods_in_a_row_come_and_go");
    for number in 0..count(5, 200) {
        short_pod(&format!("row-{number}"), number);
    }
}

#[test]
fn short_pods_at_once_come_and_go() {
    let _node = Node::new("short_pods_at_once_come_and_go");
    thread::scope(|scope| {
        for number in 0..count(5, 30) {
            scope.spawn(move || short_pod(&format!("at-once-{number}"), number));
        }
    });
}

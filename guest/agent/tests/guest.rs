// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The host's part, played against a real agent in a real guest, whatever VMM runs it.
//!
//! `COFFER_GUEST_VSOCK` is the path of the VM's hybrid vsock socket, `COFFER_GUEST_RUN` the shell command that starts the VM
//! and ends with it. The VM has three disks: serial `layer0`, EROFS, with busybox in `/bin`; serials `scratch` and `cache`, ext4, empty.
//! Without these variables the suite says so and passes. An argument runs the tests whose names contain it.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test"
)]

mod host;

use std::time::Instant;

use agent_proto::api;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use host::{Guest, Io, OUTPUT, code, container_ref, create_request, reference, shell, shell_with};

fn main() {
    let (Ok(vsock), Ok(run)) = (
        std::env::var("COFFER_GUEST_VSOCK"),
        std::env::var("COFFER_GUEST_RUN"),
    ) else {
        println!("skipped: COFFER_GUEST_VSOCK and COFFER_GUEST_RUN are not set");
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let only = std::env::args().nth(1).unwrap_or_default();
        let mut guest = Guest::boot(vsock, &run).await;
        macro_rules! run {
            ($($test:ident)*) => {$(
                if stringify!($test).contains(&only) {
                    let start = Instant::now();
                    let limit = std::time::Duration::from_secs(30);
                    let ended = tokio::time::timeout(limit, $test(&mut guest)).await;
                    if ended.is_err() {
                        let dump = guest.client.dump(host::ctx(), &api::Empty::new()).await.unwrap().json;
                        panic!("{} does not end: {dump}", stringify!($test));
                    }
                    println!("{} ... ok ({} ms)", stringify!($test), start.elapsed().as_millis());
                }
            )*};
        }
        run!(
            exit_code_and_streams_arrive
            error_of_a_missing_program_is_runcs
            refused_specs_leave_nothing
            input_reaches_its_end
            large_output_is_whole
            output_after_exit_does_not_delay_the_exit
            exec_runs_beside_init
            terminal_echoes_and_resizes
            large_terminal_output_is_whole
            signals_reach_their_process
            containers_share_what_the_pod_shares
            copied_files_are_as_sent
            volume_in_memory_and_a_part_of_it_are_shared
            volume_changes_in_a_running_container
            resources_are_enforced
            devices_are_denied
            oom_is_told_before_the_exit
            removed_container_can_be_made_again
            many_containers_at_once
            create_and_start_are_timed
            shutdown_ends_the_vm
        );
    });
}

async fn exit_code_and_streams_arrive(guest: &mut Guest) {
    let end = guest
        .run_to_end("c1", shell("echo out; echo err >&2; exit 77"))
        .await;
    assert_eq!(end, (77, "out\n".to_owned(), "err\n".to_owned()));
    let script = "hostname; id -u; date +%Y; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/self/cgroup";
    assert_eq!(
        guest.run_to_end("c1", shell(script)).await.1,
        "pod\n0\n2027\n80\n0::/\n"
    );
}

async fn error_of_a_missing_program_is_runcs(guest: &mut Guest) {
    let error = guest
        .create("c2", OUTPUT, json!({"process": {"args": ["nosuch"]}}))
        .await
        .err()
        .unwrap();
    assert_eq!(
        code(&error).1,
        "exec: \"nosuch\": executable file not found in $PATH"
    );
    // Nothing is left: the name is free again.
    assert_eq!(guest.run_to_end("c2", shell("exit 1")).await.0, 1);
}

async fn refused_specs_leave_nothing(guest: &mut Guest) {
    for (change, text) in [
        (
            json!({"process": {"apparmorProfile": "x"}}),
            "process.apparmorProfile",
        ),
        (
            json!({"linux": {"resources": {"memory": {"swappiness": 3}}}}),
            "linux.resources.memory.swappiness",
        ),
        (
            json!({"linux": {"resources": {"unified": {"memory.nosuch": "1"}}}}),
            "linux.resources.unified[memory.nosuch]",
        ),
        (
            json!({"mounts": [{"destination": "/x", "type": "nosuchfs", "source": "x"}]}),
            "mounting nosuchfs",
        ),
    ] {
        let error = guest.create("c3", OUTPUT, change).await.err().unwrap();
        let (_, message) = code(&error);
        assert!(message.contains(text), "{message}");
    }
    let dump = guest
        .client
        .dump(host::ctx(), &api::Empty::new())
        .await
        .unwrap()
        .json;
    assert!(!dump.contains("c3"), "{dump}");
}

async fn input_reaches_its_end(guest: &mut Guest) {
    let io = Io {
        stdin: true,
        ..OUTPUT
    };
    let mut process = guest
        .create("in", io, json!({"process": {"args": ["cat"]}}))
        .await
        .unwrap();
    guest.start(&process).await.unwrap();
    let mut stdin = process.stdin.take().unwrap();
    let text = "line\n".repeat(100_000);
    let request = api::CloseStdinRequest {
        process: Some(reference(&process.key)).into(),
        bytes: text.len() as u64,
        ..Default::default()
    };
    // Closed by count, not by the connection's end, and asked for before the bytes are there.
    guest
        .client
        .close_stdin(host::ctx(), &request)
        .await
        .unwrap();
    let sent = text.clone();
    let writer = tokio::spawn(async move {
        stdin.write_all(sent.as_bytes()).await.unwrap();
        stdin
    });
    let reference = container_ref(&process.key);
    let end = guest.finish(process).await;
    assert!(end.1 == text, "{} of {} bytes", end.1.len(), text.len());
    assert_eq!(end.0, 0);
    drop(writer.await);
    guest
        .client
        .remove_container(host::ctx(), &reference)
        .await
        .unwrap();
}

async fn large_output_is_whole(guest: &mut Guest) {
    let mut process = guest
        .run(
            "big",
            "dd if=/dev/zero bs=64k count=512 2>/dev/null | tr '\\0' x",
        )
        .await;
    let mut stdout = process.stdout.take().unwrap();
    let start = Instant::now();
    let mut bytes = 0_usize;
    let mut part = vec![0; 65536];
    loop {
        let count = stdout.read(&mut part).await.unwrap();
        if count == 0 {
            break;
        }
        assert!(part[..count].iter().all(|byte| *byte == b'x'));
        bytes += count;
    }
    println!("  {bytes} bytes in {:.2} s", start.elapsed().as_secs_f64());
    assert_eq!(bytes, 32 << 20);
    assert_eq!(
        guest.stream_bytes(&process, api::StreamKind::STDOUT).await,
        32 << 20
    );
    assert_eq!(guest.exit_status(&process).await, 0);
    guest.remove(&process).await;
}

async fn output_after_exit_does_not_delay_the_exit(guest: &mut Guest) {
    let init = guest.run("bg", "exec sleep 1000").await;
    // The exec leaves a child behind that holds its output.
    let script = "echo first; sleep 1000 & exit 5";
    let mut exec = guest
        .exec("bg", "left", OUTPUT, &["sh", "-c", script])
        .await
        .unwrap();
    assert_eq!(guest.exit_status(&exec).await, 5);
    guest.signal(&init, 9, false).await.unwrap();
    assert_eq!(guest.exit_status(&init).await, 137);
    let mut text = String::new();
    exec.stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .await
        .unwrap();
    assert_eq!(text, "first\n");
    guest.remove(&init).await;
}

async fn exec_runs_beside_init(guest: &mut Guest) {
    let init = guest.run("main", "exec sleep 1000").await;
    let script = "cat /proc/1/comm; grep -E '^Seccomp:|NoNewPrivs' /proc/self/status; exit 3";
    let exec = guest
        .exec("main", "e1", OUTPUT, &["sh", "-c", script])
        .await
        .unwrap();
    let end = guest.finish(exec).await;
    assert_eq!(
        (end.0, end.1.as_str()),
        (3, "sleep\nNoNewPrivs:\t0\nSeccomp:\t2\n")
    );
    let error = guest
        .exec("main", "e2", OUTPUT, &["/nosuch"])
        .await
        .err()
        .unwrap();
    assert_eq!(
        code(&error).1,
        "exec: \"/nosuch\": stat /nosuch: no such file or directory"
    );
    let error = guest
        .exec("nobody", "e3", OUTPUT, &["ls"])
        .await
        .err()
        .unwrap();
    assert_eq!(code(&error).0, ttrpc::Code::NOT_FOUND);
    let lasting = guest
        .exec("main", "e4", OUTPUT, &["sleep", "1000"])
        .await
        .unwrap();
    let error = guest
        .exec("main", "e4", OUTPUT, &["ls"])
        .await
        .err()
        .unwrap();
    assert_eq!(code(&error).0, ttrpc::Code::ALREADY_EXISTS);
    let listed = guest
        .client
        .list_processes(host::ctx(), &container_ref(&init.key))
        .await
        .unwrap()
        .processes;
    let execs: Vec<&str> = listed
        .iter()
        .map(|process| process.exec_id.as_str())
        .collect();
    assert_eq!((listed.len(), execs.contains(&"e4")), (2, true));
    // Init's exit is the last.
    guest.signal(&init, 9, false).await.unwrap();
    let (mut order, keys) = (Vec::new(), [reference(&init.key), reference(&lasting.key)]);
    while order.len() < 2 {
        let exec = guest
            .event(|event| match event {
                api::event::Event::Exited(exited) if keys.contains(&exited.process) => {
                    Some(exited.process.exec_id.clone())
                }
                _ => None,
            })
            .await;
        order.push(exec);
    }
    assert_eq!(order, ["e4", ""]);
    let error = guest.signal(&init, 9, false).await.unwrap_err();
    assert_eq!(code(&error).0, ttrpc::Code::NOT_FOUND);
    guest.remove(&init).await;
}

async fn terminal_echoes_and_resizes(guest: &mut Guest) {
    let io = Io {
        terminal: true,
        stdin: true,
    };
    let script = "stty size; read line; stty size; echo got $line; tty; ls -l /dev/console";
    let mut process = guest.create("tty", io, shell(script)).await.unwrap();
    guest.start(&process).await.unwrap();
    let mut stdout = process.stdout.take().unwrap();
    let mut text = String::new();
    let mut part = [0; 1024];
    while !text.contains("24 80") {
        let count = stdout.read(&mut part).await.unwrap();
        assert!(count > 0, "{text}");
        text.push_str(std::str::from_utf8(&part[..count]).unwrap());
    }
    let request = api::ResizePtyRequest {
        process: Some(reference(&process.key)).into(),
        columns: 132,
        rows: 50,
        ..Default::default()
    };
    guest
        .client
        .resize_pty(host::ctx(), &request)
        .await
        .unwrap();
    process
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"typed\n")
        .await
        .unwrap();
    stdout.read_to_string(&mut text).await.unwrap();
    assert!(
        text.contains("50 132") && text.contains("got typed") && text.contains("/dev/pts/0"),
        "{text:?}"
    );
    assert_eq!(guest.exit_status(&process).await, 0);
    guest.remove(&process).await;
}

async fn large_terminal_output_is_whole(guest: &mut Guest) {
    let io = Io {
        terminal: true,
        stdin: false,
    };
    let mut process = guest
        .create("ttybig", io, shell("seq 100000"))
        .await
        .unwrap();
    guest.start(&process).await.unwrap();
    let mut bytes = Vec::new();
    process
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut bytes)
        .await
        .unwrap();
    assert_eq!(bytes.len(), 688_895);
    assert_eq!(guest.exit_status(&process).await, 0);
    guest.remove(&process).await;
}

async fn signals_reach_their_process(guest: &mut Guest) {
    let script = "trap 'echo term; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
    let mut process = guest.run("sig", script).await;
    let mut ready = [0; 6];
    process
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut ready)
        .await
        .unwrap();
    guest.signal(&process, 15, false).await.unwrap();
    assert_eq!(guest.exit_status(&process).await, 9);
    guest.remove(&process).await;
    let process = guest.run("sig", "sleep 1000 & sleep 1000 & wait").await;
    let error = guest
        .client
        .remove_container(host::ctx(), &container_ref(&process.key))
        .await
        .unwrap_err();
    assert_eq!(code(&error).0, ttrpc::Code::FAILED_PRECONDITION);
    guest.signal(&process, 9, true).await.unwrap();
    assert_eq!(guest.exit_status(&process).await, 137);
    guest.remove(&process).await;
}

async fn containers_share_what_the_pod_shares(guest: &mut Guest) {
    let write =
        "echo one > /dev/shm/note; echo two > /cache/note; echo three > /note; exec sleep 1000";
    let first = guest.run("s1", write).await;
    let read = "until [ -s /cache/note ]; do sleep 0.1; done; cat /dev/shm/note /cache/note; cat /note; \
                ls -ld /cache | cut -c1-10; df /dev/shm | tail -1 | tr -s ' ' | cut -d' ' -f2";
    let end = guest.run_to_end("s2", shell(read)).await;
    assert_eq!(end.1, "one\ntwo\ndrwxrwxrwx\n8192\n", "{}", end.2);
    assert!(
        end.2.contains("/note"),
        "the root file system is not shared: {}",
        end.2
    );
    guest.signal(&first, 9, false).await.unwrap();
    guest.exit_status(&first).await;
    guest.remove(&first).await;
}

async fn copied_files_are_as_sent(guest: &mut Guest) {
    let entry = |path: &str, mode, content| api::CopiedFile {
        path: path.to_owned(),
        mode,
        uid: 5,
        gid: 6,
        content: Some(content),
        ..Default::default()
    };
    let mount = api::CopiedMount {
        index: 0,
        entries: vec![
            entry(
                "",
                0o755,
                api::copied_file::Content::Directory(api::Empty::new()),
            ),
            entry(
                "key",
                0o440,
                api::copied_file::Content::Data(b"value".to_vec()),
            ),
            entry(
                "link",
                0,
                api::copied_file::Content::Symlink("key".to_owned()),
            ),
        ],
        ..Default::default()
    };
    let change = shell_with(
        "cat /config/link; stat -c ' %a %u %g' /config/key; touch /config/x",
        json!({"mounts": [{"destination": "/config", "type": "bind",
                           "source": "/run/coffer/containers/cp/copied/0", "options": ["rbind", "ro"]}]}),
    );
    let process = guest
        .create_with("cp", OUTPUT, change, vec![mount])
        .await
        .unwrap();
    guest.start(&process).await.unwrap();
    let reference = container_ref(&process.key);
    let end = guest.finish(process).await;
    assert_eq!(end.1, "value 440 5 6\n", "{}", end.2);
    assert!(end.2.contains("Read-only"), "{}", end.2);
    guest
        .client
        .remove_container(host::ctx(), &reference)
        .await
        .unwrap();
}

fn bind(source: &str, destination: &str) -> serde_json::Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rw"]})
}

async fn volume_in_memory_and_a_part_of_it_are_shared(guest: &mut Guest) {
    let mounts = |id: &str| {
        json!({"mounts": [bind("/run/coffer/volumes/fast", "/fast"),
                          bind(&format!("/run/coffer/sub_paths/{id}/0"), "/part")]})
    };
    let script = "echo kept > /part/note; stat -c '%a %g' /fast /fast/part; df -k /fast | tail -1 | tr -s ' ' | cut -d' ' -f2";
    let end = guest
        .run_to_end("vm1", shell_with(script, mounts("vm1")))
        .await;
    assert_eq!(end.1, "2770 7\n750 7\n1024\n", "{}", end.2);
    let script = "cat /fast/part/of/it/note /part/note";
    let end = guest
        .run_to_end("vm2", shell_with(script, mounts("vm2")))
        .await;
    assert_eq!(end.1, "kept\nkept\n", "{}", end.2);
}

async fn volume_changes_in_a_running_container(guest: &mut Guest) {
    let state = |state: &str, value: &str| {
        let entry = |path: String, content| api::CopiedFile {
            path,
            mode: 0o755,
            content: Some(content),
            ..Default::default()
        };
        let directory = || api::copied_file::Content::Directory(api::Empty::new());
        let link = |target: &str| api::copied_file::Content::Symlink(target.to_owned());
        let data = api::copied_file::Content::Data(value.as_bytes().to_vec());
        api::PutFilesRequest {
            volume: "live".to_owned(),
            last: true,
            entries: vec![
                entry(String::new(), directory()),
                entry(state.to_owned(), directory()),
                entry(format!("{state}/key"), data),
                entry("..data".to_owned(), link(state)),
                entry("key".to_owned(), link("..data/key")),
            ],
            ..Default::default()
        }
    };
    let put = |client: agent_proto::service::AgentClient, request| async move {
        client.put_files(host::ctx(), &request).await.unwrap();
    };
    put(guest.client.clone(), state("..1", "one\n")).await;
    let mounts = json!({"mounts": [bind("/run/coffer/volumes/live", "/live")]});
    let script = "cat /live/key; echo ready > /cache/ready; until grep -q two /live/key; do sleep 0.1; done; ls -A /live";
    let change = shell_with(script, mounts);
    let process = guest.create("live", OUTPUT, change).await.unwrap();
    guest.start(&process).await.unwrap();
    let wait = "until [ -s /cache/ready ]; do sleep 0.1; done";
    guest.run_to_end("wait", shell(wait)).await;
    put(guest.client.clone(), state("..2", "two\n")).await;
    let reference = container_ref(&process.key);
    let end = guest.finish(process).await;
    assert_eq!(end.1, "one\n..2\n..data\nkey\n", "{}", end.2);
    let removed = guest.client.remove_container(host::ctx(), &reference);
    removed.await.unwrap();
}

async fn resources_are_enforced(guest: &mut Guest) {
    let script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max cpu.weight; for i in $(seq 100); do sleep 5 & done";
    let end = guest.run_to_end("res", shell(script)).await;
    assert_eq!(end.1, "67108864\n64\n100000 100000\n20\n", "{}", end.2);
    assert!(end.2.contains("fork"), "pids.max holds: {}", end.2);
}

async fn devices_are_denied(guest: &mut Guest) {
    let script = "mknod /tmp/disk b 254 0 && cat /tmp/disk; echo x > /dev/null && echo null; head -c 4 /dev/urandom | wc -c";
    let end = guest.run_to_end("dev", shell(script)).await;
    assert_eq!(end.1, "null\n4\n", "{}", end.2);
    assert!(end.2.contains("Operation not permitted"), "{}", end.2);
}

async fn oom_is_told_before_the_exit(guest: &mut Guest) {
    let process = guest.run("oom", "exec tail /dev/zero").await;
    let name = process.key.container.to_string();
    let wanted = reference(&process.key);
    let mut oom = false;
    let told = guest
        .event(|event| match event {
            api::event::Event::OutOfMemory(out) if out.container_id == name => {
                oom = true;
                None
            }
            api::event::Event::Exited(exited) if *exited.process == wanted => {
                Some((oom, exited.exit_status))
            }
            _ => None,
        })
        .await;
    assert_eq!(told, (true, 137), "the OOM event comes first");
    guest.remove(&process).await;
}

async fn removed_container_can_be_made_again(guest: &mut Guest) {
    for _ in 0..5 {
        let end = guest
            .run_to_end("again", shell("ls /made 2>/dev/null; touch /made; exit 4"))
            .await;
        assert_eq!((end.0, end.1.as_str()), (4, ""));
    }
    let unknown = api::ContainerRef {
        container_id: "never-was".to_owned(),
        ..Default::default()
    };
    guest
        .client
        .remove_container(host::ctx(), &unknown)
        .await
        .unwrap();
}

async fn many_containers_at_once(guest: &mut Guest) {
    let mut processes = Vec::new();
    let start = Instant::now();
    for number in 0..20 {
        let key = guest.key(&format!("m{number}"), None);
        let process = guest.connect(&key, OUTPUT).await;
        let request = create_request(
            &key,
            OUTPUT,
            shell(&format!("echo {number}; exit {number}")),
            Vec::new(),
        );
        let client = guest.client.clone();
        processes.push((
            process,
            tokio::spawn(async move {
                client.create_container(host::ctx(), &request).await?;
                client
                    .start_container(host::ctx(), &container_ref(&key))
                    .await
            }),
        ));
    }
    for (number, (process, started)) in processes.into_iter().enumerate() {
        started.await.unwrap().unwrap();
        let reference = container_ref(&process.key);
        let end = guest.finish(process).await;
        assert_eq!((end.0 as usize, end.1), (number, format!("{number}\n")));
        guest
            .client
            .remove_container(host::ctx(), &reference)
            .await
            .unwrap();
    }
    println!("  20 containers in {} ms", start.elapsed().as_millis());
}

async fn create_and_start_are_timed(guest: &mut Guest) {
    let mut times = Vec::new();
    for number in 0..5 {
        let begin = Instant::now();
        let process = guest
            .create(&format!("t{number}"), OUTPUT, shell("exit 0"))
            .await
            .unwrap();
        let created = begin.elapsed();
        guest.start(&process).await.unwrap();
        let started = begin.elapsed();
        guest.exit_status(&process).await;
        let ended = begin.elapsed();
        guest.remove(&process).await;
        times.push([created, started, ended, begin.elapsed()].map(|time| time.as_micros()));
    }
    println!("  created, started, exited, removed (us): {times:?}");
}

async fn shutdown_ends_the_vm(guest: &mut Guest) {
    let begin = Instant::now();
    let _ = guest.client.shutdown(host::ctx(), &api::Empty::new()).await;
    while guest.vm.try_wait().unwrap().is_none() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    println!(
        "  the VM has ended after {} ms",
        begin.elapsed().as_millis()
    );
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A small host: it boots the VM, calls the agent, opens streams and collects events.

use std::collections::VecDeque;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use agent_proto::{
    CONTROL_PORT, ProcessKey, STDIO_PORT, StreamHeader, StreamKind, api, hello, service,
};
use ids::Generation;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::context;

/// The VM and the connection to its agent.
pub(crate) struct Guest {
    vsock: String,
    pub(crate) vm: Child,
    pub(crate) client: service::AgentClient,
    events: VecDeque<api::Event>,
    last: u64,
    next: u64,
}

/// A process with the host's ends of its streams.
pub(crate) struct Process {
    pub(crate) key: ProcessKey,
    pub(crate) stdout: Option<UnixStream>,
    pub(crate) stderr: Option<UnixStream>,
    pub(crate) stdin: Option<UnixStream>,
}

/// Which streams a process has; output always.
#[derive(Clone, Copy)]
pub(crate) struct Io {
    pub(crate) terminal: bool,
    pub(crate) stdin: bool,
}

pub(crate) const OUTPUT: Io = Io {
    terminal: false,
    stdin: false,
};

pub(crate) fn ctx() -> context::Context {
    context::with_duration(Duration::from_secs(60))
}

impl Guest {
    pub(crate) async fn boot(vsock: String, run: &str) -> Self {
        let path = format!("{vsock}_{}", CONTROL_PORT.0);
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let start = Instant::now();
        let vm = Command::new("sh").args(["-c", run]).spawn().unwrap();
        let accepted = tokio::time::timeout(Duration::from_secs(120), listener.accept());
        let (mut control, _) = accepted
            .await
            .expect("the guest dials within two minutes")
            .unwrap();
        let mut prefix = [0; 4];
        control.read_exact(&mut prefix).await.unwrap();
        let mut body = vec![0; hello::decode_len(prefix).unwrap()];
        control.read_exact(&mut body).await.unwrap();
        let said = hello::decode(&body).unwrap();
        println!(
            "hello after {} ms: kernel {}, main() at {} us, ready at {} us of the guest's clock",
            start.elapsed().as_millis(),
            said.kernel_release,
            said.agent_started_ns / 1000,
            said.agent_ready_ns / 1000,
        );
        let socket = ttrpc::r#async::transport::Socket::new(control);
        let client = service::AgentClient::new(ttrpc::r#async::Client::new(socket));
        let guest = Self {
            vsock,
            vm,
            client,
            events: VecDeque::new(),
            last: 0,
            next: 0,
        };
        let request = api::ConfigureSandboxRequest {
            hostname: "pod".to_owned(),
            sysctls: [(
                "net.ipv4.ip_unprivileged_port_start".to_owned(),
                "80".to_owned(),
            )]
            .into(),
            scratch: Some(disk("scratch", "ext4")).into(),
            shm_bytes: 8 << 20,
            wall_clock_ns: 1_800_000_000_000_000_000,
            ..Default::default()
        };
        let start = Instant::now();
        guest
            .client
            .configure_sandbox(ctx(), &request)
            .await
            .unwrap();
        println!("configured after {} ms", start.elapsed().as_millis());
        guest
    }

    async fn stream(&self, key: &ProcessKey, kind: StreamKind) -> UnixStream {
        let mut stream = UnixStream::connect(&self.vsock).await.unwrap();
        stream
            .write_all(format!("CONNECT {}\n", STDIO_PORT.0).as_bytes())
            .await
            .unwrap();
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') {
            answer.push(stream.read_u8().await.unwrap());
        }
        assert!(answer.starts_with(b"OK "), "{answer:?}");
        let header = StreamHeader {
            process: key.clone(),
            kind,
        };
        stream.write_all(&header.encode()).await.unwrap();
        stream
    }

    pub(crate) async fn connect(&self, key: &ProcessKey, io: Io) -> Process {
        let stdin = if io.stdin {
            Some(self.stream(key, StreamKind::Stdin).await)
        } else {
            None
        };
        let stdout = Some(self.stream(key, StreamKind::Stdout).await);
        let stderr = if io.terminal {
            None
        } else {
            Some(self.stream(key, StreamKind::Stderr).await)
        };
        Process {
            key: key.clone(),
            stdout,
            stderr,
            stdin,
        }
    }

    pub(crate) fn key(&mut self, container: &str, exec: Option<&str>) -> ProcessKey {
        self.next += 1;
        ProcessKey {
            container: container.parse().unwrap(),
            exec: exec.map(|exec| exec.parse().unwrap()),
            generation: Generation(self.next),
        }
    }

    pub(crate) async fn create(
        &mut self,
        container: &str,
        io: Io,
        change: Value,
    ) -> Result<Process, ttrpc::Error> {
        self.create_with(container, io, change, Vec::new()).await
    }

    pub(crate) async fn create_with(
        &mut self,
        container: &str,
        io: Io,
        change: Value,
        copied_mounts: Vec<api::CopiedMount>,
    ) -> Result<Process, ttrpc::Error> {
        let key = self.key(container, None);
        let process = self.connect(&key, io).await;
        self.client
            .create_container(ctx(), &create_request(&key, io, change, copied_mounts))
            .await?;
        Ok(process)
    }

    pub(crate) async fn start(&self, process: &Process) -> Result<(), ttrpc::Error> {
        self.client
            .start_container(ctx(), &container_ref(&process.key))
            .await
            .map(|_| ())
    }

    /// A container that runs `script`.
    pub(crate) async fn run(&mut self, container: &str, script: &str) -> Process {
        let process = self.create(container, OUTPUT, shell(script)).await.unwrap();
        self.start(&process).await.unwrap();
        process
    }

    pub(crate) async fn exec(
        &mut self,
        container: &str,
        exec: &str,
        io: Io,
        arguments: &[&str],
    ) -> Result<Process, ttrpc::Error> {
        let key = self.key(container, Some(exec));
        let process = self.connect(&key, io).await;
        let json = json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"], "args": arguments,
                          "terminal": io.terminal});
        let request = api::StartExecRequest {
            process: Some(reference(&key)).into(),
            process_json: json.to_string().into_bytes(),
            stdio: Some(stdio(io)).into(),
            ..Default::default()
        };
        self.client.start_exec(ctx(), &request).await?;
        Ok(process)
    }

    pub(crate) async fn remove(&self, process: &Process) {
        self.client
            .remove_container(ctx(), &container_ref(&process.key))
            .await
            .unwrap();
    }

    pub(crate) async fn signal(
        &self,
        process: &Process,
        signal: u32,
        all: bool,
    ) -> Result<(), ttrpc::Error> {
        let request = api::SignalRequest {
            process: Some(reference(&process.key)).into(),
            signal,
            all,
            ..Default::default()
        };
        self.client.signal(ctx(), &request).await.map(|_| ())
    }

    /// The next event that `wanted` takes; the others stay in order. Checks the numbers.
    pub(crate) async fn event<T>(
        &mut self,
        mut wanted: impl FnMut(&api::event::Event) -> Option<T>,
    ) -> T {
        loop {
            let mut events = self.events.iter().enumerate();
            let found = events.find_map(|(at, event)| Some((at, wanted(event.event.as_ref()?)?)));
            if let Some((at, value)) = found {
                self.events.remove(at);
                return value;
            }
            let request = api::NextEventsRequest {
                after: self.last,
                ..Default::default()
            };
            for event in self
                .client
                .next_events(ctx(), &request)
                .await
                .unwrap()
                .events
            {
                assert_eq!(event.sequence, self.last + 1, "no gap");
                self.last = event.sequence;
                self.events.push_back(event);
            }
        }
    }

    pub(crate) async fn exit_status(&mut self, process: &Process) -> u32 {
        let wanted = reference(&process.key);
        self.event(|event| match event {
            api::event::Event::Exited(exited) if *exited.process == wanted => {
                Some(exited.exit_status)
            }
            _ => None,
        })
        .await
    }

    pub(crate) async fn stream_bytes(&mut self, process: &Process, kind: api::StreamKind) -> u64 {
        let wanted = reference(&process.key);
        self.event(|event| match event {
            api::event::Event::StreamEnded(ended)
                if *ended.process == wanted && ended.kind == kind.into() =>
            {
                Some(ended.bytes)
            }
            _ => None,
        })
        .await
    }

    /// Everything that the process writes, checked against the agent's counts, and its exit code.
    pub(crate) async fn finish(&mut self, mut process: Process) -> (u32, String, String) {
        let mut texts = [String::new(), String::new()];
        for (text, (stream, kind)) in texts.iter_mut().zip([
            (process.stdout.take(), api::StreamKind::STDOUT),
            (process.stderr.take(), api::StreamKind::STDERR),
        ]) {
            let Some(mut stream) = stream else { continue };
            let mut bytes = Vec::new();
            stream.read_to_end(&mut bytes).await.unwrap();
            assert_eq!(self.stream_bytes(&process, kind).await, bytes.len() as u64);
            *text = String::from_utf8_lossy(&bytes).into_owned();
        }
        let status = self.exit_status(&process).await;
        let [out, errors] = texts;
        (status, out, errors)
    }

    /// Runs a container to its end and removes it.
    pub(crate) async fn run_to_end(
        &mut self,
        container: &str,
        change: Value,
    ) -> (u32, String, String) {
        let process = self.create(container, OUTPUT, change).await.unwrap();
        self.start(&process).await.unwrap();
        let reference = container_ref(&process.key);
        let end = self.finish(process).await;
        self.client
            .remove_container(ctx(), &reference)
            .await
            .unwrap();
        end
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vm.kill();
        let _ = self.vm.wait();
    }
}

fn disk(serial: &str, fs_type: &str) -> api::Disk {
    api::Disk {
        serial: serial.to_owned(),
        fs_type: fs_type.to_owned(),
        ..Default::default()
    }
}

pub(crate) fn reference(key: &ProcessKey) -> api::ProcessRef {
    api::ProcessRef {
        container_id: key.container.to_string(),
        exec_id: key
            .exec
            .as_ref()
            .map(ToString::to_string)
            .unwrap_or_default(),
        generation: key.generation.0,
        ..Default::default()
    }
}

pub(crate) fn container_ref(key: &ProcessKey) -> api::ContainerRef {
    api::ContainerRef {
        container_id: key.container.to_string(),
        ..Default::default()
    }
}

fn stdio(io: Io) -> api::Stdio {
    api::Stdio {
        terminal: io.terminal,
        stdin: io.stdin,
        stdout: true,
        stderr: !io.terminal,
        columns: if io.terminal { 80 } else { 0 },
        rows: if io.terminal { 24 } else { 0 },
        ..Default::default()
    }
}

pub(crate) fn create_request(
    key: &ProcessKey,
    io: Io,
    change: Value,
    copied_mounts: Vec<api::CopiedMount>,
) -> api::CreateContainerRequest {
    let mut spec = spec();
    merge(&mut spec, change);
    spec["process"]["terminal"] = io.terminal.into();
    api::CreateContainerRequest {
        container_id: key.container.to_string(),
        generation: key.generation.0,
        spec_json: spec.to_string().into_bytes(),
        rootfs: Some(api::create_container_request::Rootfs::Layered(
            api::LayeredRootfs {
                layers: vec![disk("layer0", "erofs")],
                ..Default::default()
            },
        )),
        stdio: Some(stdio(io)).into(),
        copied_mounts,
        volumes: vec![
            api::Volume {
                name: "cache".to_owned(),
                medium: Some(api::volume::Medium::Disk(disk("cache", "ext4"))),
                mode: 0o777,
                ..Default::default()
            },
            api::Volume {
                name: "fast".to_owned(),
                medium: Some(api::volume::Medium::MemoryBytes(1 << 20)),
                mode: 0o2770,
                gid: 7,
                ..Default::default()
            },
        ],
        sub_paths: vec![api::SubPath {
            index: 0,
            volume: "fast".to_owned(),
            path: "part/of/it".to_owned(),
            mode: 0o750,
            gid: 7,
            ..Default::default()
        }],
        ..Default::default()
    }
}

fn spec() -> Value {
    let caps = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_MKNOD",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID"
    ]);
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/", "env": ["PATH=/bin"],
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev/shm", "type": "bind", "source": "/run/coffer/shm", "options": ["rbind", "rw"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/cache", "type": "bind", "source": "/run/coffer/volume_disks/cache/content",
             "options": ["rbind", "rw"]}
        ],
        "linux": {
            "namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "cgroup"}],
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "cpu": {"shares": 512, "quota": 100000, "period": 100000},
                "memory": {"limit": 67108864, "swap": 67108864},
                "pids": {"limit": 64},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]
            },
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
                "syscalls": [{"names": ["keyctl", "bpf"], "action": "SCMP_ACT_ERRNO"}]
            }
        }
    })
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

pub(crate) fn shell(script: &str) -> Value {
    json!({"process": {"args": ["sh", "-c", script]}})
}

pub(crate) fn shell_with(script: &str, change: Value) -> Value {
    let mut value = shell(script);
    merge(&mut value, change);
    value
}

pub(crate) fn code(error: &ttrpc::Error) -> (ttrpc::Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other}"),
    }
}

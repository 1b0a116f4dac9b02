// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! A containerd for tests: directories of its own, an events server, and the calls that it makes of a shim.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, Events, TaskClient, create_events};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tokio::sync::mpsc;
use ttrpc::asynchronous::{Server, TtrpcContext};

pub(crate) const NAMESPACE: &str = "coffer-test";

/// How long anything may take before a test fails instead of hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The shim with the fake driver, an example that `cargo test -p shim` builds beside the tests (and `--test` alone does not).
pub(crate) fn program() -> PathBuf {
    let deps = std::env::current_exe().unwrap();
    let target = deps.parent().and_then(Path::parent).unwrap();
    target.join("examples/shim_with_fake_driver")
}

pub(crate) struct Containerd {
    dir: tempfile::TempDir,
}

impl Containerd {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("coffer").tempdir().unwrap();
        fs::write(dir.path().join("config.toml"), "").unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A bundle with `annotations` and cgroup path in its spec.
    pub(crate) fn bundle(
        &self,
        id: &str,
        annotations: &[(&str, &str)],
        cgroups_path: &str,
    ) -> PathBuf {
        self.write_bundle(id, annotations, cgroups_path, &["sleep"])
    }

    /// A bundle of a container without a pod, whose process is `args`.
    pub(crate) fn program_bundle(&self, id: &str, args: &[&str]) -> PathBuf {
        self.write_bundle(id, &[], "", args)
    }

    fn write_bundle(
        &self,
        id: &str,
        annotations: &[(&str, &str)],
        cgroups_path: &str,
        args: &[&str],
    ) -> PathBuf {
        let bundle = self.path("bundles").join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let namespaces: Vec<_> = ["mount", "pid", "network", "ipc", "uts"]
            .map(|kind| serde_json::json!({ "type": kind }))
            .into();
        let annotations: serde_json::Map<String, serde_json::Value> = annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).into()))
            .collect();
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "annotations": annotations,
            "process": { "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": args },
            "root": { "path": "rootfs" },
            "linux": { "namespaces": namespaces, "cgroupsPath": cgroups_path },
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    /// A bundle of a container without a pod.
    pub(crate) fn plain_bundle(&self, id: &str) -> PathBuf {
        self.bundle(id, &[], "")
    }

    fn command(&self, id: &str, bundle: &Path, flags: &[&str], verb: &str) -> Command {
        let mut command = Command::new(program());
        command
            .current_dir(bundle)
            .env("COFFER_STATE_ROOT", self.path("state"))
            .env("COFFER_SOCKET_ROOT", self.path("s"))
            .env("TTRPC_ADDRESS", self.path("containerd.sock.ttrpc"))
            .env_remove("MAX_SHIM_VERSION")
            .args(["-namespace", NAMESPACE, "-address"])
            .arg(self.path("containerd.sock"))
            .args(["-publish-binary", "/usr/bin/containerd", "-id", id])
            .args(flags)
            .arg(verb);
        command
    }

    /// `start` as containerd 1.6 to 2.2 call it, with the runtime options of their config.
    pub(crate) fn start(&self, id: &str, bundle: &Path) -> Output {
        let config = self.path("config.toml");
        run(
            self.command(id, bundle, &[], "start"),
            &options("runtimeoptions.v1.Options", config.to_str().unwrap()),
        )
    }

    /// `start`, not waited for.
    pub(crate) fn start_in_background(&self, id: &str, bundle: &Path) -> Child {
        let mut command = self.command(id, bundle, &[], "start");
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().unwrap()
    }

    /// The processes of sandbox `id`: `start` and shim, and the keeper.
    pub(crate) fn processes(&self, id: &str) -> Vec<Watched> {
        let own = [self.path("containerd.sock").into_os_string(), id.into()];
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            if own
                .iter()
                .all(|own| words.contains(&own.as_encoded_bytes()))
            {
                found.extend(Pid::from_raw(
                    entry.file_name().to_str().unwrap().parse().unwrap(),
                ));
            }
        }
        found.into_iter().map(Watched::new).collect()
    }

    /// `start` with another standard input.
    pub(crate) fn start_with(&self, id: &str, bundle: &Path, input: &[u8]) -> Output {
        run(self.command(id, bundle, &[], "start"), input)
    }

    /// `delete`.
    pub(crate) fn delete(&self, id: &str, bundle: &Path) -> Output {
        run(
            self.command(id, bundle, &["-bundle", bundle.to_str().unwrap()], "delete"),
            b"",
        )
    }

    /// The parameters that containerd 2.3 gives.
    pub(crate) fn bootstrap_params(&self, id: &str) -> BootstrapParams {
        BootstrapParams {
            instance_id: id.to_owned(),
            namespace: NAMESPACE.to_owned(),
            containerd_ttrpc_address: self
                .path("containerd.sock.ttrpc")
                .to_str()
                .unwrap()
                .to_owned(),
            containerd_grpc_address: self.path("containerd.sock").to_str().unwrap().to_owned(),
            ..BootstrapParams::default()
        }
    }

    /// The process that serves sandbox `id`, once it has recorded itself.
    pub(crate) fn shim(&self, id: &str) -> Pid {
        let path = self
            .path("state")
            .join(NAMESPACE)
            .join(id)
            .join("shim.json");
        let record = eventually("the shim's record", || fs::read(&path).ok());
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        Pid::from_raw(i32::try_from(record["pid"].as_i64().unwrap()).unwrap()).unwrap()
    }

    /// What is left of all sandboxes.
    pub(crate) fn leftovers(&self) -> Vec<PathBuf> {
        let mut left = Vec::new();
        for root in [self.path("state"), self.path("s")] {
            if let Ok(entries) = fs::read_dir(&root) {
                left.extend(entries.map(|entry| entry.unwrap().path()));
            }
        }
        left
    }

    /// containerd's events service.
    pub(crate) async fn events(&self) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (taken, events) = mpsc::unbounded_channel();
        let path = self.path("containerd.sock.ttrpc");
        // What a containerd that was stopped has left.
        let _none = fs::remove_file(&path);
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(Arc::new(EventsService { taken })));
        server.start().await.unwrap();
        (server, events)
    }
}

/// A test that fails leaves no shim behind, nor its cgroup.
impl Drop for Containerd {
    fn drop(&mut self) {
        let sandboxes = fs::read_dir(self.path("state").join(NAMESPACE))
            .into_iter()
            .flatten();
        for sandbox in sandboxes.flatten() {
            let id = sandbox.file_name().into_string().unwrap_or_default();
            let bundle = self.path("bundles").join(&id);
            if bundle.is_dir() {
                self.delete(&id, &bundle);
            }
        }
    }
}

struct EventsService {
    taken: mpsc::UnboundedSender<Envelope>,
}

#[async_trait]
impl Events for EventsService {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let _test_over = self.taken.send(request.envelope.unwrap_or_default());
        Ok(Empty::new())
    }
}

/// Runtime options that name a config file.
pub(crate) fn options(type_url: &str, config_path: &str) -> Vec<u8> {
    let mut value = vec![0x12, u8::try_from(config_path.len()).unwrap()];
    value.extend_from_slice(config_path.as_bytes());
    Any {
        type_url: type_url.to_owned(),
        value,
        ..Any::default()
    }
    .write_to_bytes()
    .unwrap()
}

/// Runs a command to its end, and to the end of its output: a child that kept it open would hang this.
fn run(mut command: Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A command that does not read its input closes it.
    let _closed = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// The shim's program with `words` as they are.
pub(crate) fn words(words: &[&str]) -> Output {
    let mut command = Command::new(program());
    command.args(words.iter().map(OsString::from));
    run(command, b"")
}

/// The address in a successful reply of `start`.
pub(crate) fn address(reply: &Output) -> String {
    assert_eq!(String::from_utf8_lossy(&reply.stderr), "");
    assert!(reply.status.success(), "{reply:?}");
    String::from_utf8(reply.stdout.clone()).unwrap()
}

/// What `start` says when it fails; nothing else may be said.
pub(crate) fn complaint(reply: &Output) -> String {
    assert_eq!(reply.status.code(), Some(1), "{reply:?}");
    assert_eq!(String::from_utf8_lossy(&reply.stdout), "");
    String::from_utf8(reply.stderr.clone()).unwrap()
}

/// A client of the Task service at `address`.
pub(crate) async fn client(address: &str) -> TaskClient {
    TaskClient::new(Client::connect(address).await.unwrap())
}

/// A hold on a process, to wait for its end.
pub(crate) struct Watched {
    pid: Pid,
    pidfd: rustix::fd::OwnedFd,
}

impl Watched {
    pub(crate) fn new(pid: Pid) -> Self {
        Self {
            pid,
            pidfd: pidfd_open(pid, PidfdFlags::empty()).unwrap(),
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    pub(crate) fn ended_within(&self, limit: Duration) -> bool {
        let timeout = Timespec::try_from(limit).unwrap();
        poll(
            &mut [PollFd::new(&self.pidfd, PollFlags::IN)],
            Some(&timeout),
        )
        .unwrap()
            == 1
    }
}

/// The first `Some` that `probe` answers.
pub(crate) fn eventually<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(std::time::Instant::now() < deadline, "{what} did not come");
        std::thread::yield_now();
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `serve`: the shim itself, which `start` has made.
//!
//! The VM's boot begins before the first call is answered, beside what containerd does next. The shim ends when its
//! sandbox has ended: by Shutdown after the last task, or by SIGTERM or SIGINT at any time. It then lets containerd have
//! the last events, and removes its socket, its cgroup and its state directory. Only SIGKILL leaves these to `delete`.

use std::error::Error;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hypervisor::{Capabilities, Driver, DriverError, RunningVm, VmSpec};
use ids::{ContainerId, SandboxId};
use pod_spec::{LogLevel, RuntimeConfig};
use rustix::fs::Mode;
use sandbox::{Boot, Host, SandboxHandle, SandboxOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::timeout;
use tracing::Level;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::args::ShimArgs;
use crate::dump::Dump;
use crate::error::{ShimError, report};
use crate::handover;
use crate::host_cgroup;
use crate::inspect_service::{InspectService, Operator, RecordingSink};
use crate::keeper::Hold;
use crate::log;
use crate::pod_source::PodSource;
use crate::process::{self, ProcessIdentity};
use crate::publisher::{Patience, Publisher};
use crate::run::{Roots, bundle};
use crate::sandbox_service::SandboxService;
use crate::socket::remove_socket;
use crate::start::{TTRPC_ADDRESS, read_bundle, read_config};
use crate::state_dir::StateDir;
use crate::task_service::TaskService;
use crate::telemetry::Telemetry;
use crate::traffic::PodTraffic;

/// How long a sandbox may stand without its first container. containerd creates it as soon as `start` has answered.
const FIRST_TASK_LIMIT: Duration = Duration::from_secs(30);

/// How long the last answers may take to reach containerd, on a node whose processors are busy. Nothing is asked of the VM
/// any more, so it is reached only if something is stuck. A `delete` that comes meanwhile ends the shim after 2 s.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How long the last events may take to reach containerd.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// A shim waits for most of its life; blocking work is a file here and a program there.
const MAX_BLOCKING_THREADS: usize = 8;

/// How long a thread without work stays, with its stack.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(1);

/// What a sandbox is to be made for.
#[derive(Debug)]
pub struct PodRequest<'a> {
    /// The sandbox.
    pub id: &'a SandboxId,
    /// Where it is described.
    pub source: &'a PodSource,
    /// The node's config.
    pub config: &'a RuntimeConfig,
    /// A directory for root alone, which is removed with the sandbox.
    pub private_dir: &'a Path,
}

/// The node: what a program that runs shims has chosen. Only `main` names drivers.
pub trait Node {
    /// The parts of a sandbox. Called once, inside the runtime.
    ///
    /// # Errors
    /// Whatever keeps every pod from running; what concerns this pod alone is for [`Host::plan_pod`] to say.
    fn prepare(&self, pod: &PodRequest<'_>) -> Result<PodParts, Box<dyn Error + Send + Sync>>;
}

/// The parts of a sandbox.
pub struct PodParts {
    /// The VMM.
    pub driver: Arc<dyn Driver>,
    /// What VM and containers are made of.
    pub host: Arc<dyn Host>,
    /// How long to wait for the guest.
    pub deadlines: sandbox::Deadlines,
}

/// Serves until the sandbox has ended.
pub(crate) fn serve(args: &ShimArgs, roots: &Roots, node: &dyn Node) -> Result<(), ShimError> {
    let (listener, hold) = handover::take()?;
    let bundle = bundle(args)?;
    let state = StateDir::of(&roots.state, &args.namespace, &SandboxId::from(&args.id));
    let config = read_config(args.config.as_deref());
    let operator = Operator::default();
    let level = match &config {
        _ if args.debug => Level::DEBUG,
        Ok(config) => level(config.log.level),
        Err(_) => Level::INFO,
    };
    let telemetry = match &config {
        Ok(config) => telemetry(config, args),
        Err(_) => Ok(None),
    };
    let spans = telemetry.as_ref().ok().and_then(Option::as_ref);
    log::init(
        bundle.join("log"),
        level,
        &[
            ("runtime", crate::info::RUNTIME),
            ("namespace", args.namespace.as_str()),
            ("sandbox_id", args.id.as_str()),
        ],
        Arc::clone(&operator.log),
        spans.map(Telemetry::layer),
    );
    let telemetry = telemetry.unwrap_or_else(|error| {
        tracing::warn!(error = &error as &dyn Error, "there are no spans");
        None
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        .build()
        .map_err(|error| ShimError::Server(error.into()))?;
    let served = config.and_then(|config| {
        let shim = Shim {
            args,
            bundle,
            state,
            config,
            operator,
            telemetry: telemetry.clone(),
        };
        runtime.block_on(shim.run(listener, hold, node))
    });
    if let Err(error) = &served {
        tracing::error!(error = error as &dyn Error, "the shim ends");
    }
    if let Some(telemetry) = telemetry {
        telemetry.end();
    }
    served
}

fn telemetry(config: &RuntimeConfig, args: &ShimArgs) -> io::Result<Option<Arc<Telemetry>>> {
    let endpoint = config.telemetry.otlp_endpoint.clone();
    let (namespace, sandbox) = (args.namespace.as_str(), args.id.as_str());
    endpoint
        .map(|endpoint| Telemetry::start(endpoint, namespace, sandbox))
        .transpose()
}

fn level(level: LogLevel) -> Level {
    match level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
    }
}

/// Lets go of containerd: a session of its own, private files, and a record by which `delete` finds this process. Without
/// a state directory `delete` has been here already.
fn detach(state: &StateDir) -> Result<(), ShimError> {
    rustix::process::setsid().map_err(|error| ShimError::Spawn(error.into()))?;
    if let Err(error) = process::hide_from_oom_killer() {
        // A containerd without CAP_SYS_RESOURCE: true of every pod of the node, and no harm to any.
        tracing::debug!(
            error = &error as &dyn Error,
            "the OOM killer does not spare the shim"
        );
    }
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let recorded = ProcessIdentity::current().and_then(|process| state.record_shim(process));
    recorded.map_err(ShimError::file("write to", state.path()))
}

struct Shim<'a> {
    args: &'a ShimArgs,
    bundle: PathBuf,
    state: StateDir,
    config: RuntimeConfig,
    operator: Operator,
    telemetry: Option<Arc<Telemetry>>,
}

impl Shim<'_> {
    async fn run(
        self,
        listener: UnixListener,
        hold: Hold,
        node: &dyn Node,
    ) -> Result<(), ShimError> {
        let signals = Signals::new().map_err(server_error)?;
        detach(&self.state)?;
        let id = SandboxId::from(&self.args.id);
        let address = std::env::var(TTRPC_ADDRESS)
            .ok()
            .filter(|address| !address.is_empty())
            .unwrap_or_else(|| format!("{}.ttrpc", self.args.address));
        let publisher =
            Publisher::spawn(self.args.namespace.clone(), &address, Patience::default());
        // A bundle that cannot be read fails the create, which says so.
        let annotations = read_bundle(&self.bundle).ok().flatten();
        let annotations = annotations.map(|bundle| bundle.annotations());
        let source = pod_source(self.bundle);
        let boot = match &source {
            PodSource::Bundle(_) => Boot::AtOnce,
            PodSource::Described(_) => Boot::WhenAsked,
        };
        let unspoken = match &source {
            PodSource::Bundle(_) => None,
            PodSource::Described(_) => Some(ContainerId::from(&id)),
        };
        let parts = node
            .prepare(&PodRequest {
                id: &id,
                source: &source,
                config: &self.config,
                private_dir: self.state.path(),
            })
            .map_err(ShimError::Node)?;
        let sandbox = sandbox::spawn(SandboxOptions {
            id: id.clone(),
            driver: Arc::new(RecordingDriver {
                driver: parts.driver,
                state: self.state.clone(),
            }),
            host: parts.host,
            events: Arc::new(RecordingSink {
                sink: Arc::new(publisher.clone()),
                operator: self.operator.clone(),
                unspoken,
            }),
            deadlines: parts.deadlines,
            file_server: self.config.file_server.path.clone(),
            boot,
        });
        let traffic = PodTraffic::new(self.config.limits, annotations.unwrap_or_default());
        let dump = Arc::new(Dump {
            sandbox: sandbox.clone(),
            publisher: publisher.clone(),
            log: Arc::clone(&self.operator.log),
            telemetry: self.telemetry,
            config_file: self.args.config.clone(),
        });
        let hold = Arc::new(hold);
        let mut server = Server::new()
            .add_listener(Listener::try_from(listener).map_err(server_error)?)
            .register_service(
                TaskService::new(
                    sandbox.clone(),
                    Arc::clone(&self.operator.shells),
                    traffic,
                    Arc::clone(&hold),
                )
                .services(),
            )
            .register_service(SandboxService::services(
                sandbox.clone(),
                id,
                source,
                self.state.clone(),
                hold,
            ))
            .register_service(InspectService::services(
                sandbox.clone(),
                self.operator,
                Arc::clone(&dump),
            ));
        server
            .start()
            .await
            .map_err(|error| ShimError::Server(error.into()))?;
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "serving");

        tokio::spawn(end_if_unused(sandbox.clone()));
        signals.or_end_of(&sandbox, &dump).await;

        // Calls are answered when the sandbox has ended; what is answered is written before the server has stopped.
        if timeout(ANSWER_LIMIT, server.shutdown()).await.is_err() {
            tracing::warn!("the last answers did not reach containerd");
        }
        if timeout(FLUSH_LIMIT, publisher.flushed()).await.is_err() {
            tracing::warn!("the last events did not reach containerd");
        }
        if let Err(error) = clean_up(&self.state) {
            // containerd calls `delete` next.
            tracing::warn!(error = report(&error), "something is left to delete");
        }
        tracing::info!("the sandbox has ended");
        Ok(())
    }
}

/// Where the pod is described: a bundle without a container is a sandbox's, which CreateSandbox describes. One that cannot
/// be read is reported when it is needed.
fn pod_source(bundle: PathBuf) -> PodSource {
    match read_bundle(&bundle) {
        Ok(None) => PodSource::Described(Arc::default()),
        Ok(Some(spec)) if !spec.has_process() => PodSource::Described(Arc::default()),
        _ => PodSource::Bundle(bundle),
    }
}

/// Removes what the sandbox has on the host beside its processes, unless `delete` is about it.
fn clean_up(state: &StateDir) -> Result<(), ShimError> {
    let taken = state.take_if_free();
    let Some(left) = taken.map_err(ShimError::file("take away", state.path()))? else {
        return Ok(());
    };
    if let Some(socket) = &left.socket {
        remove_socket(socket).map_err(ShimError::file("remove", socket))?;
    }
    host_cgroup::leave(&left.cgroups)?;
    host_cgroup::remove(&left.cgroups)?;
    let removed = left.remove();
    removed.map_err(ShimError::file("remove", left.path()))
}

/// Ends a sandbox for which no container has come: a containerd that dies between starting a shim and its first call
/// forgets the shim.
async fn end_if_unused(sandbox: SandboxHandle) {
    tokio::time::sleep(FIRST_TASK_LIMIT).await;
    if sandbox.shutdown().await.is_ok() {
        tracing::warn!("no container has come: the sandbox ends");
    }
}

fn server_error(error: io::Error) -> ShimError {
    ShimError::Server(error.into())
}

/// The signals that a shim answers to: SIGTERM and SIGINT end it, SIGUSR1 has it log what it knows. From when this is
/// made they no longer kill it.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    dump: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            dump: signal(SignalKind::user_defined1())?,
        })
    }

    /// Answers when the sandbox has ended, and ends it if a signal asks for that.
    async fn or_end_of(mut self, sandbox: &SandboxHandle, dump: &Arc<Dump>) {
        loop {
            tokio::select! {
                () = sandbox.ended() => return,
                _ = self.terminate.recv() => break,
                _ = self.interrupt.recv() => break,
                _ = self.dump.recv() => {
                    let dump = Arc::clone(dump);
                    drop(tokio::spawn(async move { dump.log().await }));
                }
            }
        }
        tracing::info!("a signal ends the sandbox");
        sandbox.terminate().await;
    }
}

/// Records each VMM that the driver starts, so that `delete` can wait for its end. It is a child of this process.
struct RecordingDriver {
    driver: Arc<dyn Driver>,
    state: StateDir,
}

#[async_trait]
impl Driver for RecordingDriver {
    fn capabilities(&self) -> Capabilities {
        self.driver.capabilities()
    }

    async fn launch(&self, spec: VmSpec) -> Result<Arc<dyn RunningVm>, DriverError> {
        let vm = self.driver.launch(spec).await?;
        let recorded = i32::try_from(vm.processes().vmm)
            .map_err(io::Error::other)
            .and_then(ProcessIdentity::of_child)
            .and_then(|process| self.state.record_vmm(process));
        if let Err(error) = recorded {
            // The VMM dies with the shim all the same.
            tracing::warn!(
                error = &error as &dyn Error,
                "the VMM's process cannot be recorded"
            );
        }
        Ok(vm)
    }
}

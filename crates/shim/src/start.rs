// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `start`: finds the shim that serves a container's sandbox, or makes it, and says where it listens.
//!
//! ```text
//! standard input ─> form of the reply
//! config.json ───> sandbox ─> socket ─ somebody listens ─> reply
//!                                └ nobody: keeper, `serve`, state directory, socket, cgroup, hand-over ─> reply
//! ```
//!
//! No runtime, no threads: containerd waits for this. Whatever can be known to go wrong is found here, because its text is
//! what the user sees. On failure nothing is left: the keeper removes it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use ids::SandboxId;
use pod_spec::{Bundle, ConfigEntry, MAX_SPEC_BYTES, RuntimeConfig};
use rustix::process::Pid;

use crate::args::ShimArgs;
use crate::bootstrap::Request;
use crate::delete;
use crate::error::ShimError;
use crate::handover;
use crate::host_cgroup;
use crate::info::PROGRAM;
use crate::keeper::{Hold, Keeper};
use crate::process::ProcessIdentity;
use crate::run::{Roots, bundle};
use crate::socket::{is_served, listen, socket_address, socket_path};
use crate::state_dir::{StateDir, StateLock, write_whole};

/// Where containerd's events go (containerd 1.6 and later).
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// How high a version of the Task API containerd speaks (containerd 1.7 and later).
const MAX_SHIM_VERSION: &str = "MAX_SHIM_VERSION";

/// A shim has few threads and small buffers: one heap serves them all (mallopt(3)).
const MALLOC: (&str, &str) = ("MALLOC_ARENA_MAX", "1");

/// The longest config file, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Makes sure that somebody serves the container, and answers what containerd wants to read.
pub(crate) fn start(args: &ShimArgs, roots: &Roots, input: &[u8]) -> Result<Vec<u8>, ShimError> {
    let request = Request::decode(input, args.id.as_str(), args.namespace.as_str())?;
    let bundle_dir = bundle(args)?;
    let bundle = read_bundle(&bundle_dir)?;
    let own = SandboxId::from(&args.id);
    let sandbox = match &bundle {
        Some(bundle) => bundle
            .sandbox(&args.id)
            .map_err(bundle_error(&bundle_dir))?,
        // A sandbox that containerd's sandbox controller starts has no container of its own.
        None => own.clone(),
    };
    let state = StateDir::of(&roots.state, &args.namespace, &sandbox);
    let socket = if sandbox == own {
        let config = request
            .config_path()?
            .map(PathBuf::from)
            .or_else(|| args.config.clone());
        read_config(config.as_deref())?;
        let leader = Leader {
            args,
            request: &request,
            config: config.as_deref(),
            bundle_dir: &bundle_dir,
            state,
        };
        let socket = leader.start(roots, bundle.as_ref())?;
        // Beside the new shim's own work.
        delete::sweep(roots, &args.namespace);
        socket
    } else {
        served(&state)?.ok_or(ShimError::NoSandbox(sandbox))?
    };
    let address = socket_address(&socket);
    // containerd 1.x finds the shim by this file after a restart of its own.
    let file = bundle_dir.join("address");
    write_whole(&file, address.as_bytes()).map_err(ShimError::file("write", &file))?;
    let max_version = std::env::var(MAX_SHIM_VERSION).ok();
    request
        .reply(&address, max_version.as_deref())
        .map_err(|error| ShimError::Output(error.into()))
}

/// The socket that a sandbox's shim has recorded, if it still listens there. It is asked for rather than worked out anew,
/// so that a containerd that gives its address in another form still finds its pods.
fn served(state: &StateDir) -> Result<Option<PathBuf>, ShimError> {
    let recorded = state
        .socket()
        .map_err(ShimError::file("read", state.path()))?;
    let Some(socket) = recorded else {
        return Ok(None);
    };
    let served = is_served(&socket).map_err(ShimError::file("connect to", &socket))?;
    Ok(served.then_some(socket))
}

/// The `start` of a container that leads its sandbox.
struct Leader<'a> {
    args: &'a ShimArgs,
    request: &'a Request,
    config: Option<&'a Path>,
    bundle_dir: &'a Path,
    state: StateDir,
}

impl Leader<'_> {
    fn start(&self, roots: &Roots, bundle: Option<&Bundle>) -> Result<PathBuf, ShimError> {
        let sandbox = SandboxId::from(&self.args.id);
        let dir = self.request.socket_dir().map(Path::new);
        let grpc_address = self.request.grpc_address().unwrap_or(&self.args.address);
        let socket = socket_path(
            dir.unwrap_or(&roots.sockets),
            grpc_address,
            &self.args.namespace,
            &sandbox,
        );
        if served(&self.state)?.is_some_and(|other| other != socket) {
            return Err(ShimError::OtherContainerd(sandbox));
        }
        let start = ProcessIdentity::current().map_err(ShimError::Spawn)?;
        let keeper = Keeper::fork(&self.state, start).map_err(ShimError::Spawn)?;
        let mut shim = self.spawn()?;
        let made = self.make(&mut shim, &socket, bundle, start, keeper.hold());
        if !matches!(made, Ok(Made::Shim)) {
            // Before anything is removed, so that it makes nothing meanwhile.
            shim.end();
            keeper.clean_up();
        }
        made.map(|_| socket)
    }

    /// Makes what the shim needs and hands it over, unless another shim listens already.
    fn make(
        &self,
        shim: &mut NewShim,
        socket: &Path,
        bundle: Option<&Bundle>,
        start: ProcessIdentity,
        hold: &Hold,
    ) -> Result<Made, ShimError> {
        let Some(listener) = self.listen(socket, bundle, start)? else {
            return Ok(Made::Nothing);
        };
        let cgroups_path = bundle
            .and_then(Bundle::cgroups_path)
            .filter(|path| !path.as_os_str().is_empty());
        if let Some(path) = cgroups_path {
            let cgroups = host_cgroup::plan(&path.to_string_lossy())?;
            host_cgroup::enter_all(&cgroups, shim.pid(), &self.state)?;
        }
        handover::give(&shim.end, &listener, hold).map_err(ShimError::Spawn)?;
        Ok(Made::Shim)
    }

    /// Makes state directory and socket, in one step for every other `start`. `None` if somebody listens there.
    fn listen(
        &self,
        socket: &Path,
        bundle: Option<&Bundle>,
        start: ProcessIdentity,
    ) -> Result<Option<UnixListener>, ShimError> {
        loop {
            let lock = self
                .state
                .lock()
                .map_err(ShimError::file("lock", self.state.path()))?;
            if is_served(socket).map_err(ShimError::file("connect to", socket))? {
                return Ok(None);
            }
            if !self.state.is_left() {
                // What is recorded is removed, so it is recorded first.
                self.record(&lock, socket, bundle, start)
                    .map_err(ShimError::file("make", self.state.path()))?;
                let listener = listen(socket).map_err(ShimError::file("listen on", socket))?;
                return Ok(Some(listener));
            }
            drop(lock);
            // Of a shim with the same id that was killed.
            let left = self.state.take();
            if let Some(left) = left.map_err(ShimError::file("take away", self.state.path()))? {
                delete::remove_sandbox(&left)?;
            }
        }
    }

    fn record(
        &self,
        lock: &StateLock,
        socket: &Path,
        bundle: Option<&Bundle>,
        start: ProcessIdentity,
    ) -> io::Result<()> {
        self.state.create(lock, start)?;
        self.state
            .record_bundle(&std::path::absolute(self.bundle_dir)?)?;
        if let Some(network) = bundle.and_then(Bundle::network_namespace) {
            self.state.record_network(network)?;
        }
        self.state.record_socket(socket)
    }

    /// Runs this program as the shim, which waits for its socket. Nothing of ours stays open in it.
    fn spawn(&self) -> Result<NewShim, ShimError> {
        let (end, shims_end) = handover::pair().map_err(ShimError::Spawn)?;
        // By its path, which gives the process its name.
        let program = std::env::current_exe().map_err(ShimError::Spawn)?;
        let mut command = Command::new(program);
        command
            .arg0(PROGRAM)
            .current_dir(self.bundle_dir)
            .env(MALLOC.0, MALLOC.1);
        command.args([
            "-namespace",
            self.args.namespace.as_str(),
            "-id",
            self.args.id.as_str(),
        ]);
        command
            .arg("-address")
            .arg(&self.args.address)
            .arg("-bundle")
            .arg(self.bundle_dir);
        if let Some(config) = self.config {
            command.arg("-config").arg(config);
        }
        if self.args.debug || self.request.debug() {
            command.arg("-debug");
        }
        if let Some(address) = self.request.ttrpc_address() {
            command.env(TTRPC_ADDRESS, address);
        }
        command.arg("serve");
        command
            .stdin(shims_end)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = command.spawn().map_err(ShimError::Spawn)?;
        Ok(NewShim { process, end })
    }
}

/// What a `start` has come to.
enum Made {
    /// The new shim listens.
    Shim,
    /// Another one does.
    Nothing,
}

/// A shim that waits for its socket.
struct NewShim {
    process: Child,
    end: OwnedFd,
}

impl NewShim {
    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    /// Ends it before it has done anything.
    fn end(&mut self) {
        // It may have ended by itself.
        let _gone = self.process.kill().and_then(|()| self.process.wait());
    }
}

/// The node's config. That the usual file is not there is no error; that a named one is not there is.
pub(crate) fn read_config(path: Option<&Path>) -> Result<RuntimeConfig, ShimError> {
    let (path, text) = config_text(path)?;
    RuntimeConfig::parse(&text.unwrap_or_default()).map_err(config_error(path))
}

/// Each key of the node's config, and the file that they were read from, if there is one.
pub(crate) fn config_entries(
    path: Option<&Path>,
) -> Result<(Vec<ConfigEntry>, Option<&Path>), ShimError> {
    let (path, text) = config_text(path)?;
    let file = text.as_ref().map(|_| path);
    let entries = RuntimeConfig::entries(&text.unwrap_or_default()).map_err(config_error(path))?;
    Ok((entries, file))
}

fn config_text(path: Option<&Path>) -> Result<(&Path, Option<String>), ShimError> {
    let usual = Path::new(RuntimeConfig::DEFAULT_PATH);
    let named = path.is_some();
    let path = path.unwrap_or(usual);
    match read_limited(path, MAX_CONFIG_BYTES) {
        Ok(bytes) => {
            let text = String::from_utf8(bytes).map_err(config_error(path))?;
            Ok((path, Some(text)))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound && !named => Ok((path, None)),
        Err(error) => Err(config_error(path)(error)),
    }
}

fn config_error<E: std::error::Error + Send + Sync + 'static>(
    path: &Path,
) -> impl FnOnce(E) -> ShimError {
    let path = path.to_path_buf();
    move |error| ShimError::Config {
        path,
        source: Box::new(error),
    }
}

/// The bundle's spec, or `None` if it has none.
pub(crate) fn read_bundle(dir: &Path) -> Result<Option<Bundle>, ShimError> {
    // One byte more than is allowed, so that the parser sees that there is more.
    let limit = u64::try_from(MAX_SPEC_BYTES)
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    let json = match read_limited(&dir.join("config.json"), limit) {
        Ok(json) => json,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(bundle_error(dir)(error)),
    };
    Bundle::parse(&json).map(Some).map_err(bundle_error(dir))
}

fn bundle_error<E: std::error::Error + Send + Sync + 'static>(
    dir: &Path,
) -> impl FnOnce(E) -> ShimError {
    let path = dir.to_path_buf();
    move |error| ShimError::Bundle {
        path,
        source: Box::new(error),
    }
}

fn read_limited(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::report;

    #[test]
    fn config_that_is_not_there_is_an_error_only_if_it_was_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coffer.toml");
        let error = report(&read_config(Some(&path)).unwrap_err());
        assert!(
            error.starts_with(&format!("config file {}: ", path.display())),
            "{error}"
        );
        std::fs::write(&path, "[guest]\ndefault_vcpu = 2").unwrap();
        let error = report(&read_config(Some(&path)).unwrap_err());
        assert!(
            error.ends_with("did you mean guest.default_vcpus?"),
            "{error}"
        );
        std::fs::write(&path, "[guest]\ndefault_vcpus = 2").unwrap();
        assert_eq!(
            read_config(Some(&path)).unwrap().guest.default_vcpus.get(),
            2
        );
        let (entries, file) = config_entries(Some(&path)).unwrap();
        assert_eq!(file, Some(path.as_path()));
        let vcpus = entries
            .iter()
            .find(|entry| entry.key == "guest.default_vcpus");
        assert_eq!(vcpus.unwrap().origin, pod_spec::ConfigOrigin::File);
    }

    #[test]
    fn bundle_without_spec_is_a_sandbox_and_one_with_a_bad_spec_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read_bundle(dir.path()).unwrap().is_none());
        std::fs::write(dir.path().join("config.json"), "not json").unwrap();
        let error = report(&read_bundle(dir.path()).unwrap_err());
        assert!(
            error.contains("config.json is no OCI runtime spec"),
            "{error}"
        );
    }
}

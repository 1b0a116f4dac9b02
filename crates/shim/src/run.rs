// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! From the command line to an exit code.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::args::{Invocation, ShimArgs, parse};
use crate::bootstrap::MAX_INPUT_BYTES;
use crate::delete;
use crate::error::{ShimError, report};
use crate::info;
use crate::serve::{self, Node};
use crate::start::{self, config_entries};

/// The exit code for a command line that cannot be understood.
const USAGE: u8 = 2;

/// Where a shim keeps what is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// One directory per sandbox, for `delete`.
    pub state: PathBuf,
    /// The shims' sockets, unless containerd says otherwise.
    pub sockets: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            state: PathBuf::from(shim_api::STATE_ROOT),
            sockets: PathBuf::from("/run/containerd/s"),
        }
    }
}

/// Does what the command line `words`, without the program's name, asks for.
///
/// containerd reads standard output and standard error of `start` as one text, so nothing goes to standard error unless
/// the verb failed; what then stands there is what the user sees.
pub fn run(words: impl IntoIterator<Item = String>, roots: &Roots, node: &dyn Node) -> ExitCode {
    let invocation = match parse(words) {
        Ok(invocation) => invocation,
        Err(error) => {
            complain(&report(&error));
            return ExitCode::from(USAGE);
        }
    };
    let done = match &invocation {
        Invocation::Version => output(info::version().as_bytes()),
        Invocation::Info => describe(),
        Invocation::PrintConfig(file) => print_config(file.as_deref()),
        Invocation::Start(args) => start(args, roots),
        Invocation::Delete(args) => delete::delete(args, roots).and_then(|reply| output(&reply)),
        Invocation::Serve(args) => serve::serve(args, roots, node),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&report(&error));
            ExitCode::FAILURE
        }
    }
}

fn describe() -> Result<(), ShimError> {
    // The options say nothing that changes the answer; they are read so that containerd's write does not fail.
    input()?;
    let info = info::runtime_info().map_err(|error| ShimError::Output(error.into()))?;
    output(&info)
}

fn print_config(file: Option<&Path>) -> Result<(), ShimError> {
    let (entries, found) = config_entries(file)?;
    let file = found.map(|file| file.display().to_string());
    output(pod_spec::print_config(&entries, file.as_deref()).as_bytes())
}

fn start(args: &ShimArgs, roots: &Roots) -> Result<(), ShimError> {
    output(&start::start(args, roots, &input()?)?)
}

fn input() -> Result<Vec<u8>, ShimError> {
    let mut bytes = Vec::new();
    let mut stdin = io::stdin().lock().take(MAX_INPUT_BYTES);
    stdin.read_to_end(&mut bytes).map_err(ShimError::Input)?;
    Ok(bytes)
}

fn output(bytes: &[u8]) -> Result<(), ShimError> {
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(ShimError::Output)
}

fn complain(text: &str) {
    // With nobody to read it there is nobody to tell.
    let _unread = writeln!(io::stderr(), "{}: {text}", info::PROGRAM);
}

/// The bundle that a verb is about: what `-bundle` says, or the current directory.
pub(crate) fn bundle(args: &ShimArgs) -> Result<PathBuf, ShimError> {
    match &args.bundle {
        Some(bundle) => Ok(bundle.clone()),
        None => std::env::current_dir().map_err(ShimError::file(
            "find the current directory",
            Path::new("."),
        )),
    }
}

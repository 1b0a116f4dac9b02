// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! The command line. Completions and man pages are made from it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::output::Output;

/// The command line of `cofferctl`.
#[derive(Parser)]
#[command(
    name = "cofferctl",
    version,
    about = "The operator's tool for a Coffer node",
    after_help = "Exit codes: 0 all is well, 1 something failed or a check did, 2 the command line is wrong; of exec that of the program."
)]
pub(crate) struct Arguments {
    /// The node's config file; it need not exist if it is the default one
    #[arg(long, global = true, default_value = pod_spec::RuntimeConfig::DEFAULT_PATH)]
    pub(crate) config: PathBuf,
    /// Where the sandboxes of the node have their directories
    #[arg(long, global = true, default_value = shim_api::STATE_ROOT)]
    pub(crate) state_dir: PathBuf,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What to do.
#[derive(Subcommand)]
pub(crate) enum Verb {
    /// Checks everything that a node needs to run pods, and says for each failure what to do
    Check {
        /// How to print the result
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Prints the node's config as it is in effect, and where each value is from
    Config {
        /// The defaults, whatever the config file says
        #[arg(long)]
        default: bool,
        /// How to print it; a table is a config file in turn
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Lists the sandboxes of this node
    List {
        /// Only those of this namespace of containerd
        #[arg(short, long)]
        namespace: Option<String>,
        /// How to print them
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Shows a sandbox from inside: its processes, and as JSON or YAML also streams, pending calls, queues and connections
    Inspect {
        #[command(flatten)]
        target: Target,
        /// How to print it
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Prints the last that a guest wrote to its console, at most 64 KiB
    Console {
        #[command(flatten)]
        target: Target,
        /// Go on with what it writes until the sandbox ends
        #[arg(short, long)]
        follow: bool,
    },
    /// Prints the last lines that a sandbox's shim has logged
    Logs {
        #[command(flatten)]
        target: Target,
        /// Go on with new lines until the sandbox ends
        #[arg(short, long)]
        follow: bool,
    },
    /// Prints the last task events that a sandbox's shim has told containerd
    Events {
        #[command(flatten)]
        target: Target,
        /// Go on with new events until the sandbox ends
        #[arg(short, long)]
        follow: bool,
        /// How to print them; JSON is one object per line
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Shows what containers use: in the guest, and for a pod's sandbox container what the whole pod uses on the host
    Stats {
        /// Only those of this sandbox; the beginning of its id is enough
        sandbox: Option<String>,
        /// Only those of this namespace of containerd
        #[arg(short, long)]
        namespace: Option<String>,
        /// How to print them
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Runs a debugging shell in a guest, with the guest's own processes, network and files; the node's config must allow it
    Exec {
        #[command(flatten)]
        target: Target,
        /// The program, of those below debug.rootfs, and its arguments
        #[arg(
            trailing_var_arg = true,
            allow_hyphen_values = true,
            default_value = "/bin/sh"
        )]
        command: Vec<String>,
    },
    /// Prints a shell's completions for cofferctl
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Writes cofferctl's man pages
    Man {
        /// Into this directory, which must exist
        dir: PathBuf,
    },
}

/// A sandbox on the command line.
#[derive(Args)]
pub(crate) struct Target {
    /// The sandbox's id, or the beginning of it
    pub(crate) sandbox: String,
    /// The namespace of containerd that it is in; needed only if two have such a sandbox
    #[arg(short, long)]
    pub(crate) namespace: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}

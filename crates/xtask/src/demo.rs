// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `cargo xtask demo`: from a fresh machine to a container in a microVM, with the time of every phase.

use std::io;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::node::{Job, Machine, Place, Work};
use crate::step::{seconds, section};
use crate::{build, images, workspace};

/// What the demonstration's container is told to end with.
const EXIT_CODE: i32 = 7;
/// The longest time from a running containerd to the end of the demonstration.
const LIMIT: Duration = Duration::from_secs(180);

const SCRIPT: &str = include_str!("../../../ci/node/demo");

/// Runs the verb.
///
/// # Errors
/// When something does not build, the node does not start, or the container does not do what it was told.
pub(crate) fn run() -> Result<ExitCode> {
    let begin = Instant::now();
    build::run()?;
    build::images(&[images::small()?])?;
    let place = Place::choose()?;
    let folder = workspace::target().join("coffer/demo");
    let job = Job {
        work: Work::Script(SCRIPT),
        folder: &folder,
        dist: &workspace::dist(),
        source: &workspace::root(),
        images: &[("default", images::SMALL)],
        machine: Machine {
            limit: Some(LIMIT),
            ..Machine::default()
        },
    };
    let code = section("node, containerd and container", || {
        place.run(&job, &mut io::stdout(), &mut io::stderr())
    })?;
    if code != EXIT_CODE {
        bail!(
            "the container ended with {code}, not with {EXIT_CODE}; the logs are in {}",
            folder.display()
        );
    }
    println!("done in {}", seconds(begin.elapsed()));
    Ok(ExitCode::SUCCESS)
}

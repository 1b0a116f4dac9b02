// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Measures a file server: from its start until it is ready with one directory, and its memory then.
//!
//! `cargo run --release --example start -p file_server -- <coffer-virtiofsd> <folder>`, as root.

use std::error::Error;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Instant;

use file_server::{Access, FileServer, Propagation, Share, ShareName};

/// Starts to measure.
const RUNS: usize = 30;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(program), Some(folder)) = (arguments.next(), arguments.next()) else {
        return Err("give the program and a folder to share".into());
    };
    let mut times = Vec::new();
    let mut memory = String::new();
    for _ in 0..RUNS {
        let share = Share {
            name: ShareName::new("data")?,
            source: OwnedFd::from(File::open(&folder)?),
            access: Access::ReadWrite,
            propagation: Propagation::Private,
        };
        let start = Instant::now();
        let (server, _connection) = FileServer::spawn(Path::new(&program), &[share]).await?;
        times.push(start.elapsed());
        memory = fs::read_to_string(format!("/proc/{}/smaps_rollup", server.pid()))?;
        server.kill().await;
    }
    times.sort();
    println!(
        "start: median {:?}, least {:?}",
        times.get(RUNS / 2),
        times.first()
    );
    for line in memory
        .lines()
        .filter(|line| line.starts_with("Rss") || line.starts_with("Pss:"))
    {
        println!("{line}");
    }
    Ok(())
}

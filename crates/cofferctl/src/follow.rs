// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! `logs`, `events` and `console`: what a shim or a VMM keeps, and what comes.

use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::node::Sandbox;
use crate::output::{self, Output};
use crate::shim::{Lines, Shim};

/// Prints what there is, each line by `show`, and, if `follow`, what comes until the sandbox ends.
pub(crate) async fn run(
    sandbox: &Sandbox,
    of: Lines,
    follow: bool,
    show: impl Fn(&str) -> Result<String>,
) -> Result<()> {
    let shim = Shim::connect(sandbox).await?;
    let mut from = 0;
    loop {
        let wait = follow && from > 0;
        let response = match shim.lines(of, from, wait).await {
            Ok(response) => response,
            // A sandbox that has ended answers no more.
            Err(_) if wait => return Ok(()),
            Err(error) => return Err(error),
        };
        let count = u64::try_from(response.lines.len()).unwrap_or(u64::MAX);
        let lost = response.next.saturating_sub(count).saturating_sub(from);
        if lost > 0 {
            eprintln!("({lost} older lines are not kept)");
        }
        let mut text = String::new();
        for line in &response.lines {
            text.push_str(&show(line)?);
        }
        if !output::print(&text)? || !follow {
            return Ok(());
        }
        from = response.next.max(from);
    }
}

/// How often a console that is followed is looked at.
const CONSOLE_PERIOD: Duration = Duration::from_millis(250);

/// Prints what a guest has printed on its console, as far as it is kept, and, if `follow`, what it prints until the sandbox
/// ends.
pub(crate) async fn console(sandbox: &Sandbox, follow: bool) -> Result<()> {
    let shim = Shim::connect(sandbox).await?;
    let mut from = 0;
    let mut first = true;
    loop {
        let part = match shim.console(from).await {
            Ok(part) => part,
            // A sandbox that has ended answers no more.
            Err(_) if follow && !first => return Ok(()),
            Err(error) => return Err(error),
        };
        // A VM that has ended has its last bytes numbered anew: they have been seen.
        if part.next < from {
            return Ok(());
        }
        let lost = part.from.saturating_sub(from);
        if lost > 0 {
            eprintln!("({lost} older bytes are not kept)");
        }
        if !output::print(&part.text)? {
            return Ok(());
        }
        let done = part.next == from;
        from = part.next;
        first = false;
        match (done, follow) {
            (false, _) => {}
            (true, false) => return Ok(()),
            (true, true) => tokio::time::sleep(CONSOLE_PERIOD).await,
        }
    }
}

/// An event as its shim tells it.
#[derive(Debug, Deserialize)]
struct Event {
    timestamp: String,
    topic: String,
    container_id: String,
    exec_id: Option<String>,
    pid: Option<u32>,
    exit_status: Option<u32>,
}

/// An event, from the JSON object that it is.
pub(crate) fn event(line: &str, output: Output) -> Result<String> {
    let value: Value = serde_json::from_str(line).context("an event that is not JSON")?;
    match output {
        Output::Json => Ok(format!("{value}\n")),
        // One list, however many items follow.
        Output::Yaml => Ok(output::yaml(&Value::Array(vec![value]))),
        Output::Table => {
            let event: Event = serde_json::from_value(value)
                .context("an event of another form: cofferctl and shim are of one release")?;
            let mut text = format!(
                "{:<27}  {:<20}  {}",
                event.timestamp, event.topic, event.container_id
            );
            for (name, value) in [
                ("exec", event.exec_id),
                ("pid", event.pid.map(|pid| pid.to_string())),
                ("exit", event.exit_status.map(|status| status.to_string())),
            ] {
                if let Some(value) = value {
                    text.push_str(&format!(" {name}={value}"));
                }
            }
            Ok(text + "\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: &str = r#"{"timestamp":"2026-01-02T03:04:05.678901Z","topic":"/tasks/exit","container_id":"c1","exec_id":"e1","pid":7,"exit_status":137}"#;

    #[test]
    fn event_is_a_line_an_object_or_an_item() {
        assert_eq!(
            event(EXIT, Output::Table).unwrap(),
            "2026-01-02T03:04:05.678901Z  /tasks/exit           c1 exec=e1 pid=7 exit=137\n"
        );
        let json = event(EXIT, Output::Json).unwrap();
        let value: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(value["exit_status"], 137);
        let yaml = event(EXIT, Output::Yaml).unwrap();
        assert!(
            yaml.starts_with("- container_id: c1\n  exec_id: e1\n"),
            "{yaml}"
        );
        assert!(event("no JSON", Output::Table).is_err());
    }
}

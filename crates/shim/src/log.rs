// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Log lines for containerd, which copies what a shim writes to the FIFO `log` of its bundle into its own log.
//!
//! One line per event in containerd's own form, `time=… level=… msg="…" key=value`, with the fields of the spans around
//! it. A line goes out whole in one non-blocking write (at most `PIPE_BUF` bytes, pipe(7)) or is dropped: neither a slow
//! nor a missing reader may hold up a pod. The last lines are kept for the operator.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::OFlags;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

use crate::history::History;

/// The longest line that a pipe takes whole (`PIPE_BUF`).
const MAX_LINE: usize = 4096;

/// Sends every event of this process at or above `level` to the FIFO at `fifo` and to `history`, with `common` fields on
/// every line.
/// A second call changes nothing.
pub(crate) fn init(fifo: PathBuf, level: Level, common: &[(&str, &str)], history: Arc<History>) {
    let layer = LogLayer {
        common: common_fields(common),
        fifo: Fifo {
            path: fifo,
            open: Mutex::new(None),
        },
        history,
    };
    let filter = LevelFilter::from_level(level);
    // An error means that a test has installed one already.
    let _installed = tracing_subscriber::registry()
        .with(layer.with_filter(filter))
        .try_init();
    std::panic::set_hook(Box::new(
        |panic| tracing::error!(%panic, "the shim has a bug and ends"),
    ));
}

/// A FIFO that nobody need read.
struct Fifo {
    path: PathBuf,
    open: Mutex<Option<File>>,
}

impl Fifo {
    fn write(&self, line: &[u8]) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.is_none() {
            // Without a reader this fails with ENXIO; the next line tries again.
            let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
            *open = OpenOptions::new()
                .write(true)
                .custom_flags(flags)
                .open(&self.path)
                .ok();
        }
        if let Some(file) = open.as_mut() {
            // EAGAIN: the reader is slow. EPIPE: it has gone, and may come back to the same FIFO.
            let _dropped = file.write(line);
        }
    }
}

struct LogLayer {
    /// The beginning of each field, ` key=`, and the whole.
    common: Vec<(String, String)>,
    fifo: Fifo,
    history: Arc<History>,
}

fn common_fields(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    let whole = |key: &str, value: &str| {
        let mut text = String::new();
        write_field(&mut text, key, value);
        text
    };
    let fields = fields.iter();
    fields
        .map(|(key, value)| (format!(" {key}="), whole(key, value)))
        .collect()
}

/// The fields of a span, ready to be appended.
struct SpanFields(String);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LogLayer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(SpanFields(fields.rest));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(SpanFields(text)) = span.extensions_mut().get_mut::<SpanFields>()
        {
            let mut fields = Fields::default();
            values.record(&mut fields);
            text.push_str(&fields.rest);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut rest = fields.rest;
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(SpanFields(text)) = span.extensions().get::<SpanFields>() {
                rest.push_str(text);
            }
        }
        for (key, field) in &self.common {
            if !rest.contains(key) {
                rest.push_str(field);
            }
        }
        let line = line(event.metadata(), &fields.message, &rest);
        self.fifo.write(line.as_bytes());
        self.history.push(&line);
    }
}

/// Now, as RFC 3339 has it.
pub(crate) fn timestamp() -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _infallible = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

fn line(metadata: &Metadata<'_>, message: &str, fields: &str) -> String {
    let mut line = format!("time=\"{}", timestamp());
    let level = match *metadata.level() {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    // Writing to a string does not fail.
    let _infallible = write!(line, "\" level={level} msg=");
    write_value(&mut line, message);
    line.push_str(fields);
    let mut end = line.len().min(MAX_LINE.saturating_sub(1));
    while !line.is_char_boundary(end) {
        end = end.saturating_sub(1);
    }
    line.truncate(end);
    line.push('\n');
    line
}

/// The message of an event, and its other fields as ` key=value`.
#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            write_field(&mut self.rest, field.name(), value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.record_str(field, &crate::error::report(value));
    }
}

fn write_field(text: &mut String, key: &str, value: &str) {
    let _infallible = write!(text, " {key}=");
    write_value(text, value);
}

/// A value as it is, or quoted if a reader could take part of it for something else.
fn write_value(text: &mut String, value: &str) {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._/@:+".contains(&byte);
    if !value.is_empty() && value.bytes().all(plain) {
        text.push_str(value);
    } else {
        let _infallible = write!(text, "{value:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use std::io::Read;
    use std::path::Path;

    fn fifo(dir: &Path) -> PathBuf {
        let path = dir.join("log");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        path
    }

    fn reader(path: &Path) -> File {
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap();
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .unwrap()
    }

    fn layer(path: &Path) -> LogLayer {
        LogLayer {
            common: common_fields(&[("namespace", "n"), ("sandbox_id", "pod1")]),
            fifo: Fifo {
                path: path.to_path_buf(),
                open: Mutex::new(None),
            },
            history: Arc::default(),
        }
    }

    fn read(reader: &mut File) -> String {
        let mut bytes = vec![0; 1 << 17];
        let count = reader.read(&mut bytes).unwrap();
        String::from_utf8(bytes[..count].to_vec()).unwrap()
    }

    #[test]
    fn line_has_fields_of_event_span_and_process() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let mut reader = reader(&path);
        let subscriber = tracing_subscriber::registry().with(layer(&path));
        tracing::subscriber::with_default(subscriber, || {
            let span =
                tracing::info_span!("create", container_id = "c1", code = tracing::field::Empty);
            span.record("code", 7);
            span.in_scope(|| {
                tracing::warn!(path = "/a b", elapsed_us = 12_u64, "made a \"thing\"")
            });
        });
        let line = read(&mut reader);
        let (time, rest) = line.split_once("Z\" ").unwrap();
        assert!(time.starts_with("time=\"20"), "{time}");
        assert_eq!(
            rest,
            "level=warning msg=\"made a \\\"thing\\\"\" path=\"/a b\" elapsed_us=12 container_id=c1 code=7 \
             namespace=n sandbox_id=pod1\n"
        );
    }

    #[test]
    fn field_that_an_event_has_is_not_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let mut reader = reader(&path);
        let subscriber = tracing_subscriber::registry().with(layer(&path));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(sandbox_id = "pod2", "mine");
        });
        let line = read(&mut reader);
        assert!(
            line.ends_with("msg=mine sandbox_id=pod2 namespace=n\n"),
            "{line}"
        );
    }

    #[test]
    fn slow_or_missing_reader_blocks_nobody_and_lines_stay_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let layer = layer(&path);
        let history = Arc::clone(&layer.history);
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("nobody reads this");
            assert!(history.since(0).0[0].contains("nobody reads this"));
            let mut first = reader(&path);
            let long = "ä".repeat(MAX_LINE);
            for _ in 0..100 {
                tracing::info!("{long}");
            }
            let text = read(&mut first);
            assert!(text.ends_with('\n') && text.lines().all(|line| line.len() < MAX_LINE));
            drop(first);
            tracing::info!("containerd is down");
            let mut second = reader(&path);
            tracing::info!("and back");
            assert!(read(&mut second).contains("and back"));
        });
    }
}

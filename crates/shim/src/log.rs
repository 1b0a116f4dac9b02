// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Log lines for containerd, which copies what a shim writes to the FIFO `log` of its bundle into its own log.
//!
//! One line per event in containerd's own form, `time=… level=… msg="…" key=value`, with the fields of the spans around
//! it. A line goes out whole in one non-blocking write (at most `PIPE_BUF` bytes, pipe(7)) or is dropped: neither a slow
//! nor a missing reader may hold up a pod. What is dropped is counted, and told of behind the next line that goes out. A
//! line that would be too long has its longest values cut, never the ids at its end. The last lines are kept for the operator.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
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

/// The most bytes of a line's message; what it is about is in fields.
const MAX_MESSAGE: usize = 1024;

/// The most bytes of a span's fields, which are ids.
const MAX_SPAN: usize = 512;

/// The most bytes of an id.
const MAX_ID: usize = 256;

/// What is known of the log.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// The last lines.
    pub(crate) history: History,
    dropped: AtomicU64,
}

impl Log {
    /// How many lines containerd did not get, because it did not read or was away.
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

/// Sends every event of this process at or above `level` to the FIFO at `fifo` and to `log`, with `common` fields on every
/// line, and to `more`, if there is any. A second call changes nothing.
pub(crate) fn init<L>(
    fifo: PathBuf,
    level: Level,
    common: &[(&str, &str)],
    log: Arc<Log>,
    more: Option<L>,
) where
    L: Layer<tracing_subscriber::Registry> + Send + Sync,
{
    let layer = LogLayer {
        common: common_fields(common),
        fifo: Fifo {
            path: fifo,
            open: Mutex::new(None),
        },
        log,
    };
    let filter = LevelFilter::from_level(level);
    // An error means that a test has installed one already.
    let _installed = tracing_subscriber::registry()
        .with(more)
        .with(layer.with_filter(filter))
        .try_init();
    std::panic::set_hook(Box::new(
        |panic| tracing::error!(%panic, "the shim has a bug and ends"),
    ));
}

/// A FIFO that nobody need read.
struct Fifo {
    path: PathBuf,
    open: Mutex<Option<End>>,
}

/// The FIFO's end, and what it has not taken since it took a line.
struct End {
    file: File,
    missed: u64,
}

impl Fifo {
    /// Writes a line, and one behind it that says how many were dropped before it; says whether it went out.
    fn write(&self, line: &[u8]) -> bool {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.is_none() {
            // Without a reader this fails with ENXIO; the next line tries again.
            let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
            let file = OpenOptions::new()
                .write(true)
                .custom_flags(flags)
                .open(&self.path);
            *open = file.ok().map(|file| End { file, missed: 0 });
        }
        let Some(end) = open.as_mut() else {
            return false;
        };
        // EAGAIN: the reader is slow. EPIPE: it has gone, and may come back to the same FIFO.
        let written = end.file.write(line).is_ok();
        if !written {
            end.missed = end.missed.saturating_add(1);
        } else if end.missed > 0 && end.file.write(&missed(end.missed)).is_ok() {
            // Behind the line, not before it: that is short, so it would find room where the line finds none, and a full
            // pipe would fill up with lines about one dropped line each.
            end.missed = 0;
        }
        written
    }
}

fn missed(lines: u64) -> Vec<u8> {
    format!(
        "time=\"{}\" level=warning msg=\"lines of the shim's log were dropped\" dropped={lines}\n",
        timestamp()
    )
    .into_bytes()
}

struct LogLayer {
    /// The beginning of each field, ` key=`, and the whole.
    common: Vec<(String, String)>,
    fifo: Fifo,
    log: Arc<Log>,
}

fn common_fields(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    let whole = |key: &str, value: &str| {
        let mut text = String::new();
        write_field(&mut text, key, value, MAX_ID);
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
            span.extensions_mut()
                .insert(SpanFields(fields.text(MAX_SPAN)));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(SpanFields(text)) = span.extensions_mut().get_mut::<SpanFields>()
        {
            let mut fields = Fields::default();
            values.record(&mut fields);
            text.push_str(&fields.text(MAX_SPAN));
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let mut ids = String::new();
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(SpanFields(text)) = span.extensions().get::<SpanFields>() {
                ids.push_str(text);
            }
        }
        for (key, field) in &self.common {
            if !ids.contains(key) && !fields.has(key) {
                ids.push_str(field);
            }
        }
        let line = line(event.metadata(), &fields, &ids);
        if !self.fifo.write(line.as_bytes()) {
            self.log.dropped.fetch_add(1, Ordering::Relaxed);
        }
        self.log.history.push(&line);
    }
}

/// Now, as RFC 3339 has it.
pub(crate) fn timestamp() -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _infallible = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

fn line(metadata: &Metadata<'_>, fields: &Fields, ids: &str) -> String {
    let level = match *metadata.level() {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    };
    let mut line = format!("time=\"{}\" level={level} msg=", timestamp());
    let room = MAX_LINE
        .saturating_sub(line.len())
        .saturating_sub(ids.len())
        .saturating_sub(1);
    write_value(&mut line, &fields.message, room.min(MAX_MESSAGE));
    let room = MAX_LINE
        .saturating_sub(line.len())
        .saturating_sub(ids.len())
        .saturating_sub(1);
    line.push_str(&fields.text(room));
    line.push_str(ids);
    line.push('\n');
    line
}

/// The message of an event, and its other fields.
#[derive(Default)]
struct Fields {
    message: String,
    rest: Vec<(&'static str, String)>,
}

impl Fields {
    /// The fields as ` key=value`, in at most `room` bytes: each has its share, and what short ones leave is the others'.
    fn text(&self, room: usize) -> String {
        let mut text = String::new();
        let values = self.rest.iter();
        let mut by_length: Vec<usize> = values.map(|(_, value)| escaped_len(value)).collect();
        by_length.sort_unstable();
        // The most bytes that one value can have for all to fit.
        let keys: usize = self
            .rest
            .iter()
            .map(|(key, _)| key.len().saturating_add(4))
            .sum();
        let mut left = room.saturating_sub(keys);
        let mut share = room;
        for (at, length) in by_length.iter().enumerate() {
            let values = by_length.len().saturating_sub(at);
            let fair = left.checked_div(values).unwrap_or(0);
            if *length > fair {
                share = fair;
                break;
            }
            left = left.saturating_sub(*length);
        }
        for (key, value) in &self.rest {
            let before = text.len();
            write_field(&mut text, key, value, share);
            if text.len() > room {
                text.truncate(before);
            }
        }
        text
    }

    /// Whether there is a field that begins with ` key=`.
    fn has(&self, beginning: &str) -> bool {
        let name = beginning.trim_start().trim_end_matches('=');
        self.rest.iter().any(|(key, _)| *key == name)
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            self.rest.push((field.name(), value.to_owned()));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.record_str(field, &crate::error::report(value));
    }
}

/// How many bytes of a line a value takes between its quotes, as far as that matters.
pub(crate) fn escaped_len(value: &str) -> usize {
    let characters = value.chars().take(MAX_LINE);
    let escaped = characters.flat_map(char::escape_debug);
    escaped.map(char::len_utf8).sum()
}

fn write_field(text: &mut String, key: &str, value: &str, room: usize) {
    text.push(' ');
    text.push_str(key);
    text.push('=');
    write_value(text, value, room);
}

/// A value as it is, or quoted if a reader could take part of it for something else; what does not go into `room` bytes
/// between the quotes is left out, and three dots stand for it.
fn write_value(text: &mut String, value: &str, room: usize) {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._/@:+".contains(&byte);
    if !value.is_empty() && value.len() <= room && value.bytes().all(plain) {
        text.push_str(value);
        return;
    }
    text.push('"');
    let end = text.len().saturating_add(room);
    // Where the dots would still fit.
    let mut cut = text.len();
    for character in value.chars() {
        text.extend(character.escape_debug());
        if text.len() > end {
            text.truncate(cut);
            text.push_str("...");
            break;
        }
        if text.len().saturating_add(3) <= end {
            cut = text.len();
        }
    }
    text.push('"');
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
            log: Arc::default(),
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
        let log = Arc::clone(&layer.log);
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!("nobody reads this");
            assert!(log.history.since(0).0[0].contains("nobody reads this"));
            assert_eq!(log.dropped(), 1);
            let mut first = reader(&path);
            let long = "ä".repeat(MAX_LINE);
            for _ in 0..100 {
                tracing::info!("{long}");
            }
            let text = read(&mut first);
            assert!(text.ends_with('\n') && text.lines().all(|line| line.len() < MAX_LINE));
            let dropped = 100 - u64::try_from(text.lines().count()).unwrap();
            assert!(dropped > 0 && log.dropped() == 1 + dropped, "{dropped}");
            tracing::info!("it is read again");
            let text = read(&mut first);
            let told = format!("msg=\"lines of the shim's log were dropped\" dropped={dropped}\n");
            assert!(
                text.contains(&told) && text.contains("it is read again"),
                "{text}"
            );
            drop(first);
            tracing::info!("containerd is down");
            let mut second = reader(&path);
            tracing::info!("and back");
            assert!(read(&mut second).contains("and back"));
        });
    }

    #[test]
    fn line_beyond_what_a_pipe_takes_loses_the_ends_of_its_longest_values() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let mut reader = reader(&path);
        let subscriber = tracing_subscriber::registry().with(layer(&path));
        let long = "\"a\u{301}\n".repeat(1 << 20);
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!(
                exit = 7,
                console = long,
                error = "b".repeat(1 << 20),
                "{long}"
            );
        });
        let line = read(&mut reader);
        assert!((3000..=MAX_LINE).contains(&line.len()), "{}", line.len());
        assert!(line.contains(" exit=7 console=\"\\\"a"), "{line}");
        assert!(line.contains(" error=\"bbb"), "{line}");
        assert!(
            line.ends_with("...\" namespace=n sandbox_id=pod1\n"),
            "{line}"
        );
        // Quotes are in pairs.
        let quotes = line.replace("\\\\", "").replace("\\\"", "");
        assert_eq!(quotes.matches('"').count() % 2, 0, "{line}");
    }

    #[test]
    fn value_that_fits_is_whole_beside_others() {
        let mut fields = Fields::default();
        fields.rest.push(("part", "vm".to_owned()));
        fields.rest.push(("dump", "{\"a\":1}".repeat(100)));
        let whole = fields.text(4000);
        assert!(
            whole.ends_with("1}\"") && whole.starts_with(" part=vm dump="),
            "{whole}"
        );
        assert_eq!(fields.text(whole.len() + 8), whole, "{whole}");
        let cut = fields.text(500);
        assert!(
            cut.len() <= 500 && cut.starts_with(" part=vm ") && cut.ends_with("...\""),
            "{cut}"
        );
    }

    #[test]
    fn value_is_cut_at_its_room_and_one_past_it() {
        let written = |value: &str, room| {
            let mut text = String::new();
            write_value(&mut text, value, room);
            text
        };
        assert_eq!(written("abcdef", 6), "abcdef");
        assert_eq!(written("abcdef", 5), "\"ab...\"");
        assert_eq!(written("ab def", 6), "\"ab def\"");
        assert_eq!(written("ab def", 5), "\"ab...\"");
        assert_eq!(written("äöü", 5), "\"ä...\"");
        assert_eq!(written("", 0), "\"\"");
    }
}

// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! How results are printed: for people as a table, for programs as JSON or YAML.

use std::io::{self, Write};

use clap::ValueEnum;
use serde::Serialize;
use serde_json::Value;

/// How to print a result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
    /// For programs and people.
    Yaml,
}

impl Output {
    /// `value`, or what `table` makes of it.
    pub(crate) fn text<T: Serialize>(
        self,
        value: &T,
        table: impl FnOnce(&T) -> String,
    ) -> serde_json::Result<String> {
        Ok(match self {
            Self::Table => table(value),
            Self::Json => serde_json::to_string_pretty(value)? + "\n",
            Self::Yaml => yaml(&serde_json::to_value(value)?),
        })
    }
}

/// Prints. A reader that has gone away (`cofferctl list | head -1`) is no error: `false` says so, to those that have more.
pub(crate) fn print(text: &str) -> io::Result<bool> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        done => done.map(|()| true),
    }
}

/// Rows below headings, in columns.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(headings: &[&str]) -> Self {
        let headings = headings.iter().map(|heading| (*heading).to_owned());
        Self {
            rows: vec![headings.collect()],
        }
    }

    /// Adds a row. An empty cell is shown as "-".
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells = cells.into_iter().map(|cell| match cell.as_str() {
            "" => "-".to_owned(),
            _ => cell,
        });
        self.rows.push(cells.collect());
    }

    pub(crate) fn text(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| format!("{cell:width$}"))
                .collect();
            cells.join("  ").trim_end().to_owned() + "\n"
        };
        self.rows.iter().map(line).collect()
    }
}

/// A value as YAML 1.2. Every string that is not a plain word is written as JSON writes it, which YAML reads the same.
pub(crate) fn yaml(value: &Value) -> String {
    let mut text = String::new();
    block(&mut text, value, 0);
    text
}

/// `value` on lines of its own, each indented by `indent`.
fn block(text: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, field) in fields {
                text.push_str(&format!("{:indent$}{}:", "", string(name)));
                nested(text, field, indent.saturating_add(2));
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for item in items {
                let mut inner = String::new();
                block(&mut inner, item, indent.saturating_add(2));
                text.push_str(&format!("{:indent$}- {}", "", inner.trim_start()));
            }
        }
        scalar => text.push_str(&format!("{:indent$}{}\n", "", flow(scalar))),
    }
}

/// What follows a name and its colon.
fn nested(text: &mut String, value: &Value, indent: usize) {
    let empty = match value {
        Value::Object(fields) => fields.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => true,
    };
    if empty {
        text.push_str(&format!(" {}\n", flow(value)));
    } else {
        text.push('\n');
        block(text, value, indent);
    }
}

/// A scalar, or something empty.
fn flow(value: &Value) -> String {
    match value {
        Value::String(text) => string(text),
        other => other.to_string(),
    }
}

/// As it is if no reader could take it for something else than a string.
fn string(text: &str) -> String {
    let words = ["true", "false", "null", "yes", "no", "on", "off", "y", "n"];
    let plain = text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '/')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte))
        && !words.contains(&text.to_ascii_lowercase().as_str());
    if plain {
        text.to_owned()
    } else {
        Value::String(text.to_owned()).to_string()
    }
}

/// Bytes as people read them.
pub(crate) fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (bits, unit) in units {
        let whole = bytes >> bits;
        if whole > 0 {
            let rest = bytes.saturating_sub(whole << bits);
            let tenth = rest.saturating_mul(10) >> bits;
            return format!("{whole}.{tenth} {unit}");
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["NAME", "N"]);
        table.row(["a".to_owned(), "100".to_owned()]);
        table.row(["longer".to_owned(), String::new()]);
        assert_eq!(table.text(), "NAME    N\na       100\nlonger  -\n");
    }

    #[test]
    fn yaml_nests_objects_and_lists() {
        let value = json!({
            "id": "pod-1",
            "empty": [],
            "vm": { "state": "ready", "ms": 1.5, "gone": null },
            "rows": [{ "a": 1, "b": { "c": true } }, [2, 3], "x"],
        });
        let expected = "\
empty: []
id: pod-1
rows:
  - a: 1
    b:
      c: true
  - - 2
    - 3
  - x
vm:
  gone: null
  ms: 1.5
  state: ready
";
        assert_eq!(yaml(&value), expected);
    }

    #[test]
    fn string_that_yaml_would_misread_is_quoted() {
        for (text, expected) in [
            ("/run/a.b", "/run/a.b"),
            ("12", "\"12\""),
            ("No", "\"No\""),
            ("", "\"\""),
            ("a: b", "\"a: b\""),
            ("two\nlines \"q\"", "\"two\\nlines \\\"q\\\"\""),
            ("2026-01-01", "\"2026-01-01\""),
            ("-", "\"-\""),
        ] {
            assert_eq!(string(text), expected);
        }
    }

    #[test]
    fn sizes_have_one_decimal() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (300 << 20, "300.0 MiB"),
            (u64::MAX, "16777215.9 TiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }
}

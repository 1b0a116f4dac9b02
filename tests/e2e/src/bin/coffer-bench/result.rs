// Copyright The Coffer Authors
// SPDX-License-Identifier: Apache-2.0

//! Samples, and what is said of them. Every raw sample is kept.

use serde::Serialize;

/// Everything measured in one run.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Results {
    series: Vec<Series>,
}

/// The samples of one measurement under one runtime.
#[derive(Debug, Serialize)]
struct Series {
    name: String,
    runtime: &'static str,
    unit: &'static str,
    samples: Vec<f64>,
}

impl Results {
    /// Adds one sample to its series.
    pub(crate) fn add(
        &mut self,
        name: &str,
        runtime: &'static str,
        unit: &'static str,
        sample: f64,
    ) {
        let known = self
            .series
            .iter_mut()
            .find(|series| series.name == name && series.runtime == runtime);
        match known {
            Some(series) => series.samples.push(sample),
            None => {
                self.series.push(Series {
                    name: name.to_owned(),
                    runtime,
                    unit,
                    samples: vec![sample],
                });
            }
        }
    }

    /// The results as JSON, raw samples included.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap() + "\n"
    }

    /// The results for people: medians with their spread, and the ratio to runc where runc was measured too.
    pub(crate) fn table(&self) -> String {
        let mut text = format!(
            "{:28} {:8} {:>10} {:>10} {:>10} {:>4} {:>8}\n",
            "", "runtime", "median", "min", "max", "n", "ratio"
        );
        for series in &self.series {
            let other = self
                .series
                .iter()
                .find(|other| other.name == series.name && other.runtime == "runc");
            let ratio = other
                .filter(|_| series.runtime != "runc")
                .map(|other| format!("{:.2}", median(&series.samples) / median(&other.samples)))
                .unwrap_or_default();
            let least = series.samples.iter().copied().fold(f64::INFINITY, f64::min);
            let most = series
                .samples
                .iter()
                .copied()
                .fold(f64::NEG_INFINITY, f64::max);
            let name = format!("{} [{}]", series.name, series.unit);
            text += &format!(
                "{name:28} {:8} {:>10.1} {least:>10.1} {most:>10.1} {:>4} {ratio:>8}\n",
                series.runtime,
                median(&series.samples),
                series.samples.len()
            );
        }
        text
    }
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted.get(middle).copied().unwrap_or(f64::NAN),
        _ => sorted
            .get(middle.saturating_sub(1)..=middle)
            .map_or(f64::NAN, |pair| pair.iter().sum::<f64>() / 2.0),
    }
}

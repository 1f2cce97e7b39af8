//! The outcome as rows: a table for people, JSON for programs. It takes figures as they are and measures nothing.

use std::fmt::Write;

use serde::Serialize;

use crate::Result;
use crate::case::{self, Case, Unit};
use crate::machine::Machine;
use crate::rounds::Runs;
use crate::run::Figures;
use crate::sample::{Spread, paired_ratios};
use crate::system::SYSTEMS;

/// A case, and what the runs of each of its lanes came to.
pub(crate) struct Outcome {
    pub(crate) case: Case,
    pub(crate) runs: Vec<Runs>,
}

/// A line of the report. Processor time is that of a message, or of a round trip, or of a connection.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) system: &'static str,
    pub(crate) version: String,
    pub(crate) unit: &'static str,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) runs: usize,
    pub(crate) ratio_to_raw: Option<f64>,
    pub(crate) sender_cpu_ns: f64,
    pub(crate) receiver_cpu_ns: f64,
    pub(crate) sender_rss_kib: u64,
    pub(crate) receiver_rss_kib: u64,
}

/// What is taken from a run.
pub(crate) type Reading = fn(&Figures) -> f64;

/// The value in the unit of the case.
pub(crate) const VALUE: Reading = |figures| figures.value;

/// The 99th percentile of round trips.
pub(crate) const P99: Reading = |figures| figures.p99.unwrap_or(f64::NAN);

impl Outcome {
    /// The counted runs of a system, if it took part and none failed.
    pub(crate) fn readings(&self, system: &str, reading: Reading) -> Option<Vec<f64>> {
        let index = self.case.lanes.iter().position(|lane| lane.name == system)?;
        Some(self.runs[index].as_ref().ok()?.iter().map(reading).collect())
    }

    /// The ratios of two systems, run by run.
    pub(crate) fn ratios(&self, system: &str, yardstick: &str, reading: Reading) -> Option<Spread> {
        paired_ratios(&self.readings(system, reading)?, &self.readings(yardstick, reading)?)
    }

    /// The rows of all lanes that did not fail. A case of round trips has two for each.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut rows = self.rows_of(self.case.name.clone(), VALUE);
        if self.case.unit == Unit::Microseconds {
            rows.extend(self.rows_of(format!("{}-p99", self.case.name), P99));
        }
        rows
    }

    fn rows_of(&self, name: String, reading: Reading) -> Vec<Row> {
        let rows = self.case.lanes.iter().zip(&self.runs).filter_map(|(lane, runs)| {
            let figures = runs.as_ref().ok()?;
            let median = |reading: Reading| Some(Spread::of(&figures.iter().map(reading).collect::<Vec<_>>())?.median);
            let Spread { median: middle, min, max } = Spread::of(&self.readings(lane.name, reading)?)?;
            Some(Row {
                case: name.clone(),
                system: lane.name,
                version: (lane.system.version)(),
                unit: self.case.unit.name(),
                median: middle,
                min,
                max,
                runs: figures.len(),
                ratio_to_raw: self.ratios(lane.name, "raw", reading).map(|ratios| ratios.median),
                sender_cpu_ns: median(|figures| figures.sender_cpu_ns)?,
                receiver_cpu_ns: median(|figures| figures.receiver_cpu_ns)?,
                sender_rss_kib: median(|figures| figures.sender_kib as f64)? as u64,
                receiver_rss_kib: median(|figures| figures.receiver_kib as f64)? as u64,
            })
        });
        rows.collect()
    }

    /// The lanes that failed, and why.
    pub(crate) fn failures(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let lanes = self.case.lanes.iter().zip(&self.runs);
        lanes.filter_map(|(lane, runs)| Some((lane.name, runs.as_ref().err()?.as_str())))
    }
}

/// The whole report.
pub(crate) fn json(machine: &Machine, outcomes: &[Outcome]) -> Result<String> {
    #[derive(Serialize)]
    struct Whole<'a> {
        machine: &'a Machine,
        rows: Vec<Row>,
    }

    let rows = outcomes.iter().flat_map(Outcome::rows).collect();
    Ok(serde_json::to_string_pretty(&Whole { machine, rows })? + "\n")
}

/// One case's part of the table, on standard output.
pub(crate) fn print(outcome: &Outcome) {
    print!("{}", table(outcome));
}

fn table(outcome: &Outcome) -> String {
    let Case { name, title, .. } = &outcome.case;
    let mut text = format!("\n{name}  {title}\n");
    let _ = writeln!(
        text,
        "  {:<20} {:>12} {:>23}  {:>6}  {:>17}  {:>17}  version",
        "system", "median", "min .. max", "of raw", "CPU ns send/recv", "MiB send/recv"
    );
    for row in outcome.rows() {
        let p99 = row.case != *name;
        let system = if p99 { format!("{} p99", row.system) } else { row.system.to_owned() };
        let unit = outcome.case.unit;
        let range = format!("{} .. {}", amount(row.min, unit), amount(row.max, unit));
        let ratio = row.ratio_to_raw.map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let cpu = format!("{:.0} / {:.0}", row.sender_cpu_ns, row.receiver_cpu_ns);
        let memory = format!("{:.1} / {:.1}", mebibytes(row.sender_rss_kib), mebibytes(row.receiver_rss_kib));
        let median = amount(row.median, unit);
        let _ = writeln!(
            text,
            "  {system:<20} {median:>12} {range:>23}  {ratio:>6}  {cpu:>17}  {memory:>17}  {}",
            row.version
        );
    }
    for (system, why) in outcome.failures() {
        let _ = writeln!(text, "  {system:<20} FAILED: {why}");
    }
    text
}

fn mebibytes(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

/// A value with its unit, for reading.
pub(crate) fn amount(value: f64, unit: Unit) -> String {
    match unit {
        Unit::MessagesPerSecond if value < 100_000.0 => format!("{:.1} k/s", value / 1e3),
        Unit::MessagesPerSecond => format!("{:.2} M/s", value / 1e6),
        Unit::BytesPerSecond if value < 1e9 => format!("{:.0} MB/s", value / 1e6),
        Unit::BytesPerSecond => format!("{:.2} GB/s", value / 1e9),
        Unit::Microseconds => format!("{value:.1} us"),
        Unit::BytesPerConnection => format!("{:.2} KiB", value / 1024.0),
    }
}

/// Where and when, and who was not there.
pub(crate) fn print_machine(machine: &Machine) {
    let Machine { processor, cores, system, compiler, date, command, load_at_start, .. } = machine;
    println!("\n{processor}, {cores} cores, {system}, {compiler}; {date}; load at the start {load_at_start}");
    println!("{command}");
    for absent in &machine.absent {
        println!("{}: absent ({})", absent.system, absent.why);
    }
}

/// The cases and the systems, with their settings.
pub(crate) fn list() {
    println!("Cases (sizes and connections are groups):");
    for case in case::cases(false, 1.0) {
        println!("  {:<18} {}", case.name, case.title);
    }
    println!("\nSystems:");
    for system in SYSTEMS {
        match system.runner {
            Some(_) => {
                println!("  {:<18} {}\n{:21}version {}", system.name, system.about, "", (system.version)());
                println!("{:21}{}", "", system.settings);
            }
            None => println!("  {:<18} absent: add --features {} (or peers)", system.name, system.feature),
        }
    }
}

//! What was measured, for people as a table and for programs as JSON.

use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;
use indicatif::{BinaryBytes, HumanCount};
use serde_json::{Value, json};

use super::arguments::By;
use super::measured::Measured;
use crate::report::counted;

/// The percentiles that are told.
const PERCENTILES: [(&str, f64); 5] = [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("p99.99", 99.99)];

/// Below this part of what was asked for, the rate was not kept.
const KEPT: f64 = 0.99;

/// The table, and under it what a reader must know before believing it.
pub(crate) fn text(measured: &Measured) -> String {
    table(measured) + &notes(measured).iter().map(|note| format!("{note}\n")).collect::<String>()
}

/// The table alone.
pub(crate) fn table(measured: &Measured) -> String {
    let (rate, bytes) = measured.rates();
    let mut out = String::new();
    let mut line = |name: &str, text: String| writeln!(out, "{name:<12}{text}").expect("a String takes everything");
    line("bench", setting(measured));
    let lost = measured.lost();
    let mut counts = format!(
        "sent {}, answered {}, lost {}",
        HumanCount(measured.sent),
        HumanCount(measured.answered),
        HumanCount(lost)
    );
    for (count, what) in [(measured.wrong, "wrong"), (measured.repeated, "repeated"), (measured.unsent, "not sent")] {
        if count > 0 {
            write!(counts, ", {what} {}", HumanCount(count)).expect("a String takes everything");
        }
    }
    line("messages", counts);
    let asked = measured.asked.map_or(String::new(), |asked| format!(" of {} asked", count(asked)));
    line("rate", format!("{} msg/s{asked}, {}/s", count(rate), BinaryBytes(bytes.round() as u64)));
    if let (Some(latency), Some(late)) = (&measured.latency, &measured.late) {
        let heads = ["mean"].into_iter().chain(PERCENTILES.map(|(name, _)| name)).chain(["max"]);
        line("", heads.map(|head| format!("{head:>10}")).collect());
        for (name, histogram) in [("latency", latency), ("sent late", late)] {
            line(name, figures(histogram).map(|ns| format!("{:>10}", time(ns))).collect());
        }
    }
    out
}

/// What was done.
pub(crate) fn setting(measured: &Measured) -> String {
    let Measured { address, connections, sizes, time, warm_up, .. } = measured;
    let connections = counted(*connections, "connection", "connections");
    let answer = match (measured.by, measured.is_acked) {
        (By::Echo, false) => "echoed",
        (By::Echo, true) => "acknowledged and echoed",
        (By::Acks, _) => "acknowledged",
    };
    let [time, warm_up] = [*time, *warm_up].map(|time| humantime::format_duration(rounded(time)));
    format!("{address}, {connections}, {sizes} bytes a message, {answer}, {time} after {warm_up}")
}

/// To milliseconds: nobody asks for less.
fn rounded(time: Duration) -> Duration {
    Duration::from_millis(time.as_millis() as u64)
}

/// What the figures do not say by themselves.
pub(crate) fn notes(measured: &Measured) -> Vec<String> {
    let mut notes = Vec::new();
    if measured.interrupted {
        notes.push("Interrupted: the figures are those of the time until then.".to_owned());
    }
    match (measured.asked, &measured.latency) {
        (Some(asked), Some(latency)) => {
            let (rate, _) = measured.rates();
            if latency.is_empty() {
                notes.push("No latency was measured: nothing that was due after the warm-up was answered.".to_owned());
            } else {
                notes.push("Latency counts from when a message was due, not from when it was sent.".to_owned());
            }
            if rate < asked * KEPT {
                notes.push(format!(
                    "The rate was not kept: {} of {} messages a second were answered in time.",
                    count(rate),
                    count(asked)
                ));
            }
            let missing = measured.unsent + measured.lost();
            if missing > 0 {
                notes.push(format!(
                    "{} messages were due and have no latency, because they were not sent or not answered: the \
                     percentiles are lower than they should be.",
                    HumanCount(missing)
                ));
            }
        }
        _ => notes.push(
            "No latency: with the connections kept full it would be the time in the queue. Give a --rate.".to_owned(),
        ),
    }
    notes
}

/// One object, on one line.
pub(crate) fn json(measured: &Measured) -> String {
    let (rate, bytes) = measured.rates();
    let latencies = |histogram: &Option<Histogram<u64>>| {
        histogram.as_ref().map(|histogram| {
            let mut object = json!({ "count": histogram.len(), "min": micros(histogram.min() as f64) });
            let names = ["mean"].into_iter().chain(PERCENTILES.map(|(name, _)| name)).chain(["max"]);
            for (name, ns) in names.zip(figures(histogram)) {
                object[name] = micros(ns);
            }
            object
        })
    };
    let object = json!({
        "address": measured.address,
        "connections": measured.connections,
        "size": { "least": measured.sizes.least, "most": measured.sizes.most },
        "by": if measured.by == By::Acks { "acks" } else { "echo" },
        "delivery": if measured.is_acked { "acked" } else { "sent" },
        "warm_up_seconds": measured.warm_up.as_secs_f64(),
        "seconds": measured.time.as_secs_f64(),
        "interrupted": measured.interrupted,
        "sent": measured.sent,
        "answered": measured.answered,
        "lost": measured.lost(),
        "wrong": measured.wrong,
        "repeated": measured.repeated,
        "unsent": measured.unsent,
        "rate_asked": measured.asked,
        "rate": rate,
        "bytes_per_second": bytes,
        "latency_us": latencies(&measured.latency),
        "sent_late_us": latencies(&measured.late),
        "part_seconds": measured.part.as_secs_f64(),
        "answered_in_parts": measured.parts.iter().map(|part| part.0).collect::<Vec<_>>(),
    });
    format!("{object}\n")
}

fn micros(ns: f64) -> Value {
    json!((ns / 10.0).round() / 100.0)
}

/// The mean, the percentiles and the most, in nanoseconds.
fn figures(histogram: &Histogram<u64>) -> impl Iterator<Item = f64> {
    let percentiles = PERCENTILES.map(|(_, percentile)| histogram.value_at_percentile(percentile) as f64);
    [histogram.mean()].into_iter().chain(percentiles).chain([histogram.max() as f64])
}

fn count(number: f64) -> String {
    if number < 100.0 { format!("{number:.1}") } else { HumanCount(number.round() as u64).to_string() }
}

/// Nanoseconds, in the unit that suits them, with three figures.
pub(crate) fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns < 1e3 => return format!("{ns:.0} ns"),
        ns if ns < 999.5e3 => (ns / 1e3, "µs"),
        ns if ns < 999.5e6 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_figures() {
        let times = [
            (7.0, "7 ns"),
            (1_234.0, "1.23 µs"),
            (64_000.0, "64.0 µs"),
            (250_400.0, "250 µs"),
            (999_900.0, "1.00 ms"),
            (9_999_000.0, "10.0 ms"),
            (2.5e9, "2.50 s"),
            (75e9, "75.0 s"),
        ];
        for (ns, text) in times {
            assert_eq!(time(ns), text, "{ns}");
        }
    }
}

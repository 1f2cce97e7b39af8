//! The report as one HTML page that needs nothing else, for a reader who has never heard of the project.

use std::fmt::Write;

use crate::Result;
use crate::case::{Curve, Unit};
use crate::machine::Machine;
use crate::plot::{Axes, Bar, Line, bars, curve, escape, standalone};
use crate::report::{Outcome, Row, amount};
use crate::system::SYSTEMS;

/// The whole page.
pub(crate) fn html(machine: &Machine, outcomes: &[Outcome]) -> Result<String> {
    let mut page = String::new();
    page.push_str(&HEAD.replace("/*colours*/", COLOURS));
    introduction(&mut page, machine, outcomes)?;
    for outcome in outcomes.iter().filter(|outcome| outcome.case.curve.is_none()) {
        case(&mut page, outcome)?;
    }
    for kind in [Curve::Sizes, Curve::Connections] {
        let points: Vec<&Outcome> = outcomes.iter().filter(|outcome| is_point_of(outcome, kind)).collect();
        if points.len() > 1 {
            lines(&mut page, kind, &points)?;
        }
    }
    systems(&mut page, machine, outcomes)?;
    page.push_str("</main></body></html>\n");
    Ok(page)
}

fn is_point_of(outcome: &Outcome, kind: Curve) -> bool {
    outcome.case.curve.is_some_and(|(curve, _)| curve == kind)
}

fn introduction(page: &mut String, machine: &Machine, outcomes: &[Outcome]) -> Result<()> {
    page.push_str(
        "<h1>BuffStreams beside its peers</h1>\n<p class=\"lead\">BuffStreams is a Rust library that sends messages \
         from one program to another over TCP. This page shows how fast it is on one machine, beside the libraries \
         that one might take instead, and beside a <b>raw</b> socket, the yardstick: the same bytes without any \
         messages, written and read in blocks of 256 KiB.</p>\n",
    );
    if let Some(first) = outcomes.iter().find(|outcome| outcome.case.name == "p1")
        && let Some(row) = first.rows().iter().find(|row| row.system == "buffstreams")
    {
        write!(
            page,
            "<p class=\"headline\"><b>{}</b> small messages a second over one connection, each sent with a call of \
             its own and read by a callback",
            amount(row.median, Unit::MessagesPerSecond).replace(" M/s", " million")
        )?;
        if let Some(ratio) = row.ratio_to_raw {
            write!(page, ": {:.0}% of what the raw socket moves", ratio * 100.0)?;
        }
        page.push_str(".</p>\n");
    }
    write!(
        page,
        "<details><summary>How it was measured</summary><ul><li>Sender and receiver are two processes on the same \
         machine, connected over loopback. The clock runs from the first message that is sent until the receiver has \
         counted the last; all connections were open before.</li><li>The systems take turns, so that whatever else \
         the machine does touches all of them. A bar is the median of the runs, the thin line in it reaches from the \
         slowest to the fastest, and a percentage is the median of the ratios of runs that were made side by \
         side.</li><li>Every message is counted, and its first and last byte are read (raw counts bytes). A run that \
         loses or adds one is an error and not a figure.</li><li>Each system is set up as its documentation advises; \
         see the end of the page.</li></ul></details>\n<p class=\"machine\">{}, {} cores, {}, {}. {}, load at the \
         start {}.<br><code>{}</code></p>\n",
        escape(&machine.processor),
        machine.cores,
        escape(&machine.system),
        escape(machine.compiler),
        escape(&machine.date),
        escape(&machine.load_at_start),
        escape(&machine.command)
    )?;
    Ok(())
}

fn case(page: &mut String, outcome: &Outcome) -> Result<()> {
    let case = &outcome.case;
    write!(
        page,
        "<section id=\"{0}\"><h2>{1} <span class=\"tag\">{0}</span></h2>\n<p>{2}</p>\n",
        case.name,
        escape(&case.title),
        escape(case.question)
    )?;
    let rows = outcome.rows();
    let mut names: Vec<&str> = rows.iter().map(|row| row.case.as_str()).collect();
    names.dedup();
    for name in names {
        let of_case: Vec<&Row> = rows.iter().filter(|row| row.case == name).collect();
        page.push_str("<figure>");
        page.push_str(&bars(&of_case.iter().map(|row| bar(row, case.unit)).collect::<Vec<_>>(), &case.title));
        let what = match (case.unit, name == case.name) {
            (Unit::MessagesPerSecond, _) => "messages a second; longer is better",
            (Unit::BytesPerSecond, _) => "bytes a second; longer is better",
            (Unit::Microseconds, true) => "half of all round trips took no longer; shorter is better",
            (Unit::Microseconds, false) => "99 of 100 round trips took no longer; shorter is better",
            (Unit::BytesPerConnection, _) => "memory for each connection; shorter is better",
        };
        writeln!(page, "<figcaption>{what}</figcaption></figure>")?;
    }
    for (system, why) in outcome.failures() {
        writeln!(page, "<p class=\"failed\">{} failed: {}</p>", escape(system), escape(why))?;
    }
    figures(page, &rows.iter().collect::<Vec<_>>(), case.unit)?;
    page.push_str("</section>\n");
    Ok(())
}

fn bar(row: &Row, unit: Unit) -> Bar {
    let value = amount(row.median, unit);
    let text = match row.ratio_to_raw {
        Some(ratio) if row.system != "raw" && unit.more_is_better() => format!("{value}, {:.0}% of raw", ratio * 100.0),
        Some(ratio) if row.system != "raw" => format!("{value}, {ratio:.2} x raw"),
        _ => value,
    };
    Bar { system: row.system, median: row.median, min: row.min, max: row.max, text }
}

/// The rows of a figure as a table, folded away.
fn figures(page: &mut String, rows: &[&Row], unit: Unit) -> Result<()> {
    page.push_str(
        "<details><summary>Figures, processor time and memory</summary><div \
         class=\"wide\"><table><tr><th>system<th>median<th>least<th>most<th>runs<th>of raw<th>processor ns<th>memory \
         MiB</tr>\n",
    );
    for row in rows {
        let tag = if row.case.ends_with("-p99") { " p99" } else { "" };
        let point = row.case.rsplit_once('-').filter(|(_, at)| at.parse::<u64>().is_ok());
        let point = point.map_or(String::new(), |(_, at)| format!(", {at}"));
        writeln!(
            page,
            "<tr><td>{}{tag}{point}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{:.0} + {:.0}<td>{:.1} + {:.1}</tr>",
            escape(row.system),
            amount(row.median, unit),
            amount(row.min, unit),
            amount(row.max, unit),
            row.runs,
            row.ratio_to_raw.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
            row.sender_cpu_ns,
            row.receiver_cpu_ns,
            row.sender_rss_kib as f64 / 1024.0,
            row.receiver_rss_kib as f64 / 1024.0
        )?;
    }
    page.push_str(
        "</table></div><p class=\"note\">Sender + receiver. Processor time is that of one message, round trip or \
                   connection; memory is the most that the process had.</p></details>\n",
    );
    Ok(())
}

/// A curve and its picture.
struct Drawing {
    title: &'static str,
    question: &'static str,
    lines: Vec<Line>,
    svg: String,
}

/// The curves of which more than one point was measured, each as a file's name and what goes into it.
pub(crate) fn pictures(outcomes: &[Outcome]) -> Result<Vec<(String, String)>> {
    let mut files = Vec::new();
    for kind in [Curve::Sizes, Curve::Connections] {
        let points: Vec<&Outcome> = outcomes.iter().filter(|outcome| is_point_of(outcome, kind)).collect();
        if points.len() > 1 {
            let drawing = draw(kind, &points)?;
            files.push((format!("{}.svg", kind.name()), standalone(&drawing.svg, &drawing.lines, COLOURS)));
        }
    }
    Ok(files)
}

fn draw(kind: Curve, points: &[&Outcome]) -> Result<Drawing> {
    let (title, question, axes) = match kind {
        Curve::Sizes => (
            "Small and large messages",
            "Messages from 16 bytes to 16 MiB over one connection: how many bytes arrive in a second?",
            Axes {
                step: 16.0,
                across: "bytes of a message",
                up: "GB/s",
                across_text: |value| indicatif::BinaryBytes(value.round() as u64).to_string().replace(".00", ""),
                up_text: |value| format!("{:.1}", value / 1e9),
            },
        ),
        Curve::Connections => (
            "Few and many connections",
            "Messages of 110 bytes over 1 to 4,096 connections at a time: how many arrive in a second, over all of them?",
            Axes {
                step: 4.0,
                across: "connections",
                up: "million messages/s",
                across_text: |value| format!("{value:.0}"),
                up_text: |value| format!("{:.0}", value / 1e6),
            },
        ),
    };
    let mut lines: Vec<Line> = Vec::new();
    for outcome in points {
        let at = outcome.case.curve.map_or(0, |(_, at)| at) as f64;
        for row in outcome.rows() {
            match lines.iter_mut().find(|line| line.system == row.system) {
                Some(line) => line.points.push((at, row.median)),
                None => lines.push(Line { system: row.system, points: vec![(at, row.median)] }),
            }
        }
    }
    let svg = curve(&lines, &axes, title)?;
    Ok(Drawing { title, question, lines, svg })
}

fn lines(page: &mut String, kind: Curve, points: &[&Outcome]) -> Result<()> {
    let Drawing { title, question, lines, svg } = draw(kind, points)?;
    let name = kind.name();
    write!(
        page,
        "<section id=\"{name}\"><h2>{title} <span class=\"tag\">{name}</span></h2>\n<p>{question}</p>\n<figure>"
    )?;
    page.push_str("<p class=\"legend\">");
    for line in &lines {
        write!(page, "<span><i style=\"background:var(--{0})\"></i>{0}</span>", line.system)?;
    }
    page.push_str("</p>");
    page.push_str(&svg);
    page.push_str("</figure>\n");
    for outcome in points {
        for (system, why) in outcome.failures() {
            let (name, system, why) = (&outcome.case.name, escape(system), escape(why));
            writeln!(page, "<p class=\"failed\">{name}: {system} failed: {why}</p>")?;
        }
    }
    let rows: Vec<Row> = points.iter().flat_map(|outcome| outcome.rows()).collect();
    figures(page, &rows.iter().collect::<Vec<_>>(), points[0].case.unit)?;
    page.push_str("</section>\n");
    Ok(())
}

/// Who took part and how it was set up, and who was not there.
fn systems(page: &mut String, machine: &Machine, outcomes: &[Outcome]) -> Result<()> {
    page.push_str("<section id=\"systems\"><h2>The systems and their settings</h2>\n<dl>");
    let took_part = |name: &str| outcomes.iter().flat_map(|outcome| &outcome.case.lanes).any(|lane| lane.name == name);
    for system in SYSTEMS.iter().filter(|system| system.runner.is_some() && took_part(system.name)) {
        writeln!(
            page,
            "<dt><i style=\"background:var(--{0})\"></i>{0} <span class=\"tag\">{1}</span></dt><dd>{2}.<br>\
             <span class=\"note\">{3}.</span></dd>",
            system.name,
            escape(&(system.version)()),
            escape(system.about),
            escape(system.settings)
        )?;
    }
    for absent in &machine.absent {
        writeln!(page, "<dt>{}</dt><dd>absent: {}.</dd>", escape(absent.system), escape(&absent.why))?;
    }
    page.push_str("</dl></section>\n");
    Ok(())
}

/// Of the systems, by day and by night.
const COLOURS: &str = r#":root {
  color-scheme: light dark;
  --paper: #fcfcfa; --ink: #1b1d1f; --soft: #5d646b; --grid: #d9dcdf; --range: #1b1d1f;
  --raw: #a9b0b7; --buffstreams: #0b62c4; --buffstreams-prost: #5b9be6; --buffstreams-acked: #0a4a94; --buffstreams-tls: #0a4a94; --raw-tls: #a9b0b7; --buffstreams-1-task: #5b9be6;
  --tokio-codec: #c25d12; --tokio-codec-send: #e2a472; --protosocket: #2d8a57; --protosocket-channel: #86c3a1;
  --zeromq: #8a4fb0; --tonic: #b8324f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e8eaec; --soft: #a2abb3; --grid: #343a40; --range: #e8eaec;
    --raw: #6d767f; --buffstreams: #4c9bf5; --buffstreams-prost: #2c639f; --buffstreams-acked: #8cc0fa; --buffstreams-tls: #8cc0fa; --raw-tls: #6d767f; --buffstreams-1-task: #2c639f;
    --tokio-codec: #e08a45; --tokio-codec-send: #8d562a; --protosocket: #4fb37d; --protosocket-channel: #2f6d4b;
    --zeromq: #b483d6; --tonic: #e36a83;
  }
}"#;

const HEAD: &str = r#"<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>BuffStreams beside its peers</title>
<style>
/*colours*/
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 780px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .3rem; }
p { margin: .4rem 0; }
.headline { font-size: 1.15rem; border-left: 4px solid var(--buffstreams); padding-left: 14px; margin: 1.2rem 0; }
.machine, .note, figcaption, summary { color: var(--soft); font-size: .88rem; }
.machine { margin-top: 1rem; }
.tag { color: var(--soft); font-weight: 400; font-size: .85rem; margin-left: .4em; }
.failed { color: var(--tonic); }
figure { margin: 1rem 0 .4rem; overflow-x: auto; }
figcaption { margin-top: .2rem; }
svg { display: block; width: 100%; min-width: 560px; height: auto; }
svg text { font-family: system-ui, sans-serif; font-size: 13px; fill: currentColor; }
svg text.name, svg text.value { dominant-baseline: central; }
svg .range { stroke: var(--range); stroke-width: 1.5; opacity: .75; }
.legend span { margin-right: 1.2em; font-size: .9rem; white-space: nowrap; }
.legend i, dt i { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .45em; }
summary { cursor: pointer; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 500; color: var(--soft); }
code { font-size: .85rem; overflow-wrap: anywhere; }
dt { font-weight: 600; margin-top: 1rem; }
dd { margin: 0; overflow-wrap: anywhere; }
</style></head><body><main>
"#;

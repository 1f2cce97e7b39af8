//! The program as its users meet it: the real binary and its real workers, with few messages.
#![cfg(unix)]
#![allow(missing_docs)]

use std::process::{Command, Output};

use serde_json::Value;

/// So many messages that a run takes a moment.
const FEW: &str = "0.0005";

fn compare(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_compare")).args(arguments).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_systems_that_need_no_peer_are_measured_in_every_quick_case() {
    let folder = tempfile::tempdir().unwrap();
    let (json, html) = (folder.path().join("out.json"), folder.path().join("out.html"));
    let files = ["--json", json.to_str().unwrap(), "--html", html.to_str().unwrap()];
    let systems = ["--system", "raw", "--system", "buffstreams", "--system", "tokio-codec"];
    let output = compare(&[&["--quick", "--runs", "1", "--scale", FEW], &systems[..], &files[..]].concat());
    assert!(output.status.success(), "{output:?}");

    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert!(report["machine"]["cores"].as_u64().unwrap() > 0);
    let rows = report["rows"].as_array().unwrap();
    for case in ["p1", "p2", "p3", "p4", "p5", "p6", "p6-p99"] {
        for system in ["raw", "buffstreams"] {
            let row = rows.iter().find(|row| row["case"] == case && row["system"] == system);
            let row = row.unwrap_or_else(|| panic!("{case} lacks {system}"));
            assert!(row["median"].as_f64().unwrap() > 0.0, "{row}");
            assert!(row["ratio_to_raw"].as_f64().unwrap() > 0.0, "{row}");
        }
    }
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("tokio-codec"));
}

#[test]
fn messages_over_tls_are_measured_beside_a_bare_tls_stream() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("out.json");
    let systems = ["--case", "p10", "--system", "raw-tls", "--system", "buffstreams-tls"];
    let output = compare(&[&systems[..], &["--runs", "1", "--scale", FEW, "--json", json.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    for system in ["raw-tls", "buffstreams-tls"] {
        let row = rows.iter().find(|row| row["case"] == "p10" && row["system"] == system);
        let row = row.unwrap_or_else(|| panic!("{system} was not measured"));
        assert!(row["median"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[test]
fn a_curve_can_be_had_as_a_picture_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let pictures = folder.path().join("made/for/them");
    let points = ["--case", "connections-1", "--case", "connections-4", "--system", "raw", "--system", "buffstreams"];
    let few = ["--runs", "1", "--scale", FEW, "--pictures", pictures.to_str().unwrap()];
    let output = compare(&[&points[..], &few[..]].concat());
    assert!(output.status.success(), "{output:?}");
    let picture = std::fs::read_to_string(pictures.join("connections.svg")).unwrap();
    assert!(picture.starts_with("<svg xmlns") && picture.contains("buffstreams") && picture.ends_with("</svg>\n"));
    assert!(!pictures.join("sizes.svg").exists(), "nothing was measured for it");
}

#[test]
fn a_row_says_what_scripts_rely_on() {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("out.json");
    let json_path = json.to_str().unwrap();
    let output = compare(&["--case", "p1", "--system", "raw", "--runs", "2", "--scale", FEW, "--json", json_path]);
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!(report.as_object().unwrap().keys().collect::<Vec<_>>(), ["machine", "rows"]);
    let row = report["rows"][0].as_object().unwrap();
    let mut keys: Vec<&str> = row.keys().map(String::as_str).collect();
    let mut asked = [
        "case",
        "system",
        "version",
        "unit",
        "median",
        "min",
        "max",
        "runs",
        "ratio_to_raw",
        "sender_cpu_ns",
        "receiver_cpu_ns",
        "sender_rss_kib",
        "receiver_rss_kib",
    ];
    keys.sort_unstable();
    asked.sort_unstable();
    assert_eq!(keys, asked);
    assert_eq!(row["case"], "p1");
    assert_eq!(row["unit"], "msg/s");
    assert_eq!(row["runs"], 2);
    assert_eq!(row["ratio_to_raw"], 1.0);
}

#[test]
fn protobuf_and_idle_connections_are_measured_too() {
    let systems =
        ["raw", "buffstreams", "buffstreams-prost", "tokio-codec"].map(|system| ["--system", system]).concat();
    let cases = ["--case", "p7", "--case", "p8", "--case", "connections-64"];
    let output = compare(&[&["--runs", "1", "--scale", "0.005"], &cases[..], &systems].concat());
    assert!(output.status.success(), "{output:?}");
    let table = stdout(&output);
    assert!(table.contains("buffstreams-prost") && table.contains("KiB"), "{table}");
}

#[test]
fn a_lost_or_an_added_message_is_an_error_and_not_a_figure() {
    for (miscount, said) in [("-1", "messages were expected"), ("1", "messages were expected")] {
        let systems = ["raw", "buffstreams", "tokio-codec"].map(|system| ["--system", system]).concat();
        let arguments = ["--case", "p1", "--runs", "1", "--scale", FEW, "--miscount", miscount];
        let output = compare(&[&arguments[..], &systems].concat());
        assert!(!output.status.success(), "{output:?}");
        let table = stdout(&output);
        assert_eq!(table.matches("FAILED").count(), 3, "{table}");
        assert_eq!(table.matches(said).count(), 3, "{table}");
        assert!(!table.contains("M/s"), "{table}");
    }
}

#[test]
fn a_peer_that_was_not_built_in_is_reported_as_absent() {
    let output = compare(&["--case", "p1", "--system", "raw", "--system", "zeromq", "--runs", "1", "--scale", FEW]);
    let table = stdout(&output);
    let absent = table.contains("zeromq: absent");
    assert_eq!(absent, !cfg!(feature = "zeromq"), "{table}");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn an_unknown_case_is_refused() {
    let output = compare(&["--case", "p99"]);
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no case p99"));
}

//! Messages of schemas that this project did not make: see the README of each folder in `tests/data`.

use serde_json::Value;

use crate::program::{Program, data};
use crate::reconnect::account;
use crate::wire::delimited;

/// A schema, and a message of it as its makers ship it.
struct Sample {
    folder: &'static str,
    protos: Vec<&'static str>,
    message_type: &'static str,
    name: &'static str,
}

fn samples() -> Vec<Sample> {
    let sample = |folder, protos: &[&'static str], message_type, name| Sample {
        folder,
        protos: protos.to_vec(),
        message_type,
        name,
    };
    vec![
        sample(
            "opentelemetry",
            &["opentelemetry/proto/collector/trace/v1/trace_service.proto"],
            "opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest",
            "trace",
        ),
        sample(
            "opentelemetry",
            &["opentelemetry/proto/collector/metrics/v1/metrics_service.proto"],
            "opentelemetry.proto.collector.metrics.v1.ExportMetricsServiceRequest",
            "metrics",
        ),
        sample(
            "opentelemetry",
            &["opentelemetry/proto/collector/logs/v1/logs_service.proto"],
            "opentelemetry.proto.collector.logs.v1.ExportLogsServiceRequest",
            "logs",
        ),
        sample(
            "opentelemetry",
            &["opentelemetry/proto/collector/logs/v1/logs_service.proto"],
            "opentelemetry.proto.collector.logs.v1.ExportLogsServiceRequest",
            "events",
        ),
        sample(
            "googleapis",
            &["google/gapic/metadata/gapic_metadata.proto"],
            "google.gapic.metadata.GapicMetadata",
            "gapic_metadata",
        ),
        sample(
            "googleapis",
            &["google/rpc/status.proto", "google/rpc/error_details.proto"],
            "google.rpc.Status",
            "status",
        ),
        sample(
            "googleapis",
            &["google/rpc/context/attribute_context.proto", "google/protobuf/wrappers.proto"],
            "google.rpc.context.AttributeContext",
            "attribute_context",
        ),
    ]
}

impl Sample {
    fn options(&self) -> Vec<String> {
        let mut options = vec!["--type".into(), self.message_type.into(), "--include".into(), data(self.folder)];
        for proto in &self.protos {
            options.extend(["--proto".into(), (*proto).into()]);
        }
        options
    }

    fn shipped(&self) -> Value {
        read(&data(&format!("{}/examples/{}.json", self.folder, self.name)))
    }

    fn expected(&self) -> Value {
        read(&data(&format!("{}/expected/{}.json", self.folder, self.name)))
    }
}

fn read(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// JSON has one kind of number, so 5 is 5.0.
fn same(left: &Value, right: &Value) -> bool {
    match (left, right) {
        (Value::Number(left), Value::Number(right)) => left.as_f64() == right.as_f64(),
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(left, right)| same(left, right))
        }
        (Value::Object(left), Value::Object(right)) => {
            left.len() == right.len()
                && left.iter().all(|(key, left)| right.get(key).is_some_and(|right| same(left, right)))
        }
        _ => left == right,
    }
}

fn through(options: &[String], input: &[u8], messages: usize) -> Vec<Value> {
    let listening = ["listen", "127.0.0.1:0", "--output", "json", "--count", &messages.to_string()].map(String::from);
    let listener = Program::start(listening.iter().chain(options));
    let sending = ["send", &listener.address(), "--input", "json"].map(String::from);
    let sent = Program::run(sending.iter().chain(options), input);
    assert_eq!(sent.last_line(), format!("accepted {messages}, settled {messages}, failed 0"), "{}", sent.stderr);
    let listened = listener.end();
    assert_eq!(listened.code(), Some(0), "{}", listened.stderr);
    let lines = listened.stdout.split_inclusive(|byte| *byte == b'\n');
    let values: Vec<Value> = lines.map(|line| serde_json::from_slice(line).unwrap()).collect();
    assert_eq!(values.len(), messages, "one object a line");
    values
}

/// `expected` was printed by another implementation of the mapping, from the same `examples`.
#[test]
fn what_others_ship_comes_out_as_their_own_libraries_print_it() {
    for sample in samples() {
        let (shipped, expected) = (sample.shipped(), sample.expected());
        let input = format!("{shipped}\n{expected}\n");
        for (what, value) in ["shipped", "expected"].iter().zip(through(&sample.options(), input.as_bytes(), 2)) {
            assert!(same(&value, &expected), "{} {what}: {value:#}\nexpected {expected:#}", sample.name);
        }
    }
}

/// A recorded message of GTFS Realtime, not one that this program encoded.
#[test]
fn a_recorded_message_is_read_as_its_makers_read_it() {
    let (listener, address) = Program::listen(&[
        "--proto",
        &data("gtfs-realtime/gtfs-realtime.proto"),
        "--type",
        "transit_realtime.FeedMessage",
        "--count",
        "1",
    ]);
    let recorded = std::fs::read(data("gtfs-realtime/vehicle_position.pb")).unwrap();
    Program::run(["send", &address, "--input", "delimited"], &delimited([&recorded]));
    let printed: Value = serde_json::from_slice(&listener.end().stdout).unwrap();
    let expected = read(&data("gtfs-realtime/expected/vehicle_position.json"));
    assert!(same(&printed, &expected), "{printed:#}");

    // And back: the JSON encodes to the recorded bytes.
    let (listener, address) = Program::listen(&["--output", "delimited", "--count", "1"]);
    let proto = data("gtfs-realtime/gtfs-realtime.proto");
    let line = format!("{expected}\n");
    Program::run(["send", &address, "--proto", &proto, "--type", "transit_realtime.FeedMessage"], line.as_bytes());
    assert_eq!(listener.end().stdout, delimited([&recorded]));
}

#[test]
fn a_message_that_does_not_decode_is_reported_and_counted_and_skipped_and_settled() {
    for delivery in ["sent", "acked"] {
        let (listener, address) = Program::listen(&[
            "--proto",
            &data("gtfs-realtime/gtfs-realtime.proto"),
            "--type",
            "transit_realtime.FeedHeader",
            "--output",
            "json",
            "--count",
            "2",
        ]);
        let messages: [&[u8]; 4] = [b"\x0a\x032.0", b"\x0a\x7f", b"\xff\xff", b""];
        let options = ["--input", "delimited", "--delivery", delivery];
        let sent = Program::run(["send", &address].iter().chain(&options), &delimited(messages));
        assert_eq!((sent.code(), account(&sent)), (Some(0), [4, 4, 0]), "{}", sent.stderr);
        let listened = listener.end();
        assert_eq!(listened.stdout, b"{\"gtfsRealtimeVersion\":\"2.0\"}\n{}\n");
        assert_eq!(listened.errors().len(), 2, "{}", listened.stderr);
        assert!(listened.errors()[0].contains("2 bytes"), "{}", listened.stderr);
        assert!(listened.stderr.contains("2 messages could not be decoded\n"), "{}", listened.stderr);
        assert_eq!(listened.last_line(), "received 4 messages, 9 bytes");
        assert_eq!(listened.code(), Some(0));
    }
}

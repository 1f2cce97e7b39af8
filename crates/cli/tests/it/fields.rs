use std::fs;

use crate::program::{Program, data};
use crate::wire::{self, u8_frames};

#[test]
fn listen_shows_any_protobuf_message_by_the_numbers_of_its_fields() {
    let (listener, address) = Program::listen(&["--framing", "u8", "--output", "fields", "--count", "4"]);
    let messages: [&[u8]; 4] =
        [b"\x08\x96\x01\x12\x03abc", b"\x0a\x0b\x0a\x032.0\x18\xfc\x87\xbd\xe4\x04", b"", b"no protobuf"];
    wire::deliver(&address, &u8_frames(messages));
    let printed = String::from_utf8(listener.end().stdout).unwrap();
    assert_eq!(printed, "1: 150 2: {\"abc\"}\n1: {1: {\"2.0\"} 3: 1284457468}\n\nnot protobuf: \"no protobuf\"\n");
}

#[test]
fn a_real_message_is_shown_with_everything_in_it() {
    let (listener, address) = Program::listen(&["--output", "fields", "--count", "1"]);
    let proto = "opentelemetry/proto/collector/trace/v1/trace_service.proto";
    let message_type = "opentelemetry.proto.collector.trace.v1.ExportTraceServiceRequest";
    let include = data("opentelemetry");
    let sample = fs::read_to_string(data("opentelemetry/examples/trace.json")).unwrap().replace('\n', " ");
    let options = ["--input", "json", "--proto", proto, "--include", &include, "--type", message_type];
    let sent = Program::run(["send", &address].iter().chain(&options), sample.as_bytes());
    assert_eq!(sent.code(), Some(0), "{}", sent.stderr);
    let printed = String::from_utf8(listener.end().stdout).unwrap();
    assert_eq!(
        printed,
        "1: {1: {1: {1: {\"service.name\"} 2: {1: {\"my.service\"}}}} 2: {1: {1: {\"my.library\"} 2: {\"1.0.0\"} \
         3: {1: {\"my.scope.attribute\"} 2: {1: {\"some scope attribute\"}}}} \
         2: {1: {`e41f0414517bf7cd37f35d370f6ebd07adf7f35dc50bad02`} 2: {`104135f41ec40b70b5075ef8`} \
         4: {`104135f41ec40b70b5075ef7`} 5: {\"I'm a server span\"} 6: 2 7: 1544712660000000000i64 \
         8: 1544712661000000000i64 9: {1: {\"my.span.attr\"} 2: {1: {\"some value\"}}}}}}\n"
    );
}

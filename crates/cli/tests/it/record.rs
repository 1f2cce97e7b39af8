//! `record`, `replay` and `export`.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::thread;

use crate::program::{Ended, Folder, Program, Signal, data, text};
use crate::reconnect::account;
use crate::tls::authority;
use crate::wire::{self, delimited, u8_frames, undelimited};

/// A `record` that is ready.
fn record(file: &str, options: &[&str]) -> (Program, String) {
    let program = Program::start(["record", "127.0.0.1:0", file].iter().chain(options));
    let address = program.address();
    (program, address)
}

fn stop(program: Program) -> Ended {
    program.signal(Signal::INT);
    let ended = program.end();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    ended
}

fn export(file: &str, options: &[&str]) -> Ended {
    Program::run(["export", file].iter().chain(options), b"")
}

fn lines(range: std::ops::Range<u32>) -> Vec<u8> {
    range.map(|number| format!("{number}\n")).collect::<String>().into_bytes()
}

#[test]
fn what_was_sent_is_exported_in_every_form() {
    let folder = Folder::new();
    let file = text(&folder.path("sample.rec"));
    let messages: [&[u8]; 4] = [b"one", b"", b"\x08\x96\x01", b"\n"];
    let (recorder, address) = record(&file, &["--framing", "u8", "--count", "4"]);
    wire::deliver(&address, &u8_frames(messages));
    let ended = recorder.end();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    assert_eq!(ended.last_line(), "received 4 messages, 7 bytes");
    assert_eq!(ended.stdout, b"");
    let cases: [(&[&str], &[u8]); 5] = [
        (&[], b"\x03one\x00\x03\x08\x96\x01\x01\n"),
        (&["--output", "delimited"], b"\x03one\x00\x03\x08\x96\x01\x01\n"),
        (&["--output", "lines"], b"one\n\n\x08\x96\x01\n\n\n"),
        (&["--output", "hex"], b"6f6e65\n\n089601\n0a\n"),
        (&["--output", "fields"], b"not protobuf: \"one\"\n\n1: 150\nnot protobuf: \"\\n\"\n"),
    ];
    for (options, expected) in cases {
        let ended = export(&file, options);
        assert_eq!(ended.stdout, expected, "{options:?}");
        assert_eq!((ended.code(), ended.stderr.as_str()), (Some(0), ""), "{options:?}");
    }
}

#[test]
fn a_recording_is_counted_where_no_output_is_wanted_and_read_from_standard_input() {
    let folder = Folder::new();
    let file = text(&folder.path("a.rec"));
    let (recorder, address) = record(&file, &["--framing", "u8", "--count", "3"]);
    wire::deliver(&address, &u8_frames(["one", "two"]));
    wire::deliver(&address, &u8_frames(["three"]));
    recorder.end();
    let recording = fs::read(&file).unwrap();
    let counted = Program::run(["export", "-", "--output", "none"], &recording);
    assert_eq!((counted.code(), &counted.stdout[..]), (Some(0), &b""[..]), "{}", counted.stderr);
    let said = counted.last_line();
    assert!(said.starts_with("3 messages, 11 bytes from 2 senders within "), "{said}");
    assert!(said.contains(", beginning at 2"), "{said}");
    assert_eq!(Program::run(["export", "-"], &recording).stdout, export(&file, &[]).stdout);

    let torn = Program::run(["export", "-", "--output", "none"], &recording[..recording.len() - 1]);
    assert!(torn.stderr.starts_with("standard input: the last "), "{}", torn.stderr);
    let none = Program::run(["export", "-"], b"");
    assert_eq!(
        (none.code(), none.last_line()),
        (Some(1), "error: standard input: not a recording of `buffstreams record`")
    );
}

#[test]
fn a_recording_is_read_by_its_schema_alone() {
    let folder = Folder::new();
    let (file, schema) = (text(&folder.path("sample.rec")), text(&folder.path("recording.proto")));
    let help = Program::run(["record", "--help"], b"");
    let help = String::from_utf8(help.stdout).unwrap();
    let start = help.find("syntax = ").expect("the help has the schema");
    fs::write(&schema, &help[start..]).unwrap();
    let (recorder, address) = record(&file, &["--framing", "u8", "--count", "1"]);
    wire::deliver(&address, &u8_frames(["hello"]));
    recorder.end();
    // The entries of the recording are themselves messages that can be sent.
    let (listener, address) =
        Program::listen(&["--output", "json", "--proto", &schema, "--type", "buffstreams.recording.Entry"]);
    let sent = Program::run(["send", &address, &file, "--input", "delimited"], b"");
    assert_eq!(account(&sent), [4, 4, 0], "{}", sent.stderr);
    listener.wait_lines(4);
    let printed = String::from_utf8(stop(listener).stdout).unwrap();
    let lines: Vec<&str> = printed.lines().collect();
    assert!(lines[0].contains(r#""magic":"buffstreams recording","version":1,"framing":"u8","maxMessageSize":"255""#));
    assert!(
        lines[1].contains(r#"{"opened":{"connection":"#) && lines[1].contains(r#""peer":"127.0.0.1:"#),
        "{printed}"
    );
    assert!(lines[2].contains(r#"{"received":{"connection":"#) && lines[2].ends_with(r#""message":"aGVsbG8="}}"#));
    assert!(lines[3].contains(r#"{"closed":{"connection":"#), "{printed}");
}

#[test]
fn acknowledged_messages_are_in_the_file_when_they_are_settled_over_kill_9_of_the_recorder() {
    const LINES: u32 = 40_000;
    let folder = Folder::new();
    let files = ["first.rec", "second.rec"].map(|name| text(&folder.path(name)));
    let (recorder, address) = record(&files[0], &[]);
    let mut sender = Program::start(["send", &address, "--delivery", "acked"]);
    let mut stdin = sender.take_stdin();
    let writer = thread::spawn(move || stdin.write_all(&lines(0..LINES)).unwrap());
    while fs::metadata(&files[0]).unwrap().len() < 10_000 {
        thread::yield_now();
    }
    recorder.signal(Signal::KILL);
    recorder.end();
    let second = Program::start(["record", &address, &files[1]]);
    second.address();
    let sent = sender.end();
    writer.join().unwrap();
    assert_eq!(sent.last_line(), format!("accepted {LINES}, settled {LINES}, failed 0"), "{}", sent.stderr);
    stop(second);
    let mut numbers: Vec<u32> = Vec::new();
    for file in &files {
        let ended = export(file, &["--output", "lines"]);
        assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
        numbers.extend(String::from_utf8(ended.stdout).unwrap().lines().map(|line| line.parse::<u32>().unwrap()));
    }
    numbers.sort_unstable();
    numbers.dedup();
    assert!(numbers.into_iter().eq(0..LINES), "a settled line is in no recording");
}

#[test]
fn a_recording_that_was_cut_off_is_read_to_its_last_whole_entry_and_that_is_told() {
    let folder = Folder::new();
    let file = text(&folder.path("sample.rec"));
    let (recorder, address) = record(&file, &["--count", "3"]);
    Program::run(["send", &address], b"one\ntwo\nthree\n");
    recorder.end();
    let whole = fs::read(&file).unwrap();
    let at = whole.windows(5).rposition(|bytes| bytes == b"three").unwrap();
    fs::write(&file, &whole[..at + 2]).unwrap();
    let ended = export(&file, &["--output", "lines"]);
    assert_eq!((ended.code(), &*ended.stdout), (Some(0), &b"one\ntwo\n"[..]));
    assert!(ended.stderr.contains("a part of an entry and were left out"), "{}", ended.stderr);
    let (listener, address) = Program::listen(&[]);
    let ended = Program::run(["replay", &file, &address], b"");
    assert_eq!((ended.code(), account(&ended)), (Some(0), [2, 2, 0]));
    assert!(ended.stderr.contains("a part of an entry and were left out"), "{}", ended.stderr);
    assert_eq!(stop(listener).stdout, b"one\ntwo\n");
}

#[test]
fn what_is_damaged_or_no_recording_ends_it_with_1_and_says_so() {
    let folder = Folder::new();
    let no_recording = folder.file("notes.txt", b"hello\n");
    for command in [&["export", &no_recording][..], &["replay", &no_recording, ":1"]] {
        let ended = Program::run(command, b"");
        assert_eq!(ended.code(), Some(1));
        assert!(ended.stderr.contains("notes.txt: not a recording of `buffstreams record`"), "{}", ended.stderr);
    }
    let missing = export("nowhere.rec", &[]);
    assert_eq!(missing.code(), Some(1));
    assert!(missing.stderr.contains("nowhere.rec"), "{}", missing.stderr);

    let file = text(&folder.path("sample.rec"));
    let (recorder, address) = record(&file, &["--count", "2"]);
    Program::run(["send", &address], b"one\ntwo\n");
    recorder.end();
    let mut damaged = fs::read(&file).unwrap();
    let at = damaged.windows(3).position(|bytes| bytes == b"two").unwrap();
    damaged[at - 1] = 0xff;
    fs::write(&file, damaged).unwrap();
    let ended = export(&file, &["--output", "lines"]);
    assert_eq!((ended.code(), &*ended.stdout), (Some(1), &b"one\n"[..]));
    assert!(ended.stderr.contains("is damaged behind byte "), "{}", ended.stderr);
}

#[test]
fn a_file_that_exists_is_not_replaced_unless_that_is_asked_for() {
    let folder = Folder::new();
    let file = folder.file("precious", b"data");
    let ended = Program::run(["record", "127.0.0.1:0", &file], b"");
    assert_eq!(ended.code(), Some(1));
    assert!(ended.stderr.contains("precious: the file exists") && ended.stderr.contains("--force"), "{}", ended.stderr);
    assert_eq!(fs::read(&file).unwrap(), b"data");
    let (recorder, _) = record(&file, &["--force"]);
    stop(recorder);
    assert_eq!(export(&file, &[]).stdout, b"");
    // What could not begin leaves nothing behind.
    let (listener, address) = wire::bind();
    let other = text(&folder.path("other.rec"));
    let ended = Program::run(["record", &address, &other], b"");
    assert_eq!(ended.code(), Some(1));
    assert!(!fs::exists(&other).unwrap());
    // Nor does it take away what was there.
    let ended = Program::run(["record", &address, &file, "--force"], b"");
    assert_eq!(ended.code(), Some(1));
    assert!(!fs::read(&file).unwrap().is_empty());
    drop(listener);
}

#[test]
fn a_disk_that_takes_no_more_ends_it_with_1() {
    if !fs::metadata("/dev/full").is_ok_and(|metadata| metadata.file_type().is_char_device()) {
        return;
    }
    let ended = Program::run(["record", "127.0.0.1:0", "/dev/full", "--force"], b"");
    assert_eq!(ended.code(), Some(1));
    assert!(ended.stderr.contains("/dev/full: "), "{}", ended.stderr);
}

#[cfg(target_os = "linux")]
#[test]
fn what_was_settled_before_the_disk_was_full_is_whole_in_the_recording_and_nothing_else() {
    let folder = Folder::new();
    let (new, old) = (text(&folder.path("new.rec")), folder.file("old.rec", &[0; 90_000]));
    for (file, options) in [(&new, &[][..]), (&old, &["--force"])] {
        let recorder = Program::start_on_full_disk(100, ["record", "127.0.0.1:0", file].iter().chain(options));
        let options = ["--delivery", "acked", "--retry-for", "0"];
        let sent = Program::run(["send", &recorder.address()].iter().chain(&options), &lines(0..50_000));
        let recorded = recorder.end();
        assert_eq!(recorded.code(), Some(1));
        assert!(recorded.stderr.contains(&format!("error: {file}: ")), "{}", recorded.stderr);
        let [_, settled, _] = account(&sent);
        assert!((1..50_000).contains(&settled), "{}", sent.last_line());
        let exported = export(file, &["--output", "lines"]);
        assert_eq!((exported.code(), &*exported.stderr), (Some(0), ""), "it ends at a whole entry");
        let count = exported.stdout.iter().filter(|byte| **byte == b'\n').count() as u64;
        assert!(exported.stdout == lines(0..count as u32));
        assert!(recorded.last_line().starts_with(&format!("received {count} messages, ")), "{}", recorded.stderr);
        // The last acknowledgement may not have come.
        assert!(count >= settled, "{count} of {}", sent.last_line());
    }
}

/// A recording of connections with these messages, one after the other, each from a sender of its own.
fn recording(folder: &Folder, connections: &[Vec<u8>]) -> String {
    let file = text(&folder.path("sample.rec"));
    let (recorder, address) = record(&file, &["--framing", "varint", "--max-message-size", "64KiB"]);
    for (index, lines) in connections.iter().enumerate() {
        let delivery = if index % 2 == 0 { "sent" } else { "acked" };
        let options = ["--framing", "varint", "--max-message-size", "64KiB", "--delivery", delivery];
        let sent = Program::run(["send", &address].iter().chain(&options), lines);
        assert_eq!(sent.code(), Some(0), "{}", sent.stderr);
    }
    stop(recorder);
    file
}

#[test]
fn a_recording_is_sent_again_whole_and_in_order_over_as_many_connections() {
    let folder = Folder::new();
    let file = recording(&folder, &[lines(0..5000), lines(10_000..15_000), lines(20_000..20_001)]);
    let expected: Vec<Vec<u8>> = [0..5000, 10_000..15_000, 20_000..20_001]
        .into_iter()
        .flat_map(|range| range.map(|number: u32| number.to_string().into_bytes()))
        .collect();
    assert!(undelimited(&export(&file, &[]).stdout) == expected);
    for options in [
        &["--speed", "max"][..],
        &["--speed", "1000x", "--one-connection"],
        &["--speed", "max", "--delivery", "acked"],
        &["--speed", "max", "--framing", "u16be"],
    ] {
        let framing = if options.contains(&"u16be") { "u16be" } else { "varint" };
        let again = text(&folder.path("again.rec"));
        let max = ["--framing", framing, "--max-message-size", "4096", "--force"];
        let (recorder, address) = record(&again, &[&max[..], &["--count", "10001"]].concat());
        let ended = Program::run(["replay", &file, &address].iter().chain(options), b"");
        if options.contains(&"acked") {
            // The maximum of the recording is more than this recorder takes, and it says so.
            assert_eq!(ended.code(), Some(1), "{}", ended.stderr);
            assert!(ended.stderr.contains("--delivery acked was not granted"), "{}", ended.stderr);
            recorder.signal(Signal::KILL);
            continue;
        }
        assert_eq!(ended.code(), Some(0), "{options:?}: {}", ended.stderr);
        assert_eq!(account(&ended), [10_001, 10_001, 0]);
        recorder.end();
        let got = undelimited(&export(&again, &[]).stdout);
        // Connections overlap here where they were one after the other there, but each keeps its order.
        for range in [0..5000_u32, 10_000..15_000, 20_000..20_001] {
            let of = |message: &&Vec<u8>| range.contains(&std::str::from_utf8(message).unwrap().parse().unwrap());
            assert!(got.iter().filter(of).eq(expected.iter().filter(of)), "{options:?}");
        }
        if options.contains(&"--one-connection") {
            assert!(got == expected);
        }
    }
}

#[test]
fn what_is_not_said_of_the_wire_of_a_replay_is_as_it_was_recorded() {
    let folder = Folder::new();
    let file = text(&folder.path("sample.rec"));
    // In the framing `buffstreams`, the maximum decides how wide the prefixes are.
    let wire = ["--max-message-size", "1MiB"];
    let (recorder, address) = record(&file, &[&wire[..], &["--count", "1"]].concat());
    wire::deliver(&address, b"\x0a\0\0\0hello");
    recorder.end();
    let cases: [(&[&str], &[&str]); 5] = [
        (&wire, &[]),
        (&wire, &["--framing", "buffstreams"]),
        (&["--max-message-size", "4096"], &["--max-message-size", "4096"]),
        (&["--framing", "u8"], &["--framing", "u8"]),
        (&["--framing", "u16be", "--max-message-size", "9"], &["--framing", "u16be", "--max-message-size", "9"]),
    ];
    for (listening, replaying) in cases {
        let (listener, address) = Program::listen(&[listening, &["--count", "1"]].concat());
        let ended = Program::run(["replay", &file, &address].iter().chain(replaying), b"");
        assert_eq!(account(&ended), [1, 1, 0], "{replaying:?}: {}", ended.stderr);
        assert_eq!(listener.end().stdout, b"hello\n", "{replaying:?}");
    }
}

#[test]
fn a_replay_is_acknowledged_and_survives_a_restart_of_the_listener() {
    let folder = Folder::new();
    let file = recording(&folder, &[lines(0..20_000)]);
    let printed = folder.path("printed");
    let appended = || fs::File::options().create(true).append(true).open(&printed).unwrap();
    let wire = ["--framing", "varint", "--max-message-size", "64KiB"];
    let listener = Program::start_into(appended(), ["listen", "127.0.0.1:0"].iter().chain(&wire));
    let address = listener.address();
    let replay = Program::start(["replay", &file, &address, "--speed", "max", "--delivery", "acked"]);
    while fs::metadata(&printed).unwrap().len() == 0 {
        thread::yield_now();
    }
    listener.signal(Signal::KILL);
    listener.end();
    let listener = Program::start_into(appended(), ["listen", &address].iter().chain(&wire));
    let ended = replay.end();
    assert_eq!(ended.last_line(), "accepted 20000, settled 20000, failed 0", "{}", ended.stderr);
    stop(listener);
    let text = fs::read_to_string(&printed).unwrap();
    // The kill may have torn a line.
    let mut numbers: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert!((0..20_000).all(|number| numbers.binary_search(&number).is_ok()));
}

#[test]
fn whoever_is_away_for_too_long_fails_it_and_what_was_in_hand_is_kept() {
    let folder = Folder::new();
    let file = recording(&folder, &[lines(0..3)]);
    let failed = text(&folder.path("failed"));
    let (listener, address) = wire::bind();
    drop(listener);
    let ended = Program::run(["replay", &file, &address, "--retry-for", "0", "--failed", &failed], b"");
    assert_eq!(ended.code(), Some(1));
    let [accepted, settled, failures] = account(&ended);
    assert!(accepted > 0 && settled == 0 && failures == accepted, "{}", ended.stderr);
    let kept = undelimited(&fs::read(&failed).unwrap());
    assert_eq!(kept, [b"0", b"1", b"2"][..accepted as usize]);
}

#[test]
fn an_interruption_ends_a_replay_that_reaches_nobody_without_waiting() {
    let folder = Folder::new();
    let file = text(&folder.path("sample.rec"));
    let (recorder, address) = record(&file, &["--framing", "u8", "--count", "2"]);
    wire::deliver(&address, &u8_frames(["one", "two"]));
    recorder.end();
    let nobody = format!("unix:{}", folder.path("nobody").display());
    let replay = Program::start(["replay", &file, &nobody, "--speed", "max", "--retry-for", "1h"]);
    replay.wait_stderr("that it tries", |said| String::from_utf8_lossy(said).contains("cannot connect").then_some(()));
    replay.signal(Signal::INT);
    let ended = replay.end();
    let [accepted, settled, failed] = account(&ended);
    assert_eq!((ended.code(), settled, failed), (Some(1), 0, accepted), "{}", ended.stderr);
    assert!(!ended.stderr.contains("finishing"), "there is nothing to wait for: {}", ended.stderr);
}

#[test]
fn an_interruption_ends_a_slow_replay_with_an_account() {
    let folder = Folder::new();
    let file = text(&folder.path("sample.rec"));
    let (recorder, address) = record(&file, &["--framing", "u8"]);
    let mut stream = wire::connect(&address);
    let written = |least: u64| {
        while fs::metadata(&file).unwrap().len() < least {
            thread::yield_now();
        }
        fs::metadata(&file).unwrap().len()
    };
    let head = written(1);
    stream.write_all(&u8_frames(["first"])).unwrap();
    let first = written(head + 1);
    stream.write_all(&u8_frames(["second"])).unwrap();
    written(first + 1);
    drop(stream);
    stop(recorder);
    let (listener, address) = Program::listen(&["--framing", "u8"]);
    let replay = Program::start(["replay", &file, &address, "--speed", "0.000001x"]);
    listener.wait_lines(1);
    replay.signal(Signal::INT);
    let ended = replay.end();
    assert_eq!((ended.code(), account(&ended)), (Some(1), [1, 1, 0]), "{}", ended.stderr);
    assert!(ended.stderr.contains("interrupted"), "{}", ended.stderr);
    assert_eq!(stop(listener).stdout, b"first\n");
}

#[test]
fn recordings_come_and_go_over_tls_and_unix_sockets() {
    let folder = Folder::new();
    let authority = authority();
    let [chain, key, ca] = ["server.pem", "server.key", "ca.pem"].map(|file| authority.file(file));
    let file = text(&folder.path("secret.rec"));
    let (recorder, address) = record(&file, &["--tls-cert", &chain, "--tls-key", &key, "--count", "2"]);
    let sent = Program::run(["send", &address, "--tls-ca", &ca], b"one\ntwo\n");
    assert_eq!(sent.code(), Some(0), "{}", sent.stderr);
    recorder.end();
    let (listener, address) = authority.listen("server", false);
    let ended = Program::run(["replay", &file, &address, "--tls-ca", &ca, "--delivery", "acked"], b"");
    assert_eq!(account(&ended), [2, 2, 0], "{}", ended.stderr);
    assert_eq!(stop(listener).stdout, b"one\ntwo\n");

    let socket = format!("unix:{}", text(&folder.path("socket")));
    let again = text(&folder.path("again.rec"));
    let recorder = Program::start(["record", &socket, &again]);
    assert_eq!(recorder.address(), socket);
    let ended = Program::run(["replay", &file, &socket, "--delivery", "acked"], b"");
    assert_eq!(account(&ended), [2, 2, 0], "{}", ended.stderr);
    stop(recorder);
    assert_eq!(export(&again, &["--output", "lines"]).stdout, b"one\ntwo\n");
    assert_eq!(fs::read(&again).unwrap().windows(13).filter(|bytes| bytes == b"a unix socket").count(), 1);
}

#[test]
fn a_recording_is_exported_as_json_by_its_type() {
    let folder = Folder::new();
    let file = text(&folder.path("sample.rec"));
    let gtfs = data("gtfs-realtime/gtfs-realtime.proto");
    let typed = ["--proto", &gtfs, "--type", "transit_realtime.FeedMessage"];
    let (recorder, address) = record(&file, &["--framing", "varint", "--count", "2"]);
    wire::deliver(&address, &delimited([&b"\x0a\x0b\x0a\x032.0\x18\xfc\x87\xbd\xe4\x04"[..], b"\xff"]));
    recorder.end();
    let ended = export(&file, &typed);
    assert_eq!(ended.code(), Some(1), "one cannot be decoded");
    let line = r#"{"header":{"gtfsRealtimeVersion":"2.0","timestamp":"1284457468"}}"#;
    assert_eq!(String::from_utf8(ended.stdout).unwrap(), format!("{line}\n"));
    assert!(ended.stderr.contains("1 message could not be decoded"), "{}", ended.stderr);
}

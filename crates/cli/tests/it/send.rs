use std::io::{ErrorKind, Read};
use std::time::{Duration, Instant};

use crate::program::{DEADLINE, Folder, Program, Signal, data, text};
use crate::wire::{self, delimited, undelimited};

/// Sends `input`, and gives the messages that a listener printed with how `send` ended.
fn sent(options: &[&str], input: &[u8], arrive: usize) -> (Vec<Vec<u8>>, crate::program::Ended) {
    let (listener, address) = Program::listen(&["--output", "hex"]);
    let ended = Program::run(["send", &address].iter().chain(options), input);
    listener.wait_lines(arrive);
    listener.signal(Signal::TERM);
    let printed = listener.end().stdout;
    (printed.split_inclusive(|byte| *byte == b'\n').map(unhex).collect(), ended)
}

fn unhex(line: &[u8]) -> Vec<u8> {
    let digits = line.strip_suffix(b"\n").expect("a whole line");
    let value = |digit: u8| (digit as char).to_digit(16).expect("a digit") as u8;
    digits.chunks_exact(2).map(|pair| value(pair[0]) << 4 | value(pair[1])).collect()
}

#[test]
fn a_line_is_a_message_empty_or_unfinished_and_a_carriage_return_belongs_to_it() {
    let (messages, ended) = sent(&[], b"one\n\ntwo\r\n\r\nlast", 5);
    let expected: [&[u8]; 5] = [b"one", b"", b"two\r", b"\r", b"last"];
    assert_eq!(messages, expected);
    assert_eq!(ended.stderr, "accepted 5, settled 5, failed 0\n");
    assert_eq!(ended.code(), Some(0));
    assert!(ended.stdout.is_empty());
}

#[test]
fn hex_lines_are_messages_and_an_empty_one_is_empty() {
    let (messages, ended) = sent(&["--input", "hex"], b"00ff\n\n0A0d", 3);
    let expected: [&[u8]; 3] = [b"\x00\xff", b"", b"\n\r"];
    assert_eq!(messages, expected);
    assert_eq!(ended.code(), Some(0));
}

#[test]
fn delimited_input_is_any_bytes() {
    let input: [&[u8]; 4] = [b"", b"\n", b"\x00\xff", &[b'x'; 300]];
    let (messages, ended) = sent(&["--input", "delimited"], &delimited(input), 4);
    assert_eq!(messages, input);
    assert_eq!(ended.code(), Some(0));
}

#[test]
fn an_empty_line_of_json_is_skipped() {
    let proto = data("gtfs-realtime/gtfs-realtime.proto");
    let options = ["--input", "json", "--proto", &proto, "--type", "transit_realtime.FeedHeader"];
    let (messages, ended) = sent(&options, b"\n{\"gtfsRealtimeVersion\":\"1.0\"}\n\n\n{}\n", 2);
    let expected: [&[u8]; 2] = [b"\x0a\x031.0", b""];
    assert_eq!(messages, expected);
    assert_eq!(ended.last_line(), "accepted 2, settled 2, failed 0");
}

#[test]
fn a_file_is_read_as_standard_input_is() {
    let folder = Folder::new();
    let file = folder.file("input", b"from\na file");
    let (messages, _) = sent(&[&file], b"not this", 2);
    assert_eq!(messages, ["from", "a file"].map(|text| text.as_bytes().to_vec()));
    let (messages, _) = sent(&["-"], b"from\nstandard input", 2);
    assert_eq!(messages, ["from", "standard input"].map(|text| text.as_bytes().to_vec()));
}

#[test]
fn a_file_that_is_not_there_ends_it_with_1() {
    let ended = Program::run(["send", "127.0.0.1:1", "/nowhere/at/all"], b"");
    assert_eq!(ended.code(), Some(1));
    assert!(ended.stderr.contains("/nowhere/at/all"), "{}", ended.stderr);
}

#[test]
fn what_cannot_be_sent_is_reported_and_counted_and_kept_where_it_has_bytes() {
    let folder = Folder::new();
    let failed = folder.file("failed", b"what was in it before");
    let max = ["--max-message-size", "8", "--failed", &failed];
    let (listener, address) = Program::listen(&["--max-message-size", "8", "--output", "delimited", "--count", "2"]);
    let ended =
        Program::run(["send", &address, "--input", "hex"].iter().chain(&max), b"01\nxx\n010203040506070809\n123\n02\n");
    assert_eq!(undelimited(&listener.end().stdout), [[1], [2]]);
    assert_eq!(ended.code(), Some(1));
    assert_eq!(ended.last_line(), "accepted 5, settled 2, failed 3");
    let errors = ended.errors();
    assert_eq!(errors.len(), 3, "{}", ended.stderr);
    assert!(errors[0].contains("line 2") && errors[0].contains("'x'"), "{errors:?}");
    assert!(errors[1].contains("line 3") && errors[1].contains("9 bytes") && errors[1].contains('8'), "{errors:?}");
    assert!(errors[2].contains("line 4") && errors[2].contains("odd"), "{errors:?}");
    assert_eq!(undelimited(&std::fs::read(&failed).unwrap()), [[1, 2, 3, 4, 5, 6, 7, 8, 9]]);
}

#[test]
fn a_flood_of_bad_input_is_not_a_flood_of_errors() {
    const BAD: usize = 10_000;
    let (_listener, address) = Program::listen(&[]);
    let begun = Instant::now();
    let ended = Program::run(["send", &address, "--input", "hex"], &b"xyz\n".repeat(BAD));
    let allowed = 20.0 + 20.0 * (begun.elapsed().as_secs_f64() + 1.0);
    let (counts, said): (Vec<&str>, Vec<&str>) = ended.errors().iter().partition(|line| line.contains("left out"));
    let left_out: usize =
        counts.iter().map(|line| line.split(' ').find_map(|word| word.parse().ok()).unwrap_or(0)).sum();
    assert!(said.len() as f64 <= allowed, "{} lines", said.len());
    assert_eq!(said.len() + left_out, BAD, "{}", ended.stderr);
    assert_eq!(ended.last_line(), format!("accepted {BAD}, settled 0, failed {BAD}"));
}

#[test]
fn json_that_does_not_fit_is_reported_and_counted() {
    let proto = data("gtfs-realtime/gtfs-realtime.proto");
    let folder = Folder::new();
    let failed = text(&folder.path("failed"));
    let options = ["--proto", &proto, "--type", "transit_realtime.FeedHeader", "--failed", &failed];
    let max = ["--max-message-size", "8"];
    let (listener, address) = Program::listen(&["--max-message-size", "8", "--output", "delimited", "--count", "1"]);
    let input = b"{\"nothing\":1}\n{\"gtfsRealtimeVersion\":\n{\"gtfsRealtimeVersion\":\"1234567\"}\n{}\n";
    let ended = Program::run(["send", &address].iter().chain(&options).chain(&max), input);
    assert_eq!(undelimited(&listener.end().stdout), [b""]);
    assert_eq!(ended.last_line(), "accepted 4, settled 1, failed 3");
    assert_eq!(ended.errors().len(), 3, "{}", ended.stderr);
    assert_eq!(undelimited(&std::fs::read(&failed).unwrap()), [b"\x0a\x071234567"]);
}

#[test]
fn a_line_far_over_the_maximum_is_passed_over_and_kept_whole() {
    let folder = Folder::new();
    let failed = text(&folder.path("failed"));
    let (listener, address) = Program::listen(&["--output", "delimited", "--count", "2"]);
    let long = vec![b'x'; 10_000_000];
    let input = [b"before\n", &long[..], b"\nafter\n"].concat();
    let ended = Program::run(["send", &address, "--failed", &failed], &input);
    assert_eq!(undelimited(&listener.end().stdout), ["before", "after"].map(|text| text.as_bytes().to_vec()));
    assert_eq!(ended.last_line(), "accepted 3, settled 2, failed 1");
    assert!(undelimited(&std::fs::read(&failed).unwrap()) == [long]);
}

#[test]
fn the_file_of_failed_messages_is_emptied_even_if_none_fail() {
    let folder = Folder::new();
    let failed = folder.file("failed", b"what was in it before");
    let (_, ended) = sent(&["--failed", &failed], b"hello", 1);
    assert_eq!(ended.code(), Some(0));
    assert_eq!(std::fs::read(failed).unwrap(), b"");
}

#[test]
fn its_own_input_is_not_emptied_for_failed_messages() {
    let folder = Folder::new();
    let file = folder.file("messages", b"precious\n");
    let ended = Program::run(["send", &nowhere(&folder), &file, "--failed", &file], b"");
    assert_eq!(ended.code(), Some(1));
    assert!(ended.stderr.contains("empty the input"), "{}", ended.stderr);
    assert_eq!(std::fs::read(file).unwrap(), b"precious\n");
}

#[test]
fn failed_messages_can_be_sent_again_from_their_file() {
    let folder = Folder::new();
    let failed = text(&folder.path("failed"));
    let ended = Program::run(["send", &nowhere(&folder), "--retry-for", "2s", "--failed", &failed], b"one\n\nthree\n");
    assert_eq!(ended.code(), Some(1));
    let (messages, ended) = sent(&[&failed, "--input", "delimited"], b"", 3);
    assert_eq!(messages, ["one", "", "three"].map(|text| text.as_bytes().to_vec()));
    assert_eq!(ended.code(), Some(0));
}

/// An address that nobody listens on: unlike a free port, nobody else can take it meanwhile.
fn nowhere(folder: &Folder) -> String {
    format!("unix:{}", text(&folder.path("nobody")))
}

#[test]
fn a_peer_that_stays_away_ends_it_with_1_although_input_could_still_come() {
    for retry_for in ["0", "2s"] {
        let folder = Folder::new();
        let failed = text(&folder.path("failed"));
        let mut program = Program::start(["send", &nowhere(&folder), "--retry-for", retry_for, "--failed", &failed]);
        if retry_for != "0" {
            program.write(b"one\ntwo\n");
        }
        // Its standard input stays open, and silent.
        let stdin = program.take_stdin();
        let ended = program.end();
        drop(stdin);
        assert_eq!(ended.code(), Some(1), "{retry_for}: {}", ended.stderr);
        let failures = undelimited(&std::fs::read(&failed).unwrap());
        let count = failures.len();
        assert_eq!(ended.last_line(), format!("accepted {count}, settled 0, failed {count}"), "{}", ended.stderr);
        if retry_for != "0" {
            assert_eq!(failures, ["one", "two"].map(|text| text.as_bytes().to_vec()));
        }
    }
}

#[test]
fn an_endless_input_is_read_no_further_once_the_peer_stayed_away() {
    let folder = Folder::new();
    let mut program = Program::start(["send", &nowhere(&folder), "--retry-for", "2s"]);
    let mut stdin = program.take_stdin();
    // Far more than is ever held: the writes block until the program is gone, and then fail.
    let writer = std::thread::spawn(move || {
        let lines = b"all work and no play\n".repeat(10_000);
        while std::io::Write::write_all(&mut stdin, &lines).is_ok() {}
    });
    let ended = program.end();
    writer.join().unwrap();
    assert_eq!(ended.code(), Some(1));
    let numbers: Vec<u64> =
        ended.last_line().split(' ').filter_map(|word| word.trim_end_matches(',').parse().ok()).collect();
    let [accepted, settled, failed] = numbers[..] else { panic!("{}", ended.stderr) };
    assert!(accepted > 0);
    assert_eq!((settled, failed), (0, accepted));
}

#[test]
fn input_is_read_while_the_peer_is_still_away() {
    let folder = Folder::new();
    let address = nowhere(&folder);
    let mut program = Program::start(["send", &address, "--retry-for", "1m"]);
    program.write(b"early\n");
    program.wait_stderr("that nobody is there", |text| (!text.is_empty()).then_some(()));
    program.write(b"also early\n");
    let listener = Program::start(["listen", &address, "--count", "3"]);
    listener.wait_lines(2);
    program.write(b"late\n");
    let listened = listener.end();
    assert_eq!(listened.stdout, b"early\nalso early\nlate\n");
    drop(program.take_stdin());
    assert_eq!(program.end().last_line(), "accepted 3, settled 3, failed 0");
}

#[test]
fn lines_are_sent_as_they_come() {
    let (listener, address) = Program::listen(&[]);
    let mut program = Program::start(["send", &address]);
    for count in 1..=3 {
        program.write(b"line\n");
        listener.wait_lines(count);
    }
    drop(program.take_stdin());
    assert_eq!(program.end().last_line(), "accepted 3, settled 3, failed 0");
}

#[test]
fn at_the_end_it_ends_its_stream_and_waits_a_second_at_most_for_the_peers() {
    let (listener, address) = wire::bind();
    let mut program = Program::start(["send", &address, "--framing", "u8"]);
    program.write_all_and_close(b"hello");
    let mut stream = wire::accept(&listener);
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert_eq!(received, b"\x05hello", "the stream ends behind the last message");

    // This side does not end its own.
    let half_closed = Instant::now();
    let ended = program.end();
    assert!(half_closed.elapsed() < Duration::from_secs(5), "it waited {:?}", half_closed.elapsed());
    assert_eq!(ended.last_line(), "accepted 1, settled 1, failed 0");
    assert_eq!(ended.code(), Some(0));
}

#[test]
fn a_peer_that_leaves_when_everything_is_settled_is_not_waited_for() {
    let (listener, address) = wire::bind();
    let mut program = Program::start(["send", &address, "--framing", "u8"]);
    program.write(b"hello\n");
    let mut stream = wire::accept(&listener);
    stream.read_exact(&mut [0; 6]).unwrap();
    drop((stream, listener));
    program.wait_stderr("that the connection is lost", |text| (!text.is_empty()).then_some(()));
    let input_ended = Instant::now();
    drop(program.take_stdin());
    let ended = program.end();
    assert!(input_ended.elapsed() < Duration::from_secs(4), "it waited {:?}", input_ended.elapsed());
    assert_eq!(ended.last_line(), "accepted 1, settled 1, failed 0");
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
}

#[test]
fn a_signal_ends_it_with_what_was_read_settled() {
    let (listener, address) = Program::listen(&["--count", "2"]);
    let mut program = Program::start(["send", &address]);
    program.write(b"one\ntwo\n");
    listener.wait_lines(2);
    program.signal(Signal::INT);
    let ended = program.end();
    assert_eq!(ended.last_line(), "accepted 2, settled 2, failed 0");
    assert_eq!(ended.code(), Some(1), "the input was not used up");
}

#[test]
fn nothing_is_drawn_where_standard_error_is_no_terminal() {
    let (_, ended) = sent(&[], &b"line\n".repeat(10_000), 10_000);
    assert_eq!(ended.stderr, "accepted 10000, settled 10000, failed 0\n");
}

#[test]
fn a_peer_that_never_reads_holds_the_input_back() {
    let (listener, address) = wire::bind();
    let mut program = Program::start(["send", &address]);
    let mut stdin = program.take_stdin();
    let _stream = wire::accept(&listener);
    // A pipe that takes nothing for a while is full all the way: memory in between is bounded.
    let file = rustix::fs::fcntl_getfl(&stdin).unwrap();
    rustix::fs::fcntl_setfl(&stdin, file | rustix::fs::OFlags::NONBLOCK).unwrap();
    let lines = b"all work and no play makes jack a dull boy\n".repeat(1000);
    let (mut written, mut quiet_since) = (0, Instant::now());
    let begun = Instant::now();
    while quiet_since.elapsed() < Duration::from_secs(1) {
        match std::io::Write::write(&mut stdin, &lines) {
            Ok(taken) => {
                written += taken;
                quiet_since = Instant::now();
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => panic!("{error}"),
        }
        assert!(begun.elapsed() < DEADLINE, "{written} bytes were taken, and it goes on");
    }
    assert!(written < 64 << 20, "{written} bytes were taken");
}

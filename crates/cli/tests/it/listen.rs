use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::program::{Folder, Program, Signal, text};
use crate::reconnect::account;
use crate::wire::{self, delimited, u8_frames};

#[test]
fn each_output_prints_the_messages_in_its_way() {
    let messages: [&[u8]; 4] = [b"one", b"", b"\x00\xff\r", b"\n"];
    let cases: [(&str, &[u8]); 4] = [
        ("lines", b"one\n\n\x00\xff\r\n\n\n"),
        ("hex", b"6f6e65\n\n00ff0d\n0a\n"),
        ("delimited", b"\x03one\x00\x03\x00\xff\r\x01\n"),
        ("none", b""),
    ];
    for (output, printed) in cases {
        let (listener, address) = Program::listen(&["--framing", "u8", "--output", output, "--count", "4"]);
        wire::deliver(&address, &u8_frames(messages));
        let ended = listener.end();
        assert_eq!(ended.stdout, printed, "{output}");
        assert_eq!(ended.last_line(), "received 4 messages, 7 bytes", "{output}");
        assert_eq!(ended.code(), Some(0), "{output}");
    }
}

#[test]
fn lines_are_the_default() {
    let (listener, address) = Program::listen(&["--framing", "u8", "--count", "1"]);
    wire::deliver(&address, &u8_frames(["hello"]));
    assert_eq!(listener.end().stdout, b"hello\n");
}

#[test]
fn messages_are_on_standard_output_while_their_connection_stays_open() {
    let (listener, address) = Program::listen(&["--framing", "u8"]);
    let mut stream = wire::connect(&address);
    for count in 1..=3 {
        stream.write_all(&u8_frames(["message"])).unwrap();
        listener.wait_lines(count);
    }
}

#[test]
fn a_port_without_a_host_is_open_on_all_interfaces_and_dialled_on_this_machine() {
    let listener = Program::start(["listen", ":0", "--framing", "u8", "--count", "2"]);
    let address = listener.address();
    let port = address.rsplit_once(':').unwrap().1;
    assert_ne!(port, "0");
    wire::deliver(&format!("127.0.0.1:{port}"), &u8_frames(["hello"]));
    listener.wait_lines(1);
    let sent = Program::run(["send", &format!(":{port}"), "--framing", "u8"], b"again");
    assert_eq!(sent.last_line(), "accepted 1, settled 1, failed 0", "{}", sent.stderr);
    assert_eq!(listener.end().stdout, b"hello\nagain\n");
}

#[test]
fn a_port_that_is_taken_ends_it_with_1() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let ended = Program::run(["listen", &taken.local_addr().unwrap().to_string()], b"");
    assert_eq!(ended.code(), Some(1));
    assert_eq!(ended.errors().len(), 1, "{}", ended.stderr);
}

#[test]
fn a_stale_socket_file_is_replaced_and_a_live_one_is_not() {
    let folder = Folder::new();
    let path = folder.path("socket");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a socket's file outlives its listener");
    let address = format!("unix:{}", text(&path));

    let listener = Program::start(["listen", &address, "--count", "1"]);
    assert_eq!(listener.address(), address);

    let second = Program::run(["listen", &address], b"");
    assert_eq!(second.code(), Some(1), "{}", second.stderr);

    let sent = Program::run(["send", &address], b"hello");
    assert_eq!(sent.last_line(), "accepted 1, settled 1, failed 0");
    assert_eq!(listener.end().stdout, b"hello\n");
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let folder = Folder::new();
    let path = folder.file("letter", b"dear all");
    let ended = Program::run(["listen", &format!("unix:{path}")], b"");
    assert_eq!(ended.code(), Some(1), "{}", ended.stderr);
    assert_eq!(std::fs::read(path).unwrap(), b"dear all");
}

#[test]
fn a_count_is_exact_over_all_connections() {
    let (listener, address) = Program::listen(&["--count", "2500"]);
    let lines: String = (0..1000).map(|number| format!("{number}\n")).collect();
    let senders: Vec<_> = (0..4)
        .map(|_| {
            let (address, lines) = (address.clone(), lines.clone());
            thread::spawn(move || Program::run(["send", &address, "--retry-for", "0"], lines.as_bytes()))
        })
        .collect();
    let ended = listener.end();
    senders.into_iter().for_each(|sender| drop(sender.join().unwrap()));
    let printed = std::str::from_utf8(&ended.stdout).unwrap();
    assert_eq!(printed.lines().count(), 2500);
    let bytes = printed.len() - 2500;
    assert_eq!(ended.last_line(), format!("received 2500 messages, {bytes} bytes"));
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
}

#[test]
fn a_count_of_zero_ends_at_once() {
    let ended = Program::run(["listen", "127.0.0.1:0", "--count", "0"], b"");
    assert!(ended.stderr.starts_with("listening on "), "{}", ended.stderr);
    assert_eq!(ended.last_line(), "received 0 messages, 0 bytes");
    assert_eq!(ended.code(), Some(0));
}

#[test]
fn a_signal_closes_idle_connections_at_once_and_ends_it_with_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let (listener, address) = Program::listen(&["--framing", "u8"]);
        let mut idle = wire::connect(&address);
        let mut busy = wire::connect(&address);
        busy.write_all(&u8_frames(["hello"])).unwrap();
        listener.wait_lines(1);

        let asked = Instant::now();
        listener.signal(signal);
        wire::wait_until_closed(&mut idle);
        wire::wait_until_closed(&mut busy);
        let ended = listener.end();
        assert!(asked.elapsed() < Duration::from_secs(4), "it did not wait for the five seconds");
        assert_eq!(ended.code(), Some(0), "{signal:?}: {}", ended.stderr);
        assert_eq!(ended.last_line(), "received 1 messages, 5 bytes");
    }
}

/// Connects, and sends until the program's standard output and its socket take no more.
fn fill(address: &str) -> TcpStream {
    let mut stream = wire::connect(address);
    stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let frames = u8_frames(vec![[b'x'; 255]; 256]);
    while stream.write_all(&frames).is_ok() {}
    stream
}

#[test]
fn what_is_in_hand_is_still_printed_after_a_signal() {
    let program = Program::start_unread(["listen", "127.0.0.1:0", "--framing", "u8"]);
    let mut stream = fill(&program.address());
    program.signal(Signal::TERM);
    program.read_stdout();
    wire::wait_until_closed(&mut stream);
    let ended = program.end();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let printed = ended.stdout.len() / 256;
    assert!(printed > 0 && ended.stdout.len().is_multiple_of(256), "whole messages are printed");
    assert_eq!(ended.last_line(), format!("received {printed} messages, {} bytes", printed * 255));
}

#[test]
fn what_cannot_be_printed_within_five_seconds_of_a_signal_ends_it_with_1() {
    let program = Program::start_unread(["listen", "127.0.0.1:0", "--framing", "u8"]);
    let _stream = fill(&program.address());
    program.signal(Signal::TERM);
    let asked = Instant::now();
    let ended = program.end();
    assert!(asked.elapsed() >= Duration::from_secs(4), "it gave up after {:?}", asked.elapsed());
    assert_eq!(ended.code(), Some(1));
    assert!(ended.stderr.contains("more in hand"), "{}", ended.stderr);
}

#[test]
fn a_second_signal_ends_it_at_once() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let program = Program::start_unread(["listen", "127.0.0.1:0", "--framing", "u8"]);
        let _stream = fill(&program.address());
        program.signal(signal);
        // Once the port is closed the first signal has been understood.
        let address = program.address();
        while TcpStream::connect(&address).is_ok() {
            thread::sleep(Duration::from_millis(2));
        }
        program.signal(signal);
        assert_eq!(program.end().code(), Some(code));
    }
}

#[test]
fn a_closed_standard_output_ends_it_with_1() {
    let program = Program::start_unread(["listen", "127.0.0.1:0", "--framing", "u8"]);
    let mut stream = wire::connect(&program.address());
    program.drop_stdout();
    stream.write_all(&u8_frames(["hello"])).unwrap();
    wire::wait_until_closed(&mut stream);
    let ended = program.end();
    assert_eq!(ended.code(), Some(1), "{}", ended.stderr);
    assert!(ended.stderr.contains("standard output"), "{}", ended.stderr);
    assert_eq!(ended.last_line(), "received 0 messages, 0 bytes");
}

#[test]
fn bytes_that_are_no_frames_end_their_own_connection_and_are_named() {
    let cases: [(&[u8], &[&str]); 4] = [
        (&[0x82, 0x40, 0], &["4097", "4096"]),
        (&[1, 0, 0], &["-1", "4096"]),
        (&[6, 0xff, 0xff, b'a', b'b', b'c'], &["06 ff ff", "4096"]),
        (&[20, 0, 0, b'a', b'b', b'c'], &["3", "10"]),
    ];
    let (listener, address) = Program::listen(&[]);
    let mut healthy = wire::connect(&address);
    healthy.write_all(&[2, 0, 0, b'1']).unwrap();
    listener.wait_lines(1);
    for (index, (bytes, named)) in cases.into_iter().enumerate() {
        wire::deliver(&address, bytes);
        let said = listener.wait_stderr("a line about it", |text| {
            let line = text.split_inclusive(|byte| *byte == b'\n').nth(index + 1)?;
            line.ends_with(b"\n").then(|| String::from_utf8_lossy(line).into_owned())
        });
        for name in named {
            assert!(said.contains(name), "{said:?} should name {name}");
        }
    }
    healthy.write_all(&[2, 0, 0, b'2']).unwrap();
    listener.wait_lines(2);
    listener.signal(Signal::TERM);
    let ended = listener.end();
    assert_eq!(ended.stdout, b"1\n2\n");
    assert_eq!(ended.last_line(), "received 2 messages, 2 bytes");
}

#[test]
fn messages_before_a_malformed_one_are_printed() {
    let (listener, address) = Program::listen(&["--framing", "u16be", "--max-message-size", "4"]);
    wire::deliver(&address, b"\x00\x03one\x00\x03two\x00\x05three");
    listener.wait_lines(2);
    listener.signal(Signal::TERM);
    let ended = listener.end();
    assert_eq!(ended.stdout, b"one\ntwo\n");
    assert_eq!(ended.last_line(), "received 2 messages, 6 bytes");
}

#[test]
fn a_flood_of_errors_is_cut_to_a_burst_and_a_rate_and_those_left_out_are_counted() {
    const BAD: usize = 500;
    let (listener, address) = Program::listen(&["--framing", "u16be", "--max-message-size", "1"]);
    let begun = Instant::now();
    for _ in 0..BAD {
        wire::deliver(&address, &[0xff, 0xff]);
    }
    listener.signal(Signal::TERM);
    let took = begun.elapsed();
    let ended = listener.end();
    let (counts, said): (Vec<&str>, Vec<&str>) =
        ended.stderr.lines().filter(|line| line.contains(": ")).partition(|line| line.contains("left out"));
    let left_out: usize =
        counts.iter().map(|line| line.split(' ').find_map(|word| word.parse::<usize>().ok()).expect("a count")).sum();
    let allowed = 20.0 + 20.0 * (took.as_secs_f64() + 1.0);
    assert!(said.len() as f64 <= allowed, "{} lines in {took:?}: {}", said.len(), ended.stderr);
    assert_eq!(said.len() + left_out, BAD, "{}", ended.stderr);
}

#[test]
fn a_connection_that_stays_away_from_frames_does_not_hold_the_end_up() {
    let folder = Folder::new();
    let path = text(&folder.path("socket"));
    let listener = Program::start(["listen", &format!("unix:{path}"), "--framing", "varint", "--output", "delimited"]);
    listener.address();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(&delimited(["whole"])).unwrap();
    // The beginning of a message that never goes on.
    stream.write_all(&[100, b'h', b'a', b'l', b'f']).unwrap();
    listener.wait_stdout("the whole message", |text| (text == delimited(["whole"])).then_some(()));
    listener.signal(Signal::TERM);
    let ended = listener.end();
    assert_eq!(ended.code(), Some(0));
    assert_eq!(ended.stdout, delimited(["whole"]));
    assert!(!std::path::Path::new(&path).exists(), "the socket's file is gone with it");
}

#[cfg(target_os = "linux")]
#[test]
fn a_hangup_ends_it_in_order_unless_it_was_started_to_outlive_it() {
    let (listener, address) = Program::listen(&[]);
    let mut sender = Program::start(["send", &address]);
    sender.write(b"one\n");
    listener.wait_lines(1);
    for program in [&sender, &listener] {
        // The shell and the system may both send one.
        program.signal(Signal::HUP);
        program.signal(Signal::HUP);
    }
    let (sent, received) = (sender.end(), listener.end());
    assert_eq!((sent.code(), account(&sent)), (Some(1), [1, 1, 0]), "{}", sent.stderr);
    assert_eq!((received.code(), received.last_line()), (Some(0), "received 1 messages, 3 bytes"));

    let listener = Program::start_deaf_to_hangups(["listen", "127.0.0.1:0", "--count", "1"]);
    let address = listener.address();
    listener.signal(Signal::HUP);
    let sent = Program::run(["send", &address], b"one\n");
    assert_eq!(account(&sent), [1, 1, 0], "{}", sent.stderr);
    assert_eq!(listener.end().stdout, b"one\n");
}

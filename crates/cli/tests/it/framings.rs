use std::io::Write;
use std::thread;

use crate::program::Program;
use crate::wire::{self, delimited, undelimited};

/// Name, default maximum, and the prefixes of messages of 0 and 1 bytes and of the maximum.
const FRAMINGS: [(&str, usize, [&[u8]; 3]); 9] = [
    ("buffstreams", 4096, [&[0, 0, 0], &[2, 0, 0], &[0x80, 0x40, 0]]),
    ("varint", 4096, [&[0], &[1], &[0x80, 0x20]]),
    ("u8", 255, [&[0], &[1], &[255]]),
    ("u16be", 4096, [&[0, 0], &[0, 1], &[0x10, 0]]),
    ("u16le", 4096, [&[0, 0], &[1, 0], &[0, 0x10]]),
    ("u32be", 4096, [&[0, 0, 0, 0], &[0, 0, 0, 1], &[0, 0, 0x10, 0]]),
    ("u32le", 4096, [&[0, 0, 0, 0], &[1, 0, 0, 0], &[0, 0x10, 0, 0]]),
    ("u64be", 4096, [&[0; 8], &[0, 0, 0, 0, 0, 0, 0, 1], &[0, 0, 0, 0, 0, 0, 0x10, 0]]),
    ("u64le", 4096, [&[0; 8], &[1, 0, 0, 0, 0, 0, 0, 0], &[0, 0x10, 0, 0, 0, 0, 0, 0]]),
];

#[test]
fn messages_of_0_and_1_bytes_and_of_the_maximum_pass_and_one_byte_more_is_refused() {
    for (name, max, _) in FRAMINGS {
        let messages = [vec![], vec![b'a'], vec![b'\n'; max], vec![b'c'; max + 1]];
        let (listener, address) = Program::listen(&["--framing", name, "--count", "3", "--output", "delimited"]);
        let ended = Program::run(["send", &address, "--framing", name, "--input", "delimited"], &delimited(&messages));
        assert_eq!(ended.code(), Some(1), "{name}: {}", ended.stderr);
        assert_eq!(ended.last_line(), "accepted 4, settled 3, failed 1", "{name}: {}", ended.stderr);
        let [error] = ended.errors()[..] else { panic!("{name}: {}", ended.stderr) };
        assert!(error.contains(&format!("{} bytes", max + 1)) && error.contains(&max.to_string()), "{name}: {error}");

        let listened = listener.end();
        assert_eq!(undelimited(&listened.stdout), messages[..3], "{name}");
        assert_eq!(listened.last_line(), format!("received 3 messages, {} bytes", max + 1), "{name}");
        assert_eq!(listened.code(), Some(0), "{name}");
    }
}

#[test]
fn the_bytes_on_the_socket_are_the_framings() {
    for (name, max, prefixes) in FRAMINGS {
        let (listener, address) = wire::bind();
        let messages = [vec![], vec![b'a'], vec![b'b'; max]];
        let sender = {
            let input = delimited(&messages);
            thread::spawn(move || Program::run(["send", &address, "--framing", name, "--input", "delimited"], &input))
        };
        let received = wire::wait_until_closed(&mut wire::accept(&listener));
        let expected: Vec<u8> = prefixes.into_iter().zip(&messages).flat_map(|(p, m)| [p, m].concat()).collect();
        assert!(received == expected, "{name}: {:02x?}", &received[..received.len().min(32)]);
        assert_eq!(sender.join().unwrap().last_line(), "accepted 3, settled 3, failed 0", "{name}");
    }
}

#[test]
fn the_listener_understands_the_bytes_of_each_framing() {
    for (name, max, prefixes) in FRAMINGS {
        let (listener, address) = Program::listen(&["--framing", name, "--count", "3", "--output", "delimited"]);
        let messages = [vec![], vec![b'a'], vec![b'b'; max]];
        let bytes: Vec<u8> = prefixes.into_iter().zip(&messages).flat_map(|(p, m)| [p, m].concat()).collect();
        let mut stream = wire::connect(&address);
        stream.write_all(&bytes).unwrap();
        wire::wait_until_closed(&mut stream);
        assert_eq!(undelimited(&listener.end().stdout), messages, "{name}");
    }
}

/// A message's length, and the prefix before it.
type Row = (usize, Vec<u8>);

/// The rows that were recorded from BuffStreams 2.0 for Go.
#[test]
fn the_bytes_on_the_socket_are_those_of_the_go_library() {
    let rows = include_str!("../../../buffstreams/tests/vectors/go-buffstreams-2.0-headers.csv");
    let mut by_max: Vec<(usize, Vec<Row>)> = Vec::new();
    for row in rows.lines().skip(1) {
        let mut cells = row.split(',');
        let mut cell = || cells.next().expect("three cells a row");
        let (max, length) = (cell().parse().unwrap(), cell().parse().unwrap());
        let header = (cell().as_bytes().chunks(2))
            .map(|digits| u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap())
            .collect();
        match by_max.last_mut() {
            Some((last, rows)) if *last == max => rows.push((length, header)),
            _ => by_max.push((max, vec![(length, header)])),
        }
    }
    assert!(by_max.len() > 5, "the file has rows of several maxima");

    for (max, rows) in by_max {
        let (listener, address) = wire::bind();
        let message = |length: usize| (0..length).map(|index| index as u8).collect::<Vec<u8>>();
        let input = delimited(rows.iter().map(|(length, _)| message(*length)));
        let expected: Vec<u8> =
            rows.iter().flat_map(|(length, header)| [header.clone(), message(*length)].concat()).collect();
        let sender = thread::spawn(move || {
            let max = max.to_string();
            Program::run(["send", &address, "--max-message-size", &max, "--input", "delimited"], &input)
        });
        let received = wire::wait_until_closed(&mut wire::accept(&listener));
        assert!(received == expected, "maximum {max}: {} bytes, expected {}", received.len(), expected.len());
        assert_eq!(sender.join().unwrap().code(), Some(0), "maximum {max}");
    }
}

#[test]
fn a_maximum_of_zero_is_the_default() {
    let (listener, address) = Program::listen(&["--max-message-size", "0", "--count", "1", "--output", "none"]);
    let input = [vec![b'x'; 4096], b"\n".to_vec(), vec![b'y'; 4097]].concat();
    let sent = Program::run(["send", &address, "--max-message-size", "0"], &input);
    assert_eq!(sent.last_line(), "accepted 2, settled 1, failed 1");
    assert_eq!(listener.end().last_line(), "received 1 messages, 4096 bytes");
}

#[test]
fn a_larger_maximum_is_written_with_its_unit() {
    let (listener, address) = Program::listen(&["--max-message-size", "1MiB", "--count", "1", "--output", "hex"]);
    let sent = Program::run(["send", &address, "--max-message-size", "1MiB"], &vec![b'z'; 1 << 20]);
    assert_eq!(sent.last_line(), "accepted 1, settled 1, failed 0");
    let listened = listener.end();
    assert_eq!(listened.stdout.len(), (2 << 20) + 1);
    assert_eq!(listened.last_line(), "received 1 messages, 1048576 bytes");
}

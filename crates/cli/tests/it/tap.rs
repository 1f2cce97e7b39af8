use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::program::{DEADLINE, Ended, Folder, Program, Signal, data, text};
use crate::reconnect::account;
use crate::tls::authority;
use crate::wire::{self, Witness, u8_frames};

/// A `tap` that is ready, in front of `target`.
fn tap(target: &str, options: &[&str]) -> (Program, String) {
    let program = Program::start(["tap", "127.0.0.1:0", target].iter().chain(options));
    let address = program.address();
    (program, address)
}

fn stop(program: Program) -> Ended {
    program.signal(Signal::TERM);
    let ended = program.end();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    ended
}

/// Two bare sockets with a tap between them.
fn pair(options: &[&str]) -> (Program, TcpStream, TcpStream) {
    let (listener, target) = wire::bind();
    let (tap, address) = tap(&target, options);
    let near = wire::connect(&address);
    (tap, near, wire::accept(&listener))
}

fn read_exactly(stream: &mut impl Read, bytes: usize) -> Vec<u8> {
    let mut read = vec![0; bytes];
    stream.read_exact(&mut read).unwrap();
    read
}

/// Bytes that look random, as frames with four bytes of length.
fn frames(seed: u32, count: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let mut out = Vec::new();
    for _ in 0..count {
        let length = next() % 3000;
        out.extend_from_slice(&length.to_be_bytes());
        out.extend((0..length).map(|_| next() as u8));
    }
    out
}

#[test]
fn every_byte_of_a_plain_pair_passes_both_ways_at_once_and_the_framing_is_known() {
    let (tap, near, far) = pair(&["--output", "none"]);
    let (there, back) = (frames(1, 4000), frames(2, 3000));
    let talk = |mut stream: TcpStream, says: Vec<u8>| {
        thread::spawn(move || {
            let mut reading = stream.try_clone().unwrap();
            let reader = thread::spawn(move || wire::wait_until_closed(&mut reading));
            stream.write_all(&says).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            reader.join().unwrap()
        })
    };
    let (near, far) = (talk(near, there.clone()), talk(far, back.clone()));
    assert!(near.join().unwrap() == back, "what came back is not what was said");
    assert!(far.join().unwrap() == there, "what went there is not what was said");
    tap.wait_stderr("the guess", |text| String::from_utf8_lossy(text).contains("framing: u32be (sure: ").then_some(()));
    let ended = stop(tap);
    let (there, back) = (there.len(), back.len());
    assert_eq!(
        ended.last_line(),
        format!("passed {there} bytes to the target and {back} back over 1 connection, printed 7000 messages")
    );
    assert_eq!(ended.errors(), [] as [&str; 0]);
}

#[test]
fn each_line_says_which_way_its_message_went_in_the_order_of_the_talk() {
    let (tap, mut near, mut far) = pair(&["--framing", "u8"]);
    for (count, question, answer) in [(3, &b"what\nnow?"[..], &b"this"[..]), (5, b"and?", b"that"), (7, b"", b"")] {
        near.write_all(&u8_frames([question])).unwrap();
        assert_eq!(read_exactly(&mut far, question.len() + 1), u8_frames([question]));
        far.write_all(&u8_frames([answer])).unwrap();
        assert_eq!(read_exactly(&mut near, answer.len() + 1), u8_frames([answer]));
        tap.wait_lines(count);
    }
    // A message that is begun is printed with its last byte, and passes before that.
    near.write_all(b"\x04be").unwrap();
    assert_eq!(read_exactly(&mut far, 3), b"\x04be");
    near.write_all(b"ll").unwrap();
    tap.wait_lines(8);
    assert_eq!(stop(tap).stdout, b"> what\n> now?\n< this\n> and?\n< that\n> \n< \n> bell\n");
}

#[test]
fn each_output_is_led() {
    let gtfs = data("gtfs-realtime/gtfs-realtime.proto");
    let message = b"\x0a\x0b\x0a\x032.0\x18\xfc\x87\xbd\xe4\x04";
    let typed = ["--proto", &gtfs, "--type", "transit_realtime.FeedMessage"];
    for (options, line) in [
        (&["--output", "hex"][..], "0a0b0a03322e3018fc87bde404"),
        (&["--output", "fields"], "1: {1: {\"2.0\"} 3: 1284457468}"),
        (&typed, r#"{"header":{"gtfsRealtimeVersion":"2.0","timestamp":"1284457468"}}"#),
    ] {
        let (tap, mut near, mut far) = pair(&[&["--framing", "u8"], options].concat());
        near.write_all(&u8_frames([message])).unwrap();
        tap.wait_lines(1);
        far.write_all(&u8_frames([message])).unwrap();
        tap.wait_lines(2);
        assert_eq!(String::from_utf8(stop(tap).stdout).unwrap(), format!("> {line}\n< {line}\n"));
    }
}

#[test]
fn the_end_of_a_stream_passes_and_the_other_direction_goes_on() {
    let (tap, mut near, mut far) = pair(&["--framing", "u8"]);
    near.write_all(&u8_frames(["question"])).unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(wire::wait_until_closed(&mut far), u8_frames(["question"]));
    far.write_all(&u8_frames(["answer"])).unwrap();
    drop(far);
    assert_eq!(wire::wait_until_closed(&mut near), u8_frames(["answer"]));
    assert_eq!(stop(tap).stdout, b"> question\n< answer\n");
}

#[test]
fn a_reset_passes_either_way() {
    for is_there in [true, false] {
        let (tap, mut near, mut far) = pair(&["--framing", "u8"]);
        near.write_all(&u8_frames(["hello"])).unwrap();
        assert_eq!(read_exactly(&mut far, 6).len(), 6);
        let (cut, mut other) = if is_there { (near, far) } else { (far, near) };
        socket2::SockRef::from(&cut).set_linger(Some(Duration::ZERO)).unwrap();
        drop(cut);
        assert_eq!(other.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        tap.wait_stderr("the reset", |text| String::from_utf8_lossy(text).contains("was broken off").then_some(()));
        stop(tap);
    }
}

#[test]
fn a_target_that_is_not_there_is_named_and_the_sender_is_reset() {
    let (listener, target) = wire::bind();
    drop(listener);
    let (tap, address) = tap(&target, &[]);
    let mut near = wire::connect(&address);
    assert_eq!(near.read(&mut [0; 10]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let named = format!("cannot connect to {target}");
    tap.wait_stderr("the target", |text| String::from_utf8_lossy(text).contains(&named).then_some(()));
    stop(tap);
}

#[test]
fn what_cannot_be_decoded_is_told_once_and_passes_untouched() {
    let (tap, mut near, mut far) = pair(&["--framing", "buffstreams"]);
    let bytes = [&b"\x02\0\0a\x01\0\0"[..], &frames(3, 100)].concat();
    near.write_all(&bytes).unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    assert!(wire::wait_until_closed(&mut far) == bytes);
    far.write_all(b"\x02\0\0b").unwrap();
    drop(far);
    assert_eq!(wire::wait_until_closed(&mut near), b"\x02\0\0b");
    let ended = stop(tap);
    let [error] = ended.errors()[..] else { panic!("{}", ended.stderr) };
    assert!(error.contains("to the target cannot be decoded any further"), "{error}");
    assert!(error.contains("behind byte 4: a message of -1 bytes was declared"), "{error}");
    assert_eq!(ended.stdout, b"> a\n< b\n");
}

#[test]
fn each_framing_is_guessed_and_told_with_how_sure_that_is() {
    // Lines of a log: between 20 and 160 bytes long.
    let lines: Vec<String> = (0..200_u32)
        .map(|number| {
            format!("{number} accepted, settled {}, {}", number * 7919 % 1000, "failed ".repeat(number as usize % 20))
        })
        .collect();
    let input = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let printed = lines.iter().map(|line| format!("> {line}\n")).collect::<String>();
    for (framing, named) in [
        ("buffstreams", "framing: buffstreams with a prefix of 3 bytes (sure: "),
        ("varint", "framing: varint ("),
        ("u16be", "framing: u16be (sure: "),
        ("u16le", "framing: u16le (sure: "),
        ("u32be", "framing: u32be (sure: "),
        ("u32le", "framing: u32le (sure: "),
        ("u64be", "framing: u64be (sure: "),
        ("u64le", "framing: u64le (sure: "),
    ] {
        let (listener, target) = Program::listen(&["--framing", framing]);
        let (tap, address) = tap(&target, &[]);
        let sent = Program::run(["send", &address, "--framing", framing], input.as_bytes());
        assert_eq!(account(&sent), [200, 200, 0], "{}", sent.stderr);
        tap.wait_lines(200);
        let ended = stop(tap);
        assert!(ended.stdout == printed.as_bytes(), "{framing}: {}", ended.stderr);
        assert!(ended.stderr.contains(named), "{framing}: {}", ended.stderr);
        assert_eq!(ended.errors(), [] as [&str; 0]);
        stop(listener);
    }
}

#[test]
fn what_one_connection_has_taught_holds_for_the_next_until_it_is_wrong() {
    let (listener, target) = wire::bind();
    let (tap, address) = tap(&target, &["--output", "hex"]);
    let pass = |bytes: &[u8]| {
        let mut near = wire::connect(&address);
        near.write_all(bytes).unwrap();
        let mut far = wire::accept(&listener);
        assert!(read_exactly(&mut far, bytes.len()) == bytes);
        near
    };
    let first = pass(&frames(5, 40));
    tap.wait_lines(40);
    // Too little to guess by, and printed at once for all that.
    let second = pass(b"\0\0\0\x01a");
    tap.wait_stdout("the next message", |text| text.ends_with(b"\n> 61\n").then_some(()));
    // What cannot be of that framing is guessed anew.
    let third = pass(b"\xf0\x00\x00\x00\x00");
    drop((first, second, third));
    tap.wait_stderr("another guess", |text| String::from_utf8_lossy(text).contains("framing unknown").then_some(()));
    let ended = stop(tap);
    assert_eq!(ended.stderr.matches("framing: u32be (sure: ").count(), 1, "{}", ended.stderr);
    assert_eq!(ended.errors(), [] as [&str; 0]);
}

#[test]
fn a_session_is_recognised_however_slowly_it_comes() {
    let (tap, mut near, mut far) = pair(&["--control"]);
    let asks = [
        &b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xffBUFFS\x01\x81\x01\0\x01\x01\x01"[..],
        &[7; 16],
        &1_u64.to_be_bytes(),
        &1_u64.to_be_bytes(),
        &100_u64.to_be_bytes(),
        &1000_u64.to_be_bytes(),
        &1000_u64.to_be_bytes(),
        &5000_u32.to_be_bytes(),
        &[0, 0],
    ]
    .concat();
    for byte in asks {
        near.write_all(&[byte]).unwrap();
        assert_eq!(read_exactly(&mut far, 1), [byte]);
    }
    tap.wait_lines(2);
    let ended = stop(tap);
    let printed = String::from_utf8(ended.stdout).unwrap();
    assert!(printed.starts_with(">* PREFACE\n>* HELLO stream 07070707"), "{printed}");
}

#[test]
fn a_message_that_tells_little_is_printed_after_a_silence_with_a_doubtful_word() {
    let (tap, mut near, mut far) = pair(&[]);
    let bytes = b"\x05hello";
    near.write_all(bytes).unwrap();
    assert_eq!(read_exactly(&mut far, 6), bytes);
    tap.wait_lines(1);
    let ended = stop(tap);
    assert_eq!(ended.stdout, b"> hello\n");
    let doubt = ended.stderr.contains("perhaps") || ended.stderr.contains("likely");
    assert!(doubt && ended.stderr.contains("say --framing NAME"), "{}", ended.stderr);
    assert!(ended.stderr.contains("u8 would read them just so"), "{}", ended.stderr);
}

#[test]
fn what_is_no_framing_passes_and_is_told() {
    let (tap, mut near, mut far) = pair(&[]);
    let request = b"GET /index.html HTTP/1.1\r\nHost: example.com\r\nAccept: */*\r\n\r\n";
    near.write_all(request).unwrap();
    near.shutdown(Shutdown::Write).unwrap();
    assert_eq!(wire::wait_until_closed(&mut far), request);
    drop(far);
    assert_eq!(wire::wait_until_closed(&mut near), b"");
    tap.wait_stderr("the word", |text| String::from_utf8_lossy(text).contains("framing unknown").then_some(()));
    assert_eq!(stop(tap).stdout, b"");
}

#[test]
fn a_session_passes_byte_for_byte_over_a_restart_of_its_listener() {
    const LINES: usize = 60_000;
    let folder = Folder::new();
    let appended = || std::fs::File::options().create(true).append(true).open(folder.path("printed")).unwrap();
    let listener = Program::start_into(appended(), ["listen", "127.0.0.1:0"]);
    let target = listener.address();
    let behind = Witness::of(&target);
    let (tap, address) = tap(&behind.address, &["--control"]);
    let before = Witness::of(&address);
    let mut sender = Program::start(["send", &before.address, "--delivery", "acked"]);
    let mut stdin = sender.take_stdin();
    let writer = thread::spawn(move || {
        for number in 0..LINES {
            writeln!(stdin, "{number}").unwrap();
        }
    });
    let deadline = Instant::now() + DEADLINE;
    while std::fs::metadata(folder.path("printed")).unwrap().len() == 0 {
        assert!(Instant::now() < deadline, "nothing was printed");
        thread::sleep(Duration::from_millis(2));
    }
    listener.signal(Signal::KILL);
    listener.end();
    let listener = Program::start_into(appended(), ["listen", &target]);
    listener.address();
    let sent = sender.end();
    writer.join().unwrap();
    assert_eq!(sent.last_line(), format!("accepted {LINES}, settled {LINES}, failed 0"), "{}", sent.stderr);
    stop(listener);
    let tapped = stop(tap);

    let printed = std::fs::read_to_string(folder.path("printed")).unwrap();
    let mut numbers: Vec<usize> = printed.lines().map(|line| line.parse().unwrap()).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert!(numbers.into_iter().eq(0..LINES), "a line is missing");

    let (before, behind) = (before.seen(), behind.seen());
    let (first, last) = (0, before.len() - 1);
    // What was on its way when a connection was broken off may have got no further than the tap.
    for (near, far) in before.iter().zip(&behind) {
        assert!(near.there.starts_with(&far.there) && far.back.starts_with(&near.back), "bytes were changed");
    }
    assert!(last > first, "the listener was killed while the connection was open");
    assert!(before[last] == *behind.last().unwrap(), "the last connection was not broken off");
    assert!(before[last].there.starts_with(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xffBUFFS\x01"));

    let lines: Vec<&str> = std::str::from_utf8(&tapped.stdout).unwrap().lines().collect();
    assert!(lines.iter().all(|line| ["> ", ">* ", "<* "].iter().any(|lead| line.starts_with(lead))));
    for control in [">* PREFACE", ">* HELLO stream ", "<* WELCOME dispatched ", "<* ACK 60000", ">* GOODBYE"] {
        assert!(lines.iter().any(|line| line.starts_with(control)), "{control}: {}", tapped.stderr);
    }
    let mut messages: Vec<usize> =
        lines.iter().filter_map(|line| line.strip_prefix("> ")).map(|line| line.parse().unwrap()).collect();
    messages.sort_unstable();
    messages.dedup();
    assert!(messages.into_iter().eq(0..LINES), "what passed was printed");
    assert!(tapped.stderr.contains("framing: a session of BuffStreams (sure"), "{}", tapped.stderr);
}

#[test]
fn tls_passes_byte_for_byte_and_is_told_once() {
    let authority = authority();
    let (listener, target) = authority.listen("server", false);
    let ca = authority.file("ca.pem");
    let behind = Witness::of(&target);
    let (tap, address) = tap(&behind.address, &[]);
    let before = Witness::of(&address);
    for delivery in ["sent", "acked"] {
        let sent = Program::run(["send", &before.address, "--tls-ca", &ca, "--delivery", delivery], b"one\ntwo\n");
        assert_eq!(account(&sent), [2, 2, 0], "{}", sent.stderr);
    }
    listener.wait_lines(4);
    assert_eq!(stop(listener).stdout, b"one\ntwo\none\ntwo\n");
    let ended = stop(tap);
    assert_eq!(ended.stdout, b"");
    assert_eq!(ended.stderr.matches("it is passed through, and cannot be decoded").count(), 1, "{}", ended.stderr);
    let (before, behind) = (before.seen(), behind.seen());
    assert_eq!(before.len(), 2);
    assert!(before == behind, "bytes were changed");
    assert!(before.iter().all(|seen| seen.there.starts_with(&[22, 3]) && !seen.back.is_empty()));
}

#[test]
fn a_reader_who_takes_his_time_slows_the_connection_down_and_misses_nothing() {
    const MESSAGES: usize = 30_000;
    let (listener, target) = wire::bind();
    let tap = Program::start_unread(["tap", "127.0.0.1:0", &target, "--framing", "u8"]);
    let mut near = wire::connect(&tap.address());
    let mut far = wire::accept(&listener);
    let bytes = u8_frames((0..MESSAGES).map(|number| format!("{number:0200}")));
    let (writer, said) = (near.try_clone().unwrap(), bytes.clone());
    let writer = thread::spawn(move || {
        let mut writer = writer;
        writer.write_all(&said).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    // More is not on its way than pipes and sockets hold, while nobody reads what is printed.
    far.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let mut got = Vec::new();
    let stalled = far.read_to_end(&mut got).unwrap_err();
    assert!(matches!(stalled.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{stalled}");
    assert!(got.len() < 1 << 20, "{} bytes passed", got.len());
    tap.read_stdout();
    far.set_read_timeout(Some(DEADLINE)).unwrap();
    far.read_to_end(&mut got).unwrap();
    assert!(got == bytes);
    drop(far);
    wire::wait_until_closed(&mut near);
    writer.join().unwrap();
    tap.wait_lines(MESSAGES);
    let printed = stop(tap).stdout;
    let expected: String = (0..MESSAGES).map(|number| format!("> {number:0200}\n")).collect();
    assert!(printed == expected.as_bytes());
}

#[test]
fn a_standard_output_that_is_closed_ends_it_with_1() {
    let (tap, mut near, _far) = pair(&["--framing", "u8"]);
    near.write_all(&u8_frames(["seen"])).unwrap();
    tap.wait_lines(1);
    stop(tap);
    let (listener, target) = wire::bind();
    let tap = Program::start_unread(["tap", "127.0.0.1:0", &target, "--framing", "u8"]);
    let mut near = wire::connect(&tap.address());
    let _far = wire::accept(&listener);
    tap.drop_stdout();
    near.write_all(&u8_frames(["unseen"])).unwrap();
    let ended = tap.end();
    assert_eq!(ended.code(), Some(1));
    assert!(ended.stderr.contains("error: standard output: "), "{}", ended.stderr);
}

#[test]
fn unix_sockets_work_on_both_sides() {
    let folder = Folder::new();
    let (near, far) = (folder.path("near"), folder.path("far"));
    let listener = UnixListener::bind(&far).unwrap();
    let addresses = [&near, &far].map(|path| format!("unix:{}", text(path)));
    let tap = Program::start(["tap", &addresses[0], &addresses[1], "--framing", "u8"]);
    assert_eq!(tap.address(), addresses[0]);
    let mut stream = UnixStream::connect(&near).unwrap();
    let (mut target, _) = listener.accept().unwrap();
    stream.write_all(&u8_frames(["over"])).unwrap();
    assert_eq!(read_exactly(&mut target, 5), u8_frames(["over"]));
    target.write_all(&u8_frames(["and out"])).unwrap();
    drop(target);
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    assert_eq!(back, u8_frames(["and out"]));
    assert_eq!(stop(tap).stdout, b"> over\n< and out\n");
    assert!(!near.exists(), "the socket file is removed");
}

#[test]
fn what_strangers_say_is_no_flood_of_lines() {
    let (listener, target) = wire::bind();
    let (tap, address) = tap(&target, &[]);
    for number in 0..300 {
        let mut stranger = wire::connect(&address);
        let mut other = wire::accept(&listener);
        let noise: Vec<u8> = (0..40_u32).map(|at| (at * 97 + number * 31 + 0x80) as u8 | 0x80).collect();
        stranger.write_all(&noise).unwrap();
        drop(stranger);
        assert_eq!(read_exactly(&mut other, noise.len()), noise);
    }
    let ended = stop(tap);
    let lines = ended.stderr.lines().count();
    assert!(lines < 250 && ended.stderr.contains("framing unknown"), "{lines} lines: {}", ended.stderr);
}

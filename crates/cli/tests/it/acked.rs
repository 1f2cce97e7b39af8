use std::fs::{self, File};
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use buffstreams::{HandlerError, blocking};

use crate::program::{DEADLINE, Ended, Folder, Program, Signal, data, text};
use crate::reconnect::{Numbers, account, numbers};
use crate::wire::{self, delimited, undelimited};

const ACKED: [&str; 2] = ["--delivery", "acked"];

/// The numbers of this range, a line each.
fn lines(range: std::ops::Range<u64>) -> Vec<u8> {
    range.map(|number| format!("{number}\n")).collect::<String>().into_bytes()
}

fn send(address: &str, options: &[&str], input: &[u8]) -> Ended {
    Program::run(["send", address].iter().chain(&ACKED).chain(options), input)
}

/// Without what a write that is under way, or was broken off, has left at the end.
fn whole_lines(content: &[u8]) -> &[u8] {
    let end = content.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    &content[..end]
}

fn appended(path: &Path) -> File {
    File::options().create(true).append(true).open(path).unwrap()
}

#[test]
fn what_is_settled_is_printed_once_and_in_order_beside_plain_messages_on_the_same_port() {
    const EACH: u64 = 20_000;
    let folder = Folder::new();
    let printed = folder.path("printed");
    let listener = Program::start_into(appended(&printed), ["listen", "127.0.0.1:0"]);
    let address = listener.address();
    let senders: Vec<_> = [(0, true), (1, true), (2, false)]
        .into_iter()
        .map(|(sender, is_acked)| {
            let (address, printed) = (address.clone(), printed.clone());
            thread::spawn(move || {
                let range = sender * EACH..(sender + 1) * EACH;
                let options = if is_acked { &ACKED[..] } else { &[] };
                let ended = Program::run(["send", &address].iter().chain(options), &lines(range.clone()));
                assert_eq!(ended.stderr, format!("accepted {EACH}, settled {EACH}, failed 0\n"));
                if is_acked {
                    // At this very moment, without waiting for anything more.
                    let printed = numbers(whole_lines(&fs::read(printed).unwrap()));
                    assert!(printed.into_iter().filter(|number| range.contains(number)).eq(range.clone()));
                }
            })
        })
        .collect();
    senders.into_iter().for_each(|sender| sender.join().unwrap());
    listener.signal(Signal::TERM);
    let ended = listener.end();
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let mut printed = numbers(&fs::read(printed).unwrap());
    printed.sort_unstable();
    assert!(printed.into_iter().eq(0..3 * EACH));
}

#[test]
fn a_batch_that_is_not_written_is_not_acknowledged() {
    const LINES: usize = 1000;
    let (mut printed, stdout) = std::io::pipe().unwrap();
    let listener = Program::start_into(stdout, ["listen", "127.0.0.1:0"]);
    let mut sender = Program::start(["send", &listener.address(), "--retry-for", "0"].iter().chain(&ACKED));
    let line = [&[b'x'; 999][..], b"\n"].concat();
    sender.write_all_and_close(&line.repeat(LINES));
    // Nobody reads, so it gets stuck in the middle of a batch.
    let deadline = Instant::now() + DEADLINE;
    while rustix::io::ioctl_fionread(&printed).unwrap() < 60_000 {
        assert!(Instant::now() < deadline, "nothing was printed");
        thread::sleep(Duration::from_millis(2));
    }
    listener.signal(Signal::KILL);
    listener.end();
    let sent = sender.end();
    let mut written = Vec::new();
    printed.read_to_end(&mut written).unwrap();
    let [accepted, settled, failed] = account(&sent);
    assert!(settled as usize <= written.len() / line.len(), "{} bytes were written: {}", written.len(), sent.stderr);
    assert!(failed > 0 && accepted == settled + failed, "{}", sent.stderr);
    assert_eq!(sent.code(), Some(1));
}

#[test]
fn a_listener_that_takes_no_sessions_is_named_and_prints_nothing_of_them() {
    let folder = Folder::new();
    let failed_file = text(&folder.path("failed"));
    let (listener, address) = Program::listen(&["--no-sessions", "--count", "1"]);
    let sent = send(&address, &["--failed", &failed_file], b"one\ntwo\nthree\n");
    assert_eq!(sent.code(), Some(1));
    let errors = sent.errors();
    assert!(errors.last().unwrap().ends_with("not granted: this listener takes no sessions"), "{}", sent.stderr);
    let [accepted, settled, failed] = account(&sent);
    assert_eq!((accepted, settled), (failed, 0), "what was read has failed");
    let failures = undelimited(&fs::read(&failed_file).unwrap());
    assert_eq!(
        failures,
        ["one", "two", "three"][..failed as usize].iter().map(|text| text.as_bytes()).collect::<Vec<_>>()
    );

    let plain = Program::run(["send", &address], b"plain\n");
    assert_eq!(plain.last_line(), "accepted 1, settled 1, failed 0");
    assert_eq!(listener.end().stdout, b"plain\n");
}

/// Reads a little of every connection and closes it, as the listener of BuffStreams for Go does with what it cannot read.
fn listen_as_go_does() -> (String, mpsc::Receiver<Vec<u8>>) {
    let (listener, address) = wire::bind();
    let (seen, see) = mpsc::channel();
    let serve = move |listener: TcpListener| {
        for stream in listener.incoming() {
            let mut bytes = vec![0; 3];
            // A connection may also be given up before anything came.
            if stream.unwrap().read_exact(&mut bytes).is_ok() {
                seen.send(bytes).ok();
            }
        }
    };
    thread::spawn(move || serve(listener));
    (address, see)
}

#[test]
fn a_listener_that_closes_when_asked_is_reported_as_what_it_is() {
    for retry_for in ["0", "300ms"] {
        let (address, seen) = listen_as_go_does();
        let sent = send(&address, &["--retry-for", retry_for], b"hello\n");
        assert_eq!(sent.code(), Some(1));
        let errors = sent.errors();
        let last = errors.last().unwrap();
        assert!(last.contains("BuffStreams for Go") && !last.contains("was away"), "{retry_for}: {}", sent.stderr);
        // It may be refused before the line is read, which then is not accepted.
        let [accepted, settled, failed] = account(&sent);
        assert_eq!((accepted, settled), (failed, 0), "{retry_for}: {}", sent.stderr);
        assert_eq!(seen.recv_timeout(DEADLINE).unwrap(), [0xff; 3], "the question, and no message");
    }
}

#[test]
fn what_is_warned_of_at_every_attempt_is_said_a_few_times_and_counted() {
    for spread in [&[][..], &["--spread"]] {
        let (address, seen) = listen_as_go_does();
        let options = [spread, &["--retry-for", "1h"]].concat();
        let mut sender = Program::start(["send", &address].iter().chain(&ACKED).chain(&options));
        // So many fail in the end that most are left out, and the count of warnings is not.
        sender.write(&b"hello\n".repeat(1000));
        // In the minute that this may take, as long as the pauses grow, it is said five times at the most.
        const ATTEMPTS: usize = 8;
        for _ in 0..=ATTEMPTS {
            seen.recv_timeout(DEADLINE).unwrap();
        }
        sender.signal(Signal::INT);
        let sent = sender.end();
        assert!(!sent.stderr.contains("finishing"), "there is nothing to wait for: {}", sent.stderr);
        let warnings: Vec<_> = sent.stderr.lines().filter(|line| line.contains("turned it away")).collect();
        let times = warnings.iter().map(|line| match line.rsplit_once(" (and ").map(|(_, more)| more) {
            None => 1,
            Some(more) => more.split_once(" time").unwrap().0.parse().unwrap(),
        });
        let times: usize = times.sum();
        assert!(times >= ATTEMPTS && warnings.len() < ATTEMPTS, "{}", sent.stderr);
    }
}

#[test]
fn a_listener_that_turns_a_sender_away_by_a_limit_is_not_taken_for_one_that_knows_no_sessions() {
    for limit in [["--allow", "10.0.0.0/8"], ["--max-connections", "1"]] {
        let (_listener, address) = Program::listen(&limit);
        let _other = TcpStream::connect(&address).unwrap();
        let sent = send(&address, &["--retry-for", "0"], b"hello\n");
        assert_eq!(sent.code(), Some(1));
        let errors = sent.errors();
        let last = errors.last().unwrap();
        assert!(last.contains("turned it away (a limit, or who is allowed; its log says which)"), "{limit:?}: {last}");
        assert!(!sent.stderr.contains("refused"), "nobody said so: {limit:?}: {}", sent.stderr);
    }
}

#[test]
fn a_count_acknowledges_what_it_prints_and_the_next_listener_gets_the_rest() {
    const LINES: u64 = 10_000;
    const COUNT: u64 = 2500;
    let (first, address) = Program::listen_on("127.0.0.4", &["--count", &COUNT.to_string()]);
    let mut sender = Program::start(["send", &address, "--retry-for", "1m"].iter().chain(&ACKED));
    sender.write_all_and_close(&lines(0..LINES));
    let first = first.end();
    assert_eq!(first.code(), Some(0), "{}", first.stderr);
    assert!(numbers(&first.stdout).into_iter().eq(0..COUNT));

    let second = Program::start(["listen", &address, "--count", &(LINES - COUNT).to_string()]);
    let second = second.end();
    assert!(numbers(&second.stdout).into_iter().eq(COUNT..LINES), "{}", second.stderr);
    let sent = sender.end();
    assert_eq!(sent.last_line(), format!("accepted {LINES}, settled {LINES}, failed 0"));
    assert_eq!(sent.code(), Some(0));
}

#[test]
fn what_a_count_leaves_no_place_for_fails_if_no_other_listener_comes() {
    const LINES: u64 = 10_000;
    const COUNT: u64 = 2500;
    let folder = Folder::new();
    let failed_file = text(&folder.path("failed"));
    let (listener, address) = Program::listen_on("127.0.0.5", &["--count", &COUNT.to_string()]);
    let file = folder.file("lines", &lines(0..LINES));
    let sent = send(&address, &[&file, "--retry-for", "0", "--failed", &failed_file], b"");
    assert_eq!(sent.code(), Some(1));
    let [accepted, settled, failed] = account(&sent);
    assert_eq!((settled, failed), (COUNT, accepted - COUNT), "{}", sent.stderr);
    assert!(numbers(&listener.end().stdout).into_iter().eq(0..COUNT));
    let failures: Vec<u64> = undelimited(&fs::read(&failed_file).unwrap())
        .iter()
        .map(|message| std::str::from_utf8(message).unwrap().parse().unwrap())
        .collect();
    let mut sorted = failures;
    // The one that was read last may be refused while those before it are still being given up.
    sorted.sort_unstable();
    assert!(sorted.into_iter().eq(COUNT..accepted), "{}", sent.stderr);
}

#[test]
fn a_count_is_exact_over_several_sessions() {
    let (listener, address) = Program::listen(&["--count", "2500"]);
    let senders: Vec<_> = (0..4)
        .map(|_| {
            let address = address.clone();
            thread::spawn(move || send(&address, &["--retry-for", "0"], &lines(0..1000)))
        })
        .collect();
    let ended = listener.end();
    assert_eq!(ended.stdout.iter().filter(|byte| **byte == b'\n').count(), 2500);
    assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
    let sent: Vec<Ended> = senders.into_iter().map(|sender| sender.join().unwrap()).collect();
    assert_eq!(sent.iter().map(|sent| account(sent)[1]).sum::<u64>(), 2500);
}

#[test]
fn what_cannot_be_decoded_is_acknowledged_and_takes_no_place() {
    let proto = data("gtfs-realtime/gtfs-realtime.proto");
    let schema = ["--proto", &proto, "--type", "transit_realtime.FeedHeader"];
    let (listener, address) = Program::listen(&[&schema[..], &["--count", "2"]].concat());
    let (good, bad) = (&b"\x0a\x031.0"[..], &b"\xff"[..]);
    let input = delimited([bad, good, bad, good, good]);
    let sent = send(&address, &["--input", "delimited", "--retry-for", "0"], &input);
    assert_eq!(sent.last_line(), "accepted 5, settled 4, failed 1", "{}", sent.stderr);
    let ended = listener.end();
    assert_eq!(ended.stdout.iter().filter(|byte| **byte == b'\n').count(), 2);
    assert!(ended.stderr.contains("2 messages could not be decoded"), "{}", ended.stderr);
}

#[test]
fn a_listener_that_is_told_to_leave_and_its_successor_print_each_line_once() {
    let (mut listener, address) = Program::listen_on("127.0.0.6", &[]);
    let mut sender = Program::start(["send", &address, "--retry-for", "1m"].iter().chain(&ACKED));
    let writer = Numbers::start(sender.take_stdin());
    let mut printed = Vec::new();
    for _ in 0..3 {
        listener.wait_lines(1000);
        listener.signal(Signal::TERM);
        let ended = listener.end();
        assert_eq!(ended.code(), Some(0), "{}", ended.stderr);
        printed.extend(numbers(&ended.stdout));
        listener = Program::start(["listen", &address]);
        listener.address();
    }
    listener.wait_lines(1000);
    let written = writer.stop();
    let sent = sender.end();
    assert_eq!(sent.last_line(), format!("accepted {written}, settled {written}, failed 0"), "{}", sent.stderr);
    assert_eq!(sent.code(), Some(0));
    listener.signal(Signal::TERM);
    printed.extend(numbers(&listener.end().stdout));
    assert!(printed.into_iter().eq(0..written), "in order, none missing and none twice");
}

#[test]
fn a_listener_that_is_killed_again_and_again_loses_no_line_and_repeats_a_window_at_most() {
    const KILLS: usize = 5;
    const WINDOW: u64 = 64 * 1024;
    let folder = Folder::new();
    let printed = folder.path("printed");
    let mut listener = Program::start_into(appended(&printed), ["listen", "127.0.0.7:0"]);
    let address = listener.address();
    let options = ["--retry-for", "1m", "--window", "64KiB"];
    let mut sender = Program::start(["send", &address].iter().chain(&ACKED).chain(&options));
    let writer = Numbers::start(sender.take_stdin());

    let (mut seen, mut expected) = (0, 0);
    // What the listener that has just ended added to the file.
    let mut check = |seen: &mut usize| {
        let content = fs::read(&printed).unwrap();
        let whole = whole_lines(&content).len();
        // What a kill tore is no line; the next one shall begin in a line of its own.
        File::options().write(true).open(&printed).unwrap().set_len(whole as u64).unwrap();
        let lines = numbers(&content[*seen..whole]);
        *seen = whole;
        assert!(lines.is_sorted_by(|left, right| left + 1 == *right), "in order, none missing and none twice");
        assert!(lines[0] <= expected, "{} comes after {expected} lines", lines[0]);
        let repeated: u64 = (lines[0]..expected).map(|number| number.to_string().len() as u64 + 3).sum();
        assert!(repeated <= WINDOW, "{repeated} bytes were repeated");
        expected = lines.last().unwrap() + 1;
        expected
    };
    for _ in 0..KILLS {
        wait_for_growth(&printed, seen + 5_000);
        listener.signal(Signal::KILL);
        listener.end();
        check(&mut seen);
        listener = Program::start_into(appended(&printed), ["listen", &address]);
        listener.address();
    }
    wait_for_growth(&printed, seen + 5_000);
    let written = writer.stop();
    let sent = sender.end();
    assert_eq!(sent.last_line(), format!("accepted {written}, settled {written}, failed 0"), "{}", sent.stderr);
    listener.signal(Signal::TERM);
    listener.end();
    assert_eq!(check(&mut seen), written, "the last line written is there");
}

fn wait_for_growth(path: &Path, size: usize) {
    let deadline = Instant::now() + DEADLINE;
    while fs::metadata(path).unwrap().len() < size as u64 {
        assert!(Instant::now() < deadline, "nothing is printed any more");
        thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_listener_whose_standard_output_breaks_leaves_every_message_to_the_next() {
    let first = Program::start_unread(["listen", "127.0.0.8:0", "--max-message-size", "1MiB"]);
    let address = first.address();
    first.drop_stdout();
    let options = ["--max-message-size", "1MiB", "--retry-for", "1m"];
    let mut sender = Program::start(["send", &address].iter().chain(&ACKED).chain(&options));
    // Each is written for itself, and fails in the middle of its batch.
    let line = [&vec![b'x'; 300_000][..], b"\n"].concat();
    sender.write_all_and_close(&line.repeat(3));
    let ended = first.end();
    assert_eq!(ended.code(), Some(1), "{}", ended.stderr);
    assert_eq!(ended.last_line(), "received 0 messages, 0 bytes");

    let second = Program::start(["listen", &address, "--max-message-size", "1MiB", "--count", "3"]);
    assert!(second.end().stdout == line.repeat(3));
    let sent = sender.end();
    assert_eq!(sent.last_line(), "accepted 3, settled 3, failed 0", "{}", sent.stderr);
}

#[test]
fn what_the_receivers_handler_rejects_is_reported_with_its_words_and_kept() {
    let folder = Folder::new();
    let failed_file = text(&folder.path("failed"));
    let listener = blocking::Listener::bind("127.0.0.1:0").unwrap();
    let server = listener.spawn(|message: &[u8]| match message {
        b"bad" => Err(HandlerError::rejected(42, "no\x1b[2Jway")),
        _ => Ok(()),
    });
    let address = server.local_address().to_string();
    let sent = send(&address, &["--failed", &failed_file], b"good\nbad\ngood\n");
    assert_eq!(sent.last_line(), "accepted 3, settled 2, failed 1");
    assert_eq!(sent.code(), Some(1));
    let errors = sent.errors();
    assert!(errors[0].contains("3 bytes") && errors[0].ends_with("with code 42: no\\u{1b}[2Jway"), "{errors:?}");
    assert_eq!(undelimited(&fs::read(&failed_file).unwrap()), [b"bad"]);
}
